"""The mask command: what a mask file holds, how several differ, and new ones, joined from them or drawn at random."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fedtalos import __version__
from fedtalos.config_tools import MaskCombineConfig, MaskCompareConfig, MaskRandomConfig, MaskShowConfig, MaskTool
from fedtalos.display import density_report
from fedtalos.errors import InputError
from fedtalos.experiments.plots import plot_masks
from fedtalos.experiments.runs import RunPaths, plain_name
from fedtalos.mask_facts import differences, in_words, joined_facts
from fedtalos.masks import (
    Mask,
    MaskFacts,
    check_same_tensors,
    density_table,
    fingerprint,
    load_mask,
    overlap,
    save_mask,
    votes_needed,
)
from fedtalos.models.vision_transformer import Architecture, VisionTransformer
from fedtalos.randomness import generator, torch_generator
from fedtalos.training.editing import Eligible, eligible_entries


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
    console.print(density_report(density_table(mask)))
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
    _print(console, _two_columns(dict(zip(numbers, map(str, config.masks), strict=True))))
    common = sum(int(torch.stack([mask[name] for mask in masks]).all(0).sum()) for name in masks[0])
    table = Table(title="Overlap (intersection over union)", title_justify="left")
    for heading in ("mask", "may move (%)", "in every mask (%)", *numbers):
        table.add_column(heading, justify="right")
    for number, facts, row in zip(numbers, headers, shares, strict=True):
        in_every = f"{100 * common / facts.active:.1f}" if facts.active else ""
        table.add_row(number, f"{100 * facts.density:.1f}", in_every, *(f"{share:.3f}" for share in row))
    _print(console, table)
    differing = differences([in_words(facts) for facts in headers]) or {"nothing": ""}
    _print(console, _two_columns(differing, title="Made differently (by which masks)"))
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
    places = {name: [part.flatten().nonzero().squeeze(1) for part in parts(name, eligible[name])] for name in mask}
    counts = [int(part.sum()) for name, tensor in mask.items() for part in parts(name, tensor)]
    if config.scope == "global":  # how many fall into each part when so many are drawn from all
        sizes = [len(found) for name in mask for found in places[name]]
        rng = generator(config.seed, "random mask", "global")
        counts = rng.multivariate_hypergeometric(sizes, facts.active, method="marginals").tolist()
    drawn: Mask = {name: torch.zeros_like(tensor) for name, tensor in mask.items()}
    left = iter(counts)
    for name, tensor in drawn.items():
        rng = generator(config.seed, "random mask", config.scope, name)
        for part, found in zip(parts(name, tensor), places[name], strict=True):
            chosen = rng.choice(len(found), next(left), replace=False, shuffle=False)
            part.view(-1)[found[torch.from_numpy(chosen)]] = True
    _save(console, path, drawn, drawn_facts(config, mask, facts))
    return [path]


def parts(name: str, tensor: Tensor) -> tuple[Tensor, ...]:
    """Views of a tensor's parts that count as tensors: q, k and v of a qkv layer, else itself."""
    return tensor.chunk(3) if ".attn.qkv." in name else (tensor,)


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

    Raises InputError where they are not those of the model and the rule that its header names.
    """
    eligible: Mask = {}
    if facts.eligible_in in get_args(Eligible):
        with torch.device("meta"):  # no memory, no weights: names and shapes in the blocks are all that is asked for
            model = VisionTransformer(Architecture(str(facts.model.get("size")), 1, 1, 1), torch_generator(0, "shapes"))
        eligible = eligible_entries(model.to_empty(device="cpu"), cast(Eligible, facts.eligible_in)).masks
    same = {name: t.shape for name, t in eligible.items()} == {name: t.shape for name, t in mask.items()}
    if not same or any(bool((mask[name] & ~eligible[name]).any()) for name in mask):
        raise InputError(f"mask {path}: its header names other eligible entries than it speaks of; give another mask")
    return eligible


def _check_origin(headers: Sequence[MaskFacts], *, force: bool) -> None:
    """InputError where masks choose among different entries or (unless forced) were made for different weights."""
    if len({(facts.eligible_in, facts.eligible) for facts in headers}) > 1:
        raise InputError("masks: made with different --eligible, so they cannot be joined; give masks made with one")
    origins = [{**facts.model, "weights": facts.weights[:16]} for facts in headers]
    for what in ("size", "patch_size", "weights"):
        values = list(dict.fromkeys(str(origin.get(what)) for origin in origins))
        if len(values) > 1 and not force:
            raise InputError(
                f"masks: made for different {what} ({'; '.join(values)}); join masks made for one, or add --force"
            )


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


def _two_columns(rows: dict[str, str], title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _print(console: Console, what: Table | str) -> None:
    """Nothing in it is read as markup: names of files may hold brackets."""
    console.print(what, highlight=False, markup=False)
