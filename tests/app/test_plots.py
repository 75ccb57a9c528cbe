"""Figures from synthetic records: which files appear, what is drawn from which rows, and what is refused."""

import io
import struct
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import yaml
from conftest import mask_header

from fedtalos.app.figures import runs as figures
from fedtalos.app.figures import sweeps
from fedtalos.app.figures.draw import plot_all, plot_comparison, plot_iterations, plot_masks, plot_run, plot_split
from fedtalos.app.figures.records import History, Row
from fedtalos.app.run import split_file
from fedtalos.errors import InputError
from fedtalos.training.editing.describe import KINDS, DensityRow
from fedtalos.training.editing.mask_file import write_mask_file

HEADER = "split,loss,accuracy,examples,learning_rate,bytes_down,bytes_up,seconds\n"


def npz(**arrays: object) -> bytes:
    content = io.BytesIO()
    split = {"client": np.uint8([0, 0, 1, 1]), "label": np.uint8([0, 1, 1, 2]), "classes": ["a$b$", "_c", "d"]}
    np.savez(content, **{name: array for name, array in (split | arrays).items() if array is not None})
    return content.getvalue()


def make_run(folder: Path, step: str = "round", sent: int = 1_000_000, partition: str = "label_skew") -> Path:
    folder.mkdir(parents=True)
    lines = [f"{step},{HEADER}"]
    for at in range(1, 5):
        total = at * sent
        lines.append(f"{at},train,{3 / at},{0.2 * at},64,0.01,{total},{total},{at}\n")
        lines.append(f"{at},val,{4 / at},{0.15 * at},50,,{total},{total},{at}\n")
    lines.append(f"4,test,1.4,0.44,50,,{4 * sent},{4 * sent},4\n")
    (folder / "metrics.csv").write_text("".join(lines))
    options = {"command": "federated", "partition": partition, "classes_per_client": 2, "alpha": 0.3, "seed": 0}
    (folder / "config.yaml").write_text(yaml.safe_dump(options))
    if step == "round":
        (folder / "split.npz").write_bytes(npz())
    return folder


def make_mask(path: Path, active: int, width: int = 4) -> Path:
    mask = {
        f"blocks.{block}.{layer}": torch.arange(torch.Size(shape).numel()).reshape(shape) < active
        for block in range(2)
        for layer, shape in (("attn.qkv.weight", (3 * width, width)), ("norm1.weight", (width,)))
    }
    facts = mask_header(mask, {"name": "timm:of_two_blocks"})
    write_mask_file(path, mask, facts)
    return path


def assert_png(path: Path) -> None:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    width, _ = struct.unpack(">II", content[16:24])
    assert 800 <= width <= 1600
    assert len(content) < 200_000


def test_a_federated_run_gets_every_figure(tmp_path: Path) -> None:
    paths = plot_run(make_run(tmp_path / "results" / "dense"), tmp_path / "plots")
    assert sorted(path.name for path in paths) == ["clients.png", "curves.png", "megabytes.png"]
    assert sorted((tmp_path / "plots").iterdir()) == sorted(paths)
    for path in paths:
        assert_png(path)


def test_a_centralized_run_gets_curves_only(tmp_path: Path) -> None:
    paths = plot_run(make_run(tmp_path / "run", step="epoch", sent=0), tmp_path / "plots")
    assert [path.name for path in paths] == ["curves.png"]


def test_a_comparison_may_mix_federated_and_centralized(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "dense"),
        make_run(tmp_path / "sparse", sent=100_000),
        make_run(tmp_path / "central", step="epoch", sent=0),
    ]
    paths = plot_comparison(runs, tmp_path / "plots")
    assert [path.name for path in paths] == ["curves.png", "megabytes.png"]
    for path in paths:
        assert_png(path)


def test_the_same_records_give_the_same_bytes_and_leave_settings_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    settings = dict(matplotlib.rcParams)
    first = [path.read_bytes() for path in plot_run(run, tmp_path / "first")]
    assert [path.read_bytes() for path in plot_run(run, tmp_path / "second")] == first
    assert dict(matplotlib.rcParams) == settings


def test_curves_show_the_rows_of_each_split() -> None:
    nan = float("nan")
    rows = [Row(1, "train", 2.0, 0.5, 1), Row(1, "val", 3.0, 0.25, 1), Row(2, "train", 1.0, nan, 2)]
    figure = figures.curves([History("run", "round", [*rows, Row(2, "test", 2.5, 0.75, 2)])])
    accuracy, loss = figure.axes
    assert (accuracy.get_xlabel(), accuracy.get_ylabel()) == ("round", "accuracy (%)")
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in accuracy.lines}
    assert drawn == {"train": ([1], [50.0]), "val": ([1], [25.0]), "test": ([2], [75.0])}
    assert {line.get_label(): list(line.get_ydata()) for line in loss.lines}["train"] == [2.0, 1.0]
    assert figure.get_suptitle().endswith("run: test 75.0 %")


def history(name: str, total: float) -> History:
    return History(name, "round", [Row(at, "val", 1.0, 0.5, at * total / 2) for at in range(3)])


def test_megabytes_are_on_a_log_axis_only_where_totals_lie_far_apart() -> None:
    def scale(*totals: float) -> str:
        return figures.megabytes([history(str(total), total) for total in totals]).axes[0].get_xscale()

    assert scale(10) == scale(10, 20) == "linear"
    assert scale(10, 100) == "log"


def test_every_run_of_a_full_comparison_looks_different() -> None:
    figure = figures.curves([history(str(index), 1) for index in range(figures.MOST_RUNS)])
    looks = {(line.get_color(), line.get_marker()) for line in figure.axes[0].lines}
    assert len(looks) == figures.MOST_RUNS
    assert len(figure.legends[0].get_texts()) == figures.MOST_RUNS


@pytest.mark.parametrize(("num_clients", "num_classes"), [(1, 1), (5, 10), (1000, 100)])
def test_clients_show_each_count_and_leave_none_blank(num_clients: int, num_classes: int) -> None:
    counts = np.arange(num_clients * num_classes).reshape(num_clients, num_classes)
    counts[-1, -1] = 7
    image = figures.clients(counts, [str(index) for index in range(num_classes)], "title").axes[0].images[0].get_array()
    assert image is not None
    np.testing.assert_array_equal(np.ma.filled(image, 0), counts.T)
    np.testing.assert_array_equal(np.ma.getmaskarray(image), counts.T == 0)


def test_of_very_many_clients_the_first_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = 1_000_000
    run = make_run(tmp_path / "run")
    (run / "split.npz").write_bytes(npz(client=np.arange(many, dtype=np.uint32), label=np.zeros(many, np.uint8)))
    drawn = []
    monkeypatch.setattr("fedtalos.app.figures.draw.rendered", lambda figure, _: drawn.append(figure) or b"")
    plot_split(run, tmp_path / "plots")
    (axes, _) = drawn[0].axes
    assert axes.images[0].get_array().shape == (3, split_file.MOST_CLIENTS)
    assert "the first 200 of 1,000,000 clients" in axes.get_title()


@pytest.mark.parametrize(
    ("partition", "words"),
    [
        ("iid", "IID, 2 clients"),
        ("label_skew", "2 classes per client, 2 clients"),
        ("dirichlet", "Dirichlet, alpha 0.3, 2 clients"),
        ("quantity", "unequal amounts, 2 clients"),
    ],
)
def test_a_split_is_called_by_its_plain_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partition: str, words: str
) -> None:
    drawn = []
    monkeypatch.setattr("fedtalos.app.figures.draw.rendered", lambda figure, _: drawn.append(figure) or b"")
    plot_split(make_run(tmp_path / "run", partition=partition), tmp_path / "plots")
    assert drawn[0].axes[0].get_title().splitlines()[1] == words


def test_density_cells_say_their_per_cent() -> None:
    rows = [DensityRow(0, "q", 1, 8), DensityRow(0, "biases", 0, 3), DensityRow(1, "q", 8, 8)]
    axes = figures.density(rows, "title").axes[0]
    assert {text.get_position(): text.get_text() for text in axes.texts} == {
        (0, 0): "12.5",
        (1, 0): "0.0",
        (0, 1): "100.0",
    }
    assert [label.get_text() for label in axes.get_xticklabels()] == ["q", "biases"]


def test_masks_get_a_density_each_and_an_overlap_together(tmp_path: Path) -> None:
    masks = [make_mask(tmp_path / f"{name}.safetensors", active) for name, active in (("a", 2), ("b", 4), ("none", 0))]
    paths = plot_masks(masks, tmp_path / "plots")
    assert [path.name for path in paths] == ["a_density.png", "b_density.png", "none_density.png", "overlap.png"]
    for path in paths:
        assert_png(path)
    assert [path.name for path in plot_masks(masks[:1], tmp_path / "one")] == ["a_density.png"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("metrics.csv", None, "no metrics.csv"),
        ("metrics.csv", "", "an empty file"),
        ("metrics.csv", "step,split\n1,val\n", "expected the columns"),
        ("metrics.csv", f"round,{HEADER}", "no accuracy yet"),
        ("metrics.csv", f"round,{HEADER}1,val,much,0.5,50,,0,0,1\n", "line 2: expected numbers"),
        ("metrics.csv", f"round,{HEADER}1,val,0.5\n", "line 2: expected numbers"),
        ("metrics.csv", b"\xff\xfe", "not a readable CSV"),
        ("split.npz", "{", "client and label"),
        ("split.npz", npz()[:-30], "client and label"),
        ("split.npz", npz().replace(b"\0\1\1\2", b"\0\1\1\1"), "client and label"),  # the checksum tells
        ("split.npz", npz(label=None), "client and label"),
        ("split.npz", npz(label=np.uint8([0])), "client and label"),
        ("split.npz", npz(label=np.uint8([0, 1, 2, 3])), "client and label"),
        ("split.npz", npz(client=np.array([0, 0, -1, 1])), "client and label"),
        ("split.npz", npz(client=np.array(["0"] * 4, dtype=object)), "client and label"),
        ("split.npz", npz(client=np.uint8([]), label=np.uint8([])), "client and label"),
        ("split.npz", npz(classes=[0, 1, 2]), "client and label"),
        ("config.yaml", "- 1\n", "config.yaml"),
        ("config.yaml", "alpha: 0.3\n", "config.yaml"),
        ("config.yaml", None, "config.yaml"),
    ],
)
def test_broken_records_are_refused_and_nothing_is_written(
    tmp_path: Path, name: str, content: str | bytes | None, says: str
) -> None:
    run = make_run(tmp_path / "run")
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=says):
        plot_run(run, tmp_path / "plots")
    assert not (tmp_path / "plots").exists()


def test_missing_nameless_and_too_many_are_refused(tmp_path: Path) -> None:
    run, plots = make_run(tmp_path / "run"), tmp_path / "plots"
    with pytest.raises(InputError, match="elsewhere"):
        plot_run(tmp_path / "elsewhere", plots)
    with pytest.raises(InputError, match="2 named run"):
        plot_comparison([run, run], plots)
    with pytest.raises(InputError, match="got 0"):
        plot_comparison([], plots)
    with pytest.raises(InputError, match="got 22"):
        plot_comparison([run] * (figures.MOST_RUNS + 1), plots)
    with pytest.raises(InputError, match="none"):
        plot_masks([], plots)
    twice = [make_mask(tmp_path / part / "a.safetensors", 2) for part in ("x", "y")]
    with pytest.raises(InputError, match="2 named x_a"):
        plot_masks([*twice, twice[0]], plots)
    assert not plots.exists()
    assert [path.name for path in plot_masks(twice, plots)] == ["x_a_density.png", "y_a_density.png", "overlap.png"]


def test_runs_masks_and_edits_together_are_drawn_all_or_not_at_all(tmp_path: Path) -> None:
    run, mask = make_run(tmp_path / "run"), make_mask(tmp_path / "a.safetensors", 2)
    paths = plot_all([run], [mask], [], tmp_path / "plots")
    assert [path.name for path in paths] == ["curves.png", "megabytes.png", "clients.png", "a_density.png"]
    with pytest.raises(InputError, match=r"report.csv: cannot be read .*name a run of `fedtalos editing`"):
        plot_all([run], [mask], [tmp_path / "no_edit"], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_an_edit_of_several_iterations_gets_a_figure_of_them(tmp_path):
    report = tmp_path / "run" / "report.csv"
    report.parent.mkdir()
    lines = ["iteration,block,kind,active,entries"]
    lines += [f"{number},0,{kind},{10 - number},10" for number in (1, 2, 3) for kind in ("q", "norms")]
    report.write_text("\n".join(lines) + "\n")
    assert [path.name for path in plot_iterations(report.parent, tmp_path)] == ["run_iterations.png"]
    report.write_text("\n".join(lines[:3]) + "\n")
    assert plot_iterations(report.parent, tmp_path) == []
    for broken in ("", "iteration,block\n1,2\n", "iteration,block,kind,active,entries\nx,0,q,1,2\n"):
        report.write_text(broken)
        with pytest.raises(InputError, match=r"report.csv.*: expected .*name a run of `fedtalos editing`"):
            plot_iterations(report.parent, tmp_path)


def test_the_figure_of_iterations_begins_with_all_and_shows_every_kind():
    rows = {n: [DensityRow(0, "q", 8 - n, 8), DensityRow(0, "fc1", 4 // n, 4)] for n in (1, 2)}
    (axes,) = figures.iterations(rows, "run").axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines == {"q": [100, 87.5, 75], "fc1": [100, 100, 50], "all": [100, 1100 / 12, 800 / 12]}
    (axes,) = figures.iterations({n: [DensityRow(0, kind, 1, n) for kind in KINDS] for n in (1, 2)}, "run").axes
    assert [line.get_label() for line in axes.lines] == [*KINDS, "all"]


def test_test_points_have_their_interval_and_the_figure_says_of_how_many_images():
    rows = [*(Row(at, "val", 1.0, 0.5, at, 50) for at in range(4)), Row(3, "test", 1.0, 0.9, 3, 100)]
    (axes,) = figures.megabytes([History("run", "round", rows)]).axes
    (bar,) = axes.collections
    ((below, above),) = (segment[:, 1] for segment in bar.get_segments())
    assert (below, above) == (pytest.approx(82.6, abs=0.1), pytest.approx(94.5, abs=0.1))
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["validation", "test, 95 % interval of 100 images"]


def test_density_is_white_at_zero_and_on_one_scale():
    image = figures.density([DensityRow(0, "q", 0, 8), DensityRow(0, "k", 1, 8)], "title").axes[0].images[0]
    assert image.get_clim() == (0, 100)
    assert tuple(image.cmap(0.0)) == (1, 1, 1, 1)


def test_nothing_is_drawn_where_nothing_is_to_be_seen(tmp_path):
    run = make_run(tmp_path / "run", partition="iid")
    (run / "split.npz").write_bytes(npz(client=np.arange(100, dtype=np.uint8), label=np.zeros(100, np.uint8)))
    assert "clients.png" not in [path.name for path in plot_run(run, tmp_path / "plots")]
    metrics = run / "metrics.csv"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if not line.startswith("4,")))  # three rounds
    assert plot_run(run, tmp_path / "none") == []
    assert plot_comparison([run, make_run(tmp_path / "long")], tmp_path / "both")


@pytest.mark.parametrize(("form", "begins"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_figures_come_in_three_formats_the_same_bytes_each_time(tmp_path, form, begins):
    run = make_run(tmp_path / "run")
    paths = plot_all([run], [], [], tmp_path / "first", form)
    assert {path.suffix for path in paths} == {f".{form}"}
    again = plot_all([run], [], [], tmp_path / "second", form)
    for path, other in zip(paths, again, strict=True):
        assert path.read_bytes().startswith(begins)
        assert path.read_bytes() == other.read_bytes()


def test_figures_of_sweeps_say_of_how_many_seeds_they_are():
    histories = [history(str(seed), 1) for seed in range(3)]

    def note(counts: list[int], draw=sweeps.by_step) -> str:
        lines = [sweeps.Line("", f"m{count}", histories[:count], 90.0, 1.0, 100) for count in counts]
        return draw(lines, "title").legends[0].get_title().get_text()

    assert note([1, 1]) == "one seed"
    assert note([3, 3]) == "mean of n = 3 seeds; band: one standard deviation"
    assert note([2, 3]) == "mean of n = 2 to 3 seeds; band: one standard deviation"
    assert note([1], sweeps.final) == "one seed; bars: 95 % interval by the test images"
    assert note([2], sweeps.final) == "mean of n = 2 seeds; bars: one standard deviation"
