"""Pictures: they are written, have a sensible size, and show what they should where they should."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from detection import curves, figures
from detection.curves import (
    draw_comparison,
    draw_curves,
    draw_dynamics,
    draw_overlay,
    draw_potentials,
    draw_precision_recall,
    draw_robustness,
    draw_trade_off,
)
from detection.draw import Box, draw_boxes, draw_predictions
from detection.evaluation import PrecisionRecall, average_precision
from detection.figures import Line, draw_panel, save_png, set_title, to_svg
from detection.records import EpochLog

NAMES = ["cat", "dog", "a class with a very long name indeed"]
TOP, LEFT = 40, 8  # pixels above the first picture (the legend) and left of it
METRICS = ("AP50", "AP", "AP75")
NASTY = "<b>$x$ & 'y' \x07"


def line(number: int, *, evaluated: bool = True, spiking: bool = True, num_layers: int = 3) -> dict:
    """One line of a run's metrics.jsonl."""
    entry = {"epoch": number, "lr": 0.1, "loss": 2 / number, "loss/classification": 1.9 / number, "loss/hoyer": 1e-3}
    layers = [f"backbone.stage{i}.spike" for i in range(num_layers)]
    if evaluated and spiking:  # what layers log stands in front of the metrics
        entry["hoyer_per_layer"] = dict.fromkeys(layers, 100.0)
        entry["v_th"] = dict.fromkeys(layers, -1.0)
        entry["extremum"] = dict.fromkeys(layers, 0.5)
    if evaluated:
        entry |= {"AP": 0.1 * number, "AP50": 0.15 * number, "AP75": -1.0}
    if evaluated and spiking:
        entry["activity"] = 0.2
        entry["activity_per_layer"] = {layer: 0.1 + 0.01 * i for i, layer in enumerate(layers)}
    return entry


def history(*lines: dict) -> list[EpochLog]:
    return [EpochLog.parse(entry, "the log") for entry in lines]


def read(path: Path) -> np.ndarray:
    """(H, W, 3), 0..255; the file has to be a PNG."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def pixels_of(tmp_path: Path, drawn: Figure | Sequence[Figure]) -> np.ndarray:
    save_png(drawn, tmp_path / "picture.png")
    return read(tmp_path / "picture.png")


def title_of(figure: Figure) -> str:
    return figure.texts[0].get_text()


def boxes(*rows: list[float], labels: list[int] | None = None, scores: list[float] | None = None) -> dict[str, Tensor]:
    n = len(rows)
    return {
        "boxes": torch.tensor(rows, dtype=torch.float32).reshape(n, 4),
        "labels": torch.tensor([1] * n if labels is None else labels, dtype=torch.int64),
        "scores": torch.tensor([0.9] * n if scores is None else scores),
    }


def sheet(path: Path, images: list[Tensor], predictions: list[dict], targets: list[dict], **options) -> np.ndarray:
    save_png(draw_predictions(images, predictions, targets, NAMES, **options), path)
    return read(path)


# Curves

LOSS, PRECISION, ACTIVITY = "Training loss", "Average precision", "Spike activity"
THRESHOLD, RATE, SPEED = "Effective threshold", "Learning rate", "Training speed"


@pytest.mark.parametrize(
    ("log", "titles"),
    [
        ([line(n, evaluated=n % 2 == 0) for n in range(1, 6)], [LOSS, PRECISION, ACTIVITY, THRESHOLD, RATE]),
        ([line(1)], [LOSS, PRECISION, ACTIVITY, THRESHOLD, RATE]),
        ([line(n, num_layers=30) for n in (1, 2)], [LOSS, PRECISION, ACTIVITY, THRESHOLD, RATE]),
        ([line(n, num_layers=1) for n in (1, 2)], [LOSS, PRECISION, ACTIVITY, THRESHOLD, RATE]),
        ([line(n, spiking=False) for n in (1, 2)], [LOSS, PRECISION, RATE]),
        ([line(n, evaluated=False) | {"images_per_second": 3.0} for n in (1, 2)], [LOSS, RATE, SPEED]),
        ([{"epoch": 1, "loss": 1.0, "activity": 0.1}], [LOSS, ACTIVITY, RATE]),
        ([{k: v for k, v in line(1).items() if k != "extremum"}], [LOSS, PRECISION, ACTIVITY, RATE]),
    ],
)
def test_curves_have_a_panel_for_what_the_log_has(tmp_path: Path, log: list[dict], titles: list[str]) -> None:
    epochs = history(*log)
    before = copy.deepcopy(epochs)
    panels = draw_curves(epochs, METRICS, "Average precision")
    assert [title_of(panel) for panel in panels] == titles
    assert epochs == before
    rows, columns = {3: (1, 3), 4: (2, 2), 5: (2, 3)}[len(panels)]
    pixels = pixels_of(tmp_path, panels)
    assert pixels.shape[1] == 600 * columns
    assert 1 <= pixels.shape[0] / (450 * rows) < 1.4  # panels with more of a legend are higher
    for column in range(columns):  # no hole in the first row
        assert (pixels[:450, 600 * column : 600 * (column + 1)] < 128).all(-1).sum() > 200


@pytest.mark.parametrize(
    ("change", "alone"),
    [
        ({"loss": float("nan"), "AP": -1.0, "AP50": -1.0, "activity": 0.0}, True),
        ({"loss": 0.0, "loss/hoyer": 0.0, "extremum": {"backbone.stage1.spike": 0.3}}, False),
        ({"loss/classification": -1.0, "AP": 0.0, "AP50": 0.0}, True),
    ],
)
def test_curves_with_odd_values(tmp_path: Path, change: dict, alone: bool) -> None:
    log = history(*([line(1) | change] if alone else [line(1), line(2) | change]))
    panels = draw_curves(log, METRICS)
    assert pixels_of(tmp_path, panels).shape[1] in (1200, 1800)
    assert all(ElementTree.fromstring(to_svg(panel)) is not None for panel in panels)


def test_curves_follow_their_values() -> None:
    lines = [line(2), line(2) | {"v_th": dict.fromkeys(line(2)["v_th"], -1.2)}]
    lines.append(line(2) | {"v_th": dict.fromkeys(line(2)["v_th"], 1.0)})
    a, b, sign = ([to_svg(panel) for panel in draw_curves(history(line(1), each), METRICS)] for each in lines)
    assert a == sign  # the threshold is |v_th|
    assert [before == after for before, after in zip(a, b, strict=True)] == [True, True, True, False, True]
    threshold = draw_curves(history(line(1), lines[1]), METRICS)[3]
    assert np.allclose(threshold.axes[0].lines[0].get_xydata(), [(1, 0.5), (2, 0.6)])


def test_losses_over_more_than_a_factor_of_ten_are_logarithmic_and_zeros_are_left_out() -> None:
    panel = draw_curves(history(line(1), line(2) | {"loss/other": 0.0}))[0]
    assert panel.axes[0].get_yscale() == "log"
    assert [text.get_text() for text in panel.legends[0].get_texts()] == ["total", "classification", "hoyer"]
    ticks = [text.get_text() for text in panel.axes[0].get_yticklabels()]
    assert {"1e-3", "0.01", "0.1", "1"} <= set(ticks)
    negative = draw_curves(history(line(1) | {"loss/classification": -1.0}))[0]
    assert negative.axes[0].get_yscale() == "linear" and negative.axes[0].get_ylim()[0] < -1


def test_metrics_of_averaged_weights_have_a_line_of_their_own() -> None:
    panel = draw_curves(history(line(1) | {"ema": {"AP50": 0.4, "AP": 0.2}}), METRICS)[1]
    assert [text.get_text() for text in panel.legends[0].get_texts()] == ["AP50", "AP", "AP50, averaged weights"]
    assert panel.axes[0].lines[2].get_ydata() == [0.4]


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(ValueError, match="history: nothing to draw in 0 epochs"):
        draw_curves([])


def test_several_runs_have_cold_and_warm_colours() -> None:
    runs = {"spiking": [(1, 0.5), (2, 0.6)], "twin": [(1, 0.7)], "other": [(2, 0.1)]}
    drawn = draw_overlay("AP50", "unit", runs, {"twin"})
    colours = [each.get_color() for each in drawn.axes[0].lines]
    assert colours == [curves.SPIKING[0], curves.ANALOGUE[0], curves.SPIKING[1]]
    assert drawn.get_label() == "AP50. spiking: 0.5 \N{RIGHTWARDS ARROW} 0.6; twin: 0.7; other: 0.1"
    assert draw_overlay("AP50", "unit", {"a": []}) is None
    many = draw_overlay("AP50", "unit", {str(number): [(1, 0.5), (2, 0.6)] for number in range(16)})
    assert len({(each.get_color(), each.get_linestyle(), str(each._dash_pattern)) for each in many.axes[0].lines}) == 16


# Precision over recall


def curve(right: list[bool], num_boxes: int) -> PrecisionRecall:
    """Detections of falling score, each right or wrong."""
    return PrecisionRecall(np.linspace(1, 0, len(right)), np.cumsum(np.array(right, dtype=int)), num_boxes)


def axes_pixel(recall: float, precision: float) -> tuple[int, int]:
    """(row, column) in the picture: its axes end at 1.02, 150 pixels per inch."""
    width = figures.WIDTH - figures.LEFT - figures.MARGIN
    return (
        round(150 * (figures.TOP + figures.HEIGHT * (1 - precision / 1.02))),
        round(150 * (figures.LEFT + width * recall)),
    )


def colored(pixels: np.ndarray) -> np.ndarray:
    return np.ptp(pixels, axis=-1) > 60


@pytest.mark.parametrize(("num_classes", "shown"), [(1, 1), (3, 3), (8, 8), (80, 8)])
def test_precision_recall_has_a_legend_for_any_number_of_classes(tmp_path: Path, num_classes: int, shown: int) -> None:
    """The picture is as high as its legend needs: at most eight classes, the best and the worst, none over the edge."""
    rng = np.random.default_rng(0)
    found = {f"class number {i}": curve((rng.random(30) < 0.5).tolist(), 20) for i in range(num_classes)}
    found["class without boxes and with a name too long for the legend" * 3] = curve([False], 0)
    drawn = draw_precision_recall(found)
    areas = {name: average_precision(each, "area") for name, each in found.items() if each.num_boxes}
    order = sorted(areas, key=lambda name: -areas[name])
    named = order if num_classes <= 8 else order[:4] + order[-4:]
    names = [text.get_text() for text in drawn.legends[0].get_texts()]
    others = [f"{num_classes - 8} more"] if num_classes > 8 else []
    assert names == others + [f"{name} {areas[name]:.3f}" for name in named]
    assert len(drawn.axes[0].lines) == num_classes + len(others)
    pixels = pixels_of(tmp_path, drawn)
    assert pixels.shape == (int(150 * (3.26 + 0.17 * (shown + len(others)))), 600, 3)
    assert (pixels[:, :10] == 255).all() and (pixels[:, -10:] == 255).all() and (pixels[-5:] == 255).all()


def test_precision_recall_is_drawn_where_it_is(tmp_path: Path) -> None:
    """Right, wrong, right of four boxes: precision 1 up to recall 1/4, 2/3 up to 2/4, nothing beyond."""
    drawn = colored(pixels_of(tmp_path, draw_precision_recall({"a": curve([True, False, True], 4)})))

    def near(recall: float, precision: float) -> bool:
        row, column = axes_pixel(recall, precision)
        return bool(drawn[row - 2 : row + 3, column - 2 : column + 3].any())

    for point in ((0.02, 1), (0.24, 1), (0.25, 0.8), (0.26, 2 / 3), (0.49, 2 / 3), (0.5, 0.3), (0.5, 0.02)):
        assert near(*point), point
    for point in ((0.27, 1), (0.23, 2 / 3), (0.52, 2 / 3), (0.4, 0.3), (0.7, 0.1), (0.1, 0.5)):
        assert not near(*point), point


def test_outline_of_a_curve_has_the_area_of_the_average_precision() -> None:
    found = PrecisionRecall(np.array([0.9, 0.8, 0.7, 0.6]), np.array([1, 1, 2, 2]), 4)
    points = curves.outline(found)
    area = sum((x2 - x1) * y1 for (x1, y1), (x2, _) in pairwise(points))
    assert area == pytest.approx(average_precision(found, "area"))
    assert curves.outline(PrecisionRecall(np.array([]), np.array([]), 4)) == [(0.0, 0.0)]


@pytest.mark.parametrize("right", [[], [False, False], [True]])
def test_precision_recall_of_few_detections(tmp_path: Path, right: list[bool]) -> None:
    assert pixels_of(tmp_path, draw_precision_recall({"a": curve(right, 1)})).shape[1] == 600


def test_precision_recall_without_boxes_is_an_error() -> None:
    with pytest.raises(ValueError, match="curves: nothing to draw, none of 2 classes has boxes"):
        draw_precision_recall({"a": curve([], 0), "b": curve([False], 0)})


# Boxes


def test_boxes_are_drawn_where_they_are(tmp_path: Path) -> None:
    """A picture of 72 x 72 pixels is shown 10 times as large, so box edges fall on known pixels."""
    grey = [torch.full((3, 72, 72), 0.5)]
    empty = sheet(tmp_path / "empty.png", grey, [boxes()], [boxes()])
    assert empty.shape == (TOP + 720 + 8, LEFT + 720 + 8, 3)
    assert np.abs(empty[TOP : TOP + 720, LEFT : LEFT + 720] - 128).max() <= 1

    predicted = sheet(tmp_path / "predicted.png", grey, [boxes([20, 30, 50, 60])], [boxes()])
    changed = np.argwhere((predicted != empty).any(-1)) - [TOP, LEFT]
    # line width 2 points = 2.8 pixels, half of it outside; a label of about 15 pixels above
    assert 500 - 3 <= changed[:, 1].max() <= 500 + 3 and 200 - 3 <= changed[:, 1].min() <= 200 + 3
    assert 600 - 3 <= changed[:, 0].max() <= 600 + 3 and 275 <= changed[:, 0].min() <= 300
    edge = predicted[TOP + 600, LEFT + 210 : LEFT + 490]
    assert (edge == edge[0]).all() and np.ptp(edge[0]) > 100  # solid, and in a colour
    assert (predicted[TOP + 450, LEFT + 350] == empty[TOP + 450, LEFT + 350]).all()  # not filled

    true = sheet(tmp_path / "true.png", grey, [boxes()], [boxes([20, 30, 50, 60])])
    changed = np.argwhere((true != empty).any(-1)) - [TOP, LEFT]
    assert (np.abs(changed.min(0) - [300, 200]) <= 3).all() and (np.abs(changed.max(0) - [600, 500]) <= 3).all()
    edge = true[TOP + 600, LEFT + 210 : LEFT + 490].mean(-1)
    assert edge.max() > 220 and edge.min() < 140  # dashes of white, with gaps
    assert np.ptp(true[TOP : TOP + 720, LEFT : LEFT + 720], axis=-1).max() <= 2  # black, white and grey only


def test_classes_have_their_own_colours(tmp_path: Path) -> None:
    grey = [torch.full((3, 72, 72), 0.5)]
    colors = set()
    for label in (1, 2, 3):
        pixels = sheet(tmp_path / "class.png", grey, [boxes([20, 30, 50, 60], labels=[label])], [boxes()])
        colors.add(tuple(pixels[TOP + 600, LEFT + 350]))
    assert len(colors) == 3


def test_low_scores_are_left_out(tmp_path: Path) -> None:
    grey = [torch.full((3, 40, 60), 0.5)]
    empty = sheet(tmp_path / "empty.png", grey, [boxes()], [boxes()], score_threshold=0.5)
    low = sheet(tmp_path / "low.png", grey, [boxes([5, 5, 30, 30], scores=[0.49])], [boxes()], score_threshold=0.5)
    at = sheet(tmp_path / "at.png", grey, [boxes([5, 5, 30, 30], scores=[0.5])], [boxes()], score_threshold=0.5)
    assert (low == empty).all()
    assert (at != empty).any()


@pytest.mark.parametrize(
    "box", [[0, 0, 10, 10], [62, 0, 72, 10], [62, 62, 72, 72], [0, 62, 10, 72], [0, 0, 72, 72], [30, 0, 31, 72]]
)
def test_labels_stay_inside_the_picture(tmp_path: Path, box: list[float]) -> None:
    """The margins around the picture are untouched, and the whole label is there wherever the box is."""
    grey = [torch.full((3, 72, 72), 0.5)]
    empty = sheet(tmp_path / "empty.png", grey, [boxes()], [boxes()])
    drawn = sheet(tmp_path / "drawn.png", grey, [boxes(box, labels=[3])], [boxes(box)])
    outside = np.ones(empty.shape[:2], dtype=bool)
    picture = (slice(TOP, TOP + 720), slice(LEFT, LEFT + 720))
    outside[picture] = False
    assert (drawn[outside] == empty[outside]).all()
    colored = np.ptp(drawn[picture], axis=-1) > 100
    assert np.ptp(np.flatnonzero(colored.sum(0) >= 5)) > 190  # a label of 40 characters in 7 points


def test_sizes_channels_and_columns(tmp_path: Path) -> None:
    """Wide, tall, tiny and grey pictures on one sheet; boxes of one do not spill into another."""
    torch.manual_seed(0)
    images = [torch.rand(3, 30, 90), torch.rand(3, 200, 20), torch.rand(1, 8, 8), torch.rand(3, 64, 64).double()]
    predictions = [boxes(), boxes([2, 3, 15, 150], labels=[3]), boxes([1, 1, 6, 6], labels=[2]), boxes()]
    targets = [boxes([5, 5, 50, 25]), boxes(), boxes(), boxes([1, 1, 60, 60], [3, 3, 9, 9])]
    targets = [{"boxes": target["boxes"]} for target in targets]
    arguments = (images, predictions, targets)
    before = copy.deepcopy(arguments)
    widths = {columns: sheet(tmp_path / "sheet.png", *arguments, columns=columns).shape[1] for columns in (1, 2, 3, 9)}
    assert widths == {1: 736, 2: 744, 3: 3 * 368 + 8, 9: 4 * 368 + 8}
    for now, then in zip(arguments, before, strict=True):
        for a, b in zip(now, then, strict=True):
            pairs = [(a, b)] if isinstance(a, Tensor) else [(a[key], b[key]) for key in b]
            assert all(torch.equal(x, y) for x, y in pairs)


def test_bad_input_is_named() -> None:
    image = torch.zeros(3, 8, 8)
    with pytest.raises(ValueError, match="got 0 images, 0 predictions, 0 targets"):
        draw_predictions([], [], [], NAMES)
    with pytest.raises(ValueError, match="got 1 images, 2 predictions, 1 targets"):
        draw_predictions([image], [boxes(), boxes()], [boxes()], NAMES)
    with pytest.raises(ValueError, match=r"image at index 1: .* got torch\.float32 of shape \(8, 8\)"):
        draw_predictions([image, image[0]], [boxes()] * 2, [boxes()] * 2, NAMES)
    with pytest.raises(ValueError, match=r"image at index 0: .* got torch\.uint8 of shape \(3, 8, 8\)"):
        draw_predictions([image.byte()], [boxes()], [boxes()], NAMES)
    with pytest.raises(ValueError, match=r"prediction at index 0: found label 4, expected 1\.\.3"):
        draw_predictions([image], [boxes([1, 1, 4, 4], labels=[4])], [boxes()], NAMES)
    with pytest.raises(ValueError, match="columns: expected at least 1, got 0"):
        draw_predictions([image], [boxes()], [boxes()], NAMES, columns=0)


def test_boxes_on_one_image_have_titles_and_labels_that_can_be_read(attempt) -> None:
    with attempt("names"):
        image = np.full((60, 80, 3), 128, dtype=np.uint8)
        drawn = draw_boxes(
            image,
            [Box((5, 5, 30, 40), "#f0397b", label=NASTY, title="wrong"), Box((1, 1, 9, 9), "navy", label="x")],
            "image",
        )
        assert tuple(drawn.get_size_inches()) == (4, 3)
        for shape in ((640, 1, 3), (1, 640, 3)):  # on a ground, or the figure would be as large as its shape is thin
            low, high = sorted(draw_boxes(np.zeros(shape, np.uint8), [], "strip").get_size_inches())
            assert high == pytest.approx(4 * low)
        assert [text.get_color() for text in drawn.axes[0].texts] == ["black", "white"]
        root = ElementTree.fromstring(to_svg(drawn))
        assert "wrong" in [element.text for element in root.iter() if element.tag.endswith("title")]
        picture = next(element for element in root.iter() if element.tag.endswith("image"))
        assert picture.get("href").startswith("data:image/jpeg;base64,")
        shown = [element.text for element in root.iter() if element.tag.endswith("text")]
        assert shown == ["x", NASTY[:-1] + "\ufffd"]  # the first one on top


def test_global_state_of_matplotlib_is_left_alone(tmp_path: Path) -> None:
    """No settings changed, and no figure left in pyplot's list, where it would stay in memory."""
    before = matplotlib.rcParams.copy()
    figure = draw_curves(history(line(1, evaluated=False)))[0]
    save_png(figure, tmp_path / "curves.png")
    to_svg(figure)
    sheet(tmp_path / "sheet.png", [torch.zeros(3, 8, 8)], [boxes()], [boxes()])
    save_png(draw_precision_recall({"a": curve([True], 1)}), tmp_path / "pr.png")
    assert matplotlib.rcParams.copy() == before
    assert pyplot.get_fignums() == []


# Spike layers, variants, noise


def test_dynamics_show_every_quantity_and_every_layer(tmp_path: Path) -> None:
    lines = [{"own": {"backbone.stage0.spike": 3.0}} | line(number, num_layers=7) for number in (1, 2, 3)]
    for entry, center in ((lines[0], 10), (lines[-1], 30)):
        shares = np.exp(-((np.arange(40) - center) ** 2) / 20)
        entry["potentials"] = {layer: list(shares / shares.sum()) for layer in entry["v_th"]}
    log = history(*lines)
    panels, histograms = draw_dynamics(log), draw_potentials(log)
    titles = ["Threshold v_th", "Hoyer extremum E", "Hoyer regulariser H", "own"]
    assert [title_of(panel) for panel in panels] == titles
    assert [len(panel.axes[0].lines) for panel in panels] == [7, 7, 7, 1]
    assert [title_of(histogram) for histogram in histograms] == [f"stage{index}.spike" for index in range(7)]
    notes = [text.get_text() for text in histograms[0].texts[1:]]
    assert notes == ["epoch 1: 0.1 % fire", "epoch 3: 100.0 % fire"]
    pixels = pixels_of(tmp_path, histograms)
    assert pixels.shape == (2 * 262, 4 * 360, 3)  # four of 2.4 inches, and three
    orange = (pixels[..., 0] > 150) & (pixels[..., 2] < 60)
    dashes = np.flatnonzero(orange[:262].sum(axis=0) > 30)  # the threshold of each histogram
    assert len(np.split(dashes, np.flatnonzero(np.diff(dashes) > 5) + 1)) == 4
    assert draw_potentials(log[1:2]) == []


def test_networks_without_spike_layers_have_no_dynamics() -> None:
    log = history(line(1, spiking=False), line(2, spiking=False))
    assert draw_dynamics(log) == draw_potentials(log) == []


def test_comparison_has_a_bar_as_long_as_its_mean(tmp_path: Path) -> None:
    picture = pixels_of(tmp_path, draw_comparison({"all": [0.8, 0.8], "half": [0.3, 0.5], "none": [0.0]}, "top1"))
    grey = (picture == 204).all(axis=2).sum(axis=1)  # length of the bar in each row
    lengths = sorted(set(grey[grey > 30].tolist()))
    assert max(lengths) / np.median([length for length in lengths if length < 0.7 * max(lengths)]) == pytest.approx(
        2, abs=0.15
    )


def test_trade_off_has_a_mark_of_its_own_for_each_variant(tmp_path: Path) -> None:
    found = {f"variant {number}": [(10.0 * (number + 1), 0.05 * number)] for number in range(12)}
    found["variant 0"].append((20.0, 0.7))
    (panel,) = draw_trade_off(found | {"unpriced": []}, "Operations", "top1", "uJ per image")
    (axes,) = panel.axes
    assert axes.get_xscale() == "log" and title_of(panel) == "Operations"
    assert [line.get_xydata().tolist() for line in axes.lines] == [list(map(list, each)) for each in found.values()]
    assert len({(line.get_marker(), line.get_color()) for line in axes.lines}) == 12
    assert {line.get_linestyle() for line in axes.lines} == {"None"}
    legend = [text.get_text() for text in panel.legends[0].get_texts()]
    assert legend == list(found) and "variant 0: 0.0000 at 10, 0.7000 at 20" in panel.get_label()
    pixels_of(tmp_path, panel)
    edges = panel.legends[0].get_window_extent()
    assert 0 <= edges.x0 <= edges.x1 <= panel.bbox.x1 and 0 <= edges.y0 <= edges.y1 < axes.bbox.y0
    low, high = axes.get_xlim()
    assert low < 10 and high > 120 and any(low < tick < high for tick in axes.get_xticks())
    (alone,) = draw_trade_off({"a": [(3.0, 0.5)]}, "Operations", "top1", "uJ per image")
    low, high = alone.axes[0].get_ylim()
    assert low < 0.5 < high and any(1.9 < tick < 4.8 for tick in alone.axes[0].get_xticks())
    assert draw_trade_off({"a": []}, "Operations", "top1", "uJ per image") == []


def test_robustness_has_a_panel_per_kind_on_one_scale() -> None:
    found = {"blur": {"a": {0.0: [0.8], 1.0: [0.4, 0.6]}}, "gaussian_noise": {"a": {0.0: [0.8]}, "b": {0.0: [0.2]}}}
    panels = draw_robustness(found, {"blur": "pixels", "gaussian_noise": "of 1"}, "top1, in [0, 1]")
    assert [title_of(panel) for panel in panels] == ["blur", "gaussian noise"]
    assert {panel.axes[0].get_ylim() for panel in panels} == {(0, 1.06 * 0.8)}
    assert panels[0].axes[0].get_xlim() == pytest.approx((-0.03, 1.03))
    assert np.allclose(panels[0].axes[0].lines[0].get_xydata(), [(0, 0.8), (1, 0.5)])
    band = panels[0].axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == 0.8 and band.min() == pytest.approx(0.5 - 0.02**0.5)
    colours = [panel.axes[0].lines[0].get_color() for panel in panels]
    assert colours[0] == colours[1] != panels[1].axes[0].lines[1].get_color()
    with pytest.raises(ValueError, match="nothing to draw in 1 kinds of noise"):
        draw_robustness({"blur": {}}, {"blur": "pixels"}, "top1")


# SVG


def nasty_panel() -> Figure:
    """A panel whose names are foreign text."""
    lines = [Line(NASTY, [(1, 0.5), (2, 2.0)], {"color": "red", "marker": "o"}), Line("_hidden $", [(1, 1)], {})]
    return draw_panel("<title> $a$", lines, NASTY)


def test_svg_stands_alone_scales_and_says_what_it_shows(attempt) -> None:
    with attempt("names", 3):
        text = to_svg(nasty_panel(), "one")
        root = ElementTree.fromstring(text)
        assert root.get("viewBox").startswith("0 0 288 ") and not {"width", "height"} & set(root.keys())
        assert root.get("role") == "img"
        assert root.get("aria-label").startswith(
            "<title> $a$. <b>$x$ & 'y' \ufffd: 0.5 \N{RIGHTWARDS ARROW} 2; _hidden $: 1"
        )
        titles = [element.text for element in root.iter() if element.tag.endswith("title")]
        assert titles == ["<b>$x$ & 'y' \ufffd: 0.5 \N{RIGHTWARDS ARROW} 2", "_hidden $: 1"]
        shown = [element.text for element in root.iter() if element.tag.endswith("text")]
        assert {"<title> $a$", "<b>$x$ & 'y' \ufffd", "_hidden $", "epoch", "1", "2"} <= set(shown)
        tags = {element.tag.split("}")[1] for element in root.iter()}
        assert tags <= {"svg", "g", "path", "text", "title", "defs", "clipPath", "rect", "use"}
        addresses = [
            value for element in root.iter() for key, value in element.items() if "href" in key or "url(" in value
        ]
        assert addresses and all(re.match(r"(url\()?#one-\w+", value) for value in addresses)
        assert text.count("http") == 1  # the name space


def test_svg_has_the_same_text_every_time_and_ids_of_its_own() -> None:
    assert to_svg(nasty_panel()) == to_svg(nasty_panel())
    one, two = (re.findall(r' id="([^"]+)"', to_svg(nasty_panel(), name)) for name in ("one", "two"))
    assert one and len(set(one + two)) == len(one) + len(two)
    for name in ("one", "two"):
        text = to_svg(nasty_panel(), name)
        used = set(re.findall(r"#((?:one|two)-\w+)", text))
        assert used and used <= set(re.findall(r' id="([^"]+)"', text))


def test_letters_of_charts_can_be_read_and_colours_can_be_seen() -> None:
    log = history(*(line(number, num_layers=5) for number in (1, 2)))
    for figure in (*draw_curves(log, METRICS), *draw_dynamics(log), draw_precision_recall({"a": curve([True], 1)})):
        sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", to_svg(figure))]
        assert min(sizes) >= 8.5  # of 288 units, which a telephone shows on about 320 pixels
    palette = (*figures.COLOURS, *curves.SPIKING, *curves.ANALOGUE, *map(curves.DEPTH, np.linspace(0, 1, 20)))
    for colour in palette:
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in matplotlib.colors.to_rgb(colour)]
        assert 1.05 / (0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2] + 0.05) >= 3, colour
    styles = [figures.style_of(index) for index in range(32)]
    assert len({(style["color"], str(style["linestyle"])) for style in styles}) == 32


def test_long_names_are_shortened_and_whole_in_the_title() -> None:
    name = "backbone." * 9 + "spike"
    root = ElementTree.fromstring(to_svg(draw_panel("a", [Line(name, [(1, 1)], {})], "b")))
    shown = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert "\N{HORIZONTAL ELLIPSIS}" + "backbone." * 4 + "spike" in shown and name not in shown
    assert f"{name}: 1" in [element.text for element in root.iter() if element.tag.endswith("title")]


def test_a_sheet_has_even_rows_and_no_more_than_twelve_inches(tmp_path: Path) -> None:
    small = [Figure(figsize=(2, 1), dpi=10) for _ in range(7)]
    assert pixels_of(tmp_path, small).shape == (20, 80, 3)  # four and three
    assert pixels_of(tmp_path, [*small[:2], Figure(figsize=(5, 2), dpi=10)]).shape == (30, 50, 3)
    assert pixels_of(tmp_path, Figure(figsize=(20, 1), dpi=10)).shape == (10, 200, 3)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (0.3, "0.3"), (1000, "1000"), (0.00241, "2.4e-3"), (1e-5, "1e-5"), (25000, "2.5e4"), (-0.5, "-0.5")],
)
def test_ticks_are_short(value: float, expected: str) -> None:
    assert figures.short_number(value) == expected


def test_a_title_is_shown_and_is_no_id() -> None:
    figure = Figure()
    set_title(figure.text(0, 0, "x"), "a title")
    text = to_svg(figure)
    assert "<title>a title</title>" in text and "a title" not in re.findall(r'id="([^"]*)"', text)
