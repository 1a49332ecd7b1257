"""The edge client: as many as there are devices."""
