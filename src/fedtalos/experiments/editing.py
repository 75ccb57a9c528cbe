"""Make a TaLoS mask: score weights on held-out images, or on clients' own, and let the least sensitive move."""

from contextlib import nullcontext
from dataclasses import replace

from rich.console import Console

from fedtalos.app.config.schema import LOOKS_AT_IMAGES, EditingConfig
from fedtalos.app.edit import Edit, finish, next_command, refine_mask, scoring_clients
from fedtalos.app.engine import way_of_scores
from fedtalos.app.federation import clients_of
from fedtalos.app.load import Loaded, load
from fedtalos.app.run.beginning import introduction_to_edit
from fedtalos.app.run.books import Books
from fedtalos.app.run.display import Display, say, say_facts
from fedtalos.app.run.first_head import everyone, show_features
from fedtalos.app.run.folders import begun, open_run, say_decisions
from fedtalos.app.run.launch import check_alone
from fedtalos.app.run.paths import RunPaths
from fedtalos.app.run.split_file import write_split
from fedtalos.devices import strict_float32
from fedtalos.errors import InputError
from fedtalos.models.heads import closed_form, save_head
from fedtalos.training.editing.controls import score_by_weights
from fedtalos.training.editing.eligible import eligible_entries
from fedtalos.training.editing.ranking import entries_kept, group_entries
from fedtalos.training.editing.sensitivity import Holder, Sensitivity, Watch, chunk_that_fits, draw_holders
from fedtalos.training.editing.talos import Score, refuse_untrained_head
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
            refine_mask(edit, score_of(edit, display.watch), books, display)
        finish(edit, paths, books, console)
        say(console, f"train with it: {next_command(edit.loaded.config, paths)}")


def prepare(loaded: Loaded[EditingConfig]) -> Edit:
    """Settle how many images share a backward pass, and check all else.

    Raises InputError where no mask can come of it.
    """
    config, options = loaded.config, loaded.config.editing
    scored = options.criterion in LOOKS_AT_IMAGES
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
