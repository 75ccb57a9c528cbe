"""Notes on what was decided for the user: images left out, statistics guessed, a precision chosen.

Whoever decides calls ``note``; a program shows the notes and keeps them with its results.
"""

import logging

from fedtalos.errors import printable

log = logging.getLogger(__name__)

_noted: dict[str, str] = {}


def note(what: str, sentence: str) -> None:
    """Note a decision about ``what`` in one sentence; it is logged, and kept until ``noted`` is asked.

    >>> note("images", "3 of 140 files are no images and were left out: notes.txt, ...")
    """
    sentence = printable(sentence)  # names of files in it may be a stranger's
    if _noted.get(what) != sentence:
        _noted[what] = sentence
        log.info("%s: %s", what, sentence)


def noted() -> dict[str, str]:
    """Take all notes since the last call, by what they are about.

    >>> noted()
    {'images': '3 of 140 files are no images and were left out: notes.txt, ...'}
    """
    taken = dict(_noted)
    _noted.clear()
    return taken
