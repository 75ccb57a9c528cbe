"""Options from the words of a command line: flags over preset over file over the run to resume over defaults."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from fedtalos.app.config.files import from_file, from_preset, is_record, override
from fedtalos.app.config.options import expanded
from fedtalos.app.config.schema import RUN_CONFIGS, RunConfig, SplitOptions
from fedtalos.app.run.resume import folder_of_record, from_here, run_to_resume, saved_options

Layer = tuple[str, dict[str, Any], Collection[str]]
"""(what errors call it by, its options, those of them that were chosen for this command)"""


def layers(command: str, words: list[str]) -> list[Layer]:
    """Read the options that lie below the flags: those of the run to resume, then --config, then --preset."""
    found: list[Layer] = []
    if (given_path := early(words, "config")) is not None:
        path = Path(expanded("config", given_path))
        values = from_here(from_file(path, command), command, folder_of_record(path))
        # A run's own record was checked when it began. And a file that serves several commands may say what only
        # others use of what editing has, too.
        of_others = {"weights", *SplitOptions.model_fields} if command == "editing" else set()
        chosen = () if is_record(path) else values.keys() - of_others
        found.append((given_path, values, chosen))
    if (preset := early(words, "preset")) is not None:
        values = from_preset(preset, command)
        found.append((f"preset {preset!r}", values, values.keys()))
    asked = flags_in(words)
    if asked & {"resume", "resume_or_start"}:
        said = {key: value for _, values, _ in found for key, value in values.items()}
        root = Path(expanded("output_dir", early(words, "output_dir") or str(said.get("output_dir", "."))))
        name = early(words, "run_name") or said.get("run_name")
        paths = run_to_resume(root, name, command, or_start="resume_or_start" in asked)
        if paths is not None:
            found.insert(0, (str(paths.config), {**saved_options(paths, command), "run_name": paths.name}, ()))
    return found


def defaults(command: str, found: Iterable[Layer]) -> RunConfig:
    """The config before the flags."""
    config = RUN_CONFIGS[command]()
    for source, values, _ in found:
        config = override(config, values, source)
    return config


def given(words: list[str], found: Iterable[Layer]) -> set[str]:
    """The options that were chosen for this command, by a flag, a file or a preset."""
    return flags_in(words).union(*(chosen for *_, chosen in found))


def flags_in(words: Iterable[str]) -> set[str]:
    """The options that are given as flags.

    >>> flags_in(["--num-clients", "10", "--no_freeze_head"])
    {'num_clients', 'freeze_head'}
    """
    return {flag_of(word).removeprefix("no_") for word in words if word.startswith("--")}


def flag_of(word: str) -> str:
    """The option of a word such as --num-clients=10."""
    return word.partition("=")[0].removeprefix("--").replace("-", "_")


def early(words: list[str], option: str) -> str | None:
    """The last value of an option that is needed before the others are read; None where it has none.

    >>> early(["--config", "mine.yaml", "--seed", "1"], "config")
    'mine.yaml'
    """
    found = None
    for number, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag.replace("-", "_") == f"__{option}":
            following = words[number + 1 : number + 2]
            found = value if equals else next((word for word in following if not word.startswith("--")), None)
    return found
