"""A step captured as a CUDA graph, and its eager twin: hundreds of kernels launched at once, or one by one.

An eager step of a small model is bound by the launches, some 1 500 a step at 6 us each, not by the card.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

log = logging.getLogger(__name__)

StepFunction = Callable[..., Tensor]
"""A function of tensors that waits for nothing on the host; what it keeps between calls stays where it is in memory."""

State = Callable[[], Sequence[Tensor]]
"""Gives the tensors that a step changes."""

WARM_UPS = 3
"""Steps before the capture: libraries make their workspaces, and the optimiser its state, outside the graph."""


class EagerStep:
    """Run a step as it stands: the twin of ``CapturedStep`` where nothing can be captured.

    >>> run = EagerStep(step)
    >>> figures = run(images, labels)
    """

    def __init__(self, step: StepFunction) -> None:
        self._step = step

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self._step(*inputs)


class CapturedStep:
    """Capture a step as a CUDA graph on buffers of its own, and replay it on inputs of the same shapes.

    ``state`` gives what the step changes: capturing takes a few steps, which are undone. Raises RuntimeError where
    the step cannot be captured.

    >>> run = CapturedStep(step, (images, labels), state=lambda: [weights])
    >>> figures = run(images, labels)
    """

    def __init__(self, step: StepFunction, inputs: Sequence[Tensor], state: State) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        self._graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        with undone(state):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    step(*self._inputs)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(self._graph):
                self._output = step(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for buffer, tensor in zip(self._inputs, inputs, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        self._graph.replay()
        return self._output.clone()


@contextmanager
def undone(state: State) -> Iterator[None]:
    """Put the tensors that ``state`` gives back as they were; those that came into being inside become 0.

    >>> with undone(lambda: [weights]):
    ...     weights.add_(1)
    """
    before = {tensor.data_ptr(): tensor.clone() for tensor in state() if tensor.numel()}
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor in state():
                if (held := before.get(tensor.data_ptr())) is None:
                    tensor.zero_()
                else:
                    tensor.copy_(held)


def capture_or_not(
    step: StepFunction, inputs: Sequence[Tensor], state: State, *, wanted: bool
) -> CapturedStep | EagerStep:
    """Capture a step where that is ``wanted`` and possible, else run it as it stands; the log says which and why not.

    >>> run = capture_or_not(step, (images, labels), lambda: [weights], wanted=True)
    """
    if not wanted:
        return EagerStep(step)
    if inputs[0].device.type != "cuda":
        _warn(f"steps cannot be captured on {inputs[0].device.type}, only on CUDA: they run eagerly")
        return EagerStep(step)
    try:
        return CapturedStep(step, inputs, state)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        _warn(f"steps cannot be captured as a CUDA graph ({error}): they run eagerly, which is slower")
        return EagerStep(step)


@cache
def _warn(message: str) -> None:
    """Say it once in a process, however many shapes of batches there are."""
    log.warning(message)
