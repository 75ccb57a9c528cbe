"""Classification heads: fitted in closed form from sums that clients can send, put on a model, kept in a file.

Ridge: Fed3R (Fani et al., 2024, arXiv 2406.01116). Nearest class mean: FedNCM (Legate et al., 2023, arXiv 2306.03937).
Shapes: N images, D features, C classes; in the sums, features have a constant 1 as last column, hence D+1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from safetensors.torch import save as save_safetensors
from torch import Tensor

from fedtalos.errors import InputError, check_word, shown
from fedtalos.facts import read_file, refusal
from fedtalos.files import UNSEALED, is_sealed, sealed, write_atomic
from fedtalos.models.backbone import Backbone
from fedtalos.notes import note
from fedtalos.tensor_file import read_tensors

ClosedForm = Literal["ridge", "ncm"]
MOST_BYTES = 2**28
"""Bytes of a head file: 65 536 classes of a large ViT."""
Head = tuple[Tensor, Tensor]
"""Weight (C, D) and bias (C,), float32."""

HEADS = ("weights", "random", "ridge", "ncm", "linear")
"""Sources of a head, beside a file."""

PENALTIES = tuple(10 ** (power / 2) for power in range(-12, 5))
"""Ridge penalties to choose from, 1e-6 to 1e2, in units of the features' mean variance."""
LEVEL = 1e-3
"""Nats of loss between two neighbouring penalties that make no difference."""
SCALES = torch.logspace(-4, 4, 161).tolist()
"""Temperatures to choose from, 12 % apart, for outputs of deviation 1."""


@dataclass(frozen=True)
class HeadSums:
    """Sums over images that fix a closed-form head; the sums of several clients add up.

    >>> sums = head_sums("ridge", features, labels, 10) + head_sums("ridge", other_features, other_labels, 10)
    """

    xy: Tensor
    """X^T Y (D+1, C), float64; its last row counts the images of each class."""
    xx: Tensor | None
    """X^T X (D+1, D+1), float64; None: not needed for nearest means."""

    def __add__(self, other: "HeadSums") -> "HeadSums":
        return HeadSums(self.xy + other.xy, None if self.xx is None or other.xx is None else self.xx + other.xx)

    @property
    def wire_bytes(self) -> int:
        """Bytes that a client sends: X^T Y, and the upper triangle of X^T X."""
        side = len(self.xy)
        return self.xy.nbytes + (0 if self.xx is None else side * (side + 1) // 2 * self.xx.element_size())


def head_sums(kind: ClosedForm, features: Tensor, labels: Tensor, num_classes: int) -> HeadSums:
    """Sum ``features`` (N, D) against one-hot ``labels`` (N,).

    >>> head_sums("ncm", torch.rand(6, 4), torch.arange(6) % 3, num_classes=3).xy.shape
    torch.Size([5, 3])
    """
    check_word("kind", kind, ClosedForm)
    x = F.pad(features.cpu().double(), (0, 1), value=1.0)
    y = F.one_hot(labels.cpu(), num_classes).double()
    return HeadSums(x.T @ y, x.T @ x if kind == "ridge" else None)


def ridge_head(sums: HeadSums, penalty: float) -> Head:
    """Solve ridge regression: the W that minimises |XW - Y|^2 + penalty N v |W|^2, its bias not penalised.

    v is the features' variance over the images, averaged over their D columns: the trace of the centred X^T X, over
    N D. So one penalty means the same for features of any size and offset, and comes from the sums alone. The outputs
    of an image add up to 1, and are 0 for a class without images: such a class is never chosen.

    >>> weight, bias = ridge_head(head_sums("ridge", features, labels, num_classes=10), penalty=0.1)
    """
    assert sums.xx is not None
    ridge = torch.full((len(sums.xx),), penalty * _scatter(sums.xx) / (len(sums.xx) - 1), dtype=torch.float64)
    ridge[-1] = 0
    solution = torch.linalg.solve(sums.xx + ridge.diag(), sums.xy)  # (D+1, C)
    return solution[:-1].T.float().contiguous(), solution[-1].float()


def _scatter(xx: Tensor) -> float:
    """Trace of the centred X^T X: the squared distances of all images' features from their mean, summed.

    Where the features are all alike it is rounding alone, and the trace itself, or 1, stands in: some penalty there
    must be.
    """
    energy = float(xx.diagonal()[:-1].sum())
    centred = energy - float(xx[:-1, -1].square().sum() / xx[-1, -1])
    return centred if centred > 1e-9 * energy else energy or 1.0


def nearest_mean_head(sums: HeadSums) -> Head:
    """Classify by the nearest class mean (Euclid), written as a linear head.

    |x - mu_c|^2 is least where mu_c x - |mu_c|^2 / 2 is largest. The mean over classes is taken off both terms: that
    changes no difference between outputs and keeps them small, and so the outputs of an image have mean 0. A class
    without images gets weight 0 and a bias below 0: it is never chosen.

    >>> weight, bias = nearest_mean_head(head_sums("ncm", features, labels, num_classes=10))
    """
    counts = sums.xy[-1]
    there = counts > 0
    means = (sums.xy[:-1, there] / counts[there]).T
    halves = means.square().sum(1) / 2
    weight, bias = torch.zeros_like(sums.xy[:-1].T), (-halves.mean()).expand(len(counts)).clone()
    weight[there] = means - means.mean(0)
    bias[there] = halves.mean() - halves
    return weight.float().contiguous(), bias.float()


def best_head(
    kind: ClosedForm, sums: HeadSums, features: Tensor, labels: Tensor, penalties: Sequence[float] = PENALTIES
) -> Head:
    """Fit a head and choose its temperature, and a ridge head's penalty, by the loss on held-out images.

    The held-out images are ``features`` (N, D) and ``labels`` (N,). Those of a class that the sums have no image of do
    not count, unless all are such: no penalty or temperature lets the head know them. Neither head's outputs are logits
    (a ridge head's lie near [0, 1]); the temperature, folded into weight and bias, makes them so. The penalty chosen is
    noted, and where it is the first or the last of those tried.

    >>> weight, bias = best_head("ridge", sums, val_features, val_labels)
    """
    features, labels = features.cpu().float(), labels.cpu()
    if bool((known := sums.xy[-1][labels] > 0).any()):
        features, labels = features[known], labels[known]
    try:
        heads = [ridge_head(sums, penalty) for penalty in penalties] if kind == "ridge" else [nearest_mean_head(sums)]
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # it is documented
        raise _no_head(kind) from error
    if not all(bool(tensor.isfinite().all()) for head in heads for tensor in head):
        raise _no_head(kind)
    fitted = []
    for weight, bias in heads:
        outputs = F.linear(features, weight, bias)
        unit = outputs.std(correction=0).item() or 1.0  # nearest means' outputs are as large as features squared
        loss, scale = best_scale(outputs / unit, labels)
        fitted.append((loss, weight * (scale / unit), bias * (scale / unit)))
    losses = [loss for loss, *_ in fitted]
    chosen = losses.index(min(losses))
    if kind == "ridge":
        _note_penalty(penalties, losses, chosen, len(labels))
    _, weight, bias = fitted[chosen]
    return weight, bias


def _no_head(kind: ClosedForm) -> InputError:
    return InputError(f"head {kind}: the sums over the images fix none; give more images, or make the run anew")


def _note_penalty(penalties: Sequence[float], losses: Sequence[float], chosen: int, held_out: int) -> None:
    """Note which ridge penalty was chosen, and where it is the first or the last, how sure that is."""
    sentence = f"{penalties[chosen]:.2g} times the features' variance, by the loss on {held_out} held-out images"
    last = len(penalties) - 1
    if last and chosen in (0, last):
        most = "smallest" if penalties[chosen] == min(penalties) else "largest"
        flat = losses[1 if chosen == 0 else last - 1] - losses[chosen] < LEVEL
        sentence += (
            f"; that is the {most} tried, {'where the loss is level' if flat else 'a better one may lie beyond'}"
        )
    note("ridge penalty", sentence)


def best_scale(outputs: Tensor, labels: Tensor) -> tuple[float, float]:
    """Find the factor of SCALES that gives ``outputs`` (N, C) the least mean cross-entropy: (loss, factor).

    Bisection finds it, for the loss is convex in the factor.

    >>> loss, scale = best_scale(outputs, labels)
    """

    def loss(position: int) -> float:
        return F.cross_entropy(outputs * SCALES[position], labels).item()

    first, last = 0, len(SCALES) - 1
    while first < last:
        middle = (first + last) // 2
        if loss(middle) <= loss(middle + 1):
            last = middle
        else:
            first = middle + 1
    return loss(first), SCALES[first]


def closed_form(head: str) -> ClosedForm | None:
    """Give the kind of closed-form head that ``head`` names; None where it names another.

    >>> closed_form("ridge"), closed_form("linear")
    ('ridge', None)
    """
    return next((kind for kind in get_args(ClosedForm) if kind == head), None)


def head_of(model: Backbone) -> Head:
    """Copy the model's head, to put it back with ``set_head``.

    >>> weight, bias = head_of(model)
    """
    return model.head.weight.detach().clone(), model.head.bias.detach().clone()


def set_head(model: Backbone, weight: Tensor, bias: Tensor, source: str = "file") -> None:
    """Put weight (C, D) and bias (C,) into the model's head, and note their source.

    >>> set_head(model, *best_head("ridge", sums, val_features, val_labels), source="ridge")
    """
    with torch.no_grad():
        model.head.weight.copy_(weight)
        model.head.bias.copy_(bias)
    model.head_source = source


def save_head(path: Path, model: Backbone) -> None:
    """Write the model's head to a sealed file.

    >>> save_head(Path("masks/my_mask.head.safetensors"), model)
    """
    tensors = {f"head.{name}": tensor.detach().cpu() for name, tensor in model.head.named_parameters()}
    write_atomic(path, sealed(save_safetensors(tensors, {"seal": UNSEALED})))


def read_head(path: Path, model: Backbone) -> Head:
    """Read weight (C, D) and bias (C,) from a head file.

    Raises InputError where the file is missing or changed, or does not fit the model.

    >>> set_head(model, *read_head(Path("masks/my_mask.head.safetensors"), model))
    """
    content = read_file(path, f"head {path}", most=MOST_BYTES, advice="give an existing head file")
    head, advice = f"head {path}: not a head file", "`fedtalos editing` writes one beside its mask"
    tensors = read_tensors(content, head, advice)
    if not is_sealed(content):
        raise InputError(f"head {path}: not what was written (checksum), or of another version; make it anew")
    if tensors.keys() != {"head.weight", "head.bias"}:
        raise refusal(head, f"expected head.weight and head.bias, got {shown(sorted(tensors)[:5])}", advice)
    weight, bias = tensors["head.weight"], tensors["head.bias"]
    if weight.shape != model.head.weight.shape or bias.shape != model.head.bias.shape:
        fault = f"weight {tuple(weight.shape)}, bias {tuple(bias.shape)}"
        needed = f"this model and data set need {tuple(model.head.weight.shape)} (classes, width)"
        raise refusal(f"head {path}: of another shape", fault, needed)
    if not all(tensor.is_floating_point() and tensor.float().isfinite().all() for tensor in (weight, bias)):
        raise InputError(f"head {path}: holds other than finite numbers; give a head of a run that did not diverge")
    return weight, bias
