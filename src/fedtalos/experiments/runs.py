"""The folders of a run: choosing, opening and resuming them."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fedtalos.config import RunConfig
from fedtalos.config_files import flatten, read_yaml
from fedtalos.errors import InputError
from fedtalos.recorder import made_by, write_yaml

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
        if not (path.parent / "summary.yaml").exists() and read_yaml(path).get("command") == command:
            return path.parent.name
    raise InputError(f"--resume: no unfinished {command} run under {results}; name one with --run_name")


def open_run(config: RunConfig, paths: RunPaths) -> None:
    """Write config.yaml, or on --resume check that the resolved options are those of the run."""
    options = flatten(config)
    path = paths.results / "config.yaml"
    if config.run.resume:
        saved = read_yaml(path)
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
