"""Data set, drawn scenes, loader, and the readers on real data."""

from __future__ import annotations

import io
import json
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_data import coco_content, make_record, sentence, voc_object, write_coco, write_image, write_voc
from helpers import build_datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from detection.config.schema import Augment, Data
from detection.data import (
    AspectRatioBatches,
    DetectionDataset,
    build_loader,
    draw_scene,
    draw_scenes,
    load_image,
    read_coco,
    read_voc,
)
from detection.data.records import Annotations
from detection.data.synthetic import BACKGROUND_CONTRAST, CATEGORIES, MIN_VISIBLE, SCALE, SHAPE_CONTRAST, TEXTURE_RANGE
from detection.data.transforms import build_transform

# --- images and dataset ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
@pytest.mark.attempt("mutated images")
def test_every_image_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.new("RGB", (5, 4), (204, 204, 204)).convert(mode).save(path)
    pixels = load_image(path)
    assert pixels.shape == (4, 5, 3) and pixels.dtype == np.uint8 and pixels.flags.writeable
    if mode != "1":
        assert abs(int(pixels.mean()) - 204) <= 1


@pytest.mark.attempt("mutated images")
def test_palette_with_transparency_loads_without_warning(tmp_path, recwarn):
    image = Image.new("P", (5, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "image.png", transparency=b"\x00\xff")
    assert load_image(tmp_path / "image.png")[0, 0].tolist() == [10, 20, 30]
    assert not recwarn.list


@pytest.mark.attempt("mutated images")
def test_16_bit_grey_is_scaled(tmp_path):
    Image.fromarray(np.array([[0, 256 * 100, 65535]], dtype=np.uint16)).save(tmp_path / "image.png")
    assert load_image(tmp_path / "image.png")[0, :, 0].tolist() == [0, 100, 255]


def test_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.new("RGB", (8, 4)).save(tmp_path / "image.jpg", exif=exif)
    assert load_image(tmp_path / "image.jpg").shape == (4, 8, 3)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.attempt("mutated images")
def test_truncated_image_is_an_error_with_its_name(tmp_path, suffix):
    path = write_image(tmp_path / f"cut.{suffix}", 64, 64)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=rf"cut\.{suffix}: the image does not decode: .*truncated"):
        load_image(path)


@pytest.mark.attempt("mutated images")
def test_no_image_at_all_is_an_error_with_its_name(tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(
        ValueError, match=r"text\.jpg: the image does not decode: no image of a known format \(allowed: JPEG, "
    ):
        load_image(tmp_path / "text.jpg")
    with pytest.raises(ValueError, match=r"gone\.jpg: the image does not decode"):
        load_image(tmp_path / "gone.jpg")


@pytest.mark.attempt("mutated images")
def test_wrong_size_is_an_error_with_both_sizes(tmp_path):
    path = write_image(tmp_path / "a.png", 20, 10)
    dataset = DetectionDataset(Annotations((make_record(path, [[0, 0, 5, 5]], [1]),), ("cat",), (1,)))
    with pytest.raises(ValueError, match=r"a\.png.* 20x10 .* 40x30"):
        dataset[0]


def test_items_have_torchvisions_types(tmp_path):
    path = write_image(tmp_path / "a.png")
    records = (
        make_record(path, [[0, 0, 5, 5], [1, 1, 9, 9], [2, 2, 4, 4]], [2, 1, 2], [False, True, False]),
        make_record(path, [], []),
    )
    for transform in (None, build_transform(Augment(hflip=1, vflip=1, crop=1, color=1))):
        dataset = DetectionDataset(Annotations(records, ("a", "b"), (1, 2)), transform)
        assert len(dataset) == 2
        for index, count in ((0, 2), (1, 0)):
            image, target = dataset[index]
            assert image.dtype == torch.float32 and image.ndim == 3 and image.is_contiguous()
            assert image.min() >= 0 and 0.4 < image.max() <= 1
            assert target["boxes"].dtype == torch.float32 and target["boxes"].shape == (count, 4)
            assert target["labels"].dtype == torch.int64 and target["labels"].tolist() == [2, 2][:count]
            assert target["image_id"] == 1 and isinstance(target["image_id"], int)
    assert torch.equal(
        DetectionDataset(Annotations(records, ("a", "b"), (1, 2)))[0][0].mul(255).byte(),
        torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1),
    )
    with pytest.raises(IndexError):
        dataset[2]


def test_ground_truth_keeps_a_coco_files_numbers(tmp_path):
    boxes = [(0.1, 0.2, 10.3, 8.7), (3.33, 4.44, 5.55, 6.66), (35.3, 2.1, 10, 8)]
    content = coco_content(boxes)
    content["annotations"][1] |= {"iscrowd": 1, "category_id": 5}
    truth = DetectionDataset(read_coco(*write_coco(tmp_path, content))).ground_truth()
    json.dumps(truth)
    assert [a["bbox"] for a in truth["annotations"]][:2] == [list(box) for box in boxes[:2]]
    assert truth["annotations"][2]["bbox"] == pytest.approx([35.3, 2.1, 4.7, 8], abs=1e-12)
    assert [(a["id"], a["category_id"], a["iscrowd"], a["area"]) for a in truth["annotations"]] == [
        (1, 18, 0, 33.25),
        (2, 5, 1, 33.25),
        (3, 18, 0, 33.25),
    ]
    coco = COCO()
    coco.dataset = truth
    with redirect_stdout(io.StringIO()):
        coco.createIndex()
    assert sorted(coco.getImgIds()) == [3, 7] and sorted(coco.getCatIds()) == [5, 18]
    assert len(coco.getAnnIds(imgIds=[7])) == 3 and coco.getAnnIds(imgIds=[3]) == []


def test_ground_truth_of_a_record_without_xywh(tmp_path):
    record = make_record(tmp_path / "a.png", [[1.5, 2, 4, 8]], [1])
    (note,) = DetectionDataset(Annotations((record,), ("cat",), (9,))).ground_truth()["annotations"]
    assert note["bbox"] == [1.5, 2, 2.5, 6] and note["category_id"] == 9


# --- drawn scenes ---------------------------------------------------------------------------------------------------


def files_of(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_scenes_are_the_same_bytes_twice_and_independent_of_their_number(tmp_path):
    draw_scenes(tmp_path / "a", num_train=13, num_val=2, size=48, seed=5)
    draw_scenes(tmp_path / "b", num_train=13, num_val=2, size=48, seed=5)
    draw_scenes(tmp_path / "c", num_train=3, num_val=1, size=48, seed=5)
    draw_scenes(tmp_path / "d", num_train=1, num_val=1, size=48, seed=6)
    a, c, d = (files_of(tmp_path / name) for name in "acd")
    assert a == files_of(tmp_path / "b")
    assert len(a) == 17 and {"train/000001.png", "val/000002.png", "annotations/val.json"} <= set(a)
    assert all(a[name] == data for name, data in c.items() if name.endswith(".png"))
    assert a["train/000001.png"] != a["val/000001.png"] and a["train/000001.png"] != d["train/000001.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == list("abcd")


def test_scenes_read_as_coco_with_some_empty_images(tmp_path):
    draw_scenes(tmp_path / "scenes", num_train=48, num_val=3, size=64, seed=0)
    found = read_coco(tmp_path / "scenes/annotations/train.json", tmp_path / "scenes/train")
    assert found.dropped == () and found.categories == CATEGORIES
    counts = [len(record.labels) for record in found.records]
    assert counts.count(0) == 4 and set(counts) == {0, 1, 2, 3, 4, 5}
    assert set(np.concatenate([record.labels for record in found.records])) == {1, 2, 3, 4}
    sides = np.concatenate([(r.boxes[:, 2:] - r.boxes[:, :2]).max(axis=1) for r in found.records if len(r.boxes)])
    assert sides.max() <= 0.45 * 64 + 1 and sides.min() >= 0.12 * 64 / 2
    image, target = DetectionDataset(found)[0]
    assert image.shape == (3, 64, 64) and len(target["boxes"]) == counts[0]


@pytest.mark.parametrize("seed", range(12))
def test_scene_boxes_are_tight_visible_and_contrast(seed):
    size = 96
    scene = draw_scene(size, 5, np.random.default_rng(seed))
    assert scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
    assert len(scene.boxes) == len(scene.labels) == len(scene.masks) >= 1
    covered = np.zeros((SCALE * size, SCALE * size), dtype=bool)
    background = scene.image[~scene.masks.any(axis=0).reshape(size, SCALE, size, SCALE).any(axis=(1, 3))].astype(float)
    for box, mask, color in reversed(list(zip(scene.boxes, scene.masks, scene.colors, strict=True))):
        rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
        assert (box * SCALE).tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        visible = mask & ~covered
        assert visible.sum() >= MIN_VISIBLE * mask.sum()
        # What is wholly visible has the shape's colour, far from the background's and the other shapes'.
        pixels = scene.image[visible.reshape(size, SCALE, size, SCALE).all(axis=(1, 3))].astype(float)
        assert np.abs(pixels.mean(axis=0) - color).max() < 6
        assert np.linalg.norm(background.mean(axis=0) - color) > BACKGROUND_CONTRAST - TEXTURE_RANGE
        others = [other for other in scene.colors if other is not color and not np.array_equal(other, color)]
        assert all(np.linalg.norm(other - color) >= SHAPE_CONTRAST for other in others)
        covered |= mask


def test_existing_folders_are_never_overwritten(tmp_path):
    settings_ = {"num_train": 2, "num_val": 1, "size": 32, "seed": 0}
    draw_scenes(tmp_path / "a", **settings_)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*")}
    draw_scenes(tmp_path / "a", **settings_)
    with pytest.raises(ValueError, match=r"'seed': 0.*'seed': 1.*choose another data\.root or remove"):
        draw_scenes(tmp_path / "a", **settings_ | {"seed": 1})
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*")}
    (tmp_path / "b").mkdir()
    draw_scenes(tmp_path / "b", **settings_)  # an empty folder is no one's
    for content in ("notes.txt", "annotations/train.json"):
        root = tmp_path / content.replace("/", "-")
        (root / content).parent.mkdir(parents=True)
        (root / content).write_text("{}")
        with pytest.raises(ValueError, match=r"holds something else than drawn scenes; choose another data\.root"):
            draw_scenes(root, **settings_)
        assert [p.name for p in root.rglob("*") if p.is_file()] == [Path(content).name]


def test_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dumps", interrupt)
    with pytest.raises(KeyboardInterrupt):
        draw_scenes(tmp_path / "deep" / "a", num_train=2, num_val=1, size=32, seed=0)
    assert list((tmp_path / "deep").iterdir()) == []


# --- datasets and loader --------------------------------------------------------------------------------------------


def scenes(root: Path, **augment) -> Data:
    drawn = {"num_train": 12, "num_val": 2, "size": 48}
    return Data(format="synthetic", root=root, scenes=drawn, augment=augment)


def test_build_datasets_draws_scenes(tmp_path):
    train, val = build_datasets(scenes(tmp_path / "scenes"))
    assert (len(train), len(val)) == (12, 2) and train.transform is not None and val.transform is None
    assert train.annotations.categories == val.annotations.categories == CATEGORIES


def test_build_datasets_gives_val_the_classes_of_train(tmp_path):
    write_voc(tmp_path, {"a": [voc_object("dog"), voc_object("cow")]}, "VOC/train")
    write_voc(tmp_path, {"b": [voc_object("dog"), voc_object("ant")]}, "VOC/val")
    train, val = build_datasets(Data(format="voc", root=tmp_path, train=["VOC/train"], val=["VOC/val"]))
    assert train.annotations.categories == val.annotations.categories == ("cow", "dog")
    assert val.annotations.records[0].labels.tolist() == [2]
    sentence(val.annotations, "b.xml", "'ant'")

    write_coco(tmp_path / "coco", coco_content())
    data = Data(
        format="coco",
        root=tmp_path / "coco",
        train=["instances.json"],
        val=["instances.json"],
        train_images="images",
        val_images="images",
        classes=["dog", "cat"],
    )
    train, val = build_datasets(data)
    assert train.annotations.category_ids == val.annotations.category_ids == (5, 18)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_is_reproducible(tmp_path, workers):
    train, _ = build_datasets(scenes(tmp_path / "scenes", hflip=0.5, vflip=0.5, crop=0.5, color=0.5))

    def two_epochs(seed: int) -> list:
        torch.manual_seed(seed)
        loader = build_loader(train, batch_size=5, workers=workers, shuffle=True, seed=seed)
        return [batch for _ in range(2) for batch in loader]

    first, again, other = two_epochs(1), two_epochs(1), two_epochs(2)
    assert [len(images) for images, _ in first] == [5, 5, 2] * 2
    ids = [[target["image_id"] for _, targets in run for target in targets] for run in (first, again, other)]
    assert ids[0] == ids[1] != ids[2]
    assert sorted(ids[0][:12]) == sorted(ids[0][12:]) == list(range(1, 13)) and ids[0][:12] != ids[0][12:]
    for (images, targets), (same_images, same_targets) in zip(first, again, strict=True):
        assert isinstance(images, list) and isinstance(targets, list)
        assert all(torch.equal(a, b) for a, b in zip(images, same_images, strict=True))
        assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(targets, same_targets, strict=True))
    by_id = [
        {t["image_id"]: i for images, targets in first[k : k + 3] for i, t in zip(images, targets, strict=True)}
        for k in (0, 3)
    ]
    assert any(not torch.equal(by_id[0][key], by_id[1][key]) for key in by_id[0])


def shapes_of(root: Path, sizes: list[tuple[int, int]]) -> DetectionDataset:
    """One image of each (width, height), each with one box."""
    records = []
    for index, (width, height) in enumerate(sizes):
        path = write_image(root / f"{index}.png", width, height)
        record = make_record(path, [[0, 0, 5, 5]], [1])
        records.append(replace(record, image_id=index, width=width, height=height))
    return DetectionDataset(Annotations(tuple(records), ("cat",), (1,)))


def ids_by_epoch(loader, num_epochs: int) -> list[list[list[int]]]:
    return [[[target["image_id"] for target in targets] for _, targets in loader] for _ in range(num_epochs)]


def test_batches_hold_images_of_similar_shape(tmp_path):
    sizes = [(20, 40), (40, 20), (30, 30)] * 9 + [(41, 20)]
    dataset = shapes_of(tmp_path, sizes)
    options = {"batch_size": 4, "workers": 0, "shuffle": True, "aspect_groups": 1}
    loader = build_loader(dataset, seed=3, **options)
    first, second = ids_by_epoch(loader, 2)
    for batches in (first, second):
        assert len(batches) == len(loader) == 2 + 2 + 2 + 1  # of 9, 10 and 9: a batch of what is left
        assert sorted(index for batch in batches for index in batch) == list(range(28))
        for batch in batches[:6]:
            assert max(sizes[i][0] / sizes[i][1] for i in batch) < 1.5 * min(sizes[i][0] / sizes[i][1] for i in batch)
        ratios = [sizes[index][0] / sizes[index][1] for index in batches[6]]
        assert ratios == sorted(ratios)
    assert first != second
    assert ids_by_epoch(build_loader(dataset, seed=3, **options), 2) == [first, second]
    assert ids_by_epoch(build_loader(dataset, seed=4, **options), 1) != [first]


def test_images_of_one_shape_come_as_without_groups(tmp_path):
    dataset = shapes_of(tmp_path, [(20, 16)] * 11)
    options = {"batch_size": 4, "workers": 0, "shuffle": True, "seed": 5}
    grouped = build_loader(dataset, aspect_groups=3, **options)
    assert ids_by_epoch(grouped, 3) == ids_by_epoch(build_loader(dataset, **options), 3)


def test_evaluation_keeps_the_order(tmp_path):
    dataset = shapes_of(tmp_path, [(20, 40), (40, 20)] * 3)
    loader = build_loader(dataset, batch_size=4, workers=0, shuffle=False, seed=0, aspect_groups=3)
    assert ids_by_epoch(loader, 1) == [[[0, 1, 2, 3], [4, 5]]]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0.1, 10), min_size=1, max_size=60), st.integers(1, 8), st.integers(1, 4), st.integers(0, 2**31)
)
def test_number_of_batches_is_what_len_says(ratios, batch_size, num_groups, seed):
    order = torch.randperm(len(ratios), generator=torch.Generator().manual_seed(seed)).tolist()
    batches = AspectRatioBatches(order, batch_size, ratios, num_groups)
    found = list(batches)
    assert len(found) == len(batches)
    assert sorted(index for batch in found for index in batch) == list(range(len(ratios)))
    assert all(1 <= len(batch) <= batch_size for batch in found)


# --- real data ------------------------------------------------------------------------------------------------------


def test_bccd(real_data):
    start = time.perf_counter()
    found = read_voc(real_data("bccd") / "bccd", ["BCCD/trainval", "BCCD/test"])
    assert time.perf_counter() - start < 10
    assert len(found.records) == 364 and found.categories == ("Platelets", "RBC", "WBC")
    assert sum(len(record.boxes) for record in found.records) == 4888 - 2
    assert len(found.dropped) == 2
    sentence(found, "BloodImage_00338.xml", "[504, 337, 504, 337]", "no area")
    sentence(found, "BloodImage_00343.xml", "[181, 329, 181, 329]", "no area")
    image, target = DetectionDataset(found)[0]
    assert image.shape == (3, 480, 640) and len(target["boxes"]) == len(found.records[0].boxes)


def test_coco128(real_data):
    folder = real_data("coco128") / "coco128"
    file = folder / "annotations/instances_train2017.json"
    found = read_coco(file, folder / "train2017")
    assert len(found.records) == 128 and len(found.categories) == 80 and found.dropped == ()
    assert sum(int(record.ignore.sum()) for record in found.records) == 10
    original = sorted(a["bbox"] for a in json.loads(file.read_text())["annotations"])
    notes = DetectionDataset(found).ground_truth()["annotations"]
    assert len(notes) == 939 and sorted(a["bbox"] for a in notes) == original
    assert found.category_ids[-1] == 90
