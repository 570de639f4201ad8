"""Pictures of a run as PNG files: curves over the epochs, precision over recall, predicted and true boxes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import matplotlib
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator

from detection.evaluation import PrecisionRecall, average_precision, mean_average_precision

DPI = 100  # pixels per inch: a figure of 12 inches is 1200 pixels wide
PANEL_HEIGHT = 4.2  # inches
Curve = tuple[list[int], list[float]]
Panel = Callable[[Axes], None]


def plot_curves(log: Sequence[Mapping[str, Any]], path: str | PathLike[str]) -> None:
    """Write the curves of a run: losses, average precision, spike activity and thresholds over the epochs.

    A panel whose keys no epoch has (a ReLU network has no activity) is left out.

    Args:
        log: one dict per epoch: "epoch" (from 1), "loss" and "loss/NAME" for its terms. Where the epoch was
            evaluated also "AP", "AP50", "AP75" (a detector) or "top1", "top5" (a classifier), "activity" (share of
            neurons that fire, in [0, 1]) and, as {layer: value} from input to output, "activity_per_layer", "v_th"
            and "extremum".
        path: PNG file to write, 1200 pixels wide.
    """
    found = (
        _loss_panel(log),
        _precision_panel(log),
        _accuracy_panel(log),
        _activity_panel(log),
        _threshold_panel(log),
    )
    panels = [panel for panel in found if panel is not None]
    if not panels:
        raise ValueError(f"log: nothing to plot in {len(log)} epochs; expected keys such as 'loss', 'AP', 'activity'")
    num_rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(12, PANEL_HEIGHT * num_rows), dpi=DPI, layout="constrained")
    _draw_panels(figure, panels, log)
    _write(figure, path)


def plot_dynamics(log: Sequence[Mapping[str, Any]], path: str | PathLike[str]) -> None:
    """Write what the spike layers did over a run: v_th, extremum, H and activity per layer, and the potentials.

    The histograms show the membrane potential in units of the effective threshold, right of 1 a neuron fires, in the
    first and in the last evaluation.

    Args:
        log: one dict per epoch as in `plot_curves`; "hoyer_per_layer" is H as it enters the loss, "potentials" what
            `backbones.record_potentials` gives, in the first and the last evaluated epoch.
        path: PNG file to write, 1200 pixels wide.

    Raises:
        ValueError: no epoch has spike layers.
    """
    found = (
        _layer_panel(log, lambda entry: entry.get("v_th"), "Threshold v_th", "|v_th| (membrane potential)"),
        _layer_panel(log, lambda entry: entry.get("extremum"), "Hoyer extremum", "extremum, in (0, 1]"),
        _layer_panel(
            log, lambda entry: entry.get("hoyer_per_layer"), "Hoyer regulariser", "H per layer, mean over the epoch"
        ),
        _activity_panel(log),
    )
    panels = [panel for panel in found if panel is not None]
    if not panels:
        raise ValueError(f"log: no spike layers in {len(log)} epochs; expected keys such as 'v_th', 'potentials'")
    histograms = [(entry["epoch"], entry["potentials"]) for entry in log if entry.get("potentials")]
    layers = list(histograms[-1][1]) if histograms else []
    num_rows, histogram_rows = math.ceil(len(panels) / 2), math.ceil(len(layers) / 5)
    heights = [PANEL_HEIGHT * num_rows, 1.7 * histogram_rows + 0.6 if layers else 0.01]
    figure = Figure(figsize=(12, sum(heights)), dpi=DPI, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=heights)
    _draw_panels(top, panels, log)
    if layers:
        _draw_histograms(bottom, layers, histograms)
    _write(figure, path)


def plot_comparison(values: Mapping[str, Sequence[float]], label: str, path: str | PathLike[str]) -> None:
    """Write a metric of several variants: a dot per run, a bar and its number at the variant's mean.

    Args:
        values: variant -> the metric of each of its runs.
        label: name and unit of the metric.
        path: PNG file to write.
    """
    figure = Figure(figsize=(8, 0.5 * len(values) + 1.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    names = list(values)
    means = [float(np.mean(values[name])) for name in names]
    axes.barh(names, means, color="0.8", height=0.6)
    for position, name in enumerate(names):
        axes.plot(values[name], [position] * len(values[name]), "o", color="tab:blue", markersize=5)
        axes.annotate(
            f"{means[position]:.4f}",
            (max(values[name]), position),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(max(found) for found in values.values()) or 1)
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    _write(figure, path)


def plot_precision_recall(curves: Mapping[str, PrecisionRecall], path: str | PathLike[str]) -> None:
    """Write precision over recall, a line per class, under which the area is the average precision in the legend.

    A line shows the highest precision at its recall or a higher one. The legend starts with the highest average
    precision; classes without boxes are left out.

    Args:
        curves: class name -> its curve.
        path: PNG file to write, 1000 pixels wide.
    """
    values = {name: average_precision(curve, "area") for name, curve in curves.items() if curve.num_boxes > 0}
    if not values:
        raise ValueError(f"curves: nothing to plot, none of {len(curves)} classes has boxes")
    names = sorted(values, key=lambda name: -values[name])
    labels = [f"{name}  {values[name]:.3f}" for name in names]

    # All lengths in inches. The legend has as many columns as fit beside each other.
    width, axes_height, top, bottom, left, right, line = 10, 5.6, 0.5, 0.75, 0.75, 0.25, 0.162
    column = 0.55 + max(TextPath((0, 0), label, size=8).get_extents().width for label in labels) / 72
    columns = min(len(names), max(1, int((width - 0.2) / column)))
    height = top + axes_height + bottom + line * math.ceil(len(names) / columns) + 0.1
    figure = Figure(figsize=(width, height), dpi=DPI)
    axes = figure.add_axes(
        (left / width, 1 - (top + axes_height) / height, 1 - (left + right) / width, axes_height / height)
    )
    styles = [(dashes, color) for dashes in _DASHES for color in matplotlib.colormaps["tab10"].colors]
    for index, (name, label) in enumerate(zip(names, labels, strict=True)):
        curve = curves[name]
        dashes, color = styles[index % len(styles)]
        # Down to 0 where the recall ends; from 0 on as high as where it starts.
        recall = [0.0, *curve.recall, curve.recall[-1] if len(curve.recall) else 0.0]
        precision = [*curve.envelope[:1], *curve.envelope, 0.0] if len(curve.recall) else [0.0, 0.0]
        axes.plot(recall, precision, drawstyle="steps-pre", linewidth=1.2, color=color, linestyle=dashes, label=label)
    mean = mean_average_precision(curves, "area")
    axes.set_title(f"Precision over recall, mean average precision {mean:.3f}")
    axes.set_xlabel("recall")
    axes.set_ylabel("precision, highest at this recall or above")
    axes.set_xlim(0, 1.01)
    axes.set_ylim(0, 1.02)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, 1 - (top + axes_height + 0.55) / height),
        ncols=columns,
        frameon=False,
        fontsize=8,
        handlelength=2.6,
        columnspacing=1.2,
        labelspacing=0.4,
        borderaxespad=0,
    )
    _write(figure, path)


# With the 10 colours of tab10, 80 classes get a line each that no other has.
_DASHES: Sequence[Any] = (
    "-",
    (0, (5, 1.5)),
    (0, (1, 1)),
    (0, (5, 1.5, 1, 1.5)),
    (0, (2.5, 1)),
    (0, (8, 2)),
    (0, (5, 1, 1, 1, 1, 1)),
    (0, (1, 2.5)),
)

# Curves


def _draw_panels(figure: FigureBase, panels: Sequence[Panel], log: Sequence[Mapping[str, Any]]) -> None:
    """Panels over the epochs, two in a row; a last one alone in its row takes all of it."""
    num_columns = min(2, len(panels))
    grid = figure.add_gridspec(math.ceil(len(panels) / num_columns), num_columns)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    epochs = [entry["epoch"] for entry in log]
    for index, panel in enumerate(panels):
        row, column = divmod(index, num_columns)
        last_and_alone = column == 0 and index == len(panels) - 1
        # A figure of its own, or the layer names of one panel would make the one above it narrow.
        axes = figure.add_subfigure(grid[row, :] if last_and_alone else grid[row, column]).subplots()
        panel(axes)
        axes.set_xlabel("epoch")
        axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)


def _loss_panel(log: Sequence[Mapping[str, Any]]) -> Panel | None:
    names = [name for name in dict.fromkeys(key for entry in log for key in entry) if name.startswith("loss/")]
    curves = {name.removeprefix("loss/"): _curve(log, name) for name in names}
    terms = {name: curve for name, curve in curves.items() if any(curve[1])}  # 0 throughout: nothing to see
    total = _curve(log, "loss")
    values = np.array([value for _, curve in (total, *terms.values()) for value in curve])
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    positive = values[values > 0]
    # A single 0 must not force the others onto a linear scale; a negative loss has to.
    log_scale = values.min() >= 0 and len(positive) > 0 and positive.max() > 10 * positive.min()

    def draw(axes: Axes) -> None:
        for name, curve in terms.items():
            _draw_curve(axes, curve, label=name, linewidth=1.3)
        _draw_curve(axes, total, label="total", linewidth=2.4, color="black")
        axes.set_title("Training loss")
        axes.set_ylabel("loss, mean over the epoch")
        if log_scale:
            axes.set_yscale("log", nonpositive="mask")
        _legend_below(axes)

    return draw


def _precision_panel(log: Sequence[Mapping[str, Any]]) -> Panel | None:
    return _score_panel(log, ("AP", "AP50", "AP75"), "Average precision", "average precision, in [0, 1]")


def _accuracy_panel(log: Sequence[Mapping[str, Any]]) -> Panel | None:
    return _score_panel(log, ("top1", "top5"), "Accuracy", "share of right answers, in [0, 1]")


def _score_panel(log: Sequence[Mapping[str, Any]], names: Sequence[str], title: str, label: str) -> Panel | None:
    curves = {}
    for name in names:
        epochs, values = _curve(log, name)
        defined = [(epoch, value) for epoch, value in zip(epochs, values, strict=True) if value >= 0]  # -1: undefined
        if defined:
            curves[name] = ([epoch for epoch, _ in defined], [value for _, value in defined])
    if not curves:
        return None

    def draw(axes: Axes) -> None:
        for name, curve in curves.items():
            _draw_curve(axes, curve, label=name, linewidth=2.4 if name == names[0] else 1.3, marker="o", markersize=3)
        axes.set_title(title)
        axes.set_ylabel(label)
        _start_at_zero(axes)
        _legend_below(axes)

    return draw


def _activity_panel(log: Sequence[Mapping[str, Any]]) -> Panel | None:
    overall, layers = _curve(log, "activity"), _layer_curves(log, lambda entry: entry.get("activity_per_layer"))
    if not overall[0] and not layers:
        return None

    def draw(axes: Axes) -> None:
        _draw_layers(axes, layers, scale=100)
        epochs, values = overall
        if epochs:
            outline = [patheffects.withStroke(linewidth=4.5, foreground="white")]
            percent = (epochs, [100 * value for value in values])
            _draw_curve(axes, percent, label="whole network", linewidth=2.6, color="black", path_effects=outline)
            _legend_below(axes)
        axes.set_title("Spike activity")
        axes.set_ylabel("neurons that fire (%)")
        _start_at_zero(axes)

    return draw


def _threshold_panel(log: Sequence[Mapping[str, Any]]) -> Panel | None:
    def thresholds(entry: Mapping[str, Any]) -> dict[str, float] | None:
        v_th, extremum = entry.get("v_th"), entry.get("extremum")
        if not v_th or not extremum:
            return None
        return {layer: abs(v_th[layer]) * extremum[layer] for layer in v_th if layer in extremum}

    times = "|v_th| \N{MULTIPLICATION SIGN} extremum (membrane potential)"
    return _layer_panel(log, thresholds, "Effective threshold", times)


def _layer_panel(
    log: Sequence[Mapping[str, Any]],
    of: Callable[[Mapping[str, Any]], Mapping[str, float] | None],
    title: str,
    label: str,
) -> Panel | None:
    layers = _layer_curves(log, of)
    if not layers:
        return None

    def draw(axes: Axes) -> None:
        _draw_layers(axes, layers)
        axes.set_title(title)
        axes.set_ylabel(label)
        _start_at_zero(axes)

    return draw


def _draw_histograms(
    figure: FigureBase, layers: Sequence[str], histograms: Sequence[tuple[int, Mapping[str, Sequence[float]]]]
) -> None:
    """A small histogram for each layer, first evaluation in grey and last in colour, the threshold as a line at 1."""
    axes_of = figure.subplots(math.ceil(len(layers) / 5), 5, squeeze=False).ravel()
    edges = np.linspace(-1, 3, len(histograms[-1][1][layers[0]]) + 1)
    names = dict(zip(layers, _without_common_module(layers), strict=True))
    for axes, layer in zip(axes_of, layers, strict=False):
        first = [(histograms[0], {"fill": True, "color": "0.8"})] if len(histograms) > 1 else []
        for (epoch, shares), style in [*first, (histograms[-1], {"color": "tab:blue", "linewidth": 1.4})]:
            axes.stairs(100 * np.array(shares[layer]), edges, label=f"epoch {epoch}", **style)
        axes.axvline(1, color="tab:red", linewidth=1, label="threshold")
        axes.set_title(names[layer], fontsize=8)
        axes.set_xlim(-1, 3)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in axes_of[len(layers) :]:
        axes.set_axis_off()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.supxlabel("membrane potential / effective threshold", fontsize=9)
    figure.supylabel("neurons (% per bin of 0.1)", fontsize=9)


def _curve(log: Sequence[Mapping[str, Any]], key: str) -> Curve:
    """Epochs that have the key, and its values there."""
    entries = [entry for entry in log if entry.get(key) is not None]
    return [entry["epoch"] for entry in entries], [float(entry[key]) for entry in entries]


def _layer_curves(
    log: Sequence[Mapping[str, Any]], of: Callable[[Mapping[str, Any]], Mapping[str, float] | None]
) -> dict[str, Curve]:
    """Layer -> curve, in the order of the layers' first appearance, which is the order of depth."""
    curves: dict[str, Curve] = {}
    for entry in log:
        for layer, value in (of(entry) or {}).items():
            epochs, values = curves.setdefault(layer, ([], []))
            epochs.append(entry["epoch"])
            values.append(float(value))
    return curves


def _draw_curve(axes: Axes, curve: Curve, **style: Any) -> None:
    """A line; a dot where there is a single point, of which a line would show nothing."""
    epochs, values = curve
    if epochs:
        axes.plot(epochs, values, **({"marker": "o"} if len(epochs) == 1 else {}) | style)


def _draw_layers(axes: Axes, layers: Mapping[str, Curve], scale: float = 1) -> None:
    """One thin line per layer, coloured by depth, with a colour bar that names the layers."""
    if not layers:
        return
    # viridis without its last tenth, whose yellow is lost on white
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    for color, (epochs, values) in zip(colors, layers.values(), strict=True):
        _draw_curve(axes, (epochs, [scale * value for value in values]), color=color, linewidth=1, markersize=4)
    norm = BoundaryNorm(np.arange(len(layers) + 1) - 0.5, len(layers))
    bar = axes.figure.colorbar(ScalarMappable(norm, ListedColormap(colors)), ax=axes, aspect=30, pad=0.02)
    shown = range(0, len(layers), math.ceil(len(layers) / 24))  # more names than 24 would touch each other
    names = _without_common_module(list(layers))
    bar.set_ticks(list(shown), labels=[names[index] for index in shown], fontsize=7)
    bar.ax.tick_params(length=0)
    bar.ax.minorticks_off()
    bar.ax.invert_yaxis()
    bar.outline.set_visible(False)
    bar.ax.set_title("layer", fontsize=8)


def _without_common_module(names: Sequence[str]) -> list[str]:
    """backbone.a.spike, backbone.b.spike -> a.spike, b.spike."""
    paths = [name.split(".") for name in names]
    while all(len(path) > 1 and path[0] == paths[0][0] for path in paths):
        paths = [path[1:] for path in paths]
    return [".".join(path) for path in paths]


def _start_at_zero(axes: Axes) -> None:
    """Limits from 0 to a little above the highest point, so that heights compare."""
    axes.set_ylim(0, 1.06 * axes.dataLim.y1 or 1)


def _legend_below(axes: Axes) -> None:
    """Under the axis label, where it covers no line."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False, fontsize=9)


def _write(figure: Figure, path: str | PathLike[str]) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=DPI)


# Robustness


def plot_robustness(
    curves: Mapping[str, Mapping[str, Mapping[float, Sequence[float]]]],
    units: Mapping[str, str],
    label: str,
    path: str | PathLike[str],
) -> None:
    """Write a metric over the severity of noise: a panel per kind, a line per run through its means.

    The band around a line is one standard deviation over the seeds on either side; a kind without seeds has none.

    Args:
        curves: kind of noise -> run -> severity -> the metric for each seed; severity 0 is the clean network.
        units: kind -> what its severity is.
        label: name and unit of the metric.
        path: PNG file to write, 1200 pixels wide.

    Raises:
        ValueError: no kind has a run.
    """
    if not any(curves.values()):
        raise ValueError(f"curves: nothing to plot in {len(curves)} kinds of noise; expected at least one with a run")
    num_columns = min(3, len(curves))
    num_rows = math.ceil(len(curves) / num_columns)
    names = list(dict.fromkeys(name for runs in curves.values() for name in runs))
    # A run has one colour and one mark in all panels, and is told from the others without colour too.
    palette = matplotlib.colormaps["tab10"].colors
    styles = {name: (palette[index % 10], "osD^vPX*<>"[index % 10]) for index, name in enumerate(names)}
    legend_rows = math.ceil(len(names) / 3)
    figure = Figure(figsize=(12, 3.4 * num_rows + 0.4 + 0.25 * legend_rows), dpi=DPI, layout="constrained")
    grid = figure.subplots(num_rows, num_columns, squeeze=False, sharey=True)
    for axes, (kind, runs) in zip(grid.ravel(), curves.items(), strict=False):
        for name, values in runs.items():
            color, marker = styles[name]
            severities = sorted(values)
            means = np.array([np.mean(values[severity]) for severity in severities])
            spreads = np.array([_deviation(values[severity]) for severity in severities])
            axes.plot(severities, means, color=color, marker=marker, markersize=4, linewidth=1.6, label=name)
            axes.fill_between(severities, means - spreads, means + spreads, color=color, alpha=0.2, linewidth=0)
        axes.set_title(kind.replace("_", " "), fontsize=11)
        axes.set_xlabel(units[kind], fontsize=9)
        axes.set_xlim(-0.03 * axes.dataLim.x1)  # room for the whole mark at 0
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid.ravel()[len(curves) :]:
        axes.set_axis_off()
    highest = max(max(found) for runs in curves.values() for values in runs.values() for found in values.values())
    grid[0, 0].set_ylim(0, 1.06 * highest or 1)  # shared by all, so that heights compare
    for row in grid:
        row[0].set_ylabel(label, fontsize=9)
    handles = [Line2D([], [], color=color, marker=marker, label=name) for name, (color, marker) in styles.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    _write(figure, path)


def _deviation(values: Sequence[float]) -> float:
    """Standard deviation of a sample, 0 for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
