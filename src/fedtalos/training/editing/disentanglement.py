"""Weight disentanglement: how far two vectors' effects stay out of each other's way.

Source: Ortiz-Jimenez, Favero and Frossard, 2023, arXiv 2305.12827, the weight disentanglement error.
Shapes: N images, G factors, C classes.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtalos.data.batches import evaluation_batches
from fedtalos.data.images import LabelledImages
from fedtalos.devices import Precision, autocast
from fedtalos.errors import InputError
from fedtalos.models.backbone import Backbone
from fedtalos.randomness import generator
from fedtalos.training.editing.task_vectors import TaskVector, check_fits, weighted_sum, write_edit
from fedtalos.training.feature_cache import view_of

RESAMPLES = 2000

Classes = Sequence[Sequence[int] | None] | None
"""Numbers of the classes of each task to choose answers among; None stands for all."""


@dataclass(frozen=True)
class Interval:
    """A mean, and where its 95 % interval begins and ends.

    >>> disentanglement_of_all(model, tasks).mean
    0.031
    """

    mean: float
    low: float
    high: float


def disentanglement_error(
    model: Backbone,
    vectors: Sequence[TaskVector],
    images: Sequence[LabelledImages],
    alphas: Sequence[float] = (-1.0, 0.0, 1.0),
    *,
    classes: Classes = None,
    precision: Precision = "fp32",
) -> NDArray[np.float64]:
    """Weight disentanglement error of two vectors, (G, G): row alpha_1, column alpha_2, each among ``alphas``.

        xi(a1, a2) = sum over t = 1, 2 of the share of task t's images on which the answers of
        f(theta + a1 tau1 + a2 tau2) and f(theta + a_t tau_t) differ

    So 0 is no interference, and 2 the most there is. ``images`` are of each vector's task, and ``classes`` the numbers
    of the classes that answers are chosen among (None: all).

    Raises InputError unless two vectors of this model and images of both come.

    >>> disentanglement_error(model, [tau_of_cats, tau_of_dogs], [cats, dogs], alphas=(0.0, 0.5, 1.0))
    """
    if len(vectors) != 2 or len(images) != 2:
        raise InputError(f"vectors: expected two, and images for each, got {len(vectors)} and {len(images)} of images")
    if not all(map(len, images)):
        sizes = " and ".join(str(len(own)) for own in images)
        raise InputError(f"images: expected some of the classes of each vector, got {sizes}; take more")
    for vector in vectors:
        check_fits(vector, model)
    edited, among = copy.deepcopy(model), classes or (None, None)

    def answers(task: int, factors: Sequence[float]) -> Tensor:
        write_edit(edited, model, weighted_sum(vectors, factors, "sum"), 1.0)
        return predictions(edited, images[task], among[task], precision=precision)

    alone = [[answers(0, (alpha, 0.0)) for alpha in alphas], [answers(1, (0.0, alpha)) for alpha in alphas]]
    errors = np.zeros((len(alphas), len(alphas)))
    for at in np.ndindex(errors.shape):
        for task in (0, 1):
            together = answers(task, [alphas[number] for number in at])
            errors[at] += float((together != alone[task][at[task]]).double().mean())
    return errors


def disentanglement_of_all(
    model: Backbone,
    vectors: Sequence[TaskVector],
    images: Sequence[LabelledImages],
    alpha: float = 1.0,
    *,
    classes: Classes = None,
    seed: int = 0,
    precision: Precision = "fp32",
) -> tuple[Interval, dict[tuple[int, int], float]]:
    """Weight disentanglement error at one alpha for all: its mean over pairs, with an interval, and that of each pair.

    The interval is of resampled pairs (bootstrap); pairs share vectors, so it says how pairs differ, and less about
    tasks that were not tried. Two vectors are one pair, whose interval begins and ends at the mean.

    >>> over_pairs, by_pair = disentanglement_of_all(model, [cats, dogs, birds], images, alpha=0.4)
    """
    if len(vectors) < 2 or len(images) != len(vectors):
        raise InputError(f"vectors: expected at least two, and images for each, got {len(vectors)} and {len(images)}")
    among = classes or [None] * len(vectors)
    pairs = {
        (i, j): float(
            disentanglement_error(
                model,
                [vectors[i], vectors[j]],
                [images[i], images[j]],
                [alpha],
                classes=[among[i], among[j]],
                precision=precision,
            )[0, 0]
        )
        for i, j in combinations(range(len(vectors)), 2)
    }
    return interval(list(pairs.values()), seed), pairs


def interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Mean of values with its 95 % bootstrap percentile interval.

    >>> interval([0.1, 0.1])
    Interval(mean=0.1, low=0.1, high=0.1)
    """
    found = np.asarray(values, dtype=np.float64)
    drawn = generator(seed, "bootstrap").integers(len(found), size=(RESAMPLES, len(found)))
    low, high = np.quantile(found[drawn].mean(1), [0.025, 0.975])
    return Interval(float(found.mean()), float(low), float(high))


@torch.inference_mode()
def predictions(
    model: Backbone,
    images: LabelledImages,
    classes: Sequence[int] | None = None,
    *,
    batch_size: int = 250,
    precision: Precision = "fp32",
) -> Tensor:
    """The classes that a model answers with, (N,) int64 on the CPU, chosen among ``classes`` (None: among all).

    >>> predictions(model, cats_and_dogs, classes=(3, 5))
    tensor([3, 5, 5])
    """
    model.eval()
    found = [torch.empty(0, dtype=torch.long)]
    for x, _ in evaluation_batches(images, view_of(model), batch_size):
        with autocast(x.device, precision):
            logits = model(x).float().cpu()
        if classes is None:
            found.append(logits.argmax(1))
        else:
            chosen = torch.tensor(list(classes))
            found.append(chosen[logits[:, chosen].argmax(1)])
    return torch.cat(found)


def normalised_accuracy(merged: Sequence[float], single: Sequence[float]) -> float:
    """Mean over tasks of the merged model's accuracy over that of the task's own model (Ilharco et al., 2023).

    Look at absolute accuracy first: a weak single model makes this large. Tasks whose own model is never right, or not
    measured (nan), are left out; nan where that leaves none.

    >>> normalised_accuracy([0.9, 0.8], single=[0.9, 1.0])
    0.9
    """
    shares = [one / own for one, own in zip(merged, single, strict=True) if own > 0]
    return fmean(shares) if shares else float("nan")
