"""Every option of the commands that train nothing: they evaluate, draw, combine, plan and show."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro
from pydantic import Field, SkipValidation

from fedtalos.app.config.after_training import AfterTraining
from fedtalos.app.config.dataset import Dataset
from fedtalos.app.config.fleet import FLEET_TOOLS, FleetConfig
from fedtalos.app.config.forget import ForgetConfig
from fedtalos.app.config.init import InitConfig
from fedtalos.app.config.options import DEVICE, WHICH, Device, Options, Which, by_command, unset
from fedtalos.app.config.report import ReportConfig
from fedtalos.app.config.vector import VECTOR_TOOLS, VectorConfig
from fedtalos.app.config.watching import CompareConfig, RunsConfig
from fedtalos.training.editing.combine import JoinRule

FigureFormat = Literal["png", "pdf", "svg"]
MOST_FILES = 100
"""Masks at once; each is compared with each."""


class EvaluateConfig(Options):
    """Print the loss and accuracy of a trained run, or of weights with a head, on a split or a folder of your own."""

    command: ClassVar[str] = "evaluate"

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|FILE")] = Field(
        description="run name, or a file under checkpoints/; with --dataset a weights file, too"
    )
    split: Annotated[Literal["train", "val", "test"] | None, unset("{train,val,test}", "test")] = Field(
        None, description="images to evaluate on: train, val or test"
    )
    folder: Annotated[Path | None, unset("DIR", "the split")] = Field(
        None, description="images to evaluate on: a folder of class folders, which may be some of the model's classes"
    )
    per_class: bool = Field(
        False, description="list the classes that are recognised least, and write all to evaluations/"
    )
    confusion: bool = Field(
        False, description="list the most frequent mistakes; write and draw the confusion matrix in evaluations/"
    )
    which: Which = Field("last", description=WHICH)
    eval_limit: Annotated[int | None, unset("N", "as its run had it")] = Field(
        None, ge=1, description="evaluate on the first N images of the split only"
    )
    output_dir: Path = Field(Path(), description="folder that holds results/, checkpoints/ and evaluations/")
    dataset: Annotated[Dataset | None, unset("NAME", "that of the run")] = Field(
        None, description="images of another data set with the same classes; hf:OWNER/NAME, too"
    )
    data_dir: Annotated[Path | None, unset("PATH", "where the run had it")] = Field(
        None, description="where the data set is"
    )
    device: Device = Field("auto", description=DEVICE)


class PlotConfig(Options):
    """Draw the figures of a run, or of several runs compared, of a sweep, and of masks."""

    command: ClassVar[str] = "plot"

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = Field(
        (), description="run names, or folders of results, or the name of one sweep"
    )
    masks: tuple[Path, ...] = Field((), max_length=MOST_FILES, description="mask files to draw")
    name: Annotated[str | None, unset("NAME", "the names of the runs, or of the masks")] = Field(
        None, description="name of the folder under plots/"
    )
    format: FigureFormat = Field("png", description="kind of file: png, or pdf or svg, for papers")
    output_dir: Path = Field(Path(), description="folder that holds results/ and plots/")


class SweepConfig(Options):
    """Run a named grid of runs, then write its table and figures; the same command continues a stopped one."""

    command: ClassVar[str] = "sweep"

    grid: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="GRID")] = Field(
        description="name of a grid in configs/experiment_configs.yaml"
    )
    dry_run: bool = Field(
        False, description="list the runs, and how long they will take by those that are finished; start none"
    )
    only: Annotated[str | None, unset("TEXT", "all")] = Field(
        None, description="only the runs with this in their name, and the runs that these need"
    )
    seeds: Annotated[tuple[int, ...] | None, unset("SEED [SEED ...]", "the grid's")] = Field(
        None, description="seeds to run instead of the grid's; a block's own seeds stay"
    )
    weights: Annotated[str | None, unset("NAME|FILE", "the grid's")] = Field(
        None, description="weights of the runs that do not start from another run of the grid"
    )
    output_dir: Path = Field(Path(), description="folder for results/, checkpoints/, masks/ and plots/")
    data_dir: Annotated[Path | None, unset("PATH", "the grid's")] = Field(None, description="where the data set is")
    device: Annotated[Device | None, unset("{auto,mps,cuda,cpu}", "the grid's")] = Field(None, description=DEVICE)
    precision: Annotated[Literal["auto", "fp32", "bf16"] | None, unset("{auto,fp32,bf16}", "the grid's")] = Field(
        None, description="arithmetic; auto: bf16 on CUDA cards of the Ampere generation or later, fp32 elsewhere"
    )
    threads: Annotated[int | None, unset("N", "the grid's")] = Field(None, ge=1, le=1024, description="CPU threads")
    workers: Annotated[int | None, unset("N", "the grid's")] = Field(
        None, ge=1, le=1024, description="processes that share the clients of a federated run"
    )


class DemoConfig(Options):
    """Pretrain, edit and federate on embedded digits, in about a minute."""

    command: ClassVar[str] = "demo"

    run_name: Annotated[str | None, unset("NAME", "demo and time")] = Field(
        None, description="first part of the names of its runs"
    )
    resume: bool = Field(False, description="continue the demo called --run_name, or else the newest unfinished one")
    resume_or_start: bool = Field(False, description="continue as --resume does, or begin where there is nothing")
    seed: int = Field(0, ge=0, description="seed of the random draws")
    device: Device = Field("cpu", description=DEVICE)
    output_dir: Path = Field(Path(), description="folder for results/, checkpoints/, masks/ and plots/")


class InfoConfig(Options):
    """Show what is here: devices, memory, versions, data sets and weights."""

    command: ClassVar[str] = "info"

    data_dir: Path = Field(Path("data"), description="where data sets are looked for")


Files = Annotated[
    tuple[Path, ...],
    tyro.conf.Positional,
    tyro.conf.arg(metavar="FILE FILE...", help_behavior_hint="(two or more)"),
]
NewName = Annotated[str, tyro.conf.arg(metavar="NAME")]


class MaskShowConfig(Options):
    """Show what a mask file says of itself, and its density by block and kind."""

    command: ClassVar[str] = "show"

    mask: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")] = Field(description="mask file")
    output_dir: Path = Field(Path(), description="folder that holds plots/")


class MaskCompareConfig(Options):
    """Show how much masks of one model overlap, and how differently they were made."""

    command: ClassVar[str] = "compare"

    masks: Files = Field(max_length=MOST_FILES, description="mask files, each with its own name")
    name: Annotated[str | None, unset("NAME", "the names of the masks")] = Field(
        None, description="name of the folder under plots/"
    )
    output_dir: Path = Field(Path(), description="folder that holds plots/")


class MaskCombineConfig(Options):
    """Join masks by votes: an entry may move where enough of them let it."""

    command: ClassVar[str] = "combine"

    masks: Files = Field(max_length=MOST_FILES, description="mask files of one model and its weights")
    rule: JoinRule = Field("union", description="votes that an entry needs: one, all, over half, or the --quorum")
    quorum: float = Field(0.5, gt=0, le=1, description="rule vote: share of the masks that must let an entry move")
    name: NewName = Field(description="name of the new file under masks/")
    force: bool = Field(False, description="join masks of different weights, too")
    output_dir: Path = Field(Path(), description="folder that holds masks/")


MaskTool = MaskShowConfig | MaskCompareConfig | MaskCombineConfig
MASK_TOOLS: dict[str, type[MaskTool]] = by_command(MaskTool)


class MaskConfig(Options):
    """Make masks (as editing does), show, compare or combine them."""

    command: ClassVar[str] = "mask"

    tool: SkipValidation[MaskTool]


ToolConfig = (
    EvaluateConfig
    | PlotConfig
    | RunsConfig
    | CompareConfig
    | ReportConfig
    | MaskConfig
    | VectorConfig
    | FleetConfig
    | ForgetConfig
    | SweepConfig
    | DemoConfig
    | InitConfig
    | InfoConfig
    | AfterTraining
)
TOOL_CONFIGS: dict[str, type[ToolConfig]] = by_command(ToolConfig)

FAMILIES: dict[str, dict[str, type[Options]]] = {
    "mask": {**MASK_TOOLS},
    "vector": {**VECTOR_TOOLS},
    "fleet": {**FLEET_TOOLS},
}
"""Commands that have commands of their own, by name."""
