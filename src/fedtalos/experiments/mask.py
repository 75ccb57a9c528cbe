"""The mask command: show a mask file, compare several, or join them into a new one."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fedtalos.app.config.tools import MaskCombineConfig, MaskCompareConfig, MaskConfig, MaskShowConfig
from fedtalos.app.figures import draw
from fedtalos.app.run.display import density_report, say, say_pairs
from fedtalos.app.run.paths import RunPaths, plain_name
from fedtalos.errors import InputError
from fedtalos.training.editing.combine import chance_overlap, combine_masks, joined_facts, overlap
from fedtalos.training.editing.describe import density_table, describe_facts, differences
from fedtalos.training.editing.mask_facts import MaskFacts, fingerprint, origin_differs
from fedtalos.training.editing.mask_file import read_mask_file, write_mask_file
from fedtalos.training.entries import Mask


def run(config: MaskConfig, console: Console) -> None:
    """Do what the command line asks for, and print the files written."""
    match config.tool:
        case MaskShowConfig() as tool:
            written = show(tool, console)
        case MaskCompareConfig() as tool:
            written = compare(tool, console)
        case MaskCombineConfig() as tool:
            written = combine(tool, console)
    for path in written:
        say(console, str(path))


def show(config: MaskShowConfig, console: Console) -> list[Path]:
    """Print what the header says and the density by block and kind, and draw the latter."""
    mask, facts = read_mask_file(config.mask)
    drawn = draw.plot_masks([config.mask], config.output_dir / "plots" / config.mask.stem)
    _print(console, _two_columns({"mask": str(config.mask), **describe_facts(facts), "fingerprint": fingerprint(mask)}))
    console.print(density_report(density_table(mask, facts.eligible_in)))
    return drawn


def compare(config: MaskCompareConfig, console: Console) -> list[Path]:
    """Print how much each two masks overlap, and would by chance, and which facts differ; draw densities and overlap.

    Raises InputError for fewer than two masks, two of one name, or masks that speak of different tensors.
    """
    _several("compare", config.masks)
    masks, headers = _load(config.masks)
    shares, chance = np.eye(len(masks)), np.eye(len(masks))
    for first, second in zip(*np.triu_indices(len(masks), 1), strict=True):
        pair, rules = (masks[first], masks[second]), (headers[first].eligible_in, headers[second].eligible_in)
        shares[first, second] = shares[second, first] = overlap(*pair)
        chance[first, second] = chance[second, first] = chance_overlap(*pair, rules)
    names = draw.name_together(draw.mask_names(config.masks))
    folder = names if config.name is None else plain_name("--name", config.name)
    drawn = draw.plot_masks(config.masks, config.output_dir / "plots" / folder)
    numbers = [str(number) for number in range(1, len(masks) + 1)]
    named_in_all = set.intersection(*(set(mask) for mask in masks))
    common = sum(int(torch.stack([mask[name] for mask in masks]).all(0).sum()) for name in named_in_all)
    table = Table(box=None)
    for heading in ("", "mask", "may move (%)", "of these in every mask (%)"):
        table.add_column(heading, justify="left" if heading == "mask" else "right", overflow="fold")
    for number, path, facts in zip(numbers, config.masks, headers, strict=True):
        in_every = f"{100 * common / facts.active:.1f}" if facts.active else ""
        table.add_row(number, str(path), f"{100 * facts.density:.1f}", in_every)
    _print(console, table)
    title = "Overlap (intersection over union), in brackets that of random masks of the same densities per tensor"
    say_pairs(console, title, shares, chance)
    differing = differences([describe_facts(facts) for facts in headers])
    _print(console, "Made differently (by which masks):" if differing else "Made differently: nothing")
    _print(console, _two_columns(differing))
    return drawn


def combine(config: MaskCombineConfig, console: Console) -> list[Path]:
    """Write a mask of the entries that enough masks let move.

    Raises InputError for fewer than two masks, masks of different models, eligible entries or (unless forced)
    weights, an empty result, and a file that exists.
    """
    _several("combine", config.masks)
    if config.rule != "vote" and config.quorum != MaskCombineConfig.model_fields["quorum"].default:
        raise InputError(
            f"--quorum {config.quorum:g}: is of --rule vote, not of {config.rule}; give that, or leave it out"
        )
    path = RunPaths(config.output_dir, plain_name("--name", config.name)).mask
    if path.exists():
        raise InputError(f"{path} exists: move it away, or choose another --name")
    masks, headers = _load(config.masks)
    joined = combine_masks(masks, config.rule, config.quorum)
    _check_origin(headers, force=config.force)
    rule = f"vote at {config.quorum:g}" if config.rule == "vote" else config.rule
    active = sum(int(tensor.sum()) for tensor in joined.values())
    facts = joined_facts(rule, masks, headers, active)
    write_mask_file(path, joined, facts)
    _print(console, f"{active} of {facts.eligible} eligible entries may move ({100 * facts.density:.4g} %)")
    return [path]


def _check_origin(headers: Sequence[MaskFacts], *, force: bool) -> None:
    """InputError where masks choose among different entries or (unless forced) were made for different weights."""
    if len({(facts.eligible_in, facts.eligible) for facts in headers}) > 1:
        raise InputError("masks: made with different --eligible, so they cannot be joined; give masks made with one")
    if (differs := origin_differs(headers)) and not force:
        raise InputError(f"masks: made for different {differs}; join masks made for one, or add --force")


def _several(tool: str, paths: Sequence[Path]) -> None:
    if len(paths) < 2:
        raise InputError(
            f"mask {tool}: expected two or more mask files, got {len(paths)}; `fedtalos mask show FILE` shows one"
        )


def _load(paths: Sequence[Path]) -> tuple[list[Mask], list[MaskFacts]]:
    loaded = [read_mask_file(path) for path in paths]
    return [mask for mask, _ in loaded], [facts for _, facts in loaded]


def _two_columns(rows: dict[str, str]) -> Table:
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _print(console: Console, what: Table | str) -> None:
    """Print without reading markup: names of files may hold brackets."""
    console.print(what, highlight=False, markup=False)
