"""Runs to go on with: found by name or age, with their options as they were, wherever they are gone on with."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedtalos.app.config.files import LARGEST, FileError, flatten, from_file, read_yaml
from fedtalos.app.config.help import option_names
from fedtalos.app.config.options import takes_path
from fedtalos.app.config.schema import RUN_CONFIGS, RunConfig
from fedtalos.app.run.paths import RunPaths, plain_name
from fedtalos.app.run.progress import Saved
from fedtalos.app.run.runs import all_runs
from fedtalos.errors import InputError, nearest, shown
from fedtalos.facts import read_file

LONGEST = 4096
"""Characters of a path that a record may name."""
MAY_DIFFER = (
    "config",
    "preset",
    "run_name",
    "resume",
    "resume_or_start",
    "output_dir",
    "data_dir",
    "device",
    "precision",
    "compile",
    "threads",
    "workers",
    "cache_gb",
    "cache_dir",
    "clients_at_once",
    "tracker",
)
"""Options that a resumed run may be given anew."""


def run_to_resume(root: Path, name: str | None, command: str, *, or_start: bool = False) -> RunPaths | None:
    """The run that --resume means: the named one, else the newest of this command without a summary.

    Where there is none: None under --resume_or_start, else InputError with the names of those that are there.
    """
    if name is not None:
        paths = RunPaths(root, plain_name("--run_name", name))
        if paths.started:
            if (made_by_command := read_yaml(paths.config).get("command")) != command:
                raise InputError(f"--resume: {name} is a run of {shown(made_by_command)}, not of `{command}`")
            return paths
    runs = runs_of(root, command)
    unfinished = [paths for paths in runs if not paths.finished]
    if name is None and unfinished:
        return unfinished[0]
    if or_start:
        return None
    raise InputError(nothing_to_resume(root, name, command, [paths.name for paths in runs]))


def runs_of(root: Path, command: str) -> list[RunPaths]:
    """List the runs of a command, the newest first."""
    return [paths for paths in all_runs(root) if _is_of(paths.config, command)]


def _is_of(path: Path, command: str) -> bool:
    """Tell whether a config.yaml is a run's of that command; a broken one is nobody's."""
    try:
        text = read_file(path, str(path), most=LARGEST)
    except InputError:
        return False
    return f"command: {command}\n".encode() in text


def nothing_to_resume(root: Path, name: str | None, command: str, runs: list[str]) -> str:
    """Say in one sentence what --resume looked for, and which names there are."""
    place = root / "results"
    there = ", ".join([*runs[:8], *(["..."] if len(runs) > 8 else [])])
    if name is None:
        listed = f"; finished are {there}" if runs else ""
        return (
            f"--resume: no unfinished run of `{command}` in {place}{listed}; give its --run_name or --output_dir, "
            "or --resume_or_start to begin one"
        )
    listed = nearest(name, runs) or (f"; there are {there}" if runs else "; there is none")
    return f"--resume: no run {name!r} of `{command}` in {place}{listed}; --resume_or_start begins it"


def working_folder(paths: RunPaths) -> Path | None:
    """The folder that the run was begun in, by its config.yaml; its relative paths were given from there."""
    return folder_of_record(paths.config) if paths.started else None


def folder_of_record(path: Path) -> Path | None:
    """The folder that a config.yaml was written for; None of a file that is no run's record."""
    made_by = read_yaml(path).get("made_by")
    folder = made_by.get("folder") if isinstance(made_by, dict) else None
    return Path(folder) if isinstance(folder, str) and "\0" not in folder and len(folder) < LONGEST else None


def from_here(values: Mapping[str, Any], command: str, folder: Path | None) -> dict[str, Any]:
    """Options with relative paths, as given in ``folder``, as they are to be given in the working folder.

    Only what is there in ``folder`` changes; the folder of results is always given anew.
    """
    found = dict(values)
    if folder is None or folder == Path.cwd():
        return found
    for option, field in option_names(RUN_CONFIGS[command]).items():
        value = values.get(option)
        if option != "output_dir" and isinstance(value, str) and takes_path(field):
            path = folder / value
            if path.is_file() or (path.exists() and field.annotation is not str):  # of text, a name may be meant
                found[option] = str(path)
    return found


def saved_options(paths: RunPaths, command: str) -> dict[str, Any]:
    """Options that a run was begun with, to be given in the working folder to go on with it."""
    found = from_here(from_file(paths.config, command), command, working_folder(paths))
    return {**found, "output_dir": str(paths.root)}  # where it lies, whatever it says of itself


def differing(was: Mapping[str, Any], config: RunConfig) -> list[str]:
    """List the options that make ``config`` another run than ``was``; a path may be written in another way."""
    fields = option_names(type(config))

    def same(option: str, now: object) -> bool:
        if isinstance(now, str) and isinstance(before := was.get(option), str) and takes_path(fields.get(option)):
            return os.path.realpath(before) == os.path.realpath(now)
        return was.get(option) == now

    return [option for option, now in flatten(config).items() if option not in MAY_DIFFER and not same(option, now)]


def check_goes_on(saved: Saved, config: RunConfig, paths: RunPaths, total: int) -> None:
    """Raise InputError where a checkpoint is not of ``config``, or of another version; the run has ``total`` rounds."""
    known = flatten(type(config)())
    in_order = saved.progress.best <= saved.progress.done <= total
    if not saved.options.keys() <= known.keys() or not in_order:
        raise InputError(
            f"checkpoint {paths.checkpoints / 'last.json'}: is of another version; start a run of another name"
        )
    options = known | saved.options  # an earlier version may have had fewer options
    if differs := differing(from_here(options, config.command, working_folder(paths)), config):
        raise FileError(
            f"{paths.config}: {differs[0]} was {shown(options[differs[0]])} when the checkpoint was saved; "
            "put that back"
        )
