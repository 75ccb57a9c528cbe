"""Energy that a run took, where the machine tells: counters of its processors (Linux) and of its Nvidia card.

A counter is of the whole processor, or card, with whatever else ran there; memory, fans and the rest are not in it.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")
"""Folder in which Linux shows the processors' counters, mostly to root alone."""

Counter = tuple[str, Callable[[], float], float]
"""A part of the machine, the reader of its joules (nan where they cannot be read), and where they start again."""


class EnergyMeter:
    """Counts the energy (J) of processors and card since it was made; a part that does not tell is left out.

    A processor's counter starts again at a few hundred kilojoules, so read it every half hour: with every round.

    >>> EnergyMeter(torch.device("cuda")).read()
    {'processors': 1834.2, 'card': 9310.5}
    """

    def __init__(self, device: torch.device, powercap: Path = POWERCAP) -> None:
        self._counters = [*_processors(powercap), *_card(device)]
        self._last = [now() for _, now, _ in self._counters]
        self._joules = {part: 0.0 for part, _, _ in self._counters}

    def read(self) -> dict[str, float]:
        """Joules by part since the meter was made."""
        for number, (part, now, limit) in enumerate(self._counters):
            value = now()
            took = value - self._last[number]
            self._joules[part] += took if took >= 0 else took + limit
            self._last[number] = value
        return {part: joules for part, joules in self._joules.items() if math.isfinite(joules)}


def _processors(powercap: Path) -> Iterator[Counter]:
    for folder in sorted(powercap.glob("intel-rapl:[0-9]*")):  # AMD's processors are shown under this name, too
        try:
            is_package = (folder / "name").read_text().startswith("package")  # others are parts of one, or hold it
        except OSError:
            continue
        now = partial(_joules, folder / "energy_uj")
        if is_package and not math.isnan(now()):
            yield "processors", now, _joules(folder / "max_energy_range_uj")


def _joules(path: Path) -> float:
    try:
        return int(path.read_text()) / 1e6
    except (OSError, ValueError):
        return math.nan


def _card(device: torch.device) -> Iterator[Counter]:
    if device.type != "cuda":
        return
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # no such library, no counter on this card, or a share of one: then it does not tell
        return

    def now() -> float:
        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
        except pynvml.NVMLError:
            return math.nan

    yield "card", now, math.inf
