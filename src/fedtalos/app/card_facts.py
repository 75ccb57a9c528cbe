"""Facts of a run for its model card: its weights, training and mask, in words, without a path of the machine."""

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedtalos.app.run.resume import from_here, working_folder
from fedtalos.app.run.split_file import split_title
from fedtalos.app.trained import TrainedRun
from fedtalos.data.hub_dataset import HUB, place_of
from fedtalos.errors import InputError, printable
from fedtalos.training.editing.mask_file import read_mask_file


def training_facts(trained: TrainedRun) -> dict[str, str]:
    """List what was done, by the run's options; none of them names a place of the machine.

    >>> training_facts(trained)["rounds"]
    '100'
    """
    options, progress = trained.options, trained.progress
    made_by = trained.record.get("made_by")
    facts = {
        "images": f"{data_set(trained)}; seed of the split {options.get('split_seed', 'unknown')}",
        "weights at the start": _without_path(weights_at_start(trained)),
        "rounds" if trained.federated else "epochs": str(progress.get("done", "unknown")),
    }
    if trained.federated:
        epochs = options.get("local_epochs")
        facts |= {
            "clients": f"{options.get('num_clients')}, a share of {options.get('client_fraction')} in each round",
            "split": split_title(
                str(options.get("partition")), options.get("classes_per_client"), options.get("alpha")
            ),
            "algorithm": f"{options.get('algorithm')}, aggregation {options.get('aggregation')}",
            "local steps": str(options.get("local_steps")) if epochs is None else f"{epochs} epochs",
            "sent by all clients": f"{(_number(progress, 'bytes_down') + _number(progress, 'bytes_up')) / 1e6:,.0f} MB",
            "differential privacy": _privacy(options),
        }
    facts |= {
        "optimiser": f"{options.get('optimizer')}, learning rate {options.get('learning_rate')}, batches of "
        f"{options.get('batch_size')}",
        "what moved": _mask(trained),
        "seed": str(options.get("seed", "unknown")),
        "commit of fedtalos": str(made_by.get("commit") if isinstance(made_by, Mapping) else None),
    }
    return facts


def data_set(trained: TrainedRun) -> str:
    """Name of the data set that the run was trained on, without folders of this machine.

    >>> data_set(trained)
    'cifar100'
    """
    name = str(trained.options.get("dataset", "unknown"))
    if not name.startswith(HUB):
        return _without_path(name)
    place = Path(place_of(name)[0]).expanduser()
    local = any((folder / place).is_dir() for folder in (working_folder(trained.paths) or Path(), Path()))
    return f"a folder called {place.name}" if place.is_absolute() or local else name


def _mask(trained: TrainedRun) -> str:
    """The mask in words: its rule and density by its own file, where that is still there."""
    options = trained.options
    if not options.get("mask"):
        return f"{options.get('trainable', 'all')} parameters, no mask"
    here = from_here(options, trained.command, working_folder(trained.paths))
    name = Path(str(options["mask"])).name
    try:
        _, facts = read_mask_file(Path(str(here["mask"])))
    except InputError:
        return f"entries of the mask {name}, which is no longer there"
    return (
        f"{100 * facts.density:.1f} % of the weights, by the mask {name} "
        f"({facts.criterion}, {facts.iterations} iterations, calibration {facts.calibration})"
    )


def _privacy(options: Mapping[str, Any]) -> str:
    if options.get("dp_noise") is None:
        return "none: updates were averaged as they were"
    return (
        f"Gaussian noise of {options['dp_noise']} times the norm bound {options.get('max_update_norm')} on each sum, "
        f"delta {options.get('dp_delta')}"
    )


def weights_at_start(trained: TrainedRun) -> str:
    """Source of the weights that training began with, as the run recorded it.

    >>> weights_at_start(trained)
    'hub:timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k@3f2c'
    """
    made_by = trained.record.get("made_by")
    weights = made_by.get("weights") if isinstance(made_by, Mapping) else None
    return str(weights.get("source", "unknown")) if isinstance(weights, Mapping) else "unknown"


def _without_path(source: str) -> str:
    """A source of weights without the folders of this machine."""
    return source if source.startswith("hub:") or source == Path(source).name else f"a file called {Path(source).name}"


def rows(facts: Mapping[str, str]) -> str:
    """Write a table of two columns without a heading.

    >>> rows({"seed": "0"}).splitlines()[-1]
    '| seed | 0 |'
    """
    lines = [f"| {name} | {plain(value)} |" for name, value in facts.items()]
    return "\n".join(["| | |", "|---|---|", *lines, ""])


def plain(text: str) -> str:
    """Spell text from files so that Markdown shows it as it is: no markup, no cell's end, no new line.

    >>> plain("<b> a|b")
    '&lt;b&gt; a\\\\|b'
    """
    line = printable(text).replace("\n", "\\n")
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", html.escape(line, quote=False))


def _number(values: Mapping[str, Any], name: str) -> float:
    value = values.get(name, 0)
    return float(value) if isinstance(value, int | float) else 0.0
