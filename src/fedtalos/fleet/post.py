"""The post between server and nodes: letters out, and answers as they come."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from fedtalos.fleet.letter import Letter


@dataclass(frozen=True)
class NoAnswer:
    """No letter came back from a node, and why: it was stopped, too slow, or its program failed."""

    why: str


class Post(Protocol):
    """Carries letters to nodes, and their answers back; Flower's Grid does, and a stand-in in tests."""

    def nodes(self) -> set[int]:
        """Numbers of the nodes that can be reached now."""
        ...

    def send(self, letters: Mapping[int, Letter], deadline: float) -> dict[int, str]:
        """Send each node its letter; returns a ticket for each answer, which counts for ``deadline`` seconds."""
        ...

    def collect(self, tickets: Iterable[str]) -> dict[str, Letter | NoAnswer]:
        """Take the answers that have come, by their tickets; each is given once."""
        ...
