import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedtalos._version import __version__
from fedtalos.app.config.files import flatten
from fedtalos.app.config.help import GROUPS, everyday, is_everyday, option_names
from fedtalos.app.config.schema import RUN_CONFIGS, CentralizedConfig, EditingConfig, FederatedConfig
from fedtalos.app.config.tools import MASK_TOOLS, TOOL_CONFIGS, MaskConfig
from fedtalos.app.run.folders import AlreadyFinished
from fedtalos.app.sweep.grid import expand, read_grid
from fedtalos.cli import dashed, main, parse
from fedtalos.errors import InputError

CONFIGS = Path(__file__).parents[2] / "configs"
NOT_IN_FILES = {"config", "preset", "resume", "resume_or_start"}


def test_the_default_file_holds_every_option_once_with_its_default():
    text = (CONFIGS / "default_config.yaml").read_text(encoding="utf-8")
    keys = [line.split(":")[0] for line in text.splitlines() if line[:1].isalpha()]
    assert len(keys) == len(set(keys))
    expected = {}
    for config_type in RUN_CONFIGS.values():
        expected |= flatten(config_type())
    assert yaml.safe_load(text) == {key: value for key, value in expected.items() if key not in NOT_IN_FILES}


@pytest.mark.parametrize("command", RUN_CONFIGS)
def test_the_default_file_changes_nothing(command):
    path = CONFIGS / "default_config.yaml"
    with_file = flatten(parse([command, "--config", str(path)])) | {"config": None}
    assert with_file == flatten(parse([command]))


def test_every_preset_is_one():
    presets = yaml.safe_load((CONFIGS / "experiment_configs.yaml").read_text(encoding="utf-8"))
    for name, preset in presets.items():
        if "grid" in preset:
            assert len(expand(name, read_grid(name), {})) > 1
            continue
        config = parse([preset["command"], "--preset", name])
        defaults = flatten(RUN_CONFIGS[preset["command"]]())
        for key, value in preset.items():
            if key != "command":
                assert flatten(config)[key] == value
                assert defaults[key] != value, f"{name}: {key} is the default"


def test_flags_beat_the_preset_which_beats_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    Path("configs/experiment_configs.yaml").write_text("p: {command: federated, num_clients: 7, num_rounds: 8}")
    Path("f.yaml").write_text("num_clients: 3\nnum_rounds: 4\nbatch_size: 5\nnum_epochs: 6\n")
    config = parse(["federated", "--config", "f.yaml", "--preset", "p", "--num-rounds", "9"])
    assert isinstance(config, FederatedConfig)
    assert (config.split.num_clients, config.federation.num_rounds, config.train.batch_size) == (7, 9, 5)


def test_the_three_commands_of_the_design():
    central = parse(["centralized", "--model_size", "small", "--num_epochs", "100"])
    assert isinstance(central, CentralizedConfig)
    assert (central.model.model_size, central.num_epochs) == ("small", 100)
    federated = parse(["federated", "--num_clients", "100", "--num_rounds", "100"])
    assert isinstance(federated, FederatedConfig)
    assert federated.federation.client_fraction == 0.1
    editing = parse(["editing", "--target_sparsity", "0.9", "--num_iterations", "10"])
    assert isinstance(editing, EditingConfig)
    assert (editing.editing.target_sparsity, editing.editing.num_iterations) == (0.9, 10)


def test_the_options_page_is_up_to_date():
    docs = Path(__file__).parents[2] / "docs"
    made = subprocess.run([sys.executable, docs / "make_options.py", "-"], capture_output=True, text=True, check=True)
    assert (docs / "options.md").read_text(encoding="utf-8") == made.stdout, "run: python docs/make_options.py"


def test_fisher_true_may_be_written_without_quotes(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("fisher: true\n")
    assert parse(["editing", "--config", str(path)]).editing.fisher == "true"
    path.write_text("fisher: false\n")
    with pytest.raises(InputError, match="fisher: expected no yes or no, got false"):
        parse(["editing", "--config", str(path)])


def test_talos_is_another_name_of_least_sensitive(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("criterion: talos\n")
    for words in (["--criterion", "talos"], ["--config", str(path)], []):
        assert parse(["editing", *words]).editing.criterion == "least_sensitive"


def test_mask_make_is_editing():
    asked = ["--target_sparsity", "0.5", "--seed", "3"]
    assert parse(["mask", "make", *asked]) == parse(["editing", *asked])
    shown = parse(["mask", "show", "masks/m.safetensors"])
    assert isinstance(shown, MaskConfig)
    assert shown.tool.mask == Path("masks/m.safetensors")


def page(words: str, capsys) -> str:
    """What a command prints before it ends with exit code 0."""
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert not stop.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("command", RUN_CONFIGS)
def test_the_help_shows_everyday_options_and_help_all_every_one(command, capsys):
    short, long = page(f"{command} --help", capsys), page(f"{command} --help_all", capsys)
    assert page(f"{command} --seed 1 -h", capsys) == short
    assert page(f"{command} --help-all --config nowhere.yaml", capsys) == long
    options = option_names(RUN_CONFIGS[command])
    for text, wanted in ((short, [name for name, field in options.items() if is_everyday(field)]), (long, options)):
        assert max(map(len, text.splitlines())) <= 80
        flags = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
        assert [flag.replace("[no_]", "") for flag in flags] == [f"--{name}" for name in wanted]
    hidden = len(options) - short.count("\n  --")
    assert short.splitlines()[-1] == f"fedtalos {command} --help_all shows {hidden} more options."


def test_about_thirty_options_are_for_every_day():
    assert 25 <= len(everyday()) <= 35
    assert {"num_clients", "learning_rate", "target_sparsity", "weights", "mask", "seed"} <= everyday()


def test_a_switch_that_is_on_says_how_it_is_put_off(capsys):
    assert "--[no_]refit_head" in page("federated --help_all", capsys)
    assert "--[no_]freeze_head" not in page("federated --help_all", capsys)


def test_hidden_options_parse():
    assert parse(["federated", "--optimizer", "sgd", "--momentum", "0.5"]).train.momentum == 0.5


@pytest.mark.parametrize("words", ["--help", "mask --help", *(f"{c} --help" for c in TOOL_CONFIGS if c != "mask")])
def test_every_other_help_is_80_columns_wide(words, capsys):
    text = page(words, capsys)
    assert max(map(len, text.splitlines())) <= 80
    assert text.startswith("usage: fedtalos")


def test_the_overview_names_every_command_once(capsys):
    assert sorted(name for names in GROUPS.values() for name in names) == sorted([*RUN_CONFIGS, *TOOL_CONFIGS])
    assert {*RUN_CONFIGS, *TOOL_CONFIGS} <= set(page("--help", capsys).split())
    assert {"make", *MASK_TOOLS} <= set(page("mask --help", capsys).split())


def test_the_version(capsys):
    assert page("--version", capsys) == f"fedtalos {__version__}\n"
    ended = subprocess.run([sys.executable, "-m", "fedtalos", "--version"], capture_output=True, text=True, check=True)
    assert ended.stdout == f"fedtalos {__version__}\n"


@pytest.mark.parametrize("command", [*RUN_CONFIGS, *TOOL_CONFIGS])
def test_every_command_is_a_module_that_main_calls_directly(command, monkeypatch):
    called = []
    module = import_module(f"fedtalos.experiments.{command}")
    assert list(inspect.signature(module.run).parameters) == ["config", "console"]
    monkeypatch.setattr(module, "run", lambda *given: called.append((given[0], inspect.stack()[1].function)))
    needs = {
        "evaluate": ["done"],
        "sweep": ["digits"],
        "forget": ["done", "--task", "0"],
        "mask": ["show", "masks/m.safetensors"],
        "vector": ["show", "vectors/v.safetensors"],
        "fleet": ["demo"],
        "compare": ["done", "other"],
        "report": ["done"],
        "predict": ["done", "cat.jpg"],
        "explain": ["done", "cat.jpg"],
        "export": ["done"],
        "push": ["done", "--hub", "me/mine"],
    }
    main([command, *needs.get(command, [])])
    ((config, caller),) = called
    assert config.command == command
    assert caller == "main"


def test_a_finished_run_is_no_error(monkeypatch, capsys):
    def finished(*_):
        raise AlreadyFinished("mine is finished already: results/mine/summary.yaml")

    monkeypatch.setattr("fedtalos.experiments.federated.run", finished)
    main(["federated"])
    assert capsys.readouterr().out == "mine is finished already: results/mine/summary.yaml\n"


FEDERATED = list(option_names(FederatedConfig))


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("val_fraction 2.0: expected a share", "--val_fraction 2.0: expected a share"),
        (
            "image size 9 is no multiple; choose image_size and patch_size so that it is",
            "image size 9 is no multiple; choose --image_size and --patch_size so that it is",
        ),
        ("lower eval_batch_size, or clients_at_once.", "lower --eval_batch_size, or --clients_at_once."),
        ('(raise num_clients) or "num_clients"', '(raise --num_clients) or "num_clients"'),
        # one word: only at the beginning, with a value or a colon
        ("head nowhere: cannot be read", "--head nowhere: cannot be read"),
        ("mask my/own.safetensors: no such file", "--mask my/own.safetensors: no such file"),
        ("seed: expected a number", "--seed: expected a number"),
        ("device 'tpu': not available", "--device 'tpu': not available"),
        ("head of the weights: does not fit the data", "head of the weights: does not fit the data"),
        ("the head and the mask do not fit: weights none", "the head and the mask do not fit: weights none"),
        # what is written already, is quoted, or is part of a path
        ("--num_clients 5: there are 4; lower --num_clients", "--num_clients 5: there are 4; lower --num_clients"),
        ("unknown option 'num_clients' of the clients' own", "unknown option 'num_clients' of the clients' own"),
        ("clients' num_clients isn't it", "clients' --num_clients isn't it"),
        ("run `fedtalos plot num_clients`", "run `fedtalos plot num_clients`"),
        ("data_dir/num_clients: no folder", "data_dir/num_clients: no folder"),
        ("runs/data_dir/x and num_clients.yaml", "runs/data_dir/x and num_clients.yaml"),
        ("my_num_clients, num_clients_2, num_clients-old", "my_num_clients, num_clients_2, num_clients-old"),
        # other commands' options
        ("target_sparsity 2: expected a share", "target_sparsity 2: expected a share"),
    ],
)
def test_the_command_line_adds_the_dashes(text, written):
    assert dashed(text, FEDERATED) == written
    assert dashed(text, []) == text


pieces = st.one_of(
    st.sampled_from(
        [*FEDERATED, "--", "-", "'", '"', "`", "/", "\\", ".", ": ", " ", ", ", "=", "~", "client", "9", "é"]
    ),
    st.text(max_size=3),
)


@given(st.lists(pieces, max_size=12).map("".join))
def test_dashes_are_added_once_and_nothing_else_changes(text):
    written = dashed(text, FEDERATED)
    assert dashed(written, FEDERATED) == written
    assert written.replace("--", "") == text.replace("--", "")


@given(st.lists(st.sampled_from([*FEDERATED, "images", "a.b"]), min_size=2, max_size=5).map("/".join))
def test_paths_stay_as_they_are(path):
    for text in (f"{path}: cannot be read", f"no folder {path}", f"/{path} is in the way", f"./{path}, ~/{path}"):
        assert dashed(text, FEDERATED) == text
