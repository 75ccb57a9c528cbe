"""Two minutes on embedded digits: pretrain on public images, edit, federate dense and sparse."""

from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from fedtalos.config import CentralizedConfig, EditingConfig, FederatedConfig
from fedtalos.config_files import override
from fedtalos.config_tools import DemoConfig
from fedtalos.experiments import centralized, editing, federated, plots
from fedtalos.experiments.runs import RunPaths, choose_run

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
    name = f"demo-{datetime.now():%Y%m%d-%H%M%S}"

    def options(step: str, values: dict[str, Any]) -> dict[str, Any]:
        run = {"run_name": f"{name}-{step}", "seed": config.seed, "device": config.device}
        return {**run, "output_dir": config.output_dir, **DIGITS, **values}

    console.print(f"1/4 pretrain a micro ViT on {PUBLIC_IMAGES} public digits")
    pretraining = override(CentralizedConfig(), options("pretrained", PRETRAINING), "demo")
    pretrained_paths = choose_run(pretraining)
    pretrained = centralized.run(pretraining, pretrained_paths, console)
    weights = {"weights": str(pretrained_paths.checkpoints / "last.json")}

    console.print("2/4 edit: a mask that lets a tenth of the weights move")
    edit = override(EditingConfig(), options("mask", {**EDITING, **weights}), "demo")
    edit_paths = choose_run(edit)
    editing.run(edit, edit_paths, console)

    console.print("3/4 federate, dense")
    dense, dense_paths = _federate(options("dense", {**FEDERATION, **weights, "learning_rate": 1e-3}), console)
    console.print("4/4 federate, with the mask")
    sparse, sparse_paths = _federate(
        options("sparse", {**FEDERATION, **weights, "mask": edit_paths.mask, "learning_rate": 3e-3}), console
    )

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


def _federate(values: dict[str, Any], console: Console) -> tuple[dict[str, Any], RunPaths]:
    config = override(FederatedConfig(), values, "demo")
    paths = choose_run(config)
    return federated.run(config, paths, console), paths
