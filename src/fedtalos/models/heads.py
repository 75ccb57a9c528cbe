"""Closed-form classification heads from sums that clients can send: ridge regression and nearest class mean.

Ridge: Fed3R (Fani et al., 2024, arXiv 2406.01116). Nearest class mean: FedNCM (Legate et al., 2023, arXiv 2306.03937).
Shapes: N images, D features, C classes; features carry a constant 1 as last column, so D+1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ClosedForm = Literal["ridge", "ncm"]
Head = tuple[Tensor, Tensor]
"""weight (C, D) and bias (C,), float32."""

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
SCALES = torch.logspace(-4, 4, 161).tolist()  # 12 % apart


@dataclass(frozen=True)
class HeadSums:
    """X^T Y (D+1, C), whose last row counts the classes, and of ridge X^T X (D+1, D+1), in float64; they add."""

    xy: Tensor
    xx: Tensor | None

    def __add__(self, other: "HeadSums") -> "HeadSums":
        return HeadSums(self.xy + other.xy, None if self.xx is None or other.xx is None else self.xx + other.xx)

    @property
    def wire_bytes(self) -> int:
        """Bytes a client sends: X^T Y, and of X^T X the upper triangle."""
        side = len(self.xy)
        return self.xy.nbytes + (0 if self.xx is None else side * (side + 1) // 2 * self.xx.element_size())


def head_sums(kind: ClosedForm, features: Tensor, labels: Tensor, num_classes: int) -> HeadSums:
    """Sums over images of ``features`` (N, D) against one-hot ``labels`` (N,)."""
    x = F.pad(features.cpu().double(), (0, 1), value=1.0)
    y = F.one_hot(labels.cpu(), num_classes).double()
    return HeadSums(x.T @ y, x.T @ x if kind == "ridge" else None)


def ridge_head(sums: HeadSums, penalty: float) -> Head:
    """The head that minimises |XW - Y|^2 + penalty N |W|^2 (the bias is not penalised).

    Its outputs add up to 1 for every image, and are 0 for a class without images: such a class is never chosen.
    """
    assert sums.xx is not None
    ridge = torch.full((len(sums.xx),), penalty * sums.xy[-1].sum().item(), dtype=torch.float64)
    ridge[-1] = 0
    solution = torch.linalg.solve(sums.xx + ridge.diag(), sums.xy)  # (D+1, C)
    return solution[:-1].T.float().contiguous(), solution[-1].float()


def nearest_mean_head(sums: HeadSums) -> Head:
    """The head whose largest output is at the class whose mean is nearest (Euclid).

    |x - mu_c|^2 is least where mu_c x - |mu_c|^2 / 2 is largest; the mean over classes is taken off both terms, which
    changes no difference between outputs and keeps them small. So the outputs' mean over classes is 0 for every image;
    a class without images gets weight 0 and a bias below 0: it is never chosen.
    """
    counts = sums.xy[-1]
    there = counts > 0
    means = (sums.xy[:-1, there] / counts[there]).T
    halves = means.square().sum(1) / 2
    weight, bias = torch.zeros_like(sums.xy[:-1].T), (-halves.mean()).expand(len(counts)).clone()
    weight[there] = means - means.mean(0)
    bias[there] = halves.mean() - halves
    return weight.float().contiguous(), bias.float()


def fit_head(
    kind: ClosedForm, sums: HeadSums, features: Tensor, labels: Tensor, penalties: Sequence[float] = PENALTIES
) -> Head:
    """The head whose temperature (and of ridge penalty) gives held-out ``features`` (N, D), ``labels`` (N,) least loss.

    Neither head's outputs are logits (a ridge head's live near [0, 1]); the temperature, folded into weight and bias,
    makes them so.
    """
    features, labels = features.cpu().float(), labels.cpu()
    heads = [ridge_head(sums, penalty) for penalty in penalties] if kind == "ridge" else [nearest_mean_head(sums)]
    fitted = []
    for weight, bias in heads:
        loss, scale = best_scale(F.linear(features, weight, bias), labels)
        fitted.append((loss, weight * scale, bias * scale))
    _, weight, bias = min(fitted, key=lambda head: head[0])
    return weight, bias


def best_scale(outputs: Tensor, labels: Tensor) -> tuple[float, float]:
    """The least mean cross-entropy of ``outputs`` (N, C) times one of SCALES, and that scale.

    Found by bisection, for the loss is convex in the scale.
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
