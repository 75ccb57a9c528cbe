"""Letters in Flower's records and messages: the one place that knows flwr's own types (1.41 and 1.42).

Each array is a record of its own, so what is the same in many letters, such as theta, reaches the server's network
process once.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import cast

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedtalos.errors import InputError
from fedtalos.fleet.letter import Arrays, Letter
from fedtalos.fleet.post import NoAnswer

KIND = "query.letter"
"""The type of all our messages; Flower leads those of this type to one function of the node's app."""


def record_of(letter: Letter, made: dict[int, Array] | None = None) -> RecordDict:
    """Write a letter as a record; ``made`` keeps Flower's copies of arrays that several letters share."""
    made = {} if made is None else made
    arrays = OrderedDict[str, Array]()
    for name, array in letter.arrays.items():
        if id(array) not in made:
            made[id(array)] = Array(array)
        arrays[name] = made[id(array)]
    return RecordDict({"letter": ConfigRecord({"heading": letter.heading}), "arrays": ArrayRecord(arrays)})


def letter_of(record: RecordDict) -> Letter:
    """Read a letter; InputError where a record holds none."""
    heading, arrays = record.config_records.get("letter"), record.array_records.get("arrays")
    if heading is None or arrays is None or not isinstance(heading.get("heading"), str):
        raise InputError("letter: expected a heading and arrays; is the other side fedtalos?")
    try:
        read: Arrays = {name: array.numpy() for name, array in arrays.items()}
    except (ValueError, TypeError, OSError) as error:
        raise InputError(f"letter: its arrays cannot be read ({error})") from error
    return Letter.of(str(heading["heading"]), read)


def travelled(record: RecordDict) -> RecordDict:
    """Write a record to the bytes that Flower sends and read them again; for tests without a network."""
    contents = {name: part.deflate() for name, part in get_all_nested_objects(record).items()}
    return cast(RecordDict, inflate_object_from_contents(record.object_id, contents))


class GridPost:
    """Carries letters over Flower's Grid.

    >>> post = GridPost(grid)
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def nodes(self) -> set[int]:
        return set(self._grid.get_node_ids())

    def send(self, letters: Mapping[int, Letter], deadline: float) -> dict[int, str]:
        made = dict[int, Array]()
        messages = [
            Message(record_of(letter, made), dst_node_id=node, message_type=KIND, ttl=deadline)
            for node, letter in letters.items()
        ]
        tickets = list(self._grid.push_messages(messages))
        return {node: ticket for node, ticket in zip(letters, tickets, strict=False) if ticket}

    def collect(self, tickets: Iterable[str]) -> dict[str, Letter | NoAnswer]:
        wanted = list(tickets)
        answers = self._grid.pull_messages(wanted) if wanted else []
        return {message.metadata.reply_to_message_id: _answer(message) for message in answers}


def _answer(message: Message) -> Letter | NoAnswer:
    if message.has_error():
        return NoAnswer(f"{message.error.reason or 'no reason given'} (code {message.error.code})")
    try:
        return letter_of(message.content)
    except InputError as error:
        return NoAnswer(str(error))
