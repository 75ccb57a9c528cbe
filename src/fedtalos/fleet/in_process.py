"""A fleet within one process: nodes answer at once, through the very bytes that a network would carry."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from fedtalos.fleet.letter import Letter
from fedtalos.fleet.post import NoAnswer


class Answers(Protocol):
    """A node, or a stand-in for one."""

    def answer(self, letter: Letter) -> Letter: ...


def written_and_read(letter: Letter) -> Letter:
    """Send a letter through its bytes."""
    return Letter.read(letter.written())


class InProcess:
    """A post between a server and nodes of this process; ``seen`` keeps every letter that nodes sent, where asked.

    A node answers when its answer is collected, so that one answer is in memory at a time.

    >>> run_rounds(config, InProcess([Node(options, state) for options, state in mine]), Terms(), Console())
    """

    def __init__(
        self, nodes: Iterable[Answers], carried: Callable[[Letter], Letter] = written_and_read, *, keep: bool = False
    ) -> None:
        self.by_number: dict[int, Answers] = {100 + number: node for number, node in enumerate(nodes)}
        self.seen: list[Letter] = []
        self._carried, self._keep = carried, keep
        self._sent: dict[str, tuple[int, Letter]] = {}
        self._tickets = map(str, itertools.count())

    def nodes(self) -> set[int]:
        return set(self.by_number)

    def send(self, letters: Mapping[int, Letter], deadline: float) -> dict[int, str]:
        tickets = {number: next(self._tickets) for number in letters}
        self._sent |= {tickets[number]: (number, letter) for number, letter in letters.items()}
        return tickets

    def answer(self, number: int, letter: Letter) -> Letter | NoAnswer:
        """Have a node answer."""
        answer = self._carried(self.by_number[number].answer(self._carried(letter)))
        if self._keep:
            self.seen.append(answer)
        return answer

    def collect(self, tickets: Iterable[str]) -> dict[str, Letter | NoAnswer]:
        return {ticket: self.answer(*self._sent.pop(ticket)) for ticket in list(tickets) if ticket in self._sent}
