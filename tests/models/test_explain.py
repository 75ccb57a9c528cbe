"""Explanations against references written from the papers, on models small enough to follow."""

import pytest
import torch

from fedtalos.errors import InputError
from fedtalos.models.backbone import Backbone
from fedtalos.models.explain import attention_rollout, grad_cam
from fedtalos.models.vision_transformer import Architecture, VisionTransformer
from fedtalos.randomness import torch_generator


@pytest.fixture(params=[0, 2], ids=["plain", "registers"])
def model(request, device) -> VisionTransformer:
    architecture = Architecture("micro", 8, 2, 5, registers=request.param, layer_scale=request.param > 0)
    model = VisionTransformer(architecture, torch_generator(0, "explained"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch_generator(0, "more")))
    return model.eval().to(device)


def test_rollout_multiplies_the_blocks_attention(model, images):
    """The reference asks torch's fused kernel for the attention, by values that are the unit vectors."""
    x, rolled = model.embed(images), None
    for block in model.blocks:
        inside = block.norm1(x)
        qkv = block.attn.qkv(inside).unflatten(2, (3, model.architecture.heads, -1)).permute(2, 0, 3, 1, 4)
        tokens = torch.eye(x.shape[1], device=x.device).expand(len(x), model.architecture.heads, -1, -1)
        attention = torch.nn.functional.scaled_dot_product_attention(qkv[0], qkv[1], tokens).mean(1)
        mixed = (attention + torch.eye(x.shape[1], device=x.device)) / 2
        rolled = mixed if rolled is None else mixed @ rolled
        x = block(x)
    prefix = 1 + model.architecture.registers
    found = attention_rollout(model, images)
    torch.testing.assert_close(found, rolled[:, 0, prefix:].reshape(-1, 4, 4))
    assert found.min() > 0
    assert (found.sum((1, 2)) < 1).all()  # the class token's own share is left out


def test_rollout_of_uniform_attention_is_uniform(model, images):
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.zero_()
            block.attn.qkv.bias.zero_()
    found = attention_rollout(model, images)
    tokens, depth = 17 + model.architecture.registers, len(model.blocks)
    torch.testing.assert_close(found, torch.full_like(found, (1 - 0.5**depth) / tokens))


def test_grad_cam_is_selvarajus_on_the_last_blocks_input(model, images):
    classes = torch.arange(len(images), device=images.device) % 5
    kept = []

    def keep(_module, _inputs, output):
        output.retain_grad()
        kept.append(output)

    handle = model.blocks[-1].norm1.register_forward_hook(keep)
    model(images).gather(1, classes[:, None]).sum().backward()
    handle.remove()
    prefix = 1 + model.architecture.registers
    features, gradient = kept[0][:, prefix:], kept[0].grad[:, prefix:]
    expected = (gradient.mean(1, keepdim=True) * features).sum(-1).clamp(min=0).reshape(-1, 4, 4)
    model.zero_grad()
    found = grad_cam(model, images, classes)
    torch.testing.assert_close(found, expected)
    assert found.max() > 0
    assert not torch.allclose(found, grad_cam(model, images, (classes + 1) % 5))


def test_nothing_of_the_model_is_changed(model, images):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attention_rollout(model, images)
    grad_cam(model, images, torch.zeros(len(images), dtype=torch.long, device=images.device))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(block.attn._forward_hooks for block in model.blocks)


def test_other_models_are_refused(images):
    class Other(Backbone):
        stages = ()

        def frozen_stages(self, moving):
            return 0

    other = Other()
    other.architecture = "timm:convnext"
    for explain in (lambda: attention_rollout(other, images), lambda: grad_cam(other, images, images)):
        with pytest.raises(InputError, match="explain: timm:convnext is another library's"):
            explain()
