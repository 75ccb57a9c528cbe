"""Sparse, task-localised federated fine-tuning of Vision Transformers."""

__version__ = "0.1.0"
