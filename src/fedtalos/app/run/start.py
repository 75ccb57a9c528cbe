"""The start of a run, kept so that its task vector can be written at its end, however often it was stopped."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedtalos.app.run.recorder import code_commit
from fedtalos.checkpoint import tensors_under
from fedtalos.training.editing.task_vectors import TaskVector
from fedtalos.training.editing.vector_facts import facts_of
from fedtalos.training.masked_parameters import MaskedParameters

_PREFIX = "start/"
"""Prefix in checkpoints; of a start, what moves and the head are kept."""


class Start:
    """Values of what moves of a model, and its head, as they were when training began."""

    def __init__(self, moving: MaskedParameters, saved: Mapping[str, Tensor]) -> None:
        """Take it from a checkpoint's tensors, or where these have none from the model as it is.

        Raises InputError where they are of another model.
        """
        self.moving = moving
        head = moving.model.head
        now = {"theta": moving.vector(), "weight": head.weight, "bias": head.bias}
        if any(name.startswith(_PREFIX) for name in saved):
            now = tensors_under(saved, _PREFIX, {name: tensor.shape for name, tensor in now.items()})
        self.theta, self.weight, self.bias = (now[name].detach().cpu().clone() for name in ("theta", "weight", "bias"))

    def tensors(self) -> dict[str, Tensor]:
        """Tensors to keep in checkpoints."""
        return {f"{_PREFIX}theta": self.theta, f"{_PREFIX}weight": self.weight, f"{_PREFIX}bias": self.bias}

    @torch.no_grad()
    def vector(self, classes: tuple[str, ...], command: str) -> TaskVector:
        """The task vector of the model as it is now, on what moves."""
        head = (self.weight, self.bias)
        commit = code_commit() or "unknown"
        facts = facts_of(self.moving.model, head, classes=classes, command=command, commit=commit)
        return TaskVector(self.moving.entries.masks, self.moving.vector().cpu() - self.theta, facts, head)
