"""The one owner of an MQTT connection."""
