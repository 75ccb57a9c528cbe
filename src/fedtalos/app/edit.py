"""The parts that every edit has, whoever is asked for scores: entries and holders, its rounds, its end."""

import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from fedtalos._version import __version__
from fedtalos.app.config.schema import EditingConfig
from fedtalos.app.load import Loaded
from fedtalos.app.run.books import Books
from fedtalos.app.run.display import Display, density_report, say, say_facts
from fedtalos.app.run.ending import end_of_edit
from fedtalos.app.run.folders import say_decisions
from fedtalos.app.run.paths import RunPaths
from fedtalos.app.run.recorder import write_csv, write_yaml
from fedtalos.app.run.split_file import describe_split
from fedtalos.models.heads import HEADS, closed_form
from fedtalos.randomness import generator
from fedtalos.training.editing.describe import density_table
from fedtalos.training.editing.eligible import mask_of
from fedtalos.training.editing.mask_facts import MaskFacts
from fedtalos.training.editing.mask_file import write_mask_file
from fedtalos.training.editing.ranking import Groups
from fedtalos.training.editing.sensitivity import BATCH, Holder
from fedtalos.training.editing.talos import Score, refine
from fedtalos.training.entries import Entries
from fedtalos.training.federated.clients import Clients


@dataclass(frozen=True, eq=False)
class Edit:
    """Everything that an edit starts from: entries to choose from, their groups, and who scores which images."""

    loaded: Loaded[EditingConfig]
    eligible: Entries
    groups: Groups | None
    clients: Clients | None
    holders: list[Holder]

    @property
    def senders(self) -> int:
        """Number of clients that send scores; one that makes a mask of its own keeps them."""
        alone = self.loaded.config.editing.calibration_client is not None
        return 0 if self.clients is None or alone else len(self.holders)


def scoring_clients(config: EditingConfig, clients: Clients) -> list[Holder]:
    """The clients that score: all, so many drawn, or one for a mask of its own."""
    options = config.editing
    drawn = generator(config.run.seed, "scorers").permutation(len(clients))[: options.calibration_clients]
    numbers = np.sort(drawn).tolist() if options.calibration_client is None else [options.calibration_client]
    return [Holder(number, clients[number], clients.images) for number in numbers]


def refine_mask(edit: Edit, score: Score, books: Books, display: Display) -> None:
    """Refine the mask by a score, from where the books are; they record each iteration."""
    options = edit.loaded.config.editing
    for iteration in refine(
        score,
        edit.eligible,
        density=1 - options.target_sparsity,
        iterations=options.num_iterations,
        seed=edit.loaded.config.run.seed,
        start=(books.done, books.kept),
        groups=edit.groups,
    ):
        books.record(iteration, options.eligible)
        display.show(iteration.number, f"{100 * iteration.density:.1f} % of {len(edit.eligible)} may move")


def finish(edit: Edit, paths: RunPaths, books: Books, console: Console) -> None:
    """Write the mask and its tables, draw its figures, write the summary, and say where all is."""
    from fedtalos.app.figures import draw  # slow to import

    config = edit.loaded.config
    mask, facts = mask_of(edit.eligible, books.kept), facts_of(edit, int(books.kept.sum()))
    write_mask_file(paths.mask, mask, facts)
    console.print(density_report(density_table(mask, facts.eligible_in)))
    write_csv(paths.results / "iterations.csv", books.rows)
    write_csv(paths.results / "report.csv", books.report)
    last = books.rows[-1]
    sent = {"megabytes_sent": {way: last[f"bytes_{way}"] / 1e6 for way in ("down", "up")}}
    summary = {
        "command": config.command,
        "mask": str(paths.mask),
        **({"head": str(paths.head)} if closed_form(config.model.head) else {}),
        "eligible": facts.eligible,
        "active": facts.active,
        "density": facts.density,
        **({} if edit.clients is None else sent),
        "seconds": last["seconds"],
    }
    say_decisions(paths, console)
    drawn = draw.plot_masks([paths.mask], paths.plots) + draw.plot_iterations(paths.results, paths.plots)
    write_yaml(paths.results / "summary.yaml", summary)  # last: a run that has one is finished
    say_facts(console, end_of_edit(facts.active, facts.eligible, last["seconds"], summary.get("megabytes_sent")))
    made = [paths.mask, *([paths.head] if "head" in summary else [])]
    for path in [*made, paths.results, paths.checkpoints, *drawn]:
        say(console, str(path))


def next_command(config: EditingConfig, paths: RunPaths) -> str:
    """The command that trains with the mask: same data, clients and weights, and the head beside the mask."""
    usual, options = EditingConfig(), dict[str, object]()
    for section in ("data", "model", "split"):
        own, default = (getattr(which, section).model_dump() for which in (config, usual))
        options |= {name: value for name, value in own.items() if value != default[name]}
    options.pop("head", None)  # the one beside the mask comes along
    if options.get("weights") != "none":
        options.pop("patch_size", None)
    if checkpoint := config.editing.checkpoint:
        options.pop("model_size", None)
        options["weights"] = checkpoint
    options["mask"] = paths.mask
    options |= {"output_dir": paths.root} if paths.root != Path() else {}
    options |= {"seed": config.run.seed} if config.run.seed else {}
    return shlex.join(
        ["fedtalos", "federated", *(str(word) for key, value in options.items() for word in (f"--{key}", value))]
    )


def facts_of(edit: Edit, active: int) -> MaskFacts:
    """Facts of the mask, for its file's header."""
    config, options, model = edit.loaded.config, edit.loaded.config.editing, edit.loaded.model
    scored, head = bool(edit.holders), config.model.head
    fisher = f"batch of at most {BATCH}" if options.fisher == "batch" else options.fisher
    calibration: list[str] = [options.calibration]
    if edit.clients is not None:
        calibration.append(describe_split(config.split))
    if options.calibration_client is not None:
        calibration.append(f"client {options.calibration_client} alone")
    return MaskFacts(
        version=__version__,
        criterion=options.criterion,
        fisher=fisher if scored else "none",
        fisher_samples=options.fisher_samples if scored else 0,
        iterations=options.num_iterations,
        granularity=options.granularity,
        eligible_in=options.eligible,
        eligible=len(edit.eligible),
        active=active,
        target_density=1 - options.target_sparsity,
        soft_zero=options.soft_zero,
        calibration=", ".join(calibration),
        clients=0 if edit.clients is None else len(edit.holders),
        calibration_images=sum(len(holder.ids) for holder in edit.holders),
        seed=config.run.seed,
        model=model.architecture.as_dict(),
        weights=model.origin.fingerprint,
        data=edit.loaded.data.fingerprint,
        head=head if head in HEADS else "file",
    )
