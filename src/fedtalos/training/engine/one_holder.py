"""One holder of all images on the engine: a stack of one, and the model's own optimiser from epoch to epoch."""

import copy
import logging
from collections.abc import Callable
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from fedtalos.data.images import LabelledImages
from fedtalos.data.sampling import Ids
from fedtalos.devices import out_of_memory
from fedtalos.metrics import Metrics
from fedtalos.training.engine.batches import batches_of, stages_passed
from fedtalos.training.engine.capture import Compile
from fedtalos.training.engine.step import Stack
from fedtalos.training.local_training import LocalTraining, Watch, unwatched
from fedtalos.training.loop import Batches, add_up, check_optimizer, check_values, fetch
from fedtalos.training.masked_parameters import MaskedParameters
from fedtalos.training.sparse_optimizer import SparseOptimizer

log = logging.getLogger(__name__)

STEPS_A_LOOK = 64
"""Steps from one reading of figures, which waits for the device, to the next."""


class OneHolder:
    """Local training whose steps run on a stack of one: what ``LocalTraining.run`` computes, up to rounding.

    Where a batch does not fit into memory, the loop takes over, which halves batches.

    Raises InputError for models of other libraries.

    >>> holder = OneHolder(moving, local, compile="graph")
    >>> metrics = holder.run(images, ids, rng, optimizer=local.optimizer_for(moving), learning_rate=lambda step: 1e-3)
    """

    def __init__(self, moving: MaskedParameters, local: LocalTraining, *, compile: Compile) -> None:
        self._moving, self._local = moving, local
        self._stack: Stack | None = Stack(moving, local, 1, passed=stages_passed(moving, local), compile=compile)

    def run(
        self,
        images: LabelledImages,
        ids: Ids,
        rng: np.random.Generator,
        *,
        optimizer: Optimizer,
        learning_rate: Callable[[int], float],
        first: int = 0,
        watch: Watch = unwatched,
    ) -> Metrics:
        """Train on the images at ``ids``, as ``LocalTraining.run``; raises BadUpdateError where training diverges."""
        moving, local, again = self._moving, self._local, copy.deepcopy(rng)
        if self._stack is not None:
            steps = local.steps_for(len(ids))
            batches = batches_of(moving, local, images, [ids], [rng], steps=steps, first=first)
            try:
                return train_one(self._stack, moving, watch(batches, 1 / steps), optimizer, learning_rate=learning_rate)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            log.warning("a captured step does not fit into memory: training goes on without, in smaller batches")
            self._stack = None
            if moving.device.type == "cuda":
                torch.cuda.empty_cache()
        return local.run(
            moving, images, ids, again, learning_rate=learning_rate, optimizer=optimizer, first=first, watch=watch
        )


def train_one(
    stack: Stack,
    moving: MaskedParameters,
    batches: Batches,
    optimizer: Optimizer,
    *,
    learning_rate: Callable[[int], float],
) -> Metrics:
    """Step on the batches, (1, B, ...) and (1, B), as ``loop.train`` does; model and ``optimizer`` go on from there.

    Raises BadUpdateError where training diverges, within ``STEPS_A_LOOK`` steps; the model is as before then.
    """
    check_optimizer(optimizer, moving)
    stack.load(moving.copy())
    take_state(stack, optimizer, moving)
    total, going, number = Metrics(), iter(batches), 0
    while taken := stack.train(islice(going, STEPS_A_LOOK), learning_rate, first=number):
        total += add_up(taken, fetch(taken)[..., 0])
        check_values(stack.clients[0], taken[-1])
        number += len(taken)
    torch._foreach_copy_(moving.rows, stack.clients[0])
    give_state(stack, optimizer, moving)
    return total


def take_state(stack: Stack, optimizer: Optimizer, moving: MaskedParameters) -> None:
    """Let a stack of one, loaded just now, go on from the state of an optimiser of the model itself."""
    for own, parameter, values in zip(stack.optimizer_states, moving.parameters.values(), stack.steered, strict=True):
        for name, value in optimizer.state.get(parameter, {}).items():
            if value is None:
                continue
            if name not in own:
                own[name] = torch.zeros_like(values) if value.dim() else torch.zeros((), device=_clock(values))
            own[name].copy_(value.view(own[name].shape))


def give_state(stack: Stack, optimizer: Optimizer, moving: MaskedParameters) -> None:
    """Let an optimiser of the model itself go on from the state of a stack of one."""
    sparse = isinstance(optimizer, SparseOptimizer)
    for own, parameter in zip(stack.optimizer_states, moving.parameters.values(), strict=True):
        theirs = optimizer.state[parameter]
        for name, value in own.items():
            if value is None:
                continue
            if value.dim():
                theirs[name] = value.view(-1 if sparse else parameter.shape).clone()
            else:
                theirs[name] = value.to("cpu" if sparse else _clock(parameter), copy=True)


def _clock(tensor: Tensor) -> torch.device:
    """Device on which torch counts an optimiser's steps: the tensor's where the update is fused (step.py)."""
    return tensor.device if tensor.device.type == "cuda" else torch.device("cpu")
