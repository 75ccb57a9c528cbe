"""A model that is one vector, and clients that move it by a formula instead of images: rounds to check by hand."""

import numpy as np
import torch
from torch import nn

from fedtalos.data.images import LabelledImages
from fedtalos.metrics import Metrics
from fedtalos.models.backbone import Backbone
from fedtalos.training.federated.clients import Clients


class Point(Backbone):
    """One parameter ``x``, of any shape."""

    def __init__(self, x):
        super().__init__()
        self.x = nn.Parameter(x.clone())

    @property
    def stages(self):
        return [lambda images: images]

    def frozen_stages(self, moving):
        return 0


class Formula:
    """Stands in for LocalTraining: client k trains by ``update(k, adjust)``, which moves the model."""

    optimizer, momentum = "sgd", 0.0

    def __init__(self, update, steps_for=lambda _examples: 1):
        self.update, self.steps_for = update, steps_for

    def rate(self, _done):
        return 1.0

    def run(self, moving, images, ids, rng, adjust=None, **_):
        metrics = self.update(int(images.labels[ids[0]]), adjust or (lambda gradient: gradient))
        return metrics or Metrics(1.0, 1, 1)


def clients_of(sizes):
    """Clients of so many images each, whose label is their client."""
    owner = np.repeat(np.arange(len(sizes)), sizes)
    pixels = torch.zeros(1, 3, 1, 1, dtype=torch.uint8).expand(len(owner), 3, 1, 1)
    return Clients.of(LabelledImages(pixels, torch.from_numpy(owner)), owner, len(sizes))
