"""Clients that data name, such as hospitals or writers, as numbers."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedtalos.data.class_names import some


def number_clients(names: Sequence[str]) -> tuple[NDArray[np.int64], str]:
    """Number clients from 0 in the order of their names, as numbers where all are; also says so in a sentence.

    >>> number_clients(["St Mary", "Charité", "St Mary"])[0]
    array([1, 0, 1])
    """
    sizes = Counter(names)
    digits = all(name.isascii() and name.isdigit() and len(name) < 19 for name in sizes)
    ordered = sorted(sizes, key=lambda name: (int(name) if digits else 0, name))
    place = {name: number for number, name in enumerate(ordered)}
    least, most = min(sizes.values()), max(sizes.values())
    each = f"{least} training images each" if least == most else f"{least} to {most} training images"
    sentence = (
        f"the data name {len(sizes)}, of {each} "
        f"({some(ordered)}): partition given takes them as they are, numbered from 0 in this order"
    )
    return np.array([place[name] for name in names], np.int64), sentence
