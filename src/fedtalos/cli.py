"""The command line: flags over preset over file over defaults, to one experiment; bad input is one sentence, exit 2."""

import errno
import io
import os
import re
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any

from rich.console import Console

from fedtalos._version import __version__
from fedtalos.app.command_line import defaults, given, layers, options_in
from fedtalos.app.config.checks import check_together
from fedtalos.app.config.completion import is_completion, write_completion
from fedtalos.app.config.files import FileError, override
from fedtalos.app.config.help import family_page, option_names, overview, page, tools_of
from fedtalos.app.config.options import Options
from fedtalos.app.config.schema import RUN_CONFIGS, RunConfig
from fedtalos.app.config.tools import FAMILIES, TOOL_CONFIGS, ToolConfig
from fedtalos.app.run import interruption
from fedtalos.app.run.display import PlainConsole, say, warnings_shown
from fedtalos.app.run.folders import AlreadyFinished
from fedtalos.app.run.interruption import Interrupted
from fedtalos.devices import out_of_memory
from fedtalos.errors import InputError, TrainingError, nearest, shortened

OUT_OF_MEMORY = (
    "the device's memory ran out (training had halved its batches as far as that goes); take a smaller --model_size or "
    "--image_size, let less move, or lower --eval_batch_size, --clients_at_once or, in editing, --fisher_chunk"
)
ADVICE = {
    errno.ENOSPC: "make room; a run that had begun goes on with --resume",
    errno.EDQUOT: "make room in your quota; a run that had begun goes on with --resume",
    errno.EFBIG: "see what limits the size of files; a run that had begun goes on with --resume",
    errno.EROFS: "choose a place that can be written",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENAMETOOLONG: "choose a shorter name",
}
"""Advice on errors of the system; the usual one: check the path and its rights."""
HELP, HELP_ALL = {"-h", "--help"}, {"--help_all", "--help-all"}
COMMANDS: dict[str, Any] = {**RUN_CONFIGS, **TOOL_CONFIGS}
OTHER_NAMES = {"status": "runs"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exits with 0, 2 for bad input, 1 where training failed, 141 on a closed pipe.

    130 on Ctrl-C and 143 on SIGTERM, when what is done has been saved. Characters that the console cannot show are
    replaced, from the first call on: they are no reason for a run to end.

    >>> main(["federated", "--dataset", "digits", "--model_size", "micro", "--weights", "none"])
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    show_anything()
    errors = Console(stderr=True)
    try:
        with interruption.handled(), warnings_shown(errors):
            config = parse(arguments)
            import_module(f"fedtalos.experiments.{config.command}").run(config, PlainConsole())
    except AlreadyFinished as finished:
        say(Console(), str(finished))
    except FileError as error:
        complain(errors, str(error))
        sys.exit(2)
    except InputError as error:
        complain(errors, dashed(str(error), flags_of(arguments)))
        sys.exit(2)
    except BrokenPipeError:  # `fedtalos ... | head`: nobody is left to read
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        advice = ADVICE.get(error.errno or 0, "check the path and its rights")
        complain(
            errors, f"{shortened(str(error.filename or place_of(error)), 200)}: {error.strerror or error}; {advice}"
        )
        sys.exit(2)
    except TrainingError as error:
        complain(errors, dashed(str(error), flags_of(arguments)))
        sys.exit(1)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        complain(errors, f"{OUT_OF_MEMORY} ({str(error).splitlines()[0]})")
        sys.exit(1)
    except Interrupted as error:
        sys.exit(error.exit_code)
    except KeyboardInterrupt:  # asked twice
        sys.exit(130)


def parse(arguments: list[str]) -> RunConfig | ToolConfig:
    """Read the config that the arguments ask for; help and version are printed, and end the program.

    Raises InputError for a bad command, flag, file, preset or value.

    >>> parse(["federated", "--num_clients", "10"]).split.num_clients
    10
    """
    if is_completion(arguments):
        write_completion(arguments, COMMANDS | {name: COMMANDS[other] for name, other in OTHER_NAMES.items()})
    name, options, rest = command_of(arguments)
    if options is None:
        pages = {"version": f"fedtalos {__version__}", **{family: family_page(family) for family in FAMILIES}}
        say(Console(), pages.get(name, overview()).rstrip())
        sys.exit()
    if asked := (HELP | HELP_ALL).intersection(rest):
        say(Console(), page(name, options, every=bool(asked & HELP_ALL)).rstrip())
        sys.exit()
    flags = options_in(name, options, rest)
    if name in RUN_CONFIGS:
        found = layers(name, flags)
        config = override(defaults(name, found), flags)
        check_together(config, given(flags, found))
        return config
    tool: Any = options(**flags)
    family = name.partition(" ")[0]
    parsed: ToolConfig = COMMANDS[family](tool=tool) if family in FAMILIES else tool
    return parsed


def command_of(arguments: list[str]) -> tuple[str, type[Options] | None, list[str]]:
    """Split arguments into the command's name, its options (None: a page is asked for), and the words left.

    `mask make` is another name of `editing`, `status` of `runs`. Raises InputError where there is no such command.

    >>> command_of(["mask", "show", "masks/mine.safetensors"])
    ('mask show', MaskShowConfig, ['masks/mine.safetensors'])
    """
    first, *rest = arguments or [""]
    if first in HELP | HELP_ALL:
        return "overview", None, rest
    if first == "--version":
        return "version", None, rest
    name = command_named("command", OTHER_NAMES.get(first, first), COMMANDS)
    if name not in FAMILIES:
        return name, COMMANDS[name], rest
    first, *rest = rest or [""]
    if first in HELP | HELP_ALL:
        return name, None, rest
    tools = tools_of(name)
    tool = command_named(f"{name} command", first, tools)
    return "editing" if tools[tool] is RUN_CONFIGS["editing"] else f"{name} {tool}", tools[tool], rest


def command_named(what: str, word: str, known: Iterable[str]) -> str:
    """Give ``word``, if it is known; else InputError."""
    if word not in known:
        found = f"no {what} {word!r}{nearest(word, known)}" if word[:1] not in ("", "-") else f"expected a {what}"
        raise InputError(f"{found}{f' before {word}' if word[:1] == '-' else ''} (there are {', '.join(known)})")
    return word


def flags_of(arguments: list[str]) -> list[str]:
    """The options of the command that the arguments begin with; none where there is no such command."""
    try:
        _, options, _ = command_of(arguments)
    except InputError:
        return []
    return [] if options is None else list(option_names(options))


def dashed(text: str, options: Iterable[str]) -> str:
    """Write options as flags in a message that names arguments: the library's errors know of no command line.

    Names of several words are put with dashes wherever they stand by themselves, names of one word (head, seed) only
    where the message opens with them and their value. Quotes and paths stay as they are.

    >>> dashed("image_size 9: is no multiple of patch_size 2", ["image_size", "patch_size"])
    '--image_size 9: is no multiple of --patch_size 2'
    """
    several = "|".join(option for option in options if "_" in option)
    single = "|".join(option for option in options if "_" not in option)
    if single:
        text = re.sub(rf"""^({single})(?=:| (?:[^\s:'"]\S*|'[^']*'|"[^"]*"):(?:\s|$))""", r"--\1", text)
    if several:
        quoted = r"""(?<!\w)(?:'[^']*'|"[^"]*"|`[^`]*`)(?!\w)"""
        alone = rf"(?<![\w./\\~=-])({several})(?![\w/\\=]|[.-]\w)"
        text = re.sub(f"{quoted}|{alone}", lambda found: f"--{found[0]}" if found[1] else found[0], text)
    return text


def show_anything() -> None:
    """Let the console replace what its encoding cannot show, in what is printed from now on."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def place_of(error: OSError) -> str:
    """Name what failed where an error of the system names no file: the code that asked for it."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    module = "" if at is None else at.tb_frame.f_globals.get("__name__", "")
    return "standard output" if module == "rich.console" else f"a file of {module or 'an unknown module'}"


def complain(console: Console, text: str) -> None:
    """Say what is wrong, on one line."""
    say(console, "fedtalos: " + text.replace("\n", " "))
