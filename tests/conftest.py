"""Small models and images that the tests share."""

import pytest
import torch

from fedtalos.models.vision_transformer import Architecture, VisionTransformer
from fedtalos.randomness import torch_generator


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # small tensors: threads cost more than they give


@pytest.fixture
def vit() -> VisionTransformer:
    """A micro ViT on 8 px images, 17 tokens, 5 classes."""
    return VisionTransformer(Architecture("micro", 8, 2, 5), torch_generator(0, "test"))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(12, 3, 8, 8, generator=torch_generator(0, "images"))


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.arange(12) % 5
