"""The report: one page that asks nothing of anywhere, with every name escaped, in a real browser where there is one."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from commands import refused

from fedtalos.app.figures.records import History, Row
from fedtalos.app.report.contents import Method, RunRecord, curves, headlines, methods_of, read_records, report_of
from fedtalos.app.report.mistakes import classes_of
from fedtalos.app.report.page import LARGEST, page, write_report
from fedtalos.app.report.pictures import map_of
from fedtalos.app.run.paths import RunPaths
from fedtalos.data.images import LabelledImages
from fedtalos.errors import InputError
from fedtalos.metrics import Metrics
from fedtalos.training.confusion import Confusion

NASTY = ("<script>alert(1)</script>", "=cmd()", "$x$", "</script><img src=x onerror=alert(1)>", "a\"b'c", "é\u202e")
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


def record(tmp_path: Path, name: str = "run", *, seed: int = 0, accuracy: float = 0.5, **options: object) -> RunRecord:
    rows = [
        Row(step, split, 1 / (step + 1), accuracy * step / 4, float(step), 100)
        for step in range(5)
        for split in ("train", "val")
    ]
    rows.append(Row(4, "test", 0.2, accuracy, 4.0, 100))
    summary = {
        "test_accuracy": {"last": accuracy, "best_on_val": accuracy},
        "val_accuracy": {"last": accuracy},
        "megabytes_sent": {"down": 2.0, "up": 2.0},
        "seconds": 12.0,
        "images_trained_on": 1000,
    }
    made_by = dict.fromkeys(("command_line", "device", "commit", "fedtalos", "torch", "started"), name)
    config = {"seed": seed, "learning_rate": 0.1, "made_by": made_by, **options}
    return RunRecord(RunPaths(tmp_path, name), MappingProxyType(config), summary, History(name, "round", rows))


def confused(names: tuple[str, ...]) -> tuple[Confusion, LabelledImages]:
    """Six images of each class, of which the first two are taken for the next class."""
    count = len(names)
    labels = torch.arange(count).repeat_interleave(6)
    answers = torch.where(torch.arange(len(labels)) % 6 < 2, (labels + 1) % count, labels)
    counts = torch.bincount(labels * count + answers, minlength=count**2).view(count, count)
    pixels = (torch.arange(len(labels)).view(-1, 1, 1, 1) * 3).expand(-1, 3, 8, 8).to(torch.uint8)
    return Confusion(counts, Metrics(1.0, int(counts.diagonal().sum()), len(labels)), answers), LabelledImages(
        pixels, labels
    )


class Elements(HTMLParser):
    """All elements, with what they would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.sources += [value or "" for key, value in attrs if key in ("src", "href")]
        assert not [key for key, _ in attrs if key.startswith("on")]


def test_names_from_files_never_become_markup(tmp_path: Path) -> None:
    classes = classes_of(*confused(NASTY), NASTY, NASTY[0])
    runs = [record(tmp_path, name, decided={}, mask=None) for name in NASTY]
    for report in (
        report_of(runs[:1], classes),
        report_of([replace(run, config={**run.config, "x": i}) for i, run in enumerate(runs)]),
    ):
        found = Elements(text := page(report))
        assert found.names.count("script") == 2
        assert all(source.startswith("data:image/png") for source in found.sources)
        assert html.escape(NASTY[0]) in text
        data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
        assert data is not None
        assert json.loads(data[1])["methods"][0]["name"] == NASTY[0]


def test_runs_that_differ_by_seed_alone_are_one_line_with_their_deviation(tmp_path: Path) -> None:
    runs = [record(tmp_path, f"dense-s{seed}", seed=seed, accuracy=0.5 + 0.1 * seed) for seed in range(3)]
    other = record(tmp_path, "masked", learning_rate=1.0)
    dense, masked = methods_of([*runs, other])
    assert (dense.name, len(dense.runs), masked.name) == ("dense-s", 3, "masked")
    assert headlines(dense)["test accuracy"] == "60.0 ± 10.0 %"
    assert headlines(masked)["test accuracy"] == "50.0 % (40.4 to 59.6)"
    last = curves(dense)["val"][-1]
    assert last[:4] == [4, 4.0, 60.0, 10.0]


def test_long_curves_are_thinned_and_nothing_infinite_reaches_the_page(tmp_path: Path) -> None:
    rows = [Row(step, "val", float("nan") if step == 7 else 1.0, 0.5, 0.0) for step in range(50_000)]
    run = replace(record(tmp_path), history=History("run", "round", rows))
    points = curves(Method("run", [run], {}))["val"]
    assert 400 <= len(points) < 810
    assert len(page(report_of([run]))) < LARGEST


def test_too_large_a_page_is_refused_and_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtalos.app.report.page.LARGEST", 1000)
    with pytest.raises(InputError, match="name fewer runs"):
        write_report(tmp_path / "report.html", report_of([record(tmp_path)]))
    assert not (tmp_path / "report.html").exists()


def test_what_is_no_character_is_spelled_out(tmp_path: Path) -> None:
    run = record(tmp_path)
    run.config["made_by"]["command_line"] = "fedtalos --output_dir \udcff"
    path = write_report(tmp_path / "report.html", report_of([run]))
    assert "--output_dir \\udcff</code>" in path.read_text("utf-8")


def test_mistakes_are_shown_by_their_own_images() -> None:
    names = ("a", "b", "c")
    found = classes_of(*confused(names), names, "test")
    first = found.pairs[0]
    assert (first.true, first.answer, first.images, len(first.pictures)) == ("a", "b", 2, 2)
    assert found.rows[0] == ("a", 4, 6, pytest.approx(66.67, abs=0.01))


def test_a_map_leaves_zero_transparent_and_the_largest_darkest() -> None:
    from base64 import b64decode
    from io import BytesIO

    from PIL import Image

    pixels = np.asarray(Image.open(BytesIO(b64decode(map_of(np.array([[0.0, 1.0, 2.0]])).partition(",")[2]))))
    assert pixels[0, :, 3].tolist() == [0, 255, 255]
    assert pixels[0, 2, :3].tolist() == [0, 84, 140]


def test_a_run_that_is_not_finished_has_no_report(in_a_folder_of_its_own, capsys) -> None:
    run = Path("results/a")
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("command: centralized\n")
    (run / "metrics.csv").write_text("epoch,split,loss,accuracy,bytes_down,bytes_up\n")
    assert "no finished run" in refused(["report", "a"], capsys)
    assert "no such run" in refused(["report", "b"], capsys)


@pytest.mark.parametrize("summary", ["test_accuracy: much", "seconds: long", "energy_wh: {card: [1]}"])
def test_a_summary_of_other_things_than_numbers_is_refused(in_a_folder_of_its_own, summary) -> None:
    run = Path("results/a")
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("command: centralized\n")
    (run / "metrics.csv").write_text("epoch,split,loss,accuracy,bytes_down,bytes_up\n")
    (run / "summary.yaml").write_text(summary)
    with pytest.raises(InputError, match=r"summary.yaml: broken"):
        read_records(RunPaths(Path(), "a"))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_real_browser_draws_the_curves_and_a_click_hides_one(tmp_path: Path) -> None:
    """The page itself is told to click, and its own document is what the browser hands back."""
    runs = [record(tmp_path, name, x=name) for name in ("one", "two")]
    watch = '<head><script>addEventListener("error", (event) => { window.failed = event.message; });</script>'
    click = """<script>
      addEventListener("load", () => {
        const curves = () => document.querySelectorAll("#chart .curve").length;
        const before = curves();
        document.querySelector("#legend button").click();
        document.title = window.failed ?? `curves ${before} ${curves()}`;
      });
    </script></body>"""
    path = tmp_path / "report.html"
    path.write_text(page(report_of(runs)).replace("</body>", click).replace("<head>", watch))
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom", path.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "<title>curves 2 1</title>" in shown
