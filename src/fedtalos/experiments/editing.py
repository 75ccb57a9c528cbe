"""Make a TaLoS mask: score weights on held-out images, or on clients' own, and keep the least sensitive."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from fedtalos import __version__
from fedtalos.app.config.schema import LOOKS_AT_IMAGES, EditingConfig
from fedtalos.app.heads import closed_form, fit_from_sums
from fedtalos.app.load import prepare
from fedtalos.app.run.display import Display, density_report
from fedtalos.app.run.folders import RunPaths, open_run
from fedtalos.app.run.recorder import write_csv, write_yaml
from fedtalos.app.run.split_file import in_words, split, write_split
from fedtalos.app.scoring import Holder, Score, chunk_that_fits, fisher_name, image_holders, scorer
from fedtalos.app.setup import Setup
from fedtalos.checkpoint import load_checkpoint, save_checkpoint
from fedtalos.errors import InputError
from fedtalos.models.head_file import HEADS, save_head
from fedtalos.training.editing.fisher import Scored
from fedtalos.training.editing.mask_file import Mask, MaskFacts, density_table, save_mask, votes_needed
from fedtalos.training.editing.talos import Groups, Iteration, calibrate, eligible_entries, grouped
from fedtalos.training.federated.clients import Clients
from fedtalos.training.masked_parameters import Entries

Rows = list[dict[str, Any]]


def run(config: EditingConfig, paths: RunPaths, console: Console) -> dict[str, Any]:
    """Write masks/RUN.safetensors, beside it a head that had to be fitted, and a report; returns the summary."""
    config, setup = prepare(config)
    config, eligible, clients = check(config, setup)
    open_run(config, paths, setup.origin())
    if clients is not None:
        write_split(paths, setup, clients)
    sent = fit_head(setup, paths, clients, console)
    groups = grouped(eligible, config.editing.granularity, setup.model.architecture.heads)
    edit = Edit(config, paths, setup, eligible, groups, image_holders(setup, config, clients), *sent)
    kept, rows, report = edit.one_mask(console) if config.editing.merge == "scores" else edit.joined_mask(console)
    mask, facts = edit.mask(kept), edit.facts(int(kept.sum()), edit.holders)
    save_mask(paths.mask, mask, facts)
    console.print(density_report(density_table(mask, facts.eligible_in)))
    write_csv(paths.results / ("iterations.csv" if config.editing.merge == "scores" else "clients.csv"), rows)
    write_csv(paths.results / "report.csv", report)
    summary = {
        "command": config.command,
        "mask": str(paths.mask),
        **({"head": str(paths.head)} if closed_form(setup.head) else {}),
        "eligible": facts.eligible,
        "active": facts.active,
        "density": facts.density,
        **({"megabytes_sent": {way: rows[-1][f"bytes_{way}"] / 1e6 for way in ("down", "up")}} if clients else {}),
        "seconds": rows[-1]["seconds"],
    }
    write_yaml(paths.results / "summary.yaml", summary)
    return summary


def check(config: EditingConfig, setup: Setup) -> tuple[EditingConfig, Entries, Clients | None]:
    """The config with its chunk settled, the eligible entries, and the clients, if it is they who score.

    Raises InputError where no mask can come of it.
    """
    options = config.editing
    scored = options.criterion in LOOKS_AT_IMAGES
    if setup.head == "random" and scored:
        raise InputError(
            f"--head random: {options.criterion} scores through an untrained head would mean nothing; "
            "use --head ridge, a head file, or --checkpoint"
        )
    if options.granularity == "head" and not setup.model.architecture.heads:
        raise InputError(f"--granularity head: {setup.model.architecture} says nothing of its heads; choose another")
    clients = split(setup, config.split, config.run.seed) if options.calibration == "federated" else None
    if clients is None and len(setup.dataset.calibration) == 0 and (closed_form(setup.head) or scored):
        raise InputError("the calibration split is empty; raise --calibration_fraction, or add images")
    eligible = eligible_entries(setup.model, options.eligible)
    if round((1 - options.target_sparsity) * len(eligible)) == 0:
        raise InputError(f"--target_sparsity {options.target_sparsity}: leaves none of {len(eligible)} entries to move")
    chunk = options.fisher_chunk or (chunk_that_fits(setup) if scored else None)
    return (
        config.model_copy(update={"editing": options.model_copy(update={"fisher_chunk": chunk})}),
        eligible,
        clients,
    )


def fit_head(setup: Setup, paths: RunPaths, clients: Clients | None, console: Console) -> tuple[int, int]:
    """Fit and write a head where one is wanted; returns the bytes that clients got and sent for it."""
    kind = closed_form(setup.head)
    if kind is None:
        return 0, 0
    console.print(f"fitting the {kind} head", highlight=False)
    if clients is None:
        down = up = 0
        fit_from_sums(kind, setup, "calibration", [np.arange(len(setup.dataset.calibration))])
    else:
        down = len(clients) * sum(parameter.nbytes for parameter in setup.model.head.parameters())
        up = fit_from_sums(kind, setup, "train", clients)
    save_head(paths.head, setup.model)
    return down, up


@dataclass(frozen=True)
class Edit:
    """What the two ways to a mask share: one refined by everyone's scores, or many that clients made alone, joined."""

    config: EditingConfig
    paths: RunPaths
    setup: Setup
    eligible: Entries
    groups: Groups | None
    holders: list[Holder]
    head_bytes_down: int
    head_bytes_up: int

    def one_mask(self, console: Console) -> tuple[Tensor, Rows, Rows]:
        """Holders send scores, the server adds them, ranks, and sends back what stays, R times.

        Bytes: a number per candidate up, a bit per candidate down; a candidate is an entry, or group, that is still in.
        The weights that all start from are not counted. Returns the entries kept (E,), a row per iteration, and each
        iteration's density by block and kind.
        """
        kept, rows, report = self._saved(torch.ones(len(self.eligible), dtype=torch.bool))
        clients = len(self.holders) if self.config.editing.calibration == "federated" else 0
        with Display(console, "iteration", self.config.editing.num_iterations, len(rows)) as display:
            score = scorer(self.setup, self.eligible, self.groups, self.config, display.watch)
            clock = Clock(rows)
            down, up = self._bytes(rows)
            for iteration in self._calibrate(score, self.holders, (len(rows), kept)):
                candidates = self._candidates(kept)
                kept, number = iteration.kept, iteration.number
                figures = {"iteration": number, "active": int(kept.sum()), "density": iteration.density}
                up += clients * candidates * torch.float32.itemsize
                down += clients * -(-candidates // 8)
                rows.append({**figures, "bytes_down": down, "bytes_up": up, "seconds": clock.seconds})
                report += self._report(number, kept)
                self._save(kept, rows, report)
                display.show(number, f"{100 * iteration.density:.1f} % of {len(self.eligible)} may move")
        return kept, rows, report

    def joined_mask(self, console: Console) -> tuple[Tensor, Rows, Rows]:
        """Every client makes a mask of its own images, the server joins their bits by votes.

        Returns the entries kept (E,), a row per client, and the density by block and kind.
        """
        options = self.config.editing
        assert options.merge != "scores"
        votes, rows, _ = self._saved(torch.zeros(len(self.eligible), dtype=torch.int32))
        with Display(console, "client", len(self.holders), len(rows)) as display:

            def watch(batches: Iterator[Scored], share: float) -> Iterator[Scored]:
                return display.watch(batches, share / options.num_iterations)

            score = scorer(self.setup, self.eligible, self.groups, self.config, watch)
            clock = Clock(rows)
            down, up = self._bytes(rows)
            bits = -(-self._candidates(torch.ones_like(votes, dtype=torch.bool)) // 8)
            for done, holder in enumerate(self.holders[len(rows) :], start=len(rows) + 1):
                *_, last = self._calibrate(score, [holder], None)
                active = int(last.kept.sum())
                if options.personal_masks:
                    save_mask(
                        self.paths.personal_mask(holder.number), self.mask(last.kept), self.facts(active, [holder])
                    )
                votes = votes + last.kept
                figures = {"client": holder.number, "images": len(holder.ids), "active": active}
                up += bits
                rows.append({**figures, "bytes_down": down, "bytes_up": up, "seconds": clock.seconds})
                self._save(votes, rows, [])
                display.show(done, f"{int((votes > 0).sum())} of {len(self.eligible)} in any mask")
        kept = votes >= votes_needed(options.merge, len(self.holders), options.quorum)
        if not kept.any():
            raise InputError(
                f"--merge {options.merge}: the clients' masks share no entry; start a run of another name with union, "
                "or vote at a lower --quorum"
            )
        return kept, rows, self._report(options.num_iterations, kept)

    def mask(self, kept: Tensor) -> Mask:
        """The entries kept (E,) as tensors by name."""
        return {name: tensor.cpu() for name, tensor in self.eligible.unflatten(kept).items()}

    def facts(self, active: int, holders: list[Holder]) -> MaskFacts:
        """The header of a mask that these made."""
        options, scored = self.config.editing, self.config.editing.criterion in LOOKS_AT_IMAGES
        return MaskFacts(
            version=__version__,
            criterion=options.criterion,
            fisher=fisher_name(options) if scored else "none",
            fisher_samples=options.fisher_samples if scored else 0,
            iterations=options.num_iterations,
            granularity=options.granularity,
            eligible_in=options.eligible,
            eligible=len(self.eligible),
            active=active,
            target_density=1 - options.target_sparsity,
            soft_zero=options.soft_zero,
            calibration=self._calibration(holders),
            clients=len(holders) if options.calibration == "federated" else 0,
            calibration_images=sum(len(holder.ids) for holder in holders) if scored else 0,
            seed=self.config.run.seed,
            model=self.setup.model.architecture.as_dict(),
            weights=self.setup.weights,
            data=self.setup.dataset.fingerprint,
            head=self.setup.head if self.setup.head in HEADS else "file",
        )

    def _calibration(self, holders: list[Holder]) -> str:
        options = self.config.editing
        if options.calibration == "central":
            return "central"
        rule = f"vote at {options.quorum:g}" if options.merge == "vote" else options.merge
        alone = f"client {holders[0].number} alone" if len(holders) < len(self.holders) else f"{rule} of masks"
        words = f"federated, {in_words(self.config.split)}"
        return words if options.merge == "scores" else f"{words}, {alone}"

    def _bytes(self, rows: Rows) -> tuple[int, int]:
        """Sent down and up so far."""
        return (rows[-1]["bytes_down"], rows[-1]["bytes_up"]) if rows else (self.head_bytes_down, self.head_bytes_up)

    def _candidates(self, kept: Tensor) -> int:
        """Of how many entries, or groups, the kept ones (E,) are."""
        return int(kept.sum()) if self.groups is None else len(self.groups.of[kept].unique())

    def _calibrate(self, score: Score, holders: list[Holder], start: tuple[int, Tensor] | None) -> Iterator[Iteration]:
        options = self.config.editing
        return calibrate(
            lambda number, kept: score(holders, number, kept),
            self.eligible,
            density=1 - options.target_sparsity,
            iterations=options.num_iterations,
            seed=self.config.run.seed,
            start=start,
            groups=self.groups,
        )

    def _report(self, number: int, kept: Tensor) -> Rows:
        table = density_table(self.mask(kept), self.config.editing.eligible)
        return [{"iteration": number, **asdict(row)} for row in table]

    def _saved(self, start: Tensor) -> tuple[Tensor, Rows, Rows]:
        """The tensor, rows and report that the last checkpoint holds, or a beginning."""
        path = self.paths.checkpoints / "last.json"
        if not path.exists():
            return start.to(self.eligible.device), [], []
        checkpoint = load_checkpoint(path)
        state, facts = checkpoint.tensors.get("state"), checkpoint.facts
        if (
            state is None
            or (state.shape, state.dtype) != (start.shape, start.dtype)
            or not {"rows", "report"} <= {*facts}
        ):
            raise InputError(f"checkpoint {path}: is of another version, or not of this edit; start another run")
        return state.to(self.eligible.device), facts["rows"], facts["report"]

    def _save(self, state: Tensor, rows: Rows, report: Rows) -> None:
        save_checkpoint(self.paths.checkpoints, "last", len(rows), {"state": state}, {"rows": rows, "report": report})


class Clock:
    """Seconds since the run began, those before it was resumed included."""

    def __init__(self, rows: Rows) -> None:
        self._before, self._start = rows[-1]["seconds"] if rows else 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        return round(self._before + time.perf_counter() - self._start, 2)
