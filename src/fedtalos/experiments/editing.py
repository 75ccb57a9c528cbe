"""Make a TaLoS mask: score weights on calibration images, keep the least sensitive."""

import csv
import io
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fedtalos import __version__
from fedtalos.checkpoint import load_checkpoint, save_checkpoint
from fedtalos.config import EditingConfig
from fedtalos.data.batches import evaluation_batches, steps_per_epoch
from fedtalos.data.images import LabelledImages
from fedtalos.display import Display
from fedtalos.errors import InputError
from fedtalos.experiments.runs import RunPaths, open_run
from fedtalos.experiments.setup import Setup, prepare
from fedtalos.files import write_atomic
from fedtalos.head import save_head
from fedtalos.masks import KINDS, DensityRow, MaskFacts, density_table, save_mask
from fedtalos.parameters import Entries
from fedtalos.randomness import generator
from fedtalos.recorder import write_yaml
from fedtalos.training.editing import calibrate, eligible_entries, score_by_weights, soften
from fedtalos.training.fisher import fisher_scores

LOOKS_AT_IMAGES = ("least_sensitive", "most_sensitive")


def run(config: EditingConfig, paths: RunPaths, console: Console) -> dict[str, Any]:
    """Write masks/RUN.safetensors, beside it a head that had to be fitted, and a report; returns the summary."""
    config, setup = prepare(config)
    options = config.editing
    if setup.head == "random" and options.criterion in LOOKS_AT_IMAGES:
        raise InputError(
            f"--head random: {options.criterion} scores through an untrained head would mean nothing; "
            "use --head ridge, a head file, or --checkpoint"
        )
    calibration = setup.dataset.calibration
    if len(calibration) == 0 and (setup.head == "ridge" or options.criterion in LOOKS_AT_IMAGES):
        raise InputError("the calibration split is empty; raise --calibration_fraction, or add images")
    eligible = eligible_entries(setup.model)
    if round((1 - options.target_sparsity) * len(eligible)) == 0:
        raise InputError(f"--target_sparsity {options.target_sparsity}: leaves none of {len(eligible)} entries to move")
    open_run(config, paths, setup.inputs())
    if setup.head == "ridge":
        setup.fit_head(setup.head_sums(calibration))
        save_head(paths.head, setup.model)
    order = generator(config.run.seed, "scored").permutation(len(calibration))
    drawn = torch.from_numpy(order[: options.calibration_images])
    kept, rows = iterations_done(paths, eligible)
    with Display(console, "iteration", options.num_iterations, len(rows)) as display:
        before, start = rows[-1]["seconds"] if rows else 0.0, time.perf_counter()
        for iteration in calibrate(
            scorer(setup, eligible, calibration.subset(drawn), config, display),
            eligible,
            density=1 - options.target_sparsity,
            iterations=options.num_iterations,
            seed=config.run.seed,
            start=(len(rows), kept),
        ):
            kept = iteration.kept
            seconds = round(before + time.perf_counter() - start, 2)
            figures = {"iteration": iteration.number, "active": int(kept.sum()), "density": iteration.density}
            rows.append({**figures, "seconds": seconds})
            save_checkpoint(paths.checkpoints, "last", iteration.number, {"kept": kept}, {"iterations": rows})
            display.show(iteration.number, f"{100 * iteration.density:.1f} % of {len(eligible)} may move")
    return write_results(config, paths, setup, eligible, kept, rows, console)


def scorer(
    setup: Setup, eligible: Entries, images: LabelledImages, config: EditingConfig, display: Display
) -> Callable[[int, Tensor], Tensor]:
    """(iteration, kept) -> scores (E,), low = keep, by the rule that the config names."""
    options, seed, model = config.editing, config.run.seed, setup.model
    batch_size = setup.eval_batch_size
    steps = steps_per_epoch(len(images), batch_size)

    def fisher(number: int, kept: Tensor) -> Tensor:
        uniforms = torch.from_numpy(generator(seed, "labels", number).random(len(images)))
        batches = evaluation_batches(images, setup.view, batch_size)
        drawn = ((pixels, u) for (pixels, _), u in zip(batches, uniforms.split(batch_size), strict=True))
        weights = soften(model, eligible, kept, options.soft_zero)
        watched = display.watch(drawn, 1 / steps)
        scores = fisher_scores(model, watched, eligible.masks, weights, chunk=options.fisher_chunk)
        return eligible.gather(scores)

    match options.criterion:
        case "least_sensitive":
            return fisher
        case "most_sensitive":
            return lambda number, kept: -fisher(number, kept)
        case rule:
            scores = score_by_weights(rule, model, eligible, seed)
            return lambda _number, _kept: scores


def iterations_done(paths: RunPaths, eligible: Entries) -> tuple[Tensor, list[dict[str, Any]]]:
    """Entries kept so far (E,), and a row for every iteration done."""
    path = paths.checkpoints / "last.json"
    if not path.exists():
        return torch.ones(len(eligible), dtype=torch.bool, device=eligible.device), []
    checkpoint = load_checkpoint(path)
    return checkpoint.tensors["kept"].to(eligible.device), checkpoint.facts["iterations"]


def write_results(
    config: EditingConfig,
    paths: RunPaths,
    setup: Setup,
    eligible: Entries,
    kept: Tensor,
    rows: list[dict[str, Any]],
    console: Console,
) -> dict[str, Any]:
    """The mask file, report.csv, iterations.csv and the summary; the report goes to the console too."""
    options = config.editing
    scored = options.criterion in LOOKS_AT_IMAGES
    facts = MaskFacts(
        version=__version__,
        criterion=options.criterion,
        fisher="true, one drawn label per example" if scored else "none",
        iterations=options.num_iterations,
        target_density=1 - options.target_sparsity,
        eligible=len(eligible),
        active=int(kept.sum()),
        soft_zero=options.soft_zero,
        calibration_images=min(options.calibration_images, len(setup.dataset.calibration)) if scored else 0,
        seed=config.run.seed,
        model=setup.model.architecture.as_dict(),
        weights=setup.weights,
        data=setup.dataset.fingerprint,
        head=setup.head,
    )
    mask = {name: tensor.cpu() for name, tensor in eligible.unflatten(kept).items()}
    save_mask(paths.mask, mask, facts)
    table = density_table(mask)
    console.print(density_report(table))
    write_csv(paths.results / "report.csv", [asdict(row) for row in table])
    write_csv(paths.results / "iterations.csv", rows)
    summary = {
        "command": config.command,
        "mask": str(paths.mask),
        **({"head": str(paths.head)} if setup.head == "ridge" else {}),
        "eligible": facts.eligible,
        "active": facts.active,
        "density": facts.density,
        "seconds": rows[-1]["seconds"],
    }
    write_yaml(paths.results / "summary.yaml", summary)
    return summary


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """One line per row, under the first row's keys."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())


def density_report(rows: list[DensityRow]) -> Table:
    """Per cent of entries that may move, by block and kind, and over all blocks."""
    table = Table(title="Entries that may move (%)", title_justify="left")
    table.add_column("block", justify="right")
    for kind in KINDS:
        table.add_column(kind, justify="right")
    for block in sorted({row.block for row in rows}):
        by_kind = {row.kind: 100 * row.density for row in rows if row.block == block}
        table.add_row(str(block), *(f"{by_kind[kind]:.1f}" for kind in KINDS))
    table.add_section()
    overall = [[row for row in rows if row.kind == kind] for kind in KINDS]
    shares = [100 * sum(r.active for r in same) / sum(r.entries for r in same) for same in overall]
    table.add_row("all", *(f"{share:.1f}" for share in shares))
    return table
