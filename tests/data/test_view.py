"""Views: size, interpolation and crop of what the model sees."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fedtalos.data.view import View
from fedtalos.randomness import generator

ZERO, ONE = (0.0,) * 3, (1.0,) * 3


def some_pixels(size: int, low=0, high=256) -> torch.Tensor:
    return torch.from_numpy(generator(0, "pixels").integers(low, high, (2, 3, size, size), dtype=np.uint8))


@pytest.mark.parametrize("size", [8, 16, 24])
def test_the_default_is_bilinear_without_a_crop(size):
    pixels, mean, std = some_pixels(16), (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    expected = pixels.float().div_(255)
    if size != 16:
        expected = F.interpolate(expected, size=(size, size), mode="bilinear", align_corners=False, antialias=size < 16)
    expected = expected.sub_(torch.tensor(mean).view(3, 1, 1)).div_(torch.tensor(std).view(3, 1, 1))
    assert torch.equal(View(size, mean, std)(pixels), expected)


@pytest.mark.parametrize(("stored", "crop"), [(64, 0.9), (20, 0.9), (32, 0.875), (248, 0.9), (40, 1.0)])
def test_bicubic_and_crop_are_those_of_pillow_and_timm(stored, crop):
    """timm: resize to floor(S / crop_pct), then the middle S; Pillow rounds and clips bytes twice, ours never."""
    pixels = some_pixels(stored, 70, 190)
    view = View(224, ZERO, ONE, interpolation="bicubic", crop=crop)
    size = int(224 / crop)
    start = int(round((size - 224) / 2.0))
    for seen, image in zip(view(pixels), pixels, strict=True):
        resized = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size, size), Image.Resampling.BICUBIC)
        expected = np.asarray(resized)[start : start + 224, start : start + 224]
        assert np.abs(seen.permute(1, 2, 0).numpy() * 255 - expected).max() <= 1.1
    assert view.resized == size
    assert view(pixels).shape == (2, 3, 224, 224)
    assert view(pixels).is_contiguous()


def test_images_that_are_stored_at_the_resized_size_are_only_cropped():
    view = View(18, ZERO, ONE, interpolation="bicubic", crop=0.9)
    pixels = some_pixels(view.resized)
    assert torch.equal(view(pixels), pixels[..., 1:19, 1:19].float() / 255)


def test_a_bilinear_crop():
    pixels = some_pixels(10)
    whole = View(20, ZERO, ONE)(pixels)
    assert torch.equal(View(18, ZERO, ONE, crop=0.9)(pixels), whole[..., 1:19, 1:19])
