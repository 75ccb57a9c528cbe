"""Images and labels as tensors: loading, splitting, batching."""
