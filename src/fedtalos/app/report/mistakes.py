"""Classes in a report: how well each is recognised, which are taken for which, and images of real mistakes.

Shapes: N images, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedtalos.app.report.pictures import map_of, png
from fedtalos.data.images import LabelledImages
from fedtalos.training.confusion import Confusion

PAIRS, EACH = 12, 6
"""Most confused pairs that are shown, and images of each."""
MOST_CLASSES = 1000
"""Classes of which there is a matrix; of more it would be neither read nor sent."""
SIDE = 48
"""Pixels a side of a thumbnail, at most."""


@dataclass(frozen=True)
class Pair:
    """Images of one class that were taken for another."""

    true: str
    answer: str
    images: int
    pictures: Sequence[str]


@dataclass(frozen=True)
class Classes:
    """Accuracy by class, the matrix of confusion as a picture, and the most confused pairs."""

    part: str
    """Name of the images: test, say."""
    names: Sequence[str]
    rows: Sequence[tuple[str, int, int, float]]
    """(class, right, images, accuracy in %), the lowest first."""
    matrix: str
    pairs: Sequence[Pair]


def classes_of(found: Confusion, images: LabelledImages, names: Sequence[str], part: str) -> Classes:
    """Gather what the report shows of classes, from answers to the images (N)."""
    counts = found.counts.double()
    of_class = counts.sum(1, keepdim=True).clamp(min=1)
    there = [label for label in range(len(names)) if found.examples[label]]
    rows = [
        (names[c], right := int(found.correct[c]), all_ := int(found.examples[c]), 100 * right / all_) for c in there
    ]
    pairs = [
        Pair(names[true], names[answer], many, _pictures(found, images, true, answer))
        for true, answer, many in found.most_confused(PAIRS)
    ]
    matrix = map_of((counts / of_class).numpy(), 1.0)
    return Classes(part, names, sorted(rows, key=lambda row: (row[3], row[0])), matrix, pairs)


def _pictures(found: Confusion, images: LabelledImages, true: int, answer: int) -> list[str]:
    labels = images.labels.cpu()
    ids = ((labels == true) & (found.answers == answer)).nonzero().flatten()[:EACH]
    pixels = images.pixels[ids.to(images.pixels.device)].cpu()
    step = max(1, pixels.shape[-1] // SIDE)
    return [png(one) for one in pixels[..., ::step, ::step].permute(0, 2, 3, 1).contiguous().to(torch.uint8).numpy()]
