"""Table of a task vector for a terminal: norms by block and kind."""

import math
from collections.abc import Sequence

from rich.table import Table

from fedtalos.training.editing.describe_vectors import VECTOR_KINDS, NormRow


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
