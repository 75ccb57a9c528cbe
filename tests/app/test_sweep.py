"""Sweeps through the real command line, on embedded digits: what runs, what is left alone, and what the table says."""

import csv
from pathlib import Path

import numpy as np
import pytest
import yaml

from fedtalos.app.config.files import read_yaml
from fedtalos.app.config.schema import FederationOptions
from fedtalos.app.config.tools import SweepConfig
from fedtalos.app.figures.records import History, Row
from fedtalos.app.figures.sweeps import curve
from fedtalos.app.run.units import duration
from fedtalos.app.sweep.estimate import estimate
from fedtalos.app.sweep.grid import Cell, Grid, expand, read_grid, with_needs
from fedtalos.app.sweep.plots import place, plot_grid
from fedtalos.app.sweep.tables import COLUMNS, Result, Spread
from fedtalos.cli import main
from fedtalos.errors import InputError, TrainingError
from fedtalos.experiments import federated
from fedtalos.experiments.sweep import given

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
    write({**GRID, "grid": [EDIT, {**BLOCK, "options": {**BLOCK["options"], "num_rounds": 3}}]})  # enough to draw
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
    original = federated.transforms_of

    def transforms_of(config, *rest):
        def failing(updates):
            def fail(number, *arguments):
                if which in config.run.run_name and number > after_rounds:
                    raise error
                yield from updates(number, *arguments)

            return fail

        return [*original(config, *rest), failing]

    monkeypatch.setattr(federated, "transforms_of", transforms_of)


@pytest.mark.parametrize(
    "error", [pytest.param(TrainingError("no"), marks=pytest.mark.slow), RuntimeError("out of memory")]
)
def test_one_failing_run_does_not_stop_the_others_and_is_tried_again(error, monkeypatch, capsys):
    write()
    with monkeypatch.context() as patched:
        fail_in(patched, "g-iid-mask-s1", error, after_rounds=1)
        sweep(code=1)
    said = capsys.readouterr()
    assert "1 of 9 runs failed" in said.err
    assert "g-iid-mask-s1" in said.err
    log = Path("results/g/g-iid-mask-s1.log").read_text()
    assert str(error) in log
    assert "federated: run g-iid-mask-s1 begins" in log  # what the run said itself is there, too
    lines = [line.split()[:2] for line in said.out.splitlines() if line.startswith("[")]
    assert lines == [[f"[{number}/9]", run] for number, run in enumerate(["g-talos-s0", *RUNS], start=1)]
    assert "round 1/2" not in said.out
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

    def fail(*_, **__):
        raise TrainingError("no mask today")

    with monkeypatch.context() as patched:
        patched.setattr("fedtalos.app.edit.refine", fail)
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
    said = capsys.readouterr().out.splitlines()
    assert said[:-1] == [f"{name}  to do" for name in ("g-talos-s0", *RUNS)]
    assert said[-1] == "9 of 9 runs to do; an estimate comes once a run like them is finished"
    assert files() == {}


def test_a_dry_run_estimates_by_what_is_finished(capsys):
    write()
    sweep("--only", "g-talos-s0")
    capsys.readouterr()
    sweep("--dry_run")
    assert "8 of 9 runs to do; an estimate comes" in capsys.readouterr().out
    sweep("--only", "g-iid-head-s0")
    before = files()
    capsys.readouterr()
    sweep("--dry_run")
    said = capsys.readouterr().out
    assert "g-iid-head-s0  finished\n" in said
    assert said.count("  to do, about ") == 7
    assert "7 of 9 runs to do, about" in said
    assert files() == before
    write({**GRID, "grid": [*GRID["grid"], {"name": "central", "command": "centralized"}]})
    sweep("--dry_run")
    said = capsys.readouterr().out
    assert "g-central-s0  to do\n" in said
    assert said.endswith(" without 2 of them, which are like no finished run\n")


def cells_of(command: str, **axes: object) -> list[Cell]:
    return expand("g", Grid(grid=[{"command": command, "axes": axes}], options={**SMALL, **FEDERATION}), {})


def took(cell: Cell, seconds: float) -> Result:
    return Result(cell, {"seconds": seconds}, "commit")


def test_an_estimate_scales_the_time_of_a_finished_run():
    first, more_rounds, more_clients, larger_batches, more_steps = cells_of(
        "federated",
        work={
            "as_is": {},
            "rounds": {"num_rounds": 6},
            "clients": {"num_clients": 8},
            "batches": {"batch_size": 32},
            "steps": {"local_steps": 4},
        },
    )
    finished = [took(first, 10.0)]
    assert estimate(first, finished) == 10
    assert estimate(more_rounds, finished) == 30
    assert estimate(more_clients, finished) == estimate(larger_batches, finished) == 20
    assert estimate(more_steps, finished) == 40
    once, thrice = cells_of("centralized", num_epochs=[1, 3])
    assert estimate(thrice, [*finished, took(once, 4.0)]) == 12
    one, four = cells_of("editing", num_iterations=[1, 4])
    assert estimate(four, [took(one, 4.0)]) == 16
    few, many = cells_of("federated", local_epochs=[2, 3])
    assert estimate(many, [took(few, 4.0)]) == 6
    usual = {"one_shot": True, "local_steps": FederationOptions().local_steps}
    few, many = cells_of("federated", work={"few": usual, "many": {**usual, "num_clients": 40}})
    assert estimate(many, [took(few, 4.0)]) == 4  # a pass over all images, whoever holds them


def test_an_estimate_takes_the_finished_run_that_has_most_in_common():
    method = {"head": {"trainable": "head"}, "dense": {}}
    head, dense, longer_head, longer_dense = cells_of("federated", num_rounds=[2, 4], method=method)
    for finished in ([took(head, 1.0), took(dense, 5.0)], [took(dense, 5.0), took(head, 1.0)]):
        assert (estimate(longer_head, finished), estimate(longer_dense, finished)) == (2, 10)


@pytest.mark.parametrize(
    "other",
    [
        {"image_size": 16},
        {"train_limit": 60},
        {"weights": "hf:owner/cells"},
        {"model_size": "tiny"},
        {"local_epochs": 1},
    ],
)
def test_there_is_no_estimate_by_a_run_of_another_kind(other):
    first, second = cells_of("federated", kind={"first": {}, "second": other})
    assert estimate(second, [took(first, 1.0)]) is None
    assert estimate(second, []) is None
    (central,) = cells_of("centralized")
    assert estimate(central, [took(first, 1.0)]) is None


@pytest.mark.parametrize(("seconds", "words"), [(3.14, "3.1 s"), (90, "90 s"), (150, "2.5 min"), (9000, "2.5 h")])
def test_a_duration_is_in_the_unit_that_fits(seconds, words):
    assert duration(seconds) == words


def test_where_runs_are_made_is_the_grids_unless_a_flag_says_otherwise():
    grid = Grid(grid=[{"command": "federated"}], options={"device": "cpu", "precision": "fp32", "workers": 2})
    (cell,) = expand("g", grid, given(SweepConfig(grid="g")))
    assert (cell.config.run.device, cell.config.run.precision, cell.config.federation.workers) == ("cpu", "fp32", 2)
    (cell,) = expand("g", grid, given(SweepConfig(grid="g", precision="bf16", workers=1)))
    assert (cell.config.run.device, cell.config.run.precision, cell.config.federation.workers) == ("cpu", "bf16", 1)
    (elsewhere,) = expand("g", Grid(grid=[{"command": "federated"}]), {})
    assert cell.recipe == elsewhere.recipe  # the same run, so that it may be resumed there


def test_the_published_grids_are_whole():
    counts = {"digits": 14, "digits_tasks": 18, "laptop": 63, "laptop_rules": 117, "tasks": 93, "field": 1384}
    for name, count in counts.items():
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


@pytest.mark.parametrize(
    ("axes", "panels"),
    [
        ({"split": BLOCK["axes"]["split"]}, ["IID", "5 classes per client"]),
        ({"split": {"a": {}, "b": {"local_steps": 8}}}, ["a", "b"]),  # both IID
        ({"density": {"0.5": {}, "0.9": {}}, "split": BLOCK["axes"]["split"]}, ["0.5", "0.9"]),
    ],
)
def test_panels_that_are_splits_have_plain_names(axes, panels, monkeypatch):
    titles = []
    monkeypatch.setattr("fedtalos.app.sweep.plots.write_figures", lambda drawn, *_: [*drawn])
    monkeypatch.setattr(
        "fedtalos.app.sweep.plots.read_history",
        lambda _: History("h", "round", [Row(at, "val", 1, 1, at) for at in range(4)]),
    )
    monkeypatch.setattr("fedtalos.app.figures.sweeps.Axes.set_title", lambda _, title, **__: titles.append(title))
    method = {} if len(axes) == 2 else {"method": {"head": {"trainable": "head"}, "dense": {}}}
    cells = expand("g", Grid(grid=[{"command": "federated", "options": FEDERATION, "axes": {**axes, **method}}]), {})
    plot_grid("g", [Result(cell, dict.fromkeys(COLUMNS, 1.0), "commit") for cell in cells], Path("plots"))
    assert titles == [*panels, *panels]  # by round, by megabytes


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
        ({**GRID, "grid": [{"command": "federated", "axes": {"split": 3}}]}, ["axes", "got 3"]),
        ({**GRID, "grid": [{"command": "federated", "axes": {"split": {"iid": 3}}}]}, ["axes", "got 3"]),
        ({**GRID, "grid": [{"command": "federated", "axes": {"split": {}}}]}, ["axes", "at least 1"]),
        ({**GRID, "grid": [{"command": "federated", "axes": {"local_stps": [4]}}]}, ["did you mean 'local_steps'"]),
        ({**GRID, "options": {"num_ronds": 3}}, ["unknown option 'num_ronds'", "did you mean 'num_rounds'"]),
        ({**GRID, "options": {"run_name": "x"}}, ["run_name is set by the sweep"]),
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
