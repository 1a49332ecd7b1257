"""The fog aggregator: one per region."""
