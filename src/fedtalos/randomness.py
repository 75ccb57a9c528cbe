"""Every random draw names its source: a draw depends on the seed and on what it is for, on nothing else.

    generator(seed, "batches", round, client)

so a resumed run draws what an uninterrupted one would, many workers draw what one would, and a real
deployment draws what the simulation drew.
"""

import hashlib

import numpy as np
import torch


def _entropy(seed: int, source: tuple[str | int, ...]) -> int:
    return int.from_bytes(hashlib.blake2b(repr((seed, *source)).encode(), digest_size=16).digest(), "little")


def generator(seed: int, *source: str | int) -> np.random.Generator:
    """A fresh numpy generator for one named purpose, e.g. ``generator(0, "clients", round)``."""
    return np.random.Generator(np.random.PCG64(_entropy(seed, source)))


def torch_generator(seed: int, *source: str | int) -> torch.Generator:
    """A fresh torch CPU generator for one named purpose; torch's CPU engine uses 32 bits of the seed."""
    return torch.Generator().manual_seed(_entropy(seed, source) % 2**32)
