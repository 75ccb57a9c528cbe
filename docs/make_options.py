"""Writes docs/options.md from the schema: python docs/make_options.py (with - to standard output)."""

import sys
from pathlib import Path

from pydantic.fields import FieldInfo

from fedtalos.app.config.help import (
    argument,
    choices,
    default,
    is_everyday,
    is_positional,
    sections,
    takes_several,
    types,
)
from fedtalos.app.config.options import Options
from fedtalos.app.config.schema import RUN_CONFIGS
from fedtalos.app.config.tools import FAMILIES, TOOL_CONFIGS

INTRODUCTION = """# Every option

Made from the schema (`src/fedtalos/app/config/`) by `docs/make_options.py`.
`fedtalos COMMAND --help` shows the options in **bold**, `fedtalos COMMAND --help_all` all of them.

- Flags are written with underscores (`--num_clients 100`); dashes work too.
- A switch such as `--resume` is undone by `--no_resume`.
- A name in CAPITALS is given without a flag.
- `None` takes back an option that a preset or file set, where its default is worked out or none.
- An option comes from its flag, else from `--preset NAME` (an entry of `configs/experiment_configs.yaml`, in the
  working folder or as published), else from `--config FILE`, else from its default.
- In every path, wherever it is written, `~` and `~user` are home folders. Environment variables are left to the shell.
- An option that has no effect beside the others, such as `--alpha` for clients that are alike, is refused where it was
  given for this very run.
- `configs/default_config.yaml` holds every option with the reason for its default.
- `results/RUN/config.yaml` holds what a run really used. Give it to `--config` to run the same again.
"""


def values(field: FieldInfo) -> str:
    """What a flag takes: its choices, or its type with its limits."""
    kinds = [kind.__name__.lower().replace("str", "text") for kind in types(field.annotation)]
    several = ["one or more"] if takes_several(field) and not is_positional(field) else []
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = [f"{signs[k]} {getattr(m, k)}" for m in field.metadata for k in signs if hasattr(m, k)]
    return ", ".join([*choices(field.annotation), *kinds, *limits, *several])


def row(name: str, field: FieldInfo) -> str:
    """One option as a row of its table."""
    flag = f"`{argument(name, field) if is_positional(field) else f'--{name}'}`".replace("|", r"\|")
    flag = f"**{flag}**" if is_everyday(field) else flag
    ordinary = "needed" if field.is_required() else "off" if field.default is False else default(field)
    return f"| {flag} | {values(field)} | {ordinary} | {field.description} |"


def table(fields: dict[str, FieldInfo]) -> str:
    """One row per option."""
    return "\n".join(["| option | takes | default | |", "|---|---|---|---|", *(row(*item) for item in fields.items())])


def command(name: str, config: type[Options], shown: set[str]) -> list[str]:
    """A command's section; groups that another command's section has are only named."""
    parts = [f"## {name}\n\n{config.__doc__}\n"]
    found = sections(config)
    if elsewhere := [title for title in found if title in shown]:
        parts.append("Above: " + "; ".join(f"*{title}*" for title in elsewhere) + ".\n")
    own = {option: f for title in ("Arguments", "Options") for option, f in found.pop(title, {}).items()}
    if own:
        parts.append(table(own) + "\n")
    parts += [f"### {title}\n\n{table(fields)}\n" for title, fields in found.items() if title not in shown]
    shown |= set(found)
    return parts


def page() -> str:
    """The whole page."""
    parts, shown = [INTRODUCTION], set[str]()
    for name, config in {**RUN_CONFIGS, **TOOL_CONFIGS}.items():
        if name in FAMILIES:
            if name == "mask":
                parts.append("## mask make\n\nAnother name of [editing](#editing).\n")
            for tool, options in FAMILIES[name].items():
                parts += command(f"{name} {tool}", options, shown)
        else:
            parts += command(name, config, shown)
    return "\n".join(parts)


if __name__ == "__main__":
    if sys.argv[1:] == ["-"]:
        sys.stdout.write(page())
    else:
        Path(__file__).with_name("options.md").write_text(page(), encoding="utf-8")
