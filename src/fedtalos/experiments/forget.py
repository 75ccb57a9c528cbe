"""Take a task, some classes or a client out of a finished run, and measure what is forgotten, and what is not."""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fedtalos.app.config.forget import ForgetConfig
from fedtalos.app.run.display import say, say_notes
from fedtalos.app.run.folders import claimed
from fedtalos.app.run.paths import RunPaths, plain_name
from fedtalos.app.run.recorder import made_by, write_csv, write_yaml
from fedtalos.app.run.trained_apart import TrainedApart, read_trained_apart, restore
from fedtalos.checkpoint import HEADER, find_checkpoint, load_checkpoint, save_checkpoint
from fedtalos.data.images import LabelledImages
from fedtalos.errors import InputError
from fedtalos.models.backbone import Backbone
from fedtalos.models.heads import closed_form, head_of, set_head
from fedtalos.training.editing.forgetting import forgetting_factor
from fedtalos.training.editing.task_vectors import scaled, weighted_sum
from fedtalos.training.entries import named_tensors
from fedtalos.training.evaluation import evaluate
from fedtalos.training.task_accuracy import probe_accuracy

MEASURES = ("target", "control", "probe")


def run(config: ForgetConfig, console: Console) -> None:
    """Write the model that forgot, forgetting.csv and summary.yaml; print the accuracies before and after.

    Nothing is written before all is measured: a command that was stopped is begun anew.
    """
    what = [f"--{name}" for name in ("classes", "task", "client") if getattr(config, name) not in ((), None)]
    if len(what) != 1:
        raise InputError(f"forget: expected one of --classes, --task and --client, got {' and '.join(what) or 'none'}")
    changes = {"device": config.device} | ({} if config.data_dir is None else {"data_dir": str(config.data_dir)})
    trained = read_trained_apart(config.run, config.output_dir, changes)
    out = chosen(config, trained)
    label = "+".join(trained.units[number].name for number in out)
    paths = RunPaths(config.output_dir, plain_name("name", config.name or f"{config.run}-without-{label}"))
    for path in (paths.results, paths.checkpoints):
        if path.exists():
            raise InputError(f"{path} exists, of an earlier run: move it away, or give another --name")
    measured = Measured(config, trained, out)
    rows, alpha, head = forgotten(config, trained, out, measured)
    say_notes(console)
    with claimed(paths):
        save(paths, config, trained, label, rows, alpha)
    show(rows, label, config, console)
    explain(trained, out, alpha, head, console)
    for path in (paths.results, paths.checkpoints):
        say(console, str(path))


def chosen(config: ForgetConfig, trained: TrainedApart) -> list[int]:
    """Numbers of the units to forget; InputError where the run kept no vector of these alone."""
    units, names = trained.units, trained.loaded.data.classes
    kept = _some([unit.name for unit in units])
    if config.classes:
        if strange := [name for name in config.classes if name not in names]:
            raise InputError(f"classes {strange[0]}: no such class; there are {_some(names)}")
        asked = {names.index(name) for name in config.classes}
        found = [number for number, unit in enumerate(units) if set(unit.classes) <= asked]
        if {label for number in found for label in units[number].classes} != asked:
            near = next(unit for unit in units if asked & set(unit.classes))
            raise InputError(
                f"classes {' '.join(config.classes)}: run {config.run} has no vector of these alone; {near.name} is of "
                f"{' '.join(names[label] for label in near.classes)}; give all classes of one or several"
            )
    else:
        name = f"task{config.task}" if config.task is not None else f"client{config.client}"
        found = [number for number, unit in enumerate(units) if unit.name == name]
        if not found:
            flag = f"task {config.task}" if config.task is not None else f"client {config.client}"
            raise InputError(f"{flag}: run {config.run} kept no vector of it; it has those of {kept}")
    if len(found) == len(units):
        raise InputError(f"forget: run {config.run} has no other vectors than these, so nothing would be left")
    return found


def _some(names: Sequence[str]) -> str:
    """The first names of a list, and whether there are more."""
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


class Measured:
    """Images that say what is forgotten: the target, which is to be lost, and control, which is to stay.

    Of classes the target is their test images. Of a client it is its own training images, for others may hold its
    classes too. Control are test images of the classes that others hold. The probe is fitted on the training images of
    the forgotten classes, and tested on their test images.
    """

    def __init__(self, config: ForgetConfig, trained: TrainedApart, out: list[int]) -> None:
        loaded, units = trained.loaded, trained.units
        self.features = loaded.features
        self.precision = loaded.config.run.arithmetic
        self.batch_size = loaded.config.data.eval_batch_size
        gone = sorted({label for number in out for label in units[number].classes})
        stay = {label for number, unit in enumerate(units) if number not in out for label in unit.classes}
        test, val, train = loaded.limited("test"), loaded.limited("val"), loaded.data.train
        own = train.subset(np.concatenate([trained.clients[k] for n in out for k in units[n].members]))
        of_client = config.client is not None
        self.target = own if of_client else of_classes(test, gone, "test")
        self.control = of_classes(test, stay, "test")
        self.probe = (of_classes(train, gone, "training"), of_classes(test, gone, "test"))
        self.choose_by = (
            own if of_client else of_classes(val, gone, "validation"),
            of_classes(val, stay, "validation"),
        )

    def accuracy(self, model: Backbone, images: LabelledImages) -> float:
        """Evaluate as the run did."""
        return evaluate(model, images, batch_size=self.batch_size, precision=self.precision).accuracy

    def to_choose_by(self, model: Backbone) -> tuple[float, float]:
        """Accuracy on the target and on control of images that no figure is reported on, but a client's own."""
        return self.accuracy(model, self.choose_by[0]), self.accuracy(model, self.choose_by[1])

    def row(self, trained: TrainedApart) -> dict[str, float]:
        """Measure the model as it is."""
        model = trained.loaded.model
        target, control = self.accuracy(model, self.target), self.accuracy(model, self.control)
        return {"target": target, "control": control, "probe": probe_accuracy(model, *self.probe, self.features)}


def of_classes(images: LabelledImages, classes: Collection[int], what: str) -> LabelledImages:
    """The images of some classes; InputError where there is none."""
    own = torch.isin(images.labels, torch.tensor(sorted(classes), device=images.labels.device))
    if not bool(own.any()):
        raise InputError(f"forget: there is no {what} image of these classes; raise --eval_limit in the run")
    return images.subset(own.nonzero().squeeze(1))


def forgotten(
    config: ForgetConfig, trained: TrainedApart, out: list[int], measured: Measured
) -> tuple[dict[str, dict[str, float]], float, str]:
    """Leave the units out, subtract their vector as far as asked; returns rows by name, the factor, the head's words.

    The model is the one that forgot, in the end.
    """
    moving, model = trained.moving, trained.loaded.model
    rows = {"before": measured.row(trained)}
    _, control_before = measured.to_choose_by(model)
    if config.retrained is not None:
        now = {name: tensor.clone() for name, tensor in named_tensors(model).items()}
        path = find_checkpoint(Path(config.retrained), config.output_dir / "checkpoints", "last")
        restore(trained.loaded, load_checkpoint(path), config.retrained)
        rows["retrained"] = measured.row(trained)
        for name, tensor in named_tensors(model).items():
            tensor.copy_(now[name])

    first = head_of(model)

    def head() -> str:
        if not config.keep_head:
            return trained.fit_head_without(out)
        set_head(model, *first, source=model.head_source)  # where it is among what moves
        return "as it was (--keep_head)"

    moving.write(trained.without(out))
    how = head()
    rows["left out"] = measured.row(trained)
    vector = weighted_sum([trained.vectors[number] for number in out], [1.0] * len(out), "sum")
    alpha = config.alpha
    if alpha == "auto":
        alpha = forgetting_factor(model, vector, measured.to_choose_by, control_before, config.keep)
    if alpha:
        moving.write(moving.vector() - scaled(vector.values, alpha).to(moving.device))
        how = head()
        rows["subtracted"] = measured.row(trained)
    return rows, alpha, how


def save(
    paths: RunPaths,
    config: ForgetConfig,
    trained: TrainedApart,
    label: str,
    rows: dict[str, dict[str, float]],
    alpha: float,
) -> None:
    """Write the checkpoint, then the figures, then the summary."""
    facts = {key: value for key, value in trained.checkpoint.facts.items() if key not in HEADER}
    facts["forgot"] = {"run": config.run, "what": label, "alpha": alpha}
    done = int(facts["progress"]["done"])
    save_checkpoint(paths.checkpoints, "last", done, named_tensors(trained.loaded.model), facts)
    before = rows["before"]["control"]
    lines = [{"model": name, **_rounded(row), "control_share": _share(row, before)} for name, row in rows.items()]
    write_csv(paths.results / "forgetting.csv", lines)
    write_yaml(
        paths.results / "summary.yaml",
        {
            "command": "forget",
            "run": config.run,
            "forgot": label,
            "alpha": round(alpha, 6),
            "accuracy": {name: _rounded(row) for name, row in rows.items()},
            "made_by": made_by(trained.loaded.device.type),
        },
    )


def _rounded(row: dict[str, float]) -> dict[str, float]:
    return {name: round(row[name], 6) for name in MEASURES}


def _share(row: dict[str, float], before: float) -> float:
    return round(row["control"] / before, 6) if before else 1.0


def show(rows: dict[str, dict[str, float]], label: str, config: ForgetConfig, console: Console) -> None:
    """Print the accuracies of each model in per cent."""
    target = "its own training images" if config.client is not None else "test images of its classes"
    say(console, f"{label} of {config.run}; target: {target}; control: test images of the classes that others hold")
    table = Table(box=None)
    for heading in ("model", "target %", "control %", "of before %", "probe %"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, row in rows.items():
        shares = (row["target"], row["control"], _share(row, rows["before"]["control"]), row["probe"])
        table.add_row(name, *(f"{100 * share:.1f}" for share in shares))
    console.print(table, highlight=False)


def still_knowing(trained: TrainedApart) -> list[str]:
    """List what may know of the forgotten, though their vector is gone."""
    config = trained.loaded.config
    fitted = config.model.head == "linear" or closed_form(config.model.head) is not None
    found = {
        "alpha, chosen on validation images of all classes": config.apart.merge_alpha == "auto",
        "the first head, which was fitted to everybody's images and which all trained through": fitted,
        "the mask, if it was scored on their images": config.train.mask is not None,
    }
    return [what for what, so in found.items() if so]


def explain(trained: TrainedApart, out: list[int], alpha: float, head: str, console: Console) -> None:
    """Say what is exact, and what is not."""
    rest = len(trained.others(out)[0])
    vectors = "1 vector" if rest == 1 else f"{rest} vectors"
    say(
        console,
        f"body: {vectors} merged again by {trained.loaded.config.apart.merge} at alpha {trained.alpha:.3g}, as if the "
        "forgotten had never been sent: exact" + "".join(f", but for {what}" for what in still_knowing(trained)),
    )
    say(console, f"head: {head}")
    if alpha:
        say(console, f"beyond that: its vector was subtracted {alpha:.3g} times: no model trained without it is so")
    say(console, "probe: what a linear head can still read of the forgotten classes, if somebody has images of them")
