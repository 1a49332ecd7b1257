"""FedFog: federated learning over a fog (MQTT below, Flower above)."""

__version__ = "0.1.0"
