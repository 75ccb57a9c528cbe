"""Options in YAML: config files and presets to a checked config, and back."""

import math
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel

from fedtalos.app.config.options import Options
from fedtalos.app.config.schema import RUN_CONFIGS, Config
from fedtalos.errors import InputError, nearest, shown
from fedtalos.facts import read_file

NOT_IN_FILES = {"config", "preset", "resume", "resume_or_start"}
OF_THE_RECORD = {"run_name", "output_dir", "cache_dir"}
"""Options that a run's record says and nobody takes from it: the run's name, and the folders that are written to."""
ConfigT = TypeVar("ConfigT", bound=Config)
PRESETS = Path("configs/experiment_configs.yaml")
"""Looked for in the working folder; the published ones are in the package, or in the checkout that this code is in."""
LARGEST = 100_000
"""Limit of a YAML file: bytes, and values when every alias is written out."""


class FileError(InputError):
    """A bad option of a file or preset: the message names a key there, not a flag."""


def groups(config_type: type[BaseModel]) -> dict[str, str | None]:
    """Map each option of a command to the group that holds it; None stands for the command's own options.

    >>> groups(CentralizedConfig)["batch_size"]
    'train'
    """
    found: dict[str, str | None] = {}
    for name, field in config_type.model_fields.items():
        if isinstance(field.default, Options):
            found |= dict.fromkeys(type(field.default).model_fields, name)
        else:
            found[name] = None
    return found


def flatten(config: BaseModel) -> dict[str, Any]:
    """All options of a config by name, as plain YAML values.

    >>> flatten(FederatedConfig())["num_clients"]
    100
    """
    flat: dict[str, Any] = {}
    for name, value in config.model_dump(mode="json").items():
        flat |= value if isinstance(getattr(config, name), Options) else {name: value}
    return flat


def override(config: ConfigT, values: Mapping[str, Any], source: str | None = None) -> ConfigT:
    """Copy ``config`` with ``values``, by option name, in place of its own.

    Raises FileError, which names the ``source`` and the option, for unknown options and values outside their limits;
    InputError, which names the option alone, where there is no source, for then they are flags.

    >>> override(FederatedConfig(), {"num_rounds": 20}, "mine.yaml").federation.num_rounds
    20
    """
    where = groups(type(config))
    nested: dict[str, Any] = {name: getattr(config, name) for name in type(config).model_fields}
    nested = {name: value.model_dump() if isinstance(value, Options) else value for name, value in nested.items()}
    for key, value in values.items():
        if key not in where:
            raise FileError(f"{source}: unknown option {shown(key)}{nearest(key, where)}")
        group = where[key]
        (nested if group is None else nested[group])[key] = value
    try:
        return type(config)(**nested)
    except InputError as error:
        if source is None:
            raise
        raise FileError(f"{source}: {error}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; InputError where it is missing, is something else, or says something twice."""
    text = read_file(path, str(path), most=LARGEST, advice="give an existing YAML file")
    try:
        content = _parsed(text)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise InputError(f"{path}{line}: not valid YAML ({error.problem}); mend it") from error
    except Exception as error:  # constructors of odd scalars raise nearly anything
        raise InputError(f"{path}: not valid YAML ({shown(error)}); mend it") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected 'option: value' lines, got {type(content).__name__}")
    for key in content:
        if not isinstance(key, str):
            raise InputError(f"{path}: expected options by name, got the key {shown(key)}")
    return content


def _parsed(content: bytes) -> object:
    """Parse a YAML file. ValueError where it stands for a lot: aliases of aliases double."""
    loader = yaml.SafeLoader(content.decode())
    node = loader.get_single_node()
    if _values(node, {}) > LARGEST:
        raise ValueError(f"stands for more than {LARGEST} values")
    parsed: object = None if node is None else loader.construct_document(node)
    return parsed


def _values(node: yaml.Node | None, counted: dict[int, float]) -> float:
    """Count the values that a node stands for, inf where it holds itself; an error where a key comes twice."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in counted:
        counted[id(node)] = math.inf
        pairs = node.value if isinstance(node, yaml.MappingNode) else [node.value]
        if isinstance(node, yaml.MappingNode):
            _check_once([key for key, _ in node.value])
        counted[id(node)] = 1 + sum(_values(child, counted) for pair in pairs for child in pair)
    return counted[id(node)]


def _check_once(keys: Iterable[yaml.Node]) -> None:
    seen = set()
    for key in keys:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{shown(key.value)} is said twice", problem_mark=key.start_mark)
            seen.add(key.value)


def from_file(path: Path, command: str) -> dict[str, Any]:
    """Read the options that a config file gives to a command.

    A file may serve several commands, so options of the other commands are passed over; options of none are refused.
    A run's own config.yaml can be given: its `made_by` section and the run's name are passed over, and so are the
    folders that it wrote to, for somebody else may have written the file.
    """
    values = read_yaml(path)
    mine = groups(RUN_CONFIGS[command])
    every = {key for config_type in RUN_CONFIGS.values() for key in groups(config_type)}
    for key in values:
        if key not in every | {"command", "made_by"}:
            raise FileError(f"{path}: unknown option {shown(key)}{nearest(key, every)}")
    passed_over = NOT_IN_FILES | (OF_THE_RECORD if "made_by" in values else set())
    return {key: value for key, value in values.items() if key in mine and key not in passed_over}


def is_record(path: Path) -> bool:
    """Tell whether a config file is one that a run left: it says by what it was made."""
    return "made_by" in read_yaml(path)


def published(path: Path) -> Path:
    """Find a file of configs/ as it was published: in the package, or in the checkout that this code is in.

    >>> published(Path("configs/default_config.yaml"))
    PosixPath('/home/me/fedtalos/configs/default_config.yaml')
    """
    packaged = Path(str(resources.files("fedtalos").joinpath(*path.parts)))
    return packaged if packaged.is_file() else Path(__file__).parents[4] / path


def presets_files() -> list[Path]:
    """List the files of presets and grids: the working folder's, if it has one, then the published one.

    An installed package carries the published one; where the code runs from a checkout, it is in configs/ there.

    >>> presets_files()
    [PosixPath('configs/experiment_configs.yaml'), PosixPath('/home/me/fedtalos/configs/experiment_configs.yaml')]
    """
    found = [path for path in (PRESETS, published(PRESETS)) if path.is_file()]
    if not found:
        raise InputError(f"{PRESETS}: no such file here, and none came with fedtalos; install it anew, or write one")
    return found[:1] if len(found) > 1 and found[0].samefile(found[1]) else found


def named_entry(what: str, name: str) -> tuple[dict[str, Any], str]:
    """Read one entry of the files of presets and grids; also returns the name that errors call it by.

    ``what`` says which of the two is looked for, "preset" or "grid". The first file that has the name counts.
    """
    there: list[str] = []
    paths = presets_files()
    for path in paths:
        entries = read_yaml(path)
        if name not in entries:
            alike = (
                key
                for key, value in entries.items()
                if (what == "grid") == (isinstance(value, dict) and "grid" in value)
            )
            there += [entry for entry in alike if entry not in there]
            continue
        if not isinstance(entries[name], dict):
            raise InputError(f"{what} {name!r} in {path}: expected 'option: value' lines, got {shown(entries[name])}")
        return dict(entries[name]), f"{what} {name!r} in {path}"
    places = " and ".join(map(str, paths))
    listed = nearest(name, there) or "; it has " + ", ".join([*there[:6], *(["..."] if len(there) > 6 else [])])
    raise InputError(f"{what}: no {shown(name)} in {places}{listed}")


def from_preset(name: str, command: str) -> dict[str, Any]:
    """Read the options of a named preset, which must be one for ``command``."""
    values, source = named_entry("preset", name)
    if "grid" in values:
        raise InputError(f"preset {name!r} is a grid of many runs: `fedtalos sweep {name}` runs them")
    made_for = values.pop("command", None)
    if not isinstance(made_for, str) or made_for not in RUN_CONFIGS:
        raise InputError(f"{source}: expected command: {' | '.join(RUN_CONFIGS)}, got {shown(made_for)}")
    if made_for != command:
        raise InputError(f"preset {name!r} is for `{made_for}`, not for `{command}`")
    mine = groups(RUN_CONFIGS[command]).keys() - NOT_IN_FILES
    for key in values:
        if key not in mine:
            raise FileError(f"{source}: unknown option {shown(key)}{nearest(str(key), mine)}")
    return values
