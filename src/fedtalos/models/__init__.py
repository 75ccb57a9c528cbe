"""Vision Transformers and where their weights come from."""
