"""Options of the command that writes a report."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro
from pydantic import Field

from fedtalos.app.config.options import DEVICE, Device, Options, unset


class ReportConfig(Options):
    """Write a page about one run, several, or a sweep: figures, curves, classes, mistakes; one HTML file."""

    command: ClassVar[str] = "report"

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")] = Field(
        description="run names, or the name of one sweep"
    )
    classes: bool = Field(
        True, description="of one run: evaluate its last model by class, and show real mistakes (the data are read)"
    )
    split: Literal["val", "test"] = Field("test", description="images whose classes are shown")
    eval_limit: Annotated[int | None, unset("N", "as its run had it")] = Field(
        None, ge=1, description="look at the first N of them only"
    )
    name: Annotated[str | None, unset("NAME", "that of the runs")] = Field(
        None, description="name of the folder under plots/"
    )
    output_dir: Path = Field(Path(), description="folder that holds results/, checkpoints/ and plots/")
    data_dir: Annotated[Path | None, unset("PATH", "where the run had it")] = Field(
        None, description="where the data set is"
    )
    device: Device = Field("auto", description=DEVICE)
