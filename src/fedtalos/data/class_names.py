"""Class names: of folders, as people read them, and what to say where two lists of them differ."""

import unicodedata
from collections.abc import Iterable, Sequence

from fedtalos.errors import InputError, shortened, shown

LONGEST = 120
"""Characters of each name in a list of some."""


def class_name(folder: str) -> str:
    """Spell a folder's name in one way (NFC): macOS may write an accent apart from its letter (NFD).

    Raises InputError for bytes that are no text.

    >>> class_name("cafe\\u0301") == "caf\\u00e9"
    True
    """
    try:
        folder.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the class {shown(folder)} has a name that is no UTF-8: rename it") from error
    return unicodedata.normalize("NFC", folder)


def some(names: Iterable[str], most: int = 3) -> str:
    """List the first few names, and how many more there are.

    >>> some(["cat", "dog", "fox", "owl", "yak"])
    'cat, dog, fox and 2 more'
    """
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shortened(name, LONGEST) for name in names[:most]) + more


def nor_others(names: Sequence[str]) -> str:
    """Tell of how many others a sentence that denies something of one is true, as its end; nothing where of none.

    >>> "a.png is not an image" + nor_others(["b.png"])
    'a.png is not an image, nor is 1 other (b.png)'
    """
    count = len(names)
    return f", nor {'is 1 other' if count == 1 else f'are {count} others'} ({some(names)})" if names else ""


def check_same_classes(then: Sequence[str], now: Sequence[str], trained: str) -> None:
    """Refuse, with an InputError, data whose classes are not those of a model that was ``trained`` on others.

    >>> check_same_classes(["cat", "dog"], ["cat", "fox"], "checkpoint pets/last.json")
    Traceback (most recent call last):
    fedtalos.errors.InputError: checkpoint pets/last.json knows 2 classes and the data have 2, without 'dog', with new
    'fox': give the data that it was trained on, or train anew with a new head
    """
    before, after = [class_name(name) for name in then], [class_name(name) for name in now]
    if before == after:
        return
    were, are = set(before), set(after)
    gone, new = ([shown(n) for n in names if n not in known] for names, known in ((before, are), (after, were)))
    differ = ", ".join(
        [*([f"without {some(gone)}"] if gone else []), *([f"with new {some(new)}"] if new else [])]
    ) or "in another order"  # fmt: skip
    raise InputError(
        f"{trained} knows {len(before)} classes and the data have {len(after)}, {differ}: give the data that it was "
        "trained on, or train anew with a new head"
    )
