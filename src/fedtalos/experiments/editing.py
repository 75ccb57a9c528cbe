"""Make a TaLoS mask: score weights on held-out images, or on clients' own, and let the least sensitive move."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from fedtalos._version import __version__
from fedtalos.app.config.schema import EditingConfig
from fedtalos.app.engine import way_of_scores
from fedtalos.app.federation import clients_of
from fedtalos.app.load import Loaded, load
from fedtalos.app.run.beginning import introduction_to_edit
from fedtalos.app.run.books import Books
from fedtalos.app.run.display import Display, density_report, say, say_facts
from fedtalos.app.run.ending import end_of_edit
from fedtalos.app.run.first_head import everyone, show_features
from fedtalos.app.run.folders import begun, open_run, say_decisions
from fedtalos.app.run.launch import check_alone
from fedtalos.app.run.paths import RunPaths
from fedtalos.app.run.recorder import write_csv, write_yaml
from fedtalos.app.run.split_file import describe_split, write_split
from fedtalos.devices import strict_float32
from fedtalos.errors import InputError
from fedtalos.models.heads import HEADS, closed_form, save_head
from fedtalos.randomness import generator
from fedtalos.training.editing.controls import score_by_weights
from fedtalos.training.editing.describe import density_table
from fedtalos.training.editing.eligible import eligible_entries, mask_of
from fedtalos.training.editing.mask_file import MaskFacts, write_mask_file
from fedtalos.training.editing.ranking import Groups, entries_kept, group_entries
from fedtalos.training.editing.sensitivity import BATCH, Holder, Sensitivity, Watch, chunk_that_fits, draw_holders
from fedtalos.training.editing.talos import Score, refine, refuse_untrained_head
from fedtalos.training.entries import Entries
from fedtalos.training.federated.clients import Clients
from fedtalos.training.head_fitting import fit_head


def run(config: EditingConfig, console: Console) -> None:
    """Write masks/RUN.safetensors, beside it a head that had to be fitted, and a report."""
    check_alone(config.command)
    with begun(config, console) as paths:
        edit = prepare(load(config))
        open_run(edit.loaded.config, paths, edit.loaded.origin(), console)
        scored = sum(len(holder.ids) for holder in edit.holders)
        say_facts(console, introduction_to_edit(edit.loaded, len(edit.eligible), len(edit.holders), scored))
        if edit.clients is not None:
            write_split(paths.results, edit.clients, edit.loaded.data.classes)
        sent = fit_first_head(edit, paths, console)
        books, options = Books(paths, edit.eligible, edit.groups, edit.senders, sent), config.editing
        with Display(console, "iteration", options.num_iterations, books.done) as display:
            for iteration in refine(
                score_of(edit, display.watch),
                edit.eligible,
                density=1 - options.target_sparsity,
                iterations=options.num_iterations,
                seed=config.run.seed,
                start=(books.done, books.kept),
                groups=edit.groups,
            ):
                books.record(iteration, options.eligible)
                display.show(iteration.number, f"{100 * iteration.density:.1f} % of {len(edit.eligible)} may move")
        finish(edit, paths, books, console)


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


def prepare(loaded: Loaded[EditingConfig]) -> Edit:
    """Settle how many images share a backward pass, and check all else.

    Raises InputError where no mask can come of it.
    """
    config, options = loaded.config, loaded.config.editing
    scored = options.criterion in ("least_sensitive", "most_sensitive")
    fitted = closed_form(config.model.head) is not None
    if scored and not fitted:
        refuse_untrained_head(loaded.model)
    eligible = eligible_entries(loaded.model, options.eligible)
    groups = group_entries(eligible, options.granularity, loaded.model.architecture)
    entries_kept(1 - options.target_sparsity, len(eligible))
    clients = None
    if options.calibration == "federated":
        clients = clients_of(loaded.data.train, config.split, config.run.seed)
    elif (scored or fitted) and len(loaded.data.calibration) == 0:
        raise InputError("the calibration split is empty; raise --calibration_fraction, or add images")
    holders: list[Holder] = []
    if scored:
        everyone = loaded.data.calibration if clients is None else scoring_clients(config, clients)
        holders = draw_holders(everyone, options.calibration_images, config.run.seed)
        chunk = options.fisher_chunk or chunk_that_fits(loaded.model, loaded.data.train)
        options = options.model_copy(update={"fisher_chunk": chunk})
    return Edit(
        replace(loaded, config=config.model_copy(update={"editing": options})), eligible, groups, clients, holders
    )


def scoring_clients(config: EditingConfig, clients: Clients) -> list[Holder]:
    """The clients that score: all, so many drawn, or one for a mask of its own."""
    options = config.editing
    drawn = generator(config.run.seed, "scorers").permutation(len(clients))[: options.calibration_clients]
    numbers = np.sort(drawn).tolist() if options.calibration_client is None else [options.calibration_client]
    return [Holder(number, clients[number], clients.images) for number in numbers]


def fit_first_head(edit: Edit, paths: RunPaths, console: Console) -> tuple[int, int]:
    """Fit and write a head where one is wanted; returns the bytes that clients got and sent for it."""
    loaded, clients = edit.loaded, edit.clients
    kind = closed_form(loaded.config.model.head)
    if kind is None:
        return 0, 0
    images = loaded.data.calibration if clients is None else loaded.data.train
    holders = everyone(len(images)) if clients is None else clients
    # Labels are drawn through this head, so it is as strict as the scores.
    with strict_float32() if loaded.config.run.precision == "fp32" else nullcontext():
        show_features(loaded, images, holders, f"fitting the {kind} head", console)
        sent = fit_head(
            loaded.model, images, kind, holders=clients, val=loaded.limited("val"), features=loaded.features
        )
    save_head(paths.head, loaded.model)
    say_decisions(paths, console)
    if clients is None:
        return 0, 0
    return len(clients) * sum(parameter.nbytes for parameter in loaded.model.head.parameters()), sent


def score_of(edit: Edit, watch: Watch) -> Score:
    """The rule that gives scores, low = keep: by sensitivity, magnitude or chance."""
    config, options, model = edit.loaded.config, edit.loaded.config.editing, edit.loaded.model
    match options.criterion:
        case "least_sensitive" | "most_sensitive" as rule:
            return Sensitivity(
                model,
                edit.eligible,
                edit.holders,
                rule=rule,
                soft_zero=options.soft_zero,
                fisher=options.fisher,
                fisher_samples=options.fisher_samples,
                chunk=options.fisher_chunk or 1,
                compile=way_of_scores(config, model, edit.loaded.device.type),
                batch_size=config.data.eval_batch_size,
                precision=config.run.arithmetic,
                seed=config.run.seed,
                watch=watch,
            )
        case control:
            scores = score_by_weights(control, model, edit.eligible, config.run.seed, edit.groups)
            return lambda _number, _kept: scores


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
    say(console, f"train with it: {next_command(config, paths)}")


def next_command(config: EditingConfig, paths: RunPaths) -> str:
    """The command that trains with the mask: same data, same weights, and the head beside the mask."""
    options: dict[str, object] = {
        "dataset": config.data.dataset,
        "data_dir": config.data.data_dir,
        "image_size": config.model.image_size,
    }
    weights = config.editing.checkpoint or config.model.weights
    options |= {"weights": weights, "model_size": None if config.editing.checkpoint else config.model.model_size}
    options |= {"patch_size": config.model.patch_size if weights == "none" else None, "mask": paths.mask}
    options |= {"output_dir": None if paths.root == Path() else paths.root, "seed": config.run.seed or None}
    plain = type(config)()
    usual = {**plain.data.model_dump(), **plain.model.model_dump()}
    given = {key: value for key, value in options.items() if value is not None and value != usual.get(key)}
    return "fedtalos federated " + " ".join(f"--{key} {value}" for key, value in given.items())


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
