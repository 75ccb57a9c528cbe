"""Model cards: a README.md of the Hugging Face hub's form, from what a run recorded.

It is made to be published: paths of the machine, which may name people, are left out.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path

from fedtalos._version import __version__
from fedtalos.app.card_facts import data_set, plain, rows, training_facts, weights_at_start
from fedtalos.app.run.recorder import MetricsLine
from fedtalos.app.trained import TrainedRun
from fedtalos.data.hub_dataset import HUB, place_of
from fedtalos.errors import InputError, shown
from fedtalos.facts import read_table
from fedtalos.metrics import wilson

LIBRARIES = {"safetensors-timm": "timm", "hf": "transformers", "torchscript": "pytorch", "onnx": "onnx"}
"""Format -> the hub's name of the library that opens it."""

ON_THE_HUB = {"cifar100": "uoft-cs/cifar100", "cifar10": "uoft-cs/cifar10"}
"""Data sets that the hub has under another name."""

CLASSES = 30
"""Classes that a card lists; all are in config.json, or in the model's file."""

USES = {
    "safetensors-timm": """import timm, torch
from PIL import Image

model = timm.create_model("{timm_place}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.no_grad():
    probabilities = model(transform(Image.open("photo.jpg").convert("RGB"))[None]).softmax(1)[0]
print(model.pretrained_cfg["label_names"][probabilities.argmax()])""",
    "hf": """from transformers import pipeline

classify = pipeline("image-classification", model="{place}")
print(classify("photo.jpg"))""",
    "torchscript": """import torch

model = torch.jit.load("model.pt")
logits = model(images)  # float32 (B, 3, {size}, {size}), prepared as below""",
    "onnx": """import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
logits = session.run(["logits"], {{"pixel_values": images}})[0]  # float32 (B, 3, {size}, {size}), prepared as below""",
}


def check_license(name: str | None) -> None:
    """Refuse a licence that is no short name of the hub's form, with an InputError.

    >>> check_license("apache-2.0")
    """
    if name is not None and re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name) is None:
        raise InputError(f"license {shown(name)}: expected a short name such as apache-2.0, mit or cc-by-4.0")


def model_card(trained: TrainedRun, format: str, license: str | None, *, repo: str | None = None) -> str:
    """Write the card: the hub's fields, then what it is, how to use it, how good it is, and how it was made.

    ``repo`` is the hub's repository that the model will be in; None: a folder.

    >>> model_card(trained, "hf", "apache-2.0", repo="me/vit-cifar100").partition("\\n")[0]
    '---'
    """
    size = trained.model.architecture.image_size
    place = "path/to/this/folder" if repo is None else repo
    use = USES[format].format(place=place, timm_place=f"{'local-dir' if repo is None else 'hf-hub'}:{place}", size=size)
    parts = [
        f"---\n{_fields(trained, format, license)}\n---\n",
        f"# {plain(trained.name)}\n",
        f"{_what(trained)}\n",
        "## How do I use it?\n",
        f"```python\n{use}\n```\n",
        "## How good is it?\n",
        _quality(trained),
        "## How was it trained?\n",
        rows(training_facts(trained)),
        "## How are images prepared?\n",
        _pixels(trained),
        "## Which classes does it know?\n",
        _classes(trained.classes),
        "## What are its limits?\n",
        _limits(trained, license),
    ]
    return "\n".join(parts)


def test_accuracy(trained: TrainedRun) -> tuple[float, int] | None:
    """Test accuracy (0 to 1) of this checkpoint, and of how many images; None where the run did not come to it."""
    found = trained.summary.get("test_accuracy")
    kind = "best_on_val" if trained.path.stem == "best" else "last"
    if not isinstance(found, Mapping) or not isinstance(found.get(kind), int | float):
        return None
    return float(found[kind]), _test_images(trained.paths.results / "metrics.csv")


def _test_images(path: Path) -> int:
    """Images of the test split that were read, by the run's last line; 0 where nobody says."""
    try:
        _, lines = read_table(MetricsLine, path, first="step")
    except InputError:
        return 0
    return next((line.examples or 0 for line in reversed(lines) if line.split == "test"), 0)


def _fields(trained: TrainedRun, format: str, license: str | None) -> str:
    """The hub's fields, as YAML that huggingface_hub itself writes."""
    from huggingface_hub import EvalResult, ModelCardData

    name, results = data_set(trained), None
    on_hub = ON_THE_HUB.get(name) or ("/".join(place_of(name)[0].split("/")[:2]) if name.startswith(HUB) else None)
    if (accuracy := test_accuracy(trained)) is not None:
        share, images = accuracy
        results = [
            EvalResult(
                task_type="image-classification",
                dataset_type=on_hub or name,
                dataset_name=name,
                dataset_split="test",
                metric_type="accuracy",
                metric_value=round(share, 4),
                metric_name=f"accuracy on {images} test images" if images else "test accuracy",
            )
        ]
    fields = ModelCardData(
        license=license or "unknown",
        library_name=LIBRARIES[format],
        pipeline_tag="image-classification",
        tags=["image-classification", "vision", "fedtalos", *_tags(trained)],
        datasets=[on_hub] if on_hub else None,
        metrics=["accuracy"],
        base_model=_base(trained),
        model_name=trained.name,
        eval_results=results,
    )
    return str(fields.to_yaml()).strip()


def _tags(trained: TrainedRun) -> list[str]:
    return [
        *(["federated-learning"] if trained.federated else []),
        *(["sparse-fine-tuning"] if trained.options.get("mask") else []),
    ]


def _base(trained: TrainedRun) -> str | None:
    """The hub's repository of the weights that training began with; None where they are from elsewhere."""
    found = re.fullmatch(r"hub:([\w.-]+/[\w.-]+)(?:/.+)?@\w+", weights_at_start(trained))
    return None if found is None else found[1]


def _what(trained: TrainedRun) -> str:
    model, how = trained.model.architecture, "trained on all images in one place"
    if trained.federated:
        how = f"trained by federated averaging over {trained.options.get('num_clients', 'several')} clients"
    return (
        f"{plain(str(model))} for images of {model.image_size} pixels a side and {len(trained.classes)} classes, {how} "
        f"with fedtalos {__version__}."
    )


def _quality(trained: TrainedRun) -> str:
    accuracy = test_accuracy(trained)
    if accuracy is None:
        return "Nobody knows: the run is not finished, or its records are not beside its checkpoint.\n"
    share, images = accuracy
    low, high = wilson(share, images)
    interval = "" if math.isnan(low) else f", 95 % interval {100 * low:.1f} to {100 * high:.1f} % ({images} images)"
    chosen = "best on validation" if trained.path.stem == "best" else "last"
    facts = {"test accuracy": f"{100 * share:.2f} %{interval}", "checkpoint": f"{chosen}; never chosen by test images"}
    found = trained.summary.get("val_accuracy")
    if isinstance(found, Mapping) and isinstance(value := found.get("best" if chosen[0] == "b" else "last"), float):
        facts["validation accuracy"] = f"{100 * value:.2f} %"
    return rows(facts)


def _pixels(trained: TrainedRun) -> str:
    model = trained.model
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (model.mean, model.std))
    size = model.architecture.image_size
    crop = "the middle square" if model.crop == 1 else f"the middle {model.crop:.3g} of the middle square"
    trained_on = "" if model.stored_size is None else f" Training images had {model.stored_size} pixels a side."
    return (
        f"Upright, in RGB, {crop}, {size} by {size} pixels, {model.interpolation}; pixels in 0 to 1, less mean {mean}, "
        f"over deviation {std}.{trained_on}\n"
    )


def _classes(classes: tuple[str, ...]) -> str:
    listed = ", ".join(plain(name) for name in classes[:CLASSES])
    more = f" and {len(classes) - CLASSES} more" if len(classes) > CLASSES else ""
    return f"{len(classes)}: {listed}{more}.\n"


def _limits(trained: TrainedRun, license: str | None) -> str:
    asked = "" if license else "- No licence was given. Ask its owner before you use it.\n"
    return (
        "- It names one of its classes whatever an image shows, and its probabilities are not calibrated.\n"
        f"- It was tried on images of {plain(data_set(trained))} alone.\n"
        f"{asked}- The licences of the weights at the start and of the images hold, too.\n"
    )
