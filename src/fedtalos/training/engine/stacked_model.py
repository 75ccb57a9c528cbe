"""A Vision Transformer as V clients have it, without a second copy of its layers' code.

The blocks, their attention and their MLPs are the model's own: they map sequences to sequences, and here the sequences
are those of all clients, one after another. Only where a parameter meets them stands a layer of ``stacked_layers``.

Shapes: V clients, B images of each one's batch, T tokens, D width, C classes.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedtalos.devices import Precision
from fedtalos.errors import InputError
from fedtalos.models.backbone import Backbone
from fedtalos.models.transformer_layers import LayerScale
from fedtalos.models.vision_transformer import VisionTransformer
from fedtalos.training.engine.stacked_layers import (
    StackedLinear,
    StackedNorm,
    StackedPatches,
    StackedScale,
    StackedTensor,
)


class StackedModel(nn.Module):
    """V copies of what moves of a model, sharing the rest: images (V, B, 3, H, W) -> logits (V, B, C).

    ``rows`` says of the parameters that move which rows do. With ``passed`` the input is the state after that many of
    the model's stages, (V, B, T, D) or (V, B, D). Under ``bf16`` products take copies of weights cast once a step, and
    norms, softmax and sums stay float32, as autocast has it. The model itself is not changed.

    Raises InputError for models of other libraries: their layers are not known.

    >>> stacked = StackedModel(model, {"head.weight": slice(0, 100), "head.bias": slice(0, 100)}, size=10)
    >>> stacked(torch.rand(10, 64, 3, 32, 32)).shape
    torch.Size([10, 64, 100])
    """

    def __init__(
        self, model: Backbone, rows: Mapping[str, slice], *, size: int, passed: int = 0, precision: Precision = "fp32"
    ) -> None:
        super().__init__()
        if not isinstance(model, VisionTransformer):
            raise InputError(f"model {model.architecture}: cannot be stacked; train its clients one by one")
        self.size, self.passed = size, passed
        self._dtype = torch.bfloat16 if precision == "bf16" else None
        self._rows = rows
        tensors: dict[str, StackedTensor] = {}
        self._twin = self._twin_of(model, "", tensors)
        self._tokens = {
            name: self._tensor(tensors, name, parameter) for name, parameter in model.named_parameters(recurse=False)
        }
        self._tensors = tensors
        self.moving: dict[str, nn.Parameter] = {name: tensors[name].own_rows for name in rows}
        """Moving tensors by name, (V, R, ...), in the order of ``rows``; a patch embedding's weight (V, R, 3 p p)."""

    def refresh(self) -> None:
        """Take what is frozen from the model anew."""
        for tensor in self._tensors.values():
            tensor.refresh()

    def forward(self, x: Tensor) -> Tensor:
        own = {} if self.passed else {name: self._spread(tensor(), x.shape[1]) for name, tensor in self._tokens.items()}
        logits: Tensor = functional_call(self._twin, own, (x.flatten(0, 1), self.passed))
        by_client: Tensor = logits.unflatten(0, x.shape[:2])
        return by_client

    def _spread(self, tokens: Tensor, batch: int) -> Tensor:
        """Tokens of the embedding for every sequence: (V, 1, T, D) -> (V B, T, D); shared ones, (1, T, D), as is."""
        return tokens if tokens.dim() == 3 else tokens.expand(-1, batch, -1, -1).flatten(0, 1)

    def _twin_of(self, module: nn.Module, prefix: str, tensors: dict[str, StackedTensor]) -> nn.Module:
        """The module with layers that hold parameters replaced, and everything else its own."""

        def tensor(name: str, dtype: torch.dtype | None = None) -> StackedTensor:
            value: Tensor = getattr(module, name)
            return self._tensor(tensors, prefix + name, value, dtype)

        match module:
            case nn.Linear():
                bias = None if module.bias is None else tensor("bias", self._dtype)
                return StackedLinear(tensor("weight", self._dtype), bias, self.size)
            case nn.Conv2d():
                linear = StackedLinear(tensor("weight", self._dtype), tensor("bias", self._dtype), self.size)
                return StackedPatches(linear, module.kernel_size[0])
            case nn.LayerNorm():
                return StackedNorm(tensor("weight"), tensor("bias"), module.eps, self.size)
            case LayerScale():
                return StackedScale(tensor("gamma"), self.size)
        twin = copy.copy(module)
        twin.__dict__.pop("_compiled_call_impl", None)  # of a module that was compiled, with its own parameters
        twin._modules = {
            name: None if child is None else self._twin_of(child, f"{prefix}{name}.", tensors)
            for name, child in module._modules.items()
        }
        twin._parameters = dict(module._parameters)
        return twin

    def _tensor(
        self, tensors: dict[str, StackedTensor], name: str, value: Tensor, dtype: torch.dtype | None = None
    ) -> StackedTensor:
        flat = value.detach().flatten(1) if value.dim() == 4 else value  # a convolution's (D, 3, p, p) as a product's
        tensors[name] = StackedTensor(flat, self._rows.get(name), self.size, dtype or value.dtype)
        return tensors[name]
