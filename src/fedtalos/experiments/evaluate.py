"""Loss and accuracy of a checkpoint, or of weights with a head, on a split or a folder; by class where asked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fedtalos.app.config.files import override
from fedtalos.app.config.schema import RUN_CONFIGS, CentralizedConfig, RunConfig
from fedtalos.app.config.tools import EvaluateConfig
from fedtalos.app.evaluated import lowest_classes, most_confused, write_confusion, write_per_class
from fedtalos.app.load import load
from fedtalos.app.run.bars import bar
from fedtalos.app.run.display import say, say_notes
from fedtalos.app.run.resume import from_here, working_folder
from fedtalos.app.trained import check_which, open_trained, paths_of
from fedtalos.checkpoint import find_checkpoint, load_checkpoint
from fedtalos.data.images import LabelledImages
from fedtalos.data.photos import read_labelled_folder
from fedtalos.devices import Precision, choose_precision
from fedtalos.errors import InputError, shown
from fedtalos.files import refuse_link
from fedtalos.models.backbone import Backbone
from fedtalos.models.weights.hub import FILES
from fedtalos.training.confusion import Confusion, confusion
from fedtalos.training.evaluation import evaluate
from fedtalos.training.prediction import decoded_size


@dataclass(frozen=True)
class Subject:
    """A model, and the labelled images that it is to be evaluated on."""

    path: Path
    name: str
    """Name of the run, or of the file, for the folder under evaluations/."""
    part: str
    """Name of the images: the split's, or the folder's."""
    model: Backbone
    images: LabelledImages
    classes: tuple[str, ...]
    batch_size: int
    precision: Precision


def run(config: EvaluateConfig, console: Console) -> None:
    """Print what the model reaches on the images; by class, and mistake by mistake, where that is asked for."""
    check_which(config.checkpoint, config.which)
    subject = on_a_split(config) if config.folder is None else on_a_folder(config, config.folder)
    say_notes(console)
    by_class = config.per_class or config.confusion
    measure = confusion if by_class else evaluate
    found = measure(subject.model, subject.images, batch_size=subject.batch_size, precision=subject.precision)
    metrics = found.metrics if isinstance(found, Confusion) else found
    say(
        console,
        f"{subject.path}: {subject.part} loss {metrics.loss:.4f}, accuracy {100 * metrics.accuracy:.2f} % "
        f"({metrics.correct} of {metrics.examples})",
    )
    if isinstance(found, Confusion):
        show(config, subject, found, console)


def show(config: EvaluateConfig, subject: Subject, found: Confusion, console: Console) -> None:
    """Write the tables and the figure that were asked for, and print what stands out in them."""
    folder = config.output_dir / "evaluations" / subject.name
    refuse_link(folder)
    written = []
    if config.per_class:
        console.print(lowest_classes(found, subject.classes))
        written.append(folder / f"per_class_{subject.part}.csv")
        write_per_class(written[-1], found, subject.classes)
    if config.confusion:
        from fedtalos.app.figures.confusion import confusion_figure
        from fedtalos.app.figures.draw import write_figures

        if found.most_confused(1):
            console.print(most_confused(found, subject.classes))
        written.append(folder / f"confusion_{subject.part}.csv")
        figure = confusion_figure(found, subject.classes, f"{subject.name}, {subject.part}")
        write_confusion(written[-1], found, subject.classes)
        written += write_figures({f"confusion_{subject.part}": figure}, folder)
    for path in written:
        say(console, str(path))


def on_a_split(config: EvaluateConfig) -> Subject:
    """Load the model and the split: of its run's images, or the data set's, as many as asked for."""
    path, asked = of_weights(config) if is_weights(config) else of_run(config)
    loaded, split = load(asked), config.split or "test"
    return Subject(
        path,
        path.stem if is_weights(config) else paths_of(path).name,
        split,
        loaded.model,
        loaded.limited(split),
        loaded.data.classes,
        loaded.config.data.eval_batch_size,
        loaded.config.run.arithmetic,
    )


def on_a_folder(config: EvaluateConfig, folder: Path) -> Subject:
    """Load a run's model and a folder of images of its classes; the run's own data set need not be there.

    Raises InputError where another option says which images, too.
    """
    for name in ("split", "dataset", "data_dir", "eval_limit"):
        if (value := getattr(config, name)) is not None:
            raise InputError(f"--folder {folder} and --{name} {value} both say which images; give one of them")
    if is_weights(config):
        raise InputError(
            f"--folder {folder}: {config.checkpoint} does not say which classes its head knows; give the name of a run"
        )
    trained = open_trained(config.checkpoint, config.output_dir, config.which, config.device)
    images = read_labelled_folder(folder, trained.classes, decoded_size(trained.model), bar)
    device = next(trained.model.parameters()).device
    return Subject(
        trained.path,
        trained.name,
        folder.resolve().name,
        trained.model,
        images.to(device),
        trained.classes,
        250,
        choose_precision("auto", device),
    )


def is_weights(config: EvaluateConfig) -> bool:
    """Tell whether a file of weights alone is meant, not a run: one by its ending, unless it is a checkpoint's."""
    path = config.checkpoint
    return path.name.endswith(FILES) and path.is_file() and not path.name.startswith(("last-", "best-"))


def of_run(config: EvaluateConfig) -> tuple[Path, RunConfig]:
    """The checkpoint of a run, and the options to load it with.

    Data of a run under output_dir are looked for where the run had them. Another checkpoint may be a stranger's, and
    names no place: its data are where the command line says, or in the usual folder.
    """
    path = find_checkpoint(config.checkpoint, config.output_dir / "checkpoints", config.which)
    facts = load_checkpoint(path).facts
    if facts.get("command") not in RUN_CONFIGS:
        raise InputError(f"checkpoint {path}: holds no trained model (it is of {shown(facts.get('command'))})")
    if not isinstance(options := facts.get("options"), dict):
        raise InputError(f"checkpoint {path}: is of another version; give another")
    place = working_folder(paths_of(path))
    if not path.resolve().is_relative_to((config.output_dir / "checkpoints").resolve()):
        options, place = {key: value for key, value in options.items() if key != "data_dir"}, None
    changes = {**_given(config), "weights": str(path), "mask": None, "precision": "auto", "cache_dir": None}
    # Sizes are the model's own, whatever the options say.
    changes |= {"output_dir": str(config.output_dir), "model_size": None, "image_size": None, "patch_size": None}
    found = {**from_here(options, facts["command"], place), **changes}
    return path, override(RUN_CONFIGS[facts["command"]](), found, str(path))


def of_weights(config: EvaluateConfig) -> tuple[Path, RunConfig]:
    """A file of weights, and the options to load it with; InputError where nobody says on which images."""
    path = config.checkpoint
    if config.dataset is None:
        raise InputError(
            f"evaluate {path}: weights alone, which say nothing of images; give --dataset for the classes of their "
            "head, or the name of a run"
        )
    return path, override(CentralizedConfig(), {**_given(config), "weights": str(path)}, str(path))


def _given(config: EvaluateConfig) -> dict[str, Any]:
    """Options that the command line gives, in the words of a run's."""
    options = {key: getattr(config, key) for key in ("dataset", "data_dir", "eval_limit")}
    given = {
        key: str(value) if isinstance(value, Path) else value for key, value in options.items() if value is not None
    }
    return {**given, "head": "weights", "device": config.device}
