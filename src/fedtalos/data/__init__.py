"""Images and labels as tensors: loaded, split, drawn in batches, made ready for a model."""
