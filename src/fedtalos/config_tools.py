"""The schema of the commands that train nothing: they look at, draw, combine or show."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro
from pydantic import Field

from fedtalos.config import Options, unset


class EvaluateConfig(Options):
    """Loss and accuracy of a checkpoint on a split."""

    command: ClassVar[str] = "evaluate"

    checkpoint: Annotated[Path, tyro.conf.Positional] = Field(description="run name, or a file under checkpoints/")
    split: Literal["train", "val", "test"] = Field("test", description="which images")
    which: Literal["best", "last"] = Field("last", description="which checkpoint of a run")
    output_dir: Path = Field(Path(), description="holds results/ and checkpoints/")
    data_dir: Annotated[Path | None, unset("PATH", "where the run had it")] = Field(
        None, description="where the data set is"
    )
    device: Literal["auto", "mps", "cuda", "cpu"] = Field("auto", description="auto: mps, then cuda, then cpu")


class PlotConfig(Options):
    """Draw the figures of one run, or of several compared, and of masks."""

    command: ClassVar[str] = "plot"

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = Field((), description="run names or results/ folders")
    masks: tuple[Path, ...] = Field((), description="mask files")
    name: Annotated[str | None, unset("NAME", "the run's, or comparison, or masks")] = Field(
        None, description="folder under plots/"
    )
    output_dir: Path = Field(Path(), description="holds results/ and plots/")


class DemoConfig(Options):
    """Two minutes on embedded digits: pretrain, edit, federate dense and sparse."""

    command: ClassVar[str] = "demo"

    seed: int = Field(0, ge=0, description="source of every random draw")
    device: Literal["auto", "mps", "cuda", "cpu"] = Field("cpu", description="auto: mps, then cuda, then cpu")
    output_dir: Path = Field(Path(), description="holds results/ checkpoints/ masks/ plots/")


class InfoConfig(Options):
    """What is here: devices, memory, versions, data and weights."""

    command: ClassVar[str] = "info"

    data_dir: Path = Field(Path("data"), description="where data sets are looked for")


OTHERS = (EvaluateConfig, PlotConfig, DemoConfig, InfoConfig)
