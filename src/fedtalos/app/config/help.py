"""The help: pages of at most 80 columns, made from the schema."""

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import tyro
from pydantic.fields import FieldInfo

from fedtalos.app.config.options import Everyday, Options
from fedtalos.app.config.schema import RUN_CONFIGS, Config
from fedtalos.app.config.tools import FAMILIES, TOOL_CONFIGS

WIDTH, INDENT, COLUMN = 80, 2, 28
WORDS = {int: "N", float: "X", str: "NAME", Path: "PATH"}

GROUPS = {
    "Train": ("centralized", "federated", "continual"),
    "Edit": ("editing", "mask", "vector", "forget"),
    "See what came out": ("report", "plot", "evaluate", "runs", "compare"),
    "Use and share a model": ("predict", "explain", "export", "push"),
    "Many runs, many machines": ("sweep", "fleet"),
    "First steps": ("demo", "init", "info"),
}
"""All commands, in the order of the first page."""

OVERVIEW = """usage: fedtalos COMMAND [OPTIONS]

Sparse, task-localised federated fine-tuning of Vision Transformers.

{groups}

To begin
  fedtalos demo
  fedtalos centralized --model_size small --num_epochs 100
  fedtalos federated --num_clients 100 --num_rounds 100
  fedtalos editing --target_sparsity 0.9 --num_iterations 10

fedtalos COMMAND --help shows what a command takes; --version the version.
"""


def overview() -> str:
    """Write the page of all commands."""
    every: dict[str, type[Options]] = {**RUN_CONFIGS, **TOOL_CONFIGS}
    groups = [_commands(title, {name: every[name] for name in names}) for title, names in GROUPS.items()]
    return OVERVIEW.format(groups="\n\n".join(groups))


def tools_of(family: str) -> dict[str, type[Options]]:
    """The commands that a command has of its own; `mask make` is another name of editing.

    >>> list(tools_of("mask"))
    ['make', 'show', 'compare', 'combine']
    """
    makes: dict[str, type[Options]] = {"make": RUN_CONFIGS["editing"]} if family == "mask" else {}
    return makes | FAMILIES[family]


def family_page(family: str) -> str:
    """Write the page of a command that has commands of its own."""
    body = _commands("Commands", tools_of(family))
    usage = f"usage: fedtalos {family} COMMAND [OPTIONS]"
    return f"{usage}\n\n{body}\n\nfedtalos {family} COMMAND --help shows what each takes.\n"


def page(name: str, config_type: type[Options], *, every: bool) -> str:
    """Write the page of one command: its everyday options, or every one.

    >>> print(page("federated", FederatedConfig, every=False))
    """
    found = sections(config_type)
    hidden = 0
    if not every and any(is_everyday(field) for fields in found.values() for field in fields.values()):
        chosen = {title: {n: f for n, f in fields.items() if is_everyday(f)} for title, fields in found.items()}
        hidden = sum(map(len, found.values())) - sum(map(len, chosen.values()))
        found = chosen
    fields_found = [item for fields in found.values() for item in fields.items()]
    given = [argument(n, f) for n, f in fields_found if is_positional(f) or f.is_required()]
    lines = [" ".join(["usage: fedtalos", name, *given, "[OPTIONS]"]), ""]
    lines += textwrap.wrap(config_type.__doc__ or "", WIDTH)
    for title, fields in found.items():
        if fields:
            lines += ["", title]
        for option, field in fields.items():
            lines += _entry(argument(option, field), field.description or "", hint(field))
    if hidden:
        lines += ["", f"fedtalos {name} --help_all shows {hidden} more options."]
    return "\n".join(lines) + "\n"


def sections(config_type: type[Options]) -> dict[str, dict[str, FieldInfo]]:
    """Sort the options of a command under headings, those of its own before those that commands share.

    >>> list(sections(CentralizedConfig))[0]
    'Options'
    """
    own = {name: field for name, field in config_type.model_fields.items() if not isinstance(field.default, Options)}
    found = {
        "Arguments": {name: field for name, field in own.items() if is_positional(field)},
        "Options": {name: field for name, field in own.items() if not is_positional(field)},
    }
    groups = [type(field.default) for field in config_type.model_fields.values() if isinstance(field.default, Options)]
    shared = [type(field.default) for field in Config.model_fields.values()]
    for group in [group for group in groups if group not in shared] + [g for g in reversed(shared) if g in groups]:
        idle = config_type.idle if issubclass(config_type, Config) else ()
        found[heading(group)] = {name: field for name, field in group.model_fields.items() if name not in idle}
    return {title: fields for title, fields in found.items() if fields}


def option_names(config_type: type[Options]) -> dict[str, FieldInfo]:
    """Collect everything that a command takes as --flags."""
    return {name: field for name, field in every_option(config_type).items() if not is_positional(field)}


def every_option(config_type: type[Options]) -> dict[str, FieldInfo]:
    """Collect everything that a command takes, those without a flag first.

    >>> list(every_option(EvaluateConfig))[0]
    'checkpoint'
    """
    return {name: field for fields in sections(config_type).values() for name, field in fields.items()}


def heading(group: type[Options]) -> str:
    """Heading of a group in the help: the first line of its docstring."""
    return (group.__doc__ or "").partition("\n")[0].rstrip(".")


def is_everyday(field: FieldInfo) -> bool:
    """Tell whether the short help shows an option."""
    return any(isinstance(mark, Everyday) for mark in field.metadata)


def everyday() -> set[str]:
    """Names of the options that the short help of a training command shows.

    >>> "num_rounds" in everyday(), "step_gamma" in everyday()
    (True, False)
    """
    every = (item for config in RUN_CONFIGS.values() for item in every_option(config).items())
    return {name for name, field in every if is_everyday(field)}


def is_positional(field: FieldInfo) -> bool:
    """Tell whether an option is given without a flag."""
    return tyro.conf.Positional in field.metadata


def takes_several(field: FieldInfo) -> bool:
    """Tell whether an option takes any number of values."""
    return any(get_origin(kind) is tuple for kind in (field.annotation, *get_args(field.annotation)))


def choices(annotation: Any) -> list[str]:
    """List the words that an option may take; empty where it takes anything of a type.

    >>> choices(Literal["auto", "fp32"] | None)
    ['auto', 'fp32']
    """
    if get_origin(annotation) is Literal:
        return [str(word) for word in get_args(annotation)]
    return [word for part in get_args(annotation) for word in choices(part)]


def types(annotation: Any) -> list[type]:
    """List the types that an option may have, beside its choices and None."""
    if isinstance(annotation, type):
        return [] if annotation is type(None) else [annotation]
    return [found for part in get_args(annotation) if get_origin(annotation) is not Literal for found in types(part)]


def default(field: FieldInfo) -> str:
    """Say what an option is when it is not given; empty where that needs no words."""
    for mark in field.metadata:
        text = getattr(mark, "help_behavior_hint", None)
        if isinstance(text, str):
            return text.removeprefix("(default: ").removesuffix(")") if text.startswith("(default: ") else ""
    if field.is_required() or field.default is False or field.default == ():
        return ""
    return "on" if field.default is True else str(field.default)


def hint(field: FieldInfo) -> str:
    """Put the default in brackets, after the choices where the description does not name them all.

    >>> hint(CentralizedConfig.model_fields["num_epochs"])
    '[default: 100]'
    """
    words, ordinary = choices(field.annotation), default(field)
    named = all(re.search(rf"\b{word}\b", field.description or "") for word in words)
    inside = [] if named else [", ".join(words)]
    if field.is_required():
        inside.append("needed")
    elif ordinary and (words or ordinary != "none"):
        inside.append(f"default: {ordinary}")
    return f"[{'; '.join(inside)}]" if inside else ""


def argument(name: str, field: FieldInfo) -> str:
    """Write an option as it is given, with a word for its value.

    >>> argument("seed", RunOptions.model_fields["seed"])
    '--seed N'
    """
    marks = [mark.metavar for mark in field.metadata if getattr(mark, "metavar", None)]
    metavar = marks[0] if marks and not marks[0].startswith("{") else None
    several = takes_several(field)
    kinds = types(field.annotation)
    word = metavar or (WORDS.get(kinds[0], "") if kinds else "NAME")
    if is_positional(field):
        return metavar or (f"[{name.upper().removesuffix('S')} ...]" if several else name.upper())
    if several and metavar is None:
        word = f"{word} [{word} ...]"
    switch = "[no_]" if field.default is True else ""
    return f"--{switch}{name} {word}".rstrip()


def _entry(left: str, text: str, brackets: str = "", column: int = COLUMN) -> list[str]:
    """Write an option or command: its name, then text in a column; brackets that do not fit go on the next line."""
    lines = textwrap.wrap(text, WIDTH - column, break_long_words=False, break_on_hyphens=False)
    if brackets and len(lines[-1]) + 1 + len(brackets) <= WIDTH - column:
        lines[-1] += f" {brackets}"
    elif brackets:
        kept = brackets.replace("default: ", "default:\xa0")  # a space that does not break
        lines += [line.replace("\xa0", " ") for line in textwrap.wrap(kept, WIDTH - column)]
    first = " " * INDENT + left
    if len(first) + 2 > column:
        return [first, *(" " * column + line for line in lines)]
    return [first.ljust(column) + lines[0], *(" " * column + line for line in lines[1:])]


def _commands(title: str, commands: Mapping[str, type]) -> str:
    lines = [title]
    for name, config_type in commands.items():
        lines += _entry(name, (config_type.__doc__ or "").partition("\n")[0], column=16)
    return "\n".join(lines)
