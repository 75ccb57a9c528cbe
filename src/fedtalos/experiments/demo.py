"""A minute on embedded digits: pretrain on public images, edit, federate dense and sparse."""

from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from fedtalos.app.config.files import override, read_yaml
from fedtalos.app.config.schema import CentralizedConfig, EditingConfig, FederatedConfig
from fedtalos.app.config.tools import DemoConfig
from fedtalos.app.figures import draw
from fedtalos.app.run.display import say
from fedtalos.app.run.folders import AlreadyFinished
from fedtalos.app.run.paths import RunPaths
from fedtalos.app.run.resume import nothing_to_resume
from fedtalos.errors import InputError
from fedtalos.experiments import centralized, editing, federated

ConfigT = TypeVar("ConfigT", CentralizedConfig, EditingConfig, FederatedConfig)

PUBLIC_IMAGES = 200
DIGITS = {"dataset": "digits", "calibration_fraction": 0.1, "model_size": "micro", "image_size": 8, "patch_size": 4}
PRETRAINING = {"weights": "none", "train_limit": PUBLIC_IMAGES, "num_epochs": 30, "batch_size": 32, "eval_every": 10}
EDITING = {"target_sparsity": 0.9, "num_iterations": 4}
FEDERATION = {
    "train_skip": PUBLIC_IMAGES,
    "num_clients": 20,
    "partition": "label_skew",
    "classes_per_client": 2,
    "client_fraction": 0.25,
    "num_rounds": 30,
    "local_steps": 4,
    "batch_size": 32,
    "eval_every": 5,
}


def run(config: DemoConfig, console: Console) -> None:
    """Pretrain, edit at 0.9, federate 20 clients of 2 classes each dense and with the mask; print a table and paths."""
    name = _name(config)
    plain: dict[str, Any] = {**config.model_dump(include={"seed", "device", "output_dir"}), **DIGITS}
    plain["resume_or_start"] = config.resume or config.resume_or_start  # later runs may not have begun

    def step(
        first: ConfigT, suffix: str, run_command: Callable[[ConfigT, Console], None], values: dict[str, Any]
    ) -> RunPaths:
        """Make one of the demo's runs by its own command, unless it is finished already; return its folders."""
        asked = override(first, {**plain, **values, "run_name": f"{name}-{suffix}"}, "demo")
        with suppress(AlreadyFinished):
            run_command(asked, console)
        return RunPaths(config.output_dir, f"{name}-{suffix}")

    say(console, f"1/4 pretrain a micro ViT on {PUBLIC_IMAGES} public digits")
    pretrained = step(CentralizedConfig(), "pretrained", centralized.run, PRETRAINING)
    weights = {"weights": str(pretrained.checkpoints / "last.json")}

    say(console, "2/4 edit: a mask that lets a tenth of the weights move")
    edit = step(EditingConfig(), "mask", editing.run, {**EDITING, **weights})

    federate = {**FEDERATION, **weights}
    say(console, "3/4 federate, dense")
    dense = step(FederatedConfig(), "dense", federated.run, {**federate, "learning_rate": 1e-3})
    say(console, "4/4 federate, with the mask")
    sparse = step(FederatedConfig(), "sparse", federated.run, {**federate, "mask": edit.mask, "learning_rate": 3e-3})

    console.print(_table({"pretrained": pretrained, "federated, dense": dense, "federated, mask": sparse}))
    folder = config.output_dir / "plots" / name
    drawn = draw.plot_comparison([dense.results, sparse.results], folder)
    drawn += draw.plot_split(dense.results, folder) + draw.plot_masks([edit.mask], folder)
    for path in drawn:
        say(console, str(path))


def _table(runs: dict[str, RunPaths]) -> Table:
    table = Table(title="digits: 20 clients with 2 classes each", title_justify="left")
    for column in ("model", "test accuracy (%)", "sent (MB)", "seconds"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for label, paths in runs.items():
        summary = read_yaml(paths.results / "summary.yaml")
        sent = sum(summary.get("megabytes_sent", {}).values())
        accuracy = 100 * summary["test_accuracy"]["last"]
        table.add_row(label, f"{accuracy:.1f}", f"{sent:.1f}", f"{summary['seconds']:.0f}")
    return table


def _name(config: DemoConfig) -> str:
    """Take the given name, or the newest unfinished demo's where one is to go on, or else a new one.

    Raises InputError where --resume finds nothing.
    """
    if config.resume and config.resume_or_start:
        raise InputError("--resume and --resume_or_start both say how to go on; give one of them")
    begun = [path.parent for path in (config.output_dir / "results").glob("*-pretrained/config.yaml")]
    demos = [path.name.removesuffix("-pretrained") for path in sorted(begun, key=lambda path: path.stat().st_mtime)]
    unnamed = [name for name in demos if name.startswith("demo-")]
    unfinished = [name for name in unnamed if not RunPaths(config.output_dir, f"{name}-sparse").finished]
    if config.resume and (config.run_name not in demos if config.run_name is not None else not unfinished):
        raise InputError(nothing_to_resume(config.output_dir, config.run_name, "demo", demos[::-1]))
    if config.run_name is not None:
        return config.run_name
    if unfinished and (config.resume or config.resume_or_start):
        return unfinished[-1]
    return f"demo-{datetime.now():%Y%m%d-%H%M%S}"
