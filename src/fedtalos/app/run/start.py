"""The start of a run, kept so that its task vector can be written at its end, however often it was stopped."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedtalos.app.run.recorder import code_commit
from fedtalos.training.editing.task_vectors import TaskVector
from fedtalos.training.editing.vector_facts import facts_of
from fedtalos.training.masked_parameters import MaskedParameters

_PREFIX = "start/"
"""Prefix in checkpoints; of a start, what moves and the head are kept."""


class Start:
    """Values of what moves of a model, and its head, as they were when training began."""

    def __init__(self, moving: MaskedParameters, saved: Mapping[str, Tensor]) -> None:
        """Take it from a checkpoint's tensors, or where these have none from the model as it is."""
        self.moving = moving
        kept = {name.removeprefix(_PREFIX): tensor for name, tensor in saved.items() if name.startswith(_PREFIX)}
        head = moving.model.head
        self.theta = kept.get("theta", moving.vector()).detach().cpu().clone()
        self.weight = kept.get("weight", head.weight).detach().cpu().clone()
        self.bias = kept.get("bias", head.bias).detach().cpu().clone()

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
