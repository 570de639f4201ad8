"""Words for messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'NAME'? (allowed: ...)", the question only where a known name is close."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return (f"; did you mean {close[0]!r}?" if close else "") + f" (allowed: {', '.join(known)})"


def plural(number: int, singular: str, several: str | None = None) -> str:
    """Return such as "1 layer", "2 layers"."""
    return f"{number} {singular if number == 1 else several or singular + 's'}"


def shorten(value: object, length: int = 80) -> str:
    """Return the repr of a value, its middle left out where it is longer."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 4]} ..."
