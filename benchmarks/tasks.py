"""Tasks that train apart and are merged once, on real CIFAR-100: what adds, what interferes, what is forgotten.

    python benchmarks/tasks.py --weights FILE [--data_dir DIR] [--image_size 64] [--tasks 5] [--seeds 0 1 2]

One row of a Markdown table as soon as it is there, then mean and sample deviation over seeds, and milliseconds by
part. A seed draws groups of classes (order random), masks and batches; rows of one seed are paired. The head is the
ridge head of all clients' sums, and stays while tasks train. Rates, by the sum of the vectors, and alpha are chosen on
validation.
Small enough for a look: --limit 2000 --image_size 32 --seeds 0 --epochs 1 --rates 1e-3 --masks random.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import tyro
from edges import write
from task_masks import Rule, masks_of, task_scores
from task_rows import Clock, Rows
from task_training import Training
from torch import Tensor

import fedtalos as ft
from fedtalos.data.class_groups import GroupOrder, class_groups
from fedtalos.data.dataset_loader import Dataset
from fedtalos.data.images import LabelledImages
from fedtalos.data.sampling import Ids
from fedtalos.devices import Precision
from fedtalos.metrics import Metrics
from fedtalos.models.backbone import Backbone
from fedtalos.models.heads import Head, best_head, head_sums, set_head
from fedtalos.notes import noted
from fedtalos.randomness import generator
from fedtalos.training.editing.alpha_search import best_alpha
from fedtalos.training.editing.disentanglement import disentanglement_of_all, normalised_accuracy
from fedtalos.training.editing.forgetting import forgetting_factor
from fedtalos.training.editing.merging import Method, merge
from fedtalos.training.editing.merging_by_data import input_moments
from fedtalos.training.editing.task_vectors import TaskVector, union, weighted_sum
from fedtalos.training.editing.vector_facts import VectorFacts, facts_of
from fedtalos.training.engine.capture import Compile
from fedtalos.training.entries import Mask, named_tensors
from fedtalos.training.evaluation import evaluate
from fedtalos.training.feature_cache import FeatureStore
from fedtalos.training.head_fitting import fit_head
from fedtalos.training.task_accuracy import TaskAccuracy, accuracy_of_head, probe_accuracy


@dataclass(frozen=True)
class Study:
    weights: str
    """weights file, or another source that load_model takes"""
    data_dir: Path = Path("data")
    """folder that holds cifar-100-python/"""
    image_size: int = 64
    seeds: tuple[int, ...] = (0, 1, 2)
    device: str = "auto"
    precision: Precision = "fp32"
    """of training and of features; scores of masks stay float32"""
    compile: Compile = "off"
    """steps as CUDA graphs (graph), compiled too (on), or as they stand"""
    tasks: int = 5
    order: GroupOrder = "random"
    masks: tuple[Rule, ...] = ("dense", "random", "talos", "most_sensitive", "disjoint")
    density: float = 0.1
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)
    """peak learning rates to choose from; a cosine over the task's steps"""
    epochs: int = 2
    batch_size: int = 128
    local_classes: Literal["task", "all"] = "task"
    rules: tuple[Method, ...] = get_args(Method)
    refit: tuple[Method, ...] = ("sum",)
    """rules whose merged model gets its head fitted anew, also with the factor that a head of the server's takes"""
    joint: bool = True
    """train on all images together too, as many of them: the upper bound"""
    negate: int = 1
    """tasks to forget, each by itself"""
    retrain: bool = False
    """train on the images of all other tasks together too, for each task to forget"""
    interference: int = 100
    """validation images of each task for the disentanglement error; 0: leave it out"""
    scored_images: int = 640
    """images that masks, and Fisher-weighted merging, are scored on"""
    val_images: int = 2500
    """first N validation images choose alpha and the rate; heads are fitted with all of them"""
    limit: int | None = None
    """first N training images, and half as many for validation and for the test; None: all"""

    def run(self) -> None:
        data = ft.load_dataset("cifar100", self.data_dir, image_size=self.image_size)
        if self.limit is not None:
            few = self.limit // 2
            data = replace(
                data,
                train=data.train.slice(0, self.limit),
                val=data.val.slice(0, few),
                test=data.test.slice(0, few),
            )
        model = ft.load_model(self.weights, data.classes, image_size=self.image_size, device=self.device)
        data = data.to(next(model.parameters()).device)
        table, clock = Rows(), Clock()
        for seed in self.seeds:
            trial = Trial(self, data, model, seed, table, clock)
            trial.base()
            for rule in self.masks:
                trial.mask(rule)
        table.means()
        clock.show()


class Trial:
    """One seed: groups of classes, the first head, and every mask's rows."""

    def __init__(self, study: Study, data: Dataset, model: Backbone, seed: int, table: Rows, clock: Clock) -> None:
        self.study, self.data, self.model, self.seed, self.table, self.clock = study, data, model, seed, table, clock
        self.groups = class_groups(data.classes, study.tasks, study.order, seed)
        labels = data.train.labels.cpu().numpy()
        self.ids: list[Ids] = [np.flatnonzero(np.isin(labels, group)) for group in self.groups]
        each = max(1, study.scored_images // study.tasks)
        chosen = [generator(seed, "scored", task).permutation(len(ids))[:each] for task, ids in enumerate(self.ids)]
        self.scored = [(data.train, np.sort(ids[few])) for ids, few in zip(self.ids, chosen, strict=True)]
        self.to_choose_by = data.val.slice(0, study.val_images)
        self.store = FeatureStore(2e9, batch_size=500, precision=study.precision, compile=study.compile)
        self.theta = {name: tensor.clone() for name, tensor in named_tensors(model).items()}
        self.head: Head = (model.head.weight.detach(), model.head.bias.detach())
        self.training = Training(study, data.train, model, seed, self.groups, self.ids, clock, self.begin)

    def base(self) -> None:
        """Fit the ridge head of all clients' sums, and measure the start."""
        self.set_backbone({})
        with self.clock.part("head", len(self.data.train)):
            self.head = self.fitted()
        set_head(self.model, *self.head, source="ridge")
        self.theta |= {"head.weight": self.head[0].to(self.device), "head.bias": self.head[1].to(self.device)}
        found = self.accuracy()
        self.table.add(self.seed, "base", unknown=_mean(found.unknown), known=_mean(found.known))

    def mask(self, rule: Rule) -> None:
        """All rows of one rule for masks."""
        self.training.forget()
        start = time.perf_counter()
        with self.clock.part(f"mask {rule}", self.study.scored_images):
            masks = masks_of(
                rule,
                self.model,
                self.data.calibration,
                self.scored,
                density=self.study.density,
                seed=self.seed,
                images=self.study.scored_images,
            )
        rate, vectors = self.best_rate(masks)
        known, own = self.singles(rule, vectors, rate, time.perf_counter() - start)
        alpha = self.merged(rule, vectors, known, own)
        if self.study.interference:
            self.interfering(rule, vectors, alpha)
        if self.study.joint:
            everything = np.arange(len(self.data.train))
            self.joint(f"{rule}: joint", union(vectors), everything, rate)
        for task in range(min(self.study.negate, self.study.tasks)):
            self.forgotten(rule, vectors, task, alpha, rate)
        self.set_backbone({})

    # Training

    def begin(self) -> VectorFacts:
        """Give the model the start's values and head, and tell what a vector from there says of itself."""
        self.set_backbone({})
        return facts_of(self.model, self.head, classes=self.data.classes)

    def best_rate(self, masks: Sequence[Mask]) -> tuple[float, list[TaskVector]]:
        """Train all tasks with each rate; the rate whose sum is best on validation, and its vectors."""
        best, found = (-1.0, 0.0), list[TaskVector]()
        for rate in self.study.rates:
            vectors = self.training.of_all(masks, rate)
            value = 0.0
            if len(self.study.rates) > 1:
                self.set_backbone({})
                value = best_alpha(self.model, merge(vectors), self.val_accuracy, refinements=0).value
            if value > best[0]:
                best, found = (value, rate), vectors
        return best[1], found

    # Rows

    def singles(
        self, mask: Rule, vectors: Sequence[TaskVector], rate: float, seconds: float
    ) -> tuple[list[float], list[float]]:
        """Rows of each vector on its own task; returns accuracies, the task known, by the first and by own heads.

        A task's own head is fitted to its images alone, over the features of its own model.
        """
        unknown, known, own = list[float](), list[float](), list[float]()
        for task, (vector, group, ids) in enumerate(zip(vectors, self.groups, self.ids, strict=True)):
            found = self.with_vector(vector, 1.0)
            unknown.append(float(found.unknown[task]))
            known.append(float(found.known[task]))
            if self.study.refit:
                head = self.fitted(ids, _of_classes(self.data.val, group))
                own.append(float(self.accuracy(head).known[task]))
        self.table.add(self.seed, f"{mask}: single", rate=rate, unknown=_mean(unknown), known=_mean(known), s=seconds)
        if own:
            self.table.add(self.seed, f"{mask}: single, own heads", rate=rate, known=_mean(own))
        return known, own

    def merged(self, mask: Rule, vectors: Sequence[TaskVector], single: Sequence[float], own: Sequence[float]) -> float:
        """A row for each merging rule, and those with a new head; returns the alpha of the sum.

        Accuracy is normalised by single models of the same kind of head: the first one, or each its own.
        """
        study, of_sum = self.study, 0.0
        for rule in study.rules:
            start = time.perf_counter()
            try:
                with self.clock.part(f"merge {rule}", 0):
                    merged = self.by_rule(rule, vectors)
            except ft.InputError as error:
                write(f"<!-- {mask}: {rule}: {error} -->")
                continue
            self.set_backbone({})
            with self.clock.part("alpha", 11 * len(self.to_choose_by)):
                alpha = best_alpha(self.model, merged, self.val_accuracy).alpha
            found = self.with_vector(merged, alpha)
            of_sum = alpha if rule == "sum" else of_sum
            self.row(f"{mask}: {rule}", found, start, alpha=alpha, single=single)
            if rule in study.refit:
                self.row(f"{mask}: {rule}, new head", self.refitted(), start, alpha=alpha, single=own)
                start = time.perf_counter()
                alpha = self.servers_alpha(merged)
                name = f"{mask}: {rule}, new head, the server's alpha"
                self.row(name, self.refitted(), start, alpha=alpha, single=own)
        noted()
        return of_sum

    def by_rule(self, rule: Method, vectors: Sequence[TaskVector]) -> TaskVector:
        """Merge, with what the rule asks for of the images."""

        def own(task: int) -> Backbone:
            self.set_backbone(_deltas(vectors[task], 1.0))
            return self.model

        if rule == "fisher":
            masks = {name: mask.to(self.device) for name, mask in union(vectors).items()}
            return merge(vectors, rule, scores=task_scores(own, self.scored, masks, self.seed))
        if rule == "regmean":
            moments = [input_moments(own(task), images.subset(ids)) for task, (images, ids) in enumerate(self.scored)]
            return merge(vectors, rule, moments=moments)
        weights = [float(len(ids)) for ids in self.ids] if rule == "mean" else None
        return merge(vectors, rule, weights=weights, seed=self.seed)

    def row(
        self, name: str, found: TaskAccuracy, start: float, *, single: Sequence[float] = (), **figures: float
    ) -> None:
        """A row of accuracies, normalised where those of single models come; ``start`` is when its work began."""
        if single:
            figures["normalised"] = normalised_accuracy(found.known.tolist(), single)
        seconds = time.perf_counter() - start
        self.table.add(self.seed, name, unknown=_mean(found.unknown), known=_mean(found.known), s=seconds, **figures)

    def servers_alpha(self, merged: TaskVector) -> float:
        """The factor that is best through heads fitted to the server's images; the model holds it then."""

        def accuracy(edited: Backbone) -> float:
            fit_head(edited, self.data.calibration, val=self.to_choose_by)
            return self.measured(edited, self.to_choose_by).accuracy

        self.set_backbone({})
        with self.clock.part("alpha by the server's head", 11 * len(self.data.calibration)):
            alpha = best_alpha(self.model, merged, accuracy).alpha
        self.set_backbone(_deltas(merged, alpha))
        return alpha

    def joint(self, name: str, mask: Mask, ids: Ids, rate: float) -> TaskVector:
        """Train on all these images together, among all classes."""
        start = time.perf_counter()
        vector = self.training.together(mask, ids, rate, self.study.tasks)
        self.row(name, self.with_vector(vector, 1.0), start, rate=rate)
        if self.study.refit:
            start = time.perf_counter()
            self.row(f"{name}, new head", self.refitted(), start, rate=rate)
        return vector

    def interfering(self, mask: Rule, vectors: Sequence[TaskVector], alpha: float) -> None:
        """The disentanglement error of all pairs at the sum's alpha, the task known."""
        start = time.perf_counter()
        self.set_backbone({})
        few = [_of_classes(self.data.val, group).slice(0, self.study.interference) for group in self.groups]
        with self.clock.part("interference", sum(map(len, few))):
            error, _ = disentanglement_of_all(
                self.model, vectors, few, alpha, classes=self.groups, seed=self.seed, precision=self.study.precision
            )
        self.table.add(
            self.seed,
            f"{mask}: interference",
            alpha=alpha,
            xi=error.mean,
            xi_low=error.low,
            xi_high=error.high,
            s=time.perf_counter() - start,
        )

    def forgotten(self, mask: Rule, vectors: Sequence[TaskVector], task: int, alpha: float, rate: float) -> None:
        """Rows of forgetting a task: negation from the start, leaving out of the sum, retraining without it."""
        group = self.groups[task]
        rest = [label for label in range(len(self.data.classes)) if label not in group]
        val, test = ((_of_classes(part, group), _of_classes(part, rest)) for part in (self.data.val, self.data.test))
        probe = (_of_classes(self.data.train, group), test[0])
        others = [vector for number, vector in enumerate(vectors) if number != task]

        def row(name: str, before: float, factor: float = math.nan) -> float:
            control = self.measured(self.model, test[1]).accuracy
            self.table.add(
                self.seed,
                f"{mask}: {name}",
                alpha=factor,
                target=self.measured(self.model, test[0]).accuracy,
                control=control,
                of_before=control / before if before else math.nan,
                probe=probe_accuracy(self.model, *probe, self.store),
            )
            return control

        def both(edited: Backbone) -> tuple[float, float]:
            target, control = (self.measured(edited, part).accuracy for part in val)
            return target, control

        self.set_backbone({})
        before = row("forget, base", 0.0)
        factor = forgetting_factor(self.model, vectors[task], both, both(self.model)[1])
        self.set_backbone(_deltas(vectors[task], -factor))
        row("forget, base - alpha tau", before, factor)
        total = merge(vectors)
        self.set_backbone(_deltas(total, alpha))
        before = row("forget, sum", 0.0, alpha)
        control_before = both(self.model)[1]
        without = weighted_sum(others, [alpha] * len(others), "sum") if others else total * 0.0
        self.set_backbone(_deltas(without, 1.0))
        row("forget, left out of the sum", before, alpha)
        factor = forgetting_factor(self.model, vectors[task], both, control_before)
        further = weighted_sum([without, vectors[task]], [1.0, -factor], "sum")
        self.set_backbone(_deltas(further, 1.0))
        row("forget, left out and subtracted", before, factor)
        self.set_backbone(_deltas(without, 1.0))
        kept = np.concatenate([ids for number, ids in enumerate(self.ids) if number != task])
        set_head(self.model, *self.fitted(kept), source="ridge")
        row("forget, left out, head of the others", before, alpha)
        if self.study.retrain:
            vector = self.training.together(union(vectors), kept, rate, self.study.tasks + 1 + task)
            self.set_backbone(_deltas(vector, 1.0))
            row("forget, retrained without", before)
            set_head(self.model, *self.fitted(kept), source="ridge")
            row("forget, retrained without, head of the others", before)
        self.set_backbone({})
        noted()

    # Measuring

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def set_backbone(self, deltas: dict[str, Tensor]) -> None:
        """Give the model the start's values and head, plus these changes by name."""
        for name, tensor in named_tensors(self.model).items():
            tensor.copy_(self.theta[name])
            if name in deltas:
                tensor.add_(deltas[name].to(tensor.device))

    def with_vector(self, vector: TaskVector, alpha: float) -> TaskAccuracy:
        """Test accuracy by task of the start plus alpha times a vector, which the model holds then."""
        self.set_backbone(_deltas(vector, alpha))
        return self.accuracy()

    def accuracy(self, head: Head | None = None, images: LabelledImages | None = None) -> TaskAccuracy:
        """Accuracy by task of the model, with another head if one is given, on the test images or others."""
        images = self.data.test if images is None else images
        with self.clock.part("features", len(images)):
            features = self.store.features(self.model, images)
        return accuracy_of_head(head or self.head, *features, self.groups)

    def measured(self, model: Backbone, images: LabelledImages) -> Metrics:
        """Loss and accuracy of a model, in the study's arithmetic."""
        return evaluate(model, images, precision=self.study.precision, compile=self.study.compile)

    def val_accuracy(self, edited: Backbone) -> float:
        """Accuracy on validation images, the task unknown."""
        return self.measured(edited, self.to_choose_by).accuracy

    def fitted(self, ids: Ids | None = None, val: LabelledImages | None = None) -> Head:
        """The ridge head of the sums over the model's features of the training images at ``ids`` (None: all).

        Its penalty is the best on ``val`` (None: all validation images).
        """
        val = self.data.val if val is None else val
        with self.clock.part("features", len(self.data.train if ids is None else ids) + len(val)):
            train, to_choose_by = (
                self.store.features(self.model, self.data.train, ids),
                self.store.features(self.model, val),
            )
        sums = head_sums("ridge", *train, len(self.data.classes))
        return best_head("ridge", sums, *to_choose_by)

    def refitted(self) -> TaskAccuracy:
        """Test accuracy by task, with the head fitted to sums over the model's features."""
        return self.accuracy(self.fitted())


def _deltas(vector: TaskVector, alpha: float) -> dict[str, Tensor]:
    return {name: alpha * tensor for name, tensor in vector.tensors().items()}


def _of_classes(images: LabelledImages, classes: Sequence[int]) -> LabelledImages:
    own = torch.isin(images.labels, torch.tensor(classes, device=images.labels.device))
    return images.subset(own.nonzero().squeeze(1))


def _mean(values: "Sequence[float] | np.ndarray") -> float:
    return float(np.nanmean(np.asarray(values)))


if __name__ == "__main__":
    tyro.cli(Study, description=__doc__, use_underscores=True).run()
