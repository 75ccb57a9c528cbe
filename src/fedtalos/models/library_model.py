"""Library models: any model of timm or torchvision by name, as features under a linear head of our own.

Shapes: B images, H W pixels a side, D width of the features, C classes.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Interval, MaxLen, Predicate
from torch import Tensor, nn

from fedtalos.errors import InputError, install
from fedtalos.facts import MOST_CLASSES, schema
from fedtalos.models.backbone import Backbone

LIBRARIES = {"timm:": "timm", "torch:": "torchvision"}
"""First part of a model's name -> the library that makes it, and our extra that installs it."""


def _plain(name: str) -> bool:
    """Tell whether a name is a library's own model, not a place (hf-hub:OWNER/REPO) to take one from."""
    return re.fullmatch(r"(timm|torch):[\w.-]+", name) is not None


@schema
@dataclass(frozen=True)
class LibraryArchitecture:
    """Name and sizes that fix every parameter's shape.

    >>> LibraryArchitecture("timm:convnext_atto.d2_in1k", image_size=224, num_classes=100).heads
    0
    """

    name: Annotated[str, MaxLen(200), Predicate(_plain)]
    """timm:NAME or torch:NAME."""
    image_size: Annotated[int, Interval(ge=1, le=2**12)]
    """Pixels a side."""
    num_classes: Annotated[int, Interval(ge=0, le=MOST_CLASSES)]
    """C; 0 for weights without a head."""
    heads: ClassVar[int] = 0
    """Attention heads are not known here."""

    def as_dict(self) -> dict[str, str | int]:
        """Give plain values for a file's header."""
        return asdict(self)

    def __str__(self) -> str:
        return self.name


class LibraryModel(Backbone):
    """A model of another library, its classifier replaced by ours; its parameters are under ``net``.

    It stays in eval mode: its dropout and stochastic depth would draw from torch's global generator.

    >>> architecture = LibraryArchitecture("timm:convnext_atto.d2_in1k", image_size=224, num_classes=100)
    >>> model = LibraryModel(architecture, torch_generator(0, "weights"))
    """

    architecture: LibraryArchitecture

    def __init__(self, architecture: LibraryArchitecture, generator: torch.Generator) -> None:
        """Draw the head from ``generator`` (truncated normal, deviation 0.02); load the rest before use.

        Raises InputError where the library or the model is not there, or does not fit our needs.
        """
        super().__init__()
        self.architecture = architecture
        self.net = bare_model(architecture.name)
        width, self.scorable = _look_through(self.net, architecture)
        """Paths of the layers that masks may choose from."""
        self.head = nn.Linear(width, architecture.num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02, generator=generator)
        nn.init.zeros_(self.head.bias)
        self.train()

    def train(self, mode: bool = True) -> "LibraryModel":
        """Set the mode as for any module, except for ``net``."""
        super().train(mode)
        self.net.eval()
        return self

    @property
    def stages(self) -> list[Callable[[Tensor], Tensor]]:
        """One stage, since nobody knows what is inside."""
        return [self.net]

    def frozen_stages(self, moving: Iterable[str]) -> int:
        """Count the frozen stages: 1 where only the head moves, else 0."""
        return int(not any(name.startswith("net.") for name in moving))


def library(prefix: str, module: str) -> Any:
    """Import a module of the library that makes models of that prefix.

    Raises InputError where the library is not installed.

    >>> timm = library("timm:", "timm")
    """
    extra = LIBRARIES[prefix]
    try:
        return import_module(module)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        raise InputError(f"weights {prefix}NAME: {extra} cannot be imported ({error}); {install(extra)}") from error


def bare_model(name: str) -> nn.Module:
    """Make the model of that name without its classifier, (B, 3, H, W) -> (B, D), with weights as its library draws.

    Raises InputError where there is no such model, or where it keeps running statistics.

    >>> net = bare_model("timm:convnext_atto.d2_in1k")
    """
    prefix, plain = name.split(":", 1)
    try:
        if prefix == "timm":
            net: nn.Module = library("timm:", "timm").create_model(plain, pretrained=False, num_classes=0)
        else:
            net = library("torch:", "torchvision.models").get_model(plain, weights=None)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"weights {name}: {LIBRARIES[f'{prefix}:']} makes no such model ({error})") from error
    _refuse_state(name, net)
    if prefix == "torch":
        classifier = [path for path, module in net.named_modules() if isinstance(module, nn.Linear)][-1]
        net.set_submodule(classifier, nn.Identity())
    return net


def _refuse_state(name: str, net: nn.Module) -> None:
    state = [path for path, buffer in net.named_buffers() if buffer.is_floating_point() and path in net.state_dict()]
    if state:
        raise InputError(
            f"weights {name}: it keeps {state[0]} beside its parameters (batch norm has running statistics), which "
            "clients do not share; give a model with layer norm, such as timm:convnext_atto.d2_in1k"
        )


def _look_through(net: nn.Module, architecture: LibraryArchitecture) -> tuple[int, frozenset[str]]:
    """Find the width D of the features, and the paths of the layers that masks may choose from.

    Masks choose from Linear, Conv2d and LayerNorm layers that run once in a forward pass and compute what such a layer
    computes; training/editing/fisher.py scores no others. The first, which sees the pixels, and a last norm are left
    out.
    """
    name = architecture.name
    for module in net.modules():
        if hasattr(module, "inplace"):
            setattr(module, "inplace", False)  # noqa: B010  Fisher scores need a layer's output as it was
    ran: list[str] = []
    handles = [module.register_forward_hook(_noter(ran, path)) for path, module in net.named_modules()]
    size = architecture.image_size
    try:
        features = net.eval()(torch.arange(3.0 * size**2).sin().view(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise InputError(f"weights {name}: takes no images of {size} px ({why}); leave out image_size") from error
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(features, Tensor) or features.dim() != 2:
        raise InputError(f"weights {name}: gives no vector of features per image; give an image classifier")
    unused = _unused(net, features)
    if unused:
        raise InputError(f"weights {name}: its features do not depend on {unused}; give another model")
    layers = [path for path in ran if ran.count(path) == 1][1:]
    if layers and isinstance(net.get_submodule(layers[-1]), nn.LayerNorm):
        layers.pop()
    return features.shape[1], frozenset(f"net.{path}" for path in layers)


def _noter(ran: list[str], path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """Make a forward hook that notes the layer's path, where the layer computes what its kind does."""

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        match layer:
            case nn.Linear():
                plain = F.linear(inputs[0], layer.weight, layer.bias)
            case nn.LayerNorm(normalized_shape=(width,)) if inputs[0].shape[-1] == width:
                plain = F.layer_norm(inputs[0], layer.normalized_shape, layer.weight, layer.bias, layer.eps)
            case nn.Conv2d(groups=1, padding_mode="zeros", padding=tuple()):
                plain = layer._conv_forward(inputs[0], layer.weight, layer.bias)
            case _:
                return
        if plain.shape == output.shape and torch.allclose(plain, output):
            ran.append(path)

    return note


def _unused(net: nn.Module, features: Tensor) -> str | None:
    """Find a parameter without a gradient: clients could not train it."""
    parameters = dict(net.named_parameters())
    gradients = torch.autograd.grad(features.sum(), list(parameters.values()), allow_unused=True)
    return next((name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None), None)
