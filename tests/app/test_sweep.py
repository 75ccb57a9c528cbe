"""Sweeps through the real command line, on embedded digits: what runs, what is left alone, and what the table says."""

import csv
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fedtalos.app.config.files import read_yaml
from fedtalos.app.config.tools import SweepConfig
from fedtalos.app.figures.runs import History, Row
from fedtalos.app.figures.sweeps import curve
from fedtalos.app.sweep.estimates import Estimator, architecture_of, count_images
from fedtalos.app.sweep.grid import Grid, expand, read_grid, with_needs
from fedtalos.app.sweep.plots import place
from fedtalos.app.sweep.speeds import Speed
from fedtalos.app.sweep.tables import Spread
from fedtalos.cli import main
from fedtalos.errors import InputError
from fedtalos.experiments import federated
from fedtalos.experiments.sweep import given
from fedtalos.training.loop import TrainingError

SMALL = {
    "dataset": "digits",
    "model_size": "micro",
    "image_size": 8,
    "patch_size": 4,
    "weights": "none",
    "train_limit": 120,
    "eval_limit": 30,
    "calibration_fraction": 0.05,
    "batch_size": 16,
}
FEDERATION = {"num_clients": 4, "client_fraction": 0.5, "num_rounds": 2, "local_steps": 1, "eval_every": 1}
EDIT = {"name": "talos", "command": "editing", "seeds": [0], "options": {"criterion": "random"}}
BLOCK = {
    "command": "federated",
    "options": {**FEDERATION, "head": "run:talos"},
    "axes": {
        "split": {"iid": {}, "nc2": {"partition": "label_skew", "classes_per_client": 5}},
        "method": {"head": {"trainable": "head"}, "mask": {"mask": "run:talos", "force_mask": True}},
    },
}
GRID = {"seeds": [0, 1], "options": SMALL, "grid": [EDIT, BLOCK]}
RUNS = [f"g-{split}-{method}-s{seed}" for seed in (0, 1) for split in ("iid", "nc2") for method in ("head", "mask")]


pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own", "without_figures")


@pytest.fixture(autouse=True)
def mostly_without_the_grids_figures(request, monkeypatch):
    if "draws" not in request.keywords:
        monkeypatch.setattr("fedtalos.experiments.sweep.plot_grid", lambda *_: [])


def write(grid=GRID, **others):
    Path("configs").mkdir(exist_ok=True)
    Path("configs/experiment_configs.yaml").write_text(yaml.safe_dump({"g": grid, **others}, sort_keys=False))


def sweep(*flags: str, code: int = 0, grid: str = "g") -> None:
    if code == 0:
        main(["sweep", grid, "--device", "cpu", *flags])
        return
    with pytest.raises(SystemExit) as stop:
        main(["sweep", grid, "--device", "cpu", *flags])
    assert stop.value.code == code


def files() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file() and path.parts[0] != "configs"}


def records(folder: str = "results") -> dict[str, list[list[str]]]:
    """Every run's metrics without their times."""
    found = {}
    for path in sorted(Path(folder).glob("*/metrics.csv")):
        with path.open() as lines:
            found[path.parent.name] = [row[:-1] for row in csv.reader(lines)]
    return found


@pytest.mark.draws
def test_a_grid_runs_whole_and_its_table_is_of_its_runs(capsys):
    write()
    sweep()
    with Path("results/g/cells.csv").open() as lines:
        cells = list(csv.DictReader(lines))
    assert [cell["run"] for cell in cells] == ["g-talos-s0", *RUNS]
    with Path("results/g/table.csv").open() as lines:
        table = {row["label"]: row for row in csv.DictReader(lines)}
    for label in ("iid-head", "iid-mask", "nc2-head", "nc2-mask"):
        summaries = [read_yaml(Path(f"results/g-{label}-s{seed}/summary.yaml")) for seed in (0, 1)]
        tests = [100 * summary["test_accuracy"]["last"] for summary in summaries]
        assert float(table[label]["test_percent_mean"]) == pytest.approx(np.mean(tests))
        assert float(table[label]["test_percent_std"]) == pytest.approx(np.std(tests, ddof=1))
        assert float(table[label]["megabytes_mean"]) > 0
        assert table[label]["seeds"] == "2"
        assert f"{np.mean(tests):.1f} ± {np.std(tests, ddof=1):.1f}" in Path("results/g/table.md").read_text()
    for name in ("accuracy_by_round", "megabytes", "final"):
        assert Path(f"plots/g/{name}.png").read_bytes().startswith(b"\x89PNG")
    before = files()
    sweep()
    assert "9 of 9 runs are finished" in capsys.readouterr().out
    assert files() == before


def test_a_run_of_the_sweep_is_the_run_of_the_single_command():
    write({"options": SMALL, "grid": [{"command": "federated", "options": FEDERATION}]})
    sweep()
    flags = [f"--{key}={value}" for key, value in {**SMALL, **FEDERATION, "run_name": "alone"}.items()]
    main(["federated", "--device", "cpu", *flags])
    assert records()["alone"] == records()["g-s0"]


def fail_in(monkeypatch, which: str, error: BaseException, after_rounds: int = 0):
    original = federated.local_training

    def local_training(config, *rest):
        train = original(config, *rest)

        def train_clients(number, *arguments):
            if which in config.run.run_name and number > after_rounds:
                raise error
            yield from train(number, *arguments)

        return train_clients

    monkeypatch.setattr(federated, "local_training", local_training)


@pytest.mark.parametrize("error", [TrainingError("no"), RuntimeError("out of memory")])
def test_one_failing_run_does_not_stop_the_others_and_is_tried_again(error, monkeypatch, capsys):
    write()
    with monkeypatch.context() as patched:
        fail_in(patched, "g-iid-mask-s1", error, after_rounds=1)
        sweep(code=1)
    said = capsys.readouterr()
    assert "1 of 9 runs failed" in said.err
    assert "g-iid-mask-s1" in said.err
    assert str(error) in Path("results/g/g-iid-mask-s1.log").read_text()
    assert all(Path(f"results/{run}/summary.yaml").exists() == (run != "g-iid-mask-s1") for run in RUNS)
    assert "| federated | iid | mask | 1 |" in Path("results/g/table.md").read_text()
    sweep()  # resumes it from round 1
    assert "8 of 9 runs are finished" in capsys.readouterr().out
    assert not Path("results/g/g-iid-mask-s1.log").exists()
    in_pieces = records()
    main(["sweep", "g", "--device", "cpu", "--output_dir", "whole"])
    assert in_pieces == records("whole/results")


def test_a_stopped_sweep_goes_on_with_the_same_command(monkeypatch, capsys):
    write()
    with monkeypatch.context() as patched:
        fail_in(patched, "g-nc2-head-s0", KeyboardInterrupt(), after_rounds=1)
        sweep(code=130)
    assert "fedtalos sweep g goes on" in capsys.readouterr().out
    assert not Path("results/g-nc2-mask-s0").exists()
    sweep()
    assert records().keys() == set(RUNS)


def test_runs_that_need_a_failed_one_are_left_out(monkeypatch, capsys):
    write()

    def fail(*_):
        raise TrainingError("no mask today")

    with monkeypatch.context() as patched:
        patched.setattr("fedtalos.experiments.editing.calibrate", fail)
        sweep(code=1)
    said = capsys.readouterr()
    assert "9 of 9 runs failed or were left out" in said.err
    assert "g-iid-head-s0: left out, for it needs g-talos-s0" in said.out


def test_stale_results_are_never_mixed_in(capsys):
    write()
    sweep("--only", "g-iid-mask-s0")
    finished = files()

    def refuses(*words: str, flags: tuple[str, ...] = ()) -> None:
        capsys.readouterr()
        sweep(*flags, code=2)
        said = capsys.readouterr().err
        assert all(word in said for word in words), said
        assert files() == finished

    write({**GRID, "options": {**SMALL, "batch_size": 8}})
    refuses("g-iid-mask-s0", "batch_size 16", "8")
    write({**GRID, "options": {**SMALL, "learning_rate": 0.01}})
    refuses("learning_rate 'its default'", "0.01")
    write({**GRID, "grid": [{**EDIT, "options": {"criterion": "random", "target_sparsity": 0.5}}, BLOCK]})
    refuses("g-talos-s0 was run with target_sparsity 'its default'", "0.5")
    write()
    refuses("weights 'none'", "other.pth", flags=("--weights", "other.pth"))
    Path("results/g-iid-head-s0").mkdir()
    Path("results/g-iid-head-s0/config.yaml").write_text("command: federated")
    finished = files()
    refuses("results/g-iid-head-s0 was not made by this sweep")


def test_a_run_is_stale_where_a_run_that_it_needs_was_made_anew_otherwise():
    write()
    (first, *_) = (cell for cell in expand("g", read_grid("g"), {}) if cell.name == "g-iid-mask-s0")
    write({**GRID, "grid": [{**EDIT, "options": {"criterion": "random", "num_iterations": 2}}, BLOCK]})
    (second, *_) = (cell for cell in expand("g", read_grid("g"), {}) if cell.name == "g-iid-mask-s0")
    assert first.asked == second.asked
    assert first.recipe != second.recipe


def test_only_takes_along_what_is_needed():
    write()
    cells = expand("g", read_grid("g"), {})
    assert [cell.name for cell in with_needs(cells, "nc2-mask")] == ["g-talos-s0", "g-nc2-mask-s0", "g-nc2-mask-s1"]
    with pytest.raises(InputError, match="--only nc7"):
        with_needs(cells, "nc7")


def test_a_dry_run_lists_and_writes_nothing(capsys):
    write()
    sweep("--dry_run")
    said = capsys.readouterr().out
    assert [line.split("  ")[0] for line in said.splitlines()[:-1]] == ["g-talos-s0", *RUNS]
    assert all("to do, about" in line for line in said.splitlines()[:-1])
    assert "9 of 9 runs to do, about" in said
    assert files() == {}
    sweep("--only", "g-iid-head-s0")
    capsys.readouterr()
    sweep("--dry_run")
    assert "g-iid-head-s0  finished\n" in capsys.readouterr().out


def test_estimates_multiply_what_was_measured(monkeypatch):
    asked = []

    def measure(config, *_):
        asked.append(config.run.run_name)
        return Speed(step=1.0, image=0.0, cached=False)

    monkeypatch.setattr("fedtalos.app.sweep.estimates.measure", measure)
    write()
    estimator = Estimator()
    seconds = {cell.name: estimator.seconds(cell) for cell in expand("g", read_grid("g"), {})}
    assert asked == ["g-talos-s0", "g-iid-head-s0", "g-iid-mask-s0"]  # other splits and seeds compute the same
    assert seconds["g-iid-mask-s1"] == 2 * 2 * 1  # rounds, clients, steps
    centralized = {"command": "centralized", "options": {"num_epochs": 3}}
    (cell,) = expand("c", Grid(grid=[centralized], options=SMALL), {})
    assert estimator.seconds(cell) == 3 * 8  # of 120 images, 16 at once


@pytest.mark.parametrize(
    ("weights", "sizes"),
    [
        ("pretrained", ("small", 224, 16)),
        ("dino", ("small", 224, 16)),
        ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", ("tiny", 224, 16)),
        ("vit_small_patch8_224.dino", ("small", 224, 8)),
        ("vit_small_patch14_dinov2.lvd142m", ("small", 518, 14)),
        ("vit_small_patch14_reg4_dinov2.lvd142m", ("small", 518, 14)),
        ("vit_base_patch14_dinov2.lvd142m", ("base", 518, 14)),
        ("vit_large_patch14_reg4_dinov2.lvd142m", ("large", 518, 14)),
        ("deit3_small_patch16_224.fb_in1k", ("small", 224, 16)),
        ("deit3_base_patch16_384.fb_in1k", ("base", 384, 16)),
        ("hf:google/vit-base-patch16-224-in21k", ("base", 224, 16)),
        ("hf:facebook/dinov2-large", ("large", 518, 14)),
        ("hf:owner/cells", None),
        ("timm:convnext_atto.d2_in1k", None),
        ("torch:convnext_tiny", None),
    ],
)
def test_a_name_says_which_model_is_estimated(weights, sizes):
    options = {"weights": weights, "output_dir": Path()}
    (cell,) = expand("c", Grid(grid=[{"command": "centralized"}]), options)
    architecture = architecture_of(cell)
    assert sizes == (architecture and (architecture.size, architecture.image_size, architecture.patch_size))


def test_a_run_without_an_estimate_does_not_hide_the_others(capsys):
    models = {"micro": {}, "far": {"weights": "hf:owner/cells"}}
    write({**GRID, "grid": [{"command": "centralized", "axes": {"model": models}}]})
    sweep("--dry_run")
    said = capsys.readouterr().out
    assert "g-far-s0  to do, no estimate\n" in said
    assert "4 of 4 runs to do, about" in said
    assert said.endswith(" here without 2 of them, which have no estimate\n")
    sweep("--dry_run", "--only", "far")
    assert capsys.readouterr().out.endswith("2 of 2 runs to do, no estimate\n")


@pytest.mark.parametrize("weights", ["none", "timm:convnext_atto.d2_in1k"])
def test_a_dry_run_decodes_folders_only_as_the_run_will(weights, monkeypatch):
    for name in ("a", "b"):
        Path("data", name).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (12, 12), (number, 0, 0)).save(f"data/{name}/{number}.png")
    options = {"dataset": "folder", "weights": weights, "calibration_fraction": 0.1}
    write({"options": options, "grid": [{"command": "centralized"}]})
    measured = Speed(step=1.0, image=0.0, cached=False)
    monkeypatch.setattr("fedtalos.app.sweep.estimates.measure", lambda *_: measured)
    sweep("--dry_run")
    kept = [path.name.partition("_")[0] for path in files() if path.suffix == ".safetensors"]
    assert kept == (["32px"] if weights == "none" else [])


def test_where_runs_are_made_is_the_grids_unless_a_flag_says_otherwise():
    grid = Grid(grid=[{"command": "federated"}], options={"device": "cpu", "precision": "fp32", "workers": 2})
    (cell,) = expand("g", grid, given(SweepConfig(grid="g")))
    assert (cell.config.run.device, cell.config.run.precision, cell.config.federation.workers) == ("cpu", "fp32", 2)
    (cell,) = expand("g", grid, given(SweepConfig(grid="g", precision="bf16", workers=1)))
    assert (cell.config.run.device, cell.config.run.precision, cell.config.federation.workers) == ("cpu", "bf16", 1)
    (elsewhere,) = expand("g", Grid(grid=[{"command": "federated"}]), {})
    assert cell.recipe == elsewhere.recipe  # the same run, so that it may be resumed there


def test_published_data_sets_are_counted_without_their_files(monkeypatch):
    write()
    (cell,) = expand("c", Grid(grid=[{"command": "centralized"}]), {})
    amounts = count_images(cell.config.data, 224)
    assert (amounts.train, amounts.calibration, amounts.val, amounts.test) == (44_100, 900, 5_000, 10_000)


def test_the_published_grids_are_whole():
    for name, count in (("digits", 14), ("laptop", 50), ("laptop_rules", 117), ("field", 1384)):
        cells = expand(name, read_grid(name), {})
        assert len(cells) == count, name
    work = {
        cell.config.federation.num_rounds * cell.config.federation.local_steps
        for cell in cells
        if cell.config.command == "federated"
    }
    assert work == {400}
    assert sum(cell.config.command == "editing" for cell in cells) == 28


def test_values_in_braces_and_lists_stand_for_axes():
    masks = {"name": "m", "command": "editing", "seeds": [0], "axes": {"target_sparsity": [0.5, 0.9]}}
    block = {
        "command": "federated",
        "options": {"mask": "run:m-{sparsity}"},
        "axes": {"local_steps": [4, 8], "sparsity": {0.5: None, 0.9: {}}},
    }
    cells = expand("g", Grid(grid=[masks, block], seeds=[3]), {"output_dir": "out"})
    assert [cell.name for cell in cells[:3]] == ["g-m-0.5-s0", "g-m-0.9-s0", "g-4-0.5-s3"]
    assert [cell.config.editing.target_sparsity for cell in cells[:2]] == [0.5, 0.9]
    last = cells[-1]
    assert str(last.config.train.mask) == "out/masks/g-m-0.9-s0.safetensors"
    assert last.config.federation.local_steps == 8
    assert last.asked["mask"] == "run:m-{sparsity}"
    assert place(last).method == "0.9"
    assert place(cells[0]) is None


def test_given_weights_are_for_runs_that_do_not_start_from_another():
    start = {"name": "start", "command": "centralized", "seeds": [0]}
    more = {"command": "federated", "options": {"weights": "run:start"}}
    first, second = expand("g", Grid(grid=[start, more]), {"weights": "mine.pth"})
    assert first.config.model.weights == "mine.pth"
    assert second.config.model.weights == "checkpoints/g-start-s0/last.json"


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({**GRID, "seed": 1}, ["grid 'g'", "seed"]),
        ({**GRID, "grid": []}, ["grid 'g'", "grid", "at least 1 item"]),
        ({**GRID, "grid": 3}, ["grid 'g'", "grid", "3"]),
        ({**GRID, "grid": [{"command": "train"}]}, ["command", "'train'"]),
        ({**GRID, "grid": [{"command": "federated", "axes": {"split": 3}}]}, ["split", "3"]),
        ({**GRID, "grid": [{"command": "federated", "axes": {"split": {"iid": 3}}}]}, ["iid", "3"]),
        ({**GRID, "grid": [{"command": "federated", "axes": {"split": {}}}]}, ["split", "at least 1"]),
        ({**GRID, "grid": [{"command": "federated", "axes": {"local_stps": [4]}}]}, ["did you mean 'local_steps'"]),
        ({**GRID, "options": {"num_ronds": 3}}, ["unknown option 'num_ronds'", "did you mean 'num_rounds'"]),
        ({**GRID, "options": {"run_name": "x"}}, ["run_name is the sweep's to give"]),
        ({**GRID, "grid": [{"command": "editing", "options": {"num_rounds": 3}}]}, ["unknown option 'num_rounds'"]),
        ({**GRID, "grid": [EDIT, EDIT]}, ["two runs are named g-talos-s0"]),
        ({**GRID, "grid": [BLOCK]}, ["g-iid-head-s0: run:talos", "found none"]),
        ({**GRID, "grid": [{**BLOCK, "options": {"num_rounds": 0}}]}, ["g-iid-head-s0: num_rounds", "got 0"]),
        ({**GRID, "grid": [{**BLOCK, "options": {"warmup": 200}}]}, ["g-iid-head-s0: --warmup 200"]),
        ({**GRID, "grid": [EDIT, {**BLOCK, "options": {"weights": "run:talos"}}]}, ["`editing`, which makes none"]),
        ({**GRID, "grid": [EDIT, {**BLOCK, "options": {"mask": "run:{rule}"}}]}, ["run:{rule}", "got 'rule'"]),
        ({**GRID, "grid": [{**EDIT, "name": "a/b"}]}, ["g-a/b-s0", "without slashes"]),
        ({**GRID, "grid": [{"command": "centralized", "axes": {"seed_": {n: {} for n in range(22)}}}]}, ["21 apart"]),
    ],
)
def test_a_grid_that_is_not_one_is_refused_in_words(grid, words, capsys):
    write(grid)
    sweep(code=2)
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert "Traceback" not in said
    assert files() == {}


def test_presets_and_grids_are_told_apart(capsys):
    write(p={"command": "federated"})
    sweep(grid="p", code=2)
    assert "`fedtalos federated --preset p` runs it" in capsys.readouterr().err
    sweep(grid="h", code=2)
    assert "grid: no 'h'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["federated", "--preset", "g"])
    assert "`fedtalos sweep g` runs them" in capsys.readouterr().err


def test_a_run_of_the_grids_name_is_in_the_way(capsys):
    write()
    Path("results/g").mkdir(parents=True)
    Path("results/g/config.yaml").write_text("command: federated")
    sweep(code=2)
    assert "results/g is a run" in capsys.readouterr().err


def test_the_sweeps_folder_is_no_run_to_resume():
    write({"options": SMALL, "grid": [{"command": "federated", "options": FEDERATION}]})
    sweep()
    with pytest.raises(SystemExit) as stop:
        main(["federated", "--resume"])
    assert stop.value.code == 2


def test_spread_is_numpys():
    values = [3.0, 5.0, 10.0]
    spread = Spread.of(values)
    assert (spread.mean, spread.std, spread.n) == pytest.approx((np.mean(values), np.std(values, ddof=1), 3))
    assert np.isnan(Spread.of([1.0]).std)
    assert Spread.of([1.0, float("nan")]).n == 1


def test_a_curve_is_of_the_steps_that_all_runs_have():
    def history(steps: list[int], add: float) -> History:
        return History("h", "round", [Row(step, "val", 1.0, 0.1 * step + add, float(step)) for step in steps])

    drawn = curve([history([0, 1, 2], 0.0), history([0, 2, 3], 0.1)])
    assert drawn.steps.tolist() == [0, 2]
    assert drawn.mean.tolist() == pytest.approx([5, 25])
    assert drawn.std.tolist() == pytest.approx([np.std([0, 10], ddof=1)] * 2)
