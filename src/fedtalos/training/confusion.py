"""Confusion: which class was taken for which, and what that says of each.

Shapes: N images, C classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedtalos.data.batches import evaluation_batches
from fedtalos.data.images import LabelledImages
from fedtalos.devices import Precision, autocast
from fedtalos.metrics import Metrics
from fedtalos.models.backbone import Backbone
from fedtalos.training.feature_cache import plain_source
from fedtalos.training.loop import Batches


@dataclass(frozen=True, eq=False)
class Confusion:
    """Counts of images by class and answer, and the metrics over all of them.

    >>> confusion(model, data.test).most_confused(1)
    [(3, 5, 112)]
    """

    counts: Tensor
    """int64 (C, C): a row per true class, a column per answer."""
    metrics: Metrics
    answers: Tensor
    """int64 (N,): the class that each image was taken for, in the images' order."""

    @property
    def examples(self) -> Tensor:
        """Images of each class, int64 (C,)."""
        return self.counts.sum(1)

    @property
    def correct(self) -> Tensor:
        """Images of each class that were recognised, int64 (C,)."""
        return self.counts.diagonal()

    @property
    def answered(self) -> Tensor:
        """Images that were taken for each class, rightly or not, int64 (C,)."""
        return self.counts.sum(0)

    def most_confused(self, most: int = 10) -> list[tuple[int, int, int]]:
        """List up to ``most`` mistakes as (true class, answer, images), the most frequent first."""
        mistakes = self.counts - self.counts.diagonal().diag()
        order = mistakes.flatten().sort(descending=True, stable=True).indices[:most].tolist()
        pairs = [divmod(place, len(mistakes)) for place in order]
        return [(true, answer, int(mistakes[true, answer])) for true, answer in pairs if mistakes[true, answer]]


@torch.inference_mode()
def confusion(
    model: Backbone,
    images: LabelledImages,
    *,
    batch_size: int = 250,
    precision: Precision = "fp32",
    watch: Callable[[Batches], Batches] = lambda batches: batches,
) -> Confusion:
    """Count which class the model takes each image for, without augmentation.

    Accuracy and loss are those of ``evaluate``.

    >>> found = confusion(model, data.test)
    >>> found.metrics.accuracy, found.correct / found.examples
    """
    model.eval()
    source, size = plain_source(model, images), model.architecture.num_classes
    answers, loss = [torch.empty(0, dtype=torch.long)], 0.0
    for x, labels in watch(evaluation_batches(source.images, source.view, batch_size)):
        with autocast(x.device, precision):
            logits = source.forward(x)
        loss += float(F.cross_entropy(logits.float(), labels, reduction="sum"))
        answers.append(logits.argmax(1).cpu())
    answered = torch.cat(answers)
    counts = torch.bincount(images.labels.cpu() * size + answered, minlength=size * size).view(size, size)
    return Confusion(counts, Metrics(loss, int(counts.diagonal().sum()), int(counts.sum())), answered)
