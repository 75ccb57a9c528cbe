"""Members of a fleet: which node is which client, found by letters, and kept while nodes come and go."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedtalos._version import __version__
from fedtalos.errors import InputError
from fedtalos.fleet.letter import Letter, fact
from fedtalos.fleet.post import NoAnswer, Post

POLL = 0.05
"""Seconds between two looks at the post."""
GRACE = 15.0
"""Seconds after the deadline by which the network itself has to have said that there is no answer."""
SMALL = 120.0
"""Deadline of letters that need no work, in seconds: on a slow machine Flower's programs start in half a minute."""


@dataclass(frozen=True)
class Member:
    """A node that is ready for the run: its number on the network, the run as it knows it, its images and classes.

    Classes are told where the run asks for them.
    """

    node: int
    run: str
    images: int
    classes: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Asked:
    """A letter of the joining that is under way."""

    node: int
    until: float
    client: int | None = None
    """Known once the node has answered "hello"; then "begin" is under way."""


class Members:
    """Finds out which nodes are which clients, and makes them ready for a run.

    ``begin`` is the letter that makes a node ready, ``still`` the part of the model that does not move, which is sent
    to those that have not got it. ``note`` is told what a person should know. Nothing blocks but ``gather``.

    >>> members = Members(post, num_clients=3, deadline=600)
    >>> members.prepare(begin, still)
    >>> members.gather(patience=60)
    """

    def __init__(
        self,
        post: Post,
        num_clients: int,
        *,
        deadline: float,
        note: Callable[[str], None] = lambda _: None,
        pause: Callable[[], None] = lambda: time.sleep(POLL),
    ) -> None:
        self.post, self.num_clients, self.deadline = post, num_clients, deadline
        self.by_client: dict[int, Member] = {}
        self.sizes: NDArray[np.int64] = np.zeros(num_clients, np.int64)
        """Numbers of images of the clients met so far, (K,)."""
        self.bytes_down = self.bytes_up = 0
        self.note, self._pause = note, pause
        self._joining: dict[str, _Asked] = {}
        self._refused: set[int] = set()
        self._begin, self._still = Letter("begin"), Letter("begin")

    def prepare(self, begin: Letter, still: bytes) -> None:
        """Set what makes nodes ready; nodes that are, or will be, ready for something else begin again."""
        if begin == self._begin:
            return
        self._begin = begin
        self._still = replace(begin, arrays={"still": np.frombuffer(still, np.uint8)})
        asked = {member.node: client for client, member in self.by_client.items()}
        for ticket, joining in list(self._joining.items()):
            if joining.client is not None:  # it is being made ready for something else
                asked[joining.node] = joining.client
                del self._joining[ticket]
        self.by_client.clear()
        for node, client in asked.items():
            self._ask(node, self._begin, client)

    def gather(self, patience: float, at_least: int = 1, wanted: int | None = None) -> None:
        """Wait until ``wanted`` clients (None: all) have nodes, or ``at_least`` have when the ``patience`` is over.

        Patience is in seconds; nodes that are being made ready then may finish where too few are. Raises InputError
        where there are fewer.
        """
        start, waited, wanted = time.monotonic(), 0.0, self.num_clients if wanted is None else wanted
        self.refresh()
        while (count := len(self.by_client)) < wanted:
            waited = time.monotonic() - start
            if waited > patience and (count >= at_least or not self._joining or waited > patience + self.deadline):
                break
            self._pause()
            self.refresh()
        if count < at_least:
            raise InputError(
                f"{count} of {self.num_clients} nodes are there after {waited:.0f} s, and at least {at_least} are "
                "needed; start the others, or give a longer patience or a lower min_nodes"
            )

    def refresh(self) -> None:
        """Greet nodes that are new, take answers that have come, and forget nodes that are gone."""
        there = self.post.nodes()
        for client, member in list(self.by_client.items()):
            if member.node not in there:
                self.drop(client, "left")
        self._refused &= there
        known = {member.node for member in self.by_client.values()} | {asked.node for asked in self._joining.values()}
        for node in there - known - self._refused:
            self._ask(node, Letter("hello"), None)
        for ticket, answer in self.post.collect(list(self._joining)).items():
            self._take(self._joining.pop(ticket), answer)
        now = time.monotonic()
        self._joining = {ticket: asked for ticket, asked in self._joining.items() if asked.until > now}

    def drop(self, client: int, why: str) -> None:
        """Count a client's node as gone; it is greeted again while the network knows it, as are those left out so far.

        One of them may be the same client's: without TLS a node comes back with another number.
        """
        if self.by_client.pop(client, None) is not None:
            self.note(f"client {client}: its node {why}")
            self._refused.clear()

    def _ask(self, node: int, letter: Letter, client: int | None) -> None:
        deadline = SMALL if client is None else self.deadline
        for ticket in self.send({node: letter}, deadline).values():
            self._joining[ticket] = _Asked(node, time.monotonic() + deadline + GRACE, client)

    def send(self, letters: Mapping[int, Letter], deadline: float) -> dict[int, str]:
        """Send letters, and count their bytes."""
        self.bytes_down += sum(letter.nbytes for letter in letters.values())
        return self.post.send(letters, deadline)

    def ask(self, letters: Mapping[int, Letter]) -> Iterator[tuple[int, Letter | NoAnswer]]:
        """Send clients, which have to be members, their letters at once; yields the answers in the letters' order.

        A client that gives no answer, or refuses, is dropped.
        """
        nodes = {client: self.by_client[client].node for client in letters}
        tickets = self.send({nodes[client]: letter for client, letter in letters.items()}, self.deadline)
        until = time.monotonic() + self.deadline + GRACE
        for client, node in nodes.items():
            answer = self.wait(tickets[node], until) if node in tickets else NoAnswer("its letter could not be sent")
            if isinstance(answer, NoAnswer):
                self.drop(client, f"gave no answer ({answer.why})")
            elif answer.kind in ("refused", "unprepared"):
                self.drop(client, f"did not do it ({answer.facts.get('why', 'it has lost its state')})")
            yield client, answer

    def bytes_since(self) -> tuple[int, int]:
        """Bytes sent down and up since this was last asked."""
        counted = self.bytes_down, self.bytes_up
        self.bytes_down = self.bytes_up = 0
        return counted

    def wait(self, ticket: str, until: float) -> Letter | NoAnswer:
        """Wait for an answer until a moment, count its bytes, and return it; one that is there already is taken."""
        while (answer := self.post.collect([ticket]).get(ticket)) is None:
            if time.monotonic() > until:
                return NoAnswer("no answer in time")
            self._pause()
        self.bytes_up += answer.nbytes if isinstance(answer, Letter) else 0
        return answer

    def _take(self, asked: _Asked, answer: Letter | NoAnswer) -> None:
        """Take a step of the joining: hello, begin, begin with the frozen part, member."""
        if isinstance(answer, NoAnswer):
            return  # greeted again while it is there
        self.bytes_up += answer.nbytes
        try:
            match answer.kind:
                case "hello" if asked.client is None:
                    self._ask(asked.node, self._begin, self._client(answer))
                case "need" if asked.client is not None:
                    self._ask(asked.node, self._still, asked.client)
                case "begun" if asked.client is not None:
                    images = fact(answer, "images", int)
                    if not 0 <= images < 1 << 40:
                        raise InputError(f"expected a number of images, got {images}")
                    classes = answer.facts.get("classes", [])
                    if not isinstance(classes, list) or any(type(number) is not int for number in classes):
                        raise InputError(f"expected numbers of classes, got {classes}")
                    member = Member(asked.node, fact(answer, "run", str), images, tuple(classes))
                    self.by_client[asked.client] = member
                    self.sizes[asked.client] = images
                case "refused":
                    raise InputError(fact(answer, "why", str))
                case other:
                    raise InputError(f"expected another answer than {other!r}")
        except InputError as error:
            self._refused.add(asked.node)
            self.note(f"a node was left out: {error}")

    def _client(self, hello: Letter) -> int:
        client: int = fact(hello, "client", int)
        version = fact(hello, "version", str)
        if version != __version__:
            raise InputError(f"client {client} runs fedtalos {version}, the server {__version__}; install one version")
        if not 0 <= client < self.num_clients:
            raise InputError(f"it says that it is client {client}; the run has clients 0 to {self.num_clients - 1}")
        taken = {asked.client for asked in self._joining.values()} | self.by_client.keys()
        if client in taken:
            raise InputError(f"it says that it is client {client}, which another node is")
        return client
