"""Files of strangers do not choose where we read and write, nor what a terminal or a spreadsheet does."""

import csv
import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from limits import check_sentence, refused
from material import write
from matplotlib.figure import Figure
from rich.table import Table

from fedtalos.app.config.after_training import ExportConfig
from fedtalos.app.config.files import read_yaml
from fedtalos.app.config.schema import CentralizedConfig
from fedtalos.app.config.tools import EvaluateConfig
from fedtalos.app.evaluated import write_confusion, write_per_class
from fedtalos.app.figures import runs as figures
from fedtalos.app.figures.draw import plot_split, write_figures
from fedtalos.app.figures.style import drawable, rendered
from fedtalos.app.report.contents import Report, files_of
from fedtalos.app.report.page import write_report
from fedtalos.app.run.display import PlainConsole
from fedtalos.app.run.folders import claimed
from fedtalos.app.run.paths import RunPaths
from fedtalos.app.run.recorder import write_csv
from fedtalos.app.sweep.tables import in_markdown
from fedtalos.checkpoint import save_checkpoint
from fedtalos.cli import main, parse
from fedtalos.data.class_names import check_same_classes
from fedtalos.data.photos import open_photos
from fedtalos.errors import InputError
from fedtalos.experiments import export
from fedtalos.experiments.evaluate import of_run
from fedtalos.experiments.predict import as_csv
from fedtalos.files import is_locked, opened
from fedtalos.metrics import Metrics
from fedtalos.notes import note, noted
from fedtalos.training.confusion import Confusion
from fedtalos.training.prediction import Prediction

ESCAPES = ["\x1b[2J", "\x1b]0;owned\x07", "a\rb", "a\nb", "\x00", "\u202egnp.exe", "\udce9", "\x9b31m", "x" * 5000]
"""What a terminal acts on, or cannot show."""


@pytest.fixture
def record(in_a_folder_of_its_own) -> dict[str, object]:
    """A config.yaml of a run `theirs` that names places of its own."""
    elsewhere = str(in_a_folder_of_its_own / "elsewhere")
    said = {"command": "centralized", "dataset": "digits", "output_dir": elsewhere, "cache_dir": elsewhere}
    said |= {"run_name": "theirs", "made_by": {"folder": str(in_a_folder_of_its_own), "inputs": {}}}
    Path("results/theirs").mkdir(parents=True)
    Path("results/theirs/config.yaml").write_text(yaml.safe_dump(said))
    return said


@pytest.mark.parametrize("words", ["--resume", "--resume --run_name theirs", "--config results/theirs/config.yaml"])
def test_a_record_does_not_say_where_to_write(words, record):
    config = parse(["centralized", *words.split()])
    assert isinstance(config, CentralizedConfig)
    assert config.data.dataset == "digits"
    assert (config.run.output_dir, config.data.cache_dir) == (Path(), None)
    asked = parse(["centralized", *words.split()[:1], *words.split()[1:], "--cache_dir", "mine"])
    assert asked.data.cache_dir == Path("mine")


def test_a_run_that_says_it_lies_elsewhere_goes_on_where_it_lies(record):
    Path("elsewhere/results/theirs").mkdir(parents=True)
    Path("elsewhere/results/theirs/config.yaml").write_text(yaml.safe_dump(record))
    config = parse(["centralized", "--resume", "--run_name", "theirs", "--output_dir", "elsewhere"])
    assert config.run.output_dir == Path("elsewhere")


def test_a_checkpoint_from_elsewhere_does_not_say_where_to_read(in_a_folder_of_its_own):
    options = {"data_dir": "/secret", "cache_dir": "/secret", "output_dir": "/secret", "mask": "/secret/m", "seed": 3}
    options |= {"image_size": 4096, "head": "/secret/h", "weights": "hf:owner/repo"}
    for folder in ("checkpoints/mine", "theirs"):
        save_checkpoint(Path(folder), "last", 1, {"w": torch.zeros(1)}, {"command": "centralized", "options": options})
    _, theirs = of_run(EvaluateConfig(checkpoint=Path("theirs/last.json")))
    _, mine = of_run(EvaluateConfig(checkpoint=Path("mine")))
    assert (theirs.data.data_dir, mine.data.data_dir) == (Path("data"), Path("/secret"))
    for config in (theirs, mine):
        assert "secret" not in str({**config.run.model_dump(), **config.model.model_dump()})
        assert (config.data.cache_dir, config.model.image_size, config.run.seed) == (None, None, 3)


def test_figures_are_not_written_through_links(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "plots").symlink_to("elsewhere")
    with refused("plots: is a link"):
        write_figures({"a": Figure(figsize=(1, 1))}, tmp_path / "plots")
    with refused("plots: is a link"):
        write_report(tmp_path / "plots/report.html", Report("none", [], {}))
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a.png").symlink_to(tmp_path / "elsewhere/a.png")
    write_figures({"a": Figure(figsize=(1, 1))}, tmp_path / "real")
    assert not any((tmp_path / "elsewhere").iterdir())
    assert not (tmp_path / "real/a.png").is_symlink()


@pytest.mark.parametrize("folder", ["results/a", "checkpoints/a", "plots/a"])
def test_a_run_does_not_write_through_links(folder, in_a_folder_of_its_own):
    Path("elsewhere").mkdir()
    Path(folder).parent.mkdir(exist_ok=True)
    Path(folder).symlink_to(in_a_folder_of_its_own / "elsewhere")
    with refused(f"{folder}: is a link"), claimed(RunPaths(Path(), "a")):
        pass
    assert not any(Path("elsewhere").iterdir())


def test_an_export_is_not_written_through_a_link(in_a_folder_of_its_own, monkeypatch):
    monkeypatch.setattr(export, "open_trained", lambda *_: SimpleNamespace(name="a"))
    Path("exports").mkdir()
    Path("exports/a").symlink_to(in_a_folder_of_its_own)
    with refused("exports/a: is a link"):
        export.run(ExportConfig(run="a"), PlainConsole())


def test_folders_of_all_runs_may_be_links(in_a_folder_of_its_own):
    Path("large_disk").mkdir()
    Path("results").symlink_to("large_disk")
    with claimed(RunPaths(Path(), "a")):
        Path("results/a/notes").write_text("kept")
    assert Path("large_disk/a/notes").is_file()


@pytest.mark.parametrize("mode", ["ab", "wb"])
def test_files_that_grow_are_not_written_through_links(mode, tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "metrics.csv").symlink_to("theirs")
    with opened(tmp_path / "metrics.csv", mode) as file:
        file.write(b"ours")
    assert (tmp_path / "theirs").read_text() == "theirs"
    assert (tmp_path / "metrics.csv").read_bytes() == b"ours"


def test_a_lock_that_is_a_pipe_keeps_nobody(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    assert not is_locked(tmp_path / ".lock")


def test_a_pattern_of_many_stars_is_looked_for_once(monkeypatch):
    """In a folder with a link to itself each `**` would multiply what there is to look at."""
    asked = []
    monkeypatch.setattr("glob.glob", lambda pattern, **_: asked.append(pattern) or [])
    with refused("no file is called so"):
        open_photos([Path("d/**/**/**/x.png")])
    assert asked == ["d/**/x.png"]


def test_a_report_names_files_of_any_name(tmp_path):
    paths = RunPaths(tmp_path, "a")
    for name in ("\x1b[2J", "\udce9", "<b>"):
        write(str(paths.results / name), b"")
    assert all(name.isprintable() for name in files_of(SimpleNamespace(paths=paths)))


# what is printed and written


@pytest.mark.parametrize("name", ESCAPES)
def test_names_reach_no_terminal_raw(name):
    text = io.StringIO()
    console, table = PlainConsole(file=text, width=200), Table()
    table.add_column(f"[bold]{name}")
    table.add_row(f"[/]{name[:80]}")
    console.print(table)
    console.print(name[:80], markup=False)
    assert text.getvalue().replace("\n", "").isprintable()
    assert "[bold]" in text.getvalue()
    check_sentence(str(InputError(f"head {name}: no such file")))
    note("images", f"left out: {name}")
    assert noted()["images"].replace("\n", "").isprintable()
    if "\udce9" not in name:
        with refused("knows 1 classes"):
            check_same_classes([name], ["b"], "checkpoint pets/last.json")


@pytest.mark.parametrize("name", [*ESCAPES, r"$\frac{$", "$x$", "_^{}"])
def test_names_in_figures(name):
    """No warning, which would be an error here, and no end of the drawing."""
    counts = np.ones((2, 2), dtype=np.int64)
    figure = figures.clients(counts, [drawable(name, 40), "b"], f"Images\n{drawable(name)}")
    assert rendered(figure).startswith(b"\x89PNG")
    assert len(drawable(name)) <= 160


def test_a_split_of_an_unknown_scheme_is_refused(tmp_path):
    np.savez(tmp_path / "split.npz", client=np.uint8([0, 1]), label=np.uint8([0, 1]), classes=["a", "b"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"partition": r"$\frac{$"}))
    with refused("config.yaml", "partition: input should be 'iid'"):
        plot_split(tmp_path, tmp_path / "plots")


@pytest.mark.parametrize("text", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(1)", "\t=1", "\r=1"])
def test_no_cell_is_run(text, tmp_path):
    write_csv(tmp_path / "t.csv", [{"run": text, "loss": "-0.5", text: 3}])
    with (tmp_path / "t.csv").open(newline="") as file:
        header, cells = csv.reader(file)
    assert (header[:2], cells[1:]) == (["run", "loss"], ["-0.5", "3"])
    for cell in (header[2], cells[0]):
        assert cell.isprintable()
        assert cell[0] in "'\\"


def test_no_name_of_a_class_is_run(tmp_path):
    found = Confusion(torch.eye(2, dtype=torch.long), Metrics(), torch.arange(2))
    for written in (write_per_class, write_confusion):
        written(tmp_path / "t.csv", found, ("=1+1", "cat"))
        with (tmp_path / "t.csv").open(newline="") as file:
            assert "'=1+1" in {line[0] for line in csv.reader(file)}
    said = as_csv([Prediction("=photo.jpg", ("=1+1",), (0.9,))])
    assert said.splitlines()[1] == "'=photo.jpg,1,'=1+1,0.900000"


def test_cells_of_markdown_are_text():
    assert in_markdown("a|b\n<img src=x> [x](javascript:y) `c`") == r"a\|b \<img src=x\> \[x\](javascript:y) \`c\`"
    assert in_markdown("label_skew 84.1 ± 0.3") == "label_skew 84.1 ± 0.3"


@pytest.mark.parametrize(
    "text", ["a: 1\na: 2", "a: {b: 1, b: 2}", "- {a: 1, a: 1}", "? a\n: 1\n? a\n: 2", "<<: {}\n<<: {}"]
)
def test_a_key_twice_is_refused(text, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with refused("c.yaml, line", "is said twice"):
        read_yaml(tmp_path / "c.yaml")


def test_a_console_that_cannot_show_a_name_is_no_end_of_a_sweep(in_a_folder_of_its_own, monkeypatch):
    Path("configs").mkdir()
    axes = {"größe": {"±é": {}}}
    grid = {"grid": [{"command": "federated", "axes": axes, "options": {"dataset": "digits"}}]}
    Path("configs/experiment_configs.yaml").write_text(yaml.safe_dump({"g": grid}))
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), "ascii", errors="strict"))
    main(["sweep", "g", "--dry_run"])
    sys.stdout.flush()
    assert b"g-??-s0" in sys.stdout.buffer.getvalue()
