from itertools import islice

import numpy as np
import torch

from fedtalos.data.batches import batch_positions, evaluation_batches, steps_per_epoch, training_batches
from fedtalos.data.images import LabelledImages
from fedtalos.data.view import View, crop, draw_crops
from fedtalos.randomness import generator

VIEW = View(8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def some_images(count=20, side=8):
    pixels = torch.from_numpy(generator(0, "pixels").integers(0, 256, (count, 3, side, side), dtype=np.uint8))
    return LabelledImages(pixels, torch.arange(count))


def test_an_epoch_holds_every_position_once_and_the_next_is_another_order():
    first = list(islice(batch_positions(10, 4, generator(0, "b")), 6))
    assert [len(batch) for batch in first] == [4, 4, 2, 4, 4, 2]
    one, two = np.concatenate(first[:3]), np.concatenate(first[3:])
    assert sorted(one) == sorted(two) == list(range(10))
    assert list(one) != list(two)
    assert steps_per_epoch(10, 4) == 3


def test_crops_equal_numpy_slices_and_flips_mirror_them():
    images = some_images(6)
    cropped = crop(images.pixels, draw_crops("crop", 6, 8, [generator(3, "a")]))
    rng = generator(3, "a")
    top, left = rng.integers(0, 3, 6), rng.integers(0, 3, 6)
    padded = np.pad(images.pixels.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    for i in range(6):
        assert np.array_equal(cropped[i].numpy(), padded[i, :, top[i] : top[i] + 8, left[i] : left[i] + 8])
    flipped = crop(images.pixels, draw_crops("crop_flip", 6, 8, [generator(3, "a")]))
    same = [torch.equal(flipped[i], cropped[i]) for i in range(6)]
    mirrored = [torch.equal(flipped[i], cropped[i].flip(2)) for i in range(6)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert any(same)
    assert any(mirrored)


def test_view_resizes_and_normalises():
    view = View(16, (0.5, 0.5, 0.5), (0.5, 0.25, 0.5))
    out = view(torch.full((2, 3, 8, 8), 255, dtype=torch.uint8))
    assert out.shape == (2, 3, 16, 16)
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([1.0, 2.0, 1.0]))


def test_evaluation_images_are_as_stored_and_training_draws_repeat():
    images = some_images()
    seen = torch.cat([x for x, _ in evaluation_batches(images, VIEW, 6)])
    torch.testing.assert_close(seen, images.pixels.float() / 255)

    def draw():
        chosen = np.arange(3, 17)
        return list(
            training_batches(
                images, chosen, VIEW, steps=5, batch_size=4, augmentation="crop_flip", rng=generator(1, "batches", 2, 3)
            )
        )

    for (x, y), (x2, y2) in zip(draw(), draw(), strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
        assert set(y.tolist()) <= set(range(3, 17))
