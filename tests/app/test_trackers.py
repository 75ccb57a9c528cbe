"""wandb, in place of which a module of the same calls stands: names are shown, and each run has an id of its own."""

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
