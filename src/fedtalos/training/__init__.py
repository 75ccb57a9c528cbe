"""Everything that computes on a model: the inner loop, Fisher scores, masks, federated rounds."""
