"""ONNX: one file for other runtimes, compared with the model before it is given."""

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fedtalos.errors import InputError, install
from fedtalos.models.backbone import Backbone
from fedtalos.models.export.pixels import as_json, for_transformers

PARITY = 1e-4
"""Largest difference of a logit between the model and onnxruntime, relative to the largest logit if that is above 1."""
OPSET = 18
NEEDED = ("onnx", "onnxscript", "onnxruntime")


def onnx_files(model: Backbone, classes: Sequence[str]) -> dict[str, bytes]:
    """Make model.onnx, which maps pixel_values (batch, 3, S, S), normalised, to logits (batch, C).

    Classes and the preparation of images are in the file's metadata, as JSON, and in preprocessor_config.json beside.

    Raises InputError where the extra "onnx" is not installed, where the model cannot be turned into ONNX, and where
    onnxruntime's logits differ from the model's by more than PARITY.

    >>> sorted(onnx_files(model, ("cat", "dog")))
    ['model.onnx', 'preprocessor_config.json']
    """
    check_installed()
    size, pixels = model.architecture.image_size, for_transformers(model)
    content = _with_metadata(_exported(model, _images(2, size)), {"classes": list(classes), **pixels})
    difference = parity(content, model)
    if not difference <= PARITY:
        raise InputError(
            f"format onnx: onnxruntime's logits differ from the model's by {difference:.2g}, and {PARITY:g} is the "
            "most that is accepted; nothing was written, take torchscript"
        )
    return {"model.onnx": content, "preprocessor_config.json": as_json(pixels)}


def check_installed() -> None:
    """Refuse with an InputError where one of the libraries that this format needs is not there.

    >>> check_installed()
    """
    for name in NEEDED:
        try:
            import_module(name)
        except ImportError as error:
            raise InputError(f"format onnx: {name} is not installed; {install('onnx')}") from error


def parity(content: bytes, model: Backbone) -> float:
    """Measure the largest difference of a logit between an ONNX file and the model, on batches of 1 and 3 images.

    It is relative to the largest logit where that is above 1.

    >>> parity(Path("model.onnx").read_bytes(), model) < PARITY
    True
    """
    runtime: Any = import_module("onnxruntime")
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    found = 0.0
    for batch in (1, 3):
        images = _images(batch, model.architecture.image_size)
        with torch.no_grad():
            ours = model(images)
        theirs = torch.from_numpy(session.run(["logits"], {"pixel_values": images.numpy()})[0])
        found = max(found, float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1)))
    return found


def _images(batch: int, size: int) -> Tensor:
    """Images of waves, in the range of normalised pixels."""
    return torch.arange(batch * 3.0 * size**2).mul(0.7).sin().mul(2).view(batch, 3, size, size)


def _exported(model: Backbone, images: Tensor) -> Any:
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                (images,),
                input_names=["pixel_values"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
            assert program is not None
            return program.model_proto
    except Exception as error:  # exporters raise nearly anything over layers that they do not know
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        why = str(cause).strip().partition("\n")[0][:200] or type(cause).__name__
        raise InputError(f"format onnx: {model.architecture} cannot be exported ({why}); take torchscript") from error


def _with_metadata(file: Any, facts: dict[str, Any]) -> bytes:
    onnx: Any = import_module("onnx")
    onnx.helper.set_model_props(file, {name: json.dumps(value) for name, value in facts.items()})
    onnx.checker.check_model(file)
    written: bytes = file.SerializeToString()
    return written


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's reports of its progress off the screen."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)
