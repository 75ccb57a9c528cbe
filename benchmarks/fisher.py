"""What per-example Fisher scores cost, against one batched forward and backward pass over the same images.

    python benchmarks/fisher.py [--device cuda] [--output FILE]

Every method scores the same images with the same drawn labels; methods take turns, ratios are medians over turns. The
slow methods are compared on 16 of the images.
The floor: a batched pass does 2 FLOPs forward, 2 for inputs' and 2 for weights' gradients per weight and token. Scores
need the very same products, with each example's weight gradients written once, read, squared and added: 4 bytes x P x B
out and back in, which no ordinary pass has. So a ratio of 1 is the floor of hooks, and what is above it is that traffic
and small matrices; a loop over single examples pays for small matrices throughout, and the released code's loop, whose
graph holds the batch, B backward passes of the whole batch.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import environment, markdown_table, peak_memory, timed_ratios
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedtalos.models.vision_transformer import Architecture, VisionTransformer
from fedtalos.randomness import torch_generator
from fedtalos.training.editing.eligible import eligible_entries
from fedtalos.training.editing.fisher import draw_labels, fisher_scores

SETTINGS = {  # size, pixels, patch, images
    "96 wide x 6, 32 px, patch 4": ("micro", 32, 4, 64),
    "ViT-Ti, 32 px, patch 4": ("tiny", 32, 4, 64),
    "ViT-Ti/16, 224 px": ("tiny", 224, 16, 16),
}
FEW = 16
Scores = dict[str, Tensor]


class Work:
    """A model with random weights, images, and the methods to be compared on them."""

    def __init__(self, size: str, px: int, patch: int, images: int, device: str, chunk: int) -> None:
        self.model = VisionTransformer(Architecture(size, px, patch, 100), torch_generator(0, "weights")).to(device)
        self.images = torch.randn(images, 3, px, px, generator=torch_generator(0, "images")).to(device)
        self.uniforms = torch.rand(images, 1, generator=torch_generator(0, "labels"), dtype=torch.float64)
        self.labels = torch.arange(images, device=device) % 100
        self.masks, self.qk = eligible_entries(self.model).masks, eligible_entries(self.model, "qk").masks
        self.chunk = chunk

    def training(self) -> None:
        """One batched forward and backward pass, as in training; no optimiser."""
        self.model.train().requires_grad_(True).zero_grad(set_to_none=True)
        F.cross_entropy(self.model(self.images), self.labels).backward()

    def two_steps(self) -> None:
        """Two training steps with AdamW: in the second activations, gradients and its state are there together."""
        optimizer = torch.optim.AdamW(self.model.parameters())
        for _ in range(2):
            self.training()
            optimizer.step()

    def ours(self, masks: dict[str, Tensor] | None = None) -> Scores:
        batch = (self.images, self.labels, self.uniforms)
        return fisher_scores(self.model, [batch], masks or self.masks, chunk=self.chunk)

    def only_qk(self) -> Scores:
        return self.ours(self.qk)

    def loop(self) -> Scores:
        """One example at a time."""
        parameters = self._parameters()
        scores = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for image, uniform in zip(self.images.split(1), self.uniforms, strict=True):
            log_p = F.log_softmax(self.model(image), 1)
            self._add(scores, torch.autograd.grad(log_p[0, draw_labels(log_p, uniform)[0]], list(parameters.values())))
        return scores

    def released(self) -> Scores:
        """As the paper's code: sampled logits, one by one, of a graph that is kept for the batch."""
        parameters = self._parameters()
        scores = {name: torch.zeros_like(p) for name, p in parameters.items()}
        logits = self.model(self.images)
        drawn = draw_labels(F.log_softmax(logits, 1), self.uniforms[:, 0])
        for logit in logits.gather(1, drawn[:, None])[:, 0]:
            self._add(scores, torch.autograd.grad(logit, list(parameters.values()), retain_graph=True))
        return scores

    def vmapped(self) -> Scores:
        """torch.func: vmap(grad) over chunks."""
        parameters = {name: p.detach() for name, p in self._parameters().items()}
        scores = {name: torch.zeros_like(p) for name, p in parameters.items()}

        def log_p_of(values: Scores, image: Tensor, label: Tensor) -> Tensor:
            out = F.log_softmax(functional_call(self.model, values, (image[None],)), 1)
            return out.gather(1, label.view(1, 1)).sum()

        with torch.no_grad():
            logits = self.model(self.images)
        drawn = draw_labels(F.log_softmax(logits, 1), self.uniforms[:, 0])
        for images, labels in zip(self.images.split(8), drawn.split(8), strict=True):
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no batching rule: far slower still
                gradients = vmap(grad(log_p_of), (None, 0, 0))(parameters, images, labels)
            for name, gradient in gradients.items():
                scores[name] += gradient.square().sum(0)
        return scores

    def _parameters(self) -> Scores:
        self.model.eval().requires_grad_(False)
        parameters = {name: self.model.get_parameter(name) for name in self.masks}
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        return dict(parameters)

    def _add(self, scores: Scores, gradients: tuple[Tensor, ...]) -> None:
        for score, gradient in zip(scores.values(), gradients, strict=True):
            score.addcmul_(gradient, gradient)


def deviation(scores: Scores, reference: Scores) -> float:
    """Largest difference, in units of the tensor's largest score."""
    return max(float((scores[n] - reference[n]).abs().max() / (reference[n].max() + 1e-30)) for n in scores)


def call(setting: tuple[str, int, int, int], device: str, chunk: int, method: str) -> Callable[[], object]:
    """One method on a fresh model, for a fresh process."""
    return partial(getattr(Work, method), Work(*setting, device, chunk))


NAMES = {"loop": "loop over examples", "vmap": "torch.func, vmap(grad), chunk 8", "released": "released code's loop"}


def report(title: str, device: str, chunk: int, repeats: int) -> str:
    """One setting's table."""
    setting, on_cpu = SETTINGS[title], device == "cpu"
    work = Work(*setting, device, chunk)
    fast = {"training pass": work.training, "ours": work.ours, "ours, only q and k": work.only_qk}
    few = Work(*setting[:3], FEW, device, chunk)
    slow = {"ours": few.ours, "loop": few.loop, "vmap": few.vmapped, "released": few.released}
    rows = [[name, f"{1e3 * t.seconds:.0f}", f"{t.ratio:.2f}", ""] for name, t in timed_ratios(fast, repeats).items()]
    for name, t in timed_ratios(slow, repeats=3 if on_cpu else 5, warmup=1).items():
        if name in NAMES:
            rows.append([NAMES[name], f"{1e3 * t.seconds:.0f}", "", f"{t.ratio:.2f}"])
    one_pass, steps = (peak_memory(call, (*setting[:3], chunk), device, chunk, m) for m in ("training", "two_steps"))
    ours = peak_memory(call, (*setting[:3], 3 * chunk), device, chunk, "ours")
    reference = few.loop()
    return (
        f"\n{title}, {setting[3]} images, the slow methods {FEW}\n\n"
        + markdown_table(["", "ms", "to training pass", "to ours"], rows)
        + f"\nPeak memory above start, MB: ours over three chunks of {chunk} {ours / 1e6:.0f}; "
        + f"training on {chunk} images, a pass {one_pass / 1e6:.0f} (ratio {ours / one_pass:.2f}), "
        + f"with AdamW {steps / 1e6:.0f} (ratio {ours / steps:.2f})"
        + "\nLargest deviation from the loop, of a tensor's largest score: "
        + f"ours {deviation(few.ours(), reference):.1e}, torch.func {deviation(few.vmapped(), reference):.1e}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--chunk", type=int, help="examples per backward pass (default: 16 on cpu, else 256)")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    chunk = options.chunk or (16 if options.device == "cpu" else 256)
    if options.device == "cuda":
        torch.cuda.init()
    text = f"{environment()}, chunk {chunk}, median of {options.repeats} turns\n"
    print(text, end="")
    for title in SETTINGS:
        table = report(title, options.device, chunk, options.repeats)
        print(table, end="", flush=True)
        text += table
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
