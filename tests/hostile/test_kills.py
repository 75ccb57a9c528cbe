"""Commands killed at any event of their files, any number of times: in the end the files are as if nothing had been.

SIGKILL leaves files as they are. So a copy of the folder, taken before a file is opened, renamed, unlinked or made and
after it is written, is what a kill there would leave, whole or torn. From every copy the same command goes on, of which
more copies are taken, until there are no new ones.
"""

import csv
import hashlib
import inspect
import io
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from commands import outcome
from matplotlib.figure import Figure

from fedtalos import files
from fedtalos.app.figures import draw, runs, sweeps
from fedtalos.app.run.folders import clean_up
from fedtalos.app.run.paths import RunPaths
from fedtalos.app.run.recorder import Recorder
from fedtalos.checkpoint import load_checkpoint, remove_replaced, save_checkpoint
from fedtalos.cli import main
from fedtalos.files import PART, remove_leftovers
from fedtalos.metrics import Metrics

SMALL = (
    "--dataset digits --model_size micro --image_size 8 --patch_size 4 --weights none --device cpu --precision fp32 "
    "--threads 1 --train_limit 24 --eval_limit 8 "
)
RUN = SMALL + "--run_name a[b] --resume_or_start "
COMMANDS = {
    "centralized": "centralized --num_epochs 2 --batch_size 12 --eval_every 1 --optimizer sgd " + RUN,
    "federated": "federated --num_rounds 2 --num_clients 2 --local_steps 1 --batch_size 4 --eval_every 1 --head ridge "
    "--client_evaluation " + RUN,
    "editing": "editing --num_iterations 2 --calibration_fraction 0.05 --calibration_images 8 " + RUN,
    "continual": "continual --tasks 2 --num_rounds 1 --num_clients 2 --local_steps 1 --batch_size 4 --head ridge "
    + RUN,
    "apart": "federated --one_shot --num_clients 2 --local_steps 1 --batch_size 4 --head ridge " + RUN,
}
GRID = """
small:
  options: {dataset: digits, model_size: micro, image_size: 8, patch_size: 4, weights: none, precision: fp32,
            train_limit: 24, eval_limit: 8, num_epochs: 1, batch_size: 12, eval_every: 1}
  grid: [{command: centralized, axes: {optimizer: [sgd, adamw]}}]
"""
WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.link", "os.symlink"}
CHANGES = ("ino", "size", "mtime_ns", "ctime_ns")
BOTH = "masks/both.safetensors"
STRANGER = "4194304"
"""Number of a process that there is not."""

NTH, PARTS = map(int, os.environ.get("KILLS_PART", "1/1").split("/"))
"""Which part of the states of an uninterrupted run the slow tests begin from, of how many: "1/8" to "8/8" are all."""

State = dict[str, bytes | None]
"""Content of each file, None of a folder, by path."""


class Watch:
    """Calls ``before`` when a file is about to change; hooks of Python's stay for good, so there is one for all."""

    before: Callable[[], None] | None = None

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.before is None or not (event in WRITES or (event == "open" and self.writes(*arguments))):
            return
        before, self.before = self.before, None
        try:
            before()
        finally:
            self.before = before

    @staticmethod
    def writes(path: object, mode: object, flags: object) -> bool:
        return not isinstance(path, int) and isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


watch = Watch()
sys.addaudithook(watch)


def state(known: dict[bytes, bytes] | None = None) -> State:
    """The working folder as it is; equal contents among those that are ``known`` are one."""
    known = {} if known is None else known
    found: State = {}
    for path in sorted(Path().rglob("*")):
        content = content_of(path) if path.is_file() else None
        found[str(path)] = None if content is None else known.setdefault(content, content)
    return found


def content_of(path: Path, large: int = 2**16, read: dict[str, tuple[os.stat_result, bytes]] = {}) -> bytes:  # noqa: B006
    """Content of a file; a large one that did not change is not read again."""
    now = path.stat()
    if now.st_size < large:
        return path.read_bytes()
    was, content = read.get(str(path), (None, b""))
    if was is None or any(getattr(was, f"st_{what}") != getattr(now, f"st_{what}") for what in CHANGES):
        content = path.read_bytes()
        read[str(path)] = now, content
    return content


def restore(left: State) -> None:
    """Put a state into the working folder; who was writing is gone."""
    for path in Path().iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, content in left.items():
        path = Path(name)
        if PART.fullmatch(path.name):
            path = path.with_name(re.sub(r"\d+\.part$", f"{STRANGER}.part", path.name))
        if content is None:
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(content)


def signature(left: State) -> str:
    """Equal for states from which the same is to be done: what tells the time or a process does not count."""
    seen = []
    for name, content in left.items():
        kind: object = None
        if content is not None and content:
            if name.endswith((".safetensors", ".npz")):
                kind = digest(content)
            elif name.endswith(".csv"):
                header, *rows = csv.reader(io.StringIO(content.decode()))
                told = [at for at, column in enumerate(header) if not column.startswith("seconds")]
                kind = content.endswith(b"\n"), header, [[row[at] for at in told if at < len(row)] for row in rows]
            elif name.endswith(".json"):
                with suppress(ValueError):
                    facts = json.loads(content)
                    kind = facts["file"], facts.get("progress", {}).get("validated"), len(facts.get("rows", []))
            else:
                kind = content[-1:] == b"\n"
        seen.append((re.sub(r"\d+\.part$", "part", name), content is None, bool(content), kind))
    return repr(seen)


digest = lru_cache(10_000)(lambda content: hashlib.blake2b(content).hexdigest())


@contextmanager
def recorded() -> Iterator[list[State]]:
    """States that the folder goes through inside, each as a kill would leave it."""
    states, contents, sync = list[State](), dict[bytes, bytes](), os.fsync

    def synced(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        if path.is_file():
            now = state(contents)
            content = now[name := str(path.relative_to(Path.cwd()))]
            assert content is not None
            torn = content[:-3]
            states.extend([now, {**now, name: contents.setdefault(torn, torn)}])  # whole, and torn
        sync(descriptor)

    watch.before = lambda: states.append(state(contents))
    os.fsync = synced
    try:
        yield states
    finally:
        os.fsync, watch.before = sync, None
    states.append(state(contents))


def kill_everywhere(arguments: str, *, first: int = 0, every: int = 1, again: bool = False, end: str = "") -> None:
    """Go on from the states that kills can leave, ``again`` from those of the runs that go on, to the same end.

    A command that is refused where its file is there already is at its ``end`` then.
    """
    start = state()
    with recorded() as states:
        main(shlex.split(arguments))
    expected, files = outcome(), set(state())
    known = {signature(start)} | {signature(left) for left in states}
    todo = [left for left in {signature(left): left for left in states}.values() if end not in left][first::every]
    while todo:
        restore(left := todo.pop())
        with recorded() if again else nullcontext([]) as states:
            main(shlex.split(arguments))
        assert outcome() == expected, sorted(left)
        assert set(state()) == files, sorted(left)
        new = {signature(found): found for found in states}
        todo += [found for key, found in new.items() if key not in known and end not in found]
        known |= new.keys()


@pytest.fixture(autouse=True)
def _small_figures(monkeypatch, in_a_folder_of_its_own):
    """Figures are files here, and no pictures, which take their time."""
    monkeypatch.setattr(draw, "rendered", lambda *_: b"figure\n")
    for module in (runs, sweeps):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if inspect.signature(function).return_annotation is Figure:
                monkeypatch.setattr(module, name, lambda *_, **__: None)


@pytest.mark.parametrize(("first", "name"), [*enumerate(COMMANDS)])
def test_some_states_that_kills_leave(first, name):
    kill_everywhere(COMMANDS[name], first=first, every=31)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_all_states_that_any_number_of_kills_leave(name):
    kill_everywhere(COMMANDS[name], first=NTH - 1, every=PARTS, again=True)


def write_grid() -> None:
    Path("configs").mkdir()
    Path("configs/experiment_configs.yaml").write_text(GRID)


def test_a_sweep():
    write_grid()
    kill_everywhere("sweep small --device cpu --threads 1", every=61)
    log = Path("results/small/small-sgd-s0.log")
    log.write_text("of a run that was killed when it was finished")
    main(shlex.split("sweep small --device cpu --threads 1"))
    assert not log.exists()


@pytest.mark.slow
def test_a_sweep_everywhere():
    write_grid()
    kill_everywhere("sweep small --device cpu --threads 1", first=NTH - 1, every=PARTS, again=True)


def test_commands_that_write_a_file_or_two():
    for name in ("one", "two"):
        main(shlex.split(f"editing --criterion random --head random --run_name {name} {SMALL}"))
    kill_everywhere("mask combine masks/one.safetensors masks/two.safetensors --name both", again=True, end=BOTH)
    kill_everywhere("plot --masks masks/one.safetensors masks/two.safetensors", again=True)


def test_a_checkpoint_of_the_same_step_replaces_another():
    folder = Path("checkpoints")
    save_checkpoint(folder, "last", 2, {"w": torch.ones(3)}, {"sum": 3})
    with recorded() as states:
        save_checkpoint(folder, "last", 2, {"w": torch.zeros(3)}, {"sum": 0})
    for left in states:
        restore(left)
        for clean in (lambda: None, lambda: remove_replaced(folder, "last")):
            clean()
            found = load_checkpoint(folder / "last.json")
            assert found.tensors["w"].sum() == found.facts["sum"]
        assert sorted(path.name for path in folder.glob("[!.]*")) == ["last-000002.safetensors", "last.json"]
    assert sorted(path.name for path in folder.iterdir()) == ["last-000002.safetensors", "last.json"]


def test_a_validation_that_no_checkpoint_knows_of_is_written_once(tmp_path):
    metrics = Metrics(0.5, 1, 2)
    killed = Recorder(tmp_path, "round")
    for step, split in [(0, "val"), (1, "train"), (1, "val")]:
        killed.record(step, split, metrics)
    again = Recorder(tmp_path, "round", keep_to={"train": 1, "val": 0})
    again.record(1, "val", metrics)
    rows = [line.split(",")[:2] for line in (tmp_path / "metrics.csv").read_text().splitlines()[1:]]
    assert rows == [["0", "val"], ["1", "train"], ["1", "val"]]


def test_a_run_leaves_what_a_running_one_of_a_longer_name_writes():
    for name in (
        "masks/.a.b.safetensors.1.part",
        "masks/.a.safetensors.1.part",
        "vectors/.a.b.task0.safetensors.1.part",
    ):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(b"half")
    Path("results/a").mkdir(parents=True)
    clean_up(RunPaths(Path(), "a"))
    assert sorted(str(path) for path in Path().rglob("*.part")) == [
        "masks/.a.b.safetensors.1.part",
        "vectors/.a.b.task0.safetensors.1.part",
    ]


def test_nothing_is_removed_from_under_one_who_writes_there():
    part = Path(".table.csv.1.part")
    part.write_bytes(b"half")
    with files._locked_folder(Path(), alone=False):
        remove_leftovers(Path())
        assert part.exists()
    remove_leftovers(Path())
    assert not part.exists()
