"""The one exception that is the user's to mend: the command line prints it as a sentence and exits with 2."""


class InputError(Exception):
    """Bad input; the message says what was expected, what came and what to do.

    Not a ValueError: pydantic and tyro take those for their own.
    """


def install(extra: str) -> str:
    """The command that a message about a missing extra ends with; for now there is no release, only the checkout."""
    return f"in the checkout: pip install -c constraints.txt -e '.[{extra}]'"


def shown(value: object) -> str:
    """``value`` as an error quotes it, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes out
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."
