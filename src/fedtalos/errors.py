"""Errors that a user can act on: bad input, and training that cannot go on."""

import difflib
import re
from collections.abc import Iterable
from typing import get_args


class InputError(Exception):
    """Bad input: the message says what was expected, what came and what to do.

    The command line prints it as one sentence and exits with 2. It is no ValueError, for pydantic and tyro catch those.

    >>> raise InputError("val_fraction 2.0: expected a share between 0 and 1, such as 0.1")
    Traceback (most recent call last):
    fedtalos.errors.InputError: val_fraction 2.0: expected a share between 0 and 1, such as 0.1
    """

    def __init__(self, message: str) -> None:
        """Names in ``message`` may come from strangers: it becomes one line of print, of words of some length."""
        line = printable(message.replace("\n", " "))
        super().__init__(re.sub(r"\S{141,}", lambda word: shortened(word[0], 140), line))


class TrainingError(RuntimeError):
    """Training cannot go on: the message says where it stopped and what to try.

    >>> raise TrainingError("round 3, client 7: the loss became nan; try a lower learning_rate")
    Traceback (most recent call last):
    fedtalos.errors.TrainingError: round 3, client 7: the loss became nan; try a lower learning_rate
    """


class BadUpdateError(TrainingError):
    """One client's training diverged; other clients' updates remain valid."""


def install(extra: str) -> str:
    """Tell how to install an extra; for now from the checkout, since there is no release yet."""
    return f"in the checkout: pip install -c constraints.txt -e '.[{extra}]'"


def printable(text: str) -> str:
    """Spell out characters that a terminal would act on; line ends stay.

    >>> printable("name\\x1b[2J")
    'name\\\\x1b[2J'
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, most: int) -> str:
    """Cut the middle out of a text of more than ``most`` characters.

    >>> shortened("a_very_long_name.safetensors", 20)
    'a_very_l...fetensors'
    """
    if len(text) <= most:
        return text
    start = max(0, most - 3) // 2
    return f"{text[:start]}...{text[len(text) - (most - 3 - start) :]}"


def shown(value: object) -> str:
    """Quote ``value`` for an error message, cut to 80 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python writes out
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest(name: str, known: Iterable[str]) -> str:
    """Suggest the known name that is most alike, large or small letters, as the end of a sentence, or nothing.

    >>> nearest("num_clents", ["num_clients", "num_rounds"])
    "; did you mean 'num_clients'?"
    """
    by_small = {other.casefold(): other for other in known}
    close = difflib.get_close_matches(name[:100].casefold(), by_small, n=1)
    return f"; did you mean {shown(by_small[close[0]])}?" if close else ""


def check_word(what: str, word: object, words: object) -> None:
    """Refuse a word that is none of a Literal's, with an InputError that lists them and suggests the nearest.

    >>> check_word("optimizer", "adam", Literal["sgd", "adamw"])
    Traceback (most recent call last):
    fedtalos.errors.InputError: optimizer 'adam': expected one of sgd, adamw; did you mean 'adamw'?
    """
    known = get_args(words)
    if word not in known:
        raise InputError(f"{what} {shown(word)}: expected one of {', '.join(known)}{nearest(str(word), known)}")
