"""A run's trained model, opened to be used: with its classes, and the run's records where they are there."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtalos.app.config.files import read_yaml
from fedtalos.app.config.schema import RUN_CONFIGS, CentralizedConfig, FederatedConfig
from fedtalos.app.run.paths import RunPaths
from fedtalos.checkpoint import find_checkpoint, load_checkpoint
from fedtalos.errors import InputError
from fedtalos.models.backbone import Backbone
from fedtalos.training.loading import load_trained


@dataclass(frozen=True)
class TrainedRun:
    """A checkpoint's model and classes, and what is known of the run that made it."""

    path: Path
    """The checkpoint's JSON file."""
    model: Backbone
    classes: tuple[str, ...]
    options: dict[str, Any]
    """Options of the run, by name."""
    progress: dict[str, Any]
    """Counts at the checkpoint: rounds or epochs done, bytes sent, accuracies."""
    command: str
    summary: dict[str, Any]
    """The run's summary.yaml; empty where it is not finished, or was left elsewhere."""
    record: dict[str, Any]
    """The run's config.yaml; empty where it was left elsewhere."""

    @property
    def federated(self) -> bool:
        """True where clients trained it, in rounds."""
        return issubclass(RUN_CONFIGS.get(self.command, CentralizedConfig), FederatedConfig)

    @property
    def paths(self) -> RunPaths:
        """Folders of the run, by where its checkpoint lies."""
        return paths_of(self.path)

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.paths.name


def open_trained(run: Path, output_dir: Path, which: str, device: str = "cpu") -> TrainedRun:
    """Find a run's checkpoint and load its model.

    Raises InputError where there is none, and where ``which`` is asked of a file that is one checkpoint already.

    >>> open_trained(Path("my_run"), Path(), "last").classes
    ('cat', 'dog')
    """
    check_which(run, which)
    path = find_checkpoint(run, output_dir / "checkpoints", which)
    model, classes = load_trained(path, device=device)
    facts, paths = load_checkpoint(path).facts, paths_of(path)
    return TrainedRun(
        path,
        model,
        classes,
        options=_mapping(facts.get("options")),
        progress=_mapping(facts.get("progress")),
        command=str(facts.get("command")),
        summary=_read(paths.results / "summary.yaml"),
        record=_read(paths.config),
    )


def check_which(run: Path, which: str) -> None:
    """Refuse, with an InputError, to choose among the checkpoints of what is one already."""
    if which != "last" and run.suffix == ".json":
        raise InputError(f"--which {which}: {run} is one checkpoint already; leave one of them out")


def paths_of(checkpoint: Path) -> RunPaths:
    """Folders of the run that a checkpoint is of: it lies under ROOT/checkpoints/RUN."""
    at = checkpoint.resolve()
    return RunPaths(at.parents[2], at.parent.name)


def _read(path: Path) -> dict[str, Any]:
    return read_yaml(path) if path.is_file() else {}


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
