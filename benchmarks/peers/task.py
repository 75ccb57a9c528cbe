"""The task that every peer trains: settings, model, images, clients and their batches; and the clock that each carries.

Nothing here trains: every script brings the loop of its own framework.

Letters: K clients, J local steps, B images of a batch, H W pixels.
"""

import json
import pickle
import platform
import threading
import time
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from fedtalos.models.vision_transformer import Architecture, ModelSize, VisionTransformer
from fedtalos.randomness import generator, torch_generator


@dataclass(frozen=True)
class Settings:
    """What is trained, on what, for how long: the same for every peer."""

    model_size: ModelSize = "tiny"
    image_size: int = 32
    """pixels a side"""
    patch_size: int = 4
    """pixels a patch side"""
    classes: int = 100
    clients: int = 10
    """K"""
    sampled: int = 10
    """clients that train in a round"""
    local_steps: int = 8
    """J; 0 leaves the round's overhead"""
    batch_size: int = 64
    rounds: int = 4
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.01
    moves: Literal["all", "head", "qk"] = "all"
    """tensors that are trained; qk: the rows of q and k in every block's qkv layer"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast of the forward pass"""
    device: Literal["cpu", "cuda"] = "cpu"
    """cuda: of the bare loop, pfl, BlazeFL and JAX"""
    threads: int = psutil.cpu_count(logical=True) or 1
    """of the whole simulation, shared out over its processes"""
    seed: int = 0
    data: Path | None = None
    """the folder cifar-100-python; else random pixels, on which time does not depend"""
    save: Path | None = None
    """write the last global weights to this FILE"""


def make_model(settings: Settings) -> VisionTransformer:
    """The model before round 1."""
    size = Architecture(settings.model_size, settings.image_size, settings.patch_size, settings.classes)
    return VisionTransformer(size, torch_generator(settings.seed, "weights")).train().to(settings.device)


def freeze(model: nn.Module, settings: Settings) -> None:
    """Let only what ``moves`` names have gradients; once per model, for copies lose the hooks that keep v still."""
    part = {"all": "", "head": "head.", "qk": ".attn.qkv."}[settings.moves]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name)
        if settings.moves == "qk" and parameter.requires_grad:
            parameter.register_hook(without_v)


def without_v(gradient: Tensor) -> Tensor:
    """A qkv layer's gradient with the last third of its rows zeroed."""
    gradient = gradient.clone()
    gradient.chunk(3)[2].zero_()
    return gradient


def moving(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_optimizer(parameters: list[nn.Parameter], settings: Settings) -> Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=settings.learning_rate)
    return torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)


def loss(model: nn.Module, pixels: Tensor, labels: Tensor, settings: Settings) -> Tensor:
    """``cross_entropy`` in the precision of the settings."""
    with torch.autocast(settings.device, torch.bfloat16, enabled=settings.precision == "bf16"):
        return cross_entropy(model, pixels, labels)


def cross_entropy(model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    """The mean over uint8 images (B, 3, H, W)."""
    return F.cross_entropy(model(normalised(pixels)).float(), labels)


def normalised(pixels: Tensor) -> Tensor:
    return pixels.float().div_(255).sub_(0.5).div_(0.25)


def client_size(settings: Settings, client: int) -> int:
    """Images of a client: J batches, odd clients one more, which they never reach but which counts in the mean."""
    return (max(1, settings.local_steps) + client % 2) * settings.batch_size


def client_images(settings: Settings, client: int) -> tuple[Tensor, Tensor]:
    """A client's images, uint8 (n, 3, H, W), and labels (n,): its own range of all images, round and round."""
    pixels, labels = all_images(settings)
    before = (max(1, settings.local_steps) + 1) * settings.batch_size * client
    indices = (before + torch.arange(client_size(settings, client), device=labels.device)) % len(labels)
    return pixels[indices], labels[indices]


def client_batches(settings: Settings, client: int) -> list[tuple[Tensor, Tensor]]:
    """The J batches of a client's round, always in the same order."""
    pixels, labels = client_images(settings, client)
    batches = zip(pixels.split(settings.batch_size), labels.split(settings.batch_size), strict=True)
    return list(batches)[: settings.local_steps]


@cache
def all_images(settings: Settings) -> tuple[Tensor, Tensor]:
    """uint8 pixels (N, 3, H, W) and labels (N,) of all clients together; N is at most 50 000."""
    if settings.data is not None:
        return cifar100(settings.data)
    count = min(50_000, (max(1, settings.local_steps) + 1) * settings.batch_size * settings.clients)
    shape = (count, 3, settings.image_size, settings.image_size)
    rng = torch_generator(settings.seed, "images")
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng)
    labels = torch.randint(0, settings.classes, (count,), generator=rng)
    return pixels.to(settings.device), labels.to(settings.device)


def cifar100(folder: Path) -> tuple[Tensor, Tensor]:
    """The published training images; a pickle, so only from a folder that you trust."""
    content = pickle.loads((folder / "train").read_bytes(), encoding="bytes")
    return torch.from_numpy(content[b"data"]).view(-1, 3, 32, 32), torch.tensor(content[b"fine_labels"])


def sampled_clients(settings: Settings, round_number: int) -> list[int]:
    """The clients of a round (1..), as fedtalos draws them."""
    rng = generator(settings.seed, "clients", round_number)
    return sorted(rng.choice(settings.clients, size=settings.sampled, replace=False).tolist())


class Meter:
    """A peer's clock and scales, from the start of its main to the line of JSON that it prints.

    Memory is what the process and all processes below it hold at once, at its highest: proportional shares (PSS), so
    pages that several of them map count once; where the system knows no PSS, resident sizes. It is sampled by a thread
    that takes at most a twentieth of one core.
    """

    def __init__(self, started: float | None = None, root: int | None = None, weigh: bool = True) -> None:
        """``started`` and ``root`` (a process id) where another process than this one began, or holds, the peer.

        ``weigh``: False in all but one of several equal processes.
        """
        self._start = time.perf_counter() if started is None else started
        self._root = psutil.Process(root)
        self._marks: list[float] = []
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if weigh:
            self._thread.start()

    def mark(self) -> None:
        """Call when round 1 begins, and at the end of every round; waits for CUDA."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._marks.append(time.perf_counter())

    def report(self, settings: Settings, model: nn.Module, *packages: str) -> None:
        """Print the line, with the versions of torch and of ``packages``; save the weights if that was asked."""
        self._stop.set()
        self._thread.join()
        self._peak = max(self._peak, _memory(self._root))
        line = {
            "round_seconds": [after - before for before, after in zip(self._marks, self._marks[1:], strict=False)],
            "first_round_after": self._marks[1] - self._start,
            "peak_mb": self._peak / 1e6,
            "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", *packages)},
        }
        if settings.save is not None:
            torch.save(model.state_dict(), settings.save)
        print(json.dumps(line), flush=True)

    def _watch(self) -> None:
        pause = 0.0
        while not self._stop.wait(pause):
            before = time.perf_counter()
            self._peak = max(self._peak, _memory(self._root))
            pause = max(0.05, 20 * (time.perf_counter() - before))


def _memory(root: psutil.Process) -> int:
    total = 0
    for process in (root, *root.children(recursive=True)):
        try:
            memory = process.memory_full_info()
        except psutil.Error:  # gone, or still starting
            continue
        total += getattr(memory, "pss", memory.rss)
    return total
