"""Options of the commands that use a trained model: try it on photos, explain its answers, send it round."""

import warnings
from pathlib import Path
from typing import Annotated, ClassVar

import tyro
from pydantic import Field

from fedtalos.app.config.options import DEVICE, WHICH, Device, Options, Which, unset
from fedtalos.models.export.folder import Format

Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|FILE")]
Images = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE...")]

RUN = "run name, or a file under checkpoints/"
IMAGES = "image files, folders of them, or patterns in quotes"
FORMAT = (
    "timm's folder (safetensors-timm), Hugging Face transformers' (hf), or one file: torchscript, or onnx, which needs "
    "the extra onnx"
)
LICENSE = "licence that you give the model, in Hugging Face's short names, such as apache-2.0"


with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # pydantic's models have a method called json, which nobody needs

    class PredictConfig(Options):
        """Name the most probable classes of photos, with a trained model."""

        command: ClassVar[str] = "predict"

        run: Run = Field(description=RUN)
        images: Images = Field((), description=IMAGES)
        top: int = Field(5, ge=1, description="number of classes to name, the most probable first")
        json: bool = Field(False, description="print JSON instead of a table")  # type: ignore[assignment]
        csv: bool = Field(False, description="print CSV instead of a table")
        which: Which = Field("last", description=WHICH)
        output_dir: Path = Field(Path(), description="folder that holds checkpoints/")
        device: Device = Field("auto", description=DEVICE)


class ExplainConfig(Options):
    """Draw what a trained ViT's answers hang on: attention rollout and Grad-CAM over photos."""

    command: ClassVar[str] = "explain"

    run: Run = Field(description=RUN)
    images: Images = Field((), description=IMAGES)
    target: Annotated[str | None, unset("CLASS", "the model's answer")] = Field(
        None, description="class that Grad-CAM asks about"
    )
    which: Which = Field("last", description=WHICH)
    output_dir: Path = Field(Path(), description="folder that holds checkpoints/ and plots/")
    device: Device = Field("auto", description=DEVICE)


class ExportConfig(Options):
    """Write a trained model as a folder that other libraries open, with a model card beside it."""

    command: ClassVar[str] = "export"

    run: Run = Field(description=RUN)
    format: Format = Field("safetensors-timm", description=FORMAT)
    folder: Annotated[Path | None, unset("DIR", "exports/RUN/FORMAT")] = Field(
        None, description="new folder to write; it appears whole or not at all"
    )
    license: Annotated[str | None, unset("NAME", "unknown")] = Field(None, description=LICENSE)
    which: Which = Field("last", description=WHICH)
    output_dir: Path = Field(Path(), description="folder that holds checkpoints/, results/ and exports/")


class PushConfig(Options):
    """Put a trained model and its card on the Hugging Face hub, as a repository of yours."""

    command: ClassVar[str] = "push"

    run: Run = Field(description=RUN)
    hub: Annotated[str, tyro.conf.arg(metavar="OWNER/REPO")] = Field(
        description="repository to push to, made where it is not there; files of the same names are replaced"
    )
    format: Format = Field("hf", description=FORMAT)
    private: bool = Field(False, description="make a repository that only its owners see")
    license: Annotated[str | None, unset("NAME", "unknown")] = Field(None, description=LICENSE)
    which: Which = Field("last", description=WHICH)
    output_dir: Path = Field(Path(), description="folder that holds checkpoints/ and results/")


AfterTraining = PredictConfig | ExplainConfig | ExportConfig | PushConfig
