"""Named random streams: a draw depends on the seed and on its purpose, and on nothing else.

    generator(seed, "batches", round, client)

So a resumed run draws what an uninterrupted one would, many processes draw what one would, and a real deployment draws
what the simulation drew.
"""

import hashlib
from operator import index

import numpy as np
import torch


def _entropy(seed: int, source: tuple[str | int, ...]) -> int:
    words = tuple(word if isinstance(word, str) else index(word) for word in (seed, *source))  # numpy spells its own
    return int.from_bytes(hashlib.blake2b(repr(words).encode(), digest_size=16).digest(), "little")


def generator(seed: int, *source: str | int) -> np.random.Generator:
    """Make a fresh numpy generator for one named purpose.

    >>> chosen = generator(0, "clients", 3).choice(100, 10, replace=False)
    """
    return np.random.Generator(np.random.PCG64(_entropy(seed, source)))


def torch_generator(seed: int, *source: str | int) -> torch.Generator:
    """Make a fresh torch CPU generator for one named purpose; torch's CPU engine uses 32 bits of the seed.

    >>> noise = torch.randn(3, generator=torch_generator(0, "noise"))
    """
    return torch.Generator().manual_seed(_entropy(seed, source) % 2**32)
