"""Show what is here: devices, memory, versions, data and weights."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
from huggingface_hub import constants
from rich.console import Console
from rich.table import Table

from fedtalos._version import __version__
from fedtalos.app.config.tools import InfoConfig
from fedtalos.data.cifar import CIFAR
from fedtalos.devices import AMPERE, choose_device, choose_precision

LIBRARIES = ("torch", "numpy", "safetensors", "huggingface_hub", "timm", "tensorboard", "wandb", "mlflow")


def run(config: InfoConfig, console: Console) -> None:
    """Print one table."""
    table = Table(show_header=False, box=None)
    device = choose_device("auto")
    rows = {
        "fedtalos": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "devices": ", ".join(_devices()),
        "auto takes": f"{device.type}, {_precision(device)}",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "memory": f"{psutil.virtual_memory().available / 1e9:.1f} GB free of {psutil.virtual_memory().total / 1e9:.1f}",
        **{name: _version(name) for name in LIBRARIES},
        "data": ", ".join(_data(config.data_dir)) or f"none under {config.data_dir} (digits needs none)",
        "hub weights": ", ".join(_weights()) or "none cached (downloaded on first use)",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def _devices() -> list[str]:
    cuda = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return (["mps"] if torch.backends.mps.is_available() else []) + [f"cuda ({name})" for name in cuda] + ["cpu"]


def _precision(device: torch.device) -> str:
    """Name the precision that auto takes on a device, and why."""
    precision, needed = choose_precision("auto", device), ".".join(map(str, AMPERE))
    if device.type != "cuda":
        return f"{precision} (bf16: CUDA cards, compute capability {needed} or later)"
    has = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return f"{precision} (compute capability {has}; bf16 needs {needed} or later)"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _data(data_dir: Path) -> list[str]:
    found = {name: (data_dir / cifar.folder, data_dir / cifar.archive) for name, cifar in CIFAR.items()}
    return ["digits", *(name for name, places in found.items() if any(place.exists() for place in places))]


def _weights() -> list[str]:
    cache = Path(constants.HF_HUB_CACHE)
    return sorted(
        folder.name.removeprefix("models--").replace("--", "/") for folder in cache.glob("models--timm--vit*")
    )
