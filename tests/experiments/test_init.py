"""init: a starter file of options that any training command takes."""

import pytest
import yaml
from commands import CENTRALIZED, refused

from fedtalos.app.config.files import flatten, from_file, override
from fedtalos.app.config.help import everyday
from fedtalos.app.config.init import starter
from fedtalos.app.config.schema import RUN_CONFIGS
from fedtalos.cli import main, parse

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own", "without_figures")


def test_the_starter_holds_the_everyday_options_at_their_defaults(tmp_path, capsys):
    main(["init"])
    assert "fedtalos federated --config fedtalos.yaml" in capsys.readouterr().out
    path = tmp_path / "fedtalos.yaml"
    found = yaml.safe_load(path.read_text())
    assert found.keys() == everyday() - {"config", "preset", "resume"}
    for command, kind in RUN_CONFIGS.items():
        assert flatten(override(kind(), from_file(path, command), "fedtalos.yaml")) == flatten(kind())
    for line in path.read_text().splitlines():
        assert line.startswith("#") or not line or "#" in line  # each has its comment


def test_a_run_takes_the_starter():
    main(["init", "mine.yaml"])
    config = parse([*CENTRALIZED, "--config", "mine.yaml"])
    assert flatten(config) | {"config": None} == flatten(parse(CENTRALIZED))


def test_comments_of_several_lines_stay_together_and_empty_headings_go():
    every = "# Every option\n\n# --- a: one\nx: 1  # of x\n       # and more\ny: 2\n\n# --- b: two\nz: 3\n"
    assert starter(every, {"x"}).endswith("lists them.\n\n# --- a: one\nx: 1  # of x\n       # and more\n")


def test_what_is_there_stays(tmp_path, capsys):
    (tmp_path / "fedtalos.yaml").write_text("seed: 7\n")
    assert "fedtalos.yaml: is there already" in refused(["init"], capsys)
    assert (tmp_path / "fedtalos.yaml").read_text() == "seed: 7\n"
    assert "there is no folder nowhere" in refused(["init", "nowhere/a.yaml"], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["fedtalos.yaml"]
