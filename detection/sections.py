"""Parts of a page about a run: sections of paragraphs (plain strings), tables, bars, figures and pictures.

A task brings sections of its own, see `Task.sections`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from detection.records import Evaluation

if TYPE_CHECKING:  # a training draws at its end only, and matplotlib is slow to import
    from matplotlib.figure import Figure


class Cell(NamedTuple):
    """A number in a table: its text, what its column is sorted by, and the length of a bar below it, in [0, 1]."""

    shown: str
    value: float | None = None
    share: float | None = None


class Table(NamedTuple):
    """Rows of texts and `Cell`s; a column of cells is one of numbers. The first column names the rows.

    Attributes:
        title: what it has, for a screen reader.
        columns: their names.
        rows: as many items as columns each.
        sortable: whether a reader may sort it.
        code: whether the first column is names in a program.
        lead: whether the first row is what the others are compared with.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    sortable: bool = True
    code: bool = False
    lead: bool = False
    kind = "table"

    @property
    def numeric(self) -> list[bool]:
        """For each column whether it is one of numbers."""
        return [all(isinstance(item, Cell) for item in column) for column in zip(*self.rows, strict=True)]


class Bar(NamedTuple):
    """A bar: length in [0, 1], colour (a class of the style sheet), and a pale continuation."""

    share: float
    style: str = "cold-0"
    rest: float = 0.0


class Bars(NamedTuple):
    """Rows of a name, one bar or more below each other, and as many texts."""

    rows: Sequence[tuple[str, Sequence[Bar], Sequence[str]]]
    kind = "bars"


class Charts(NamedTuple):
    """Figures side by side, as many as there is room for; small ones are histograms."""

    figures: Sequence[Figure]
    small: bool = False
    kind = "charts"


class Map(NamedTuple):
    """A small grey picture as a data URI, what it shows in words, the lines of its caption, width over height."""

    image: str
    alt: str
    caption: Sequence[str]
    ratio: float


class Picture(NamedTuple):
    """A figure of an image, its caption, and maps below it."""

    figure: Figure
    caption: str
    maps: Sequence[Map] = ()


class Gallery(NamedTuple):
    """Pictures side by side."""

    pictures: Sequence[Picture]
    kind = "gallery"


class Key(NamedTuple):
    """An entry of a legend: a name, a colour, and whether its line is dashed."""

    name: str
    colour: str
    dashed: bool = False


class Legend(NamedTuple):
    """Colours of boxes and their names."""

    keys: Sequence[Key]
    kind = "legend"


class Words(NamedTuple):
    """A text by its kind: "heading", "note", "missing" (why something is left out) or "code", which has a title."""

    text: str
    kind: str
    title: str = ""


class Details(NamedTuple):
    """Parts that are folded away until a reader asks for them."""

    summary: str
    parts: Sequence[Any]
    kind = "details"


class Section(NamedTuple):
    """A section of a page.

    Attributes:
        key: end of its id.
        name: in the contents.
        heading: above it.
        parts: in their order; none where there is nothing to show.
        why: a sentence for that case; "": what keeps the run from being evaluated.
    """

    key: str
    name: str
    heading: str
    parts: Sequence[Any]
    why: str = ""


class Examination(NamedTuple):
    """An evaluation as it would be logged, and parts of the task's own sections by their keys, beside the log."""

    evaluation: Evaluation
    parts: Mapping[str, Sequence[Any]] = {}


def score(value: float, *, bar: bool = False) -> Cell:
    """Return a number in [0, 1] with three digits; pycocotools' -1 for undefined in words."""
    return Cell("undefined" if value == -1 else f"{value:.3f}", value, max(value, 0.0) if bar else None)


def percent(share: float, *, bar: bool = False) -> Cell:
    """Return a share in percent."""
    return Cell(f"{100 * share:.1f} %", share, share if bar else None)


def count(number: int) -> Cell:
    """Return a number of things."""
    return Cell(str(number), number)
