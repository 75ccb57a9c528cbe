import copy
import errno
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedtalos.data.images import LabelledImages
from fedtalos.training import sparse_optimizer
from fedtalos.training.feature_cache import FeatureCache, FeatureStore, view_of
from fedtalos.training.local_training import LocalTraining
from fedtalos.training.masked_parameters import MaskedParameters, head_mask


@pytest.fixture
def stored() -> LabelledImages:
    pixels = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return LabelledImages(pixels, torch.arange(20) % 5)


def cache(vit, stored, folder, *, passed, limit):
    return FeatureCache(vit, passed, stored, batch_size=6, precision="fp32", limit=limit, folder=folder)


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
    assert in_memory.bytes_in_memory == in_memory.features.pixels.nbytes
    assert on_disk.bytes_in_memory == 0
    assert not list(tmp_path.iterdir())  # the file has no name: nothing is left behind
    ids = np.array([1, 4, 9, 16, 19, 0, 2])
    with torch.no_grad():
        expected = vit.run(view_of(vit)(stored.pixels[ids]), 0, passed)
    for filled in (in_memory, on_disk):
        filled.fill(ids)
        torch.testing.assert_close(filled.features.pixels[ids], expected.cpu(), rtol=1e-5, atol=1e-6)
    assert torch.equal(in_memory.features.pixels[ids], on_disk.features.pixels[ids])


def refuse(number: int):
    def refused(*_):
        raise OSError(number, os.strerror(number))

    return refused


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room is asked for on POSIX")
def test_a_full_disk_is_an_error_that_names_the_folder_and_not_a_signal_later(vit, stored, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", refuse(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left") as error:
        cache(vit, stored, tmp_path, passed=8, limit=0)
    assert error.value.filename.startswith(str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room is asked for on POSIX")
def test_where_room_cannot_be_asked_for_it_is_written(vit, stored, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", refuse(errno.EOPNOTSUPP))
    written, ids, write = [], np.arange(20), os.write
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda descriptor, part: written.append(len(part)) or write(descriptor, part))
        on_disk = cache(vit, stored, tmp_path, passed=3, limit=0)
    assert sum(written) == on_disk.features.pixels.nbytes
    assert not on_disk.features.pixels.any()
    in_memory = cache(vit, stored, tmp_path, passed=3, limit=1e9)
    for filled in (on_disk, in_memory):
        filled.fill(ids)
    assert torch.equal(on_disk.features.pixels, in_memory.features.pixels)
    monkeypatch.setattr(os, "write", refuse(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left") as error:
        cache(vit, stored, tmp_path, passed=3, limit=0)
    assert "kept activations" in error.value.filename


def test_an_image_is_computed_once(vit, stored, tmp_path):
    filled = cache(vit, stored, tmp_path, passed=8, limit=1e9)
    seen = []
    vit.patch_embed.register_forward_hook(lambda _m, inputs, _o: seen.append(len(inputs[0])))
    filled.fill(np.arange(8))
    filled.fill(np.arange(12))
    filled.fill(np.arange(12))
    assert seen == [6, 2, 4]


def test_a_store_keeps_a_cache_per_set_of_images_and_drops_that_of_other_stages(vit, stored):
    store, seen = FeatureStore(), []
    vit.patch_embed.register_forward_hook(lambda _m, inputs, _o: seen.append(len(inputs[0])))
    everything = [np.arange(len(stored))]
    for images, passed, computed in [
        (stored, 8, [1, 20]),  # one image tells the shape
        (stored.slice(0, None), 8, []),  # a view of the same images
        (stored.slice(0, 10), 8, [1, 10]),
        (stored, 4, [1, 20]),  # other stages
        (stored, 8, [1, 20]),
        (replace(stored, labels=stored.labels.flip(0)), 8, [1, 20]),  # other labels
    ]:
        seen.clear()
        store.source(vit, images, passed, [np.arange(len(images))])
        assert seen == computed
    store.keep_only(4)
    seen.clear()
    store.source(vit, stored, 8, everything)
    assert seen == [1, 20]


@pytest.mark.parametrize("fused", [(), ("cpu", "cuda")])
def test_features_are_computed_anew_where_what_made_them_has_changed(vit, stored, fused, monkeypatch):
    monkeypatch.setattr(sparse_optimizer, "FUSED", fused)
    head, block = (
        MaskedParameters(vit, {name: torch.ones_like(vit.get_parameter(name), dtype=torch.bool)})
        for name in ("head.weight", "blocks.2.norm1.weight")
    )
    ids = np.arange(len(stored))

    def features(moving):
        return moving.source(stored, [ids]).images.pixels

    with torch.no_grad():
        expected = vit.features(view_of(vit)(stored.pixels)).cpu()
        torch.testing.assert_close(before := features(head).clone(), expected, rtol=1e-5, atol=1e-6)
        kept = features(block)
        local = LocalTraining(steps=2, learning_rate=0.1)
    local.run(head, stored, ids, np.random.default_rng(0))
    assert torch.equal(features(head), before)
    local.run(block, stored, ids, np.random.default_rng(0))
    assert features(block) is kept
    with torch.no_grad():
        expected = vit.features(view_of(vit)(stored.pixels)).cpu()
        assert (expected - before).abs().max() > 0.01
        torch.testing.assert_close(features(head), expected, rtol=1e-5, atol=1e-6)
        other = copy.deepcopy(vit)
        other.norm.bias += 1
        shared = MaskedParameters(other, head_mask(other), features=head.features)
        torch.testing.assert_close(features(shared), expected + 1, rtol=1e-5, atol=1e-5)


def test_a_head_sees_the_same_logits_through_kept_features(vit, stored):
    moving = MaskedParameters(vit, head_mask(vit))
    ids = np.array([3, 1, 7, 12])
    source = moving.source(stored, [ids])
    with torch.no_grad():
        kept = source.forward(source.view(source.images.pixels[ids]))
        torch.testing.assert_close(kept, vit(view_of(vit)(stored.pixels[ids])), rtol=1e-5, atol=1e-6)
    features, labels = moving.features.features(vit, stored, ids)
    assert torch.equal(features, source.images.pixels[ids])
    assert torch.equal(labels, stored.labels[ids])
