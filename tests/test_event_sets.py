"""Made recordings, and images and boxes of recordings as data formats."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from helpers import build_datasets

from detection.config import load_config
from detection.config.schema import Data, Events, ImageAugment, ImageData, Scenes
from detection.data import DetectionDataset, read_split
from detection.data.events import (
    BOX,
    EVENT,
    Recording,
    draw_classified,
    draw_recordings,
    events_to_frames,
    filter_boxes,
    made,
    read_boxes,
    read_events,
    write_boxes,
    write_events,
)
from detection.data.image_batches import MemoryBatches
from detection.data.images import read_image_split
from detection.data.pictures import as_rgb, pixels_of
from detection.data.synthetic import CATEGORIES, draw_scene
from detection.exporters.run import export_run
from detection.models import colours_of
from detection.report import write_report
from detection.runs import Run
from detection.tasks.evaluate import evaluate_run
from detection.tasks.run import load_model, train_run

# The sensor


@pytest.fixture
def even(monkeypatch):
    """All pixels have the same threshold."""
    monkeypatch.setattr(made, "MISMATCH", 0.0)


def test_an_edge_that_passes_a_pixel(even):
    """An edge from 10 to 100 moves by one pixel to the left; the pixel it passes sees two looks, half-way and all."""
    light = np.full((4, 6), 10.0)
    light[:, 3:] = 100
    events = made.simulate(light, np.array([(0.0, 1.0), (1.0, 1.0)]), 3, 1000, np.random.default_rng(0))
    # Looks at 0.5 and 1 pixel: log(18), log(63), log(108): 1.2528 and 0.5390 more. Thresholds of 0.25: 5 crossings at
    # times 500 k 0.25 / 1.2528, then 2 at 500 + 500 (0.25 k - 1.2528) / 0.5390, k = 6, 7.
    first, second = np.log(63 / 18), np.log(108 / 63)
    times = [int(500 * 0.25 * k / first) for k in range(1, 6)]
    times += [int(500 + 500 * (0.25 * k - first) / second) for k in (6, 7)]
    assert times[0] == 99 and times[-1] == 961
    for y in range(3):
        rows = events[events["y"] == y]
        assert rows["t"].tolist() == times
        assert set(rows["x"]) == {2} and set(rows["p"]) == {1}
    back = made.simulate(light, np.array([(1.0, 0.0), (0.0, 0.0)]), 3, 1000, np.random.default_rng(0))
    assert set(back["p"]) == {0} and set(back["x"]) == {2} and len(back) == 3 * 7  # log(108 / 18) is 7.2 thresholds


def test_events_sum_up_to_the_change_of_each_pixel():
    rng = np.random.default_rng(3)
    light = made.light_of(draw_scene(48, 3, rng))
    path = np.array([(0.0, 16.0), (7.3, 2.2), (16.0, 9.5)])
    events = made.simulate(light, path, 32, 50_000, np.random.default_rng(5))
    thresholds = made.THRESHOLD * (1 + made.MISMATCH * np.random.default_rng(5).standard_normal((32, 32)))
    off, on = events_to_frames(events, (32, 32), 1)[0].double().numpy()
    rows, columns = np.arange(32) + 9, np.arange(32) + 16  # the end: x 16, y 9.5
    end = (light[np.ix_(rows, columns)] + light[np.ix_(rows + 1, columns)]) / 2
    change = np.log(end + made.DARK) - np.log(light[16:48, :32] + made.DARK)
    assert np.abs(change - (on - off) * thresholds).max() < thresholds.max()
    assert (np.diff(events["t"]) >= 0).all() and events["t"][0] >= 0 and events["t"][-1] < 50_000
    assert len(events) > 1000 and 0.8 < made.THRESHOLD / thresholds.mean() < 1.2


def test_boxes_lie_around_the_events(even):
    """Of a scene of one light shape on an even ground, all events lie at the shape, and the box ends where they do."""
    scene = draw_scene(96, 1, np.random.default_rng(12))
    light = 20 + 200 * scene.masks[0].reshape(96, 4, 96, 4).mean(axis=(1, 3))
    path = np.array([(0.0, 0.0), (13.0, 32.0), (32.0, 14.0)])
    boxes = made.boxes_along(path, scene, 64)
    events = made.simulate(light, path, 64, 1_000_000, np.random.default_rng(0))
    assert boxes["t"].tolist() == [100_000 * k for k in range(1, 11)] and set(boxes["track_id"]) == {1}
    assert set(boxes["class_id"]) == {scene.labels[0] - 1}
    # At 0.5 s the sensor is at (13, 32), at 0.75 s half-way to the end.
    x1, y1, x2, y2 = scene.boxes[0] - (13, 32, 13, 32)
    inside = np.clip([x1, y1, x2, y2], 0, 64)
    row = boxes[4]
    assert [row["x"], row["y"], row["x"] + row["w"], row["y"] + row["h"]] == pytest.approx(inside.tolist(), abs=1e-4)
    for row in boxes:
        near = events[(events["t"] > row["t"] - 20_000) & (events["t"] < row["t"])]  # a pixel and a half of motion
        for axis, side in (("x", "w"), ("y", "h")):
            assert near[axis].min() == pytest.approx(row[axis], abs=3)
            assert near[axis].max() == pytest.approx(row[axis] + row[side], abs=3)


def test_the_same_seed_gives_the_same_files(tmp_path):
    settings = {"num_train": 2, "num_val": 1, "size": 64, "seed": 3}
    for name, change in (("a", {}), ("b", {}), ("c", {"num_train": 1}), ("d", {"seed": 4})):
        draw_recordings(tmp_path / name, **settings | change)
        draw_classified(tmp_path / f"{name}_classes", **settings | change | {"num_train": 5, "num_val": 4, "size": 24})
    files = {
        name: {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("a", "b", "c", "d", "a_classes", "b_classes")
    }
    names = [f"{folder}/{stem}" for folder, stem in (("train", "000001"), ("train", "000002"), ("val", "000001"))]
    expected = {f"{name}{end}" for name in names for end in ("_td.dat", "_bbox.npy")}
    assert {str(path) for path in files["a"]} == expected | {"settings.json", "label_map_dictionary.json"}
    assert files["a"] == files["b"] and files["a_classes"] == files["b_classes"]
    assert all(files["a"][path] == content for path, content in files["c"].items() if path.suffix in (".dat", ".npy"))
    assert all(files["a"][path] != content for path, content in files["d"].items() if path.suffix == ".dat")
    shapes = {str(path) for path in files["a_classes"]} - {"settings.json"}
    assert {name for name in shapes if name.startswith("train/circle")} == {
        "train/circle/000001.dat",
        "train/circle/000005.dat",
    }
    assert len(shapes) == 9 and {name.split("/")[1] for name in shapes} == set(CATEGORIES)
    for path in (tmp_path / "a").rglob("*_td.dat"):
        recording = Recording(path)
        assert (recording.width, recording.height) == (64, 64) and 900_000 < recording.end < 1_000_000
        assert recording.num_events > 1000

    with pytest.raises(ValueError, match=r"a: holds recordings made with .* choose another data\.root or remove"):
        draw_recordings(tmp_path / "a", **settings | {"seed": 9})
    with pytest.raises(ValueError, match="a_classes: holds recordings made with"):
        draw_recordings(tmp_path / "a_classes", **settings)
    with pytest.raises(ValueError, match="train: holds something else than made recordings"):
        draw_recordings(tmp_path / "a" / "train", **settings)


# The data formats

RECIPES = {
    "detection": {
        "model": {
            "detector": "retinanet",
            "backbone": {"name": "resnet18", "width": 0.125},
            "neck": {"levels": ["c3"], "extra_levels": 0, "out_channels": 16, "source": "spikes"},
            "head": {"num_convs": 1, "anchor_scale": 3.0},
            "min_size": [64],
            "max_size": 64,
        },
        "data": {"scenes": {"num_train": 2, "num_val": 2, "size": 64}},
    },
    "classification": {
        "task": "classification",
        "model": {"backbone": {"name": "vgg11", "width": 0.125, "stem": "cifar"}},
        "data": {"num_train": 8, "num_val": 4, "size": 32},
    },
}


def small_set(root, **boxes):
    """Two recordings of a sensor of 40x30 pixels over 2 s: an event every 1000 microseconds at x 5, y 6."""
    for name, rows in boxes.items():
        times = np.arange(0, 2_000_000, 1000)
        events = np.array([(t, 5, 6, t // 1000 % 2) for t in times], EVENT)
        (root / "train").mkdir(parents=True, exist_ok=True)
        write_events(root / "train" / f"{name}_td.dat", [events], width=40, height=30)
        write_boxes(root / "train" / f"{name}_bbox.npy", np.array([(*row, 1.0) for row in rows], BOX))
    return Data(format="events", root=root, train=["train"], val=["train"], events=Events(steps=2, full=16))


def test_images_and_boxes_of_recordings(tmp_path):
    early, at = (500_000, 0, 0, 30, 25, 0, 1), 1_000_000
    data = small_set(
        tmp_path,
        one=[early, (at, 10, 5, 20, 24, 1, 2), (at, -4, 2, 30, 40, 0, 3), (1_500_000, 0, 0, 9, 29, 0, 1)],
        two=[(700_000, 1, 2, 20, 25, 0, 5), (700_000, 38, 2, 20, 25, 7, 6), (700_000, 70, 2, 20, 25, 1, 6)],
    )
    dataset = read_split(data, "train")
    assert dataset.classes == ("car", "pedestrian") and len(dataset) == 2
    image, target = dataset[0]
    assert image.shape == (4, 30, 40) and image.dtype == torch.float32
    # 50 events in the 50 ms before, even ones darker: 13 and 12 of each sign in the two steps of 25 ms.
    assert [round(255 * value) for value in image[:, 6, 5].tolist()] == [207, 191, 191, 207]
    assert image.sum() == image[:, 6, 5].sum()
    assert target["boxes"].tolist() == [[10, 5, 30, 29], [0, 2, 26, 30]] and target["labels"].tolist() == [2, 1]
    assert [each.image_id for each in dataset.annotations.records] == ["one_1000000", "two_700000"]
    assert any(f"{tmp_path}: 2 objects too early or too small" in text for text in dataset.dropped)
    assert any("box [70, 2, 20, 25] lies outside of the 40x30 image" in text for text in dataset.dropped)
    assert any("1 object of class_id 7, not among the classes, left out" in text for text in dataset.dropped)
    assert dataset.ground_truth()["annotations"][0]["bbox"] == [10, 5, 20, 24]
    assert len(dataset.fingerprint()) == 64 and len(dataset.choose([1])) == 1
    record, *others = dataset.annotations.records
    moved = replace(dataset.annotations, records=(replace(record, end=record.end - 60_000), *others))
    assert DetectionDataset(moved).fingerprint() != dataset.fingerprint()

    data.events.skip, data.classes = 0, ["pedestrian"]
    walkers = read_split(data, "train")
    assert len(walkers) == 1 and walkers[0][1]["labels"].tolist() == [1]
    data.events, data.classes = Events(skip=0, min_diagonal=0, min_side=0), []
    assert [record.end for record in read_split(data, "train").annotations.records[:3]] == [500_000, at, 1_500_000]
    data.events.tolerance = 0.5
    joined = read_split(data, "train").annotations.records
    assert [(record.end, len(record.labels)) for record in joined] == [(at, 3), (1_500_000, 1), (700_000, 1)]


def test_boxes_where_a_recording_has_no_events_are_left_out(tmp_path):
    times = (700_000, 2_000_000, 2_049_000, 2_050_000, 9_000_000)
    data = small_set(tmp_path, one=[(t, 1, 2, 20, 25, 0, 5) for t in times])
    found = read_split(data, "train").annotations
    assert [record.end for record in found.records] == [700_000, 2_000_000, 2_049_000]
    assert [text for text in found.dropped if "2 objects before or behind all events left out" in text]


def test_a_sensor_that_is_too_small_leaves_the_recording_out(tmp_path):
    data = small_set(tmp_path, one=[(700_000, 1, 2, 20, 25, 0, 5)])
    data.events.sensor, data.verify = (6, 40), "full"
    with pytest.raises(ValueError, match=r"one_td\.dat: events up to x 5, y 6 of a sensor of 40x6; recording left out"):
        read_split(data, "train")


def test_recordings_of_one_name_in_several_folders_are_several_images(tmp_path):
    data = small_set(tmp_path, one=[(700_000, 1, 2, 20, 25, 0, 5)], two=[(700_000, 1, 2, 20, 25, 0, 5)])
    shutil.copytree(tmp_path / "train", tmp_path / "more")
    data.train = ["train", "more", "train/"]
    dataset = read_split(data, "train")
    ids = [record.image_id for record in dataset.annotations.records]
    assert ids == ["one_700000", "two_700000", "more/one_700000", "more/two_700000"]
    assert [text for text in dataset.dropped if "used once" in text] == [f"{tmp_path}/train: named 2 times; used once"]


def test_recordings_that_cannot_be_used_are_named(tmp_path):
    good = [(700_000, 1, 2, 20, 25, 0, 5)]
    data = small_set(tmp_path, good=good, cut=good, lonely=good, jumps=good, nothing=good)
    folder = tmp_path / "train"
    content = (folder / "cut_td.dat").read_bytes()
    (folder / "cut_td.dat").write_bytes(content[:-3])
    (folder / "lonely_bbox.npy").unlink()
    (folder / "nothing_bbox.npy").write_bytes(b"")
    backwards = bytearray(content)
    start = content.index(b"\x00\x08") + 2 + 8 * 680
    backwards[start : start + 4] = (5).to_bytes(4, "little")
    (folder / "jumps_td.dat").write_bytes(backwards)
    data.verify = "full"
    dataset = read_split(data, "train")
    assert [record.path.name for record in dataset.annotations.records] == ["good_td.dat"]
    for name, reason in (
        ("cut_td.dat", "cut off in the middle of an event"),
        ("lonely_td.dat", "no lonely_bbox.npy beside it"),
        ("nothing_bbox.npy", "an empty file, 0 bytes"),
        ("jumps_td.dat", "the clock jumps backwards, from 679000 to 5 microseconds"),
    ):
        assert any(f"{folder / name}: {reason}" in text and "left out" in text for text in dataset.dropped)
    data.verify = "header"
    late = read_split(data, "train")
    index = [record.path.name for record in late.annotations.records].index("jumps_td.dat")
    with pytest.raises(ValueError, match=r"jumps_td\.dat: the clock jumps backwards, from 679000"):
        late[index]
    for change, expected in (
        ({"classes": ["cat"]}, "no class 'cat'; did you mean 'car'?"),
        ({"train": []}, "data.train: empty; data.format 'events' needs it"),
        ({"train": ["test"]}, "test: no such folder; expected recordings NAME_td.dat"),
        ({"train": ["."]}, "no recordings in it; expected NAME_td.dat and NAME_bbox.npy"),
        ({"events": Events(skip=1)}, "has a box to train on; "),
    ):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            read_split(data.model_copy(update=change), "train")
        assert expected in str(caught.value)
    (tmp_path / "label_map_dictionary.json").write_text(json.dumps({"1": "car"}))
    with pytest.raises(ValueError, match=r"label_map_dictionary\.json: expected names by class_id from 0"):
        read_split(data, "train")
    (tmp_path / "label_map_dictionary.json").write_text(json.dumps({"0": "car", "1": "car"}))
    with pytest.raises(ValueError, match=r"label_map_dictionary\.json: class 'car' is given twice"):
        read_split(data, "train")


def test_made_recordings_go_the_road_of_real_ones(tmp_path):
    scenes = Scenes(num_train=3, num_val=2, size=96, seed=1)
    data = Data(format="synthetic_events", root=tmp_path / "made", scenes=scenes, events=Events(steps=3))
    data.augment.hflip, data.augment.scale = 1.0, 1.0
    train, val = build_datasets(data)
    assert train.classes == val.classes == CATEGORIES
    expected = [
        len(np.unique(filter_boxes(read_boxes(path))["t"])) for path in sorted((data.root / "train").glob("*.npy"))
    ]
    assert len(train) == sum(expected) > 5
    plain, target = read_split(data, "train")[0]
    record = train.annotations.records[0]
    events = Recording(record.path).between(record.end - 50_000, record.end)
    counts = events_to_frames(events, (96, 96), 3, window=(record.end - 50_000, record.end)).flatten(0, 1)
    assert torch.equal(plain, (255 * (counts / 3).clamp(max=1)).round() / 255)
    data.augment.scale = 0.0
    flipped, mirrored = build_datasets(data)[0][0]
    assert torch.equal(flipped, plain.flip(-1))
    x1, y1, x2, y2 = target["boxes"].T
    assert torch.allclose(mirrored["boxes"], torch.stack([96 - x2, y1, 96 - x1, y2], dim=1), atol=1e-3)
    data.augment.hflip, data.augment.scale, data.augment.scale_range = 0.0, 1.0, (0.5, 0.5)
    torch.manual_seed(0)
    shrunk, small = build_datasets(data)[0][0]
    # Half as large, nothing around it.
    assert shrunk.shape == plain.shape and shrunk.sum().item() == pytest.approx(plain.sum().item() / 4, rel=0.02)
    sides = [boxes[:, 2:] - boxes[:, :2] for boxes in (small["boxes"], target["boxes"] / 2)]
    assert torch.allclose(*sides, atol=1e-3)


def test_classified_recordings_as_images(tmp_path):
    data = ImageData(format="synthetic_events", root=tmp_path / "made", size=24, num_train=8, num_val=4)
    data.events = Events(steps=3, by="count", full=2)
    train, val = read_image_split(data, "train"), read_image_split(data, "val")
    assert train.pixels.shape == (8, 6, 24, 24) and train.pixels.dtype == torch.uint8 and len(val) == 4
    assert data.channels == 6 and ImageData().channels == Data().channels == 3
    assert train.classes == tuple(sorted(CATEGORIES)) and train.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    events, sensor = read_events(tmp_path / "made" / "train" / "star" / "000004.dat")
    frames = events_to_frames(events, sensor, 3, "count").flatten(0, 1)
    assert sensor == (24, 24) and torch.equal(train.pixels[4], (255 * (frames / 2).clamp(max=1)).round().byte())
    batches = MemoryBatches(train, torch.device("cpu"), batch_size=4, augment=ImageAugment(padding=2), seed=0)
    assert [tuple(images.shape) for images, _ in batches] == [(4, 6, 24, 24), (4, 6, 24, 24)]

    # The same files read as a set with splits, and as one without.
    data.format = "events"
    assert read_image_split(data, "val").fingerprint() == val.fingerprint()
    some = read_image_split(data.model_copy(update={"classes": ["star", "square", "circle"]}), "val")
    assert some.dropped == (f"{data.root}/val/triangle: not among the classes; left out",) and len(some) == 3
    data.root, data.train, data.val, data.events.train_share = data.root / "train", "", "", 0.5
    first, second = read_image_split(data, "train"), read_image_split(data, "val")
    assert torch.equal(first.pixels, train.pixels[::2]) and torch.equal(second.pixels, train.pixels[1::2])
    data.size = 12
    assert read_image_split(data, "train").pixels.shape == (4, 6, 12, 12)
    with pytest.raises(ValueError, match=r"data\.in_memory False: data\.format 'events' keeps all images in memory"):
        read_image_split(data.model_copy(update={"in_memory": False}), "train")

    broken = data.root / "star" / "000004.dat"
    broken.write_bytes(broken.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"class 'star' has no usable recording; the first: .*000004\.dat: cut off"):
        read_image_split(data, "train")
    data.events.train_share = 0.99
    (data.root / "star" / "000012.dat").write_bytes((data.root / "circle" / "000001.dat").read_bytes())
    (told,) = read_image_split(data, "train").dropped
    assert told.startswith(f"{broken}: cut off") and told.endswith("; recording left out")
    data.events.sensor = (10, 10)
    with pytest.raises(
        ValueError, match=r"circle.*000001\.dat: an event at x \d+, y \d+ lies outside of a sensor of 10x10"
    ):
        read_image_split(data, "train")
    with pytest.raises(ValueError, match=r"data\.augment\.randaugment 2"):
        read_image_split(data.model_copy(update={"augment": ImageAugment(randaugment=2)}), "train")


@pytest.mark.parametrize("task", RECIPES)
def test_a_network_takes_the_channels_of_its_data(task, tmp_path):
    recipe = RECIPES[task] | {"train": {"epochs": 1, "batch_size": 4}}
    events = {"format": "synthetic_events", "root": str(tmp_path / "made"), "events": {"steps": 2}, "workers": 0}
    recipe["data"] = recipe["data"] | events
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    train_run(load_config(path), tmp_path / "run", ["test"])
    found, logged = evaluate_run(tmp_path / "run")
    assert found.metrics == {name: logged.metrics[name] for name in found.metrics}
    run = Run.open(tmp_path / "run")
    config, model = run.config, load_model(run)
    first = next(layer for layer in model.modules() if isinstance(layer, torch.nn.Conv2d))
    assert first.in_channels == 4 and config.data.channels == 4
    assert tuple(map(len, colours_of(config))) == (4, 4) and set(colours_of(config)[0]) == {0.0}
    write_report([tmp_path / "run"], tmp_path / "page.html", num_images=1)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<svg" in page and ("_td.dat" in page) == (task == "detection")
    _, told = export_run(tmp_path / "run", "torch", tmp_path / "model.pt2")
    assert told["inputs"]["images"]["shape"][1] == 4 and told["parity"]["largest_difference"] < 1e-3


def test_events_are_shown_red_where_it_became_darker():
    image = torch.zeros(4, 1, 3)
    image[0, 0, 0], image[3, 0, 1], image[2, 0, 2], image[1, 0, 2] = 0.2, 0.4, 1.0, 0.6
    assert pixels_of(image)[0].tolist() == [[51, 0, 0], [0, 102, 0], [255, 153, 0]]
    assert torch.equal(as_rgb(image[:3]), image[:3]) and torch.equal(as_rgb(image[:1]), image[:1].expand(3, 1, 3))
