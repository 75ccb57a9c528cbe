"""A run from its first row to its summary: folders, resuming, records, checkpoints, the final test.

What centralized and federated share: both hand `follow` a generator of rounds (an epoch is a round without clients).
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml
from torch import Tensor

from fedtalos.checkpoint import load_checkpoint, save_checkpoint
from fedtalos.config import CentralizedConfig, FederatedConfig, RunConfig
from fedtalos.config_files import flatten
from fedtalos.display import Display
from fedtalos.errors import InputError
from fedtalos.experiments.setup import Setup
from fedtalos.metrics import Metrics
from fedtalos.parameters import named_tensors
from fedtalos.recorder import Recorder, TensorBoardTracker, WandbTracker, made_by, write_yaml
from fedtalos.training.fedavg import Round

MAY_DIFFER = ("config", "preset", "run_name", "resume", "output_dir", "data_dir", "device", "tracker")


@dataclass(frozen=True)
class RunPaths:
    """The folders of one run."""

    root: Path
    name: str

    @property
    def results(self) -> Path:
        return self.root / "results" / self.name

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints" / self.name

    @property
    def plots(self) -> Path:
        return self.root / "plots" / self.name

    @property
    def mask(self) -> Path:
        return self.root / "masks" / f"{self.name}.safetensors"

    @property
    def head(self) -> Path:
        return self.root / "masks" / f"{self.name}.head.safetensors"

    @property
    def finished(self) -> bool:
        return (self.results / "summary.yaml").exists()


def choose_run(config: RunConfig) -> RunPaths:
    """The folders that this run writes to, or, with --resume, goes on in. Nothing is written yet.

    Raises InputError where the name is taken, is not a plain name, or there is nothing to resume.
    """
    options = config.run
    results = options.output_dir / "results"
    name = options.run_name
    if name is not None and (name in ("", ".", "..") or Path(name).name != name):
        raise InputError(f"--run_name {name!r}: expected a plain folder name")
    if options.resume and name is None:
        name = _newest_unfinished(results, config.command)
    paths = RunPaths(options.output_dir, name or f"{config.command}-{datetime.now():%Y%m%d-%H%M%S}")
    if options.resume and not (paths.results / "config.yaml").exists():
        raise InputError(f"--resume: no run {name!r} under {results}")
    if not options.resume and paths.results.exists():
        raise InputError(f"{paths.results} exists: add --resume to go on with it, or choose another --run_name")
    return paths


def _newest_unfinished(results: Path, command: str) -> str:
    configs = sorted(results.glob("*/config.yaml"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in configs:
        if not (path.parent / "summary.yaml").exists() and _saved_config(path).get("command") == command:
            return path.parent.name
    raise InputError(f"--resume: no unfinished {command} run under {results}; name one with --run_name")


def _saved_config(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise InputError(f"{path}: broken; choose another --run_name to start anew")
    return content


def open_run(config: RunConfig, paths: RunPaths) -> None:
    """Write config.yaml, or on --resume check that the resolved options are those of the run."""
    options = flatten(config)
    path = paths.results / "config.yaml"
    if config.run.resume:
        saved = _saved_config(path)
        for key, value in options.items():
            if key not in MAY_DIFFER and saved.get(key) != value:
                raise InputError(
                    f"--resume: {key} was {saved.get(key)!r} in {paths.name}, now {value!r}; "
                    "give the same, or start a run of another name"
                )
        return
    for folder in (paths.checkpoints, paths.plots):
        if folder.exists():
            raise InputError(f"{folder} exists but {paths.results} does not: move it away or choose another --run_name")
    options["run_name"] = paths.name
    write_yaml(path, {"command": config.command, **options, "made_by": made_by(config.run.device)})


@dataclass
class Progress:
    """Where a run stands; saved in every checkpoint, so that a resumed run goes on from there."""

    done: int = 0
    best: int = 0
    best_accuracy: float = -1.0
    val_accuracy: float = -1.0
    bytes_down: int = 0
    bytes_up: int = 0
    images: int = 0
    seconds: float = 0.0


def resume(paths: RunPaths, setup: Setup) -> tuple[Progress, dict[str, Tensor]]:
    """Where the last checkpoint stands, and its tensors, the model's in place; a fresh start where there is none."""
    path = paths.checkpoints / "last.json"
    if not path.exists():
        return Progress(), {}
    checkpoint = load_checkpoint(path)
    restore_model(setup, checkpoint.tensors)
    return Progress(**checkpoint.facts["progress"]), checkpoint.tensors


def restore_model(setup: Setup, tensors: dict[str, Tensor]) -> None:
    """Load a checkpoint's model tensors into the resident model."""
    setup.model.load_state_dict({name: tensor for name, tensor in tensors.items() if "/" not in name})


class Session:
    """Follows a run's rounds: rows, checkpoints and display, then the test, once, and the summary."""

    def __init__(
        self,
        config: CentralizedConfig | FederatedConfig,
        paths: RunPaths,
        setup: Setup,
        progress: Progress,
        *,
        unit: str,
        fresh: bool,
        extra_tensors: Callable[[], dict[str, Tensor]] = dict,
    ) -> None:
        """``extra_tensors`` gives what a checkpoint holds beside the model."""
        self.config, self.paths, self.setup, self.progress = config, paths, setup, progress
        self._unit, self._fresh, self._extra_tensors = unit, fresh, extra_tensors
        keep_to = -1 if fresh else progress.done
        self.recorder = Recorder(paths.results, unit, keep_to=keep_to, seconds=progress.seconds)
        if config.run.tracker == "tensorboard":
            self.recorder.track(TensorBoardTracker(paths.results / "tensorboard"))
        elif config.run.tracker == "wandb":
            self.recorder.track(WandbTracker(paths.root / "wandb", paths.name, flatten(config)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.recorder.close()

    def follow(
        self, rounds: Iterator[Round], total: int, learning_rate: Callable[[float], float], display: Display
    ) -> None:
        """Record, evaluate, checkpoint and show every round that the generator yields."""
        every = self.config.train.eval_every
        assert every is not None
        progress = self.progress
        if self._fresh:
            self._validate(0)
            self._save()
        for round_ in rounds:
            progress.done = round_.number
            progress.bytes_down += round_.bytes_down
            progress.bytes_up += round_.bytes_up
            progress.images += round_.train.examples
            self._record(round_.number, "train", round_.train, learning_rate(round_.number - 1))
            due = round_.number % every == 0 or round_.number == total
            validation = self._validate(round_.number) if due else None
            if due:
                self._save()
            display.finished(round_.number, round_.train, validation)

    def _record(self, number: int, split: str, metrics: Metrics, rate: float | None = None) -> None:
        self.recorder.record(
            number,
            split,
            metrics,
            learning_rate=rate,
            bytes_down=self.progress.bytes_down,
            bytes_up=self.progress.bytes_up,
        )

    def _validate(self, number: int) -> Metrics:
        metrics = self.setup.evaluate(self.setup.dataset.val)
        self._record(number, "val", metrics)
        self.progress.val_accuracy = metrics.accuracy
        if metrics.accuracy > self.progress.best_accuracy:
            self.progress.best, self.progress.best_accuracy = number, metrics.accuracy
            self._checkpoint("best", named_tensors(self.setup.model))
        return metrics

    def _save(self) -> None:
        self._checkpoint("last", named_tensors(self.setup.model) | self._extra_tensors())

    def _checkpoint(self, name: str, tensors: dict[str, Tensor]) -> None:
        self.progress.seconds = self.recorder.seconds
        facts = {
            **self.setup.facts(),
            "command": self.config.command,
            "options": flatten(self.config),
            "progress": asdict(self.progress),
        }
        save_checkpoint(self.paths.checkpoints, name, self.progress.done, tensors, facts)

    def finish(self, extra: dict[str, Any]) -> dict[str, Any]:
        """Read the test split, with the last and the best-on-validation model, and write the summary."""
        dataset, progress = self.setup.dataset, self.progress
        last = self.setup.evaluate(dataset.test)
        best = last
        if progress.best != progress.done:
            restore_model(self.setup, load_checkpoint(self.paths.checkpoints / "best.json").tensors)
            best = self.setup.evaluate(dataset.test)
        self._record(progress.done, "test", last)
        seconds = self.recorder.seconds
        summary = {
            "command": self.config.command,
            f"{self._unit}s": progress.done,
            "val_accuracy": {"last": _share(progress.val_accuracy), "best": _share(progress.best_accuracy)},
            "test_accuracy": {"last": _share(last.accuracy), "best_on_val": _share(best.accuracy)},
            "test_loss": {"last": _share(last.loss), "best_on_val": _share(best.loss)},
            f"best_{self._unit}": progress.best,
            "images_trained_on": progress.images,
            "megabytes_sent": {"down": round(progress.bytes_down / 1e6, 3), "up": round(progress.bytes_up / 1e6, 3)},
            "seconds": round(seconds, 2),
            **extra,
        }
        write_yaml(self.paths.results / "summary.yaml", summary)
        return summary


def _share(value: float) -> float:
    return round(value, 6)
