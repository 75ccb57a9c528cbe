"""The schema of the commands that train nothing: they look at, draw, combine or show."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro
from pydantic import Field

from fedtalos.app.config.schema import Options, unset
from fedtalos.training.editing.mask_file import JoinRule


class EvaluateConfig(Options):
    """Loss and accuracy of a checkpoint on a split."""

    command: ClassVar[str] = "evaluate"

    checkpoint: Annotated[Path, tyro.conf.Positional] = Field(description="run name, or a file under checkpoints/")
    split: Literal["train", "val", "test"] = Field("test", description="which images")
    which: Literal["best", "last"] = Field("last", description="which checkpoint of a run")
    eval_limit: Annotated[int | None, unset("N", "as its run had it")] = Field(
        None, ge=1, description="use only the first n images of the split; where it has fewer, all"
    )
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


class SweepConfig(Options):
    """Run a named grid of runs, then write its table and figures; stopped, it goes on with the same command."""

    command: ClassVar[str] = "sweep"

    grid: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="GRID")] = Field(
        description="entry of configs/experiment_configs.yaml"
    )
    dry_run: bool = Field(
        False, description="list the runs and an estimate of their time, from measured steps; run none"
    )
    only: Annotated[str | None, unset("TEXT", "all")] = Field(
        None, description="only runs with that in their name, and those that they need"
    )
    seeds: Annotated[tuple[int, ...] | None, unset("SEED [SEED ...]", "the grid's")] = Field(
        None, description="instead of the grid's seeds (a block's own stay)"
    )
    weights: Annotated[str | None, unset("NAME|FILE", "the grid's")] = Field(
        None, description="what runs start from that the grid does not start from another of its runs"
    )
    output_dir: Path = Field(Path(), description="holds results/ checkpoints/ masks/ plots/")
    data_dir: Annotated[Path | None, unset("PATH", "the grid's")] = Field(None, description="where the data set is")
    device: Annotated[Literal["auto", "mps", "cuda", "cpu"] | None, unset("{auto,mps,cuda,cpu}", "the grid's")] = Field(
        None, description="auto: mps, then cuda, then cpu"
    )
    precision: Annotated[Literal["auto", "fp32", "bf16"] | None, unset("{auto,fp32,bf16}", "the grid's")] = Field(
        None, description="auto: bf16 where it is faster, measured"
    )
    threads: Annotated[int | None, unset("N", "the grid's")] = Field(None, ge=1, le=1024, description="CPU threads")
    workers: Annotated[int | None, unset("N", "the grid's")] = Field(
        None, ge=1, le=1024, description="processes that share a federated run's clients"
    )


class DemoConfig(Options):
    """A minute on embedded digits: pretrain, edit, federate dense and sparse."""

    command: ClassVar[str] = "demo"

    run_name: Annotated[str | None, unset("NAME", "demo and time")] = Field(
        None, description="first part of its runs' names"
    )
    resume: bool = Field(False, description="go on with --run_name, else with the newest unfinished demo")
    seed: int = Field(0, ge=0, description="source of every random draw")
    device: Literal["auto", "mps", "cuda", "cpu"] = Field("cpu", description="auto: mps, then cuda, then cpu")
    output_dir: Path = Field(Path(), description="holds results/ checkpoints/ masks/ plots/")


class InfoConfig(Options):
    """What is here: devices, memory, versions, data and weights."""

    command: ClassVar[str] = "info"

    data_dir: Path = Field(Path("data"), description="where data sets are looked for")


Files = Annotated[
    tuple[Path, ...],
    tyro.conf.Positional,
    tyro.conf.arg(metavar="FILE FILE...", help_behavior_hint="(two or more)"),
]
NewName = Annotated[str, tyro.conf.arg(metavar="NAME")]


class MaskShowConfig(Options):
    """What a mask file says of itself, and its density by block and kind."""

    command: ClassVar[str] = "show"

    mask: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")] = Field(description="mask file")
    output_dir: Path = Field(Path(), description="holds plots/")


class MaskCompareConfig(Options):
    """How much masks of one model overlap, and in what they were made differently."""

    command: ClassVar[str] = "compare"

    masks: Files = Field(description="mask files, each with its own name")
    name: str = Field("masks", description="folder under plots/")
    output_dir: Path = Field(Path(), description="holds plots/")


class MaskCombineConfig(Options):
    """Join masks by votes: an entry may move where enough of them let it."""

    command: ClassVar[str] = "combine"

    masks: Files = Field(description="mask files of one model and weights")
    rule: JoinRule = Field("union", description="votes needed: one, all, more than half, or the quorum")
    quorum: float = Field(0.5, gt=0, le=1, description="share of masks that must let an entry move, of vote")
    name: NewName = Field(description="of the new file under masks/")
    force: bool = Field(False, description="join masks of different weights, too")
    output_dir: Path = Field(Path(), description="holds masks/")


class MaskRandomConfig(Options):
    """Draw a random mask as dense as another one, to compare with."""

    command: ClassVar[str] = "random"

    like: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LIKE")] = Field(
        description="mask file whose model, eligible entries and density it takes"
    )
    scope: Literal["tensor", "global"] = Field(
        "tensor", description="as dense in every tensor (q, k, v are three), or only in all"
    )
    seed: int = Field(0, ge=0, description="source of every random draw")
    name: NewName = Field(description="of the new file under masks/")
    output_dir: Path = Field(Path(), description="holds masks/")


MaskTool = MaskShowConfig | MaskCompareConfig | MaskCombineConfig | MaskRandomConfig
MASK_TOOLS = (MaskShowConfig, MaskCompareConfig, MaskCombineConfig, MaskRandomConfig)


@dataclass(frozen=True)
class MaskConfig:
    """Show, compare or combine masks, or draw a random one."""

    command: ClassVar[str] = "mask"

    tool: (
        Annotated[MaskShowConfig, tyro.conf.subcommand(MaskShowConfig.command)]
        | Annotated[MaskCompareConfig, tyro.conf.subcommand(MaskCompareConfig.command)]
        | Annotated[MaskCombineConfig, tyro.conf.subcommand(MaskCombineConfig.command)]
        | Annotated[MaskRandomConfig, tyro.conf.subcommand(MaskRandomConfig.command)]
    )


OTHERS = (EvaluateConfig, PlotConfig, MaskConfig, SweepConfig, DemoConfig, InfoConfig)
