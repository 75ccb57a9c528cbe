"""Tables of task vectors for a terminal: norms by block and kind, and how vectors lie to each other."""

import math
from collections.abc import Sequence

from rich.table import Table

from fedtalos.training.editing.combine import overlap
from fedtalos.training.editing.describe_vectors import VECTOR_KINDS, NormRow, cosines
from fedtalos.training.editing.task_vectors import TaskVector


def norm_report(rows: Sequence[NormRow]) -> Table:
    """2-norms by block and kind, and below them those over all blocks, and the share of entries that move."""
    kinds = [kind for kind in VECTOR_KINDS if any(row.kind == kind for row in rows)]
    table = Table(title="2-norms", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for heading in ("block", *kinds):
        table.add_column(heading, justify="right", no_wrap=True)
    for block, place in sorted({(row.block, row.place) for row in rows}):
        by_kind = {row.kind: f"{row.norm:.2g}" for row in rows if row.block == block}
        table.add_row(place, *(by_kind.get(kind, "") for kind in kinds))
    table.add_section()
    overall = [[row for row in rows if row.kind == kind] for kind in kinds]
    table.add_row("all", *(f"{math.sqrt(sum(row.norm**2 for row in same)):.2g}" for same in overall))
    shares = [100 * sum(row.active for row in same) / sum(row.entries for row in same) for same in overall]
    table.add_row("moves %", *(f"{share:.3g}" for share in shares))
    return table


def pairs_report(vectors: Sequence[TaskVector]) -> Table:
    """Cosine of each two vectors, with the intersection over union of their supports in brackets."""
    table = Table(box=None)
    numbers = [str(number) for number in range(1, len(vectors) + 1)]
    for heading in ("cosine (overlap of supports)", *numbers):
        table.add_column(heading, justify="right")
    for number, row, first in zip(numbers, cosines(vectors), vectors, strict=True):
        shares = [overlap(first.mask, other.mask) for other in vectors]
        table.add_row(number, *(f"{value:.2f} ({share:.2f})" for value, share in zip(row, shares, strict=True)))
    return table
