"""The folders of a run: choosing, claiming and opening them."""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from shlex import quote

import torch
from filelock import Timeout
from rich.console import Console

from fedtalos.app.config.files import flatten, read_yaml
from fedtalos.app.config.schema import EditingConfig, RunConfig
from fedtalos.app.run.display import say, say_notes
from fedtalos.app.run.interruption import Interrupted
from fedtalos.app.run.paths import WORKERS, RunPaths, plain_name
from fedtalos.app.run.recorder import made_by, write_yaml
from fedtalos.app.run.resume import differing, run_to_resume, saved_options
from fedtalos.app.run.runs import made_by_then
from fedtalos.app.run.trackers import require_tracker
from fedtalos.checkpoint import remove_replaced
from fedtalos.errors import InputError
from fedtalos.files import locked, refuse_link, remove_leftovers
from fedtalos.notes import noted


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
    noted()  # an earlier run's are not this one's
    try:
        with claimed(paths):
            try:
                yield paths
            finally:
                say_decisions(paths, console)
    except (Interrupted, KeyboardInterrupt):
        again = f"fedtalos {config.command} --resume --run_name {quote(paths.name)}{paths.flag} goes on"
        say(console, f"stopped; {again if paths.started else 'nothing is kept, for the run had not begun'}")
        raise


@contextmanager
def claimed(paths: RunPaths) -> Iterator[None]:
    """Keep other processes off the run inside; what a killed one left is removed.

    The lock is the operating system's, so it ends with the process that holds it. Where the run does not come to
    begin, nothing of it stays. Raises InputError where another process has the run, a folder of it is a link, or the
    file system has no locks.
    """
    for folder in (paths.results, paths.checkpoints, paths.plots):
        refuse_link(folder)
    made = [folder for folder in (paths.results, *paths.results.parents) if not folder.exists()]
    paths.results.mkdir(parents=True, exist_ok=True)
    is_new = not paths.lock.exists()
    with ExitStack() as held:
        try:
            held.enter_context(locked(paths.lock))
        except Timeout:
            raise InputError(
                f"run {paths.name}: another process is working on it; wait for it, or choose another --run_name"
            ) from None
        except OSError as error:
            if is_new:
                _withdraw(paths, made)
            raise InputError(
                f"{paths.lock}: cannot be locked ({error.strerror}); choose an --output_dir on a disk that has locks"
            ) from error
        try:
            clean_up(paths)
            yield
        finally:
            if paths.free:
                _withdraw(paths, made)


def clean_up(paths: RunPaths) -> None:
    """Remove what killed processes left of a run, by exact names; to be called under its lock.

    These are files half-written, tensors of checkpoints that were replaced, and folders of worker processes.
    """
    for folder in (paths.results, paths.checkpoints, paths.plots):
        remove_leftovers(folder)
    remove_leftovers(paths.mask.parent, {paths.mask.name, paths.head.name}.__contains__)
    vector = re.compile(rf"{re.escape(paths.name)}(\.(task|client)[0-9]+)?\.safetensors")
    remove_leftovers(paths.root / "vectors", lambda name: vector.fullmatch(name) is not None)
    for name in ("last", "best"):
        remove_replaced(paths.checkpoints, name)
    for folder in paths.results.iterdir():
        if folder.name.startswith(WORKERS):
            shutil.rmtree(folder, ignore_errors=True)


def _withdraw(paths: RunPaths, made: Sequence[Path]) -> None:
    """Remove the lock, and the folders that were ``made`` for it, as far as no other run has begun there."""
    paths.lock.unlink(missing_ok=True)
    for folder in made:
        with suppress(OSError):
            folder.rmdir()


def choose_run(config: RunConfig) -> RunPaths:
    """The folders that this run writes to, or, with --resume, goes on in. Nothing is written yet.

    Raises InputError where the name is taken or not plain, there is nothing to resume, or what there is has other
    options.
    """
    options, paths = config.run, None
    if options.resume or options.resume_or_start:
        paths = run_to_resume(options.output_dir, options.run_name, config.command, or_start=options.resume_or_start)
    if paths is not None:
        was = flatten(type(config)()) | saved_options(paths, config.command)  # an earlier version may have had fewer
        now = flatten(config)
        for option in differing(was, config):
            if now[option] not in (None, "auto"):
                raise InputError(
                    f"--resume: {option} was {was.get(option)!r} in {paths.name}, now {now[option]!r}; "
                    "give the same, or start a run of another name"
                )
        return paths
    name = options.run_name or f"{config.command}-{datetime.now():%Y%m%d-%H%M%S}"
    paths = RunPaths(options.output_dir, plain_name("--run_name", name))
    if not paths.free:
        raise InputError(f"{paths.results} exists: add --resume to go on with it, or choose another --run_name")
    made: tuple[Path, ...] = (paths.mask, paths.head) if isinstance(config, EditingConfig) else ()
    if not isinstance(config, EditingConfig) and config.train.save_vector:
        made = (paths.vector,)
    for path in (paths.checkpoints, paths.plots, *made):
        if path.exists():
            raise InputError(f"{path} exists, of an earlier run: move it away, or choose another --run_name")
    return paths


def open_run(config: RunConfig, paths: RunPaths, origin: Mapping[str, Mapping[str, str]], console: Console) -> None:
    """Write config.yaml, or check that the run goes on with the same data, weights and mask; say what was decided.

    ``origin`` goes to made_by; its ``inputs`` are fingerprints, by what they are of.
    """
    if paths.started:
        then = made_by_then(paths.config)
        for what, fingerprint in origin["inputs"].items():
            if then is None or then.inputs.get(what) != fingerprint:
                raise InputError(
                    f"--resume: the {what} of {paths.name} changed since it started; "
                    "put back what it was, or start a run of another name"
                )
    else:
        options = {**flatten(config), "run_name": paths.name}
        write_yaml(
            paths.config, {"command": config.command, **options, "made_by": {**made_by(config.run.device), **origin}}
        )
    say_decisions(paths, console)


def say_decisions(paths: RunPaths, console: Console) -> None:
    """Say what was decided for the user since the last call, and add what is new to config.yaml, in made_by.

    >>> say_decisions(paths, Console())
    images: 3 of 140 files are no images and were left out: notes.txt, ...
    """
    decided = say_notes(console)
    if not decided or not paths.started:
        return
    then = made_by_then(paths.config)
    if then is not None and not decided.keys() <= then.decided.keys():
        record = read_yaml(paths.config)
        made = {**record["made_by"], "decided": {**decided, **then.decided}}
        write_yaml(paths.config, {**record, "made_by": made})
