"""Federated rounds as the experiments make them, on random images that live on the device: what benchmarks time.

Needs only torch, numpy and what of fedtalos needs nothing else.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from measure import multiply_adds, scattered
from torch import Tensor

from fedtalos.data.batches import Augmentation, View, stacked_batches, training_batches
from fedtalos.data.images import LabelledImages
from fedtalos.metrics import Metrics
from fedtalos.models.vision_transformer import Architecture, VisionTransformer
from fedtalos.randomness import generator, torch_generator
from fedtalos.training.editing.talos import eligible_entries
from fedtalos.training.federated.fedavg import Round, TrainClients, fedavg, one_by_one
from fedtalos.training.federated.stacked import in_groups, together
from fedtalos.training.loop import Batches, freeze_all_but, make_optimizer, train
from fedtalos.training.masked_parameters import Entries

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
    ) -> None:
        """``chosen`` maps the model to what moves, where that is none of the variant's words."""
        self.setting, self.variant, self.load, self.images = setting, variant, load, images
        self.augmentation: Augmentation = "crop_flip"
        self.forward: Callable[[Tensor], Tensor] | None = None
        device = images.pixels.device
        architecture = Architecture(setting.size, setting.pixels, setting.patch, CLASSES)
        self.model = VisionTransformer(architecture, torch_generator(0, "weights")).to(device)
        self.view = View(setting.pixels, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        self.indices = np.split(np.arange(len(images)), load.clients)
        self.entries = Entries(chosen(self.model) if chosen else what_moves(self.model, variant.moves))
        self.multiply_adds = multiply_adds(self.model, self.entries.masks)
        freeze_all_but(self.model, self.entries)
        self.optimizer_of = partial(make_optimizer, rule="adamw", learning_rate=1e-4, momentum=0.0, weight_decay=0.01)
        self.optimizer = self.optimizer_of(self.model, self.entries)
        if variant.compiled:
            self.model.compile(mode=variant.compiled)  # in place: the parameters keep their names

    def __iter__(self) -> Iterator[Round]:
        return self.rounds(self.train_clients())

    def rounds(self, train_clients: TrainClients) -> Iterator[Round]:
        """Rounds of clients that train in that way."""
        sizes, fraction = np.array([len(own) for own in self.indices]), self.load.per_round / self.load.clients
        return fedavg(self.model, self.entries, train_clients, sizes, fraction=fraction, rounds=10**9, seed=0)

    def train_clients(self) -> TrainClients:
        """As the experiments make it."""
        alone = one_by_one(self.model, self.entries, self.update_client)
        if self.variant.at_once == 1:
            return alone
        stacked = together(
            self.model,
            self.entries,
            self.batches_of,
            self.optimizer_of,
            learning_rate=lambda _: 1e-4,
            clip_norm=1.0,
            precision="bf16" if self.variant.precision == "bf16" else "fp32",
        )
        return in_groups(alone, stacked, self.variant.at_once, lambda _: None)

    def update_client(self, number: int, client: int) -> Metrics:
        """One client's training on the resident model."""
        self.optimizer.state.clear()
        batches = training_batches(
            self.images,
            self.indices[client],
            self.view,
            steps=self.load.steps,
            batch_size=self.load.batch_size,
            augmentation=self.augmentation,
            rng=generator(0, "batches", number, client),
        )
        return train(
            self.model,
            batches,
            self.optimizer,
            self.entries,
            learning_rate=lambda _: 1e-4,
            clip_norm=1.0,
            precision="bf16" if self.variant.precision == "bf16" else "fp32",
            forward=self.forward,
        )

    def batches_of(self, number: int, group: Sequence[int]) -> Batches:
        """Several clients' batches side by side."""
        return stacked_batches(
            self.images,
            [self.indices[client] for client in group],
            self.view,
            steps=self.load.steps,
            batch_size=self.load.batch_size,
            augmentation=self.augmentation,
            rngs=[generator(0, "batches", number, client) for client in group],
        )


def what_moves(model: VisionTransformer, moves: str) -> dict[str, Tensor]:
    """Everything; the head; or the head and scattered entries of q and k, a tenth of what the blocks have eligible."""
    whole = {name: torch.ones_like(p, dtype=torch.bool, requires_grad=False) for name, p in model.named_parameters()}
    if moves == "all":
        return whole
    head = {name: mask for name, mask in whole.items() if name.startswith("head.")}
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
