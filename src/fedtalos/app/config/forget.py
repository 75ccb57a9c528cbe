"""Options of the forget command."""

from pathlib import Path
from typing import Annotated, ClassVar

import tyro
from pydantic import Field

from fedtalos.app.config.apart import Factor
from fedtalos.app.config.options import DEVICE, Device, Options, unset


class ForgetConfig(Options):
    """Take the vector of a task, of some classes or of a client out of a run, and measure what is forgotten."""

    command: ClassVar[str] = "forget"

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = Field(
        description="finished run with --tasks or --one_shot, which keeps a vector of each task or client"
    )
    classes: Annotated[tuple[str, ...], tyro.conf.arg(metavar="CLASS [CLASS ...]")] = Field(
        (), description="names of the classes to forget, all those of a task, or of several"
    )
    task: Annotated[int | None, unset("N", "none")] = Field(None, ge=0, description="number of the task to forget")
    client: Annotated[int | None, unset("N", "none")] = Field(None, ge=0, description="number of the client to forget")
    alpha: Factor = Field(
        "auto",
        description="factor by which the vector is subtracted beyond leaving it out; auto: the least target accuracy "
        "that leaves --keep of control, by the validation images",
    )
    keep: float = Field(0.95, gt=0, le=1, description="share of the control accuracy that is to stay")
    keep_head: bool = Field(
        False, description="leave the head as it is; else it is fitted to what the other clients send alone"
    )
    retrained: Annotated[str | None, tyro.conf.arg(metavar="RUN"), unset("RUN", "none")] = Field(
        None, description="run that was trained without what is forgotten (--leave_out), to compare with"
    )
    name: Annotated[str | None, unset("NAME", "RUN-without-NAME")] = Field(
        None, description="name of the new folders under results/ and checkpoints/"
    )
    output_dir: Path = Field(Path(), description="folder that holds results/, checkpoints/ and vectors/")
    data_dir: Annotated[Path | None, unset("PATH", "where the run had it")] = Field(
        None, description="where the data set is"
    )
    device: Device = Field("auto", description=DEVICE)
