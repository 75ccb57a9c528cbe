"""Loss and accuracy of a checkpoint, or of weights with a head, on a split."""

from pathlib import Path
from typing import Any

from rich.console import Console

from fedtalos.app.config.files import override
from fedtalos.app.config.schema import RUN_CONFIGS, CentralizedConfig, RunConfig
from fedtalos.app.config.tools import EvaluateConfig
from fedtalos.app.load import load
from fedtalos.app.run.display import say
from fedtalos.app.run.paths import RunPaths
from fedtalos.app.run.resume import from_here, working_folder
from fedtalos.checkpoint import find_checkpoint, load_checkpoint
from fedtalos.errors import InputError
from fedtalos.notes import noted
from fedtalos.training.evaluation import evaluate

WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
"""Endings of files that hold weights alone."""


def run(config: EvaluateConfig, console: Console) -> None:
    """Print what the model reaches on the split: on its run's images, or the data set's, as many as asked for."""
    if config.which != "last" and config.checkpoint.suffix == ".json":
        raise InputError(
            f"--which {config.which}: {config.checkpoint} is one checkpoint already; leave one of them out"
        )
    path, asked = of_weights(config) if is_weights(config) else of_run(config)
    loaded = load(asked)
    for what, sentence in noted().items():
        say(console, f"{what}: {sentence}")
    metrics = evaluate(
        loaded.model,
        loaded.limited(config.split),
        batch_size=loaded.config.data.eval_batch_size,
        precision=loaded.config.run.arithmetic,
    )
    say(
        console,
        f"{path}: {config.split} loss {metrics.loss:.4f}, accuracy {100 * metrics.accuracy:.2f} % "
        f"({metrics.correct} of {metrics.examples})",
    )


def is_weights(config: EvaluateConfig) -> bool:
    """Tell whether a file of weights alone is meant, not a run: one by its ending, unless it is a checkpoint's."""
    path = config.checkpoint
    return path.suffix in WEIGHTS and path.is_file() and not path.name.startswith(("last-", "best-"))


def of_run(config: EvaluateConfig) -> tuple[Path, RunConfig]:
    """The checkpoint of a run, and the options to load it with; its data are looked for where the run had them."""
    path = find_checkpoint(config.checkpoint, config.output_dir / "checkpoints", config.which)
    facts = load_checkpoint(path).facts
    if facts.get("command") not in ("centralized", "federated"):
        raise InputError(f"checkpoint {path}: holds no trained model (it is of `{facts.get('command')}`)")
    if not isinstance(options := facts.get("options"), dict):
        raise InputError(f"checkpoint {path}: is of another version; give another")
    at = path.resolve()
    place = working_folder(RunPaths(at.parent.parent.parent, at.parent.name))
    changes = {**_given(config), "weights": str(path), "mask": None, "precision": "auto"}
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
