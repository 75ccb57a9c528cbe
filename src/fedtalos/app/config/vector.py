"""Options of the vector command and its own commands."""

from pathlib import Path
from typing import Annotated, ClassVar

import tyro
from pydantic import Field, SkipValidation

from fedtalos.app.config.apart import Factor
from fedtalos.app.config.dataset import Dataset
from fedtalos.app.config.options import DEVICE, WHICH, Device, Options, Which, by_command, unset
from fedtalos.training.editing.merging import Method

Vectors = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="VECTOR...")]
Base = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="BASE")]
NewName = Annotated[str, tyro.conf.arg(metavar="NAME")]

BASE = "model that the vectors were made on: a run, a checkpoint, or weights as --weights takes them"


class VectorMakeConfig(Options):
    """Subtract a run's start from what it came to, or one checkpoint from another."""

    command: ClassVar[str] = "make"

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|FILE")] = Field(
        description="run name, or a file under checkpoints/: the model after training"
    )
    before: Annotated[Path | None, tyro.conf.arg(metavar="RUN|FILE"), unset("RUN|FILE", "the run's own start")] = Field(
        None, description="run or checkpoint to subtract; else the run's start is rebuilt from its options"
    )
    which: Which = Field("last", description=WHICH)
    name: Annotated[str | None, unset("NAME", "the run's")] = Field(
        None, description="name of the new file under vectors/"
    )
    output_dir: Path = Field(Path(), description="folder that holds checkpoints/ and vectors/")
    data_dir: Annotated[Path | None, unset("PATH", "where the run had it")] = Field(
        None, description="where the data set is"
    )
    device: Device = Field("auto", description=DEVICE)


class ValidationOptions(Options):
    """Images that vectors are tried on."""

    dataset: Annotated[Dataset | None, unset("NAME", "that of the base's run")] = Field(
        None, description="images to try vectors on; hf:OWNER/NAME, too"
    )
    data_dir: Annotated[Path | None, unset("PATH", "where the base's run had it")] = Field(
        None, description="where the data set is"
    )
    eval_limit: Annotated[int | None, unset("N", "as the base's run had it")] = Field(
        None, ge=1, description="try them on N images only"
    )
    device: Device = Field("auto", description=DEVICE)


class VectorShowConfig(ValidationOptions):
    """Show what vectors say of themselves, their norms by block and kind, and the cosines between several."""

    command: ClassVar[str] = "show"

    vectors: Vectors = Field(description="vector files, each with its own name")
    name: Annotated[str | None, unset("NAME", "the names of the vectors")] = Field(
        None, description="name of the folder under plots/"
    )
    base: Annotated[str | None, tyro.conf.arg(metavar="BASE"), unset("BASE", "none")] = Field(
        None, description=f"draw, too, how two vectors disturb each other on validation images. BASE is the {BASE}"
    )
    output_dir: Path = Field(Path(), description="folder that holds plots/, and checkpoints/")


class VectorApplyConfig(ValidationOptions):
    """Add vectors to the model that they were made on, and write a checkpoint."""

    command: ClassVar[str] = "apply"

    base: Base = Field(description=BASE)
    vectors: Vectors = Field(description="vector files of one base")
    alpha: Factor = Field(
        1.0,
        description="factor on the sum of the vectors; below 0 it subtracts them; auto: by accuracy on the validation "
        "images",
    )
    name: NewName = Field(description="name of the new folder under checkpoints/")
    output_dir: Path = Field(Path(), description="folder that holds checkpoints/")


class VectorNegateConfig(Options):
    """Write a vector that takes away what another adds."""

    command: ClassVar[str] = "negate"

    vector: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="VECTOR")] = Field(description="vector file")
    name: NewName = Field(description="name of the new file under vectors/")
    output_dir: Path = Field(Path(), description="folder that holds vectors/")


class VectorMergeConfig(ValidationOptions):
    """Make one vector of several by a rule of the literature (docs/editing.md)."""

    command: ClassVar[str] = "merge"

    vectors: Vectors = Field(description="vector files of one base")
    method: Annotated[Method, tyro.conf.arg(metavar="RULE")] = Field(
        "sum",
        description="sum, mean, ties, dare, magmax, consensus, lines, tsv or iso_c; fisher and regmean want clients' "
        "images, so they are rules of federated --merge",
    )
    alpha: Factor = Field(
        1.0, description="factor on the merged vector; auto: by accuracy on the validation images, which needs --base"
    )
    share: float = Field(0.2, gt=0, le=1, description="ties: share of each vector's support that is kept")
    drop: float = Field(0.9, ge=0, lt=1, description="dare: share of each vector's support that is dropped")
    seed: int = Field(0, ge=0, description="dare: seed of what is dropped")
    votes: int = Field(2, ge=1, description="consensus: vectors that must need an entry")
    selectivity: float = Field(0.4, ge=0, description="consensus: lambda; larger leaves an entry to fewer vectors")
    first: Annotated[float | None, unset("X", "1 / vectors")] = Field(
        None, description="lines: factor at the first block"
    )
    last: float = Field(1.0, description="lines: factor at the last block")
    name: NewName = Field(description="name of the new file under vectors/")
    base: Annotated[str | None, tyro.conf.arg(metavar="BASE"), unset("BASE", "none")] = Field(
        None, description=f"needed for alpha auto: the {BASE}"
    )
    output_dir: Path = Field(Path(), description="folder that holds checkpoints/ and vectors/")


VectorTool = VectorMakeConfig | VectorShowConfig | VectorApplyConfig | VectorNegateConfig | VectorMergeConfig
VECTOR_TOOLS: dict[str, type[VectorTool]] = by_command(VectorTool)


class VectorConfig(Options):
    """Make task vectors, show, apply, negate or merge them."""

    command: ClassVar[str] = "vector"

    tool: SkipValidation[VectorTool]
