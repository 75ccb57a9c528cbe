"""JAX in the manner of FedJAX: a ViT of plain functions, all clients of a round vmapped, their steps one jitted scan.

python benchmarks/peers/jax_vit.py [settings]

Weights are drawn anew, so it takes part in times and not in ``run.py --check``. AdamW and SGD
are written out, as optax has them; bf16 is that of products.
"""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import tyro
from task import Meter, Settings, client_batches, client_size, sampled_clients

from fedtalos.models.vision_transformer import WIDTH_DEPTH_HEADS

Tree = Any
"""Arrays by name."""


def main(settings: Settings) -> None:
    meter = Meter()
    if settings.moves != "all":
        raise SystemExit("jax_vit.py trains everything; give --moves all")
    if settings.device == "cuda" and jax.default_backend() != "gpu":
        raise SystemExit(f"JAX has no CUDA here, but {jax.default_backend()}")
    theta = parameters(settings)
    train = jax.jit(partial(trained_round, settings))
    meter.mark()
    for number in range(1, settings.rounds + 1):
        clients = sampled_clients(settings, number)
        batches = [batches_of(settings, client) for client in clients]
        pixels, labels = (jnp.stack(parts) for parts in zip(*batches, strict=True))  # (V, J, B, 3, H, W), (V, J, B)
        sizes = np.array([client_size(settings, client) for client in clients], np.float32)
        theta = jax.block_until_ready(train(theta, pixels, labels, sizes / sizes.sum()))
        meter.mark()
    meter.report(settings, torch.nn.Module(), "jax")


@cache
def batches_of(settings: Settings, client: int) -> tuple[jax.Array, jax.Array]:
    """A client's batches, uint8 (J, B, 3, H, W) and (J, B), which stay on JAX's device."""
    pixels, labels = (torch.stack(parts).cpu().numpy() for parts in zip(*client_batches(settings, client), strict=True))
    return jnp.asarray(pixels), jnp.asarray(labels.astype(np.int32))


def parameters(settings: Settings) -> Tree:
    """Fresh weights, float32."""
    width, depth, _ = WIDTH_DEPTH_HEADS[settings.model_size]
    patches, rng = (settings.image_size // settings.patch_size) ** 2, np.random.default_rng(settings.seed)

    def linear(inputs: int, outputs: int) -> Tree:
        return {"w": 0.02 * rng.standard_normal((inputs, outputs), np.float32), "b": np.zeros(outputs, np.float32)}

    def norm() -> Tree:
        return {"w": np.ones(width, np.float32), "b": np.zeros(width, np.float32)}

    found = {"patch": linear(3 * settings.patch_size**2, width), "head": linear(width, settings.classes)}
    found |= {"norm": norm(), "class": np.zeros((1, width), np.float32)}
    found["position"] = 0.02 * rng.standard_normal((patches + 1, width), np.float32)
    for block in range(depth):
        found[f"{block}"] = {"norm1": norm(), "norm2": norm(), "qkv": linear(width, 3 * width)} | {
            "proj": linear(width, width),
            "fc1": linear(width, 4 * width),
            "fc2": linear(4 * width, width),
        }
    return jax.tree.map(jnp.asarray, found)


def logits(settings: Settings, theta: Tree, pixels: jax.Array) -> jax.Array:
    """uint8 (B, 3, H, W) -> (B, C)."""
    width, depth, heads = WIDTH_DEPTH_HEADS[settings.model_size]
    side, patch, batch = settings.image_size // settings.patch_size, settings.patch_size, len(pixels)
    dtype = jnp.bfloat16 if settings.precision == "bf16" else jnp.float32

    def linear(x: jax.Array, layer: Tree) -> jax.Array:
        return x.astype(dtype) @ layer["w"].astype(dtype) + layer["b"].astype(dtype)

    def norm(x: jax.Array, layer: Tree) -> jax.Array:
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * layer["w"] + layer["b"]

    x = (pixels.astype(jnp.float32) / 255 - 0.5) / 0.25
    x = x.reshape(batch, 3, side, patch, side, patch).transpose(0, 2, 4, 1, 3, 5).reshape(batch, side**2, -1)
    x = linear(x, theta["patch"]).astype(jnp.float32)
    x = jnp.concatenate([jnp.broadcast_to(theta["class"], (batch, 1, width)), x], 1) + theta["position"]
    for block in (theta[f"{number}"] for number in range(depth)):
        qkv = linear(norm(x, block["norm1"]), block["qkv"]).reshape(batch, -1, 3, heads, width // heads)
        mixed = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]).reshape(batch, -1, width)
        x = x + linear(mixed, block["proj"])
        x = x + linear(jax.nn.gelu(linear(norm(x, block["norm2"]), block["fc1"]), approximate=False), block["fc2"])
    return linear(norm(x[:, 0], theta["norm"]), theta["head"]).astype(jnp.float32)


def cross_entropy(settings: Settings, theta: Tree, pixels: jax.Array, labels: jax.Array) -> jax.Array:
    log_p = jax.nn.log_softmax(logits(settings, theta, pixels))
    return -jnp.take_along_axis(log_p, labels[:, None], 1).mean()


def trained_round(settings: Settings, theta: Tree, pixels: jax.Array, labels: jax.Array, shares: jax.Array) -> Tree:
    """Every client's steps from theta, vmapped, and the mean of what they come to."""
    rate, (beta1, beta2) = settings.learning_rate, (0.9, 0.999)

    def step(state: Tree, batch: tuple[jax.Array, jax.Array]) -> tuple[Tree, None]:
        values, means, squares, number = state
        gradient = jax.grad(partial(cross_entropy, settings))(values, *batch)
        if settings.optimizer == "sgd":
            return (jax.tree.map(lambda p, g: p - rate * g, values, gradient), means, squares, number), None
        number = number + 1
        means = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, means, gradient)
        squares = jax.tree.map(lambda s, g: beta2 * s + (1 - beta2) * g * g, squares, gradient)

        def moved(p: jax.Array, m: jax.Array, s: jax.Array) -> jax.Array:
            return p - rate * (m / (1 - beta1**number)) / (jnp.sqrt(s / (1 - beta2**number)) + 1e-8)

        return (jax.tree.map(moved, values, means, squares), means, squares, number), None

    def client(own_pixels: jax.Array, own_labels: jax.Array) -> Tree:
        zeros = jax.tree.map(jnp.zeros_like, theta)
        return jax.lax.scan(step, (theta, zeros, zeros, 0.0), (own_pixels, own_labels))[0][0]

    found = jax.vmap(client)(pixels, labels)
    return jax.tree.map(lambda values: jnp.tensordot(shares, values, 1), found)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
