"""Merging by singular values: TSV-M and Iso-C, for dense vectors, or on rows that move and projected back.

Both are rules for whole matrices: what they give lies outside a sparse support, too. There it is cut away, and how much
of the energy (squared 2-norm) that was is noted. Entries that are of no matrix (biases, norms, embeddings) are
averaged, as in the papers' code.

Shapes: V vectors; M moving rows and N moving columns of a weight; R singular values.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedtalos.notes import note
from fedtalos.training.editing.merging_by_value import said
from fedtalos.training.editing.task_vectors import TaskVector, check_together, joined, union

MatrixRule = Callable[[Tensor], Tensor]
"""The vectors' matrices (V, M, N), float64 -> one (M, N)."""


def tsv_merge(vectors: Sequence[TaskVector]) -> TaskVector:
    """Merge task singular vectors (TSV-Merge; Gargiulo et al., 2025, arXiv 2412.00081).

    Of each vector's matrix the R / V largest singular values stay (rounded down, but one at least); their left and
    right singular vectors, of all vectors together, are replaced by the nearest orthonormal ones (Procrustes), so that
    tasks do not interfere. On dense vectors this is what the authors' code gives.

    >>> merged = tsv_merge([tau_of_cats, tau_of_dogs])
    """
    return _by_matrix(vectors, _tsv, said("tsv", vectors))


def iso_c(vectors: Sequence[TaskVector]) -> TaskVector:
    """Sum the matrices and make all their singular values the mean one (Iso-C; Marczak et al., 2025, arXiv 2502.04959).

    With the sum U S V^T it is mean(S) U V^T, so that no direction of many tasks outweighs that of few. On dense vectors
    this is what the authors' code gives.

    >>> merged = iso_c([tau_of_cats, tau_of_dogs])
    """
    return _by_matrix(vectors, _isotropic, said("iso_c", vectors))


def _tsv(matrices: Tensor) -> Tensor:
    kept = max(1, min(matrices.shape[1:]) // len(matrices))
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    lefts = torch.cat(list(left[:, :, :kept]), 1)  # (M, V kept)
    rights = torch.cat(list(right[:, :kept]), 0)  # (V kept, N)
    merged: Tensor = nearest_orthonormal(lefts) @ values[:, :kept].flatten().diag() @ nearest_orthonormal(rights)
    return merged


def nearest_orthonormal(matrix: Tensor) -> Tensor:
    """The matrix of orthonormal columns (or rows, where these are fewer) that is nearest in Frobenius norm.

    >>> nearest_orthonormal(2 * torch.eye(2))
    tensor([[1., 0.],
            [0., 1.]])
    """
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = left @ right
    return nearest


def _isotropic(matrices: Tensor) -> Tensor:
    left, values, right = torch.linalg.svd(matrices.sum(0), full_matrices=False)
    merged: Tensor = values.mean() * (left @ right)
    return merged


def _by_matrix(vectors: Sequence[TaskVector], rule: MatrixRule, command: str) -> TaskVector:
    """Let a rule make one of the matrices of moving rows and columns, and cut it to the support of the vectors."""
    check_together(vectors)
    mask, found = union(vectors), []
    whole, outside = 0.0, 0.0
    dense = [vector.tensors() for vector in vectors]
    for name, where in mask.items():
        empty = torch.zeros(where.shape)
        values = torch.stack([tensors.get(name, empty) for tensors in dense]).double()
        if where.dim() != 2:
            found.append(values.mean(0)[where].float())
            continue
        rows, columns = where.any(1).nonzero(), where.any(0).nonzero().T
        merged = rule(values[:, rows, columns])
        kept = where[rows, columns]
        whole += float(merged.square().sum())
        outside += float(merged[~kept].square().sum())
        found.append(merged[kept].float())
    if outside:
        share = f"{100 * outside / whole:.3g} %"
        note(f"{command}, energy", f"{share} of what the rule gives lies outside the vectors' support and is cut away")
    return joined(vectors, mask, torch.cat(found), command)
