"""Closed-form classification heads from sums that clients can send (Fed3R: Fani et al., 2024, arXiv 2406.01116).

Shapes: N images, D features, C classes; features carry a constant 1 as last column, so D+1.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RidgeSums:
    """X^T X (D+1, D+1), X^T Y (D+1, C) in float64 and the number of images; they add."""

    xx: Tensor
    xy: Tensor
    examples: int

    def __add__(self, other: "RidgeSums") -> "RidgeSums":
        return RidgeSums(self.xx + other.xx, self.xy + other.xy, self.examples + other.examples)

    @property
    def wire_bytes(self) -> int:
        """Bytes a client sends: the upper triangle of X^T X, and X^T Y."""
        side = len(self.xx)
        return side * (side + 1) // 2 * self.xx.element_size() + self.xy.nbytes


def ridge_sums(features: Tensor, labels: Tensor, num_classes: int) -> RidgeSums:
    """Sums over images of ``features`` (N, D) against one-hot ``labels`` (N,)."""
    x = F.pad(features.cpu().double(), (0, 1), value=1.0)
    y = F.one_hot(labels.cpu(), num_classes).double()
    return RidgeSums(x.T @ x, x.T @ y, len(x))


def ridge_head(sums: RidgeSums, penalty: float) -> tuple[Tensor, Tensor]:
    """weight (C, D) and bias (C,) that minimise |XW - Y|^2 + penalty N |W|^2 (the bias is not penalised)."""
    ridge = torch.full((len(sums.xx),), penalty * sums.examples, dtype=torch.float64)
    ridge[-1] = 0
    solution = torch.linalg.solve(sums.xx + ridge.diag(), sums.xy)  # (D+1, C)
    return solution[:-1].T.float().contiguous(), solution[-1].float()


def fit_ridge_head(
    sums: RidgeSums, features: Tensor, labels: Tensor, penalties: Iterable[float] = (1e-3, 1e-2, 1e-1, 1.0)
) -> tuple[Tensor, Tensor]:
    """The ridge head whose penalty and temperature give held-out ``features`` (N, D), ``labels`` (N,) least loss.

    A ridge head's outputs live near [0, 1]; the temperature, folded into weight and bias, makes them logits.
    """
    features, labels = features.cpu().float(), labels.cpu()
    best: tuple[float, Tensor, Tensor] | None = None
    for penalty in penalties:
        weight, bias = ridge_head(sums, penalty)
        outputs = F.linear(features, weight, bias)
        for scale in torch.logspace(0, 2, 41).tolist():  # 1 to 100
            loss = F.cross_entropy(outputs * scale, labels).item()
            if best is None or loss < best[0]:
                best = (loss, weight * scale, bias * scale)
    assert best is not None
    return best[1], best[2]
