"""Vision Transformers and other backbones, their weights and their heads."""
