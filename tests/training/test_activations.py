import numpy as np
import pytest
import torch

from fedtalos.data.batches import View
from fedtalos.data.images import LabelledImages
from fedtalos.training.feature_cache import ActivationCache

VIEW = View(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture
def stored() -> LabelledImages:
    pixels = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return LabelledImages(pixels, torch.arange(20) % 5)


def cache(vit, stored, folder, *, passed, limit):
    return ActivationCache(vit, passed, stored, VIEW, batch_size=6, precision="fp32", limit=limit, folder=folder)


@pytest.mark.parametrize("passed", [1, 4, 8])
def test_stages_before_and_after_make_the_whole_model(vit, images, passed):
    assert len(vit.stages) == 8
    with torch.no_grad():
        assert torch.equal(vit(vit.run(images, 0, passed), passed=passed), vit(images))


@pytest.mark.parametrize(
    ("moving", "stages"),
    [
        (["head.weight"], 8),
        (["norm.bias", "head.bias"], 7),
        (["head.weight", "blocks.3.attn.qkv.weight", "blocks.5.mlp.fc1.bias"], 4),
        (["blocks.0.norm1.weight"], 1),
        (["blocks.5.mlp.fc1.bias", "pos_embed"], 0),
        (["patch_embed.proj.bias"], 0),
    ],
)
def test_frozen_stages_end_before_the_first_that_moves(vit, moving, stages):
    assert set(moving) <= {name for name, _ in vit.named_parameters()}
    assert vit.frozen_stages(moving) == stages


@pytest.mark.parametrize("passed", [3, 8])
def test_a_cache_holds_what_the_stages_give_in_memory_and_on_disk_alike(vit, stored, tmp_path, passed):
    in_memory = cache(vit, stored, tmp_path, passed=passed, limit=1e9)
    on_disk = cache(vit, stored, tmp_path, passed=passed, limit=0)
    assert in_memory.bytes_in_memory == in_memory.activations.pixels.nbytes
    assert on_disk.bytes_in_memory == 0
    assert not list(tmp_path.iterdir())  # the file has no name: nothing is left behind
    ids = np.array([1, 4, 9, 16, 19, 0, 2])
    with torch.no_grad():
        expected = vit.run(VIEW(stored.pixels[ids]), 0, passed)
    for filled in (in_memory, on_disk):
        filled.fill(ids)
        torch.testing.assert_close(filled.activations.pixels[ids], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(in_memory.activations.pixels[ids], on_disk.activations.pixels[ids])


def test_an_image_is_computed_once(vit, stored, tmp_path):
    filled = cache(vit, stored, tmp_path, passed=8, limit=1e9)
    seen = []
    vit.patch_embed.register_forward_hook(lambda _m, inputs, _o: seen.append(len(inputs[0])))
    filled.fill(np.arange(8))
    filled.fill(np.arange(12))
    filled.fill(np.arange(12))
    assert seen == [6, 2, 4]
