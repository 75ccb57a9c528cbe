"""Places of a run: its folders and files, by its name."""

from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from fedtalos.errors import InputError, shown

WORKERS = ".workers-"
"""Prefix of a folder, in that of results, where the processes of a run meet; it goes when they do."""

LONGEST = 200
"""Bytes of a name; the system allows 255, of which files beside a run's take some."""


@dataclass(frozen=True)
class RunPaths:
    """The folders of one run."""

    root: Path
    name: str

    @property
    def results(self) -> Path:
        return self.root / "results" / self.name

    @property
    def config(self) -> Path:
        return self.results / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints" / self.name

    @property
    def plots(self) -> Path:
        return self.root / "plots" / self.name

    @property
    def mask(self) -> Path:
        return self.root / "masks" / f"{self.name}.safetensors"

    @property
    def head(self) -> Path:
        return self.root / "masks" / f"{self.name}.head.safetensors"

    @property
    def vector(self) -> Path:
        return self.root / "vectors" / f"{self.name}.safetensors"

    @property
    def lock(self) -> Path:
        return self.results / ".lock"

    @property
    def flag(self) -> str:
        """Words that lead a command to the run's root, after a space; none for the working folder."""
        return "" if self.root == Path() else f" --output_dir {quote(str(self.root))}"

    @property
    def started(self) -> bool:
        return self.config.exists()

    @property
    def finished(self) -> bool:
        return (self.results / "summary.yaml").is_file()

    @property
    def free(self) -> bool:
        """True where the folder of results is not there, or was claimed by a run that was killed before it began."""
        return not self.results.exists() or all(path.name.startswith(".") for path in self.results.iterdir())


def plain_name(flag: str, name: str) -> str:
    """Give ``name``, if it is one that a folder can have; else InputError."""
    if name in ("", ".", "..") or Path(name).name != name or not name.isprintable():
        raise InputError(f"{flag} {shown(name)}: expected a plain folder name, without slashes")
    if len(name.encode(errors="surrogateescape")) > LONGEST:
        raise InputError(f"{flag} {shown(name)}: expected at most {LONGEST} bytes; choose a shorter name")
    return name
