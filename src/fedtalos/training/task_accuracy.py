"""Accuracy by task: among all classes (the task unknown) and among the task's own (the task known).

Shapes: N images, D width of the features, C classes, T tasks.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedtalos.data.class_groups import Groups, group_of
from fedtalos.data.images import LabelledImages
from fedtalos.models.backbone import Backbone
from fedtalos.models.heads import Head, head_sums, ridge_head
from fedtalos.training.feature_cache import FeatureStore

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TaskAccuracy:
    """Accuracy on each task's images, (T,) 0 to 1; nan for a task without images."""

    unknown: Floats
    """By the largest output of all."""
    known: Floats
    """By the largest output among the task's classes."""


def task_accuracy(
    model: Backbone, images: LabelledImages, groups: Groups, features: FeatureStore | None = None
) -> TaskAccuracy:
    """Measure the model on each group's images; images of classes that are in no group do not count.

    >>> found = task_accuracy(model, data.val, class_groups(data.classes, 5))
    >>> found.unknown.mean(), found.known.mean()
    """
    weight, bias = (parameter.detach() for parameter in model.head.parameters())
    return accuracy_of_head((weight, bias), *(features or FeatureStore()).features(model, images), groups)


def accuracy_of_head(head: Head, features: Tensor, labels: Tensor, groups: Groups) -> TaskAccuracy:
    """Measure a head on features (N, D) that are there already.

    >>> accuracy_of_head((weight, bias), features, labels, ((0, 1), (2, 3))).known
    array([0.9, 0.8])
    """
    features, labels = features.cpu(), labels.cpu()
    weight, bias = (tensor.cpu() for tensor in head)
    logits = F.linear(features, weight, bias)
    group = torch.from_numpy(group_of(groups, len(bias)))
    own = group[labels].unsqueeze(1) == group
    counted = group[labels] >= 0

    def by_task(chosen: Tensor) -> Floats:
        counts = torch.bincount(group[labels][counted], minlength=len(groups)).numpy()
        right = torch.bincount(group[labels][counted & (chosen == labels)], minlength=len(groups)).numpy()
        shares: Floats = np.divide(right, counts, out=np.full(len(groups), np.nan), where=counts > 0)
        return shares

    return TaskAccuracy(by_task(logits.argmax(1)), by_task(logits.masked_fill(~own, -torch.inf).argmax(1)))


def probe_accuracy(
    model: Backbone,
    train: LabelledImages,
    test: LabelledImages,
    features: FeatureStore | None = None,
    penalty: float = 1e-2,
) -> float:
    """Accuracy of a linear probe: a ridge head fitted on features of ``train``, measured on ``test``.

    Given the images of forgotten classes it says what their features still tell, whatever the model's own head says.
    ``penalty`` is in units of the features' variance, as ``ridge_head`` has it.

    >>> probe_accuracy(model, forgotten_train, forgotten_test)
    0.71
    """
    store, classes = features or FeatureStore(), model.architecture.num_classes
    weight, bias = ridge_head(head_sums("ridge", *store.features(model, train), classes), penalty)
    seen, labels = (tensor.cpu() for tensor in store.features(model, test))
    return float((F.linear(seen, weight, bias).argmax(1) == labels).double().mean())
