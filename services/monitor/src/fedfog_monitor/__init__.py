"""The monitor as a service: `fedfog monitor`, which the shared wheel holds."""
