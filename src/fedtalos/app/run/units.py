"""Numbers as people read them: per cent, megabytes, thousands apart, times in the unit that fits."""

import math


def thousands(number: float, digits: int = 0) -> str:
    """Write a number with its thousands apart.

    >>> thousands(677482)
    '677 482'
    """
    return f"{number:,.{digits}f}".replace(",", " ")


def percent(share: float) -> str:
    """Write a share as per cent; a dash where it is not known.

    >>> percent(0.4567)
    '45.7 %'
    """
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"


def megabytes(count: float) -> str:
    """Write bytes as megabytes, with one digit after the point where they are few.

    >>> megabytes(2_500_000)
    '2.5 MB'
    """
    return f"{thousands(count / 1e6, 1 if count < 1e8 else 0)} MB"


def duration(seconds: float) -> str:
    """Write seconds in the unit that fits.

    >>> duration(150)
    '2.5 min'
    """
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
