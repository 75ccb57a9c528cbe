"""The base of every group of options: limits, one-sentence errors, and marks for the help."""

import re
from pathlib import Path
from typing import Any, Literal, Self, get_args

import tyro
from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic.fields import FieldInfo

from fedtalos.errors import InputError, nearest, shown

Device = Literal["auto", "mps", "cuda", "cpu"]
DEVICE = "where to compute; auto takes the first of mps, cuda and cpu that is there"
Which = Literal["best", "last"]
WHICH = "checkpoint of the run; best on validation, or last"
"""Options that many commands have, and what the help says of them."""


class Everyday:
    """Mark of the options that people need: `--help` shows these, `--help_all` every one."""


EVERYDAY = Everyday()


def unset(metavar: str, default: str) -> object:
    """Say in the help what an option comes to that is None until it is worked out.

    >>> threads: Annotated[int | None, unset("N", "all cores")] = None
    """
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


class Options(BaseModel):
    """A group of options; its docstring is its heading in the help.

    A path's `~` and `~user` are the home folders that a shell takes them for, wherever the path was written;
    environment variables are left as they are. Raises InputError, in one sentence, for unknown options and for values
    outside their limits.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _one_sentence(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        for name, value in values.items() if isinstance(values, dict) else ():
            expected = cls.model_fields[name].annotation if name in cls.model_fields else bool
            if isinstance(value, bool) and expected is not bool and str(value).lower() not in get_args(expected):
                raise InputError(f"{name}: expected no yes or no, got {str(value).lower()}")  # True would count as 1
        if isinstance(values, dict):
            values = {
                name: expanded(name, value) if takes_path(cls.model_fields.get(name)) else value
                for name, value in values.items()
            }
        try:
            options = handler(values)
        except ValidationError as error:
            raise InputError(sentence(error)) from error
        for name, value in options:
            if isinstance(value, int) and abs(value) >= 2**63:
                raise InputError(f"{name}: expected a number below 2**63, got {shown(value)}")
            if isinstance(value, float) and abs(value) > 1e15:  # float32 has no room for products of larger ones
                raise InputError(f"{name}: expected a number up to 1e15, got {shown(value)}")
            if isinstance(value, str | Path) and "\0" in str(value):
                raise InputError(f"{name}: expected text without NUL characters, got {shown(str(value))}")
        return options


def by_command(commands: Any) -> dict[str, Any]:
    """Give the options of a union of commands, by the command's name.

    >>> by_command(PredictConfig | ExplainConfig)["explain"]
    ExplainConfig
    """
    return {options.command: options for options in get_args(commands)}


def takes_path(field: FieldInfo | None) -> bool:
    """Tell whether an option's value is, or may be, a path: one of type Path, or text shown as FILE in the help.

    >>> takes_path(RunOptions.model_fields["output_dir"])
    True
    """
    if field is None:
        return False
    marked = any("FILE" in (getattr(mark, "metavar", None) or "") for mark in field.metadata)
    return marked or _holds_path(field.annotation)


def _holds_path(annotation: Any) -> bool:
    return annotation is Path or any(_holds_path(part) for part in get_args(annotation))


def expanded(option: str, value: Any) -> Any:
    """Put home folders in place of `~` and `~user` in a path, or in each of several; anything else stays.

    Raises InputError where there is no such user.

    >>> expanded("data_dir", "~/pictures")
    '/home/me/pictures'
    """
    if isinstance(value, list | tuple):
        return type(value)(expanded(option, part) for part in value)
    if not isinstance(value, str | Path) or not str(value).startswith("~"):
        return value
    try:
        return type(value)(Path(value).expanduser())
    except RuntimeError:
        user = shown(Path(value).parts[0])
        raise InputError(f"{option}: {user} is the home of no user here; write the path in full") from None


def sentence(error: ValidationError) -> str:
    """Put the first thing that is wrong into one sentence with the option's name."""
    option = error.errors()[0]["loc"][0]
    # Of a choice between types, such as "auto" or a number, the last says more; the words of the others go before it.
    wrong = [each for each in error.errors() if each["loc"][:1] == (option,)]
    first, came = wrong[-1], wrong[-1]["input"]
    says = f"{first['msg'][0].lower()}{first['msg'][1:]}"
    words = [word for each in wrong for word in re.findall("'([^']+)'", each.get("ctx", {}).get("expected", ""))]
    hint = nearest(came, words) if isinstance(came, str) else ""
    if others := ", ".join(repr(word) for word in words if repr(word) not in says):
        join = "," if first["type"] == "literal_error" else " or"
        says = says.replace("should be ", f"should be {others}{join} ", 1)
    return f"{option}: {says}, got {shown(came)}{hint}"
