"""The folders of a run: choosing, opening and resuming them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console

from fedtalos.app.config.files import flatten, read_yaml
from fedtalos.app.config.schema import RunConfig
from fedtalos.app.run.display import say
from fedtalos.app.run.interruption import Interrupted
from fedtalos.app.run.recorder import made_by, require_tracker, write_yaml
from fedtalos.errors import InputError, shown
from fedtalos.files import remove_leftovers

MAY_DIFFER = (
    "config",
    "preset",
    "run_name",
    "resume",
    "output_dir",
    "data_dir",
    "device",
    "precision",
    "threads",
    "workers",
    "cache_gb",
    "clients_at_once",
    "tracker",
)
"""Options that a resumed run may be given anew."""


@dataclass(frozen=True)
class RunPaths:
    """The folders of one run."""

    root: Path
    name: str

    @property
    def results(self) -> Path:
        return self.root / "results" / self.name

    @property
    def config(self) -> Path:
        return self.results / "config.yaml"

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
    def lock(self) -> Path:
        return self.results / ".lock"

    @property
    def started(self) -> bool:
        return self.config.exists()

    @property
    def finished(self) -> bool:
        return (self.results / "summary.yaml").exists()

    @property
    def free(self) -> bool:
        """True where the folder of results is not there, or was claimed by a run that was killed before it began."""
        return not self.results.exists() or all(path.name.startswith(".") for path in self.results.iterdir())


def plain_name(flag: str, name: str) -> str:
    """``name``, if it is one that a folder can have."""
    if name in ("", ".", "..") or Path(name).name != name or not name.isprintable():
        raise InputError(f"{flag} {shown(name)}: expected a plain folder name, without slashes")
    return name


class AlreadyFinished(Exception):  # noqa: N818  it is no error
    """The run that was asked for is finished; the message says where its summary is."""


@contextmanager
def begun(config: RunConfig, console: Console) -> Iterator[RunPaths]:
    """Choose and claim the folders of a run, and say where it stands when it is stopped.

    Raises AlreadyFinished where there is nothing left to do, InputError where the folders cannot be had.
    """
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    require_tracker(config.run.tracker)
    paths = choose_run(config)
    if paths.finished:
        raise AlreadyFinished(f"{paths.name} is finished already: {paths.results / 'summary.yaml'}")
    say(console, f"{config.command}: run {paths.name} {'goes on' if paths.started else 'begins'}")
    try:
        with claimed(paths):
            yield paths
    except (Interrupted, KeyboardInterrupt):
        place = "" if paths.root == Path() else f" --output_dir {paths.root}"
        say(console, f"stopped; fedtalos {config.command} --resume --run_name {paths.name}{place} goes on")
        raise


@contextmanager
def claimed(paths: RunPaths) -> Iterator[None]:
    """Inside, no other process works on the run; what a killed one left half-written is removed.

    The lock is the operating system's, so it ends with the process that holds it. Where the run does not come to
    begin, nothing of it stays. Raises InputError where another process has the run.
    """
    made = [folder for folder in (paths.results, *paths.results.parents) if not folder.exists()]
    paths.results.mkdir(parents=True, exist_ok=True)
    lock = FileLock(paths.lock, blocking=False)
    try:
        with lock:
            for folder in (paths.results, paths.checkpoints, paths.plots):
                remove_leftovers(folder)
            remove_leftovers(paths.mask.parent, f"{paths.name}.")
            try:
                yield
            finally:
                if paths.free:
                    paths.lock.unlink(missing_ok=True)
                    for folder in made:
                        with suppress(OSError):  # another run has begun there
                            folder.rmdir()
    except Timeout:
        raise InputError(
            f"run {paths.name}: another process is working on it; wait for it, or choose another --run_name"
        ) from None


def run_to_resume(root: Path, name: str | None, command: str) -> RunPaths | None:
    """The run that --resume means: the named one, else the newest of this command without a summary; None: it is
    still to begin.
    """
    if name is not None:
        paths = RunPaths(root, plain_name("--run_name", name))
        if not paths.started:
            return None
        if (made_by_command := read_yaml(paths.config).get("command")) != command:
            raise InputError(f"--resume: {name} is a run of `{made_by_command}`, not of `{command}`")
        return paths
    configs = (root / "results").glob("*/config.yaml")
    for path in sorted(configs, key=lambda path: path.stat().st_mtime, reverse=True):
        paths = RunPaths(root, path.parent.name)
        if not paths.finished and f"command: {command}\n" in path.read_text(encoding="utf-8", errors="replace"):
            return paths
    return None


def choose_run(config: RunConfig) -> RunPaths:
    """The folders that this run writes to, or, with --resume, goes on in. Nothing is written yet.

    Raises InputError where the name is taken or not plain, or the run to resume has other options.
    """
    options = config.run
    paths = run_to_resume(options.output_dir, options.run_name, config.command) if options.resume else None
    if paths is not None:
        saved = flatten(type(config)()) | read_yaml(paths.config)  # an earlier version may have had fewer options
        for key, value in flatten(config).items():
            if key not in MAY_DIFFER and value not in (None, "auto") and saved.get(key) != value:
                raise InputError(
                    f"--resume: {key} was {saved.get(key)!r} in {paths.name}, now {value!r}; "
                    "give the same, or start a run of another name"
                )
        return paths
    name = options.run_name or f"{config.command}-{datetime.now():%Y%m%d-%H%M%S}"
    paths = RunPaths(options.output_dir, plain_name("--run_name", name))
    if not paths.free:
        raise InputError(f"{paths.results} exists: add --resume to go on with it, or choose another --run_name")
    made = (paths.mask, paths.head) if config.command == "editing" else ()
    for path in (paths.checkpoints, paths.plots, *made):
        if path.exists():
            raise InputError(f"{path} exists, of an earlier run: move it away, or choose another --run_name")
    return paths


def open_run(config: RunConfig, paths: RunPaths, origin: Mapping[str, Mapping[str, str]]) -> None:
    """Write config.yaml; of a run that goes on, check that data, weights and mask are the same.

    ``origin`` goes to made_by; its ``inputs`` are fingerprints, by what they are of.
    """
    if paths.started:
        made_by_then: Any = read_yaml(paths.config).get("made_by")
        saved = made_by_then.get("inputs") if isinstance(made_by_then, dict) else None
        for what, fingerprint in origin["inputs"].items():
            if not isinstance(saved, dict) or saved.get(what) != fingerprint:
                raise InputError(
                    f"--resume: the {what} of {paths.name} changed since it started; "
                    "put back what it was, or start a run of another name"
                )
        return
    options = {**flatten(config), "run_name": paths.name}
    write_yaml(
        paths.config, {"command": config.command, **options, "made_by": {**made_by(config.run.device), **origin}}
    )
