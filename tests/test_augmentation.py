"""Augmentation: boxes sit on their objects afterwards, stay valid, and keep their labels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers import build_datasets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from detection.config.schema import Augment, Data
from detection.data import TrainingBatches, draw_scenes, transforms
from detection.data.transforms import FRAME_COLOR, MIN_VISIBLE, build_mixture, build_transform
from detection.tasks import task_of
from detection.tasks.recipes import DetectionRecipe

REPOSITORY = Path(__file__).resolve().parents[1]

# Colours by label, label 1 first: each has channels of its own that stand out.
PALETTE = np.array([[230, 20, 20], [20, 230, 20], [20, 20, 230], [230, 230, 20], [230, 20, 230], [20, 230, 230]])
ALL = ["hflip", "vflip", "crop", "iou_crop", "scale", "color"]
MARGIN = 3  # pixels around an edge where colours mix


def only(name: str, **options) -> Augment:
    return Augment(**({"hflip": 0.0} | {name: 1.0} | options))


def random_image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def draw_picture(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Up to six rectangles, each in a cell of its own with a gap to its neighbours, on grey."""
    height, width = int(rng.integers(120, 200)), int(rng.integers(120, 200))
    image = np.full((height, width, 3), 128, dtype=np.uint8)
    boxes, labels = [], []
    for label in rng.permutation(6)[: rng.integers(1, 7)] + 1:
        row, column = divmod(int(label) - 1, 3)
        low = np.array([column * width / 3, row * height / 2]) + 8
        high = np.array([(column + 1) * width / 3, (row + 1) * height / 2]) - 8
        x1, y1 = (low + rng.uniform(0, 0.3, 2) * (high - low)).astype(int)
        x2, y2 = (high - rng.uniform(0, 0.3, 2) * (high - low)).astype(int)
        image[y1:y2, x1:x2] = PALETTE[label - 1]
        boxes.append([x1, y1, x2, y2])
        labels.append(label)
    return image, np.array(boxes, dtype=np.float32), np.array(labels, dtype=np.int64)


def label_map(image: np.ndarray) -> np.ndarray:
    """(H, W): which label's colour a pixel has, 0 for grey, by the channels that stand out, in whatever light."""
    low, high = image.min(axis=-1).astype(int), image.max(axis=-1).astype(int)
    bright = image.astype(int) > ((low + high) / 2)[:, :, None]
    labels = {tuple(color > 128): label for label, color in enumerate(PALETTE, start=1)}
    codes = np.zeros(8, dtype=int)
    for bits, label in labels.items():
        codes[np.dot(bits, [4, 2, 1])] = label
    return np.where(high - low < 40, 0, codes[bright @ np.array([4, 2, 1])])


def assert_boxes_sit_on_their_objects(image: np.ndarray, boxes: np.ndarray, labels: np.ndarray) -> None:
    found = label_map(image)
    height, width = found.shape
    for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
        left, top = int(np.ceil(x1)), int(np.ceil(y1))
        right, bottom = int(np.floor(x2)), int(np.floor(y2))
        # A side at the border of the image may be a cut: there is no edge to leave a margin for.
        inner = found[
            top + (MARGIN if top else 0) : bottom - (MARGIN if bottom < height else 0),
            left + (MARGIN if left else 0) : right - (MARGIN if right < width else 0),
        ]
        assert (inner == label).all(), (label, boxes)
        outer = [
            found[:, : max(0, left - MARGIN)],
            found[:, right + MARGIN :],
            found[: max(0, top - MARGIN)],
            found[bottom + MARGIN :],
        ]
        assert not any((part == label).any() for part in outer), (label, boxes)


@pytest.mark.parametrize("name", ALL)
def test_boxes_sit_on_their_objects(name):
    transform = build_transform(only(name))
    changed = 0
    for seed in range(60):
        image, boxes, labels = draw_picture(np.random.default_rng(seed))
        torch.manual_seed(seed)
        result, new_boxes, new_labels = transform(image, boxes, labels)
        assert_boxes_sit_on_their_objects(result, new_boxes, new_labels)
        changed += result.shape != image.shape or not np.array_equal(result, image)
        # What is large in the picture is among the objects.
        counts = np.bincount(label_map(result).ravel(), minlength=7)
        original = np.bincount(label_map(image).ravel(), minlength=7)
        if name in ("hflip", "vflip", "crop", "color"):
            assert sorted(new_labels) == sorted(labels)
        elif name == "iou_crop":
            assert set(np.flatnonzero(counts[1:] > 0.6 * original[1:]) + 1) <= set(new_labels.tolist())
    assert changed > 50


@st.composite
def images_with_boxes(draw):
    width, height = draw(st.integers(8, 400)), draw(st.integers(8, 400))
    boxes = []
    for _ in range(draw(st.integers(0, 6))):
        corners = []
        for size in (width, height):
            low = draw(st.floats(0, size - 0.5, width=32))
            corners.append((low, draw(st.floats(min(size, low + 0.25), size))))
        (x1, x2), (y1, y2) = corners
        boxes.append([x1, y1, x2, y2])
    return width, height, np.array(boxes, dtype=np.float32).reshape(-1, 4)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(images_with_boxes(), st.integers(0, 2**31), st.sampled_from([*ALL, "all"]))
def test_random_boxes_stay_valid_and_keep_their_labels(case, seed, name):
    width, height, boxes = case
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    labels = np.arange(1, len(boxes) + 1)
    before = image.copy(), boxes.copy(), labels.copy()
    augment = Augment(**dict.fromkeys(ALL, 0.7)) if name == "all" else only(name)
    torch.manual_seed(seed)
    result, new_boxes, new_labels = build_transform(augment)(image, boxes, labels)
    assert all(np.array_equal(now, then) for now, then in zip((image, boxes, labels), before, strict=True))
    assert result.dtype == np.uint8 and new_boxes.dtype == np.float32 and new_labels.dtype == np.int64
    assert new_boxes.shape == (len(new_labels), 4) and np.isfinite(new_boxes).all()
    new_height, new_width = result.shape[:2]
    assert min(new_height, new_width) >= 1
    assert (new_boxes[:, :2] >= 0).all() and (new_boxes[:, :2] < new_boxes[:, 2:]).all()
    assert (new_boxes[:, 2:] <= [new_width, new_height]).all()
    # In order, none twice: a box has not changed places with another.
    assert new_labels.tolist() == sorted(set(new_labels.tolist()) & set(labels.tolist()))
    if name in ("iou_crop", "scale") and len(boxes):
        assert len(new_boxes) > 0
    if name == "scale":
        assert result.shape == image.shape


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(images_with_boxes(), st.sampled_from(["hflip", "vflip"]))
def test_flip_twice_is_the_identity(case, name):
    width, height, boxes = case
    image = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    labels = np.arange(1, len(boxes) + 1)
    flip = build_transform(only(name))
    result, new_boxes, new_labels = flip(*flip(image, boxes, labels))
    assert np.array_equal(result, image)
    assert new_labels.tolist() == labels.tolist()
    assert np.allclose(new_boxes, boxes, rtol=0, atol=1e-3)


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.0, 1.3])
def test_scale_jitter_scales_sides_by_its_factor_and_drops_what_is_hardly_visible(factor):
    image = np.full((100, 200, 3), 50, dtype=np.uint8)
    boxes = np.array([[80, 40, 120, 60], [0, 0, 20, 10], [180, 90, 200, 100]], dtype=np.float32)
    transform = build_transform(only("scale", scale_range=(factor, factor)))
    kept, offsets = [], set()
    for seed in range(100):
        torch.manual_seed(seed)
        result, new_boxes, labels = transform(image, boxes, np.array([1, 2, 3]))
        assert (result == 50).all(axis=-1).sum() == round(100 * min(1, factor)) * round(200 * min(1, factor))
        assert set(np.unique(result)) <= {50, FRAME_COLOR}
        kept.append(len(labels))
        for box, label in zip(new_boxes, labels, strict=True):
            offsets.add(tuple(box.round(2)))
            share = (box[2:] - box[:2]).prod() / (boxes[label - 1, 2:] - boxes[label - 1, :2]).prod() / factor**2
            assert MIN_VISIBLE - 1e-3 <= share <= 1 + 1e-3
            if factor <= 1:
                assert share == pytest.approx(1, abs=1e-3)
    assert (set(kept) == {3}) == (factor <= 1)
    assert len(offsets) > 50 or factor == 1


def test_scale_jitter_never_loses_the_last_object():
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    transform = build_transform(only("scale", scale_range=(3.0, 3.0)))
    changed = {}
    for name, box in (("small", [30, 20, 40, 30]), ("whole", [0, 0, 80, 60])):
        changed[name] = 0
        for seed in range(20):
            torch.manual_seed(seed)
            result, new_boxes, _ = transform(image, np.array([box], dtype=np.float32), np.array([1]))
            assert len(new_boxes) == 1
            changed[name] += not np.array_equal(result, image)
    # Enlarged threefold, no place shows 0.3 of an object that fills the image.
    assert changed == {"small": 20, "whole": 0}
    torch.manual_seed(0)
    assert not np.array_equal(transform(image, np.zeros((0, 4), np.float32), np.zeros(0, int))[0], image)


def test_the_whole_image_is_taken_where_no_window_has_an_object():
    # A hairline at the border: no window holds its centre strictly inside.
    boxes = np.array([[0, 0, 1e-4, 60]], dtype=np.float32)
    image = np.zeros((60, 60, 3), dtype=np.uint8)
    for seed in range(20):
        torch.manual_seed(seed)
        result, new_boxes, _ = build_transform(only("iou_crop"))(image, boxes, np.array([1]))
        assert len(new_boxes) == 1
        assert result.shape[0] <= 60


@pytest.mark.parametrize("wanted", [0.3, 0.5])
def test_iou_crops_window_has_the_overlap_and_the_shape(monkeypatch, wanted):
    monkeypatch.setattr(transforms, "WINDOW_IOU", (wanted,))
    # A pixel's first two colours are its place.
    image = np.zeros((120, 160, 3), dtype=np.uint8)
    image[:, :, 1], image[:, :, 0] = np.mgrid[0:120, 0:160]
    x1, y1, x2, y2 = box = np.array([30, 20, 120, 100], dtype=np.float32)
    num_whole = 0
    for seed in range(60):
        torch.manual_seed(seed)
        result, _, _ = build_transform(only("iou_crop"))(image, box[None], np.array([1]))
        if result.shape == image.shape:  # no window was found
            num_whole += 1
            continue
        height, width = result.shape[:2]
        assert 0.5 <= width / height <= 2 and width >= 0.3 * 160 - 1 and height >= 0.3 * 120 - 1
        left, top = result[0, 0, :2].astype(int)
        common = max(0, min(x2, left + width) - max(x1, left)) * max(0, min(y2, top + height) - max(y1, top))
        assert common >= wanted * ((x2 - x1) * (y2 - y1) + width * height - common) - 1e-6
    assert num_whole < 10


def test_iou_crop_of_an_image_without_objects_is_any_window():
    image = np.zeros((60, 80, 3), dtype=np.uint8)
    shapes = set()
    for seed in range(30):
        torch.manual_seed(seed)
        result, boxes, labels = build_transform(only("iou_crop"))(image, np.zeros((0, 4), np.float32), np.zeros(0, int))
        assert boxes.shape == (0, 4) and labels.shape == (0,)
        shapes.add(result.shape)
    assert len(shapes) > 20


def test_scale_range_must_be_ordered():
    with pytest.raises(ValueError, match="scale_range: expected 0 < least <= greatest, got 2 1"):
        Augment(scale_range=(2.0, 1.0))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(images_with_boxes(), st.integers(0, 2**31))
def test_augmented_boxes_stay_whole_with_their_labels(case, seed):
    width, height, boxes = case
    labels = np.arange(1, len(boxes) + 1)
    given_boxes = boxes.copy()
    torch.manual_seed(seed)
    image, found, found_labels = build_transform(Augment(hflip=0.5, vflip=0.5, crop=0.7, color=0.3))(
        random_image(height, width), boxes, labels
    )
    assert np.array_equal(boxes, given_boxes)
    assert image.dtype == np.uint8 and found.dtype == np.float32 and found_labels.dtype == np.int64
    new_height, new_width = image.shape[:2]
    assert new_height >= height / 2 and new_width >= width / 2
    assert found_labels.tolist() == labels.tolist()
    assert (found[:, :2] >= 0).all() and (found[:, :2] < found[:, 2:]).all()
    assert (found[:, 2:] <= [new_width, new_height]).all()
    # Flips and crops move boxes and leave their sides as they are.
    assert np.allclose(found[:, 2:] - found[:, :2], boxes[:, 2:] - boxes[:, :2], atol=2e-3)


@pytest.mark.parametrize(("hflip", "vflip"), [(1, 0), (0, 1), (1, 1)])
def test_flip_geometry(hflip, vflip):
    image = random_image(37, 53)
    boxes = np.array([[0, 0, 53, 37], [1.25, 2.5, 7.75, 9.875], [40, 30, 53, 31]], dtype=np.float32)
    flipped, found, labels = build_transform(Augment(hflip=hflip, vflip=vflip))(image, boxes, np.array([3, 1, 2]))
    expected, pixels = boxes.copy(), image
    if hflip:
        expected[:, [0, 2]], pixels = 53 - expected[:, [2, 0]], pixels[:, ::-1]
    if vflip:
        expected[:, [1, 3]], pixels = 37 - expected[:, [3, 1]], pixels[::-1]
    assert np.array_equal(flipped, pixels) and labels.tolist() == [3, 1, 2]
    assert np.allclose(found, expected, rtol=0, atol=1e-5)


def test_crop_shows_the_same_pixels_in_every_box():
    image, boxes = random_image(60, 90), np.array([[30, 20, 50, 33], [41, 25, 60, 40]], dtype=np.float32)
    transform = build_transform(Augment(hflip=0, crop=1))
    torch.manual_seed(0)
    sizes = set()
    for _ in range(30):
        cropped, found, _ = transform(image, boxes, np.array([1, 2]))
        sizes.add(cropped.shape)
        for (x1, y1, x2, y2), (u1, v1, u2, v2) in zip(boxes.astype(int), found.round().astype(int), strict=True):
            assert np.array_equal(image[y1:y2, x1:x2], cropped[v1:v2, u1:u2])
    assert len(sizes) > 20
    assert build_transform(Augment(hflip=0, crop=1))(image, np.zeros((0, 4)), np.zeros(0))[0].shape != image.shape


def test_no_augmentation_changes_nothing():
    image, boxes = random_image(20, 30), np.array([[1, 2, 3, 4]], dtype=np.float32)
    same, found, labels = build_transform(Augment(hflip=0))(image, boxes, np.array([5]))
    assert np.array_equal(same, image) and np.allclose(found, boxes, atol=1e-5) and labels.tolist() == [5]


def test_hairline_box_is_dropped_with_its_label():
    boxes = np.array([[10, 10, 20, 20], [399.99997, 1, 400, 2]], dtype=np.float32)
    transform = build_transform(Augment(hflip=1, vflip=1, crop=1))
    for chosen in (slice(None), slice(1, 2)):
        found, labels = transform(random_image(300, 400), boxes[chosen], np.array([1, 2])[chosen])[1:]
        assert len(found) == len(labels) and found.shape[1] == 4 and (found[:, :2] < found[:, 2:]).all()
        assert set(labels.tolist()) >= ({1} if chosen == slice(None) else set())


def test_flips_are_independent_and_follow_torchs_generator():
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    image[0, 0] = 255
    transform = build_transform(Augment(hflip=0.5, vflip=0.5))

    def draw() -> list[int]:
        torch.manual_seed(3)
        return [
            int(transform(image, np.zeros((0, 4)), np.zeros(0))[0][[0, 0, -1, -1], [0, -1, 0, -1], 0].argmax())
            for _ in range(200)
        ]

    corners = draw()
    assert corners == draw()
    assert (np.bincount(corners, minlength=4) > 25).all()


def test_albumentations_is_in_one_file_and_stays_off_the_network():
    users = [p.name for p in (REPOSITORY / "detection").rglob("*.py") if "import albumentations" in p.read_text()]
    assert users == ["transforms.py"]
    code = (
        "import urllib.request as r\n"
        "def refuse(*a, **k): raise SystemExit('network')\n"
        "r.build_opener = r.urlopen = refuse\n"
        "import sys, detection.tasks.detection\n"
        "assert 'albumentations' not in sys.modules\n"  # evaluation and prediction do not wait for it
        "import detection.data.transforms"
    )
    environment = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "0"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, env=environment)


# Several images in one


def sample_of(image: np.ndarray, *boxes: list[float], label: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return image, np.array(boxes, dtype=np.float32).reshape(-1, 4), np.full(len(boxes), label, dtype=np.int64)


class Numbers:
    """A generator that gives what it is told: the place where images meet, windows at their beginning, a weight."""

    def __init__(self, uniform: tuple[float, ...] = (), beta: float = 0.5) -> None:
        self.numbers, self.weight = iter(uniform), beta

    def uniform(self, low: float, high: float) -> float:
        return next(self.numbers)

    def permutation(self, number: int) -> list[int]:
        return list(range(number))

    def integers(self, end: int) -> int:
        return end - 1  # the last place that there is

    def beta(self, a: float, b: float) -> float:
        return self.weight


def test_mosaic_by_hand():
    """Four images of 40 x 20 (twice that for the last) that meet at (16, 8) of a frame of 40 x 20."""
    grey = [np.full((20, 40, 3), 10 * number, dtype=np.uint8) for number in range(1, 4)]
    last = np.full((40, 80, 3), 40, dtype=np.uint8)
    samples = [
        sample_of(grey[0], [0, 0, 40, 20], label=1),
        sample_of(grey[1], [20, 10, 30, 20], [0, 0, 4, 4], label=2),
        sample_of(grey[2], [10, 0, 20, 20], label=3),
        sample_of(last, [40, 20, 80, 40], label=4),
    ]
    frame, boxes, labels = transforms._mosaic(samples, Numbers(uniform=(0.4, 0.4)))
    expected = np.empty((20, 40, 3), dtype=np.uint8)
    expected[:8, :16], expected[:8, 16:], expected[8:, :16], expected[8:, 16:] = 10, 20, 30, 40
    assert np.array_equal(frame, expected)
    # 1st: 16 x 8, whole, factor 0.4. 2nd: 24 x 12 for a place of 24 x 8, the upper 4 rows cut off; its second box ends
    # at row 2.4. 3rd: 24 x 12 for 16 x 12, the first 8 columns cut off: 6 to 12 is -2 to 4, of which two thirds show.
    # 4th: 24 x 12, factor 0.3.
    wanted = [[0, 0, 16, 8], [28, 2, 34, 8], [0, 8, 4, 20], [28, 14, 40, 20]]
    assert np.allclose(boxes, wanted, atol=1e-5) and labels.tolist() == [1, 2, 3, 4]
    assert boxes.dtype == np.float32 and labels.dtype == np.int64


def test_mosaic_drops_what_is_hardly_visible():
    image = np.zeros((20, 40, 3), dtype=np.uint8)
    # The upper half of the second place is cut off: of 5 rows, in the frame 3, of which 1.5 or 0.6 are left.
    for top, kept in ((4.1667, 1), (2.6, 0)):
        samples = [sample_of(image)] * 4
        samples[1] = sample_of(image, [0, top, 10, top + 5])
        _, boxes, _ = transforms._mosaic(samples, Numbers(uniform=(0.4, 0.4)))
        assert len(boxes) == kept


def test_mixup_by_hand():
    image = np.full((20, 40, 3), 100, dtype=np.uint8)
    other = np.full((20, 20, 3), 201, dtype=np.uint8)  # enlarged to 40 x 40, of which the lower half shows
    mixed = transforms._blend(
        sample_of(image, [1, 2, 3, 4], label=5), sample_of(other, [5, 5, 10, 15], label=6), Numbers(beta=0.25)
    )
    assert (mixed[0] == 176).all() and mixed[0].dtype == np.uint8  # 0.25 * 100 + 0.75 * 201 = 175.75
    assert np.allclose(mixed[1], [[1, 2, 3, 4], [10, 0, 20, 10]], atol=1e-5) and mixed[2].tolist() == [5, 6]


def test_boxes_of_a_mosaic_sit_on_their_objects():
    mixture, seen = build_mixture(Augment(mosaic=1.0)), 0
    for seed in range(40):
        rng, pictures = np.random.default_rng(seed), []
        for chosen in ((1, 2), (3,), (4, 5), (6,)):  # each colour in one of the pictures
            image, boxes, labels = draw_picture(rng)
            for (x1, y1, x2, y2), label in zip(boxes.astype(int), labels, strict=True):
                if label not in chosen:
                    image[y1:y2, x1:x2] = 128
            kept = np.isin(labels, chosen)
            pictures.append((image, boxes[kept], labels[kept]))
        others = iter(pictures[1:])
        torch.manual_seed(seed)
        image, boxes, labels = mixture(pictures[0], lambda others=others: next(others))
        assert image.shape == pictures[0][0].shape and len(set(labels.tolist())) == len(labels)
        seen += len(labels)
        for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
            ys, xs = np.nonzero(label_map(image) == label)
            # An edge is where the colour ends, to a pixel or two that are mixed.
            assert np.abs([xs.min() - x1, ys.min() - y1, xs.max() + 1 - x2, ys.max() + 1 - y2]).max() < MARGIN
    assert seen > 80


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(images_with_boxes(), min_size=5, max_size=5), st.integers(0, 2**31))
def test_boxes_of_several_images_stay_valid(cases, seed):
    samples = []
    for number, (width, height, boxes) in enumerate(cases):
        samples.append((random_image(height, width), boxes, np.arange(len(boxes)) + 10 * number))
    others = iter(samples[1:])
    torch.manual_seed(seed)
    image, boxes, labels = build_mixture(Augment(mosaic=1.0, mixup=1.0))(samples[0], lambda: next(others))
    assert image.shape == samples[0][0].shape and image.dtype == np.uint8
    assert boxes.dtype == np.float32 and labels.dtype == np.int64 and boxes.shape == (len(labels), 4)
    height, width = image.shape[:2]
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] < boxes[:, 2:]).all() and (boxes[:, 2:] <= [width, height]).all()
    assert len(set(labels.tolist())) == len(labels) and set(labels) <= {n for each in samples for n in each[2]}


def test_an_image_of_one_pixel_is_a_mosaic_of_itself_or_another():
    tiny = sample_of(np.full((1, 1, 3), 7, dtype=np.uint8), [0, 0, 1, 1])
    image, boxes, _ = build_mixture(Augment(mosaic=1.0, mixup=1.0))(tiny, lambda: tiny)
    assert image.tolist() == [[[7, 7, 7]]] and np.allclose(boxes, [[0, 0, 1, 1]] * 2)


def mixed_keys(epoch: int, **options) -> list[tuple]:
    batches = TrainingBatches(4, 2, seed=3, **options)
    batches.set_epoch(epoch)
    return [key for batch in batches for key in batch]


def test_mixing_follows_the_seed_and_ends_before_the_last_epochs(tmp_path):
    draw_scenes(tmp_path / "scenes", num_train=4, num_val=1, size=64, seed=0)
    data = Data(
        format="synthetic", root=tmp_path / "scenes", scenes={"num_train": 4, "num_val": 1, "size": 64}, workers=0
    )
    data.augment = Augment(mosaic=0.5, mixup=0.5)
    recipe = DetectionRecipe(data=data, train={"epochs": 10, "batch_size": 2})
    task, dataset = task_of(recipe), build_datasets(data)[0]
    batches = task.training_batches(dataset, Accelerator())
    assert batches.batch_sampler.mixed_epochs == 9  # of 10, the tenth is the last tenth
    keys = mixed_keys(9, mixed_epochs=9)
    assert all(key[2] is True for key in keys)
    assert mixed_keys(10, mixed_epochs=9) == mixed_keys(10) and {len(key) for key in mixed_keys(10)} == {2}
    state = torch.random.get_rng_state()
    items, twice = [[batches.dataset[key] for key in keys] for _ in range(2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    for (image, target), (again, same) in zip(items, twice, strict=True):
        assert torch.equal(image, again) and torch.equal(target["boxes"], same["boxes"])
    plain = [batches.dataset[key[:2]][0] for key in keys]
    assert any(not torch.equal(image, each) for (image, _), each in zip(items, plain, strict=True))
    recipe.data.augment = Augment()
    assert task_of(recipe).training_batches(dataset, Accelerator()).batch_sampler.mixed_epochs == 0


@pytest.mark.parametrize("key", ["mosaic", "mixup"])
@pytest.mark.parametrize("side", [32, 96])  # enlarged, or shrunk: OpenCV shrinks four channels at the most
def test_frames_of_several_steps_are_mixed_as_each_of_them_alone(key, side):
    frames = [np.random.default_rng(number).integers(0, 256, (side, side, 12), dtype=np.uint8) for number in range(4)]

    def mixed(channels: slice) -> np.ndarray:
        torch.manual_seed(0)
        samples = (sample_of(each[:, :, channels], [0, 0, side, side]) for each in frames[1:])
        first = sample_of(frames[0][:48, :48, channels], [0, 0, 30, 30])
        return build_mixture(only(key))(first, lambda: next(samples))[0]

    apart = [mixed(slice(first, first + 4)) for first in range(0, 12, 4)]
    np.testing.assert_array_equal(mixed(slice(None)), np.dstack(apart))
