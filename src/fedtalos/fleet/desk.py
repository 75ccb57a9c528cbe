"""The desk of a node: the process that keeps images and model ready answers the short-lived ones that Flower starts.

Flower starts a program for every message. It knows the desk by two environment variables, and hands the letter over
on loopback; both sides prove by a key that they belong together (``multiprocessing.connection``, bytes alone).
"""

import os
import secrets
import socket
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import TYPE_CHECKING

from fedtalos.errors import InputError
from fedtalos.fleet.letter import Letter

if TYPE_CHECKING:
    from fedtalos.fleet.node import Node  # imports torch, which the programs that ask do without

PLACE, KEY = "FEDTALOS_DESK", "FEDTALOS_DESK_KEY"
"""Environment variables with the desk's port on loopback, and its key."""


class Desk:
    """Answers letters that come to a port on loopback, one at a time, until it is closed.

    >>> with Desk() as desk:
    ...     desk.serve(node)
    """

    def __init__(self) -> None:
        self._closed = False
        self._key = secrets.token_bytes(32)
        self._listener = Listener(("127.0.0.1", 0), authkey=self._key)
        self._address: tuple[str, int] = self._listener.address

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables by which a program finds the desk."""
        return {PLACE: str(self._address[1]), KEY: self._key.hex()}

    def serve(self, node: "Node") -> None:
        """Answer by a node until the desk is closed."""
        while not self._closed:
            with suppress(EOFError, OSError, AuthenticationError), self._listener.accept() as connection:
                connection.send_bytes(answer(node, connection))

    def __enter__(self) -> "Desk":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take no more letters."""
        if self._closed:
            return
        self._closed = True
        with suppress(OSError):
            socket.create_connection(self._address, timeout=1).close()  # wakes the one that waits
        self._listener.close()


def answer(node: "Node", connection: "Connection[bytes, bytes]") -> bytes:
    """Read a letter, and write the node's answer."""
    try:
        letter = Letter.read(connection.recv_bytes())
    except InputError as error:
        return Letter("refused", {"why": str(error)}).written()
    return node.answer(letter).written()


def ask_desk(letter: bytes, environment: Mapping[str, str] = os.environ) -> bytes:
    """Hand a written letter to the desk of this node, and wait for the answer.

    Raises InputError where this process was not started by ``fleet node``, OSError where the desk is gone.
    """
    if PLACE not in environment or KEY not in environment:
        raise InputError("this node was not started by `fedtalos fleet node`; start it so")
    with Client(("127.0.0.1", int(environment[PLACE])), authkey=bytes.fromhex(environment[KEY])) as connection:
        connection.send_bytes(letter)
        return connection.recv_bytes()
