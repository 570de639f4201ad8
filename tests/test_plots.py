"""Pictures: they are written, have a sensible size, and show what they should where they should."""

from __future__ import annotations

import copy
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from PIL import Image
from torch import Tensor

from detection.evaluation import PrecisionRecall
from detection.plots import plot_comparison, plot_curves, plot_dynamics, plot_precision_recall, plot_predictions

NAMES = ["cat", "dog", "a class with a very long name indeed"]
TOP, LEFT = 40, 8  # pixels above the first picture (the legend) and left of it


def epoch(number: int, *, evaluated: bool = True, spiking: bool = True, num_layers: int = 3) -> dict:
    """One line of a run's metrics.jsonl."""
    entry = {"epoch": number, "lr": 0.1, "loss": 2 / number, "loss/classification": 1.9 / number, "loss/hoyer": 1e-3}
    if evaluated:
        entry |= {"AP": 0.1 * number, "AP50": 0.15 * number, "AP75": -1.0}
    if evaluated and spiking:
        layers = [f"backbone.stage{i}.spike" for i in range(num_layers)]
        entry["activity"] = 0.2
        entry["activity_per_layer"] = {layer: 0.1 + 0.01 * i for i, layer in enumerate(layers)}
        entry["v_th"] = dict.fromkeys(layers, -1.0)
        entry["extremum"] = dict.fromkeys(layers, 0.5)
        entry["hoyer_per_layer"] = dict.fromkeys(layers, 100.0)
    return entry


def read(path: Path) -> np.ndarray:
    """(H, W, 3), 0..255; the file has to be a PNG."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def boxes(*rows: list[float], labels: list[int] | None = None, scores: list[float] | None = None) -> dict[str, Tensor]:
    n = len(rows)
    return {
        "boxes": torch.tensor(rows, dtype=torch.float32).reshape(n, 4),
        "labels": torch.tensor([1] * n if labels is None else labels, dtype=torch.int64),
        "scores": torch.tensor([0.9] * n if scores is None else scores),
    }


def sheet(path: Path, images: list[Tensor], predictions: list[dict], targets: list[dict], **options) -> np.ndarray:
    plot_predictions(images, predictions, targets, NAMES, path, **options)
    return read(path)


# Curves


@pytest.mark.parametrize(
    ("log", "rows"),
    [
        ([epoch(n, evaluated=n % 2 == 0) for n in range(1, 6)], 2),  # losses, precision, activity, thresholds
        ([epoch(1)], 2),
        ([epoch(n, num_layers=30) for n in (1, 2)], 2),
        ([epoch(n, num_layers=1) for n in (1, 2)], 2),
        ([epoch(n, spiking=False) for n in (1, 2)], 1),  # losses, precision
        ([epoch(n, evaluated=False) for n in (1, 2)], 1),  # losses alone
        ([{"epoch": 1, "activity": 0.1}], 1),
        ([{k: v for k, v in epoch(1).items() if k != "extremum"}], 2),  # three panels: the last takes a whole row
    ],
)
def test_curves_have_a_row_per_two_panels(tmp_path: Path, log: list[dict], rows: int) -> None:
    before = copy.deepcopy(log)
    plot_curves(log, tmp_path / "curves.png")
    pixels = read(tmp_path / "curves.png")
    assert pixels.shape == (420 * rows, 1200, 3)
    for half in (pixels[-420:, :600], pixels[-420:, 600:]):  # no hole in the last row
        assert (half < 128).all(-1).sum() > 200
    assert log == before


@pytest.mark.parametrize(
    ("change", "alone"),
    [
        ({"loss": float("nan"), "AP": -1.0, "AP50": -1.0, "activity": 0.0, "v_th": {}}, True),
        ({"loss": 0.0, "loss/hoyer": 0.0, "extremum": {"backbone.stage1.spike": 0.3}}, False),
        ({"loss/classification": -1.0, "AP": 0.0, "AP50": 0.0, "activity": None}, True),
    ],
)
def test_curves_with_odd_values(tmp_path: Path, change: dict, alone: bool) -> None:
    log = [epoch(1) | change] if alone else [epoch(1), epoch(2) | change]
    plot_curves(log, tmp_path / "curves.png")
    assert read(tmp_path / "curves.png").shape[1] == 1200


def test_curves_follow_their_values(tmp_path: Path) -> None:
    plot_curves([epoch(1), epoch(2)], tmp_path / "a.png")
    plot_curves([epoch(1), epoch(2) | {"v_th": dict.fromkeys(epoch(2)["v_th"], -1.2)}], tmp_path / "b.png")
    plot_curves([epoch(1), epoch(2) | {"v_th": dict.fromkeys(epoch(2)["v_th"], 1.0)}], tmp_path / "sign.png")
    a, b, sign = (read(tmp_path / f"{name}.png") for name in ("a", "b", "sign"))
    assert (a == sign).all()  # the threshold is |v_th|
    changed = np.argwhere((a != b).any(-1))
    assert len(changed) and changed[:, 0].min() >= 420 and changed[:, 1].min() >= 600  # the last panel alone


@pytest.mark.parametrize("log", [[], [{"epoch": 1, "lr": 0.1}]])
def test_nothing_to_plot_is_an_error(tmp_path: Path, log: list[dict]) -> None:
    with pytest.raises(ValueError, match=f"log: nothing to plot in {len(log)} epochs"):
        plot_curves(log, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


# Precision over recall


def curve(right: list[bool], num_boxes: int) -> PrecisionRecall:
    """Detections of falling score, each right or wrong."""
    return PrecisionRecall(np.linspace(1, 0, len(right)), np.cumsum(np.array(right, dtype=int)), num_boxes)


def axes_pixel(recall: float, precision: float) -> tuple[int, int]:
    """(row, column) in the picture: its axes are 900 x 560 pixels from (75, 50) on and end at 1.01 and 1.02."""
    return round(50 + 560 * (1 - precision / 1.02)), round(75 + 900 * recall / 1.01)


def colored(pixels: np.ndarray) -> np.ndarray:
    return np.ptp(pixels, axis=-1) > 60


@pytest.mark.parametrize(("num_classes", "rows"), [(1, 1), (3, 1), (20, 4), (80, 16)])
def test_precision_recall_has_a_legend_for_any_number_of_classes(tmp_path: Path, num_classes: int, rows: int) -> None:
    """The picture is as high as its legend needs, and every class has its coloured line there, none over the edge."""
    rng = np.random.default_rng(0)
    curves = {f"class number {i}": curve((rng.random(30) < 0.5).tolist(), 20) for i in range(num_classes)}
    curves["class without boxes and with a name too long for the legend" * 3] = curve([False], 0)
    plot_precision_recall(curves, tmp_path / "pr.png")
    pixels = read(tmp_path / "pr.png")
    assert pixels.shape == (int(100 * (6.95 + 0.162 * rows)), 1000, 3)
    assert (pixels[:, :15] == 255).all() and (pixels[:, -15:] == 255).all() and (pixels[-5:] == 255).all()
    lines = colored(pixels[660:]).any(1).astype(int)
    assert (np.diff(lines, prepend=0) == 1).sum() == rows


def test_precision_recall_is_drawn_where_it_is(tmp_path: Path) -> None:
    """Right, wrong, right of four boxes: precision 1 up to recall 1/4, 2/3 up to 2/4, nothing beyond."""
    plot_precision_recall({"a": curve([True, False, True], 4)}, tmp_path / "pr.png")
    drawn = colored(read(tmp_path / "pr.png"))

    def near(recall: float, precision: float) -> bool:
        row, column = axes_pixel(recall, precision)
        return bool(drawn[row - 2 : row + 3, column - 2 : column + 3].any())

    for point in ((0.02, 1), (0.24, 1), (0.25, 0.8), (0.26, 2 / 3), (0.49, 2 / 3), (0.5, 0.3), (0.5, 0.02)):
        assert near(*point), point
    for point in ((0.27, 1), (0.23, 2 / 3), (0.52, 2 / 3), (0.4, 0.3), (0.7, 0.1), (0.1, 0.5)):
        assert not near(*point), point


@pytest.mark.parametrize("right", [[], [False, False], [True]])
def test_precision_recall_of_few_detections(tmp_path: Path, right: list[bool]) -> None:
    plot_precision_recall({"a": curve(right, 1)}, tmp_path / "pr.png")
    assert read(tmp_path / "pr.png").shape[1] == 1000


def test_precision_recall_without_boxes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="curves: nothing to plot, none of 2 classes has boxes"):
        plot_precision_recall({"a": curve([], 0), "b": curve([False], 0)}, tmp_path / "pr.png")
    assert not (tmp_path / "pr.png").exists()


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


def test_bad_input_is_named(tmp_path: Path) -> None:
    path, image = tmp_path / "bad.png", torch.zeros(3, 8, 8)
    with pytest.raises(ValueError, match="got 0 images, 0 predictions, 0 targets"):
        plot_predictions([], [], [], NAMES, path)
    with pytest.raises(ValueError, match="got 1 images, 2 predictions, 1 targets"):
        plot_predictions([image], [boxes(), boxes()], [boxes()], NAMES, path)
    with pytest.raises(ValueError, match=r"image at index 1: .* got torch\.float32 of shape \(8, 8\)"):
        plot_predictions([image, image[0]], [boxes()] * 2, [boxes()] * 2, NAMES, path)
    with pytest.raises(ValueError, match=r"image at index 0: .* got torch\.uint8 of shape \(3, 8, 8\)"):
        plot_predictions([image.byte()], [boxes()], [boxes()], NAMES, path)
    with pytest.raises(ValueError, match=r"prediction at index 0: found label 4, expected 1\.\.3"):
        plot_predictions([image], [boxes([1, 1, 4, 4], labels=[4])], [boxes()], NAMES, path)
    with pytest.raises(ValueError, match="columns: expected at least 1, got 0"):
        plot_predictions([image], [boxes()], [boxes()], NAMES, path, columns=0)
    assert not path.exists()


def test_global_state_of_matplotlib_is_left_alone(tmp_path: Path) -> None:
    """No settings changed, and no figure left in pyplot's list, where it would stay in memory."""
    before = matplotlib.rcParams.copy()
    plot_curves([epoch(1, evaluated=False)], tmp_path / "curves.png")
    sheet(tmp_path / "sheet.png", [torch.zeros(3, 8, 8)], [boxes()], [boxes()])
    plot_precision_recall({"a": curve([True], 1)}, tmp_path / "pr.png")
    assert matplotlib.rcParams.copy() == before
    assert pyplot.get_fignums() == []


# Spike layers, variants


def test_dynamics_show_every_layer(tmp_path):
    log = [epoch(number, num_layers=7) for number in (1, 2, 3)]
    for entry, center in ((log[0], 10), (log[-1], 30)):
        shares = np.exp(-((np.arange(40) - center) ** 2) / 20)
        entry["potentials"] = {layer: list(shares / shares.sum()) for layer in entry["v_th"]}
    plot_dynamics(log, tmp_path / "with.png")
    with_histograms = read(tmp_path / "with.png")
    plot_dynamics([{key: value for key, value in e.items() if key != "potentials"} for e in log], tmp_path / "no.png")
    without = read(tmp_path / "no.png")
    assert with_histograms.shape[1] == without.shape[1] == 1200
    assert with_histograms.shape[0] > without.shape[0] + 300  # two rows of five
    red = (with_histograms[..., 0] > 180) & (with_histograms[..., 1:].max(axis=2) < 90)
    lines = red[without.shape[0] :].sum(axis=0)  # the threshold of each histogram is a red line
    columns = np.flatnonzero(lines > 60)
    assert len(np.split(columns, np.flatnonzero(np.diff(columns) > 5) + 1)) == 5


def test_dynamics_need_spike_layers(tmp_path):
    with pytest.raises(ValueError, match="no spike layers in 2 epochs"):
        plot_dynamics([epoch(1, spiking=False), epoch(2, spiking=False)], tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_comparison_has_a_bar_as_long_as_its_mean(tmp_path):
    plot_comparison({"all": [0.8, 0.8], "half": [0.3, 0.5], "none": [0.0]}, "top1", tmp_path / "a.png")
    picture = read(tmp_path / "a.png")
    grey = (picture == 204).all(axis=2).sum(axis=1)  # length of the bar in each row
    lengths = sorted(set(grey[grey > 30].tolist()))
    assert max(lengths) / np.median([length for length in lengths if length < 0.7 * max(lengths)]) == pytest.approx(
        2, abs=0.15
    )
