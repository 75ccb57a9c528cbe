"""A training step of V Vision Transformers written for nothing but speed: what a device can do.

    python benchmarks/prototype_step.py --size tiny --pixels 32 --patch 4      needs only torch

Forward, backward, clipping by client and AdamW of V clients in batched products and fused attention, passed through
torch.compile and captured as one CUDA graph. It has no data, no masks and no rounds: images are drawn once and stay.
Elsewhere than on CUDA the step runs as it stands.

Shapes: V clients, B images of a client's batch, T tokens, D width, N patches, p patch side.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH_DEPTH_HEADS = {"micro": (96, 6, 3), "tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12)}
CLASSES = 100


@dataclass(frozen=True)
class Prototype:
    """Sizes of the step; ``moves`` is all, or qkv: the weights of q, k and v alone. ``dtype`` is that of products."""

    size: str
    pixels: int
    patch: int
    clients: int = 10
    batch_size: int = 64
    moves: str = "all"
    dtype: torch.dtype = torch.bfloat16

    @property
    def patches(self) -> int:
        """N."""
        return (self.pixels // self.patch) ** 2

    def parameters(self, device: torch.device) -> dict[str, Tensor]:
        """Fresh parameters by name, (V, ...) float32; those that move take gradients."""
        width, depth, _ = WIDTH_DEPTH_HEADS[self.size]
        drawn = torch.Generator(device=device).manual_seed(0)
        linear = {"patch": (3 * self.patch**2, width), "head": (width, CLASSES)}
        norms = ["norm"]
        for block in range(depth):
            norms += [f"{block}.norm1", f"{block}.norm2"]
            linear |= {f"{block}.qkv": (width, 3 * width), f"{block}.proj": (width, width)}
            linear |= {f"{block}.fc1": (width, 4 * width), f"{block}.fc2": (4 * width, width)}
        shapes = {"class": (1, 1, width), "position": (1, self.patches + 1, width)}
        shapes |= {f"{name}.weight": shape for name, shape in linear.items()}
        found = {
            name: 0.02 * torch.randn(self.clients, *shape, device=device, generator=drawn)
            for name, shape in shapes.items()
        }
        for name, (_, out) in linear.items():
            found[f"{name}.bias"] = torch.zeros(self.clients, 1, out, device=device)
        for name in norms:
            found[f"{name}.weight"] = torch.ones(self.clients, 1, 1, width, device=device)
            found[f"{name}.bias"] = torch.zeros(self.clients, 1, 1, width, device=device)
        for name, tensor in found.items():
            tensor.requires_grad_(self.moves == "all" or name.endswith("qkv.weight"))
        return found

    def loss(self, parameters: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        """Sum over clients of the mean cross-entropy of images (V, B, 3, H, W) under labels (V, B)."""
        width, depth, heads = WIDTH_DEPTH_HEADS[self.size]
        clients, batch, side = *images.shape[:2], self.pixels // self.patch
        tokens = self.patches + 1

        def linear(x: Tensor, name: str) -> Tensor:
            weight, bias = (parameters[f"{name}.{kind}"].to(self.dtype) for kind in ("weight", "bias"))
            out = torch.baddbmm(bias, x.reshape(clients, -1, x.shape[-1]), weight)
            return out.view(*x.shape[:-1], -1)

        def norm(x: Tensor, name: str) -> Tensor:
            normalised = F.layer_norm(x.float(), (width,), eps=1e-6)
            return (normalised * parameters[f"{name}.weight"] + parameters[f"{name}.bias"]).to(self.dtype)

        x = images.to(self.dtype).view(clients, batch, 3, side, self.patch, side, self.patch)
        x = linear(x.permute(0, 1, 3, 5, 2, 4, 6).reshape(clients, batch, side**2, -1), "patch")
        first = parameters["class"].to(self.dtype).expand(clients, batch, 1, width)
        x = torch.cat([first, x], 2) + parameters["position"].to(self.dtype)
        for block in range(depth):
            qkv = linear(norm(x, f"{block}.norm1"), f"{block}.qkv")
            q, k, v = qkv.view(clients * batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(clients, batch, tokens, width)
            x = x + linear(mixed, f"{block}.proj")
            x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.fc1")), f"{block}.fc2")
        logits = linear(norm(x[:, :, :1], "norm"), "head").float().flatten(0, 2)
        return F.cross_entropy(logits, labels.flatten(), reduction="none").view(clients, batch).mean(1).sum()

    def step(self, device: torch.device, *, compiled: bool, captured: bool) -> Callable[[], None]:
        """Make a call that takes a step; ``captured`` as a CUDA graph, where there is CUDA."""
        parameters = self.parameters(device)
        moving = [tensor for tensor in parameters.values() if tensor.requires_grad]
        cuda = device.type == "cuda"
        optimizer = torch.optim.AdamW(moving, lr=1e-4, fused=cuda or None, capturable=cuda)
        images = torch.randn(self.clients, self.batch_size, 3, self.pixels, self.pixels, device=device)
        labels = torch.randint(0, CLASSES, (self.clients, self.batch_size), device=device)
        loss = torch.compile(self.loss, dynamic=False) if compiled and cuda else self.loss

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            loss(parameters, images, labels).backward()
            gradients = [tensor.grad for tensor in moving]
            norms = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0).sqrt()
            factors = (1.0 / (norms + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, [factors.view(-1, *[1] * (g.dim() - 1)) for g in gradients])
            optimizer.step()

        return graph_of(step) if captured and cuda else step


def graph_of(step: Callable[[], None]) -> Callable[[], None]:
    """Capture a step as a CUDA graph, after three steps on a stream beside, and give what replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def seconds_a_step(step: Callable[[], None], device: torch.device, *, steps: int = 10) -> float:
    """Mean seconds of ``steps`` steps, after a third as many that do not count."""
    for _ in range(steps // 3):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(WIDTH_DEPTH_HEADS), default="tiny")
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--patch", type=int, default=4)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--moves", choices=("all", "qkv"), default="all")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_float32_matmul_precision("high")
    work = Prototype(
        options.size, options.pixels, options.patch, options.clients, options.batch_size, moves=options.moves
    )
    for compiled, captured in ((False, False), (False, True), (True, True)):
        seconds = seconds_a_step(work.step(device, compiled=compiled, captured=captured), device)
        name = " and ".join(word for word, there in (("compiled", compiled), ("captured", captured)) if there)
        print(
            f"{name or 'eager'}: {1e3 * seconds:.2f} ms a step, {work.clients * work.batch_size / seconds:.0f} images/s"
        )


if __name__ == "__main__":
    main()
