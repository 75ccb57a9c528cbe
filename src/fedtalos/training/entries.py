"""Chosen entries of named tensors, seen as one flat vector.

Shapes: A chosen (True) entries, in the order of the masks.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedtalos.devices import distinct_places

Mask = dict[str, Tensor]
"""Tensor name -> bool tensor of the parameter's shape; True = may move."""


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's own parameters by name, detached but sharing memory: writing to them moves the model."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


class Entries:
    """The True entries of one bool mask per named tensor, as one vector of length A in the masks' order."""

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        """Masks are bool tensors shaped as the tensors they speak of; a tensor without a True entry is left out.

        Raises TypeError for another dtype, ValueError where no entry is True.
        """
        wrong = [name for name, mask in masks.items() if mask.dtype != torch.bool]
        if wrong:
            raise TypeError(f"masks: expected bool tensors, got {masks[wrong[0]].dtype} for {wrong[0]}")
        self.masks = {name: mask for name, mask in masks.items() if bool(mask.any())}
        if not self.masks:
            raise ValueError("masks: expected at least one True entry, got none")
        self.indices = {
            name: None if bool(mask.all()) else mask.flatten().nonzero().squeeze(1) for name, mask in self.masks.items()
        }
        """By name, where the chosen entries lie in the flat tensor; None: the whole tensor, which needs no index."""
        self._counts = [int(mask.sum()) for mask in self.masks.values()]
        self._rows = {name: _first_to_last(mask.reshape(len(mask), -1).any(1)) for name, mask in self.masks.items()}

    def __len__(self) -> int:
        return sum(self._counts)

    @property
    def nbytes(self) -> int:
        """Bytes of the chosen entries on the wire, as float32."""
        return 4 * len(self)

    @property
    def device(self) -> torch.device:
        """Device of the masks, which is to be that of the tensors."""
        return next(iter(self.masks.values())).device

    @property
    def whole(self) -> bool:
        """True where every mask is True everywhere: dense training."""
        return all(index is None for index in self.indices.values())

    def gather(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Copy the chosen entries out of ``tensors`` into one vector (A,)."""
        return torch.cat(self.parts(tensors))

    def parts(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """The chosen entries tensor by tensor, as vectors; those of whole tensors share their memory."""
        flats = [(tensors[name].detach().reshape(-1), index) for name, index in self.indices.items()]
        return [flat if index is None else flat.index_select(0, index) for flat, index in flats]

    def scatter(self, vector: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Write ``vector`` (A,) into the chosen entries of ``tensors`` in place; all other entries stay."""
        with distinct_places():
            for (name, index), part in zip(self.indices.items(), torch.split(vector, self._counts), strict=True):
                flat = tensors[name].detach().view(-1)
                if index is None:
                    flat.copy_(part)
                else:
                    flat[index] = part

    def moving_rows(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Views of ``tensors``, each contiguous: the rows from the first to the last that hold a chosen entry.

        To copy these whole, entries between that do not move included, takes a fraction of the time of picking the
        chosen ones by index.
        """
        return [tensors[name].detach()[rows] for name, rows in self._rows.items()]

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Write ``vector`` (A,) as tensors of the masks' shapes, zero (or False) in the entries not chosen."""
        tensors = {
            name: torch.zeros(mask.shape, dtype=vector.dtype, device=vector.device) for name, mask in self.masks.items()
        }
        self.scatter(vector, tensors)
        return tensors


def _first_to_last(rows: Tensor) -> slice:
    numbers = rows.nonzero()
    return slice(int(numbers[0]), int(numbers[-1]) + 1)


class Values:
    """A copy of some tensors: ``vector``, all of it, contiguous, and ``parts``, its pieces in the tensors' shapes."""

    def __init__(self, like: Sequence[Tensor]) -> None:
        self.vector = torch.cat([tensor.reshape(-1) for tensor in like])
        pieces = torch.split(self.vector, [tensor.numel() for tensor in like])
        self.parts = [piece.view_as(tensor) for piece, tensor in zip(pieces, like, strict=True)]

    def take(self, tensors: Sequence[Tensor]) -> None:
        """Copy the tensors anew, into the memory that is there."""
        torch._foreach_copy_(self.parts, list(tensors))


def all_finite(tensors: list[Tensor]) -> bool:
    """Tell whether no tensor holds NaN, infinity, or numbers whose 2-norms overflow; waits for the device."""
    return math.isfinite(torch.stack(torch._foreach_norm(tensors)).sum().item())
