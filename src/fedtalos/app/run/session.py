"""A training run from its first row to its summary: records, checkpoints, resuming, the final test.

Centralized and federated share it: an epoch is a round without clients.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from rich.console import Console
from torch import Tensor

from fedtalos.app.config.files import flatten
from fedtalos.app.config.schema import CentralizedConfig, FederatedConfig
from fedtalos.app.load import Loaded
from fedtalos.app.report.mistakes import MOST_CLASSES, classes_of
from fedtalos.app.run.bars import bar
from fedtalos.app.run.beginning import introduction
from fedtalos.app.run.display import Display, say, say_facts
from fedtalos.app.run.ending import Reached, say_end, stopped_early, what_to_try
from fedtalos.app.run.energy import EnergyMeter
from fedtalos.app.run.folders import open_run, say_decisions
from fedtalos.app.run.interruption import Interrupted, deferred, with_safe_points
from fedtalos.app.run.paths import RunPaths
from fedtalos.app.run.progress import Progress, Saved
from fedtalos.app.run.recorder import Recorder, write_yaml
from fedtalos.app.run.resume import check_goes_on
from fedtalos.app.run.start import Start
from fedtalos.app.run.trackers import open_tracker
from fedtalos.app.run.units import percent
from fedtalos.checkpoint import load_checkpoint, save_checkpoint, tensors_under
from fedtalos.data.class_names import check_same_classes
from fedtalos.errors import InputError, TrainingError
from fedtalos.metrics import Metrics
from fedtalos.models.weights.checkpoints import model_facts
from fedtalos.training.confusion import Confusion, confusion
from fedtalos.training.editing.vector_file import save_vector
from fedtalos.training.entries import named_tensors
from fedtalos.training.federated.clients import Clients
from fedtalos.training.federated.fedavg import FedAvg, Round
from fedtalos.training.federated.processes import WorkerLostError
from fedtalos.training.loop import Batches
from fedtalos.training.masked_parameters import MaskedParameters

Found = TypeVar("Found")
ALGORITHM = "algorithm/"
"""Prefix of an algorithm's state in checkpoints."""
Evaluate = Callable[[str], Metrics]
"""Split -> metrics of the model as it is."""


class Session:
    """Keeps a run's books: config.yaml, rows, checkpoints and display, then the test, once, and the summary.

    Where there is a checkpoint the run goes on from it: the model is restored when the block begins, and ``saved`` has
    the other tensors. ``state`` gives the tensors that checkpoints hold beside the model's. A run that is stopped while
    its rounds are shown is saved when the block ends.

        with Session(loaded, paths, console, unit="round", total=100, rate=lambda _: 0.1) as session:
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
        self.energy = EnergyMeter(loaded.device)
        self.state: Callable[[], dict[str, Tensor]] = dict
        self.start: Start | None = None
        self.to_try = ""
        self._showing = False
        self._validated_now: Metrics | None = None
        self._advance: Callable[[int], None] = lambda _count: None

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
        keep_to = None if self.fresh else {"train": self.progress.done, "val": self.progress.validated}
        self.recorder = Recorder(self.paths.results, self.unit, keep_to=keep_to, seconds=self.progress.seconds)
        tracker = open_tracker(self.config.run.tracker, self.paths, flatten(self.config))
        if tracker is not None:
            self.recorder.track(tracker)
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
        saved = checkpoint.stated(Saved, "start a run of another name")
        check_goes_on(saved, self.config, self.paths, self.total)
        self.progress = saved.progress
        self._restore(checkpoint.tensors)
        self.saved = checkpoint.tensors

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        """Load a checkpoint's model tensors."""
        for name, tensor in named_tensors(self.model).items():
            found = tensors.get(name)
            if found is None or found.shape != tensor.shape or not found.is_floating_point():
                raise InputError(f"the checkpoint's {name} is not this model's; start a run of another name")
            tensor.copy_(found)

    def restored(self, prefix: str, sizes: int | Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Tensors that the checkpoint holds under ``prefix``, on the model's device.

        Raises InputError where they are not of so many entries each, or not those of these names and shapes.
        """
        names = [name.removeprefix(prefix) for name in self.saved if name.startswith(prefix)]
        shapes = dict.fromkeys(names, (sizes,)) if isinstance(sizes, int) else sizes
        found = tensors_under(self.saved, prefix, shapes)
        return {name: tensor.to(self.loaded.device) for name, tensor in found.items()}

    def introduce(
        self, moving: MaskedParameters, clients: Clients | None = None, algorithm: FedAvg | None = None
    ) -> None:
        """Say what the run is: device, data, clients, model, what moves and is sent; and how far it is."""
        self.to_try = what_to_try(self.config, moving)
        facts = introduction(self.loaded, moving, clients, algorithm)
        if not self.fresh:
            best = f", best on validation {percent(self.progress.best_accuracy)}" if self.progress.best else ""
            facts["so far"] = f"{self.unit} {self.done} of {self.total}{best}"
        say_facts(self.console, facts)

    def keep_start(self, moving: MaskedParameters) -> None:
        """Keep what the run starts from, first head included, where its vector is asked for."""
        if self.config.train.save_vector:
            self.start = Start(moving, self.saved)

    def keep_algorithm(self, algorithm: FedAvg, moving: int) -> None:
        """Give an algorithm the state that the checkpoint holds, and keep it there; ``moving`` parameters move."""
        algorithm.state |= self.restored(ALGORITHM, moving)
        self.state = lambda: {f"{ALGORITHM}{name}": tensor for name, tensor in algorithm.state.items()}

    def watch(self, batches: Batches, share: float) -> Batches:
        """Pass batches on, each with a safe point before it, and advance the display by their share of a round."""
        return self.display.watch(with_safe_points(batches), share)

    def evaluating(self, batches: Batches) -> Batches:
        """Pass batches of an evaluation on, each with a safe point before it, and show how far it is."""
        for batch in with_safe_points(batches):
            yield batch
            self._advance(len(batch[1]))

    @property
    def enough(self) -> bool:
        """True where --early_stop ends the run: so many validations brought nothing better."""
        patience = self.config.train.early_stop
        return patience is not None and self.progress.stale >= patience

    def shown(self, rounds: Iterator[Round]) -> Iterator[Round]:
        """Pass rounds on, until it is enough, while the display shows them; the process stops at safe points only."""
        say_decisions(self.paths, self.console)  # those of the first head, say
        self.display = Display(self.console, self.unit, self.total, self.progress.done)
        self.display.__enter__()
        self._showing = True
        with deferred():
            for round_ in () if self.enough else rounds:
                self.progress.done = round_.number
                self._validated_now = None
                yield round_
                self.display.finished(round_.number, round_.train, self._validated_now)
                if self.enough:
                    break
        self._showing = False  # what comes now changes the model, so it is not to be saved where it is stopped
        self.display.__exit__(None, None, None)

    def record(self, round_: Round, bytes_down: int = 0, bytes_up: int = 0) -> None:
        """Write the row of a round's training, and count what it sent and whom it lost."""
        progress = self.progress
        progress.count(bytes_down, bytes_up)
        progress.images += round_.train.examples
        self._row("train", round_.train, self.rate(round_.number - 1))
        for client, lost in round_.lost.items():
            why = "bad update" if lost.sent else lost.why
            progress.left_out[why] = progress.left_out.get(why, 0) + 1
            if lost.sent:
                self.display.note(f"round {round_.number}, client {client} left out: {lost.why}")
        if round_.too_few:
            count = len(round_.clients) - len(round_.lost)
            progress.left_out["too few"] = progress.left_out.get("too few", 0) + count
            self.display.note(f"{round_.too_few}; nothing of this round was kept")

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
            say(self.console, f"start: validation accuracy {percent(metrics.accuracy)}")
        progress.stale += 1
        if metrics.accuracy > progress.best_accuracy:
            progress.best, progress.best_accuracy, progress.stale = progress.done, metrics.accuracy, 0
            self._checkpoint("best", named_tensors(self.model))
        self.save()
        self._validated_now = metrics
        return metrics

    def save(self) -> None:
        """Write the checkpoint that the run goes on from."""
        start = {} if self.start is None else self.start.tensors()
        self._checkpoint("last", named_tensors(self.model) | self.state() | start)

    def finish(self, evaluate: Evaluate, extra: Mapping[str, Any]) -> None:
        """Read the test split, with the last and the best-on-validation model; draw, write and print the summary.

        The summary is written last: a run that has one is finished.
        """
        progress = self.progress
        if self.start is not None:
            vector = self.start.vector(self.loaded.data.classes, f"{self.config.command} {self.paths.name}")
            save_vector(self.paths.vector, vector)
            extra = {**extra, "vector": str(self.paths.vector)}
        answers, last, best = self._tested(evaluate)
        self._row("test", last)
        energy = self.energy.read() if self.fresh else {}  # of a run that went on, the first part is not known
        summary = {
            "command": self.config.command,
            **progress.summary(self.unit, last, best, self.recorder.seconds, energy),
            **extra,
        }
        say_decisions(self.paths, self.console)  # before the summary, which ends the run
        drawn = self._drawn(summary, answers)
        write_yaml(self.paths.results / "summary.yaml", summary)
        if self.enough and progress.done < self.total:
            say(self.console, stopped_early(progress, self.unit, self.total))
        reached = {
            "validation": Reached(progress.val_accuracy, progress.best_accuracy, len(self.loaded.limited("val"))),
            "test": Reached(last.accuracy, best.accuracy, last.examples),
        }
        kept = [] if self.start is None else [self.paths.vector]
        files = [self.paths.results, self.paths.checkpoints, *kept, *drawn]
        say_end(self.console, self.paths, summary, reached, files, progress, self.unit, self.to_try)

    def _tested(self, evaluate: Evaluate) -> tuple[Confusion | None, Metrics, Metrics]:
        """Read the test split: answers of the last model where classes are few, its metrics, and the best model's."""
        few = len(self.loaded.data.classes) <= MOST_CLASSES
        answers = self._timed(self._answers_to, "test") if few else None
        last = best = self._timed(evaluate, "test") if answers is None else answers.metrics
        if self.progress.best != self.progress.done:
            self._restore(load_checkpoint(self.paths.checkpoints / "best.json").tensors)
            best = self._timed(evaluate, "test")
        return answers, last, best

    def _drawn(self, summary: Mapping[str, Any], answers: Confusion | None) -> list[Path]:
        """Draw the run's figures and its page; return the files."""
        from fedtalos.app.figures import draw  # slow to import, and no part of the run's seconds
        from fedtalos.app.report import contents, page

        drawn = draw.plot_run(self.paths.results, self.paths.plots)
        images, names = self.loaded.limited("test"), self.loaded.data.classes
        classes = None if answers is None else classes_of(answers, images, names, "test")
        report = contents.report_of([contents.read_records(self.paths, summary)], classes)
        return [*drawn, page.write_report(self.paths.plots / "report.html", report)]

    def _answers_to(self, split: str) -> Confusion:
        """Let the model answer to a split; the metrics are those of ``evaluate``, to the byte."""
        images, config = self.loaded.limited(split), self.config
        size, precision = config.data.eval_batch_size, config.run.arithmetic
        return confusion(self.model, images, batch_size=size, precision=precision, watch=self.evaluating)

    def _timed(self, evaluate: Callable[[str], Found], split: str) -> Found:
        start, images = time.perf_counter(), len(self.loaded.limited(split))
        what = {"val": "validating", "test": "testing"}.get(split, split)
        shown = self.display.step(what, images) if self._showing else bar(what, images, "images")
        with shown as self._advance:
            found = evaluate(split)
        self.progress.evaluation_seconds += time.perf_counter() - start
        return found

    def _row(self, split: str, metrics: Metrics, rate: float | None = None) -> None:
        progress = self.progress
        self.energy.read()
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
            **model_facts(self.model, self.loaded.data.classes),
            "command": self.config.command,
            "options": flatten(self.config),
            "progress": asdict(self.progress),
        }
        save_checkpoint(self.paths.checkpoints, name, self.progress.done, tensors, facts)
