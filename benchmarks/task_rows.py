"""Rows of the study of tasks, printed as they come, and the time that its parts take."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import mean, stdev

from edges import line, write
from measure import environment

COLUMNS = (
    *("rate", "alpha", "unknown %", "known %", "normalised %", "target %", "control %", "of before %"),
    *("probe %", "xi", "xi low", "xi high", "s"),
)


@dataclass
class Rows:
    """A Markdown table that is printed row by row; means and deviations at the end."""

    found: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        write(environment(), "", line("seed", "", *COLUMNS), line(*["---"] * (2 + len(COLUMNS))))

    def add(self, seed: int, name: str, **figures: float) -> None:
        """Print a row; figures by the first word of their column, accuracies 0 to 1."""
        row = {}
        for column in COLUMNS:
            value = figures.get(column.removesuffix(" %").replace(" ", "_"), math.nan)
            row[column] = 100 * value if column.endswith("%") else value
        self.found.setdefault(name, []).append(row)
        write(line(seed, name, *("" if math.isnan(row[column]) else f"{row[column]:.4g}" for column in COLUMNS)))

    def means(self) -> None:
        """Print mean and sample deviation of every row that came for several seeds."""
        for name, same in self.found.items():
            if len(same) > 1:
                cells = []
                for column in COLUMNS:
                    values = [row[column] for row in same if not math.isnan(row[column])]
                    spread = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
                    cells.append(f"{mean(values):.4g}{spread}" if values else "")
                write(line("mean", name, *cells))


@dataclass
class Clock:
    """Seconds and images by part of the study."""

    seconds: dict[str, float] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str, images: int) -> Iterator[None]:
        """Count the block's time to a part, over so many images."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.images[name] = self.images.get(name, 0) + images

    def show(self) -> None:
        """Print milliseconds an image."""
        write("", line("part", "s", "images", "ms an image"), line(*["---"] * 4))
        for name, seconds in self.seconds.items():
            count = self.images[name]
            write(line(name, f"{seconds:.1f}", count, f"{1000 * seconds / count:.3g}" if count else ""))
