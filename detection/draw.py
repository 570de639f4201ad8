"""Images with boxes and names in them."""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image
from torch import Tensor

DPI = 100  # pixels per inch: a figure of 12 inches is 1200 pixels wide


def plot_predictions(
    images: Sequence[Tensor],
    predictions: Sequence[Mapping[str, Tensor]],
    targets: Sequence[Mapping[str, Tensor]],
    class_names: Sequence[str],
    path: str | PathLike[str],
    *,
    score_threshold: float = 0.3,
    columns: int = 4,
) -> None:
    """Write a contact sheet: true boxes dashed in white, predicted ones solid in their class's colour, with a label.

    Args:
        images: per image (3, H, W) or (1, H, W), values in [0, 1]; sizes may differ.
        predictions: torchvision's detections per image: "boxes" (N, 4) x1 y1 x2 y2 in pixels of the image,
            "scores" (N,), "labels" (N,) in 1..K.
        targets: torchvision's targets per image: "boxes" (M, 4).
        class_names: names of the labels 1..K, so without the background.
        path: PNG file to write.
        score_threshold: predictions with a lower score are not drawn.
        columns: images per row.
    """
    if len(images) == 0 or not len(images) == len(predictions) == len(targets):
        raise ValueError(
            f"expected one prediction and one target per image and at least one image, got {len(images)} images, "
            f"{len(predictions)} predictions, {len(targets)} targets"
        )
    if columns < 1:
        raise ValueError(f"columns: expected at least 1, got {columns}")
    for index, (image, prediction) in enumerate(zip(images, predictions, strict=True)):
        if image.dim() != 3 or image.shape[0] not in (1, 3) or not image.is_floating_point():
            raise ValueError(
                f"image at index {index}: expected floats of shape (3, H, W) or (1, H, W) in [0, 1], "
                f"got {image.dtype} of shape {tuple(image.shape)}"
            )
        wrong = [label for label in prediction["labels"].tolist() if not 1 <= label <= len(class_names)]
        if wrong:
            raise ValueError(f"prediction at index {index}: found label {wrong[0]}, expected 1..{len(class_names)}")

    # Every picture gets a cell of one width; a row is as high as its tallest picture needs. All lengths in inches.
    columns = min(columns, len(images))
    cell, gap, legend = max(3.6, 7.2 / columns), 0.08, 0.4
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    sizes = [_fit(image.shape[-1], image.shape[-2], cell, 1.25 * cell) for image in images]
    heights = [max(sizes[index][1] for index in row) for row in rows]
    width, height = columns * (cell + gap) + gap, legend + sum(heights) + gap * len(rows)
    figure = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(figure)  # text can be measured only on a canvas
    bottom = height - legend
    for row, row_height in zip(rows, heights, strict=True):
        bottom -= row_height
        for column, index in enumerate(row):
            w, h = sizes[index]
            left = gap + column * (cell + gap) + (cell - w) / 2
            lower = bottom + (row_height - h) / 2
            axes = figure.add_axes((left / width, lower / height, w / width, h / height))
            _draw_image(axes, images[index])
            _draw_predictions(axes, predictions[index], class_names, score_threshold)
            _draw_targets(axes, targets[index])
        bottom -= gap
    solid = Line2D([], [], color=_class_color(1), linewidth=2)
    figure.legend(
        [Line2D([], [], **_TARGET_STYLE), solid],
        ["dashed = true", f"solid = predicted, colour = class, score \N{GREATER-THAN OR EQUAL TO} {score_threshold:g}"],
        loc="upper center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=2,
        frameon=False,
        fontsize=10,
        handlelength=3.5,
    )
    _write(figure, path)


def draw_detections(image: np.ndarray, prediction: Mapping[str, Tensor], class_names: Sequence[str]) -> np.ndarray:
    """The image with its boxes, a label at each, as pixels (H', W', 3) uint8.

    H' and W' are the image's own, unless it is too small for labels or very large: its longer side becomes at least
    640 and at most 2560 pixels. A very long and thin image stands on a grey ground, as high or wide as labels need.

    Args:
        image: (H, W, 3) uint8 RGB.
        prediction: "boxes" (N, 4) x1 y1 x2 y2 in pixels of the image, "scores" (N,), "labels" (N,) in 1..K; all of
            them are drawn.
        class_names: names of the labels 1..K.
    """

    def draw(axes: Axes) -> None:
        _draw_predictions(axes, prediction, class_names, score_threshold=0.0)

    return _draw_over(image, draw)


def draw_classes(image: np.ndarray, rows: Sequence[tuple[str, float]]) -> np.ndarray:
    """The image with class names and their probabilities in its corner, as pixels sized as by `draw_detections`.

    Args:
        image: (H, W, 3) uint8 RGB.
        rows: class name and probability in [0, 1], the likeliest first.
    """

    def draw(axes: Axes) -> None:
        axes.text(
            0.01,
            0.99,
            "\n".join(f"{probability:.3f}  {name}" for name, probability in rows),
            transform=axes.transAxes,
            fontsize=11,
            color="white",
            va="top",
            linespacing=1.3,
            bbox={"facecolor": "black", "alpha": 0.65, "edgecolor": "none", "pad": 4},
        )

    return _draw_over(image, draw)


# Boxes

_TARGET_STYLE: Mapping[str, Any] = {
    "color": "white",
    "linewidth": 1.3,
    "linestyle": (0, (4, 2.5)),
    "path_effects": [patheffects.withStroke(linewidth=3, foreground="black")],
}


def _fit(width: float, height: float, max_width: float, max_height: float) -> tuple[float, float]:
    """Largest size of the same proportions."""
    scale = min(max_width / width, max_height / height)
    return width * scale, height * scale


def _class_color(label: int) -> tuple[float, float, float]:
    """A saturated colour; the golden ratio keeps the hues of neighbouring labels far apart, for any number of them."""
    return colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.9, 1.0 if label % 2 else 0.8)


def _draw_image(axes: Axes, image: Tensor) -> None:
    pixels = image.detach().to("cpu", torch.float32).clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()  # H, W, 3
    height, width = pixels.shape[:2]
    axes.imshow(pixels, extent=(0, width, height, 0), aspect="auto")  # pixel edges are integers, as in the boxes
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()


def _draw_over(image: np.ndarray, draw: Callable[[Axes], None]) -> np.ndarray:
    """The pixels of a picture that consists of the image and what `draw` puts on its axes."""
    height, width = image.shape[:2]
    scale = min(max(max(height, width), 640), 2560) / max(height, width)  # pixels of the picture per pixel of the image
    size = [max(1, round(length * scale)) for length in (width, height)]
    # A few pixels much enlarged are shown as such.
    resampling = Image.Resampling.NEAREST if scale > 3 else Image.Resampling.BILINEAR
    pixels = np.asarray(Image.fromarray(image).resize(size, resampling))
    # Text and lines are laid out on at most 1000 pixels and enlarged with the rest, to be seen on a large picture too.
    enlarged = max(1.0, max(size) / 1000)
    whole = [max(length, round(120 * enlarged)) for length in size]  # room for labels
    # A hundredth of a pixel more, since the canvas rounds down; the axes do without it.
    figure = Figure(figsize=[(length + 0.01) / (DPI * enlarged) for length in whole], dpi=DPI, facecolor="0.3")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, *(length / (length + 0.01) for length in whole)))
    axes.imshow(pixels, extent=(0, width, height, 0), aspect="auto", interpolation="nearest")
    ground = [(length / own - 1) / 2 for length, own in zip(whole, size, strict=True)]  # on either side, in images
    axes.set_xlim(-ground[0] * width, (1 + ground[0]) * width)
    axes.set_ylim((1 + ground[1]) * height, -ground[1] * height)
    axes.set_axis_off()
    draw(axes)
    figure.set_dpi(DPI * enlarged)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def _draw_targets(axes: Axes, target: Mapping[str, Tensor]) -> None:
    for x1, y1, x2, y2 in target["boxes"].tolist():
        style = {"edgecolor" if key == "color" else key: value for key, value in _TARGET_STYLE.items()}
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, zorder=3, **style))


def _draw_predictions(
    axes: Axes, prediction: Mapping[str, Tensor], class_names: Sequence[str], score_threshold: float
) -> None:
    rows = zip(*(prediction[key].tolist() for key in ("scores", "labels", "boxes")), strict=True)
    taken: list[Bbox] = []
    for score, label, box in sorted((row for row in rows if row[0] >= score_threshold), reverse=True):
        color = _class_color(label)
        x1, y1, x2, y2 = box
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=2, zorder=2))
        red, green, blue = color
        text = axes.text(
            0,
            0,
            f"{class_names[label - 1]} {score:.2f}",
            fontsize=7,
            color="black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white",
            va="bottom",
            zorder=4 + score,  # the surest label lies on top
            clip_on=True,
            bbox={"facecolor": color, "edgecolor": "none", "pad": 1},
        )
        taken.append(_place(text, axes, box, taken))


def _place(text: Text, axes: Axes, box: Sequence[float], taken: Sequence[Bbox]) -> Bbox:
    """Put the label at a corner of its box, inside the picture and if it can be off the other labels.

    Returns its place in pixels of the figure, where y points up.
    """
    pad = 1 * DPI / 72  # the label's frame is 1 point wide
    size = text.get_window_extent()
    width, height = size.width + 2 * pad, size.height + 2 * pad
    (left, bottom), (right, top) = axes.transData.transform([(box[0], box[3]), (box[2], box[1])])
    picture = axes.bbox
    places = []
    for y in (top, top - height, bottom - height, bottom, top - 2 * height):  # above the box, inside, below, inside
        for x in (left, right - width):
            x_inside = max(min(x, picture.x1 - width), picture.x0)
            y_inside = max(min(y, picture.y1 - height), picture.y0)
            places.append(Bbox.from_bounds(x_inside, y_inside, width, height))
    place = min(places, key=lambda place: place.count_overlaps(taken))  # the first of the best
    text.set_position(axes.transData.inverted().transform((place.x0 + pad, place.y0 + pad)))
    return place


def _write(figure: Figure, path: str | PathLike[str]) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=DPI)
