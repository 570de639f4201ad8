"""Words for messages."""

from __future__ import annotations

import difflib
import statistics
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from numbers import Integral

JOINERS = "\u200c\u200d"  # invisible, but without them some scripts and emoji are spelt wrong


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'NAME'? (allowed: ...)", the question only where a known name is close."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return (f"; did you mean {close[0]!r}?" if close else "") + f" (allowed: {', '.join(known)})"


def require_whole(name: str, value: object, least: int = 1) -> None:
    """Raise ValueError unless a value is a whole number, and large enough."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")


def plural(number: int, singular: str, several: str | None = None) -> str:
    """Return such as "1 layer", "2 layers"."""
    return f"{number} {singular if number == 1 else several or singular + 's'}"


def spread(values: Sequence[float], digits: int) -> str:
    """Return the mean, and the standard deviation where there are several values."""
    text = f"{statistics.mean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def shorten(value: object, length: int = 80) -> str:
    """Return the repr of a value, its end left out where it is longer."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 4]} ..."


def printable(text: object, keep: str = "") -> str:
    """Return a text in which nothing commands a terminal: control characters and the like are written as escapes.

    These are "\\x1b", "\\n", marks of the direction of writing, and bytes of a file's name that are no UTF-8.

    Args:
        text: a name, or a sentence with foreign names in it.
        keep: control characters that stay, such as "\\n".
    """
    return "".join(letter if is_plain(letter) or letter in keep else _escape(letter) for letter in str(text))


def is_plain(letter: str) -> bool:
    """Return whether a character is one to be seen, a space, or joins two that are."""
    return letter.isprintable() or letter in JOINERS or unicodedata.category(letter) == "Zs"


def _escape(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":  # a byte of a file's name, as Python keeps those
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode()


def say(text: object, *, error: bool = False) -> None:
    """Print a line, on standard error if `error`; foreign names in it are made `printable`."""
    print(printable(text), file=sys.stderr if error else sys.stdout, flush=True)
