import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fedtalos.app.config.files import flatten
from fedtalos.app.config.schema import RUN_CONFIGS, CentralizedConfig, EditingConfig, FederatedConfig
from fedtalos.app.sweep.grid import expand, read_grid
from fedtalos.cli import parse
from fedtalos.errors import InputError

CONFIGS = Path(__file__).parents[2] / "configs"
NOT_IN_FILES = {"config", "preset", "resume"}


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
