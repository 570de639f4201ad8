"""Foreign names in figures: taken literally, in a font that has their letters, or else in Latin ones."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from functools import cache

from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, FontProperties, findfont, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

from detection.text import is_plain, say

LOST = "\N{REPLACEMENT CHARACTER}"
UNFIT = ("Last Resort", "cm", "STIXNon", "STIXSize")  # boxes for any letter, and symbols in the place of letters
_FOUND: dict[str, str | None] = {}  # letter -> family of the installed font that draws it; None: there is none


def one_line(text: str) -> str:
    """Return a name without line breaks and other control characters."""
    return "".join(letter if is_plain(letter) else LOST for letter in text)


def drawable(text: str) -> str:
    """Return a name as one line that can be drawn: letters that no font here has are replaced by Latin ones."""
    text = one_line(text)
    missing = [letter for letter in _look_for(text) if _FOUND[letter] is None]
    if not missing:
        return text
    from anyascii import anyascii

    _say_once()
    for letter in missing:
        text = text.replace(letter, anyascii(letter) or (LOST if unicodedata.category(letter)[0] != "M" else ""))
    return text


def take_literally(text: Text) -> Text:
    """Keep matplotlib from taking dollar signs for mathematics, and let it look for letters in more than one font."""
    text.set_parse_math(False)
    families = [_FOUND[letter] for letter in _look_for(text.get_text()) if _FOUND[letter]]
    text.set_fontfamily(list(dict.fromkeys([*text.get_fontfamily(), *families])))
    return text


def take_all_literally(figure: Figure, spell: Callable[[str], str] = drawable) -> None:
    """Take all texts of a figure literally, each of their lines as `spell` gives it: by letters that can be drawn."""
    for text in figure.findobj(Text):
        text.set_text("\n".join(map(spell, text.get_text().split("\n"))))
        take_literally(text)


@cache
def _say_once() -> None:
    say(
        "pictures: no font here has all letters of some names, which are spelt in Latin letters; a font such as Noto "
        "Sans CJK, installed, would draw them",
        error=True,
    )


def _look_for(text: str) -> list[str]:
    """The letters of a text that the usual font does not have; afterwards `_FOUND` has them all."""
    usual = _usual_letters()
    odd = list(dict.fromkeys(letter for letter in text if ord(letter) not in usual and letter != "\n"))
    sought = {letter for letter in odd if letter not in _FOUND}
    for entry in _fonts() if sought else ():
        try:
            font = FT2Font(entry.fname)
        except (OSError, RuntimeError):  # gone since matplotlib made its list, or damaged
            continue
        had = {letter for letter in sought if font.get_char_index(ord(letter))}
        _FOUND.update(dict.fromkeys(had, entry.name))
        sought -= had
        if not sought:
            break
    _FOUND.update(dict.fromkeys(sought))
    return odd


@cache
def _usual_letters() -> frozenset[int]:
    return frozenset(FT2Font(findfont(FontProperties(family=["sans-serif"]))).get_charmap())


def _fonts() -> Iterator[FontEntry]:
    """The installed fonts, those first that look most like the usual one."""
    known = [entry for entry in fontManager.ttflist if not entry.name.startswith(UNFIT)]
    yield from sorted(
        known,
        key=lambda entry: (
            entry.style != "normal",
            entry.weight not in (400, "normal", "regular", "book"),
            "Sans" not in entry.name,
            entry.name,
        ),
    )
