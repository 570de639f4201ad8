"""Images with boxes and names in them."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Affine2D, Bbox, BboxBase, BboxTransformTo, Transform, TransformedBbox
from PIL import Image
from torch import Tensor

from detection.data.pictures import as_rgb
from detection.figures import TEXT_SIZE, WIDTH, set_title, shorten
from detection.fonts import drawable, take_literally
from detection.spikemaps import SpikeMap, rows_of

DPI = 100  # pixels per inch: a figure of 12 inches is 1200 pixels wide
GREY = (77, 77, 77, 255)  # behind an image that is too thin for labels
MAX_ASPECT = 4  # of an image in a report
THIN = 1.3  # points, the edge of a true box
Colour = str | tuple[float, float, float]


class Ground(NamedTuple):
    """A place to draw boxes on.

    Attributes:
        on: the axes or the figure.
        transform: from pixels of the image to those of the figure.
        room: for labels, in pixels of the figure.
    """

    on: Axes | Figure
    transform: Transform
    room: BboxBase

    @classmethod
    def of(cls, axes: Axes) -> Ground:
        """Return axes that an image fills."""
        return cls(axes, axes.transData, axes.bbox)


class Box(NamedTuple):
    """A rectangle on an image.

    Attributes:
        corners: x1 y1 x2 y2 in pixels of the image.
        colour: of its edge, and of the ground of its label.
        dashed: whether the edge is, as that of true boxes; it has a dark halo then.
        width: of the edge, in points.
        label: beside the box, "" for none; those of earlier boxes find a place first and lie on top.
        title: in words, for the pointer that rests on the box.
    """

    corners: Sequence[float]
    colour: Colour
    dashed: bool = False
    width: float = 2.0
    label: str = ""
    title: str = ""


def draw_predictions(
    images: Sequence[Tensor],
    predictions: Sequence[Mapping[str, Tensor]],
    targets: Sequence[Mapping[str, Tensor]],
    class_names: Sequence[str],
    *,
    score_threshold: float = 0.3,
    columns: int = 4,
) -> Figure:
    """Return a contact sheet: true boxes dashed in white, predicted ones solid in their class's colour, with a label.

    Args:
        images: per image (3, H, W) or (1, H, W), values in [0, 1]; sizes may differ.
        predictions: torchvision's detections per image: "boxes" (N, 4) x1 y1 x2 y2 in pixels of the image,
            "scores" (N,), "labels" (N,) in 1..K.
        targets: torchvision's targets per image: "boxes" (M, 4).
        class_names: names of the labels 1..K, so without the background.
        score_threshold: predictions with a lower score are not drawn.
        columns: images per row.

    Raises:
        ValueError: the lengths differ, an image has another shape, or a label is out of range.
    """
    _check(images, predictions, targets, class_names, columns)
    # Every picture gets a cell of one width; a row is as high as its tallest picture needs. All lengths in inches.
    columns = min(columns, len(images))
    cell, gap, legend = max(3.6, 7.2 / columns), 0.08, 0.4
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    scales = [min(cell / image.shape[-1], 1.25 * cell / image.shape[-2]) for image in images]
    sizes = [(scale * image.shape[-1], scale * image.shape[-2]) for scale, image in zip(scales, images, strict=True)]
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
            true = [Box(corners, "white", dashed=True, width=THIN) for corners in targets[index]["boxes"].tolist()]
            _draw_boxes(Ground.of(axes), _boxes_of(predictions[index], class_names, score_threshold) + true)
        bottom -= gap
    handles = [Line2D([], [], color="white", **_dashed(THIN)), Line2D([], [], color=_class_colour(1), linewidth=2)]
    solid = f"solid = predicted, colour = class, score \N{GREATER-THAN OR EQUAL TO} {score_threshold:g}"
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 1.0), "ncols": 2, "handlelength": 3.5}
    figure.legend(handles, ["dashed = true", solid], frameon=False, fontsize=10, **place)
    figure.set_label(f"{len(images)} images with true and predicted boxes")
    return figure


def draw_boxes(image: np.ndarray, boxes: Sequence[Box], label: str) -> Figure:
    """Return an image with boxes as a figure of a panel's width, a very long and thin one on a grey ground.

    Args:
        image: (H, W, 3) uint8 RGB.
        boxes: drawn in this order.
        label: what a screen reader says.
    """
    least = max(image.shape[:2]) // MAX_ASPECT
    height, width = (max(side, least) for side in image.shape[:2])
    ground = np.full((height, width, 3), GREY[:3], dtype=np.uint8)
    ground[: image.shape[0], : image.shape[1]] = image
    figure = Figure(figsize=(WIDTH, WIDTH * height / width), dpi=DPI)
    FigureCanvasAgg(figure)  # text can be measured only on a canvas
    axes = figure.add_axes((0, 0, 1, 1))
    _draw_image(axes, ground)
    _draw_boxes(Ground.of(axes), boxes, TEXT_SIZE)
    figure.set_label(label)
    return figure


def draw_detections(image: np.ndarray, prediction: Mapping[str, Tensor], class_names: Sequence[str]) -> np.ndarray:
    """Return the image with its boxes, a label at each, as pixels (H', W', 3) uint8.

    H' and W' are the image's own, unless it is too small for labels or very large: its longer side becomes at least
    640 and at most 2560 pixels. A very long and thin image stands on a grey ground, as high or wide as labels need.

    Args:
        image: (H, W, 3) uint8 RGB.
        prediction: "boxes" (N, 4) x1 y1 x2 y2 in pixels of the image, "scores" (N,), "labels" (N,) in 1..K; all of
            them are drawn.
        class_names: names of the labels 1..K.
    """
    return _draw_over(image, lambda ground: _draw_boxes(ground, _boxes_of(prediction, class_names)))


def draw_classes(image: np.ndarray, rows: Sequence[tuple[str, float]]) -> np.ndarray:
    """Return the image with class names and their probabilities in its corner, as pixels sized as by `draw_detections`.

    Args:
        image: (H, W, 3) uint8 RGB.
        rows: class name and probability in [0, 1], the likeliest first.
    """

    def draw(ground: Ground) -> None:
        text = "\n".join(f"{probability:.3f}  {drawable(shorten(name))}" for name, probability in rows)
        frame = {"facecolor": "black", "alpha": 0.65, "edgecolor": "none", "pad": 4}
        style = {"fontsize": 11, "color": "white", "va": "top", "linespacing": 1.3, "bbox": frame}
        take_literally(ground.on.text(0.01, 0.99, text, transform=BboxTransformTo(ground.room), **style))

    return _draw_over(image, draw)


def draw_spike_maps(
    image: Tensor | np.ndarray,
    maps: Sequence[SpikeMap],
    *,
    title: str | None = None,
    columns: int = 4,
    vmax: float | None = None,
) -> Figure:
    """Return the image beside its spike maps, each titled with stage, size and activity.

    All maps share one colour scale, so that a dark map is one that fires little. Of several time steps the first row
    has the means, and each further row the maps of a step, of eight at most.

    Args:
        image: (3, H, W) tensor or (H, W, 3) array, floats in [0, 1] or uint8.
        maps: of `spike_maps`, or those of several images one after the other.
        title: above the picture.
        columns: pictures per row, of one time step.
        vmax: rate of the brightest colour, in (0, 1]; None: what only a hundredth of the cells of some map exceeds.

    Raises:
        ValueError: there are no maps, as for a network without spike layers.
    """
    if not maps:
        raise ValueError("maps: there are none; a network without spike layers (activation relu) has no spike maps")
    if isinstance(image, Tensor):
        image = image.detach().cpu().permute(1, 2, 0).numpy()
    height, width = image.shape[:2]
    steps = rows_of(maps)
    shown = [*maps, *(entry for row in steps.values() for entry in row)]
    vmax = vmax or brightest_rate(maps)
    columns = len(maps) + 1 if steps else min(columns, len(maps) + 1)
    num_rows = 1 + len(steps) if steps else math.ceil((len(maps) + 1) / columns)
    cell = 1.9 if steps else 2.8  # inches; very long images are drawn less long than they are
    ratio = min(max(height / width, 1 / 3), 2)
    figure = Figure(
        figsize=(columns * cell + 0.8, num_rows * (cell * ratio + 0.45) + (0.5 if title else 0.2)),
        dpi=DPI,
        layout="constrained",
    )
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.08)
    FigureCanvasAgg(figure)
    grid = figure.subplots(num_rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
        axes.set(xticks=[], yticks=[])  # which the layout would measure although none is seen
        axes.set_box_aspect(ratio)
    for axes, step in zip(grid[columns::columns], steps, strict=False):
        axes.text(0.5, 0.5, f"step {step}", ha="center", va="center", fontsize=11, transform=axes.transAxes)
    places = [axes for index, axes in enumerate(grid) if index and (index % columns or not steps)]
    grid[0].imshow(image, aspect="auto")
    grid[0].set_title("image", fontsize=9)  # which may be drawn larger than it is
    pictures = [_draw_map(axes, entry, vmax) for axes, entry in zip(places, shown, strict=False)]
    bar = figure.colorbar(pictures[0], ax=list(grid), aspect=30, pad=0.01, extend="max" if vmax < 1 else "neither")
    bar.set_label("share of channels that fire", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    if title:
        figure.suptitle(shorten(title, 80), fontsize=11)
    return figure


def brightest_rate(maps: Sequence[SpikeMap]) -> float:
    """Return the rate, in [0.01, 1], that only a hundredth of the cells of some map, or of a step of it, exceeds."""
    shown = [*maps, *(entry for row in rows_of(maps).values() for entry in row)]
    return min(1.0, max(0.01, *(float(np.quantile(entry.rate, 0.99)) for entry in shown)))


def _draw_map(axes: Axes, entry: SpikeMap, vmax: float) -> AxesImage:
    rows, cells = entry.rate.shape
    words = f"{cells}\N{MULTIPLICATION SIGN}{rows}, {100 * entry.activity:.1f} % active"
    axes.set_title(f"{entry.name}{', mean' if entry.steps else ''}\n{words}", fontsize=9)
    return axes.imshow(entry.rate, cmap="inferno", vmin=0, vmax=vmax, aspect="auto", interpolation="nearest")


# Boxes


def _dashed(width: float) -> dict[str, Any]:
    halo = patheffects.withStroke(linewidth=width + 1.7, foreground="black")
    return {"linewidth": width, "linestyle": (0, (4, 2.5)), "path_effects": [halo]}


def _check(
    images: Sequence[Tensor],
    predictions: Sequence[Mapping[str, Tensor]],
    targets: Sequence[Mapping[str, Tensor]],
    class_names: Sequence[str],
    columns: int,
) -> None:
    if len(images) == 0 or not len(images) == len(predictions) == len(targets):
        raise ValueError(
            f"expected one prediction and one target per image and at least one image, got {len(images)} images, "
            f"{len(predictions)} predictions, {len(targets)} targets"
        )
    if columns < 1:
        raise ValueError(f"columns: expected at least 1, got {columns}")
    for index, (image, prediction) in enumerate(zip(images, predictions, strict=True)):
        if image.dim() != 3 or (image.shape[0] % 2 and image.shape[0] not in (1, 3)) or not image.is_floating_point():
            raise ValueError(
                f"image at index {index}: expected floats of shape (3, H, W) or (1, H, W) in [0, 1], "
                f"got {image.dtype} of shape {tuple(image.shape)}"
            )
        wrong = [label for label in prediction["labels"].tolist() if not 1 <= label <= len(class_names)]
        if wrong:
            raise ValueError(f"prediction at index {index}: found label {wrong[0]}, expected 1..{len(class_names)}")


def _class_colour(label: int) -> tuple[float, float, float]:
    """A saturated colour; the golden ratio keeps the hues of neighbouring labels far apart, for any number of them."""
    return colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.9, 1.0 if label % 2 else 0.8)


def _readable_on(colour: Colour) -> str:
    """Black or white, whichever has the higher contrast (WCAG 2)."""
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
    return "black" if 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2] > 0.179 else "white"


def _draw_image(axes: Axes, image: Tensor | np.ndarray) -> None:
    """Draw floats (C, H, W) in [0, 1] or (H, W, 3) uint8."""
    if isinstance(image, Tensor):
        image = as_rgb(image.detach().to("cpu", torch.float32).clamp(0, 1)).permute(1, 2, 0).numpy()
    height, width = image.shape[:2]
    axes.imshow(image, extent=(0, width, height, 0), aspect="auto")  # pixel edges are integers, as in the boxes
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()


def _draw_over(image: np.ndarray, draw: Callable[[Ground], None]) -> np.ndarray:
    """Return the pixels of a picture that consists of the image and what `draw` puts on it."""
    height, width = image.shape[:2]
    scale = min(max(max(height, width), 640), 2560) / max(height, width)  # pixels of the picture per pixel of the image
    size = [max(1, round(length * scale)) for length in (width, height)]
    # A few pixels much enlarged are shown as such.
    resampling = Image.Resampling.NEAREST if scale > 3 else Image.Resampling.BILINEAR
    pixels = np.asarray(Image.fromarray(image).resize(size, resampling).convert("RGBA"))
    # Text and lines are laid out on at most 1000 pixels and enlarged with the rest, to be seen on a large picture too.
    enlarged = max(1.0, max(size) / 1000)
    whole = [max(length, round(120 * enlarged)) for length in size]  # room for labels
    # A hundredth of a pixel more, since the canvas rounds down.
    figure = Figure(figsize=[(length + 0.01) / (DPI * enlarged) for length in whole], dpi=DPI, frameon=False)
    canvas = FigureCanvasAgg(figure)
    # On the figure itself: axes, which have scales and ticks, would take longer than all boxes.
    left, top = ((length - own) / 2 for length, own in zip(whole, size, strict=True))
    inches = Affine2D().scale(size[0] / width, -size[1] / height).translate(left, whole[1] - top)
    inches.scale(1 / (DPI * enlarged))
    room = Bbox.from_bounds(0, 0, *(length / (DPI * enlarged) for length in whole))
    draw(Ground(figure, inches + figure.dpi_scale_trans, TransformedBbox(room, figure.dpi_scale_trans)))
    figure.set_dpi(DPI * enlarged)
    renderer = canvas.get_renderer()
    picture = np.asarray(renderer.buffer_rgba())
    if whole != size:
        picture[:] = GREY
    row, column = math.ceil(top), math.ceil(left)
    picture[row : row + size[1], column : column + size[0]] = pixels
    figure.draw(renderer)
    return np.array(Image.fromarray(picture).convert("RGB"))


def _boxes_of(prediction: Mapping[str, Tensor], class_names: Sequence[str], score_threshold: float = 0.0) -> list[Box]:
    """Return detections as boxes, the surest first."""
    rows = zip(*(prediction[key].tolist() for key in ("scores", "labels", "boxes")), strict=True)
    return [
        Box(corners, _class_colour(label), label=f"{class_names[label - 1]} {score:.2f}")
        for score, label, corners in sorted((row for row in rows if row[0] >= score_threshold), reverse=True)
    ]


def _draw_boxes(ground: Ground, boxes: Sequence[Box], font_size: float = 7) -> None:
    taken: list[Bbox] = []
    for index, box in enumerate(boxes):
        x1, y1, x2, y2 = box.corners
        style = {"zorder": 3, **_dashed(box.width)} if box.dashed else {"zorder": 2, "linewidth": box.width}
        style |= {"fill": False, "edgecolor": box.colour, "transform": ground.transform}
        patch = ground.on.add_artist(Rectangle((x1, y1), x2 - x1, y2 - y1, **style))
        if box.title:
            set_title(patch, box.title)
        if box.label:
            style = {"fontsize": font_size, "color": _readable_on(box.colour), "zorder": 5 - index / 1e4}
            style |= {"bbox": {"facecolor": box.colour, "edgecolor": "none", "pad": 1}, "transform": ground.transform}
            text = ground.on.text(0, 0, drawable(shorten(box.label)), va="bottom", clip_on=True, **style)
            taken.append(_place(take_literally(text), ground, box.corners, taken))


def _place(text: Text, ground: Ground, box: Sequence[float], taken: Sequence[Bbox]) -> Bbox:
    """Put the label at a corner of its box, inside the picture and if it can be off the other labels.

    Returns its place in pixels of the figure, where y points up.
    """
    pad = 1 * DPI / 72  # the label's frame is 1 point wide
    size = text.get_window_extent()
    width, height = size.width + 2 * pad, size.height + 2 * pad
    (left, bottom), (right, top) = ground.transform.transform([(box[0], box[3]), (box[2], box[1])])
    picture = ground.room
    places = []
    for y in (top, top - height, bottom - height, bottom, top - 2 * height):  # above the box, inside, below, inside
        for x in (left, right - width):
            x_inside = max(min(x, picture.x1 - width), picture.x0)
            y_inside = max(min(y, picture.y1 - height), picture.y0)
            places.append(Bbox.from_bounds(x_inside, y_inside, width, height))
    place = min(places, key=lambda place: place.count_overlaps(taken))  # the first of the best
    text.set_position(ground.transform.inverted().transform((place.x0 + pad, place.y0 + pad)))
    return place
