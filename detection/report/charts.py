"""Line charts: the geometry is computed here, the template makes SVG of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import LogLocator, MaxNLocator

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: what the legend says.
        points: (x, y), x rising.
        style: class that gives colour and dashes.
        depth: place of the layer in the network, 0 the first and 1 the last; None: no layer.
    """

    name: str
    points: Points
    style: str = "tone-0"
    depth: float | None = None


@dataclass(frozen=True)
class Chart:
    """A line chart as positions in a picture of `width` x `height` units, about pixels on a page."""

    title: str
    y_label: str
    x_label: str
    summary: str
    paths: list[dict[str, Any]]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    layers: tuple[str, str] | None  # first and last, where lines are coloured by depth
    width: int = 360
    height: int = 230
    left: int = 46
    right: int = 350
    top: int = 22
    bottom: int = 192


def draw_chart(
    title: str,
    lines: Sequence[Line],
    y_label: str,
    x_label: str = "epoch",
    *,
    limits: tuple[float, float] | None = None,
    may_be_logarithmic: bool = False,
) -> Chart | None:
    """A chart of the lines; None if none of them has a point. The vertical axis starts at 0 unless it is logarithmic.

    Args:
        title: above the chart.
        lines: drawn in this order.
        y_label: name and unit of the vertical axis.
        x_label: the same of the horizontal one. Ticks are whole numbers for "epoch".
        limits: of both axes, where they are given by what is drawn.
        may_be_logarithmic: whether positive values over more than a factor of 10 get a logarithmic axis.
    """
    lines = [
        Line(line.name, [point for point in line.points if all(map(math.isfinite, point))], line.style, line.depth)
        for line in lines
    ]
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    x_values = [x for line in lines for x, _ in line.points]
    y_values = [y for line in lines for _, y in line.points]
    x_low, x_high = limits or (min(x_values), max(x_values))
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    logarithmic = may_be_logarithmic and 0 < 10 * min(y_values) < max(y_values)
    if limits is not None:
        y_low, y_high = limits
    elif logarithmic:
        y_low, y_high = min(y_values) / 1.15, max(y_values) * 1.15
    else:
        y_low, y_high = min(0.0, *y_values), 1.05 * max(0.0, *y_values) or 1.0
    chart = Chart  # its defaults are the frame

    def to_x(x: float) -> float:
        return chart.left + (chart.right - chart.left) * (x - x_low) / (x_high - x_low)

    def to_y(y: float) -> float:
        if logarithmic:
            y, low, high = math.log(y), math.log(y_low), math.log(y_high)
        else:
            low, high = y_low, y_high
        return chart.bottom - (chart.bottom - chart.top) * (y - low) / (high - low)

    paths = []
    for line in lines:
        first, last = line.points[0][1], line.points[-1][1]
        value = f"{line.name}: {first:.4g} \N{RIGHTWARDS ARROW} {last:.4g}"
        points = [(to_x(x), to_y(y)) for x, y in line.points]
        paths.append(
            {
                "name": line.name,
                "style": line.style if line.depth is None else "layer",
                "depth": line.depth,
                "title": value,
                "d": "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points),
                "dot": points[0] if len(points) == 1 else None,
            }
        )
    layers = [line.name for line in lines if line.depth is not None]
    if layers:
        ends = [line.points[-1][1] for line in lines if line.depth is not None]
        summary = f"{title}, {len(layers)} layers, at the end from {min(ends):.3g} to {max(ends):.3g}"
    else:
        shown = [path["title"] for path in paths[:8]]
        summary = f"{title}. " + "; ".join(shown) + (f"; {len(paths) - 8} more" if len(paths) > 8 else "")
    x_locator = MaxNLocator(6, integer=x_label == "epoch", min_n_ticks=1, steps=[1, 2, 5, 10])
    y_ticks = _ticks(LogLocator(subs=(1, 2, 5)) if logarithmic else MaxNLocator(5), y_low, y_high)
    if logarithmic and len(y_ticks) > 7:
        y_ticks = _ticks(LogLocator(), y_low, y_high)
    return Chart(
        title=title,
        y_label=y_label + (", logarithmic" if logarithmic else ""),
        x_label=x_label,
        summary=summary,
        paths=paths,
        x_ticks=[(to_x(x), f"{x:g}") for x in _ticks(x_locator, x_low, x_high)],
        y_ticks=[(to_y(y), _short(y)) for y in y_ticks],
        layers=(layers[0], layers[-1]) if layers else None,
    )


def _ticks(locator: MaxNLocator | LogLocator, low: float, high: float) -> list[float]:
    """Round numbers between the limits."""
    slack = 1e-9 * (high - low)
    return [float(tick) for tick in locator.tick_values(low, high) if low - slack <= tick <= high + slack]


def _short(value: float) -> str:
    """A tick's label of at most six letters."""
    value = 0.0 if abs(value) < 1e-12 else value
    return (
        f"{value:.3g}"
        if 1e-2 <= abs(value) < 1e4 or not value
        else f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    )
