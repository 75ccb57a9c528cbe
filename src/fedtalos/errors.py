"""The one exception that is the user's to mend: the command line prints it as a sentence and exits with 2."""


class InputError(Exception):
    """Bad input; the message says what was expected, what came and what to do.

    Not a ValueError: pydantic and tyro take those for their own.
    """
