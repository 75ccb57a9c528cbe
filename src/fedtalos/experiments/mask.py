"""The mask command: what a mask file holds, how several differ, and new ones, joined from them or drawn at random."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fedtalos import __version__
from fedtalos.app.config.tools import MaskCombineConfig, MaskCompareConfig, MaskRandomConfig, MaskShowConfig, MaskTool
from fedtalos.app.figures.draw import plot_masks
from fedtalos.app.run.display import density_report
from fedtalos.app.run.folders import RunPaths, plain_name
from fedtalos.errors import InputError
from fedtalos.models.vision_transformer import parts
from fedtalos.randomness import generator
from fedtalos.training.editing.describe import differences, in_words, joined_facts
from fedtalos.training.editing.mask_file import (
    Mask,
    MaskFacts,
    check_same_tensors,
    density_table,
    fingerprint,
    load_mask,
    origin_differs,
    overlap,
    save_mask,
    votes_needed,
)
from fedtalos.training.editing.talos import eligible_masks


def run(tool: MaskTool, console: Console) -> list[Path]:
    """Do what the command line asks for; returns the files written."""
    match tool:
        case MaskShowConfig():
            return show(tool, console)
        case MaskCompareConfig():
            return compare(tool, console)
        case MaskCombineConfig():
            return combine(tool, console)
        case MaskRandomConfig():
            return draw(tool, console)


def show(config: MaskShowConfig, console: Console) -> list[Path]:
    """Print what the header says and the density by block and kind, and draw the latter."""
    mask, facts = load_mask(config.mask)
    drawn = plot_masks([config.mask], config.output_dir / "plots" / config.mask.stem)
    _print(console, _two_columns({"mask": str(config.mask), **in_words(facts), "fingerprint": fingerprint(mask)}))
    console.print(density_report(density_table(mask, facts.eligible_in)))
    return drawn


def compare(config: MaskCompareConfig, console: Console) -> list[Path]:
    """Print how much each two overlap and which facts differ, and draw densities and overlap.

    Raises InputError for fewer than two masks, two of one name, or masks that speak of different tensors.
    """
    _several("compare", config.masks)
    masks, headers = _load(config.masks)
    shares = np.eye(len(masks))
    for first, second in zip(*np.triu_indices(len(masks), 1), strict=True):
        shares[first, second] = shares[second, first] = overlap(masks[first], masks[second])
    drawn = plot_masks(config.masks, config.output_dir / "plots" / plain_name("--name", config.name))
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
    matrix = ["Overlap (intersection over union)", "".join(f"{number:>5}" for number in ("", *numbers))]
    for number, row in zip(numbers, shares, strict=True):
        matrix.append(f"{number:>5}" + "".join(f"{share:5.2f}" for share in row))
    console.print("\n".join(matrix), highlight=False, markup=False, soft_wrap=True)
    differing = differences([in_words(facts) for facts in headers])
    _print(console, "Made differently (by which masks):" if differing else "Made differently: nothing")
    _print(console, _two_columns(differing))
    return drawn


def combine(config: MaskCombineConfig, console: Console) -> list[Path]:
    """Write a mask of the entries that enough masks let move.

    Raises InputError for fewer than two masks, masks of different models, eligible entries or (unless forced)
    weights, an empty result, and a file that exists.
    """
    _several("combine", config.masks)
    path = _new_file(config.output_dir, config.name)
    masks, headers = _load(config.masks)
    check_same_tensors(masks)
    _check_origin(headers, force=config.force)
    needed = votes_needed(config.rule, len(masks), config.quorum)
    joined = {name: torch.stack([mask[name] for mask in masks]).sum(0) >= needed for name in masks[0]}
    active = sum(int(tensor.sum()) for tensor in joined.values())
    if active == 0:
        raise InputError(
            f"mask combine: no entry may move in {needed} of the {len(masks)} masks; "
            "take --rule union, or --rule vote with a smaller --quorum"
        )
    rule = f"vote at {config.quorum:g}" if config.rule == "vote" else config.rule
    _save(console, path, joined, joined_facts(rule, masks, headers, active))
    return [path]


def draw(config: MaskRandomConfig, console: Console) -> list[Path]:
    """Write a random mask with as many True entries as another, in every tensor or in all, among those eligible.

    Raises InputError for a mask that is not what its header says, and a file that exists.
    """
    path = _new_file(config.output_dir, config.name)
    mask, facts = load_mask(config.like)
    eligible = eligible_to(config.like, mask, facts)
    places = {
        name: [part.flatten().nonzero().squeeze(1) for part in parts(name, eligible[name]).values()] for name in mask
    }
    counts = [int(part.sum()) for name, tensor in mask.items() for part in parts(name, tensor).values()]
    if config.scope == "global":  # how many fall into each part when so many are drawn from all
        sizes = [len(found) for name in mask for found in places[name]]
        rng = generator(config.seed, "random mask", "global")
        counts = rng.multivariate_hypergeometric(sizes, facts.active, method="marginals").tolist()
    drawn: Mask = {name: torch.zeros_like(tensor) for name, tensor in mask.items()}
    left = iter(counts)
    for name, tensor in drawn.items():
        rng = generator(config.seed, "random mask", config.scope, name)
        for part, found in zip(parts(name, tensor).values(), places[name], strict=True):
            chosen = rng.choice(len(found), next(left), replace=False, shuffle=False)
            part.view(-1)[found[torch.from_numpy(chosen)]] = True
    _save(console, path, drawn, drawn_facts(config, mask, facts))
    return [path]


def drawn_facts(config: MaskRandomConfig, like: Mask, facts: MaskFacts) -> MaskFacts:
    """The header of a mask drawn like another: no scores, no rounds, no images, no head."""
    changes = {
        "version": __version__,
        "criterion": "random, per tensor" if config.scope == "tensor" else "random, global",
        **dict.fromkeys(("fisher", "calibration", "data", "head"), "none"),
        **dict.fromkeys(("fisher_samples", "clients", "calibration_images"), 0),
        "iterations": 1,
        "soft_zero": 1.0,
        "granularity": "entry",
        "seed": config.seed,
        "target_density": facts.density,
        "made_from": (fingerprint(like),),
    }
    return facts.model_copy(update=changes)


def eligible_to(path: Path, mask: Mask, facts: MaskFacts) -> Mask:
    """The entries that a mask could choose from.

    Raises InputError where some of its own are not among them.
    """
    eligible = eligible_masks({name: tensor.shape for name, tensor in mask.items()}, facts.eligible_in)
    if any(bool((mask[name] & ~eligible[name]).any()) for name in mask):
        raise InputError(f"mask {path}: lets other entries move than its header calls eligible; give another mask")
    return eligible


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
    loaded = [load_mask(path) for path in paths]
    return [mask for mask, _ in loaded], [facts for _, facts in loaded]


def _new_file(root: Path, name: str) -> Path:
    path = RunPaths(root, plain_name("--name", name)).mask
    if path.exists():
        raise InputError(f"{path} exists: move it away, or choose another --name")
    return path


def _save(console: Console, path: Path, mask: Mask, facts: MaskFacts) -> None:
    """Write the mask, and say how many entries may move."""
    save_mask(path, mask, facts)
    _print(console, f"{facts.active} of {facts.eligible} eligible entries may move ({100 * facts.density:.4g} %)")


def _two_columns(rows: dict[str, str]) -> Table:
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _print(console: Console, what: Table | str) -> None:
    """Nothing in it is read as markup: names of files may hold brackets."""
    console.print(what, highlight=False, markup=False)
