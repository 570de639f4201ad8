"""Charts: a run over its epochs, precision over recall, variants and runs beside each other, metrics under noise.

Every function returns figures, which `detection.figures` writes as PNG or as SVG. A figure's label and the titles of
its lines say in words what it shows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from detection import figures
from detection.evaluation import PrecisionRecall, average_precision
from detection.records import EpochLog, Evaluation, Values

ANALOGUE, SPIKING = ("#b45309", "#a83a6b", "#8a6100", "#b3261e"), ("#0b66c3", "#00756c", "#5b4bc4", "#32718f")
DEPTH = LinearSegmentedColormap.from_list("depth", ["#8a1fa8", "#0b66c3", "#00856f"])  # first layer to last
WHOLE = {"color": figures.INK, "linewidth": 2.2, "zorder": 3}  # of lines for all of what the others are parts of
MARKS = "osD^vPX*"  # of variants and runs
# Titles and units of what spike layers log; anything else has its own name.
QUANTITIES = {
    "v_th": ("Threshold v_th", "v_th, membrane potential"),
    "extremum": ("Hoyer extremum E", "E, 0 to 1"),
    "hoyer_per_layer": ("Hoyer regulariser H", "H, mean over the epoch"),
    "hoyer_share_of_potential": ("Regulariser's share of du", "share of the gradient, last step"),
    "hoyer_share_of_threshold": ("Regulariser's share of dv_th", "share of the gradient, last step"),
}

# A run over its epochs


def points_of(history: Sequence[EpochLog], value: Callable[[EpochLog], float | None]) -> list[tuple[float, float]]:
    """Return (epoch, value) where there is one."""
    found = [(line.epoch, value(line)) for line in history]
    return [(epoch, float(number)) for epoch, number in found if number is not None]


def metric_of(evaluation: Evaluation | None, name: str) -> float | None:
    """Return a metric; None where there is none, or pycocotools' -1 for undefined."""
    value = evaluation.metrics.get(name) if evaluation else None
    return None if value == -1 else value


def activity_of(line: EpochLog) -> float | None:
    """Return the spike activity of an epoch in percent."""
    return 100 * line.metrics["activity"] if "activity" in line.metrics else None


def short_names(layers: Sequence[str]) -> dict[str, str]:
    """Return {layer: its name without the modules that all of them are in}."""
    paths = [layer.split(".") for layer in layers]
    while paths and all(len(path) > 1 and path[0] == paths[0][0] for path in paths):
        paths = [path[1:] for path in paths]
    return {layer: ".".join(path) for layer, path in zip(layers, paths, strict=True)}


def effective_thresholds(line: EpochLog) -> Values:
    """Return |v_th| * E of each spike layer: the membrane potential from which on it fires."""
    v_th, extremum = line.layers.get("v_th", {}), line.layers.get("extremum", {})
    return {name: abs(value) * extremum[name] for name, value in v_th.items() if name in extremum}


def draw_curves(history: Sequence[EpochLog], metrics: Sequence[str] = (), title: str = "Metrics") -> list[Figure]:
    """Return panels over the epochs: losses, metrics, spike activity, effective thresholds, learning rate, speed.

    A panel that would be empty is left out: a ReLU network has no activity.

    Args:
        history: the log of a run.
        metrics: of its evaluations, the most important one first.
        title: what they are called together.

    Raises:
        ValueError: the log is empty.
    """
    if not history:
        raise ValueError("history: nothing to draw in 0 epochs; a run has a log from its first epoch on")
    names = dict.fromkeys(name for line in history for name in line.losses)
    terms = [(name, points_of(history, lambda line, name=name: line.losses.get(name))) for name in names]
    terms = [(name, points) for name, points in terms if any(value for _, value in points)]  # 0 throughout: no use
    scores = [(name, points_of(history, lambda line, name=name: metric_of(line.evaluation, name))) for name in metrics]
    averaged = [(name, points_of(history, lambda line, name=name: metric_of(line.ema, name))) for name in metrics[:1]]
    scores += [(f"{name}, averaged weights", points) for name, points in averaged]
    activity = _lines_of_layers(
        history, lambda line: line.evaluation.activity_per_layer if line.evaluation else {}, 100
    )
    activity.append(figures.Line("whole network", points_of(history, activity_of), WHOLE))
    thresholds = _lines_of_layers(history, effective_thresholds)
    total = figures.Line("total", points_of(history, lambda line: line.loss), WHOLE)
    rate = figures.Line("learning rate", points_of(history, lambda line: line.lr), figures.style_of(0), named=False)
    speed = points_of(history, lambda line: line.images_per_second)
    panels = [
        figures.draw_panel("Training loss", [total, *_styled(terms)], "mean over the epoch", may_be_logarithmic=True),
        figures.draw_panel(title, _styled(scores), "on the evaluation images"),
        figures.draw_panel("Spike activity", activity, "neurons that fire, %"),
        figures.draw_panel("Effective threshold", thresholds, "|v_th| \N{MULTIPLICATION SIGN} E"),
        figures.draw_panel("Learning rate", [rate], "at the beginning of the epoch"),
        figures.draw_panel(
            "Training speed", [figures.Line("speed", speed, figures.style_of(0), named=False)], "images per second"
        ),
    ]
    return [panel for panel in panels if panel is not None]


def draw_dynamics(history: Sequence[EpochLog]) -> list[Figure]:
    """Return a panel for each quantity that spike layers log, such as v_th, a line per layer; none without them."""
    logged = dict.fromkeys(quantity for line in history for quantity in line.layers)
    panels = []
    for name in sorted(logged, key=[*QUANTITIES, *logged].index):
        lines = _lines_of_layers(history, lambda line, name=name: line.layers.get(name, {}))
        title, unit = QUANTITIES.get(name, (name, name))
        panels.append(figures.draw_panel(title, lines, unit))
    return [panel for panel in panels if panel is not None]


def draw_potentials(history: Sequence[EpochLog]) -> list[Figure]:
    """Return a histogram for each spike layer: its membrane potentials in the first and in the last evaluation.

    They are in units of the effective threshold, so that what is right of 1 fires. First in grey, last in blue.
    """
    found = [(line.epoch, line.evaluation.potentials) for line in history if line.evaluation]
    found = [(epoch, potentials) for epoch, potentials in found if potentials]
    names = short_names(list(found[-1][1])) if found else {}
    return [
        _draw_histogram(name, [(epoch, shares[layer]) for epoch, shares in found if layer in shares])
        for layer, name in names.items()
    ]


def _draw_histogram(name: str, found: Sequence[tuple[int, Sequence[float]]]) -> Figure:
    found = found if len(found) == 1 else [found[0], found[-1]]
    figure = Figure(figsize=(2.4, 1.75), dpi=figures.DPI)
    axes = figure.add_axes((0.05, 0.38, 0.9, 0.46))
    styles: list[dict[str, Any]] = [
        {"fill": True, "color": figures.LIGHT},
        {"color": figures.COLOURS[0], "linewidth": 1.4},
    ]
    text = {"fontsize": figures.TEXT_SIZE + 2, "va": "top"}
    figures.set_title(figure.text(0.05, 0.96, figures.shorten(name, 23), color=figures.INK, **text), name)
    notes = []
    for row, (epoch, shares) in enumerate(found):
        line = axes.stairs(100 * np.array(shares), np.linspace(-1, 3, len(shares) + 1), **styles[row - len(found)])
        notes.append(f"epoch {epoch}: {100 * sum(shares[len(shares) // 2 :]):.1f} % fire")
        figures.set_title(line, notes[-1])
        figure.text(
            0.05, 0.24 - 0.11 * row, notes[-1], color=(figures.GREY, figures.COLOURS[0])[row - len(found)], **text
        )
    axes.axvline(1, color=figures.COLOURS[1], linewidth=1.3, linestyle=(0, (3, 1.5)))
    axes.set(xlim=(-1, 3), xticks=[0, 1, 2], yticks=[])
    figures.clean(axes, figures.TEXT_SIZE + 2)
    figure.set_label(f"Membrane potentials of {name}, around the threshold; {', '.join(notes)}")
    return figure


def draw_overlay(
    title: str, label: str, runs: Mapping[str, figures.Points], analogue: Collection[str] = (), **options: bool
) -> Figure | None:
    """Return a quantity of several runs over the epochs, in cold colours for spiking networks and warm ones for others.

    Args:
        title: the quantity.
        label: its unit.
        runs: its points by the name of the run.
        analogue: names of the analogue runs.
        options: of `draw_panel`.
    """
    lines: list[figures.Line] = []
    for name, points in runs.items():
        colours = ANALOGUE if name in analogue else SPIKING
        laps, index = divmod(sum(line.style["color"] in colours for line in lines), len(colours))
        dashes = figures.DASHES[(index + laps) % len(figures.DASHES)]
        lines.append(figures.Line(name, points, {"color": colours[index], "linestyle": dashes}))
    return figures.draw_panel(title, lines, label, **options)


def _styled(curves: Sequence[tuple[str, figures.Points]]) -> list[figures.Line]:
    return [figures.Line(name, points, figures.style_of(index)) for index, (name, points) in enumerate(curves)]


def _lines_of_layers(
    history: Sequence[EpochLog], values: Callable[[EpochLog], Values], scale: float = 1.0
) -> list[figures.Line]:
    """Return a line per layer, in the order of the network and coloured by depth; the legend has the first and last."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in history:
        for layer, value in values(line).items():
            found.setdefault(layer, []).append((line.epoch, scale * value))
    last = len(found) - 1
    return [
        figures.Line(
            name, found[layer], {"color": DEPTH(index / max(1, last)), "linewidth": 1.1}, named=index in (0, last)
        )
        for index, (layer, name) in enumerate(short_names(list(found)).items())
    ]


# Other charts


def draw_anytime(scores: Mapping[str, Sequence[float]]) -> list[Figure]:
    """Return a panel of metrics after 1, ..., T time steps of one network; none where only the last is known.

    Args:
        scores: metric -> its values, of `Evaluation.after_steps`; COCO's -1 for undefined is left out.
    """
    known = {name: [point for point in enumerate(values, start=1) if point[1] != -1] for name, values in scores.items()}
    lines = _styled([(name, points) for name, points in known.items() if len(scores[name]) > 1 and points])
    panel = figures.draw_panel("Stopped early", lines, "on the evaluation images", "time steps")
    return [] if panel is None else [panel]


def draw_precision_recall(curves: Mapping[str, PrecisionRecall]) -> Figure:
    """Return precision over recall, a line per class, under which the area is the average precision beside its name.

    A line shows the highest precision at its recall or a higher one. The highest average precision comes first. Of
    more than eight classes the four best and the four worst have colours, the others are grey; classes without boxes
    are left out.

    Raises:
        ValueError: no class has boxes.
    """
    values = {name: average_precision(curve, "area") for name, curve in curves.items() if curve.num_boxes > 0}
    if not values:
        raise ValueError(f"curves: nothing to draw, none of {len(curves)} classes has boxes")
    order = sorted(values, key=lambda name: -values[name])
    lines = {name: figures.Line(f"{name} {values[name]:.3f}", outline(curves[name]), {}) for name in order}
    coloured = order if len(order) <= len(figures.COLOURS) else order[:4] + order[-4:]
    grey = {"color": "#8b95a1", "linewidth": 0.8}
    others = [lines[name]._replace(style=grey, named=False) for name in order if name not in coloured]
    legend = [others[0]._replace(name=f"{len(others)} more", named=True)] if others else []
    drawn = [lines[name]._replace(style=figures.style_of(index)) for index, name in enumerate(coloured)]
    title = f"Precision over recall, mean {sum(values.values()) / len(values):.3f}"
    figure = figures.draw_panel(title, legend + others + drawn, "precision, highest at this recall or above", "recall")
    figure.axes[0].set(xlim=(0, 1), ylim=(0, 1.02))
    return figure


def outline(curve: PrecisionRecall) -> list[tuple[float, float]]:
    """Return the corners of precision (highest at this recall or above) over recall, down to 0 where it ends."""
    if not len(curve.scores):
        return [(0.0, 0.0)]
    recall, precision = curve.recall, curve.envelope
    corners = [(0.0, float(precision[0]))]
    for index in np.flatnonzero(np.diff(precision) != 0).tolist():  # the last point before each fall
        corners += [(float(recall[index]), float(precision[step])) for step in (index, index + 1)]
    return [*corners, (float(recall[-1]), float(precision[-1])), (float(recall[-1]), 0.0)]


def draw_comparison(values: Mapping[str, Sequence[float]], label: str) -> Figure:
    """Return a metric of several variants: a dot per run, a bar and its number at the variant's mean.

    Args:
        values: variant -> the metric of each of its runs.
        label: name and unit of the metric.
    """
    figure = Figure(figsize=(8, 0.5 * len(values) + 1.2), dpi=100, layout="constrained")
    axes = figure.subplots()
    means = {name: float(np.mean(found)) for name, found in values.items()}
    axes.barh(range(len(values)), list(means.values()), color="0.8", height=0.6, tick_label=list(values))
    place = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
    for position, (name, found) in enumerate(values.items()):
        axes.plot(found, [position] * len(found), "o", color=figures.COLOURS[0], markersize=5)
        axes.annotate(f"{means[name]:.4f}", (max(found), position), fontsize=9, **place)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(max(found) for found in values.values()) or 1)
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    figure.set_label(f"{label}. " + "; ".join(f"{name}: {mean:.4f}" for name, mean in means.items()))
    return figure


def draw_trade_off(values: Mapping[str, figures.Points], title: str, label: str, x_label: str) -> list[Figure]:
    """Return a metric over a cost on a logarithmic axis: a mark per run, of one kind per variant; none without points.

    Args:
        values: variant -> (cost, metric) of each of its runs, costs above 0.
        title: the cost.
        label: name and unit of the metric.
        x_label: unit of the cost.
    """
    lines = [
        figures.Line(
            name,
            points,
            figures.style_of(index) | {"marker": MARKS[(index + index // 8) % 8], "markersize": 6, "linestyle": "none"},
        )
        for index, (name, points) in enumerate(values.items())
        if points
    ]
    figure = figures.draw_panel(title, lines, label, f"{x_label}, logarithmic")
    if figure is None:
        return []
    axes, (x, y) = figure.axes[0], np.array([point for line in lines for point in line.points]).T
    axes.set_xscale("log")
    axes.set_xlim(x.min() / 1.6, x.max() * 1.6)  # room for whole marks, and for a number on the axis at least
    subs = (1, 1.5, 2, 3, 5, 7) if x.max() < 4 * x.min() else (1, 2, 5) if x.max() < 100 * x.min() else (1,)
    axes.xaxis.set(major_locator=LogLocator(subs=subs, numticks=8), minor_locator=NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: figures.short_number(value)))
    margin = 0.12 * (y.max() - y.min()) or 0.05
    axes.set_ylim(y.min() - margin, y.max() + margin)
    words = (
        f"{line.name}: {', '.join(f'{metric:.4f} at {cost:.4g}' for cost, metric in line.points)}" for line in lines
    )
    figure.set_label(f"{title}. {label}, at {x_label}. {'; '.join(words)}")
    return [figure]


def draw_robustness(
    curves: Mapping[str, Mapping[str, Mapping[float, Sequence[float]]]], units: Mapping[str, str], label: str
) -> list[Figure]:
    """Return a metric over the severity of noise: a panel per kind, a line per run through its means.

    The band around a line is one standard deviation over the seeds on either side; a kind without seeds has none.

    Args:
        curves: kind of noise -> run -> severity -> the metric for each seed; severity 0 is the clean network.
        units: kind -> the unit of its severity.
        label: name and unit of the metric.

    Raises:
        ValueError: no kind has a run.
    """
    if not any(curves.values()):
        raise ValueError(f"curves: nothing to draw in {len(curves)} kinds of noise; expected at least one with a run")
    names = list(dict.fromkeys(name for runs in curves.values() for name in runs))
    # A run has one colour and one mark in all panels, and is told from the others without colour too.
    styles = {name: figures.style_of(index) | {"marker": MARKS[index % len(MARKS)]} for index, name in enumerate(names)}
    highest = max(max(found) for runs in curves.values() for values in runs.values() for found in values.values())
    panels = []
    for kind, runs in curves.items():
        means = {name: [(at, float(np.mean(found))) for at, found in sorted(runs[name].items())] for name in runs}
        lines = [figures.Line(name, points, styles[name] | {"markersize": 4}) for name, points in means.items()]
        figure = figures.draw_panel(kind.replace("_", " "), lines, label, units[kind])
        axes = figure.axes[0]
        axes.set_ylim(0, 1.06 * highest or 1)  # of all panels, so that heights compare
        axes.set_xlim(-0.03 * axes.dataLim.x1, 1.03 * axes.dataLim.x1 or 1)  # room for whole marks
        for name, points in means.items():
            at, mean = np.array(points).T
            seeds = [runs[name][severity] for severity in at]
            spread = np.array([np.std(values, ddof=1) if len(values) > 1 else 0.0 for values in seeds])
            axes.fill_between(at, mean - spread, mean + spread, color=styles[name]["color"], alpha=0.2, linewidth=0)
        panels.append(figure)
    return panels
