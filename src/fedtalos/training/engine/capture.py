"""A step captured as a CUDA graph, and its eager twin: hundreds of kernels launched at once, or one by one.

An eager step of a small model is bound by the launches, some 1 500 a step at 6 us each, not by the card.
"""

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from fedtalos.devices import out_of_memory
from fedtalos.errors import check_word
from fedtalos.notes import note

log = logging.getLogger(__name__)

Compile = Literal["on", "graph", "off"]
"""Ways that steps run: through torch.compile and as CUDA graphs, as graphs of the eager step, or as they stand."""

StepFunction = Callable[..., Tensor]
"""A function of tensors that waits for nothing on the host; what it keeps between calls stays where it is in memory."""

State = Callable[[], Sequence[Tensor]]
"""Gives the tensors that a step changes."""

WARM_UPS = 2
"""Steps before the capture, on a stream beside: libraries make their workspaces outside the graph."""

DEVICES_WITH_GRAPHS = ("cuda",)

SHAPES = 64
"""Shapes for which torch.compile may make a function anew; by itself it gives up after eight."""


class CapturedStep:
    """A step as a CUDA graph on buffers of its own, replayed on inputs of the same shapes.

    ``state`` gives what the step changes: capturing takes a few steps, which are undone. All graphs of a device share
    one pool of memory, so that many take no more than the largest. They overwrite each other's values there, so outputs
    are copies. Raises RuntimeError where the step cannot be captured.

    >>> run = CapturedStep(step, (images, labels), state=lambda: [weights])
    >>> figures = run(images, labels)
    """

    def __init__(self, step: StepFunction, inputs: Sequence[Tensor], state: State) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        self._device = inputs[0].device
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), undone(state):
            main, side = torch.cuda.current_stream(), stream_beside(self._device)
            torch.cuda.empty_cache()  # what an eager step took; streams do not share free memory
            side.wait_stream(main)
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    step(*self._inputs)
            main.wait_stream(side)
            pool = next((graph.pool for graph in _captured if graph._device == self._device), None)
            with torch.cuda.stream(main), torch.cuda.graph(self._graph, pool=pool):  # the former: where capturing fails
                self._output = step(*self._inputs)  # torch stays on the stream of the capture
        self.pool: Any = self._graph.pool()
        _captured.add(self)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for buffer, tensor in zip(self._inputs, inputs, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        self._graph.replay()
        return self._output.clone()


_captured: weakref.WeakSet[CapturedStep] = weakref.WeakSet()
"""Graphs that are alive: torch lends a pool only as long as one of its graphs is."""


@cache
def stream_beside(device: torch.device) -> torch.cuda.Stream:
    """Make the one stream beside a device's main one: torch keeps memory apart for each that there is.

    >>> stream_beside(torch.device("cuda", 0)) is stream_beside(torch.device("cuda", 0))
    True
    """
    return torch.cuda.Stream(device)


class Steps:
    """A step that runs as it stands at first, and as a CUDA graph once inputs of the same shapes have come ``after``
    times; with ``compile`` off, or where a graph is impossible, always as it stands.

    So shapes that come once, such as a last small batch, cost no capture. The kernels are the same either way, and so
    are the numbers.

    >>> run = Steps(step, state=lambda: [weights], compile="graph")
    >>> figures = [run(images, labels) for images, labels in batches]
    """

    def __init__(self, step: StepFunction, state: State = list, *, compile: Compile, after: int = 1) -> None:
        check_word("compile", compile, Compile)
        self._step, self._state, self._after = step, state, after
        self._compile = compile
        self._seen: dict[tuple[torch.Size, ...], int] = {}
        self._graphs: dict[tuple[torch.Size, ...], CapturedStep] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self._compile == "off":
            return self._step(*inputs)
        shapes = tuple(tensor.shape for tensor in inputs)
        self._seen[shapes] = self._seen.get(shapes, 0) + 1
        if shapes not in self._graphs and self._seen[shapes] > self._after:
            self._try_to_capture(shapes, inputs)
        return self._graphs.get(shapes, self._step)(*inputs)

    def clear(self) -> None:
        """Forget all graphs: the step is another from now on."""
        self._graphs.clear()

    def _try_to_capture(self, shapes: tuple[torch.Size, ...], inputs: Sequence[Tensor]) -> None:
        if inputs[0].device.type not in DEVICES_WITH_GRAPHS:
            if self._compile == "graph":
                say_once("graphs", f"there are no CUDA graphs on {inputs[0].device.type}: steps run eagerly")
            self._compile = "off"
            return
        try:
            self._graphs[shapes] = CapturedStep(self._step, inputs, self._state)
        except RuntimeError as error:
            if out_of_memory(error) or isinstance(error.__context__, torch.OutOfMemoryError):
                raise torch.OutOfMemoryError(str(error)) from error
            self._compile = "off"
            say_once("graphs", f"a step cannot be captured as a CUDA graph ({first_line(error)}): steps run eagerly")


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


P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Pass a function through torch.compile, for each shape of its inputs anew; it compiles when it is called.

    >>> forward = compiled(model)
    """
    if torch.are_deterministic_algorithms_enabled():  # say so once more, by the name that tells inductor too
        torch.use_deterministic_algorithms(True, warn_only=torch.is_deterministic_algorithms_warn_only_enabled())
    limits = torch._dynamo.config
    limits.cache_size_limit = max(SHAPES, limits.cache_size_limit)  # the old name, which every version accepts
    made: Callable[P, R] = torch.compile(function, dynamic=False)
    return made


_said: set[str] = set()


def say_once(what: str, sentence: str) -> None:
    """Warn of a slower way that is taken, once in a process, and note it for the run's record."""
    note(what, sentence)
    if sentence not in _said:
        _said.add(sentence)
        log.warning("%s", sentence)


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type's name: CUDA's and the compiler's go on for pages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
