"""theta <-> model: what may move of a model under a mask, as one flat vector; everything else is frozen.

Shapes: P all parameters, A entries that may move.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fedtalos.data.images import LabelledImages
from fedtalos.data.sampling import Ids
from fedtalos.models.backbone import Backbone
from fedtalos.models.row_sparse_linear import Linear, rows_with_true
from fedtalos.training.entries import Entries, Values
from fedtalos.training.feature_cache import FeatureStore, Source
from fedtalos.training.micro_batches import MicroBatch


class MaskedParameters:
    """A model and what moves of it: the True entries of a mask. The rest is frozen when this is made.

    Model and mask are one object from here on, so no optimiser, sum or message can use one without the other.
    ``mask`` maps parameter names to bool tensors of their shapes; parameters that it does not name are frozen, and
    None lets everything move. ``features`` keeps what frozen first stages make of images.

    Raises ValueError for a mask that names no parameter of the model, has another shape, or holds no True.

    >>> moving = MaskedParameters(model, mask)
    >>> theta = moving.copy()                   # before training
    >>> tau = moving.vector()                   # what moves, (A,)
    >>> moving.load(theta)                      # as before
    """

    def __init__(
        self, model: Backbone, mask: Mapping[str, Tensor] | None = None, *, features: FeatureStore | None = None
    ) -> None:
        parameters = dict(model.named_parameters())
        if mask is None:
            mask = {name: torch.ones_like(p, dtype=torch.bool, requires_grad=False) for name, p in parameters.items()}
        for name, tensor in mask.items():
            expected = tuple(parameters[name].shape) if name in parameters else "no such parameter"
            if tuple(tensor.shape) != expected:
                raise ValueError(f"mask: {name} has shape {tuple(tensor.shape)}, the model {expected}")
        device = next(iter(parameters.values())).device
        self.model = model
        self.entries = Entries({name: tensor.to(device) for name, tensor in mask.items()})
        self.parameters = {name: parameters[name] for name in self.entries.masks}
        self.tensors = {name: parameter.detach() for name, parameter in self.parameters.items()}
        self.rows = self.entries.moving_rows(self.tensors)
        """Views of the model, contiguous: of each tensor the rows from the first to the last that holds a True."""
        self.features = features or FeatureStore()
        self.micro_batch = MicroBatch()
        self._active_rows = {
            module: rows_with_true(self.entries.masks[f"{name}.weight"])
            for name, module in model.named_modules()
            if isinstance(module, Linear) and f"{name}.weight" in self.entries.masks
        }
        frozen = model.frozen_stages(self.entries.masks)
        # A ViT's embedding alone is cheaper to compute than to keep; features are worth it always.
        self.frozen_stages = frozen if frozen > 1 or frozen == len(model.stages) else 0
        self.freeze()

    @classmethod
    def of(cls, model: "Backbone | MaskedParameters", mask: Mapping[str, Tensor] | None) -> "MaskedParameters":
        """Pair a model with a mask, or pass on a pair that was made already."""
        if not isinstance(model, MaskedParameters):
            return cls(model, mask)
        if mask is not None:
            raise ValueError("mask: given with MaskedParameters, which have one of their own; leave it out")
        return model

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def nbytes(self) -> int:
        """Bytes on the wire: what moves, as float32."""
        return self.entries.nbytes

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.entries.device

    def freeze(self) -> None:
        """Give gradients only to tensors, and of Linear weights to rows, that hold an entry that may move.

        Training asks for this anew each time, so what another mask let move of the same model cannot linger.
        """
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self.parameters)
            parameter.grad = None
        for module in self.model.modules():
            if isinstance(module, Linear):
                module.active_rows = self._active_rows.get(module)

    def note_training(self) -> None:
        """Note on the model that its head has been trained, where it is among what moves."""
        if "head.weight" in self.parameters:
            self.model.head_source = "trained"

    def copy(self) -> Values:
        """A snapshot of what moves; what lies between, and does not move, comes along."""
        return Values(self.rows)

    def load(self, theta: Values) -> None:
        """Put a snapshot back into the model."""
        torch._foreach_copy_(self.rows, theta.parts)

    def vector(self) -> Tensor:
        """Copy what moves into one vector, (A,)."""
        return self.entries.gather(self.tensors)

    def write(self, vector: Tensor) -> None:
        """Write a vector (A,) into what moves; all other entries stay."""
        self.entries.scatter(vector, self.tensors)

    def gradients(self) -> dict[str, Tensor]:
        """Whole gradients of the tensors that hold moving entries."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None, f"{name} has no gradient"
            found[name] = parameter.grad
        return found

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale gradients so that their 2-norm over moving entries is at most ``max_norm``; returns the norm found, ().

        Entries that may not move do not count (torch.nn.utils.clip_grad_norm_ would count them).
        """
        norm = nn.utils.get_total_norm(self.entries.parts(self.gradients()))
        nn.utils.clip_grads_with_norm_(list(self.parameters.values()), max_norm, norm)
        return norm

    def source(self, images: LabelledImages, asked: Iterable[Ids]) -> Source:
        """Choose where batches come from: the images, or what the frozen stages make of those ``asked`` for."""
        return self.features.source(self.model, images, self.frozen_stages, asked)


def head_mask(model: Backbone) -> dict[str, Tensor]:
    """Make a mask that lets the classification head move, and nothing else.

    >>> mask = talos_mask(model, images) | head_mask(model)  # the head moves too
    """
    return {f"head.{n}": torch.ones_like(p, dtype=torch.bool) for n, p in model.head.named_parameters()}
