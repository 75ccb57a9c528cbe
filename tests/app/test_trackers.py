"""wandb and MLflow, in place of which modules of the same calls stand: each run has an id of its own, and keeps it."""

import shlex
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedtalos.cli import main

COMMAND = shlex.split(
    "centralized --dataset digits --model_size micro --image_size 8 --patch_size 4 --weights none --device cpu "
    "--train_limit 60 --eval_limit 20 --num_epochs 2 --tracker wandb"
)

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own", "without_figures")


class Service(types.ModuleType):
    """What wandb keeps: for each id the names, folders and rows that came; as wandb does, it refuses odd ids."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.kept: dict[str, list[dict[str, Any]]] = {}
        self.fails: Exception | None = None

    def login(self, prompt: bool) -> bool:
        return True

    def init(self, *, project: str, name: str, id: str, dir: str, config: dict, resume: str) -> "Service":
        if self.fails is not None:
            raise self.fails
        if set(id) & set("/\\#?%:") or not id or len(name) > 128:
            raise self.Error(f"Invalid run ID: {id!r} or name: {name!r}")
        assert (project, resume) == ("fedtalos", "allow")
        assert yaml.safe_dump(config)
        self.present = self.kept.setdefault(id, [])
        self.present.append({"name": name, "dir": dir})
        return self

    def log(self, figures: dict[str, float], step: int) -> None:
        self.present.append({**figures, "step": step})

    def finish(self) -> None:
        del self.present


@pytest.fixture
def wandb(monkeypatch) -> Service:
    service = Service()
    monkeypatch.setitem(sys.modules, "wandb", service)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return service


def test_two_runs_of_one_name_in_two_folders_are_two(wandb):
    for folder in ("one", "two"):
        main([*COMMAND, "--run_name", "a", "--output_dir", folder])
    assert len(wandb.kept) == 2
    for rows, folder in zip(wandb.kept.values(), ("one", "two"), strict=True):
        assert rows[0] == {"name": "a", "dir": folder}
        assert [row["step"] for row in rows[1:]] == [0, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("name", ["lr:0.1", "50%", "a#b?", "a b", "名前", "x" * 200])
def test_any_name_is_shown_as_it_is(name, wandb):
    main([*COMMAND, "--run_name", name])
    (rows,) = wandb.kept.values()
    assert rows[0]["name"] == name[:128]
    assert Path("results", name, "summary.yaml").exists()


def test_a_resumed_run_goes_on_under_its_id(wandb, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("fedtalos.app.run.session.Session.finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit, match="130"):
            main([*COMMAND, "--run_name", "a"])
    main(["centralized", "--resume", "--run_name", "a"])
    (rows,) = wandb.kept.values()
    assert [row["name"] for row in rows if "name" in row] == ["a", "a"]
    assert len(Path("results/a/.wandb_id").read_text()) == 16


def test_a_copied_run_that_is_made_anew_has_another_id(wandb):
    main([*COMMAND, "--run_name", "a"])
    main(["centralized", "--config", "results/a/config.yaml", "--run_name", "b"])
    assert len(wandb.kept) == 2


def test_what_wandb_refuses_is_one_sentence(wandb, capsys):
    wandb.fails = wandb.Error("the server says no")
    with pytest.raises(SystemExit, match="2"):
        main([*COMMAND, "--run_name", "a"])
    says = capsys.readouterr().err
    assert says.startswith("fedtalos: --tracker wandb: the server says no; ")
    assert "Traceback" not in says
    wandb.fails = None
    main(["centralized", "--resume", "--run_name", "a", "--tracker", "none"])
    assert Path("results/a/summary.yaml").exists()
    assert not wandb.kept


# mlflow


class Mlflow(types.ModuleType):
    """What MLflow keeps: for each id its name, options, figures and state; it takes a hundred options at once."""

    class FailedError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.__spec__ = ModuleSpec("mlflow", None)
        self.runs: dict[str, dict[str, Any]] = {}
        self.place = ""
        self.fails: Exception | None = None
        self.exceptions = types.SimpleNamespace(MlflowException=self.FailedError)
        self.entities = types.ModuleType("mlflow.entities")
        self.entities.Param = lambda name, value: (name, value)
        self.entities.Metric = lambda name, value, timestamp, step: (name, value, step)

    def MlflowClient(self, tracking_uri: str) -> "Mlflow":  # noqa: N802
        if self.fails is not None:
            raise self.fails
        self.place = tracking_uri
        return self

    def get_experiment_by_name(self, name: str) -> object:
        return types.SimpleNamespace(experiment_id="1") if self.runs else None

    def create_experiment(self, name: str) -> str:
        assert name == "fedtalos"
        return "1"

    def create_run(self, experiment: str, run_name: str) -> object:
        run = f"id{len(self.runs)}"
        self.runs[run] = {"name": run_name, "params": {}, "metrics": [], "status": "RUNNING"}
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run))

    def update_run(self, run: str, status: str) -> None:
        self.runs[run]["status"] = status

    def log_batch(self, run: str, metrics: Any = (), params: Any = ()) -> None:
        assert len(params) <= 100
        self.runs[run]["params"] |= dict(params)
        self.runs[run]["metrics"] += metrics

    def set_terminated(self, run: str, status: str) -> None:
        self.runs[run]["status"] = status


@pytest.fixture
def mlflow(monkeypatch) -> Mlflow:
    service = Mlflow()
    monkeypatch.setitem(sys.modules, "mlflow", service)
    monkeypatch.setitem(sys.modules, "mlflow.entities", service.entities)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return service


MLFLOW = [*COMMAND[:-1], "mlflow"]


def test_mlflow_gets_options_and_figures_and_a_resumed_run_goes_on_under_its_id(mlflow, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("fedtalos.app.run.session.Session.finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit, match="130"):
            main([*MLFLOW, "--run_name", "a"])
    assert mlflow.runs["id0"]["status"] == "KILLED"
    main(["centralized", "--resume", "--run_name", "a"])
    main([*MLFLOW, "--run_name", "b"])
    assert [run["name"] for run in mlflow.runs.values()] == ["a", "b"]
    for run in mlflow.runs.values():
        assert run["status"] == "FINISHED"
        assert run["params"]["num_epochs"] == "2"
        assert [step for name, _, step in run["metrics"] if name == "val/accuracy"] == [0, 1, 2]
        assert [step for name, _, step in run["metrics"] if name == "test/accuracy"] == [2]
    assert mlflow.place == f"sqlite:///{Path('mlflow.db').resolve()}"


def test_mlflow_goes_where_it_is_told_and_what_it_refuses_is_one_sentence(mlflow, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somewhere")
    mlflow.fails = mlflow.FailedError("nobody is there\nat length")
    with pytest.raises(SystemExit, match="2"):
        main([*MLFLOW, "--run_name", "a"])
    assert capsys.readouterr().err.startswith("fedtalos: --tracker mlflow: nobody is there; see to it")
    mlflow.fails = None
    main(["centralized", "--resume", "--run_name", "a"])
    assert mlflow.place == "http://somewhere"
