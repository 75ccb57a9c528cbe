"""A minute on embedded digits: pretrain on public images, edit, federate dense and sparse."""

from collections.abc import Callable
from datetime import datetime
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from fedtalos.app.config.files import override, read_yaml
from fedtalos.app.config.schema import CentralizedConfig, EditingConfig, FederatedConfig
from fedtalos.app.config.tools import DemoConfig
from fedtalos.app.figures import draw as plots
from fedtalos.app.run.folders import RunPaths, choose_run, claimed
from fedtalos.experiments import centralized, editing, federated

ConfigT = TypeVar("ConfigT", CentralizedConfig, EditingConfig, FederatedConfig)
Summary = dict[str, Any]
Train = Callable[[ConfigT, RunPaths, Console], Summary]

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
    plain: dict[str, Any] = {**config.model_dump(include={"seed", "device", "output_dir", "resume"}), **DIGITS}

    def step(first: ConfigT, suffix: str, train: Train[ConfigT], values: dict[str, Any]) -> tuple[Summary, RunPaths]:
        """One of its runs, by the experiment's own code, unless it is finished already."""
        asked = override(first, {**plain, **values, "run_name": f"{name}-{suffix}"}, "demo")
        paths = choose_run(asked)
        if paths.finished:
            return read_yaml(paths.results / "summary.yaml"), paths
        with claimed(paths):
            return train(asked, paths, console), paths

    console.print(f"1/4 pretrain a micro ViT on {PUBLIC_IMAGES} public digits")
    pretrained, pretrained_paths = step(CentralizedConfig(), "pretrained", centralized.run, PRETRAINING)
    weights = {"weights": str(pretrained_paths.checkpoints / "last.json")}

    console.print("2/4 edit: a mask that lets a tenth of the weights move")
    _, edit_paths = step(EditingConfig(), "mask", editing.run, {**EDITING, **weights})

    federate = {**FEDERATION, **weights}
    console.print("3/4 federate, dense")
    dense, dense_paths = step(FederatedConfig(), "dense", federated.run, {**federate, "learning_rate": 1e-3})
    console.print("4/4 federate, with the mask")
    masked = {**federate, "mask": edit_paths.mask, "learning_rate": 3e-3}
    sparse, sparse_paths = step(FederatedConfig(), "sparse", federated.run, masked)

    table = Table(title="digits: 20 clients with 2 classes each", title_justify="left")
    for column in ("model", "test accuracy (%)", "sent (MB)", "seconds"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for label, summary in (("pretrained", pretrained), ("federated, dense", dense), ("federated, mask", sparse)):
        sent = sum(summary.get("megabytes_sent", {}).values())
        accuracy = 100 * summary["test_accuracy"]["last"]
        table.add_row(label, f"{accuracy:.1f}", f"{sent:.1f}", f"{summary['seconds']:.0f}")
    console.print(table)
    folder = config.output_dir / "plots" / name
    drawn = plots.plot_comparison([dense_paths.results, sparse_paths.results], folder)
    drawn += plots.plot_split(dense_paths.results, folder) + plots.plot_masks([edit_paths.mask], folder)
    for path in drawn:
        console.print(str(path), highlight=False, markup=False, soft_wrap=True)


def _name(config: DemoConfig) -> str:
    """As given; with --resume that of the newest demo, if it is not finished; else a new one."""
    if config.run_name is not None:
        return config.run_name
    begun = sorted((config.output_dir / "results").glob("demo-*-pretrained"))
    if config.resume and begun:
        newest = begun[-1].name.removesuffix("-pretrained")
        if not RunPaths(config.output_dir, f"{newest}-sparse").finished:
            return newest
    return f"demo-{datetime.now():%Y%m%d-%H%M%S}"
