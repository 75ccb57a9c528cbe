"""What some choices are worth on real images: precision, eligible entries, ridge penalty, final rate, resizing.

    python benchmarks/edges.py COMMAND --weights FILE [--data_dir DIR] [--image_size 64] [--seeds 0 1 2]

CIFAR-100, one row of a Markdown table as soon as it is there, then the mean and sample deviation over seeds. A seed
draws the images and labels that are scored or fitted on, and the clients' images, rounds and batches. Federated runs:
100 clients of which ten are in a round, AdamW, the ridge head of all clients' sums stays as it is.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
import tyro
from measure import environment
from torch import Tensor

import fedtalos as ft
from fedtalos.data.dataset_loader import Dataset
from fedtalos.data.view import Interpolation
from fedtalos.devices import autocast
from fedtalos.models.backbone import Backbone
from fedtalos.models.heads import Head, best_head, head_sums
from fedtalos.notes import noted
from fedtalos.randomness import generator
from fedtalos.training.editing.describe import OUTSIDE, density_table
from fedtalos.training.feature_cache import FeatureStore
from fedtalos.training.federated.clients import Clients

ABSOLUTE = (1e-3, 1e-2, 1e-1, 1.0)
"""Ridge penalties per image that were tried before they were scaled by the features' variance."""


@dataclass(frozen=True)
class Setting:
    weights: str
    """weights file, or another source that load_model takes"""
    data_dir: Path = Path("data")
    """folder that holds cifar-100-python/"""
    image_size: int = 64
    seeds: tuple[int, ...] = (0, 1, 2)
    device: str = "auto"

    def begin(self) -> tuple[Dataset, Backbone]:
        """The images, and the model with a head drawn at random, both on the device."""
        data = ft.load_dataset("cifar100", self.data_dir, image_size=self.image_size)
        model = ft.load_model(self.weights, data.classes, image_size=self.image_size, device=self.device)
        return data.to(next(model.parameters()).device), model

    def table(self, columns: Sequence[str], rows: Callable[[int], Iterator[tuple[str, Sequence[float]]]]) -> None:
        """Print ``rows(seed)``, name and figures, as they come, then each name's mean and deviation over seeds."""
        write(environment(), "", line("seed", "", *columns), line(*["---"] * (2 + len(columns))))
        found: dict[str, list[Sequence[float]]] = {}
        for seed in self.seeds:
            for name, figures in rows(seed):
                found.setdefault(name, []).append(figures)
                write(line(seed, name, *(f"{figure:.4g}" for figure in figures)))
        for name, same in found.items() if len(self.seeds) > 1 else ():
            columns_of = list(zip(*same, strict=True))
            write(line("mean", name, *(f"{mean(column):.4g} ± {stdev(column):.2g}" for column in columns_of)))


@dataclass(frozen=True)
class Federation(Setting):
    partition: str = "iid"
    classes_per_client: int = 5
    rounds: int = 20
    local_steps: int = 4
    learning_rate: float = 1e-2

    def clients(self, data: Dataset, model: Backbone, seed: int) -> Clients:
        """100 clients, and the ridge head of all their sums on the model."""
        clients = ft.split_clients(
            data.train, 100, self.partition, seed=seed, classes_per_client=self.classes_per_client
        )
        ft.fit_head(model, data.train, holders=clients, val=data.val)
        return clients

    def local(self, final: float = 0.0) -> ft.LocalTraining:
        """A client's steps; the learning rate ends at ``final`` times its peak."""
        return ft.LocalTraining(
            steps=self.local_steps,
            batch_size=32,
            learning_rate=ft.Schedule(self.learning_rate, self.rounds, final=final),
            augmentation="crop_flip",
        )


@dataclass(frozen=True)
class Precision(Setting):
    """22: masks by precision of the scores (IoU with strict float32); under autocast and TF32 it is to be 1."""

    images: int = 640

    def run(self) -> None:
        data, model = self.begin()
        ft.fit_head(model, data.calibration, val=data.val)

        def rows(seed: int) -> Iterator[tuple[str, Sequence[float]]]:
            strict = ft.talos_mask(model, data.calibration, max_images=self.images, seed=seed)
            torch.set_float32_matmul_precision("high")
            with autocast(next(model.parameters()).device, "bf16"):
                loose = ft.talos_mask(model, data.calibration, max_images=self.images, seed=seed)
            torch.set_float32_matmul_precision("highest")
            yield "fp32, autocast and TF32 on around it", [ft.overlap(strict, loose)]
            bf16 = ft.talos_mask(model, data.calibration, max_images=self.images, seed=seed, precision="bf16")
            yield "bf16 by name", [ft.overlap(strict, bf16)]
            other = ft.talos_mask(model, data.calibration, max_images=self.images, seed=seed + 1000)
            yield "fp32, another seed", [ft.overlap(strict, other)]

        self.table(["IoU with strict float32"], rows)


@dataclass(frozen=True)
class Eligible(Federation):
    """23: masks that choose among the blocks' entries, or among the paper's, and what training with them gives."""

    images: int = 640

    def run(self) -> None:
        data, model = self.begin()

        def rows(seed: int) -> Iterator[tuple[str, Sequence[float]]]:
            clients = self.clients(data, model, seed)
            masks = {
                which: ft.talos_mask(model, data.calibration, max_images=self.images, seed=seed, eligible=which)
                for which in ("blocks", "paper")
            }
            for which, mask in masks.items():
                outside = sum(row.active for row in density_table(mask, which) if row.block == OUTSIDE)
                test = federated(data, model, clients, mask, self.local(), self.rounds, seed)
                yield which, [ft.overlap(masks["blocks"], mask), outside, test]

        self.table(["IoU with blocks", "entries outside", "test %"], rows)


@dataclass(frozen=True)
class Ridge(Setting):
    """24: ridge heads of few and many images, the penalty from the old grid per image and from the scaled one."""

    counts: tuple[int, ...] = (500, 900, 5000, 44100)
    """images that the head is fitted on"""
    limit: int = 2000
    """validation images that choose the penalty"""

    def run(self) -> None:
        data, model = self.begin()
        store, classes = FeatureStore(), len(data.classes)
        train, val, test = (store.features(model, images) for images in (data.train, data.val, data.test))

        def rows(seed: int) -> Iterator[tuple[str, Sequence[float]]]:
            order = torch.from_numpy(generator(seed, "fitted on").permutation(len(train[1])))
            held = torch.from_numpy(generator(seed, "held out").permutation(len(val[1]))[: self.limit])
            for count in self.counts:
                features, labels = (part[order[:count]] for part in train)
                sums = head_sums("ridge", features, labels, classes)
                held_out = (val[0][held], val[1][held])
                variance = float(features.double().var(0, correction=0).mean())
                old = best_head("ridge", sums, *held_out, [penalty / variance for penalty in ABSOLUTE])
                noted()
                new = best_head("ridge", sums, *held_out)
                chosen = float(noted()["ridge penalty"].split()[0])
                yield f"{min(count, len(labels))} images", [correct(old, *test), correct(new, *test), chosen, variance]

        self.table(["old grid, test %", "scaled grid, test %", "penalty", "variance"], rows)


@dataclass(frozen=True)
class FinalRate(Federation):
    """25: federated runs whose cosine ends at a share of the peak."""

    finals: tuple[float, ...] = (0.0, 0.01, 0.03, 0.1, 0.3)
    density: float = 0.1
    """of a random mask; 1: all but the head moves"""

    def run(self) -> None:
        data, model = self.begin()

        def rows(seed: int) -> Iterator[tuple[str, Sequence[float]]]:
            clients = self.clients(data, model, seed)
            mask = ft.random_mask(model, self.density, seed=seed)
            if self.density == 1:
                parameters = dict(model.named_parameters())
                mask = {n: torch.ones_like(p, dtype=torch.bool) for n, p in parameters.items() if n[:5] != "head."}
            for final in self.finals:
                yield f"final {final:g}", [federated(data, model, clients, mask, self.local(final), self.rounds, seed)]

        self.table(["test %"], rows)


@dataclass(frozen=True)
class Resize(Setting):
    """28: ridge heads on images resized bilinearly or bicubically, whole or the middle of each side."""

    images: int = 5000
    """images that the head is fitted on"""
    crops: tuple[float, ...] = (1.0, 0.9)
    interpolations: tuple[Interpolation, ...] = ("bilinear", "bicubic")

    def run(self) -> None:
        data, model = self.begin()

        def rows(seed: int) -> Iterator[tuple[str, Sequence[float]]]:
            images = data.train.subset(generator(seed, "fitted on").permutation(len(data.train))[: self.images])
            for model.interpolation in self.interpolations:
                for model.crop in self.crops:
                    ft.fit_head(model, images, val=data.val)
                    test = 100 * ft.evaluate(model, data.test).accuracy
                    yield f"{model.interpolation}, the middle {model.crop:g}", [test]

        self.table(["test %"], rows)


def federated(
    data: Dataset,
    model: Backbone,
    clients: Clients,
    mask: dict[str, Tensor],
    local: ft.LocalTraining,
    rounds: int,
    seed: int,
) -> float:
    """Test accuracy (%) of the last model of a run; the model is left as it was."""
    moving = ft.MaskedParameters(model, mask)
    theta = moving.copy()
    for _ in ft.fedavg(moving, clients, local=local, rounds=rounds, seed=seed):
        pass
    accuracy = ft.evaluate(model, data.test).accuracy
    moving.load(theta)
    return 100 * accuracy


def correct(head: Head, features: Tensor, labels: Tensor) -> float:
    """Accuracy (%) of a head on features."""
    return 100 * float((F.linear(features.cpu(), *head).argmax(1) == labels.cpu()).double().mean())


def line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def write(*lines: str) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    tyro.cli(Precision | Eligible | Ridge | FinalRate | Resize, description=__doc__, use_underscores=True).run()
