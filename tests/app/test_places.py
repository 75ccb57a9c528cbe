"""Where runs and their files are: home folders, other working folders, full disks, presets, runs to go on with."""

import errno
import os
import pwd
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from commands import CENTRALIZED, SMALL, refused

from fedtalos import notes
from fedtalos.app.config.files import presets_files
from fedtalos.app.config.options import Options, takes_path
from fedtalos.app.config.schema import RUN_CONFIGS
from fedtalos.app.run import launch
from fedtalos.app.run.recorder import Recorder
from fedtalos.cli import main, parse
from fedtalos.data import dataset_loader
from fedtalos.errors import InputError
from fedtalos.files import naming, write_atomic
from fedtalos.metrics import Metrics

ROOT = Path(__file__).parents[2]
EDITING = ["editing", *SMALL, "--criterion", "random", "--head", "random", "--num_iterations", "1"]

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own", "without_figures")


# home folders


@pytest.fixture
def home(tmp_path, monkeypatch) -> str:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return str(tmp_path / "home")


@pytest.mark.parametrize(
    ("words", "field", "below"),
    [
        ("federated --data_dir ~", "data.data_dir", ""),
        ("federated --data_dir=~/data", "data.data_dir", "/data"),
        ("federated --output-dir=~/out", "run.output_dir", "/out"),
        ("federated --mask ~/masks/m.safetensors", "train.mask", "/masks/m.safetensors"),
        ("federated --weights=~/w.pth", "model.weights", "/w.pth"),
        ("editing --head ~/h.safetensors", "model.head", "/h.safetensors"),
        ("editing --checkpoint=~/checkpoints/a", "editing.checkpoint", "/checkpoints/a"),
        ("evaluate ~/checkpoints/a", "checkpoint", "/checkpoints/a"),
        ("mask show ~/m.safetensors", "tool.mask", "/m.safetensors"),
        ("sweep digits --weights ~/w.pth", "weights", "/w.pth"),
        ("info --data_dir=~", "data_dir", ""),
    ],
)
def test_home_is_home_wherever_a_path_comes_in(words, field, below, home):
    value = parse(words.split())
    for name in field.split("."):
        value = getattr(value, name)
    assert str(value) == home + below


def test_home_is_home_in_files_and_among_several_paths(home):
    Path("f.yaml").write_text("data_dir: ~/data\nmask: ~/m.safetensors\nhead: ~/h\n")
    Path("configs").mkdir()
    Path("configs/experiment_configs.yaml").write_text("p: {command: federated, output_dir: ~/out}")
    config = parse(["federated", "--config", "f.yaml", "--preset", "p"])
    assert [str(config.data.data_dir), str(config.train.mask)] == [f"{home}/data", f"{home}/m.safetensors"]
    assert [config.model.head, str(config.run.output_dir)] == [f"{home}/h", f"{home}/out"]
    assert parse(["plot", "~/a", "b", "--masks", "~/m"]).runs == (Path(home, "a"), Path("b"))
    Path(home).mkdir()
    shutil.move("f.yaml", home)
    assert str(parse(["federated", "--config=~/f.yaml"]).data.data_dir) == f"{home}/data"


def test_homes_of_others_and_of_nobody(capsys):
    me = pwd.getpwuid(os.getuid())
    assert str(parse(["info", f"--data_dir=~{me.pw_name}/x"]).data_dir) == f"{me.pw_dir}/x"
    for words in (
        ["federated", "--data_dir", "~nobody-of-that-name/x"],
        ["federated", "--config=~nobody-of-that-name"],
    ):
        assert "'~nobody-of-that-name' is the home of no user here; write the path in full" in refused(words, capsys)
    assert not any(Path().iterdir())


def test_environment_variables_and_tildes_within_are_left_alone(monkeypatch):
    monkeypatch.setenv("DATA", "/elsewhere")
    for text in ("$DATA/x", "${DATA}", "a/~/b", "a~"):
        assert str(parse(["info", f"--data_dir={text}"]).data_dir) == text


def test_every_option_that_holds_a_path_is_known_as_one():
    groups = [field.default for config in RUN_CONFIGS.values() for field in config.model_fields.values()]
    fields = {n: f for group in groups if isinstance(group, Options) for n, f in type(group).model_fields.items()}
    paths = {name for name, field in fields.items() if takes_path(field)}
    assert {"config", "output_dir", "data_dir", "weights", "head", "mask", "checkpoint"} <= paths
    assert not paths & {"run_name", "preset", "dataset", "partition", "num_clients"}


# presets


def test_the_published_presets_travel_in_the_package_and_a_working_folders_own_come_first(tmp_path):
    pytest.importorskip("setuptools")
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("src", "configs"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "installed")]
    subprocess.run(build, cwd=checkout, check=True, capture_output=True)
    shutil.rmtree(checkout)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "configs").mkdir()
    (elsewhere / "configs/experiment_configs.yaml").write_text("mine: {command: federated, num_rounds: 3}")
    program = """
import fedtalos, sys
from fedtalos.cli import main, parse
print(fedtalos.__file__)
print(parse(["federated", "--preset", "mine"]).federation.num_rounds)
main(["sweep", "digits", "--dry_run"])
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=elsewhere, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    where, rounds, *plan = done.stdout.splitlines()
    assert where.startswith(str(tmp_path / "installed"))
    assert rounds == "3"
    assert plan[-1].startswith("14 of 14 runs to do")


def test_a_name_is_looked_for_in_the_working_folder_first_then_among_the_published(capsys):
    Path("configs").mkdir()
    Path("configs/experiment_configs.yaml").write_text("laptop_talos: {command: editing, seed: 5}\nmine: {}")
    assert [path.is_absolute() for path in presets_files()] == [False, True]
    assert parse(["editing", "--preset", "laptop_talos"]).run.seed == 5
    assert parse(["federated", "--preset", "laptop_iid_dense"]).federation.num_rounds == 12
    says = refused(["federated", "--preset", "field_idd"], capsys)
    assert "did you mean 'field_iid'?" in says
    assert "configs/experiment_configs.yaml and /" in says


# going on


def test_resume_with_nothing_to_go_on_with_begins_no_other_run(capsys):
    says = refused(["federated", "--resume"], capsys)
    assert "--resume: no unfinished run of `federated` in results" in says
    assert "--resume_or_start" in says
    assert not any(Path().iterdir())
    main([*CENTRALIZED, "--run_name", "first-run"])
    main([*CENTRALIZED, "--run_name", "second"])
    before = sorted(Path().rglob("*"))
    for words, said in (
        ("--resume", "no unfinished run of `centralized` in results; finished are second, first-run"),
        ("--resume --run_name frist-run", "no run 'frist-run' of `centralized` in results; did you mean 'first-run'?"),
        ("--resume --run_name zzz", "there are second, first-run; --resume_or_start begins it"),
        ("--resume --run_name second --output_dir elsewhere", "in elsewhere/results; there is none"),
        ("--resume --resume_or_start", "give one of them"),
    ):
        assert said in refused([*CENTRALIZED, *words.split()], capsys)
    assert said in refused(["demo", "--resume", "--resume_or_start"], capsys)
    assert "no unfinished run of `demo`" in refused(["demo", "--resume"], capsys)
    assert "no run 'mine' of `demo`" in refused(["demo", "--resume", "--run_name", "mine"], capsys)
    assert sorted(Path().rglob("*")) == before
    main([*CENTRALIZED, "--run_name", "third", "--resume-or-start"])
    assert Path("results/third/summary.yaml").exists()
    main([*CENTRALIZED, "--run_name", "third", "--resume_or_start"])
    assert "third is finished already" in capsys.readouterr().out


def test_a_run_that_is_stopped_before_it_began_does_not_say_how_to_resume_it(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("fedtalos.experiments.centralized.load", interrupted)
    with pytest.raises(SystemExit, match="130"):
        main([*CENTRALIZED, "--run_name", "a"])
    said = capsys.readouterr().out
    assert "nothing is kept" in said
    assert "--resume" not in said
    assert not Path("results").exists()


def test_a_run_goes_on_and_is_evaluated_from_another_folder(monkeypatch, tmp_path, capsys):
    here = tmp_path / "here"
    there = tmp_path / "there"
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)
    digits = dataset_loader._read_digits()
    read_from: list[Path] = []

    def read(name, data_dir, *_):
        read_from.append(Path(data_dir).resolve())
        assert Path(data_dir, "here").exists()
        return digits

    monkeypatch.setattr(dataset_loader, "_read", read)
    Path("mine").mkdir()
    Path("mine/here").touch()
    main([*EDITING, "--run_name", "m", "--data_dir", "mine"])
    command = ["centralized", *SMALL, "--data_dir", "mine", "--mask", "masks/m.safetensors", "--num_epochs", "2"]
    command += ["--head", "random", "--run_name", "a"]
    with monkeypatch.context() as patched:
        patched.setattr("fedtalos.app.run.session.Session.finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit, match="130"):
            main(command)
    config = yaml.safe_load(Path("results/a/config.yaml").read_text())
    assert (config["data_dir"], config["mask"]) == ("mine", "masks/m.safetensors")
    assert config["made_by"]["folder"] == str(here)
    monkeypatch.chdir(there)
    read_from.clear()
    main(["centralized", "--resume", "--run_name", "a", "--output_dir", "../here"])
    main(["evaluate", "a", "--output_dir", str(here)])
    main(["centralized", "--config", str(here / "results/a/config.yaml"), "--run_name", "again"])
    for path in ("results", "checkpoints"):
        shutil.rmtree(path)
    assert read_from == [here / "mine"] * 3
    assert "accuracy" in capsys.readouterr().out
    assert not any(there.iterdir())
    moved = tmp_path / "moved"  # all of it: the place that was written down is gone
    shutil.move(here, moved)
    monkeypatch.chdir(moved)
    main(["evaluate", "a"])
    assert read_from[-1] == moved / "mine"


def test_another_mask_of_the_same_relative_name_is_another_mask(monkeypatch, capsys):
    main([*EDITING, "--run_name", "m"])
    command = ["centralized", *SMALL, "--mask", "masks/m.safetensors", "--head", "random", "--run_name", "a"]
    with monkeypatch.context() as patched:
        patched.setattr("fedtalos.app.run.session.Session.finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit, match="130"):
            main([*command, "--num_epochs", "1"])
    here = Path.cwd()
    Path("other/masks").mkdir(parents=True)
    monkeypatch.chdir("other")
    again = ["centralized", "--resume", "--run_name", "a", "--output_dir", str(here), "--mask"]
    assert "--resume: mask was" in refused([*again, "masks/m.safetensors"], capsys)
    main([*again, "../masks/m.safetensors"])  # the same file, written in another way


# decisions


def test_decisions_are_said_once_and_kept(monkeypatch, capsys):
    original = dataset_loader._read_digits

    def read():
        notes.note("images", "two of them were left out: ± [bold]")
        return original()

    monkeypatch.setattr(dataset_loader, "_read_digits", read)
    notes.note("stale", "of an earlier run")
    with monkeypatch.context() as patched:
        patched.setattr("fedtalos.app.run.session.Session.finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit, match="130"):
            main([*CENTRALIZED, "--run_name", "a"])
    assert capsys.readouterr().out.count("images: two of them were left out: ± [bold]\n") == 1

    def made_by() -> dict:
        return yaml.safe_load(Path("results/a/config.yaml").read_text())["made_by"]

    first = made_by()
    assert first["decided"]["images"] == "two of them were left out: ± [bold]"
    assert "stale" not in first["decided"]

    def read_again():
        notes.note("images", "three")
        notes.note("colour", "on white")
        return original()

    monkeypatch.setattr(dataset_loader, "_read_digits", read_again)
    main([*CENTRALIZED, "--run_name", "a", "--resume"])  # other decisions are no reason to refuse
    said = capsys.readouterr().out
    assert "images: three\n" in said
    assert "colour: on white\n" in said
    assert made_by() == {**first, "decided": {**first["decided"], "colour": "on white"}}
    main(["evaluate", "a"])
    assert "colour: on white\n" in capsys.readouterr().out
    main(["centralized", "--config", "results/a/config.yaml", "--run_name", "b"])
    assert Path("results/b/summary.yaml").exists()


# errors of the system


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is of Linux")
def test_a_full_disk_names_the_file(monkeypatch):
    def write() -> None:
        with naming(Path("mine")), Path("/dev/full").open("w") as file:
            file.write("x")

    with pytest.raises(OSError, match="No space left") as error:
        write()
    assert error.value.filename == "mine"
    recorder = Recorder(Path("run"), "epoch")
    recorder.record(0, "val", Metrics(1.0, 1, 2))
    monkeypatch.setattr("fedtalos.app.run.recorder.opened", lambda *_: Path("/dev/full").open("ab"))  # noqa: SIM115
    with pytest.raises(OSError, match="No space left") as error:
        recorder.record(1, "val", Metrics(1.0, 1, 2))
    assert error.value.filename == "run/metrics.csv"


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "make room"),
        (errno.EDQUOT, "make room in your quota"),
        (errno.EROFS, "choose a place that can be written"),
        (errno.EACCES, "check the path and its rights"),
    ],
)
def test_whatever_fails_while_a_file_is_written_names_it(number, advice, monkeypatch, capsys):
    def fails(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(OSError, match=os.strerror(number)) as error:
        write_atomic(Path("folder/mine.yaml"), "text")
    assert error.value.filename == "folder/mine.yaml"
    says = refused([*CENTRALIZED, "--run_name", "a"], capsys)
    assert says.startswith(f"fedtalos: results/a/config.yaml: {os.strerror(number)}; {advice}")


def test_an_error_that_names_no_file_names_who_asked(monkeypatch, capsys):
    def fails(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("fedtalos.experiments.centralized.load", fails)
    says = refused([*CENTRALIZED, "--run_name", "a"], capsys)
    assert says.startswith(f"fedtalos: a file of {__name__}: Input/output error; ")


# threads


def test_main_runs_in_a_thread(capsys):
    codes: list[object] = []

    def run() -> None:
        try:
            main([*CENTRALIZED, "--run_name", "a"])
            codes.append(0)
        except SystemExit as error:
            codes.append(error.code)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert codes == [0], capsys.readouterr().err
    assert Path("results/a/summary.yaml").exists()


def test_nothing_named_after_a_home_is_left_behind(home):
    with pytest.raises(InputError, match="home of no user"):
        parse(["federated", "--mask", "~nobody-of-that-name/m"])
    main([*CENTRALIZED, "--run_name", "a", "--output_dir=~/deep"])
    assert [path.name for path in Path(home, "deep/results").iterdir()] == ["a"]
    assert not Path("~").exists()


def test_workers_have_the_folders_that_a_record_does_not_say(monkeypatch, tmp_path):
    told: dict[int, tuple[str, ...]] = {}
    monkeypatch.setattr(launch, "start_processes", lambda *_, args, **__: told.update(args))
    config = parse(["federated", "--output_dir", "out", "--cache_dir", "kept", "--weights", "a_run"])
    launch._start(config, tmp_path, 3)
    for words in told.values():
        theirs = parse(list(words[2:]))
        assert (theirs.run.output_dir, theirs.data, theirs.model) == (Path("out"), config.data, config.model)
    assert list(told) == [0, 1]
