"""Federated rounds as the experiments make them, on random images that live on the device: what benchmarks time.

Needs only torch, numpy and what of fedtalos needs nothing else.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from measure import multiply_adds, scattered
from torch import Tensor

from fedtalos.data.images import LabelledImages
from fedtalos.data.view import Augmentation
from fedtalos.models.vision_transformer import Architecture, VisionTransformer
from fedtalos.randomness import torch_generator
from fedtalos.training.editing.eligible import eligible_entries
from fedtalos.training.federated.clients import Clients
from fedtalos.training.federated.fedavg import Engine, Round, fedavg, one_by_one
from fedtalos.training.federated.stacked import stacked
from fedtalos.training.local_training import LocalTraining
from fedtalos.training.masked_parameters import MaskedParameters, head_mask

CLASSES = 100


@dataclass(frozen=True)
class Load:
    """A round's work, and how long each variant is measured."""

    clients: int = 20
    per_round: int = 10
    steps: int = 4
    batch_size: int = 64
    seconds: float = 2.0
    gemm_side: int = 8192
    fisher_images: int = 256

    @property
    def images_per_client(self) -> int:
        """As many as its steps take: all batches are whole."""
        return self.steps * self.batch_size

    @property
    def images_per_round(self) -> int:
        """Of all its clients."""
        return self.per_round * self.images_per_client


@dataclass(frozen=True)
class Setting:
    """A model and its images."""

    size: str
    pixels: int
    patch: int

    def __str__(self) -> str:
        return f"ViT-{self.size}/{self.patch}, {self.pixels} px"


@dataclass(frozen=True)
class Variant:
    """How a round is computed; ``compiled`` is torch.compile's mode."""

    precision: str
    moves: str
    at_once: int = 1
    compiled: str | None = None

    def __str__(self) -> str:
        if self.compiled:
            return f"one by one, compiled ({self.compiled})"
        return "one by one" if self.at_once == 1 else f"{self.at_once} together"


class Rounds:
    """Endless rounds of one variant on fresh weights."""

    def __init__(
        self,
        setting: Setting,
        variant: Variant,
        load: Load,
        images: LabelledImages,
        chosen: Callable[[VisionTransformer], dict[str, Tensor]] | None = None,
        *,
        augmentation: Augmentation = "crop_flip",
    ) -> None:
        """``chosen`` maps the model to what moves, where that is none of the variant's words."""
        self.setting, self.variant, self.load = setting, variant, load
        architecture = Architecture(setting.size, setting.pixels, setting.patch, CLASSES)
        model = VisionTransformer(architecture, torch_generator(0, "weights")).to(images.pixels.device)
        self.model = model
        self.moving = MaskedParameters(model, chosen(model) if chosen else what_moves(model, variant.moves))
        self.multiply_adds = multiply_adds(model, self.moving.entries.masks)
        owner = np.repeat(np.arange(load.clients), len(images) // load.clients)
        self.clients = Clients.of(images, owner, load.clients)
        self.local = LocalTraining(
            steps=load.steps,
            batch_size=load.batch_size,
            learning_rate=1e-4,
            augmentation=augmentation,
            precision="bf16" if variant.precision == "bf16" else "fp32",
        )
        self.engine: Engine = one_by_one if variant.at_once == 1 else partial(stacked, size=variant.at_once)
        if variant.compiled:
            model.compile(mode=variant.compiled)  # in place: the parameters keep their names

    def __iter__(self) -> Iterator[Round]:
        return self.rounds(self.engine)

    def rounds(self, engine: Engine) -> Iterator[Round]:
        """Rounds of clients that train in that way."""
        fraction = self.load.per_round / self.load.clients
        return fedavg(
            self.moving, self.clients, local=self.local, rounds=10**9, fraction=fraction, seed=0, engine=engine
        )


def what_moves(model: VisionTransformer, moves: str) -> dict[str, Tensor]:
    """Everything; the head; or the head and scattered entries of q and k, a tenth of what the blocks have eligible."""
    if moves == "all":
        return {name: torch.ones_like(p, dtype=torch.bool, requires_grad=False) for name, p in model.named_parameters()}
    head = head_mask(model)
    if moves == "head":
        return head
    chosen = scattered(eligible_entries(model, "qk"), round(0.1 * len(eligible_entries(model))))
    return chosen | head


def random_images(setting: Setting, load: Load, device: torch.device) -> LabelledImages:
    """All clients' images, on the device."""
    count, side = load.clients * load.images_per_client, setting.pixels
    pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch_generator(0, "pixels"))
    return LabelledImages(pixels.to(device), torch.arange(count, device=device) % CLASSES)


def each(rounds: Iterable[Round]) -> Callable[[], object]:
    """A call that takes the next round."""
    going = iter(rounds)
    return lambda: next(going)


def products(load: Load, rounds: Rounds) -> Callable[[], object]:
    """A call that does a round's multiply-adds as products (B T, D) x (D, 4 D), the shape of the largest layer."""
    tokens, dim = rounds.model.pos_embed.shape[1:]
    left, right = torch.randn(load.batch_size * tokens, dim), torch.randn(dim, 4 * dim)
    per_round = rounds.multiply_adds * load.images_per_round
    times = round(per_round / (len(left) * right.numel()))
    out = left @ right

    def multiply() -> None:
        for _ in range(times):
            torch.mm(left, right, out=out)

    return multiply
