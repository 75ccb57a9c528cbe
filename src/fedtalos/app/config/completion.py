"""Shell completion of every command and its options, by tyro's own flags."""

from collections.abc import Mapping
from dataclasses import make_dataclass
from typing import Annotated, Any, Union

import tyro

from fedtalos.app.config.help import tools_of
from fedtalos.app.config.options import Options
from fedtalos.app.config.tools import FAMILIES
from fedtalos.errors import InputError

PRINT, WRITE = "--tyro-print-completion", "--tyro-write-completion"
SHELLS = ("bash", "zsh", "tcsh", "fish")


def is_completion(words: list[str]) -> bool:
    """Tell whether a script for a shell is asked for.

    >>> is_completion(["--tyro-print-completion", "bash"])
    True
    """
    return bool(words) and words[0].replace("_", "-") in (PRINT, WRITE)


def write_completion(words: list[str], commands: Mapping[str, type[Options]]) -> None:
    """Print or write the script that completes ``commands`` in a shell, and end the program.

    Raises InputError for a shell that has none, and where the file is not named.

    >>> write_completion(["--tyro-write-completion", "bash", "fedtalos.bash"], COMMANDS)
    """
    flag, *rest = words[0].replace("_", "-"), *words[1:]
    if not rest or rest[0] not in SHELLS:
        raise InputError(f"{flag}: expected a shell ({', '.join(SHELLS)}), got {rest[0] if rest else 'none'}")
    if flag == WRITE and len(rest) < 2:
        raise InputError(f"{flag} {rest[0]}: expected a file to write the script to; or give {PRINT} {rest[0]}")
    families: Any = {
        name: make_dataclass(name, [("tool", _one_of(tools_of(name)))]) if name in FAMILIES else config
        for name, config in commands.items()
    }
    tyro.cli(
        _one_of(families),
        prog="fedtalos",
        args=[flag, *rest],
        use_underscores=True,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.HelptextFromCommentsOff),
    )


def _one_of(commands: Mapping[str, Any]) -> Any:
    """Type of any of these commands, each under its name."""
    return Union[tuple(Annotated[config, tyro.conf.subcommand(name)] for name, config in commands.items())]  # noqa: UP007
