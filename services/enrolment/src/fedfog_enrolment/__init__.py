"""FedFog's PKI: its certificate authority, and how a device gets an identity from it."""
