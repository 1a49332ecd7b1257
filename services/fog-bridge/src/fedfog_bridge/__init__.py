"""The fog bridge: hands a region's partial aggregate to the Flower server."""
