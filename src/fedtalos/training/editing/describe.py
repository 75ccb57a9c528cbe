"""Masks described for people: density by block and kind of layer, facts in words, and where facts differ."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fedtalos.models.vision_transformer import parts
from fedtalos.training.editing.eligible import Eligible, eligible_masks
from fedtalos.training.editing.mask_facts import SEVERAL, MaskFacts
from fedtalos.training.entries import Mask

OUTSIDE = -1
"""Number that stands for a block where a layer lies outside all of them (eligible paper)."""
KINDS = ("q", "k", "v", "proj", "fc1", "fc2", "linear", "conv", "norms", "biases")


@dataclass(frozen=True)
class DensityRow:
    """True entries and entries of one kind of tensor in one block."""

    block: int
    """From 0; OUTSIDE for the layers before and behind the blocks."""
    kind: str
    active: int
    entries: int

    @property
    def density(self) -> float:
        """Share of True entries."""
        return self.active / self.entries

    @property
    def place(self) -> str:
        """The block as tables show it: its number, or "-" outside the blocks."""
        return "-" if self.block == OUTSIDE else str(self.block)


def density_table(mask: Mask, eligible_in: Eligible = "blocks") -> list[DensityRow]:
    """Density per block and kind (q, k, v, proj, fc1, fc2: weights; norms: both; biases: of the linear layers).

    Only eligible entries count, and kinds that have some. What lies outside the blocks comes first, as conv, norms and
    biases. A model of another library has the kinds linear, conv, norms and biases; its blocks, in their order, are
    what shares a name up to the last number in it.

    >>> for row in density_table(mask):
    ...     print(row.place, row.kind, f"{row.density:.1%}")
    """
    eligible = eligible_masks({name: tensor.shape for name, tensor in mask.items()}, eligible_in)
    totals: dict[tuple[int, str], list[int]] = {}
    for name, (block, kind) in places(mask).items():
        for part, chosen in parts(name, mask[name]).items():
            row = totals.setdefault((block, kind if kind in ("norms", "biases") else part or kind), [0, 0])
            row[0] += int(chosen.sum())
            row[1] += int(parts(name, eligible[name])[part].sum())
    ordered = sorted(totals, key=lambda key: (key[0], KINDS.index(key[1])))
    return [DensityRow(block, kind, *totals[block, kind]) for block, kind in ordered if totals[block, kind][1]]


def places(mask: Mask) -> dict[str, tuple[int, str]]:
    """Number of the block, from 0, and kind of each tensor; OUTSIDE for what lies in no block.

    >>> places({"blocks.3.mlp.fc1.weight": mask})
    {'blocks.3.mlp.fc1.weight': (3, 'fc1')}
    """
    found: dict[str, tuple[int, str]] = {}
    units: dict[str, int] = {}
    for name in mask:
        if name.startswith("blocks."):
            found[name] = int(name.split(".")[1]), _kind(name)
        else:
            block = units.setdefault(_unit(name), len(units)) if name.startswith("net.") else OUTSIDE
            found[name] = block, _library_kind(name, mask)
    return found


def _kind(name: str) -> str:
    """Kind of blocks.N.norm1.weight, blocks.N.mlp.fc1.weight and the like."""
    layer = name.split(".", 2)[2]
    return "norms" if layer.startswith("norm") else "biases" if layer.endswith(".bias") else layer.split(".")[1]


def _library_kind(name: str, mask: Mask) -> str:
    weight = mask.get(name.removesuffix("bias") + "weight") if name.endswith(".bias") else mask[name]
    if weight is not None and weight.dim() == 1:
        return "norms"
    return "biases" if name.endswith(".bias") else "conv" if mask[name].dim() == 4 else "linear"


def _unit(name: str) -> str:
    """A layer's path up to its last number but its own: net.stages.1.blocks.2 of net.stages.1.blocks.2.mlp.fc1.bias."""
    found = re.match(r".*\d(?=\.)", name.rsplit(".", 2)[0] + ".")
    return found[0] if found else ""


def describe_facts(facts: MaskFacts) -> dict[str, str]:
    """A mask file's header in words, by topic.

    >>> mask, facts = read_mask_file(Path("masks/mine.safetensors"))
    >>> describe_facts(facts)["density"]
    '10 %'
    """
    unknown = SEVERAL if facts.made_from else "unknown"

    def number(value: float | None) -> str:
        return unknown if value is None else str(value)

    labels = f", labels drawn per image: {number(facts.fisher_samples)}" if facts.fisher == "true" else ""
    clients = f" of {number(facts.clients)} clients" if facts.clients != 0 else ""
    images = f", {number(facts.calibration_images)} images{clients}" if facts.calibration_images != 0 else ""
    return {
        "made by": f"fedtalos {facts.version} (format {facts.format})",
        "criterion": facts.criterion,
        "Fisher": facts.fisher + labels,
        "rounds": f"{number(facts.iterations)}, excluded entries times {number(facts.soft_zero)}",
        "calibration": facts.calibration + images,
        "granularity": facts.granularity,
        "eligible": f"{facts.eligible} entries ({facts.eligible_in})",
        "may move": f"{facts.active} entries",
        "density": f"{100 * facts.density:.4g} %",
        "density asked": unknown if facts.target_density is None else f"{100 * facts.target_density:.4g} %",
        "seed": number(facts.seed),
        "model": ", ".join(f"{what.replace('_', ' ')} {value}" for what, value in facts.model.items()),
        "weights": facts.weights,
        "data": facts.data,
        "head": facts.head,
        **({"made from": ", ".join(facts.made_from)} if facts.made_from else {}),
    }


def differences(described: Sequence[dict[str, str]]) -> dict[str, str]:
    """The facts in which masks differ: every value, each with the numbers (from 1) of the masks that have it.

    >>> differences([{"seed": "0"}, {"seed": "1"}])
    {'seed': '0 (1); 1 (2)'}
    """
    found = {}
    for fact in dict.fromkeys(fact for words in described for fact in words):
        who: dict[str, list[str]] = {}
        for number, words in enumerate(described, 1):
            who.setdefault(words.get(fact, "none"), []).append(str(number))
        if len(who) > 1:
            found[fact] = "; ".join(f"{value} ({', '.join(numbers)})" for value, numbers in who.items())
    return found
