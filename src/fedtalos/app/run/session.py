"""A training run from its first row to its summary: records, checkpoints, resuming, the final test.

What centralized and federated share: both hand `follow` a generator of rounds (an epoch is a round without clients).
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from fedtalos.app.config.files import flatten
from fedtalos.app.config.schema import CentralizedConfig, FederatedConfig
from fedtalos.app.run.display import Display
from fedtalos.app.run.folders import MAY_DIFFER, RunPaths
from fedtalos.app.run.interruption import Interrupted, deferred
from fedtalos.app.run.recorder import Recorder, TensorBoardTracker, WandbTracker, write_yaml
from fedtalos.app.setup import Setup
from fedtalos.checkpoint import load_checkpoint, save_checkpoint
from fedtalos.errors import InputError
from fedtalos.metrics import Metrics
from fedtalos.training.federated.fedavg import Round
from fedtalos.training.federated.processes import WorkerLostError
from fedtalos.training.loop import TrainingError
from fedtalos.training.masked_parameters import named_tensors


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
    evaluation_seconds: float = 0.0
    validated: int = -1
    epoch_so_far: Metrics = field(default_factory=Metrics)
    """Of an epoch within which the run was stopped."""
    left_out: dict[str, int] = field(default_factory=dict)
    """How often clients that were sampled did not count, by why."""


def resume(
    config: CentralizedConfig | FederatedConfig, paths: RunPaths, setup: Setup
) -> tuple[Progress, dict[str, Tensor]]:
    """Where the last checkpoint stands, and its tensors, the model's in place; a fresh start where there is none."""
    path = paths.checkpoints / "last.json"
    if not path.exists():
        return Progress(), {}
    checkpoint = load_checkpoint(path)
    try:
        saved, options = checkpoint.facts["progress"], checkpoint.facts["options"]
        progress = Progress(**{**saved, "epoch_so_far": Metrics(**saved["epoch_so_far"])})
        differs = [key for key, now in flatten(config).items() if key not in MAY_DIFFER and options[key] != now]
    except (KeyError, TypeError) as error:
        raise InputError(f"checkpoint {path}: is of another version; start a run of another name") from error
    if differs:
        was = options[differs[0]]
        raise InputError(f"{paths.config}: {differs[0]} was {was!r} when the checkpoint was saved; put that back")
    restore_model(setup, checkpoint.tensors)
    return progress, checkpoint.tensors


def restore_model(setup: Setup, tensors: dict[str, Tensor]) -> None:
    """Load a checkpoint's model tensors into the resident model."""
    for name, tensor in named_tensors(setup.model).items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise InputError(f"the checkpoint's {name} is not this model's; start a run of another name")
        tensor.copy_(tensors[name])


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
        evaluate: Callable[[str], Metrics],
        extra_tensors: Callable[[], dict[str, Tensor]] = dict,
    ) -> None:
        """``evaluate`` maps a split's name to metrics; ``extra_tensors`` is what checkpoints hold beside the model."""
        self.config, self.paths, self.setup, self.progress = config, paths, setup, progress
        self._unit, self._fresh = unit, fresh
        self._evaluate, self._extra_tensors = evaluate, extra_tensors
        keep_to = -1 if fresh else progress.done
        self.recorder = Recorder(paths.results, unit, keep_to=keep_to, seconds=progress.seconds)
        if config.run.tracker == "tensorboard":
            self.recorder.track(TensorBoardTracker(paths.results / "tensorboard"))
        elif config.run.tracker == "wandb":
            self.recorder.track(WandbTracker(paths.root, paths.name, flatten(config)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.recorder.close()

    def follow(
        self, rounds: Iterator[Round], total: int, learning_rate: Callable[[float], float], display: Display
    ) -> None:
        """Record, evaluate, checkpoint and show every round that the generator yields."""
        progress = self.progress
        try:
            with deferred():
                self._validate_if_due(total)
                for round_ in rounds:
                    progress.done = round_.number
                    progress.bytes_down += round_.bytes_down
                    progress.bytes_up += round_.bytes_up
                    progress.images += round_.train.examples
                    self._record(round_.number, "train", round_.train, learning_rate(round_.number - 1))
                    self._count_left_out(round_, display)
                    display.finished(round_.number, round_.train, self._validate_if_due(total))
        except (Interrupted, WorkerLostError):
            self._save()  # the last whole round, or the epoch as far as it came
            raise

    def _count_left_out(self, round_: Round, display: Display) -> None:
        for client, why in round_.bad.items():
            display.note(f"round {round_.number}, client {client} left out: {why}")
        for why in [*round_.absent.values(), *("bad update" for _ in round_.bad)]:
            self.progress.left_out[why] = self.progress.left_out.get(why, 0) + 1

    def _validate_if_due(self, total: int) -> Metrics | None:
        """Validate and save where the rounds done ask for it, and it is not done yet."""
        done, every = self.progress.done, self.config.train.eval_every
        assert every is not None
        if self.progress.validated == done or not (done % every == 0 or done == total):
            return None
        metrics = self._validate(done)
        self._save()
        return metrics

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
        metrics = self._timed_evaluation("val")
        if not math.isfinite(metrics.loss):
            raise TrainingError(
                f"{self._unit} {number}: the validation loss became {metrics.loss}; the checkpoint before it is kept; "
                "start a run with a lower --learning_rate"
            )
        self._record(number, "val", metrics)
        self.progress.validated = number
        self.progress.val_accuracy = metrics.accuracy
        if metrics.accuracy > self.progress.best_accuracy:
            self.progress.best, self.progress.best_accuracy = number, metrics.accuracy
            self._checkpoint("best", named_tensors(self.setup.model))
        return metrics

    def _timed_evaluation(self, split: str) -> Metrics:
        start = time.perf_counter()
        metrics = self._evaluate(split)
        self.progress.evaluation_seconds += time.perf_counter() - start
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
        progress = self.progress
        last = self._timed_evaluation("test")
        best = last
        if progress.best != progress.done:
            restore_model(self.setup, load_checkpoint(self.paths.checkpoints / "best.json").tensors)
            best = self._timed_evaluation("test")
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
            **extra,
            "seconds": round(seconds, 2),
            "evaluation_share": _share(progress.evaluation_seconds / seconds),
        }
        write_yaml(self.paths.results / "summary.yaml", summary)
        return summary


def _share(value: float) -> float:
    return round(value, 6)
