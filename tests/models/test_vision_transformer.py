import json
import os
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from golden.make_vit_golden import CLASSES, GOLDEN, IMAGE_SIZES, PATCH, VARIANTS, images, noise, written_out_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedtalos.devices import autocast
from fedtalos.errors import InputError
from fedtalos.models.load import load_into
from fedtalos.models.transformer_layers import PatchEmbed, attention_by_products
from fedtalos.models.vision_transformer import WIDTH_DEPTH_HEADS, Architecture, VisionTransformer
from fedtalos.models.weights import Weights
from fedtalos.models.weights.pixels import HALF
from fedtalos.models.weights.read import load_weights
from fedtalos.randomness import torch_generator

REGISTERS = {"registers": 4, "layer_scale": True, "class_position": False}
OURS = {"plain": {}, "DINOv2": {"layer_scale": True}, "DINOv2 with registers": REGISTERS}
"""What the golden variants are called here."""


def written_out(size: str, image_size: int, patch_size: int, **variant: int) -> Weights:
    """The golden formula's weights for any architecture."""
    architecture = Architecture(size, image_size, patch_size, CLASSES, **variant)
    model = VisionTransformer(architecture, torch_generator(0, "test"))
    tensors = written_out_weights({name: p.shape for name, p in model.named_parameters()})
    return Weights(tensors, model.architecture, *HALF, source="formula", sha256="")


@torch.no_grad()
def our_logits(weights: Weights, image_size: int) -> Tensor:
    architecture = replace(weights.architecture, image_size=image_size)
    model = VisionTransformer(architecture, torch_generator(0, "test")).eval()
    assert load_into(model, weights) == []
    return model(images(image_size))


@torch.no_grad()
def timms_logits(weights: Weights, image_size: int) -> Tensor:
    """timm resamples the position embedding by its own means; skips the test where timm cannot be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from timm.models.vision_transformer import VisionTransformer as TimmsVisionTransformer
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        pytest.skip(f"timm cannot be imported here ({error}); its golden output is tested always")
    theirs = weights.architecture
    dim, depth, heads = WIDTH_DEPTH_HEADS[theirs.size]
    shape = {"embed_dim": dim, "depth": depth, "num_heads": heads, "num_classes": theirs.num_classes}
    shape |= {"reg_tokens": theirs.registers, "no_embed_class": not theirs.class_position}
    shape |= {"init_values": 1e-5 if theirs.layer_scale else None}
    model = TimmsVisionTransformer(theirs.image_size, theirs.patch_size, **shape).eval()
    model.load_state_dict(weights.tensors)
    model.set_input_size(img_size=(image_size, image_size))
    return model(images(image_size))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("image_size", IMAGE_SIZES)
def test_logits_equal_timms_golden_ones(variant: str, image_size: int) -> None:
    golden = torch.tensor(json.loads(GOLDEN.read_text())["logits"][variant][str(image_size)])
    ours = our_logits(written_out("micro", IMAGE_SIZES[0], PATCH, **OURS[variant]), image_size)
    torch.testing.assert_close(ours, golden, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("size", "trained_at", "patch_size", "image_size", "variant"),
    [
        ("micro", 32, 4, 32, {}),
        ("micro", 28, 7, 28, {}),
        ("micro", 32, 4, 20, {}),
        ("tiny", 64, 16, 64, {}),
        ("tiny", 64, 16, 96, {}),
        ("small", 64, 16, 48, {}),
        ("small", 64, 8, 48, {}),
        ("small", 56, 14, 84, {"layer_scale": True}),
        ("small", 56, 14, 84, REGISTERS),
        ("small", 56, 14, 56, {"layer_scale": True, "class_position": False}),
    ],
)
def test_logits_equal_timms(
    size: str, trained_at: int, patch_size: int, image_size: int, variant: dict[str, int]
) -> None:
    weights = written_out(size, trained_at, patch_size, **variant)
    expected = timms_logits(weights, image_size)
    torch.testing.assert_close(our_logits(weights, image_size), expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("image_size", [224, 160])
def test_logits_of_real_weights_equal_timms(image_size: int) -> None:
    path = os.environ.get("FEDTALOS_WEIGHTS")
    if path is None:
        pytest.skip("needs real weights: set FEDTALOS_WEIGHTS to a ViT file")
    weights = load_weights(path, "tiny")
    expected = timms_logits(weights, image_size)
    torch.testing.assert_close(our_logits(weights, image_size), expected, atol=1e-5, rtol=1e-5)


@settings(deadline=None)
@given(patch=st.integers(1, 9), grid=st.integers(1, 6), dim=st.integers(1, 5))
def test_patches_are_read_row_by_row_at_any_size(patch: int, grid: int, dim: int) -> None:
    embed = PatchEmbed(patch * grid, patch, dim)
    batch = images(patch * grid)
    tokens = torch.stack(
        [
            torch.einsum(
                "bchw,dchw->bd",
                batch[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch],
                embed.proj.weight,
            )
            for row in range(grid)
            for column in range(grid)
        ],
        dim=1,
    )
    torch.testing.assert_close(embed(batch), tokens + embed.proj.bias, atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=10)
@given(patch=st.integers(2, 16), grid=st.integers(1, 4), classes=st.integers(1, 7))
def test_any_image_and_patch_size_gives_logits_per_image(patch: int, grid: int, classes: int) -> None:
    model = VisionTransformer(Architecture("micro", patch * grid, patch, classes), torch_generator(0, "test"))
    assert model.pos_embed.shape == (1, grid**2 + 1, 96)
    assert model(images(patch * grid)).shape == (2, classes)


def test_an_images_logits_do_not_depend_on_its_batch() -> None:
    model = VisionTransformer(Architecture("micro", 32, 4, 10), torch_generator(0, "test")).eval()
    nn.init.trunc_normal_(model.head.weight, generator=torch_generator(0, "head"))
    batch = noise("batch", (5, 3, 32, 32))
    with torch.no_grad():
        together = model(batch)
        alone = torch.cat([model(image[None]) for image in batch])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(together, F.linear(model.features(batch), model.head.weight, model.head.bias))


def test_the_same_generator_gives_the_same_bytes_whatever_torchs_global_state() -> None:
    architecture = Architecture("micro", 32, 4, 10)
    models = []
    for global_seed, source in ((1, "first"), (2, "first"), (1, "second")):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(global_seed)
            models.append(VisionTransformer(architecture, torch_generator(0, source)).state_dict())
    first, again, other = models
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.mlp.fc1.weight"], other["blocks.0.mlp.fc1.weight"])


def test_fresh_weights_have_the_deviations_they_are_drawn_with() -> None:
    model = VisionTransformer(Architecture("micro", 32, 4, 10), torch_generator(0, "test"))
    for name, p in model.named_parameters():
        if "norm" in name:
            assert torch.equal(p, torch.full_like(p, float(name.endswith("weight"))))
        elif name.endswith("bias"):
            assert not p.any()
        else:
            drawn = {"cls_token": 1e-6, "patch_embed.proj.weight": 48**-0.5}.get(name, 0.02)
            assert p.std().item() == pytest.approx(drawn, rel=0.1)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (("huge", 32, 4, 10), "size 'huge': expected one of micro"),
        (("micro", 30, 4, 10), "not a multiple"),
        (("micro", 2, 4, 10), "not a multiple"),
        (("small", 224, 15, 10), "not a multiple"),
        (("micro", 32, 0, 10), "not a multiple"),
        (("micro", 32, 4, -1), "at least 0"),
    ],
)
def test_impossible_architectures_are_refused(architecture: tuple[str, int, int, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Architecture(*architecture)


def test_attention_by_products_equals_the_fused_kernel_and_its_gradients():
    def outcome(attend, dtype):
        q, k, v = (
            torch.randn(2, 3, 17, 32, generator=torch_generator(0, name)).to(dtype).requires_grad_() for name in "qkv"
        )
        out = attend(q, k, v)
        out.float().square().sum().backward()
        return [tensor.float() for tensor in (out.detach(), q.grad, k.grad, v.grad)]

    expected = outcome(F.scaled_dot_product_attention, torch.float32)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        for found, reference in zip(outcome(attention_by_products, dtype), expected, strict=True):
            assert found.dtype == torch.float32
            assert (found - reference).norm() <= tolerance * reference.norm()


def test_bf16_on_a_cpu_takes_the_plain_products(vit, monkeypatch):
    vit, x = vit.cpu(), torch.zeros(2, 3, 8, 8)

    def refuse(*_, **__):
        raise AssertionError("the fused kernel was called")

    monkeypatch.setattr(F, "scaled_dot_product_attention", refuse)
    with autocast(x.device, "bf16"):
        logits = vit(x)
    assert bool(logits.isfinite().all())
    with pytest.raises(AssertionError, match="fused"):
        vit(x)
