"""Figures of matplotlib: a panel with lines, and figures as files, one PNG of several or SVG to stand in a page."""

from __future__ import annotations

import base64
import html
import io
import itertools
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image

from detection.files import write_whole
from detection.fonts import one_line, take_all_literally

# A panel of 4 inches is as wide as a telephone, on which letters of 8.5 points can just be read. All in inches.
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, MARGIN, LEGEND_ROW = 4.0, 2.05, 0.55, 0.58, 0.5, 0.13, 0.17
SHEET = 12  # inches that figures side by side may take in a PNG
DPI, PICTURE_DPI = 150, 160  # of a PNG; of pictures in an SVG, in which all else has no pixels
PNG_LEVEL = 4  # of compression: files are a hundredth larger than by PIL's 6, and written in half the time
TEXT_SIZE = 8.5  # points
LETTER, MAX_NAME = 0.074, 44  # inches of a letter in a legend, and how many of them fit into a panel
GREY, INK, LIGHT = "#525d6b", "#18202b", "#d5dae1"
# All have a contrast of 3 and more on white. Together with the dashes they tell 32 lines apart.
COLOURS = ("#0b66c3", "#b45309", "#00756c", "#a3268f", "#8a6100", "#5b4bc4", "#b3261e", "#52606f")
DASHES: Sequence[Any] = ("-", (0, (6, 2)), (0, (1.5, 1.5)), (0, (7, 2, 1.5, 2)))
ARROW, ELLIPSIS = "\N{RIGHTWARDS ARROW}", "\N{HORIZONTAL ELLIPSIS}"
Points = Sequence[tuple[float, float]]


class Line(NamedTuple):
    """A line of a chart: points (x, y) with x rising, matplotlib's style, and whether the legend has it."""

    name: str
    points: Points
    style: Mapping[str, Any]
    named: bool = True

    @property
    def words(self) -> str:
        """Name, first and last value."""
        values = dict.fromkeys(f"{value:.4g}" for value in (self.points[0][1], self.points[-1][1]))
        return f"{self.name}: {f' {ARROW} '.join(values)}"

    @property
    def look(self) -> dict[str, Any]:
        """The whole style; a single point is a dot, since a line would show nothing."""
        dot = {"linestyle": "none"} if len(self.points) == 1 else {}
        return {"linewidth": 1.5} | ({"marker": "o", "markersize": 4} if dot else {}) | self.style | dot


def style_of(index: int) -> dict[str, Any]:
    """Return colour and dashes of a chart's line number `index`."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[(index + index // len(COLOURS)) % len(DASHES)]}


def draw_panel(
    title: str, lines: Sequence[Line], label: str, x_label: str = "epoch", *, may_be_logarithmic: bool = False
) -> Figure | None:
    """Return a line chart with its legend below; None if no line has a point.

    The vertical axis starts at 0, or lower for negative values, unless it is logarithmic.

    Args:
        title: the quantity, above the chart.
        lines: drawn in this order; points that are not finite are left out.
        label: unit of the vertical axis, below the title.
        x_label: name and unit of the horizontal axis. Ticks are whole numbers for "epoch" and "time steps".
        may_be_logarithmic: whether values of 0 and more over more than a factor of 10 get a logarithmic axis.
    """
    lines = [line._replace(points=[point for point in line.points if all(map(math.isfinite, point))]) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    named = [line for line in lines if line.named]
    columns = max(1, int((WIDTH - 0.2) / (0.5 + LETTER * max((len(shorten(line.name)) for line in named), default=0))))
    height = TOP + HEIGHT + BOTTOM + LEGEND_ROW * math.ceil(len(named) / columns) + MARGIN
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    place = (LEFT / WIDTH, 1 - (TOP + HEIGHT) / height, 1 - (LEFT + MARGIN) / WIDTH, HEIGHT / height)
    axes = figure.add_axes(place)
    for line in lines:
        set_title(axes.plot(*zip(*line.points, strict=True), **line.look)[0], line.words)
    low, high = (limit(x for line in lines for x, _ in line.points) for limit in (min, max))
    axes.set_xlim(low, high) if low < high else axes.set_xlim(low - 0.5, low + 0.5)
    logarithmic = _scale(axes, [y for line in lines for _, y in line.points], may_be_logarithmic)
    axes.xaxis.set_major_locator(
        MaxNLocator(6, integer=x_label in ("epoch", "time steps"), min_n_ticks=1, steps=[1, 2, 5, 10])
    )
    axes.set_xlabel(x_label, fontsize=TEXT_SIZE, color=GREY, labelpad=2)
    clean(axes)
    text = {"x": MARGIN / WIDTH, "ha": "left", "va": "top"}
    figure.text(y=1 - 0.08 / height, s=title, fontsize=10, fontweight="bold", color=INK, **text)
    unit = label + (", logarithmic" if logarithmic else "")
    figure.text(y=1 - 0.29 / height, s=unit, fontsize=TEXT_SIZE, color=GREY, **text)
    if named:
        _draw_legend(figure, named, columns, 1 - (TOP + HEIGHT + BOTTOM - 0.06) / height)
    parts = [line.words for line in named[:8]]
    parts += [f"{len(lines) - len(parts)} lines more"] if len(lines) > len(parts) else []
    figure.set_label(f"{title}. {'; '.join(parts)}")
    return figure


def _scale(axes: Axes, y: Sequence[float], may_be_logarithmic: bool) -> bool:
    """Set limits and ticks of the vertical axis, and return whether it is logarithmic."""
    # A single 0 must not force the others onto a linear scale; a negative value has to.
    positive = [value for value in y if value > 0]
    logarithmic = may_be_logarithmic and min(y) >= 0 and bool(positive) and max(positive) > 10 * min(positive)
    if logarithmic:
        axes.set_yscale("log", nonpositive="mask")
        axes.set_ylim(min(positive) / 1.15, max(positive) * 1.15)
        subs = (1, 2, 5) if max(positive) < 100 * min(positive) else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(1.06 * min(0.0, *y), 1.06 * max(0.0, *y) or 1)
        axes.yaxis.set_major_locator(MaxNLocator(5))
    return logarithmic


def _draw_legend(figure: Figure, lines: Sequence[Line], columns: int, top: float) -> None:
    place = {"loc": "upper left", "bbox_to_anchor": (MARGIN / WIDTH, top), "borderaxespad": 0, "borderpad": 0}
    spacing = {"handlelength": 2.2, "handletextpad": 0.5, "columnspacing": 1.2, "labelspacing": 0.35}
    style = {"ncols": columns, "frameon": False, "fontsize": TEXT_SIZE}
    legend = figure.legend(
        [Line2D([], [], **line.look) for line in lines], "x" * len(lines), **style, **place, **spacing
    )
    for text, line in zip(legend.get_texts(), lines, strict=True):  # matplotlib hides names that begin with "_"
        text.set(text=shorten(line.name), color=INK)


def clean(axes: Axes, size: float = TEXT_SIZE) -> None:
    """Leave of an axes' frame the grid and the numbers."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#8b95a1")
    axes.grid(axis="y", color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=size, labelcolor=GREY)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, place: short_number(value)))


def shorten(name: str, length: int = MAX_NAME) -> str:
    """Return a name of at most so many letters: its end, which tells it from others more often than its beginning."""
    name = one_line(name)
    if len(name) <= length:
        return name
    return ELLIPSIS + re.sub(r"^[^.]*\.(?=[a-z_])", "", name[1 - length :])  # a layer's name from a whole word on


def short_number(value: float) -> str:
    """Return a tick's label of at most six letters."""
    value = 0.0 if abs(value) < 1e-12 else value
    if 1e-2 <= abs(value) < 1e4 or not value:
        return f"{value:.4g}"
    return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e")


# Files


def set_title(artist: Artist, title: str) -> None:
    """Give a part of a figure a title, which a browser shows when the pointer rests on it."""
    artist.set_gid(f"title: {one_line(title)}")


def save_png(figures: Figure | Sequence[Figure], path: str | PathLike[str]) -> None:
    """Write figures into one PNG file: those of equal width in even rows of at most 12 inches, in their order."""
    figures = [figures] if isinstance(figures, Figure) else figures
    rows: list[list[Image.Image]] = []
    for width, equal in itertools.groupby(figures, key=Figure.get_figwidth):
        pictures = [_pixels(figure) for figure in equal]
        columns = math.ceil(len(pictures) / math.ceil(len(pictures) / max(1, int(SHEET / width))))
        rows += [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    heights = [max(picture.height for picture in row) for row in rows]
    size = (max(sum(picture.width for picture in row) for row in rows), sum(heights))
    sheet = Image.new("RGB", size, "white")
    for index, row in enumerate(rows):
        for column, picture in enumerate(row):
            sheet.paste(picture, (sum(other.width for other in row[:column]), sum(heights[:index])))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", compress_level=PNG_LEVEL)
    write_whole(Path(path), buffer.getvalue())


def _pixels(figure: Figure) -> Image.Image:
    take_all_literally(figure)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def to_svg(figure: Figure, name: str = "figure") -> str:
    """Return a figure as an SVG element for an HTML page: it takes the width there is and needs no other file.

    Equal figures give equal text. The figure's label (`figure.set_label`) is what a screen reader says; titles of its
    parts are those of `set_title`. Photographs are stored as JPEG.

    Args:
        figure: the figure.
        name: begins all ids in it, so that no two figures of a page share one.
    """
    take_all_literally(figure, one_line)
    buffer = io.BytesIO()
    style = matplotlib.rc_context({"svg.hashsalt": "hoyer-det", "svg.fonttype": "none"})
    with style, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a browser has fonts of its own
        figure.savefig(buffer, format="svg", dpi=PICTURE_DPI, metadata={"Date": None})
    svg = buffer.getvalue().decode()
    svg = re.sub(r"\n\s*", " ", svg[svg.index('<g id="figure_1"') :])  # behind metadata, and a style for the whole page
    svg = re.sub("[^\t\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", svg)  # XML cannot hold the others
    svg = re.sub(r"""<g id=(["'])title: (.*?)\1>""", r"<g><title>\2</title>", svg.replace("xlink:href", "href"))
    svg = re.sub("<[^<>]*>", lambda found: _shorten_tag(found[0], name), svg)  # between them stand foreign names
    box = " ".join(f"{72 * inches:g}" for inches in figure.get_size_inches())
    label = html.escape(one_line(str(figure.get_label())))
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {box}" role="img" aria-label="{label}"'
    return f'{start} style="stroke-linejoin: round">{svg}'


def _shorten_tag(tag: str, name: str) -> str:
    """A tag with an id of its own, fewer digits, any font and a smaller picture."""
    tag = re.sub(r'(<.* (?:id="|href="#|clip-path="url\(#))', rf"\g<1>{name}-", tag)
    tag = re.sub(' (?:d|x|y)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), tag)
    tag = re.sub("'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", tag)
    return re.sub('data:image/png;base64,([^"]*)', lambda found: _to_jpeg(found[1]), tag)


def _to_jpeg(png: str) -> str:
    return data_uri(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), "JPEG", quality=85)


def data_uri(image: Image.Image, kind: str, **options: int) -> str:
    """Return an image as the address that holds it whole; `kind` is PNG or JPEG, `options` are those of PIL."""
    buffer = io.BytesIO()
    image.save(buffer, kind, optimize=True, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
