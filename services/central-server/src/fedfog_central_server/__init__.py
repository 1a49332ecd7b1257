"""The central tier: Flower, the global model, its evaluation and the results."""
