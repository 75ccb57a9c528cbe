"""Options from the words of a command line: flags over preset over file over the run to resume over defaults.

Words are sorted by the schema of the command, and stay text. Pydantic reads them, as it reads those of a file: what is
wrong with a value is said in the same sentence wherever it was written.
"""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

from fedtalos.app.config.files import from_file, from_preset, is_record, override
from fedtalos.app.config.help import (
    argument,
    choices,
    every_option,
    is_positional,
    option_names,
    takes_several,
    types,
)
from fedtalos.app.config.options import Options, expanded
from fedtalos.app.config.schema import RUN_CONFIGS, RunConfig, SplitOptions
from fedtalos.app.run.resume import folder_of_record, from_here, run_to_resume, saved_options
from fedtalos.errors import InputError, shown

Layer = tuple[str, dict[str, Any], Collection[str]]
"""(what errors call it by, its options, those of them that were chosen for this command)"""

_FLAG = re.compile(r"--.*|-(?![\d.]|inf|nan)[^-].*", re.DOTALL | re.IGNORECASE)
"""Words that are meant as options: those with dashes that are no negative numbers."""


def options_in(name: str, options: type[Options], words: Iterable[str]) -> dict[str, Any]:
    """Sort the words after the command ``name`` into its options: text, lists of texts, True and False, or None.

    Raises InputError for unknown flags, missing values and stray words.

    >>> options_in("federated", FederatedConfig, ["--num-clients=10", "--no_freeze_head"])
    {'num_clients': '10', 'freeze_head': False}
    """
    every = every_option(options)
    found: dict[str, Any] = {}
    loose: list[tuple[str, str]] = []  # (word, flag before it)
    for flag, values in _by_flag(words):
        option = _known(name, options, flag) if flag else ""
        field = every.get(option)
        if field is None or field.annotation is bool:
            if field is not None:
                found[option] = option == flag_of(flag)
            taken = 0
        elif not values:
            wanted = ", ".join(choices(field.annotation)) or argument(option, field).partition(" ")[2]
            raise InputError(f"{flag}: expected a value after it ({wanted}), got nothing")
        else:
            taken = len(values) if takes_several(field) else 1
            found[option] = _value(field, values[:taken])
        loose += [(value, flag) for value in values[taken:]]
    for option, field in every.items():
        if is_positional(field) and loose:
            taken = len(loose) if takes_several(field) else 1
            found[option] = _value(field, [word for word, _ in loose[:taken]])
            loose = loose[taken:]
        if option not in found and field.is_required():
            what = f" ({field.description})" if field.description else ""
            raise InputError(
                f"{name}: expected {argument(option, field)}{what}, got nothing; see fedtalos {name} --help"
            )
    if loose:
        raise _nobodys(name, *loose[0], every)
    return found


def _by_flag(words: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Each flag with the words that follow it; the first has none."""
    found: list[tuple[str, list[str]]] = [("", [])]
    for word in words:
        if _FLAG.fullmatch(word):
            flag, equals, value = word.partition("=")
            found.append((flag, [value] if equals else []))
        else:
            found[-1][1].append(word)
    return found


def _known(name: str, options: type[Options], flag: str) -> str:
    """The option that a flag means; InputError, which names the nearest, for one that the command has not."""
    fields, option = option_names(options), flag_of(flag)
    if flag.startswith("--") and option in fields:
        return option
    opposite = option.removeprefix("no_")
    if flag.startswith("--") and opposite in fields and fields[opposite].annotation is bool:
        return opposite
    near = nearest_option(option, fields)
    others = [other for other, config in RUN_CONFIGS.items() if option in option_names(config)]
    what = f"did you mean --{near}?" if near else f"fedtalos {name} --help_all lists what there is"
    if others and near != option:
        what = f"it is an option of {' and '.join(others)}"
    raise InputError(f"{name}: no option {shown(flag)[1:-1]}; {what}")


def _value(field: FieldInfo, words: list[str]) -> Any:
    """The words of one option, as pydantic is to read them: paths need not be text, and None unsets."""
    read = Path if Path in types(field.annotation) else str
    if takes_several(field):
        return [read(word) for word in words]
    return None if words[0] == "None" and type(None) in get_args(field.annotation) else read(words[0])


def _nobodys(name: str, word: str, flag: str, every: Mapping[str, FieldInfo]) -> InputError:
    """The error for a word that no option takes; a flag that is on or off may stand before it."""
    option = flag_of(flag).removeprefix("no_")
    if option in every and every[option].annotation is bool:
        return InputError(f"{flag}: expected no value, got {shown(word)}; --{option} is yes, --no_{option} is no")
    near = nearest_option(word, every)
    what = f"did you mean --{near}?" if near else f"`fedtalos {name} --help` shows what it takes"
    return InputError(f"{name}: nothing takes the word {shown(word)}; {what}")


def nearest_option(name: str, known: Iterable[str]) -> str | None:
    """Find the known option that is meant: by its initials, else by its letters.

    >>> nearest_option("lr", ["num_rounds", "learning_rate"])
    'learning_rate'
    """
    by_initials = [option for option in known if "".join(word[0] for word in option.split("_")) == name]
    return next(iter(by_initials or difflib.get_close_matches(name[:100], known, n=1)), None)


def layers(command: str, flags: Mapping[str, Any]) -> list[Layer]:
    """Read the options that lie below the flags: those of the run to resume, then --config, then --preset."""
    found: list[Layer] = []
    if (given_path := flags.get("config")) is not None:
        path = expanded("config", given_path)
        values = from_here(from_file(path, command), command, folder_of_record(path))
        # A run's own record was checked when it began. And a file that serves several commands may say what only
        # others use of what editing has, too.
        of_others = {"weights", *SplitOptions.model_fields} if command == "editing" else set()
        chosen = () if is_record(path) else values.keys() - of_others
        found.append((str(given_path), values, chosen))
    if (preset := flags.get("preset")) is not None:
        values = from_preset(preset, command)
        found.append((f"preset {shown(preset)}", values, values.keys()))
    if flags.get("resume") or flags.get("resume_or_start"):
        said = {key: value for _, values, _ in found for key, value in values.items()}
        root = Path(expanded("output_dir", flags.get("output_dir", str(said.get("output_dir", ".")))))
        name = flags.get("run_name", said.get("run_name"))
        paths = run_to_resume(root, name, command, or_start=bool(flags.get("resume_or_start")))
        if paths is not None:
            found.insert(0, (str(paths.config), {**saved_options(paths, command), "run_name": paths.name}, ()))
    return found


def defaults(command: str, found: Iterable[Layer]) -> RunConfig:
    """The config before the flags."""
    config = RUN_CONFIGS[command]()
    for source, values, _ in found:
        config = override(config, values, source)
    return config


def given(flags: Mapping[str, Any], found: Iterable[Layer]) -> set[str]:
    """The options that were chosen for this command, by a flag, a file or a preset."""
    return set(flags).union(*(chosen for *_, chosen in found))


def flag_of(word: str) -> str:
    """The option of a word such as --num-clients.

    >>> flag_of("--num-clients")
    'num_clients'
    """
    return word.lstrip("-").replace("-", "_")
