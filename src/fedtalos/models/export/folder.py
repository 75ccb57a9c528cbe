"""A model as a folder of files in another library's format, which appears whole or not at all."""

import copy
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from fedtalos.errors import InputError, check_word
from fedtalos.files import write_atomic
from fedtalos.models.backbone import Backbone
from fedtalos.models.export.hugging_face import hugging_face_files
from fedtalos.models.export.onnx import onnx_files
from fedtalos.models.export.timm import timm_files
from fedtalos.models.export.torchscript import torchscript_files

Format = Literal["safetensors-timm", "hf", "torchscript", "onnx"]

WRITERS: dict[str, Callable[[Backbone, Sequence[str]], dict[str, bytes]]] = {
    "safetensors-timm": timm_files,
    "hf": hugging_face_files,
    "torchscript": torchscript_files,
    "onnx": onnx_files,
}


def export_model(
    model: Backbone,
    classes: Sequence[str],
    folder: str | Path,
    format: Format = "safetensors-timm",
    *,
    beside: Mapping[str, str] | None = None,
) -> Path:
    """Write a model to a new folder, for other programs to open.

    - safetensors-timm: ``timm.create_model("local-dir:FOLDER", pretrained=True)``; from the hub ``hf-hub:OWNER/REPO``.
    - hf: ``transformers.AutoModelForImageClassification.from_pretrained(FOLDER)``, and its AutoImageProcessor.
    - torchscript: ``torch.jit.load("FOLDER/model.pt")``, without any code of ours.
    - onnx: FOLDER/model.onnx, compared with the model before it is written; needs the extra "onnx".

    Mean, deviation and size of the pixels, and the names of the ``classes``, stand where each format keeps them.
    ``beside`` are more texts to write, by file name (a README.md, say).

    Raises InputError where the folder is there already, and where the model cannot be had in that format.

    >>> export_model(model, data.classes, "exports/cifar100", "hf")
    PosixPath('exports/cifar100')
    """
    folder = Path(folder)
    check_new(folder)
    return write_folder(folder, {**files_of(model, classes, format), **_encoded(beside or {})})


def files_of(model: Backbone, classes: Sequence[str], format: str) -> dict[str, bytes]:
    """Make the files of a format, by name, without writing any.

    >>> sorted(files_of(model, data.classes, "hf"))
    ['config.json', 'model.safetensors', 'preprocessor_config.json']
    """
    check_word("format", format, Format)
    if len(classes) != model.architecture.num_classes:
        raise InputError(
            f"classes: expected {model.architecture.num_classes} names, one per output of the head, got {len(classes)}"
        )
    return WRITERS[format](copy.deepcopy(model).cpu().eval().requires_grad_(False), classes)


def check_new(folder: Path) -> None:
    """Refuse a folder that is there already, with an InputError: nothing of anybody's is written over.

    >>> check_new(Path("exports/cifar100"))
    """
    if os.path.lexists(folder):
        raise InputError(f"{folder} is there already: move it away, or give another folder")


def write_folder(folder: Path, contents: Mapping[str, bytes]) -> Path:
    """Write a new folder of files, so that it appears whole or not at all.

    >>> write_folder(Path("exports/mine"), {"config.json": b"{}"})
    PosixPath('exports/mine')
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        for name, content in contents.items():
            write_atomic(part / name, content)
        check_new(folder)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _encoded(texts: Mapping[str, str]) -> dict[str, bytes]:
    return {name: text.encode(errors="backslashreplace") for name, text in texts.items()}
