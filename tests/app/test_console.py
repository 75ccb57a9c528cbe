"""Consoles that cannot show everything, and terminals that are narrow: no run ends for it, nothing is left behind."""

import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

from fedtalos.app.config.files import override
from fedtalos.app.config.schema import FederatedConfig
from fedtalos.app.run.bars import bar
from fedtalos.app.run.display import Display, say_facts, say_pairs
from fedtalos.app.run.ending import next_commands, say_next, what_to_try
from fedtalos.app.run.paths import RunPaths
from fedtalos.cli import main
from fedtalos.metrics import Metrics
from fedtalos.training.masked_parameters import MaskedParameters, head_mask

SMALL = shlex.split("--model_size micro --image_size 8 --patch_size 4 --weights none --device cpu --val_fraction 0.2")
GRID = {
    "seeds": [0, 1],
    "options": {"dataset": "digits", "model_size": "micro", "image_size": 8, "patch_size": 4, "weights": "none"},
    "grid": [{"command": "centralized", "options": {"num_epochs": 1, "train_limit": 40, "eval_limit": 20}}],
}

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


def odd_place() -> str:
    """A folder whose name holds letters that few consoles have, and, where the system allows it, a byte of none."""
    name = "±名\udce9"
    try:
        Path(name).mkdir()
    except (OSError, UnicodeEncodeError):
        name = "±名"
        Path(name).mkdir()
    return name


def odd_images(folder: str) -> None:
    """Two classes of an image folder, one of an odd name."""
    noise = np.random.default_rng(0)
    for label in ("a", "±名"):
        Path(folder, "images", label).mkdir(parents=True)
        for number in range(10):
            pixels = noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(Path(folder, "images", label, f"{number}.png"))


def commands() -> tuple[str, list[list[str]]]:
    """A federated run on oddly named images with its figures, a sweep with its table, masks compared, and a refusal."""
    place = odd_place()
    odd_images(place)
    Path("configs").mkdir()
    Path("configs/experiment_configs.yaml").write_text(yaml.safe_dump({"g": GRID}))
    data = ["--dataset", "folder", "--data_dir", f"{place}/images", "--output_dir", place, *SMALL]
    edit = ["editing", *data, "--criterion", "random", "--head", "random", "--num_iterations", "1", "--run_name"]
    clients = shlex.split("--num_clients 2 --num_rounds 1 --client_fraction 1 --local_steps 1 --batch_size 4")
    return place, [
        ["federated", *data, *clients, "--run_name", "a"],
        ["sweep", "g", "--device", "cpu", "--output_dir", place],
        [*edit, "m"],
        [*edit, "n", "--seed", "1"],
        ["mask", "compare", f"{place}/masks/m.safetensors", f"{place}/masks/n.safetensors", "--output_dir", place],
        ["evaluate", "a", "--output_dir", place],
        ["plot", "a", "--output_dir", place],
    ]


def assert_left(place: str) -> None:
    assert {path.name for path in Path(place, "results").iterdir()} == {"a", "g", "g-s0", "g-s1", "m", "n"}
    for path in ("results/a/summary.yaml", "results/g/table.md", "plots/m-vs-n/overlap.png", "plots/a/clients.png"):
        assert Path(place, path).is_file()
    assert yaml.safe_load(Path(place, "results/a/config.yaml").read_text())["data_dir"] == f"{place}/images"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.filterwarnings("ignore:Glyph")  # matplotlib's, of letters that its font lacks
def test_no_console_ends_a_run(encoding, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    err = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    place, asked = commands()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    for command in asked:
        main(command)
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", f"{place}/none"])
    out.flush()
    err.flush()
    said = out.buffer.getvalue().decode(encoding)
    assert "Overlap (intersection over union)" in said
    assert (" +- " if encoding == "ascii" else " ± ") in said
    assert "give a run's name" in err.buffer.getvalue().decode(encoding)
    assert_left(place)


def test_a_process_on_a_console_of_ascii():
    place, asked = commands()
    program = f"from fedtalos.cli import main\nmain({asked[0]!r})\n"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    done.stdout.decode("ascii")
    assert Path(place, "results/a/summary.yaml").is_file()


# narrow terminals


class Screen:
    """What a terminal shows of what is written to it: it knows line ends, moves upwards and erasures of lines."""

    def __init__(self, text: str, width: int) -> None:
        self.lines, self.row, self.column, self.width = [""], 0, 0, width
        while text:
            if text.startswith("\x1b["):
                end = next(at for at, letter in enumerate(text[2:], start=2) if letter.isalpha())
                self.control(text[2:end], text[end])
                text = text[end + 1 :]
            else:
                self.put(text[0])
                text = text[1:]

    def control(self, number: str, letter: str) -> None:
        if letter == "A":
            self.row = max(0, self.row - int(number or 1))
        elif letter == "K":
            self.lines[self.row] = ""

    def put(self, letter: str) -> None:
        if letter == "\r":
            self.column = 0
        elif letter == "\n" or self.column == self.width:
            self.row, self.column = self.row + 1, 0
            self.lines += [""] * (self.row + 1 - len(self.lines))
        if letter not in "\r\n":
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + letter + line[self.column + 1 :]
            self.column += 1

    @property
    def shown(self) -> list[str]:
        return [line.rstrip() for line in self.lines if line.strip()]


def screen_of(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return Screen(console.file.getvalue(), console.width).shown


def figures(number: int) -> Metrics:
    return Metrics(1234.5 * number, 10 * number, 1000)


def terminal(width: int) -> Console:
    return Console(width=width, force_terminal=True, file=io.StringIO(), color_system=None, legacy_windows=False)


@pytest.mark.parametrize("width", [72, 80, 200])
@pytest.mark.parametrize("unit", ["round", "head round"])
def test_the_live_line_is_one_line_and_goes_when_it_ends(width, unit):
    console = terminal(width)
    with Display(console, unit, 1000) as display:
        for number in range(1, 8):
            for _ in display.watch(range(3), 1 / 3):
                display._progress.refresh()
            display.finished(number, figures(number), figures(number) if number % 3 == 0 else None)
            display._progress.refresh()
            shown = screen_of(console)
            assert [line for line in shown if "ETA" in line] == [shown[-1]]
            assert len(shown[-1]) <= width - 4
            assert shown[-1].startswith(f"{unit} {number}/1000"[: width // 3])
    shown = screen_of(console)
    assert not any("ETA" in line or "━" in line for line in shown)
    said = "".join(shown).replace(" ", "")
    assert said.count(f"{unit}3/1000:trainloss".replace(" ", "")) == 1
    assert said.count(f"{unit}7/1000:trainloss".replace(" ", "")) == 1  # not kept so far, and the last


def test_while_the_last_round_is_validated_no_time_is_left():
    console = terminal(80)
    with Display(console, "round", 1) as display:
        list(display.watch(range(2), 1 / 2))
        display._progress.tasks[0].finished_time = 82.0  # what it took is not what is left
        with display.step("validating", 100):
            display._progress.refresh()
            assert screen_of(console)[-1].endswith("validating ETA 0:00:00")


def test_at_80_columns_a_kept_line_fits():
    console = terminal(80)
    with Display(console, "round", 100) as display:
        display.finished(100, figures(1), figures(1))
    assert len(screen_of(console)) == 1


def test_after_ctrl_c_no_copy_of_the_line_stays():
    console = terminal(80)

    def stopped() -> None:
        with Display(console, "round", 100) as display:
            for number in range(1, 5):
                display.finished(number, figures(number), None)
                display._progress.refresh()
                console.file.write("^C")  # as a terminal puts it where the cursor is
                display._progress.refresh()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    (line,) = screen_of(console)
    assert line.startswith("round 4/100: train loss")


def test_the_bar_of_images_and_bytes_is_one_line_too(monkeypatch):
    console = terminal(80)
    monkeypatch.setattr("fedtalos.app.run.bars.Console", lambda **_: console)
    for unit in ("images", "bytes"):
        with bar("decoding [train] of a rather long name", 10**9, unit) as advance:
            advance(10**8)
            console.file.write("^C")
        assert screen_of(console) == []


def test_elsewhere_every_round_is_a_plain_line():
    console = Console(width=80, file=io.StringIO())
    with Display(console, "round", 3) as display:
        for number in (1, 2, 3):
            display.finished(number, figures(number), None)
    lines = console.file.getvalue().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["round 1/3", "round 2/3", "round 3/3"]
    assert all("images/s; ETA" in line for line in lines)


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    console = terminal(80)
    with Display(console, "round", 2) as display:
        for number in (1, 2):
            display.finished(number, figures(number), None)
    assert [line.partition(":")[0] for line in console.file.getvalue().splitlines()] == ["round 1/2", "round 2/2"]


def test_steps_within_a_round_are_shown_in_the_line():
    console = terminal(80)
    with Display(console, "round", 3) as display:
        display.finished(1, figures(1), None)
        with display.step("validating", 200) as advance:
            advance(50)
            display._progress.refresh()
            assert "validating, 25 %" in screen_of(console)[-1]
        display._progress.refresh()
        assert "validating" not in screen_of(console)[-1]
        assert "loss" in screen_of(console)[-1]


def test_facts_keep_to_the_width_and_break_no_path():
    console = terminal(60)
    say_facts(console, {"model": f"from {'a-long-folder/' * 6}weights.safetensors", "device": "cpu, " * 20})
    lines = screen_of(console)
    assert lines[0] == "model   from"
    assert "".join(line.strip() for line in lines[1:3]).startswith("a-long-folder/")
    assert all(len(line) <= 60 for line in lines[3:])
    assert all(line.startswith(("device", " " * 8)) for line in lines[3:])


def test_pairs_of_many_things_keep_to_a_terminals_width():
    out = io.StringIO()
    say_pairs(Console(file=out, width=80), "cosines", np.full((12, 12), -0.5), np.full((12, 12), 0.25))
    said = out.getvalue()
    assert max(map(len, said.splitlines())) <= 80
    assert said.count("-0.50 (0.25)") == 12 * 12 - 12


def test_commands_to_copy_are_as_a_shell_reads_them():
    out = io.StringIO()
    paths = RunPaths(Path("a place"), "my run")
    say_next(Console(file=out, width=80), paths, next_commands("federated", paths, "another's"))
    copied = [shlex.split(line, comments=True) for line in out.getvalue().splitlines()[1:]]
    assert copied[0] == ["fedtalos", "predict", "my run", "IMAGE", "--output_dir", "a place"]
    assert copied[1][2:4] == ["another's", "my run"]
    assert "IMAGE --output_dir 'a place'  " in out.getvalue()


@pytest.mark.parametrize(
    ("said", "mask", "to_try"),
    [
        ({}, None, "a lower --learning_rate, --freeze_head, or fewer steps between rounds"),
        ({"one_shot": True}, "blocks", "a lower --learning_rate"),
        ({"dp_noise": 1.0}, "blocks", "less --dp_noise, a lower --learning_rate, or fewer steps between rounds"),
        ({"trainable": "head"}, "head", "a lower --learning_rate, or fewer steps between rounds"),
    ],
)
def test_a_run_that_loses_is_told_what_could_help_it(vit, said, mask, to_try):
    masks = {"head": head_mask(vit), "blocks": {"blocks.0.attn.proj.weight": torch.ones(96, 96, dtype=torch.bool)}}
    config = override(FederatedConfig(), said, "the test")
    assert what_to_try(config, MaskedParameters(vit, masks.get(mask))) == to_try
