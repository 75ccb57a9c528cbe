"""A node: answers the server's letters from its own images, and keeps on disk what a client keeps between rounds."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from fedtalos._version import __version__
from fedtalos.app.config.fleet import FleetNodeConfig
from fedtalos.errors import InputError, TrainingError
from fedtalos.files import write_atomic
from fedtalos.fleet.calibration import scores_of_client
from fedtalos.fleet.frozen import sha256
from fedtalos.fleet.letter import Letter, fact, vector
from fedtalos.fleet.questions import evaluate, sums_for_head, weights_for_merging
from fedtalos.fleet.task import Task, begin_task
from fedtalos.fleet.wire import pack
from fedtalos.training.federated.fedavg import Lost, checked, one_by_one


class Node:
    """Answers letters, one at a time: "hello", "begin", and the work that its options admit.

    ``state`` is a folder of its own. By run it keeps there what the server sent once and what the client's updates
    lost on the wire, so that a node that was killed goes on as if nothing had been. ``note`` is told what is refused.

    >>> node = Node(options, Path("state/client_0"))
    >>> node.answer(Letter("hello")).facts["client"]
    0
    """

    def __init__(self, options: FleetNodeConfig, state: Path, note: Callable[[str], None] = lambda _: None) -> None:
        self.options, self.state, self._note = options, state, note
        self._task: tuple[str, Task] | None = None
        self._work: dict[str, Callable[[Task, Letter], Letter]] = {
            "train": self._train,
            "evaluate": evaluate,
            "head": sums_for_head,
            "score": scores_of_client,
            "weigh": weights_for_merging,
        }

    def answer(self, letter: Letter) -> Letter:
        """Do what a letter asks for; what cannot be done is answered by "refused" and the reason."""
        try:
            match letter.kind:
                case "hello":
                    return Letter("hello", {"client": self.options.client, "version": __version__})
                case "begin":
                    return self._begin(letter)
                case work if work in self._work and work in self.options.admit:
                    return self._at_work(letter)
                case other:
                    admitted = ", ".join(self.options.admit)
                    raise InputError(f"this node does not admit {other!r}; it admits {admitted}")
        except (InputError, TrainingError, OSError) as error:  # a full disk, say
            self._note(f"refused {letter.kind!r}: {error}")
            return Letter("refused", {"why": str(error)})

    def _begin(self, letter: Letter) -> Letter:
        """Make ready for a run; the answer is "begun", or "need" where the model's frozen part is not here yet."""
        name = self._checksum(fact(letter, "still", str))
        path = self.state / "models" / f"{name}.safetensors"
        sent = letter.arrays.get("still")
        if sent is not None:
            if sha256(sent.tobytes()) != name:
                raise InputError("the model came damaged")
            write_atomic(path, sent.tobytes())
        if not path.is_file():
            return Letter("need", {"still": name})
        task = begin_task(letter, path.read_bytes(), self.options, self.state)
        run = sha256(letter.heading.encode())
        write_atomic(self.state / "runs" / f"{run}.json", letter.heading)
        self._task = run, task
        return Letter("begun", {"run": run, "images": task.images, **task.classes})

    def _at_work(self, letter: Letter) -> Letter:
        run = self._checksum(fact(letter, "run", str))
        if self._task is None or self._task[0] != run:
            path = self.state / "runs" / f"{run}.json"
            if not path.is_file():
                return Letter("unprepared")
            begun = self._begin(Letter.of(path.read_text(encoding="utf-8", errors="replace"), {}))
            if begun.kind != "begun":
                return Letter("unprepared")
        assert self._task is not None
        return self._work[letter.kind](self._task[1], letter)

    def _train(self, task: Task, letter: Letter) -> Letter:
        """Train the client from theta on for a round."""
        moving, seed = task.moving, task.loaded.config.run.seed
        theta = torch.from_numpy(np.array(vector(letter, "theta", len(moving))))
        said = vector(letter, "message", len(moving)) if "message" in letter.arrays else None
        message = None if said is None else torch.from_numpy(np.array(said)).to(moving.device)
        moving.write(theta.to(moving.device))
        start = moving.copy()
        engine = one_by_one(moving, task.clients, task.local, seed, task.algorithm, message=lambda _: message)
        (_, answer), *_ = engine(fact(letter, "round", int), [task.client], start)
        update = checked(answer, start, finite=True)
        if isinstance(update, Lost):
            return Letter("lost", {"why": update.why, "sent": update.sent})
        arrays, lost = pack(fact(letter, "wire", str), moving.vector().cpu(), theta, self._residual(letter))
        if lost is not None:
            write_atomic(self._residual_path(letter), save({"lost": lost}))
        if update.reply is not None:
            arrays["reply"] = update.reply.cpu().numpy()
        figures = update.metrics
        facts = {"loss_sum": figures.loss_sum, "correct": figures.correct, "examples": figures.examples}
        return Letter("update", facts, arrays)

    def _residual(self, letter: Letter) -> Tensor | None:
        """Everything that the wire lost of the client's updates to this run so far."""
        path = self._residual_path(letter)
        return load_file(path)["lost"] if path.is_file() else None

    def _residual_path(self, letter: Letter) -> Path:
        return self.state / "runs" / f"{letter.facts['run']}.lost.safetensors"

    @staticmethod
    def _checksum(text: str) -> str:
        if not re.fullmatch("[0-9a-f]{64}", text):
            raise InputError("expected a SHA-256 checksum")
        return text
