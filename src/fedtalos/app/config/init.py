"""A starter file of options: the everyday ones of configs/default_config.yaml, with their comments."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar

import tyro
from pydantic import Field

from fedtalos.app.config.options import Options

HEADER = """\
# Everyday options, at their defaults: change what you need, and pass this file with --config FILE.
# It may serve all training commands: each takes its own options and passes over the others'.
# A flag beats --preset, --preset beats --config, and --config beats the defaults.
# null: worked out, as the comment says.
# There are more options, which can stand here too: fedtalos COMMAND --help_all lists them.
"""


class InitConfig(Options):
    """Write a starter file of options, with comments, to change and pass with --config."""

    command: ClassVar[str] = "init"

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="[FILE]")] = Field(
        Path("fedtalos.yaml"), description="new file to write; one that is there is left as it is"
    )


def starter(every: str, names: set[str]) -> str:
    """Keep the options called ``names`` of a commented file of ``every`` option, and the headings of what is kept.

    >>> starter("# --- run: where\\nseed: 0  # of the draws\\nthreads: null\\n", {"seed"}).splitlines()[-2:]
    ['# --- run: where', 'seed: 0  # of the draws']
    """
    kept = []
    for block in re.split(r"^(?=# --- )", every, flags=re.MULTILINE)[1:]:
        heading, *lines = block.splitlines()
        if own := list(_of(lines, names)):
            kept.append("\n".join([heading, *own]) + "\n")
    return "\n".join([HEADER, *kept])


def _of(lines: list[str], names: set[str]) -> Iterator[str]:
    """Give the lines of the options called ``names``, those that go on with a comment included."""
    wanted = False
    for line in lines:
        if option := re.match(r"(\w+):", line):
            wanted = option[1] in names
        if wanted and line.strip():
            yield line
