"""A post within one process that goes through Flower's own records where Flower is installed."""

import warnings
from collections.abc import Iterable

from fedtalos.fleet.in_process import InProcess, written_and_read
from fedtalos.fleet.letter import Letter
from fedtalos.fleet.node import Node

try:
    with warnings.catch_warnings():  # Flower's own imports
        warnings.simplefilter("ignore")
        import flwr.serverapp  # noqa: F401
    from fedtalos.fleet.flower import letter_of, record_of, travelled
except ImportError:
    carried = written_and_read
else:

    def carried(letter: Letter) -> Letter:
        return letter_of(travelled(record_of(letter)))


class LocalPost(InProcess):
    def __init__(self, nodes: Iterable[Node]) -> None:
        super().__init__(nodes, carried, keep=True)
