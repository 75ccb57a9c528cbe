"""A training run from its first row to its summary: records, checkpoints, resuming, the final test.

Centralized and federated share it: an epoch is a round without clients.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, Self

import yaml
from rich.console import Console
from torch import Tensor

from fedtalos.app.config.files import FileError, flatten
from fedtalos.app.config.schema import CentralizedConfig, FederatedConfig
from fedtalos.app.load import Loaded
from fedtalos.app.run.display import Display, say
from fedtalos.app.run.folders import open_run, say_decisions
from fedtalos.app.run.interruption import Interrupted, deferred, with_safe_points
from fedtalos.app.run.paths import RunPaths
from fedtalos.app.run.recorder import Recorder, TensorBoardTracker, WandbTracker, write_yaml
from fedtalos.app.run.resume import differing, from_here, working_folder
from fedtalos.checkpoint import load_checkpoint, save_checkpoint
from fedtalos.data.class_names import check_same_classes
from fedtalos.errors import InputError, TrainingError
from fedtalos.metrics import Metrics
from fedtalos.training.entries import named_tensors
from fedtalos.training.federated.fedavg import Round
from fedtalos.training.federated.processes import WorkerLostError
from fedtalos.training.loop import Batches

Evaluate = Callable[[str], Metrics]
"""Split -> metrics of the model as it is."""


@dataclass
class Progress:
    """Progress of a run; saved in every checkpoint, so that a resumed run goes on from there."""

    done: int = 0
    best: int = 0
    best_accuracy: float = -1.0
    val_accuracy: float = -1.0
    start_accuracy: float = -1.0
    """On validation, before anything moved; -1 where it was not measured."""
    bytes_down: int = 0
    bytes_up: int = 0
    images: int = 0
    seconds: float = 0.0
    evaluation_seconds: float = 0.0
    validated: int = -1
    epoch_so_far: Metrics = field(default_factory=Metrics)
    """Figures of an epoch within which the run was stopped."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Count of sampled clients that did not count, by why."""


class Session:
    """Keeps a run's books: config.yaml, rows, checkpoints and display, then the test, once, and the summary.

    Where there is a checkpoint the run goes on from it: the model is restored when the block begins, and ``saved`` has
    the other tensors. ``state`` gives the tensors that checkpoints hold beside the model's. A run that is stopped while
    its rounds are shown is saved when the block ends.

        with Session(loaded, paths, console, unit="round", total=100) as session:
            for round in session.shown(rounds):
                session.record(round)
                if session.due(round.number):
                    session.validate(evaluate)
            session.finish(evaluate)
    """

    def __init__(
        self,
        loaded: Loaded[CentralizedConfig] | Loaded[FederatedConfig],
        paths: RunPaths,
        console: Console,
        *,
        unit: str,
        total: int,
        rate: Callable[[float], float],
    ) -> None:
        """``rate`` is the learning rate after so many ``unit``s, of which there are ``total``."""
        self.loaded, self.paths, self.console = loaded, paths, console
        self.config, self.model = loaded.config, loaded.model
        self.unit, self.total, self.rate = unit, total, rate
        self.progress, self.saved = Progress(), dict[str, Tensor]()
        self.state: Callable[[], dict[str, Tensor]] = dict
        self._showing = False
        self._validated_now: Metrics | None = None

    @property
    def fresh(self) -> bool:
        """True where the run begins now: there is no checkpoint yet."""
        return not self.saved

    @property
    def done(self) -> int:
        """Rounds, or epochs, done."""
        return self.progress.done

    def __enter__(self) -> Self:
        try:
            open_run(self.config, self.paths, self.loaded.origin(), self.console)
        except InputError:
            self._check_classes()  # says more, where it is they that changed
            raise
        self._resume()
        keep_to = -1 if self.fresh else self.progress.done
        self.recorder = Recorder(self.paths.results, self.unit, keep_to=keep_to, seconds=self.progress.seconds)
        if self.config.run.tracker == "tensorboard":
            self.recorder.track(TensorBoardTracker(self.paths.results / "tensorboard"))
        elif self.config.run.tracker == "wandb":
            self.recorder.track(WandbTracker(self.paths.results, flatten(self.config)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._showing:
            self.display.__exit__(kind, error, at)
            if kind is not None and issubclass(kind, Interrupted | WorkerLostError):
                self.save()  # the last whole round, or the epoch as far as it came
        self.recorder.close()

    def _check_classes(self) -> None:
        path = self.paths.checkpoints / "last.json"
        classes = load_checkpoint(path).facts.get("classes") if path.exists() else None
        if isinstance(classes, list | tuple):
            check_same_classes(list(map(str, classes)), self.loaded.data.classes, f"--resume: {path}")

    def _resume(self) -> None:
        path = self.paths.checkpoints / "last.json"
        if not path.exists():
            return
        checkpoint = load_checkpoint(path)
        try:
            saved, options = checkpoint.facts["progress"], checkpoint.facts["options"]
            self.progress = Progress(**{**saved, "epoch_so_far": Metrics(**saved["epoch_so_far"])})
            known = flatten(type(self.config)())
            if not set(options) <= known.keys():
                raise KeyError("options of a later version")
            options = known | options  # an earlier version may have had fewer options
            was = from_here(options, self.config.command, working_folder(self.paths))
            differs = differing(was, self.config)
        except (KeyError, TypeError) as error:
            raise InputError(f"checkpoint {path}: is of another version; start a run of another name") from error
        if differs:
            was = options[differs[0]]
            raise FileError(
                f"{self.paths.config}: {differs[0]} was {was!r} when the checkpoint was saved; put that back"
            )
        self._restore(checkpoint.tensors)
        self.saved = checkpoint.tensors

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        """Load a checkpoint's model tensors."""
        for name, tensor in named_tensors(self.model).items():
            if name not in tensors or tensors[name].shape != tensor.shape:
                raise InputError(f"the checkpoint's {name} is not this model's; start a run of another name")
            tensor.copy_(tensors[name])

    def restored(self, prefix: str) -> dict[str, Tensor]:
        """Tensors that the checkpoint holds under ``prefix``, on the model's device."""
        return {
            name.removeprefix(prefix): tensor.to(self.loaded.device)
            for name, tensor in self.saved.items()
            if name.startswith(prefix)
        }

    def watch(self, batches: Batches, share: float) -> Batches:
        """Pass batches on, each with a safe point before it, and advance the display by their share of a round."""
        return self.display.watch(with_safe_points(batches), share)

    def shown(self, rounds: Iterator[Round]) -> Iterator[Round]:
        """Pass rounds on while the display shows them; the process stops at safe points only."""
        say_decisions(self.paths, self.console)  # those of the first head, say
        self.display = Display(self.console, self.unit, self.total, self.progress.done)
        self.display.__enter__()
        self._showing = True
        with deferred():
            for round_ in rounds:
                self.progress.done = round_.number
                self._validated_now = None
                yield round_
                self.display.finished(round_.number, round_.train, self._validated_now)

    def record(self, round_: Round, bytes_down: int = 0, bytes_up: int = 0) -> None:
        """Write the row of a round's training, and count what it sent and whom it lost."""
        progress = self.progress
        progress.bytes_down += bytes_down
        progress.bytes_up += bytes_up
        progress.images += round_.train.examples
        self._row("train", round_.train, self.rate(round_.number - 1))
        for client, lost in round_.lost.items():
            why = "bad update" if lost.sent else lost.why
            progress.left_out[why] = progress.left_out.get(why, 0) + 1
            if lost.sent:
                self.display.note(f"round {round_.number}, client {client} left out: {lost.why}")

    def due(self, number: int) -> bool:
        """Tell whether the run is to be validated after so many rounds or epochs, and is not yet."""
        every = self.config.train.eval_every or 1
        return self.progress.validated != number and (number % every == 0 or number == self.total)

    def validate(self, evaluate: Evaluate) -> Metrics:
        """Evaluate the validation split, keep the best model, and save.

        Raises TrainingError for a loss that is not finite.
        """
        progress = self.progress
        metrics = self._timed(evaluate, "val")
        if not math.isfinite(metrics.loss):
            raise TrainingError(
                f"{self.unit} {progress.done}: the validation loss became {metrics.loss}; the checkpoint before it is "
                "kept; start a run with a lower --learning_rate"
            )
        self._row("val", metrics)
        progress.validated, progress.val_accuracy = progress.done, metrics.accuracy
        if progress.done == 0:
            progress.start_accuracy = metrics.accuracy
        if metrics.accuracy > progress.best_accuracy:
            progress.best, progress.best_accuracy = progress.done, metrics.accuracy
            self._checkpoint("best", named_tensors(self.model))
        self.save()
        self._validated_now = metrics
        return metrics

    def save(self) -> None:
        """Write the checkpoint that the run goes on from."""
        self._checkpoint("last", named_tensors(self.model) | self.state())

    def finish(self, evaluate: Evaluate, extra: Mapping[str, Any]) -> None:
        """Read the test split, with the last and the best-on-validation model; write, draw and print the summary."""
        progress = self.progress
        last = self._timed(evaluate, "test")
        best = last
        if progress.best != progress.done:
            self._restore(load_checkpoint(self.paths.checkpoints / "best.json").tensors)
            best = self._timed(evaluate, "test")
        self._row("test", last)
        seconds = self.recorder.seconds
        summary = {
            "command": self.config.command,
            f"{self.unit}s": progress.done,
            "val_accuracy": {"last": _share(progress.val_accuracy), "best": _share(progress.best_accuracy)},
            "test_accuracy": {"last": _share(last.accuracy), "best_on_val": _share(best.accuracy)},
            "test_loss": {"last": _share(last.loss), "best_on_val": _share(best.loss)},
            f"best_{self.unit}": progress.best,
            "images_trained_on": progress.images,
            **extra,
            "seconds": round(seconds, 2),
            "evaluation_share": _share(progress.evaluation_seconds / seconds),
        }
        write_yaml(self.paths.results / "summary.yaml", summary)
        self._showing = False
        from fedtalos.app.figures import draw  # slow to import, and no part of the run's seconds

        drawn = draw.plot_run(self.paths.results, self.paths.plots)
        say(self.console, yaml.safe_dump(summary, sort_keys=False).rstrip())
        for path in [self.paths.results, self.paths.checkpoints, *drawn]:
            say(self.console, str(path))
        self._warn_of_loss()

    def _warn_of_loss(self) -> None:
        """Say so where training made the model worse, and what to try."""
        progress = self.progress
        if progress.start_accuracy < 0 or progress.done == 0:
            return
        if progress.val_accuracy < progress.start_accuracy or progress.best == 0:
            say(
                self.console,
                f"training did not help: validation accuracy was {100 * progress.start_accuracy:.1f} % at the start, "
                f"and is {100 * progress.val_accuracy:.1f} % at the end (best: {self.unit} {progress.best}); "
                "try a lower --learning_rate, --freeze_head, or fewer steps between rounds",
            )

    def _timed(self, evaluate: Evaluate, split: str) -> Metrics:
        start = time.perf_counter()
        metrics = evaluate(split)
        self.progress.evaluation_seconds += time.perf_counter() - start
        return metrics

    def _row(self, split: str, metrics: Metrics, rate: float | None = None) -> None:
        progress = self.progress
        self.recorder.record(
            progress.done,
            split,
            metrics,
            learning_rate=rate,
            bytes_down=progress.bytes_down,
            bytes_up=progress.bytes_up,
        )

    def _checkpoint(self, name: str, tensors: dict[str, Tensor]) -> None:
        self.progress.seconds = self.recorder.seconds
        facts = {
            **self.loaded.facts(),
            "command": self.config.command,
            "options": flatten(self.config),
            "progress": asdict(self.progress),
        }
        save_checkpoint(self.paths.checkpoints, name, self.progress.done, tensors, facts)


def _share(value: float) -> float:
    return round(value, 6)
