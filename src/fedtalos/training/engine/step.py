"""Training steps of V clients at once: forward, backward, clipping by client and the optimiser, on buffers that stay.

A step reads nothing from the device, so it can be captured as a CUDA graph. Whatever went wrong is in its figures.

Shapes: V clients, B images of a client's batch, A entries that move, R rows of a tensor from the first to the last of
them.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from fedtalos.devices import distinct_places, out_of_memory
from fedtalos.training.engine.capture import Compile, Steps, compiled, first_line, say_once
from fedtalos.training.engine.stacked_model import StackedModel
from fedtalos.training.entries import Values
from fedtalos.training.local_training import LocalTraining
from fedtalos.training.loop import Batches, Step
from fedtalos.training.masked_parameters import MaskedParameters
from fedtalos.training.micro_batches import restricted


class StackedAdjust(Protocol):
    """A change to the gradients of V clients, (V, A) and free to be written to.

    What differs from round to round are its attributes that are tensors: a captured step gets those of another round
    copied into the ones that it knows.
    """

    def __call__(self, gradient: Tensor, /) -> Tensor: ...


A = TypeVar("A", bound=StackedAdjust)

Forward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(images, labels) -> losses and correct answers of every client, both (V,)."""


class Stack:
    """V clients that start from the same values and train side by side, each on its own batches.

    ``passed`` is the number of the model's stages that the batches have passed already. ``compile`` says how steps run;
    only whole batches, of ``local.batch_size`` images, are worth torch.compile's time.

    Every client's optimiser is fresh at ``load``. Of a tensor of which a mask freezes entries, the optimiser steps the
    moving ones gathered in a vector of their own, so that its state has no others, and writes them back.

    >>> stack = Stack(MaskedParameters(model, mask), LocalTraining(steps=4), size=10)
    >>> stack.load(theta)
    >>> steps = stack.train(batches, learning_rate=1e-3)    # batches of (10, B, 3, H, W) and (10, B)
    >>> stack.clients[0]                                    # the first client's values, in theta's parts
    """

    def __init__(
        self,
        moving: MaskedParameters,
        local: LocalTraining,
        size: int,
        *,
        passed: int = 0,
        compile: Compile = "off",
    ) -> None:
        self.local, self.size = local, size
        entries = moving.entries
        numbers = {name: torch.arange(len(mask)) for name, mask in entries.masks.items()}
        spans = dict(zip(numbers, entries.moving_rows(numbers), strict=True))
        rows = {name: slice(int(span[0]), int(span[-1]) + 1) for name, span in spans.items()}
        self._model = StackedModel(moving.model, rows, size=size, passed=passed, precision=local.precision)
        self._tensors = list(self._model.moving.values())
        within = {name: mask[rows[name]].flatten() for name, mask in entries.masks.items()}
        self._indices = [None if bool(mask.all()) else mask.nonzero().squeeze(1) for mask in within.values()]
        """Positions of moving entries in a client's rows of each tensor, (A,) together; None: all of them."""
        self.steered = [
            tensor if index is None else nn.Parameter(tensor.detach().view(size, -1).index_select(1, index))
            for tensor, index in zip(self._tensors, self._indices, strict=True)
        ]
        """Tensors that the optimiser steps: whole stacks, or the moving entries of one, (V, A)."""
        self.clients = [
            [stack.detach()[client].view_as(part) for stack, part in zip(self._tensors, moving.rows, strict=True)]
            for client in range(size)
        ]
        """Views of each client's values, in the parts of ``Entries.moving_rows``."""
        on_cuda = moving.device.type == "cuda"
        self._optimizer = _optimizer(self.steered, local, captured=on_cuda and compile != "off")
        self._allowed = local.allowed(moving)
        self._adjust: StackedAdjust | None = None
        self._compiled = compiled(self._losses) if compile == "on" else None
        self._steps = Steps(self.step, self._state, compile=compile)

    @property
    def optimizer_states(self) -> list[dict[str, Tensor]]:
        """States of the optimiser, one for each tensor that moves, which may be written to."""
        return [self._optimizer.state[steered] for steered in self.steered]

    def vector(self) -> Tensor:
        """Copy what moves of every client, (V, A)."""
        return torch.cat([steered.detach().flatten(1) for steered in self.steered], 1)

    def finite(self) -> Tensor:
        """Tell by client whether all values are finite, (V,) bool; nothing is read from the device."""
        return torch.stack([torch.stack(torch._foreach_norm(client)) for client in self.clients]).isfinite().all(1)

    @torch.no_grad()
    def load(self, theta: Values) -> None:
        """Let every client start from theta, with an optimiser that has seen nothing."""
        self._model.refresh()
        for client in self.clients:
            torch._foreach_copy_(client, theta.parts)
        self._gather()
        if state := self._optimizer_state():
            torch._foreach_zero_(state)

    def adjust_by(self, adjust: A | None) -> A | None:
        """Change gradients from now on by ``adjust``, before they are clipped.

        Returns the one in use: where captured steps know one like it already, that one, with the new one's tensors.
        """
        if adjust is None or _plain(adjust) != _plain(self._adjust):
            if adjust is not None or self._adjust is not None:
                self._steps.clear()
            self._adjust = adjust
            return adjust
        known = cast(A, self._adjust)
        for name, value in vars(adjust).items():
            if isinstance(value, Tensor):
                getattr(known, name).copy_(value)
        return known

    def train(self, batches: Batches, learning_rate: float | Callable[[int], float], first: int = 0) -> list[Step]:
        """Take a step of all clients per batch, (V, B, 3, H, W) and (V, B); nothing is read from the device.

        ``learning_rate`` is a number, or maps a step's number, which counts from ``first``, to its rate.
        """
        taken = []
        for number, (images, labels) in enumerate(batches, first):
            rate = learning_rate(number) if callable(learning_rate) else learning_rate
            self._set_rate(rate)
            loss, norm, correct = self._steps(images, labels)
            taken.append(Step(number, rate, labels.shape[1], loss, norm, correct))
        return taken

    def _set_rate(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Take one step on (V, B, ...) and (V, B); returns losses, gradients' norms and correct answers, (3, V)."""
        losses, correct, found = self._gradients(images, labels)
        with torch.no_grad():
            gradients = [
                gradient.reshape(self.size, -1)
                if index is None
                else gradient.view(self.size, -1).index_select(1, index)
                for gradient, index in zip(found, self._indices, strict=True)
            ]
            if self._adjust is not None:
                changed = self._adjust(torch.cat(gradients, 1))
                gradients = list(changed.split([gradient.shape[1] for gradient in gradients], 1))
            norms = losses
            if self.local.clip_norm is not None:
                gradients, norms = clip_each(gradients, self.local.clip_norm)
            for steered, gradient in zip(self.steered, gradients, strict=True):
                steered.grad = gradient.reshape(steered.shape).contiguous()  # fused optimisers look at no strides
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            self._write_back()
            return torch.stack([losses, norms, correct])

    def _gradients(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Losses and correct answers, (V,), and the gradients of the stacks; compiled where batches are whole."""
        if self._compiled is not None and labels.shape[1] == self.local.batch_size:
            try:
                return self._passed(self._compiled, images, labels)
            except Exception as error:  # whatever a compiler, or the C compiler that it wants, may raise
                if isinstance(error, RuntimeError) and out_of_memory(error):
                    raise
                say_once("compile", f"torch.compile failed ({first_line(error)}): steps run without it")
                self._compiled = None
        return self._passed(self._losses, images, labels)

    def _passed(self, forward: Forward, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        losses, correct = forward(images, labels)
        return losses.detach(), correct, torch.autograd.grad(losses.sum(), self._tensors)

    def _losses(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss and number of correct answers of every client, both (V,) float32."""
        logits = restricted(self._model(images), labels, self._allowed)  # (V, B, C)
        losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
        return losses.view(labels.shape).mean(1), (logits.argmax(2) == labels).sum(1).float()

    def _gather(self) -> None:
        """Copy moving entries into the vectors that the optimiser steps."""
        for steered, tensor, index in zip(self.steered, self._tensors, self._indices, strict=True):
            if index is not None:
                steered.copy_(tensor.view(self.size, -1).index_select(1, index))

    def _write_back(self) -> None:
        """Copy the vectors that the optimiser stepped into their tensors; every other entry keeps its bits."""
        with distinct_places():
            for steered, tensor, index in zip(self.steered, self._tensors, self._indices, strict=True):
                if index is not None:
                    tensor.view(self.size, -1).scatter_(1, index.expand(self.size, -1), steered)

    def _state(self) -> list[Tensor]:
        """Everything that a step changes, but its figures."""
        held = [tensor.detach() for tensor in (*self._tensors, *self.steered)]
        own = vars(self._adjust).values() if self._adjust is not None else ()
        return held + self._optimizer_state() + [value for value in own if isinstance(value, Tensor)]

    def _optimizer_state(self) -> list[Tensor]:
        states = self._optimizer.state.values()
        return [value for state in states for value in state.values() if isinstance(value, Tensor)]


def clip_each(gradients: list[Tensor], max_norm: float) -> tuple[list[Tensor], Tensor]:
    """Clip every client's gradient by itself, tensors (V, ...); returns the clipped ones and the norms found, (V,).

    Nothing is written in place: of a batch of one image, autograd gives the position's and the class token's gradients
    in the same memory.
    """
    norms = _norms(gradients)
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grads_with_norm_
    clipped = torch._foreach_mul(gradients, [factors.view(-1, *[1] * (gradient.dim() - 1)) for gradient in gradients])
    return list(clipped), norms


def _norms(tensors: list[Tensor]) -> Tensor:
    """2-norm by client over all tensors (V, ...), (V,)."""
    norms: Tensor = torch.stack([tensor.flatten(1).norm(dim=1) for tensor in tensors]).norm(dim=0)
    return norms


def _optimizer(steered: list[nn.Parameter], local: LocalTraining, *, captured: bool) -> Optimizer:
    """Make torch's optimiser of the stacks; for a graph, with its learning rate and step count on the device."""
    device, rate = steered[0].device, local.rate(0)
    fused = device.type == "cuda" or None  # one kernel instead of a dozen
    learning_rate: float | Tensor = torch.tensor(rate, device=device) if captured else rate
    if local.optimizer == "sgd":
        return SGD(steered, lr=learning_rate, momentum=local.momentum, weight_decay=local.weight_decay, fused=fused)
    made = AdamW(steered, lr=learning_rate, weight_decay=local.weight_decay, fused=fused, capturable=captured)
    made._warned_capturable_if_run_uncaptured = True  # torch's word for: say nothing of the warm-up
    return made


def _plain(adjust: Callable[[Tensor], Tensor] | None) -> object:
    """Make a key of an adjustment, its tensors' values left out: adjustments of one key share a captured step."""
    if adjust is None:
        return None
    plain = {name: value for name, value in vars(adjust).items() if not isinstance(value, Tensor)}
    return type(adjust), plain, sorted(vars(adjust).keys() - plain.keys())
