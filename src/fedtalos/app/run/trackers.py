"""Services that a run's figures go to besides metrics.csv: TensorBoard, Weights & Biases, MLflow."""

import importlib.util
import logging
import os
import re
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from fedtalos.app.run.paths import RunPaths
from fedtalos.errors import InputError, install, shown
from fedtalos.facts import read_file
from fedtalos.files import write_atomic

WANDB_NAME = 128
"""Most characters of a name that wandb shows."""
MLFLOW_PARAMS = 100
"""Most options that MLflow takes at once."""


class Tracker(Protocol):
    """A place that figures go to besides metrics.csv."""

    def log(self, step: int, figures: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


def require_tracker(name: str) -> None:
    """InputError where the tracker's library is not installed, or wandb knows no account and was not told offline."""
    if name == "none":
        return
    if importlib.util.find_spec(name) is None:
        raise InputError(f"--tracker {name}: not installed; {install(name)}")
    if name == "wandb" and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        if not wandb.login(prompt=False):
            raise InputError("--tracker wandb: no account is set up; run `wandb login`, or set WANDB_MODE=offline")


class TensorBoardTracker:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """Logs to a run of wandb's: shown by the name of ours, known by an id of its own, which ``results`` keeps.

    A name may be that of another run in another folder, and may hold characters that an id may not.
    """

    def __init__(self, results: Path, config: Mapping[str, Any]) -> None:
        import wandb

        folder, name = results.parents[1], results.name
        try:
            self._run = wandb.init(  # makes folder/wandb
                project="fedtalos",
                name=name[:WANDB_NAME],
                id=wandb_id(results),
                dir=str(folder),
                config=dict(config),
                resume="allow",
            )
        except wandb.Error as error:
            raise InputError(f"--tracker wandb: {error}; see to it, or leave --tracker out and --resume") from error

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


def wandb_id(results: Path) -> str:
    """The id by which wandb knows a run, drawn once and kept in its folder of results."""
    path = results / ".wandb_id"
    if not path.is_file():
        write_atomic(path, secrets.token_hex(8))
    return kept_id(path)


def kept_id(path: Path) -> str:
    """Read the id by which a tracker knows a run; InputError where the file holds anything else.

    >>> kept_id(Path("results/mine/.wandb_id"))
    '4f2a9c01d3b7e856'
    """
    found = read_file(path, str(path), most=100, advice="remove it").strip()
    if not re.fullmatch(rb"[A-Za-z0-9_-]{1,64}", found):
        raise InputError(f"{path}: expected a tracker's id, got {shown(found)}; remove it")
    return found.decode()


class MlflowTracker:
    """Logs to a run of MLflow's, whose id ``results`` keeps; what else has a place there is a run's options.

    It goes where MLFLOW_TRACKING_URI says, else to a database beside the results, which `mlflow ui` shows. MLflow keeps
    the options of a run as they were given first.
    """

    def __init__(self, paths: RunPaths, config: Mapping[str, Any]) -> None:
        import mlflow

        for name in ("mlflow.store.db.utils", "alembic"):  # they say at length that the database is made
            logging.getLogger(name).setLevel(logging.WARNING)
        place = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{paths.root.resolve() / 'mlflow.db'}"
        self._paths, kept = paths, paths.results / ".mlflow_id"
        try:
            self._client = mlflow.MlflowClient(tracking_uri=place)
            if kept.is_file():
                self._id = kept_id(kept)
                self._client.update_run(self._id, status="RUNNING")
                return
            known = self._client.get_experiment_by_name("fedtalos")
            experiment = self._client.create_experiment("fedtalos") if known is None else known.experiment_id
            self._id = self._client.create_run(experiment, run_name=paths.name).info.run_id
            params = [mlflow.entities.Param(name, str(value)) for name, value in config.items()]
            for start in range(0, len(params), MLFLOW_PARAMS):
                self._client.log_batch(self._id, params=params[start : start + MLFLOW_PARAMS])
        except mlflow.exceptions.MlflowException as error:
            said = str(error).partition("\n")[0]
            raise InputError(f"--tracker mlflow: {said}; see to it, or leave --tracker out and --resume") from error
        write_atomic(kept, self._id)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in figures.items()])

    def close(self) -> None:
        self._client.set_terminated(self._id, "FINISHED" if self._paths.finished else "KILLED")


def open_tracker(name: str, paths: RunPaths, config: Mapping[str, Any]) -> Tracker | None:
    """Begin to log a run to a service, or go on; None where nobody asked for one."""
    match name:
        case "tensorboard":
            return TensorBoardTracker(paths.results / "tensorboard")
        case "wandb":
            return WandbTracker(paths.results, config)
        case "mlflow":
            return MlflowTracker(paths, config)
    return None
