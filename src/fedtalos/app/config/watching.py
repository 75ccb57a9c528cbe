"""Options of the commands that look at runs: runs, which is status, and compare."""

from pathlib import Path
from typing import Annotated, ClassVar

import tyro
from pydantic import Field

from fedtalos.app.config.options import Options


class RunsConfig(Options):
    """List runs: running, stopped or finished, how far, how good; `status` is the same."""

    command: ClassVar[str] = "runs"

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = Field((), description="run names; none: all runs")
    follow: bool = Field(False, description="show a run that is running until it ends; without a name, the only one")
    all: bool = Field(False, description="list all, not the newest 20 alone")
    output_dir: Path = Field(Path(), description="folder that holds results/ and checkpoints/")


class CompareConfig(Options):
    """Print what runs reached and cost side by side, and the options in which they differ."""

    command: ClassVar[str] = "compare"

    runs: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RUN RUN...", help_behavior_hint="(two or more)"),
    ] = Field(description="run names, or folders of results")
    output_dir: Path = Field(Path(), description="folder that holds results/")
