"""Books of an edit: what each iteration let move and sent, saved so that the edit can be resumed."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from annotated_types import Interval, MaxLen, MinLen, Predicate
from torch import Tensor

from fedtalos.app.run.paths import RunPaths
from fedtalos.checkpoint import load_checkpoint, save_checkpoint
from fedtalos.errors import InputError
from fedtalos.facts import MOST_ROWS, Count, Share, open_schema, schema
from fedtalos.training.editing.describe import KINDS, OUTSIDE, density_table
from fedtalos.training.editing.eligible import Eligible, mask_of
from fedtalos.training.editing.ranking import Groups
from fedtalos.training.editing.talos import Iteration
from fedtalos.training.entries import Entries

Rows = list[dict[str, Any]]
Number = Annotated[int, Interval(ge=0, le=10**6)]
"""Number of an iteration."""


@schema
@dataclass(frozen=True)
class IterationRow:
    """Row of iterations.csv: what an iteration let move and sent."""

    iteration: Number
    active: Count
    density: Share
    bytes_down: Count
    bytes_up: Count
    seconds: Annotated[float, Interval(ge=0, le=1e12)]


@schema
@dataclass(frozen=True)
class ReportRow:
    """Entries of one kind of tensor in one block after an iteration: a row of report.csv."""

    iteration: Number
    block: Annotated[int, Interval(ge=OUTSIDE, le=10**4)]
    kind: Annotated[str, Predicate(KINDS.__contains__)]
    active: Count
    entries: Annotated[int, Interval(ge=1, le=2**62)]


@open_schema
@dataclass(frozen=True)
class Edited:
    """Facts of an edit's checkpoint."""

    rows: Annotated[tuple[IterationRow, ...], MinLen(1), MaxLen(MOST_ROWS)]
    report: Annotated[tuple[ReportRow, ...], MaxLen(MOST_ROWS)]


class Books:
    """The entries ``kept`` (E,) so far, and the ``rows`` and ``report`` of iterations.csv and report.csv.

    ``senders`` clients send scores, and ``sent`` are the bytes down and up before the first iteration. Bytes of an
    iteration: of each candidate a number from every sender, and a bit to it; a candidate is an entry, or group, that is
    still in. The weights that all start from are not counted. Where senders are on other machines, ``bytes_since``
    gives the bytes down and up since it was last asked, which are counted instead.

    Raises InputError where the checkpoint to go on from is not of this edit.
    """

    def __init__(
        self,
        paths: RunPaths,
        eligible: Entries,
        groups: Groups | None,
        senders: int,
        sent: tuple[int, int],
        bytes_since: Callable[[], tuple[int, int]] | None = None,
    ) -> None:
        self._folder, self._eligible, self._groups, self._senders = paths.checkpoints, eligible, groups, senders
        self.kept: Tensor = torch.ones(len(eligible), dtype=torch.bool, device=eligible.device)
        self.rows: Rows = []
        self.report: Rows = []
        self._down, self._up = sent
        self._bytes_since = bytes_since
        self._resume()
        self._start = time.perf_counter() - (self.rows[-1]["seconds"] if self.rows else 0.0)

    @property
    def done(self) -> int:
        """Iterations done."""
        return len(self.rows)

    def record(self, iteration: Iteration, eligible_in: Eligible) -> None:
        """Write down an iteration, and save."""
        down, up = self._counted() if self._bytes_since is None else self._bytes_since()
        self._down, self._up = self._down + down, self._up + up
        self.kept = iteration.kept
        self.rows.append(
            {
                "iteration": iteration.number,
                "active": int(self.kept.sum()),
                "density": iteration.density,
                "bytes_down": self._down,
                "bytes_up": self._up,
                "seconds": round(time.perf_counter() - self._start, 2),
            }
        )
        table = density_table(mask_of(self._eligible, self.kept), eligible_in)
        self.report += [{"iteration": iteration.number, **asdict(row)} for row in table]
        save_checkpoint(
            self._folder, "last", self.done, {"state": self.kept}, {"rows": self.rows, "report": self.report}
        )

    def _counted(self) -> tuple[int, int]:
        """Bytes down and up of an iteration of a simulation, from the entries that are still in."""
        groups = self._groups
        candidates = int(self.kept.sum()) if groups is None else len(groups.of[self.kept].unique())
        return self._senders * -(-candidates // 8), self._senders * candidates * torch.float32.itemsize

    def _resume(self) -> None:
        path = self._folder / "last.json"
        if not path.exists():
            return
        checkpoint = load_checkpoint(path)
        state, facts = checkpoint.tensors.get("state"), checkpoint.stated(Edited, "start another run")
        if state is None or (state.shape, state.dtype) != (self.kept.shape, torch.bool):
            raise InputError(f"checkpoint {path}: is of another version, or not of this edit; start another run")
        self.kept = state.to(self.kept.device)
        if [row.iteration for row in facts.rows] != [*range(1, len(facts.rows) + 1)] or not (
            0 < int(state.sum()) == facts.rows[-1].active
        ):
            raise InputError(f"checkpoint {path}: not what its iterations say; start another run")
        self.rows, self.report = [asdict(row) for row in facts.rows], [asdict(row) for row in facts.report]
        self._down, self._up = self.rows[-1]["bytes_down"], self.rows[-1]["bytes_up"]
