"""Writes docs/options.md from the schema: python docs/make_options.py (with - to standard output)."""

import sys
from pathlib import Path
from typing import Any, get_args, get_origin

import tyro
from pydantic.fields import FieldInfo

from fedtalos.app.config.schema import RUN_CONFIGS, Options
from fedtalos.app.config.tools import MASK_TOOLS, OTHERS, MaskConfig

INTRODUCTION = """# Every option

Made from the schema (`src/fedtalos/config.py`) by `docs/make_options.py`; `fedtalos COMMAND --help` has the same texts.

Flags are written with underscores (`--num_clients 100`); dashes work too. What is in CAPITALS is given without a flag.
An option comes from its flag, else from `--preset NAME` (an entry of `configs/experiment_configs.yaml`), else from
`--config FILE`, else from its default. `configs/default_config.yaml` holds every option with the reason for its
default. `results/RUN/config.yaml` holds what a run really used, and can be given to `--config` to run it again.
"""


def values(field: FieldInfo) -> str:
    """What a flag takes: its choices, or its type with its limits."""
    choices: list[str] = []

    def collect(annotation: Any) -> None:
        if get_origin(annotation) is not None and all(isinstance(a, str) for a in get_args(annotation)):
            choices.extend(get_args(annotation))
        for part in get_args(annotation):
            if isinstance(part, type) and part is not type(None):
                choices.append(part.__name__.lower().replace("str", "text"))
            elif not isinstance(part, str):
                collect(part)

    if isinstance(field.annotation, type):
        choices = [field.annotation.__name__.lower().replace("str", "text")]
    else:
        collect(field.annotation)
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = [f"{signs[k]} {getattr(m, k)}" for m in field.metadata for k in signs if hasattr(m, k)]
    return ", ".join([*choices, *limits])


def default(field: FieldInfo) -> str:
    """The default as the help shows it."""
    for mark in field.metadata:
        hint = getattr(mark, "help_behavior_hint", None)
        if isinstance(hint, str):
            return hint.removeprefix("(default: ").removesuffix(")") if hint.startswith("(default: ") else hint
    return "(needed)" if field.is_required() else f"`{field.default}`"


def table(options: type[Options]) -> str:
    """One row per option of a group."""
    rows = ["| option | takes | default | |", "|---|---|---|---|"]
    for name, field in options.model_fields.items():
        if not isinstance(field.default, Options):
            flag = name.upper() if tyro.conf.Positional in field.metadata else f"--{name}"
            rows.append(f"| `{flag}` | {values(field)} | {default(field)} | {field.description} |")
    return "\n".join(rows)


def page() -> str:
    """The whole page."""
    parts, shown = [INTRODUCTION], set()
    for config in RUN_CONFIGS.values():
        groups = [type(field.default) for field in config.model_fields.values() if isinstance(field.default, Options)]
        names = ", ".join(group.__name__.removesuffix("Options").lower() for group in groups)
        parts.append(f"## {config.command}\n\n{config.__doc__}\nTakes the options of: {names}.\n")
        if any(not isinstance(field.default, Options) for field in config.model_fields.values()):
            parts.append(table(config) + "\n")
        for group in groups:
            if group not in shown:
                title = group.__name__.removesuffix("Options").lower()
                parts.append(f"### {title}\n\n{group.__doc__}\n\n{table(group)}\n")
        shown |= set(groups)
    for config in OTHERS:
        if config is MaskConfig:
            parts += [f"## mask {tool.command}\n\n{tool.__doc__}\n\n{table(tool)}\n" for tool in MASK_TOOLS]
        else:
            parts.append(f"## {config.command}\n\n{config.__doc__}\n\n{table(config)}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    if sys.argv[1:] == ["-"]:
        sys.stdout.write(page())
    else:
        Path(__file__).with_name("options.md").write_text(page(), encoding="utf-8")
