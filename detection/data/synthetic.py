"""Drawn scenes, written as an ordinary COCO data set: to try, test and compare without a download."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

# Corners of a polygon, and their distances from its centre in turn.
SHAPES = {"circle": (48, (1,)), "square": (4, (1,)), "triangle": (3, (1,)), "star": (10, (1, 0.45))}
CATEGORIES = tuple(SHAPES)
SCALE = 4  # drawn pixels per image pixel and axis; averaging them smooths the edges
SIDE = (0.12, 0.45)  # longer side of an object's box, as a fraction of the scene's side
MAX_OBJECTS = 5
EMPTY_EVERY = 12  # every 12th scene, 8 %, has no object
MIN_VISIBLE = 0.35  # fraction of a shape that stays in the image and uncovered
DRAWING = 1  # part of the settings, so that scenes of an older way of drawing are not taken for these

# Distances in RGB (0..255). A colour at least BACKGROUND_CONTRAST from the background's mean and SHAPE_CONTRAST from
# the other shapes always exists: these spheres fill less than the colour cube, 4/3 pi (115^3 + 4 * 80^3) < 255^3.
BACKGROUND_CONTRAST = 115.0
SHAPE_CONTRAST = 80.0
TEXTURE_RANGE = 45.0  # largest distance of a background pixel from the background's mean, before the noise
NOISE = 5.0  # standard deviation of the noise over the finished scene


class Scene(NamedTuple):
    """One drawn scene.

    Shape:
        image: (H, W, 3) uint8.
        boxes: (M, 4) float64 x1 y1 x2 y2, tight around the whole shape inside the image, covered parts included.
        labels: (M,) int64 in 1..4, see CATEGORIES.
        masks: (M, SCALE * H, SCALE * W) bool, the whole shapes at the resolution they are drawn in.
        colors: (M, 3) float64 fill colours before the noise.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    masks: np.ndarray
    colors: np.ndarray


def draw_scenes(root: Path, *, num_train: int, num_val: int, size: int, seed: int) -> None:
    """Write root/train/*.png, root/val/*.png and root/annotations/{train,val}.json; the same seed, the same bytes.

    Scene i of a split does not depend on how many there are. Returns at once when root holds scenes of the same
    settings. All files appear together or, after an interruption, not at all.

    Args:
        root: folder to create.
        num_train, num_val: number of scenes.
        size: side of a scene in pixels.
        seed: of the drawing.

    Raises:
        ValueError: root holds scenes of other settings, or something else.
    """
    settings = {"num_train": num_train, "num_val": num_val, "size": size, "seed": seed, "drawing": DRAWING}

    def write(drawn: Path) -> None:
        (drawn / "annotations").mkdir()
        for split, (name, count) in enumerate((("train", num_train), ("val", num_val))):
            (drawn / name).mkdir()
            content = _write_split(drawn / name, split, count, settings)
            (drawn / "annotations" / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")

    def read_settings(drawn: Path) -> Any:
        return json.loads((drawn / "annotations" / "train.json").read_text(encoding="utf-8"))["info"]["settings"]

    write_once(root, settings, write, read_settings, "drawn scenes", "scenes drawn")


def write_once(
    root: Path,
    settings: dict[str, Any],
    write: Callable[[Path], None],
    read_settings: Callable[[Path], Any],
    kind: str,
    made: str,
) -> None:
    """Make a folder, all of it or nothing, unless it is there already, made with the same settings.

    Args:
        root: folder to create.
        settings: of what is made.
        write: writes everything, the settings too, into an empty folder.
        read_settings: gives the settings of what it has written; any of OSError, ValueError, KeyError and TypeError
            says that a folder holds something else.
        kind, made: of what is made, for the messages, such as "drawn scenes" and "scenes drawn".

    Raises:
        ValueError: root holds what was made with other settings, or something else.
    """
    root = Path(root)

    def is_there() -> bool:
        if not root.exists() or (root.is_dir() and not any(root.iterdir())):
            return False
        remedy = "choose another data.root or remove this folder"
        try:
            found = read_settings(root)
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{root}: holds something else than {kind}; {remedy}") from None
        if found != settings:
            raise ValueError(f"{root}: holds {made} with {found}, asked for {settings}; {remedy}")
        return True

    if is_there():
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as temporary:
        folder = Path(temporary) / root.name
        folder.mkdir()
        write(folder)
        try:
            os.rename(folder, root)
        except OSError:
            if not is_there():  # else another process has made the same in the meantime
                raise


def draw_scene(size: int, num_objects: int, rng: np.random.Generator) -> Scene:
    """A scene of size x size pixels; later shapes cover earlier ones, of each at least MIN_VISIBLE stays visible.

    A place for a shape is drawn up to 30 times, so a crowded scene may have fewer than `num_objects`.
    """
    canvas, mean = _background(size, rng)
    masks: list[np.ndarray] = []
    visible: list[np.ndarray] = []
    full_areas: list[float] = []
    boxes, labels, colors = [], [], []
    for _ in range(num_objects):
        label = int(rng.integers(1, len(CATEGORIES) + 1))
        color = _color(rng, mean, colors)
        for _ in range(30):
            points = _polygon(label, size, rng)
            image = Image.new("L", (SCALE * size, SCALE * size))
            ImageDraw.Draw(image).polygon([tuple(point) for point in points * SCALE], fill=255)
            mask = np.asarray(image) > 0
            remaining = [*(part & ~mask for part in visible), mask]
            areas = [*full_areas, _polygon_area(points * SCALE)]
            if all(part.sum() >= MIN_VISIBLE * area for part, area in zip(remaining, areas, strict=True)):
                alpha = np.asarray(image.reduce(SCALE), dtype=np.float64)[:, :, None] / 255
                canvas = (1 - alpha) * canvas + alpha * color
                masks.append(mask)
                visible, full_areas = remaining, areas
                boxes.append(np.array(image.getbbox()) / SCALE)
                labels.append(label)
                colors.append(color)
                break
    canvas = canvas + rng.normal(0, NOISE, canvas.shape)
    return Scene(
        image=canvas.round().clip(0, 255).astype(np.uint8),
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        labels=np.array(labels, dtype=np.int64),
        masks=np.array(masks, dtype=bool).reshape(-1, SCALE * size, SCALE * size),
        colors=np.array(colors, dtype=np.float64).reshape(-1, 3),
    )


def _write_split(folder: Path, split: int, count: int, settings: dict[str, int]) -> dict[str, Any]:
    size, seed = settings["size"], settings["seed"]
    images, annotations = [], []
    for index in range(count):
        rng = np.random.default_rng((seed, split, index))
        empty = index % EMPTY_EVERY == EMPTY_EVERY - 1
        scene = draw_scene(size, 0 if empty else int(rng.integers(1, MAX_OBJECTS + 1)), rng)
        file_name = f"{index + 1:06d}.png"
        Image.fromarray(scene.image).save(folder / file_name, compress_level=1)
        images.append({"id": index + 1, "file_name": file_name, "width": size, "height": size})
        for (x1, y1, x2, y2), label, mask in zip(scene.boxes.tolist(), scene.labels, scene.masks, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": int(label),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": int(mask.sum()) / SCALE**2,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": label, "name": name} for label, name in enumerate(CATEGORIES, start=1)]
    info = {"description": "drawn scenes", "settings": settings}
    return {"info": info, "images": images, "annotations": annotations, "categories": categories}


def _background(size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A texture, (size, size, 3) float64, and its mean colour (3,): every pixel lies within TEXTURE_RANGE of it."""
    mean = rng.uniform(0, 255, 3)
    direction = rng.normal(size=3)
    direction *= rng.uniform(0.4, 1) * TEXTURE_RANGE / np.linalg.norm(direction)
    y, x = np.mgrid[0:size, 0:size] / size
    angle = rng.uniform(0, 2 * np.pi)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    period = rng.uniform(0.06, 0.25)
    match rng.integers(4):
        case 0:  # gradient
            level = np.interp(along, [along.min(), along.max()], [-1, 1])
        case 1:  # stripes
            level = np.sign(np.sin(2 * np.pi * along / period))
        case 2:  # checkers
            level = np.sign(np.sin(2 * np.pi * along / period) * np.sin(2 * np.pi * across / period))
        case _:  # smooth noise
            coarse = rng.uniform(-1, 1, (int(1 / period) + 2,) * 2).astype(np.float32)
            level = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BILINEAR))
    return (mean + level[:, :, None] * direction).clip(0, 255), mean


def _color(rng: np.random.Generator, background: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
    while True:
        color = rng.uniform(0, 255, 3)
        if np.linalg.norm(color - background) >= BACKGROUND_CONTRAST and all(
            np.linalg.norm(color - other) >= SHAPE_CONTRAST for other in others
        ):
            return color


def _polygon(label: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Corners (P, 2) of a turned shape in pixels, its box centred at a random place."""
    num_points, radii = SHAPES[CATEGORIES[label - 1]]
    angles = rng.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(num_points) / num_points
    radius = np.resize(radii, num_points)
    points = np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)
    side = rng.uniform(*SIDE) * size
    points = (points - points.min(axis=0)) * side / np.ptp(points, axis=0).max()
    # At most a quarter of the side leaves the image.
    center = rng.uniform(side / 4, size - side / 4, 2)
    return points + center - points.max(axis=0) / 2


def _polygon_area(points: np.ndarray) -> float:
    """Area of a simple polygon by the shoelace formula."""
    x, y = points.T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)
