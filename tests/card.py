"""A pretended CUDA card: tensors lie in the CPU's memory, marked as the card's; what a card would refuse is an error.

Values are computed for real. Refused are operations on tensors of both devices; where nobody may wait, values that the
host reads and copies from memory that is not pinned; and in a captured step, besides, whatever a CUDA graph would get
wrong without a word: tensors of the CPU, values written that are not in the step's state, and tensors read that were
not there when it was captured.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fedtalos.data import view
from fedtalos.training.engine import ahead, capture
from fedtalos.training.engine.capture import WARM_UPS, undone
from fedtalos.training.engine.step import Stack

CARD, CPU = torch.device("cuda", 0), torch.device("cpu")
DEVICE, IS_CUDA = torch.Tensor.device.__get__, torch.Tensor.is_cuda.__get__
WAITS = {  # of which the host needs values, or sizes that depend on values
    *("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"),
    *("is_nonzero", "bincount", "repeat_interleave"),
}


def tensors_in(value: Any) -> list[Tensor]:
    """Tensors among an operation's arguments or results, in lists too."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for each in value for tensor in tensors_in(each)] if isinstance(value, list | tuple) else []


class CardError(AssertionError):
    """A card would refuse this, or compute something else."""


class Card:
    """Which tensors are on the card, and what may be done with them."""

    def __init__(self) -> None:
        self.marked, self.pinned = dict[int, StorageWeakRef](), dict[int, StorageWeakRef]()
        self.waits: list[str] = []
        self.may_wait = True
        self.step: Region | None = None

    def holds(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.marked

    def put(self, tensor: Tensor) -> Tensor:
        """Mark what lies in the CPU's memory; a weak reference keeps its number from being used again."""
        storage = tensor.untyped_storage()
        self.marked.setdefault(storage._cdata, StorageWeakRef(storage))
        return tensor

    def wait(self, why: str) -> None:
        self.waits.append(why)
        if not self.may_wait or self.step is not None:
            raise CardError(f"{why}: the host would wait for the card")

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        before, self.may_wait = self.may_wait, False
        try:
            yield
        finally:
            self.may_wait = before

    def moved(self, tensor: Tensor, device: torch.device, how: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
        """``Tensor.to``: to the card from pinned memory without a wait, else with one."""
        here = self.holds(tensor)
        if here == (device.type == "cuda"):
            return tensor.to(CPU, *how, **options)
        if here:
            self.wait("a copy to the host")
        elif tensor.untyped_storage()._cdata not in self.pinned:
            self.wait("a copy from pageable memory")
        elif self.step is not None:
            raise CardError("a copy from the host in a captured step")
        copied = self.put(tensor.to(CPU, *how, **options | {"copy": True}))
        if here:
            del self.marked[copied.untyped_storage()._cdata]
        return copied


class Region:
    """A captured step: what it may write, and what it read that it had not made itself."""

    def __init__(self, state: list[Tensor], known: set[int] | None) -> None:
        self.state = {tensor.untyped_storage()._cdata for tensor in state}
        self.known, self.read, self.made = known, set[int](), dict[int, StorageWeakRef]()

    def check(self, func: Any, args: tuple[Any, ...]) -> None:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tensors_in(value):
                if (number := tensor.untyped_storage()._cdata) in self.made:
                    continue
                self.read.add(number)
                if written and number not in self.state:
                    raise CardError(f"{func}: writes what is not in the step's state")
                if self.known is not None and number not in self.known:
                    raise CardError(f"{func}: reads a tensor that was not there when the step was captured")


class Functions(TorchFunctionMode):
    """torch's functions where they name devices."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        card, kwargs = self.card, dict(kwargs or {})
        if func in (DEVICE, IS_CUDA):
            here = card.holds(args[0])
            return here if func == IS_CUDA else CARD if here else CPU
        name = getattr(func, "__name__", "")
        if func is torch.Tensor.to:
            tensor, target, *how = (*args, kwargs.pop("device", None)) if len(args) == 1 else args
            if isinstance(target, torch.device | str):
                return card.moved(tensor, torch.device(target), tuple(how), kwargs)
            return func(tensor, *(() if target is None else (target,)), *how, **kwargs)
        if name in ("cpu", "cuda", "tolist", "numpy", "pin_memory") and isinstance(args[0], Tensor):
            return self._out(func, name, args[0])
        if (device := kwargs.get("device")) is not None and torch.device(device).type == "cuda":
            if name in ("tensor", "as_tensor"):
                if isinstance(args[0], Tensor):
                    return card.moved(args[0], CARD, (), {})
                card.wait(f"torch.{name}")
            return card.put(func(*args, **kwargs | {"device": CPU}))
        return func(*args, **kwargs)

    def _out(self, func: Any, name: str, tensor: Tensor) -> Any:
        card = self.card
        match name:
            case "cpu" | "cuda":
                return card.moved(tensor, torch.device(name), (), {})
            case "pin_memory":
                pinned = tensor.clone()
                card.pinned[pinned.untyped_storage()._cdata] = StorageWeakRef(pinned.untyped_storage())
                return pinned
        if card.holds(tensor):
            if name == "numpy":
                raise CardError("numpy: of a tensor on the card")
            card.wait(name)
        return func(tensor)


class Operations(TorchDispatchMode):
    """torch's operations, in the backward pass too."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        card, kwargs = self.card, kwargs or {}
        with torch._C.DisableTorchFunction():
            tensors = tensors_in((args, [*kwargs.values()]))
            here = [card.holds(tensor) for tensor in tensors]
            name = func._schema.name.removeprefix("aten::")
            if any(here):
                self._check(func, name, tensors, here)
            if card.step is not None:
                if not all(here):
                    raise CardError(f"{func}: a tensor of the CPU in a captured step")
                card.step.check(func, args)
            made = func(*args, **kwargs)
            if any(here) and name != "copy_":
                given = {tensor.untyped_storage()._cdata for tensor in tensors}
                for tensor in tensors_in(made):
                    if (number := tensor.untyped_storage()._cdata) not in given:
                        card.put(tensor)
                        if card.step is not None:
                            card.step.made[number] = card.marked[number]
            elif card.step is not None and not tensors:  # such as zeros; which device they are for is seen in Functions
                for tensor in tensors_in(made):
                    card.step.made[tensor.untyped_storage()._cdata] = StorageWeakRef(tensor.untyped_storage())
            return made

    def _check(self, func: Any, name: str, tensors: list[Tensor], here: list[bool]) -> None:
        card = self.card
        if name in WAITS or (name.startswith("index") and any(t.dtype == torch.bool for t in tensors[1:])):
            card.wait(name)
        if all(here):
            return
        if name == "copy_":
            source = tensors[1]
            if here[1] or source.untyped_storage()._cdata not in card.pinned:
                card.wait("copy_ between devices")
        elif any(tensor.dim() for tensor, there in zip(tensors, here, strict=True) if not there):
            raise CardError(f"{func}: tensors of both devices")


class Captured:
    """A CUDA graph's memory and its rules, its kernels launched one by one."""

    card: Card

    def __init__(self, step: Any, inputs: Any, state: Any) -> None:
        self._step, self._state = step, state
        self._inputs = [tensor.clone() for tensor in inputs]
        with undone(state):
            for _ in range(WARM_UPS):
                step(*self._inputs)
            with self._region(None) as region:
                step(*self._inputs)
        self._known = region.read

    @contextmanager
    def _region(self, known: set[int] | None) -> Iterator[Region]:
        self.card.step = region = Region([*self._state()], known)
        try:
            yield region
        finally:
            self.card.step = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        for buffer, tensor in zip(self._inputs, inputs, strict=True):
            buffer.copy_(tensor)
        with self._region(self._known):
            made = self._step(*self._inputs)
        return made.clone()


class Stream:
    """A stream whose work is done at once."""

    def __init__(self, *_: object) -> None: ...
    def wait_stream(self, _other: object) -> None: ...


@contextmanager
def pretended_card(monkeypatch: Any) -> Iterator[Card]:
    """Let ``cuda`` name a pretended card inside; training of stacks may not wait for it."""
    card = Card()
    group, autocast, train = torch._C._group_tensors_by_device_and_dtype, torch.autocast, Stack.train

    def grouped(tensors: Any, with_indices: bool) -> Any:
        """By their pretended device; all of a call are on one."""
        found = group(tensors, with_indices)
        first = next(tensor for tensors_ in tensors for tensor in tensors_ if tensor is not None)
        return {(first.device, dtype): value for (_, dtype), value in found.items()}

    def trained(*given: Any, **options: Any) -> Any:
        with card.no_waiting():
            return train(*given, **options)

    monkeypatch.setattr(torch._C, "_group_tensors_by_device_and_dtype", grouped)
    monkeypatch.setattr(torch, "autocast", lambda _device, **options: autocast("cpu", **options))
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(ahead, "stream_beside", Stream)
    monkeypatch.setattr(capture, "CapturedStep", type("OfThisCard", (Captured,), {"card": card}))
    monkeypatch.setattr(Stack, "train", trained)
    view._by_channel.cache_clear()
    with Operations(card), Functions(card):
        yield card
    view._by_channel.cache_clear()
