"""Grids: named entries of configs/experiment_configs.yaml that stand for many runs.

A grid is a list of blocks. A block is a command, its options, and axes; every combination of one value per axis and a
seed is a run. An option `run:NAME` stands for the file that an earlier run of the grid made: a mask, a head, weights.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator

from fedtalos.app.config.checks import check_together
from fedtalos.app.config.files import NOT_IN_FILES, FileError, flatten, groups, named_entry, override
from fedtalos.app.config.options import Options
from fedtalos.app.config.schema import RUN_CONFIGS, RunConfig
from fedtalos.app.run.paths import RunPaths, plain_name
from fedtalos.app.run.resume import MAY_DIFFER
from fedtalos.errors import InputError, nearest, shown

MADE_BY_THE_SWEEP = {"run_name", "output_dir", "seed"}
REFERENCE = "run:"

MOST_RUNS = 2000
"""Runs of a grid."""

Axis = Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
"""Values of an axis: name -> the options that it stands for."""

Seeds = Annotated[tuple[int, ...], Field(min_length=1)]


class Block(Options):
    """Runs of one command: every combination of its axes' values and its seeds."""

    model_config = ConfigDict(coerce_numbers_to_str=True)  # the values 4 and 0.9 are named "4" and "0.9"

    command: Literal["centralized", "federated", "editing"]
    name: str = ""
    seeds: Seeds | None = None
    options: dict[str, Any] = Field({})
    axes: dict[str, Axis] = Field({})

    @field_validator("axes", mode="before")
    @classmethod
    def _lists_as_options(cls, axes: Any) -> Any:
        """Write out short forms: [4, 8] is {4: {AXIS: 4}, 8: {AXIS: 8}}, an empty value is no options."""
        return {axis: _named(axis, values) for axis, values in axes.items()} if isinstance(axes, dict) else axes


def _named(axis: str, values: Any) -> Any:
    if isinstance(values, list):
        return {str(value): {axis: value} for value in values}
    if isinstance(values, dict):
        return {value: {} if options is None else options for value, options in values.items()}
    return values


class Grid(Options):
    """Blocks in the order in which they run, with the seeds and options that they share."""

    grid: tuple[Block, ...] = Field(min_length=1)
    seeds: Seeds = (0,)
    options: dict[str, Any] = Field({})
    names: dict[str, str] = Field({})
    """Plain names of values on axes, for figures."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a grid.

    ``point`` is its value on each axis, ``label`` its name without the grid's and the seed. ``asked`` are its options
    that are not at their defaults, ``needs`` the earlier runs whose files it uses.
    """

    label: str
    point: dict[str, str]
    seed: int
    config: RunConfig
    asked: dict[str, Any]
    needs: tuple["Cell", ...]

    @property
    def name(self) -> str:
        assert self.config.run.run_name is not None
        return self.config.run.run_name

    @property
    def paths(self) -> RunPaths:
        return RunPaths(self.config.run.output_dir, self.name)

    @property
    def recipe(self) -> dict[str, dict[str, Any]]:
        """Options asked for of this run and of every run that it needs, by name; the same recipe makes the same run."""
        recipe = {self.name: self.asked}
        for cell in self.needs:
            recipe |= cell.recipe
        return recipe


def read_grid(name: str) -> Grid:
    """Read the grid of that name. InputError where there is none, or it is not well formed."""
    values, source = named_entry("grid", plain_name("grid", name))
    if "grid" not in values:
        command = values.get("command", "COMMAND")
        raise InputError(f"{name!r} is a preset for one run: `fedtalos {command} --preset {name}` runs it")
    try:
        return Grid(**values)
    except InputError as error:
        raise FileError(f"{source}: {error}") from error


def expand(name: str, grid: Grid, given: Mapping[str, Any], seeds: Sequence[int] | None = None) -> list[Cell]:
    """List all runs of a grid in order; ``given`` options beat the grid's, ``seeds`` the seeds that its blocks share.

    Raises InputError, naming the run, where a run's options are not valid.
    """
    every = {key for config_type in RUN_CONFIGS.values() for key in groups(config_type)}
    _check_known(f"grid {name!r}", grid.options, every)
    counts = [len(b.seeds or seeds or grid.seeds) * math.prod(map(len, b.axes.values())) for b in grid.grid]
    if (count := sum(counts)) > MOST_RUNS:
        raise InputError(f"grid {name!r}: expected {MOST_RUNS} runs at most, got {shown(count)}; leave values out")
    cells: list[Cell] = []
    names: set[str] = set()
    for block in grid.grid:
        for seed in block.seeds or seeds or grid.seeds:
            for chosen in product(*(axis.items() for axis in block.axes.values())):
                point = {axis: value for axis, (value, _) in zip(block.axes, chosen, strict=True)}
                own = _own_options(name, block, [values for _, values in chosen])
                options = _options(grid, block, own, given)
                cell = _cell(name, block, point, seed, options, cells, own.keys())
                if cell.name in names:
                    raise InputError(f"grid {name!r}: two runs are named {cell.name}; give one block another `name`")
                names.add(cell.name)
                cells.append(cell)
    return cells


def _check_known(where: str, options: Mapping[str, Any], known: Collection[str]) -> None:
    for key in options:
        if key in NOT_IN_FILES | MADE_BY_THE_SWEEP:
            raise FileError(f"{where}: {key} is set by the sweep; leave it out (seeds have a list of their own)")
        if key not in known:
            raise FileError(f"{where}: unknown option {key!r}{nearest(key, known)}")


def _own_options(name: str, block: Block, chosen: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Options of one run that its block and its values on the axes say."""
    options: dict[str, Any] = {}
    for values in (block.options, *chosen):
        _check_known(f"grid {name!r}, `{block.command}`", values, groups(RUN_CONFIGS[block.command]))
        options |= values
    return options


def _options(grid: Grid, block: Block, own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of one run: the grid's that its command has, then its own, and last the given ones."""
    mine = groups(RUN_CONFIGS[block.command])
    options = {**{key: value for key, value in grid.options.items() if key in mine}, **own}
    from_a_run = str(options.get("weights")).startswith(REFERENCE) or "checkpoint" in own
    last = {key: value for key, value in given.items() if key in mine and not (key == "weights" and from_a_run)}
    return options | last


def _cell(
    grid: str,
    block: Block,
    point: dict[str, str],
    seed: int,
    options: Mapping[str, Any],
    before: Sequence[Cell],
    own: Collection[str],
) -> Cell:
    """One run; ``own`` are the options that must have an effect in it, for they are said of no other run."""
    label = "-".join([block.name, *point.values()] if block.name else point.values())
    name = plain_name("run", f"{grid}-{label}-s{seed}" if label else f"{grid}-s{seed}")
    references = {key: value for key, value in options.items() if str(value).startswith(REFERENCE)}
    needs = {key: _referred(name, value, point, seed, before) for key, value in references.items()}
    made = {key: str(_made_by(cell, key, name)) for key, cell in needs.items()}
    config = override(RUN_CONFIGS[block.command](), {**options, **made, "run_name": name, "seed": seed}, name)
    try:
        check_together(config, own)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    defaults = flatten(type(config)())
    asked = {"command": block.command, **_not_default({**flatten(config), **references}, defaults)}
    return Cell(label, point, seed, config, asked, tuple(dict.fromkeys(needs.values())))


def _not_default(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Options that make a run another one. Defaults are left out: an option that a version adds changes no recipe."""
    return {key: value for key, value in options.items() if key not in MAY_DIFFER and value != defaults[key]}


def _referred(name: str, reference: str, point: Mapping[str, str], seed: int, before: Sequence[Cell]) -> Cell:
    """Find the earlier run that `run:LABEL` means: of the same seed, else the only one. {AXIS} is this run's value."""
    try:  # str.format would also take widths, of which one can fill the memory
        label = re.sub(r"\{([^{}]*)\}", lambda found: point[found[1]], reference.removeprefix(REFERENCE))
    except KeyError as error:
        said = f"{name}: {shown(reference)}: expected axes of its block in the braces, got {shown(error.args[0])}"
        raise InputError(said) from error
    same = [cell for cell in before if cell.label == label]
    found = [cell for cell in same if cell.seed == seed] or same
    if len(found) != 1:
        there = "several, of other seeds" if same else f"none{nearest(label, [cell.label for cell in before])}"
        raise InputError(f"{name}: {reference}: expected one run {label!r} before it in the grid, found {there}")
    return found[0]


def _made_by(cell: Cell, option: str, name: str) -> Path:
    """Find the file of an earlier run that an option takes."""
    edits = cell.config.command == "editing"
    match option:
        case "mask" if edits:
            return cell.paths.mask
        case "head" if edits:
            return cell.paths.head
        case "weights" | "checkpoint" if not edits:
            return cell.paths.checkpoints / "last.json"
    raise InputError(
        f"{name}: {option}: {cell.name} is a run of `{cell.config.command}`, which makes none; "
        "`editing` makes a mask and a head, the others weights and checkpoint"
    )


def with_needs(cells: Sequence[Cell], text: str) -> list[Cell]:
    """List the runs with ``text`` in their names and the runs that they need, in order. InputError where none is."""
    wanted = [cell for cell in cells if text in cell.name]
    if not wanted:
        raise InputError(f"--only {text}: no run has that in its name; --dry_run lists them")
    names: set[str] = set()
    while wanted:
        cell = wanted.pop()
        names.add(cell.name)
        wanted += cell.needs
    return [cell for cell in cells if cell.name in names]
