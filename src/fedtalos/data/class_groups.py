"""Classes in groups, such as the tasks of continual learning: consecutive, drawn, or by CIFAR-100's superclasses.

Letters: C classes, T groups.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from fedtalos.errors import InputError, check_word
from fedtalos.randomness import generator

Groups = tuple[tuple[int, ...], ...]
"""Classes of each group, ascending; every class is in one group."""
GroupOrder = Literal["fixed", "random", "superclass"]

SUPERCLASSES = {
    "aquatic mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food containers": "bottle bowl can cup plate",
    "fruit and vegetables": "apple mushroom orange pear sweet_pepper",
    "household electrical devices": "clock keyboard lamp telephone television",
    "household furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large carnivores": "bear leopard lion tiger wolf",
    "large man-made outdoor things": "bridge castle house road skyscraper",
    "large natural outdoor scenes": "cloud forest mountain plain sea",
    "large omnivores and herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium-sized mammals": "fox porcupine possum raccoon skunk",
    "non-insect invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles 1": "bicycle bus motorcycle pickup_truck train",
    "vehicles 2": "lawn_mower rocket streetcar tank tractor",
}
"""CIFAR-100's coarse classes in the order of their labels, with their fine ones (Krizhevsky, 2009)."""


def class_groups(classes: Sequence[str], count: int, order: GroupOrder = "fixed", seed: int = 0) -> Groups:
    """Put C classes into ``count`` groups whose sizes differ by one at most.

    ``order`` fixed takes neighbours as they are stored, random draws from ``seed``, superclass takes whole superclasses
    of CIFAR-100, neighbours in their order (sizes then differ by one superclass at most).

    Raises InputError for more groups than there are classes, or superclasses, and for classes without a superclass.

    >>> class_groups(["cat", "dog", "cow", "horse", "sheep"], 2)
    ((0, 1, 2), (3, 4))
    """
    check_word("order", order, GroupOrder)
    units: list[list[int]] = [[number] for number in range(len(classes))]
    match order:
        case "fixed":
            pass
        case "random":
            units = [[int(number)] for number in generator(seed, "class groups").permutation(len(classes))]
        case "superclass":
            units = _superclasses(classes)
    if not 1 <= count <= len(units):
        what = "superclasses" if order == "superclass" else "classes"
        raise InputError(f"{count} groups of {len(units)} {what}: choose 1 to {len(units)}")
    parts = np.array_split(np.arange(len(units)), count)
    return tuple(tuple(sorted(number for unit in part for number in units[unit])) for part in parts)


def _superclasses(classes: Sequence[str]) -> list[list[int]]:
    places = {name: number for number, name in enumerate(classes)}
    named = [names.split() for names in SUPERCLASSES.values()]
    known = {name for names in named for name in names}
    if strange := [name for name in classes if name not in known]:
        raise InputError(
            f"class {strange[0]!r} is none of CIFAR-100's, of which alone superclasses are known; "
            "take order fixed or random"
        )
    found = [[places[name] for name in names if name in places] for names in named]
    return [unit for unit in found if unit]


def group_of(groups: Groups, num_classes: int) -> np.ndarray:
    """Number of the group of each class, (C,); -1 for a class that is in none.

    >>> group_of(((0, 2), (1,)), 4)
    array([ 0,  1,  0, -1])
    """
    found = np.full(num_classes, -1)
    for number, classes in enumerate(groups):
        found[list(classes)] = number
    return found
