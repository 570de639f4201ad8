"""Predictions of a saved run: what is taken, what comes out, and what bad input gives."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers import ROOT, run_tool
from PIL import Image
from pycocotools.coco import COCO
from test_readme import EXAMPLES
from test_training import TINY_MODEL, tiny_recipe

import detection
from backbones import record_activity
from detection.config import load_config
from detection.data import load_image
from detection.data.pictures import read_image
from detection.draw import draw_detections, draw_spike_maps
from detection.models import build_detector
from detection.models.inference import pad_for, padded_size, thresholds
from detection.records import RunInfo
from detection.runs import Run
from detection.spikemaps import SpikeMap, spike_maps
from detection.tasks.detection import read_category_ids
from detection.tasks.recipes import DetectionRecipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The run folder of a tiny detector, which is sure enough of some boxes."""
    folder = tmp_path_factory.mktemp("predict")
    head = TINY_MODEL["head"] | {"max_detections": 1000}
    recipe = tiny_recipe(folder, model={"head": head}, train={"epochs": 4, "eval_every": 4})
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_tool(monkeypatch, "train_det", recipe, "--out", folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def predictor(finished):
    return detection.load(finished, device="cpu")


@pytest.fixture(scope="module")
def classifier_run(tmp_path_factory):
    """The run folder of a tiny classifier."""
    folder = tmp_path_factory.mktemp("classifier")
    recipe = folder / "tiny.yaml"
    recipe.write_text(
        "task: classification\n"
        "model: {backbone: {name: resnet18, stem: cifar, width: 0.125}}\n"
        f"data: {{format: synthetic, root: {folder}, num_train: 32, num_val: 16, size: 32, workers: 0}}\n"
        "train: {epochs: 1, batch_size: 16}\n"
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_tool(monkeypatch, "train_cls", recipe, "--out", folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def scenes(finished) -> list[Path]:
    return sorted((load_config(finished / "config.yaml").data.root / "val").glob("*.png"))


def detector(name: str) -> torch.nn.Module:
    model = TINY_MODEL | {"detector": name, "head": {"num_convs": 1, "representation_size": 16}}
    model["head"] |= {"score_threshold": 0.99, "max_detections": 1000}
    model |= {"min_size": [96]} if name == "ssd" else {}
    data = {"format": "synthetic", "classes": ["a", "b"]}
    torch.manual_seed(0)
    return build_detector(DetectionRecipe.model_validate({"model": model, "data": data})).eval()


def same(one, other) -> None:
    assert len(one) == len(other) > 0
    assert torch.allclose(one.boxes, other.boxes, atol=1e-3)
    assert torch.allclose(one.scores, other.scores, atol=1e-5)
    assert one.labels.tolist() == other.labels.tolist()


# The Python interface


def test_importing_detection_stays_light():
    code = "import sys, detection; print([name for name in ('torch', 'matplotlib', 'pydantic') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_prediction_is_what_the_model_gives(predictor, scenes):
    prediction = predictor.predict(scenes[0], score_threshold=0.1)
    pixels = torch.from_numpy(load_image(scenes[0])).permute(2, 0, 1).float() / 255
    with torch.no_grad():
        (raw,) = predictor.model([pixels])
    kept = raw["scores"] > 0.1
    assert 0 < kept.sum() == len(prediction)
    assert torch.equal(prediction.boxes, raw["boxes"][kept])
    assert torch.equal(prediction.scores, raw["scores"][kept])
    assert prediction.names == [predictor.class_names[label - 1] for label in raw["labels"][kept].tolist()]
    assert prediction.size == (64, 64)
    assert prediction.path == scenes[0]
    assert str(prediction).startswith(f"{len(prediction)} detection")


def test_every_kind_of_input_gives_the_same_boxes(predictor, scenes):
    array = load_image(scenes[0])
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    opaque = np.concatenate([array, np.full_like(array[:, :, :1], 255)], axis=2)
    kinds = [
        str(scenes[0]),
        array,
        array.astype(np.uint16) * 256 + 7,
        (array / 255).astype(np.float64),
        opaque,
        Image.fromarray(array),
        Image.fromarray(opaque),
        tensor,
        tensor / 255,
    ]
    first, *others = predictor.predict(kinds, score_threshold=0.1)
    for other in others:
        same(first, other)
        assert np.array_equal(first.image, other.image)


@pytest.mark.parametrize("kind", ["L", "P", "I;16", "RGBA"])
def test_files_of_every_mode(predictor, tmp_path, kind, attempt):
    grey = np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1))
    image = Image.fromarray(grey.astype(np.uint16) * 257) if kind == "I;16" else Image.fromarray(grey).convert(kind)
    image.save(tmp_path / "image.png")
    assert Image.open(tmp_path / "image.png").mode == kind
    expected = np.repeat(grey[:, :, None], 3, axis=2)
    with attempt("mutated images"):
        prediction = predictor.predict(tmp_path / "image.png")
        assert prediction.size == (64, 48)
        assert np.abs(prediction.image.astype(int) - expected).max() <= 1


def test_exif_orientation_turns_files_and_pil_images_but_not_the_training_data(predictor, tmp_path, attempt):
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, :10] = 255  # white at the left end: on top once it is upright
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    path = tmp_path / "turned.png"
    Image.fromarray(pixels).save(path, exif=exif)
    assert load_image(path).shape == (20, 40, 3)
    for source in (path, Image.open(path)):
        with attempt("mutated images"):
            prediction = predictor.predict(source)
            assert prediction.size == (20, 40)
            assert (prediction.image[:10] == 255).all() and (prediction.image[10:] == 0).all()


def test_result_does_not_depend_on_the_batch(predictor, scenes):
    wide = np.random.default_rng(0).integers(0, 255, (40, 100, 3), dtype=np.uint8)
    images = [scenes[0], wide, scenes[1], wide[:, ::-1].copy(), scenes[2]]
    together = predictor.predict(images, score_threshold=0.05)
    assert [prediction.size for prediction in together] == [(64, 64), (100, 40), (64, 64), (100, 40), (64, 64)]
    for batch_size in (1, 2):
        for one, other in zip(
            together, predictor.predict(images, score_threshold=0.05, batch_size=batch_size), strict=True
        ):
            same(one, other)


def test_padded_size_is_that_of_the_network(predictor):
    transform = predictor.model.transform
    for shape in ((3, 64, 64), (3, 40, 100), (3, 100, 40), (3, 1, 1), (3, 333, 77), (3, 20000, 20), (3, 1, 9999)):
        picture = pad_for(transform, torch.zeros(shape))
        assert padded_size(transform, picture) == tuple(transform([picture])[0].tensors.shape[-2:])


def test_the_padded_size_is_computed_once_for_each_shape(predictor, scenes, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "detection.tasks.detection.padded_size",
        lambda transform, picture: asked.append(tuple(picture.shape)) or padded_size(transform, picture),
    )
    predictor.predict([scenes[0], scenes[1], np.zeros((40, 100, 3), np.uint8), scenes[2]])
    assert asked == [(3, 64, 64), (3, 40, 100)]


@pytest.mark.parametrize("size", [(1, 1), (20000, 20), (20, 20000), (1, 3000)])
def test_extreme_shapes(predictor, size, attempt):
    width, height = size
    image = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    with attempt("mutated images"):
        prediction = predictor.predict(image, score_threshold=0.0)
        assert prediction.size == size
        assert len(prediction) > 0
        assert (prediction.boxes >= 0).all()
        assert (prediction.boxes[:, 2:] <= torch.tensor(size)).all()
        assert (prediction.boxes[:, 2:] > prediction.boxes[:, :2]).all()
        drawn = predictor.predict(image).draw()
        assert min(drawn.size) >= 120 and 640 <= max(drawn.size) <= 2560
        assert all(0 <= entry.activity <= 1 for entry in predictor.spike_maps(image))


@pytest.mark.parametrize("name", ["retinanet", "fcos", "ssd", "fasterrcnn"])
def test_thresholds_reach_the_post_processing_and_are_restored(name):
    model = detector(name)
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))

    def run():
        with torch.no_grad():
            return model([image])[0]

    assert len(run()["scores"]) == 0  # at the recipe's score of 0.99
    with thresholds(model, score=0.0, nms=1.0):
        everything = run()
    with thresholds(model, score=0.0, nms=0.1):
        sparse = run()
    assert 0 < len(sparse["scores"]) < len(everything["scores"])
    middle = everything["scores"].median().item()
    with thresholds(model, score=middle, nms=1.0):
        assert torch.equal(run()["scores"], everything["scores"][everything["scores"] > middle])
    with pytest.raises(KeyError), thresholds(model, score=0.0):
        raise KeyError
    assert len(run()["scores"]) == 0


def test_lower_threshold_than_the_recipes(predictor, scenes):
    assert load_config(predictor.run.folder / "config.yaml").model.head.score_threshold == 0.05
    prediction = predictor.predict(scenes[0], score_threshold=0.001, nms_threshold=0.9)
    assert prediction.scores.min() < 0.05
    assert predictor.model.score_thresh == 0.05 and predictor.model.nms_thresh == 0.5
    for name, value in (("score_threshold", "a"), ("score_threshold", float("nan")), ("nms_threshold", 2)):
        with pytest.raises(ValueError, match=rf"{name}: expected a number in \[0, 1\], got {value!r}"):
            predictor.predict(scenes[0], **{"score_threshold": 0.5, name: value})


def test_wrong_input_is_named(predictor, finished, scenes, tmp_path, attempt):
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    for wrong, *parts in (
        (image.astype(float) + 2, "floats in [0, 1]", "found 2 to 2"),
        (np.full((8, 8, 3), np.nan), "floats in [0, 1]"),
        (image.astype(np.int64), "int64"),
        (image[:, :, :2], "(8, 8, 2)"),
        (image[:0], "no pixels"),
        (torch.zeros(8, 8, 3), "(8, 8, 3)"),
        (torch.zeros(3, 8, 8, dtype=torch.int32), "int32"),
        (3.5, "got float"),
        (tmp_path, "no images in this folder"),
        ([tmp_path], "image at index 0: ", "a folder, not an image"),
        (tmp_path / "no.jpg", "no such file"),
    ):
        with attempt("mutated images"):
            with pytest.raises(ValueError) as error:
                predictor.predict(wrong)
            assert all(part in str(error.value) for part in parts), str(error.value)
    with pytest.raises(ValueError, match=r"image at index 1: .*no\.jpg: no such file"):
        predictor.predict([scenes[0], tmp_path / "no.jpg"])
    for options in ({"score_threshold": 1.5}, {"nms_threshold": -0.1}, {"score_threshold": float("nan")}):
        with pytest.raises(ValueError, match=r"_threshold: expected a number in \[0, 1\]"):
            predictor.predict(image, **options)
    with pytest.raises(ValueError, match=r"score: no option of detection \(allowed: score_threshold, nms_threshold\)"):
        predictor.predict(image, score=0.5)
    for size in (0, "2", 1.5, None):
        with pytest.raises(ValueError, match=f"batch_size: expected a whole number of at least 1, got {size!r}"):
            predictor.predict(image, batch_size=size)
    with pytest.raises(ValueError, match="expected one of best, last, ema, got 'newest'"):
        detection.load(finished, "newest")
    with pytest.raises(ValueError, match="device 'toaster': not usable here"):
        detection.load(finished, device="toaster")
    with pytest.raises(FileNotFoundError, match=r"ema\.safetensors: no such weights"):
        detection.load(finished, "ema")


def test_coco_rows_have_the_category_ids_of_the_evaluation(finished, tmp_path):
    assert detection.load(finished).task.category_source == Path(finished) / "run.json"

    def ids(name: str, data: dict, category_ids: list[int] | None = None) -> tuple:
        config, info = DetectionRecipe.model_validate({"data": data}), RunInfo(category_ids=category_ids)
        return read_category_ids(Run.create(tmp_path / name, config, info))

    (tmp_path / "val.json").write_text(json.dumps({"categories": [{"id": 7, "name": "b"}, {"id": 90, "name": "a"}]}))
    data = {"format": "coco", "root": tmp_path, "train": ["t.json"], "val": ["val.json"], "classes": ["a", "b"]}
    assert ids("recorded", data, [5, 6]) == ((5, 6), tmp_path / "recorded" / "run.json")
    assert ids("file", data) == ((90, 7), tmp_path / "val.json")
    for name, change in (("gone", {"val": ["gone.json"]}), ("other", {"classes": ["a", "c"]})):
        assert ids(name, data | change) == ((1, 2), None)
    (tmp_path / "t.json").write_text((tmp_path / "val.json").read_text())
    assert ids("part", data | {"val": [], "val_fraction": 0.2}) == ((90, 7), tmp_path / "t.json")
    voc = {"format": "voc", "train": ["A/train"], "val": ["A/val"], "classes": ["a", "b", "c"]}
    assert ids("voc", voc) == ((1, 2, 3), None)


# Pictures


def test_drawing_keeps_the_size_and_pixels_of_an_image_that_is_large_enough():
    image = np.random.default_rng(0).integers(0, 255, (487, 701, 3), dtype=np.uint8)
    prediction = {"boxes": torch.tensor([[100.0, 100, 300, 200]]), "scores": torch.tensor([0.5])}
    drawn = draw_detections(image, prediction | {"labels": torch.tensor([1])}, ["thing"])
    assert drawn.shape == image.shape
    changed = (drawn != image).any(axis=2)
    rows, columns = np.nonzero(changed)
    assert 95 < columns.min() <= 100 and 300 <= columns.max() < 305
    assert 70 < rows.min() < 100 and 200 <= rows.max() < 205
    assert not changed[105:195, 105:295].any()


def test_large_and_small_images_are_drawn_at_a_readable_size():
    found = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.long)}
    for size, expected in (((30, 60), (320, 640)), ((2800, 700), (2560, 640)), ((2000, 500), (2000, 500))):
        drawn = draw_detections(np.full((*size, 3), 77, dtype=np.uint8), found, ["thing"])
        assert drawn.shape[:2] == expected
        assert (drawn == 77).all()
    thin = np.random.default_rng(0).integers(100, 255, (11, 2001, 3), dtype=np.uint8)
    drawn = draw_detections(thin, found, ["thing"])
    assert drawn.shape == (240, 2001, 3)
    assert (drawn[115:126] == thin).all() and (np.delete(drawn, np.s_[115:126], 0) == 77).all()  # grey around it


# Spike maps


def test_spike_maps_are_the_rates_of_the_layers(predictor, scenes):
    image = read_image(scenes[0]).float() / 255
    maps = spike_maps(predictor.model, image)
    assert [entry.name for entry in maps] == ["c2", "c3", "c4", "neck c3", "neck c4"]
    with torch.no_grad(), record_activity(predictor.model) as activity:
        predictor.model([image])
    # 64 pixels, a multiple of 32: nothing is padded, so the maps hold all neurons.
    layer = {"c3": "backbone.body.stages.1.3.branch.0", "neck c4": "backbone.neck.laterals.1.1"}
    for entry in maps:
        assert entry.rate.min() >= 0 and entry.rate.max() <= 1
        assert entry.activity == pytest.approx(entry.rate.mean(), abs=1e-6)
        if entry.name in layer:
            assert entry.activity == pytest.approx(activity[layer[entry.name]].firing_rate, abs=1e-6)
    assert [entry.rate.shape for entry in maps] == [(16, 16), (8, 8), (4, 4), (8, 8), (4, 4)]
    assert not any(module._forward_hooks for module in predictor.model.modules())


def test_padding_is_cut_off_the_spike_maps(predictor):
    # 30 x 90 pixels become 32 x 96; 40 x 50 become 64 x 80 and are padded to 64 x 96.
    maps = spike_maps(predictor.model, torch.rand(3, 40, 50))
    assert [entry.rate.shape for entry in maps] == [(16, 20), (8, 10), (4, 5), (8, 10), (4, 5)]


@pytest.mark.parametrize("name", ["fcos", "ssd", "fasterrcnn"])
def test_every_detector_has_spike_maps(name):
    names = [entry.name for entry in spike_maps(detector(name), torch.rand(3, 64, 64))]
    assert {"c3", "c4", "neck c3", "neck c4"} <= set(names)


def test_panel_shows_every_map_with_size_and_activity(predictor, scenes):
    image = read_image(scenes[0])
    maps = predictor.spike_maps(scenes[0])
    figure = draw_spike_maps(image, maps, title="scene")
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[0] == "image"
    for title, entry in zip(titles[1:], maps, strict=False):
        assert title.startswith(f"{entry.name}\n") and f"{100 * entry.activity:.1f} % active" in title
    still = [SpikeMap("c2", np.zeros((4, 4), dtype=np.float32), 0.0)]
    assert draw_spike_maps(image, still).axes[1].get_title().endswith("0.0 % active")


def test_spike_maps_need_evaluation_mode_and_spikes(predictor):
    model = detector("retinanet")
    with pytest.raises(RuntimeError, match=r"call model\.eval"):
        spike_maps(model.train(), torch.rand(3, 64, 64))
    with pytest.raises(ValueError, match=r"expected floats of shape \(3, H, W\)"):
        spike_maps(predictor.model, torch.zeros(3, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match="without spike layers"):
        draw_spike_maps(torch.rand(3, 64, 64), [])


# A classifier


def test_classifier_gives_probabilities(classifier_run, scenes):
    predictor = detection.load(classifier_run, device="cpu")
    one = predictor.predict(scenes[0])
    assert one.probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    top = one.top(3)
    assert len(top) == 3 and top[0][1] >= top[1][1] >= top[2][1]
    assert top[0][0] == predictor.class_names[one.probabilities.argmax()]
    several = predictor.predict([scenes[1], scenes[0], np.zeros((1, 1), np.uint8)], batch_size=2)
    assert torch.allclose(several[1].probabilities, one.probabilities, atol=1e-5)
    assert one.draw().size == (640, 640) and predictor.options == ()
    with pytest.raises(ValueError, match=r"score_threshold: no option of classification \(allowed: none\)"):
        predictor.predict(scenes[0], score_threshold=0.5)
    maps = predictor.spike_maps(scenes[0])
    assert [entry.name for entry in maps] == ["stem", "c2", "c3", "c4", "c5"]
    assert [entry.rate.shape for entry in maps] == [(32, 32), (16, 16), (8, 8), (4, 4), (2, 2)]


@pytest.mark.parametrize("in_memory", [True, False])
def test_classifier_sees_the_pixels_of_its_evaluation(classifier_run, tmp_path, in_memory):
    predictor = detection.load(classifier_run, device="cpu")
    (tmp_path / "val" / "thing").mkdir(parents=True)
    path = tmp_path / "val" / "thing" / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)).save(path)
    data = predictor.run.config.data
    data.format, data.root, data.classes, data.in_memory, data.workers = "folder", tmp_path, ["thing"], in_memory, 0
    ((images, _),) = predictor.task.evaluation_batches(predictor.task.read("val"), Accelerator(cpu=True))
    assert images.min() >= 0 and 0.5 < images.max() <= 1
    with torch.no_grad():
        expected = predictor.model(images).softmax(1)[0]
    assert torch.allclose(predictor.predict(path).probabilities, expected, atol=1e-6)


def test_tool_with_a_classifier(classifier_run, scenes, monkeypatch, capsys, tmp_path):
    run_tool(monkeypatch, "predict", classifier_run, scenes[0], scenes[1], "--out", tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [row["image_id"] for row in rows] == [1, 2]
    assert all(0 < value <= 1 for row in rows for value in row["probabilities"].values())
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {scenes[0].name, scenes[1].name}
    assert "2 images" in capsys.readouterr().out
    assert "no boxes for --score" in failing(monkeypatch, capsys, 2, classifier_run, scenes[0], "--score", "0.5")


# The tool


def failing(monkeypatch, capsys, status: int, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        run_tool(monkeypatch, "predict", *arguments)
    assert stop.value.code == status
    return capsys.readouterr().err


def write_video(path: Path, code: str, num_frames: int) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*code), 10, (64, 48))
    for index in range(num_frames):
        writer.write(np.random.default_rng(index).integers(0, 255, (48, 64, 3), dtype=np.uint8))
    writer.release()


def count_frames(path: Path) -> tuple[int, tuple[int, ...]]:
    capture, number, shape = cv2.VideoCapture(str(path)), 0, ()
    while (read := capture.read())[0]:
        number, shape = number + 1, read[1].shape
    return number, shape


def test_tool_writes_pictures_and_coco_results(finished, scenes, monkeypatch, capsys, tmp_path):
    out = tmp_path / "out"
    run_tool(monkeypatch, "predict", finished, scenes[0].parent, "--score", "0.15", "--out", out)
    printed = capsys.readouterr().out
    assert printed.count("detection") == len(scenes) + 1
    assert f"{len(scenes)} images" in printed and "spike activity" in printed and "images/s" in printed
    names = {path.name for path in scenes}
    assert {path.name for path in out.iterdir()} == names | {"predictions.json", "images.json"}
    truth = COCO(str(out / "images.json"))
    results = truth.loadRes(str(out / "predictions.json"))
    assert [entry["file_name"] for entry in truth.dataset["images"]] == [str(path) for path in scenes]
    assert [entry["drawn"] for entry in truth.dataset["images"]] == [path.name for path in scenes]
    # The same as the evaluation's, for the same images
    run_tool(monkeypatch, "evaluate", finished, "--save", tmp_path / "saved")
    expected = [row for row in json.loads((tmp_path / "saved" / "predictions.json").read_text()) if row["score"] > 0.15]
    assert len(results.anns) == len(expected) > 0
    for row, other in zip(results.dataset["annotations"], expected, strict=True):
        assert row["category_id"] == other["category_id"]
        assert row["bbox"] == pytest.approx(other["bbox"], abs=1e-2)


def test_tool_goes_on_past_what_cannot_be_read(finished, scenes, monkeypatch, capsys, tmp_path, attempt):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("no image")
    content = scenes[0].read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / scenes[0].name).write_bytes(content)
    sources = ["text.jpg", "cut.png", "empty", "no.jpg", "*.zzz", "other"]
    arguments = [finished, scenes[0], *(tmp_path / source for source in sources), "98", "--out", tmp_path / "out"]
    error = failing(monkeypatch, capsys, 1, *arguments)
    lines = [line for line in error.splitlines() if line.startswith("failed: ")]
    assert len(lines) == 6
    for name, reason in (
        ("text.jpg", "does not decode: no image of a known format (allowed: JPEG, "),
        ("cut.png", "does not decode"),
        ("empty", "no images in this folder"),
        ("no.jpg", "no such file or folder"),
        ("*.zzz", "no file matches"),
        ("camera 98", "no such camera"),
    ):
        with attempt("batch jobs"):
            assert any(name in line and reason in line for line in lines), lines
    # Two images of one name: both are kept.
    stem = scenes[0].stem
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {f"{stem}.png", f"{stem}_2.png"}


def test_tool_with_nothing_usable_writes_nothing(finished, scenes, monkeypatch, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("no image")
    out = tmp_path / "out"
    for sources, part in (
        (["empty"], "no images in this folder"),
        (["no.jpg"], "no such file or folder"),
        (["*.zzz"], "no file matches"),
        (["text.jpg"], "nothing could be read"),
    ):
        error = failing(monkeypatch, capsys, 2, finished, *(tmp_path / name for name in sources), "--out", out)
        assert part in error and error.count("error: ") == 1
    assert "nothing could be read" in failing(monkeypatch, capsys, 2, finished, "98", "--out", out)
    for value in ("1.5", "-0.1", "nan"):
        error = failing(monkeypatch, capsys, 2, finished, scenes[0], f"--score={value}", "--out", out)
        assert "--score: expected a number in [0, 1]" in error
    assert "--batch-size" in failing(monkeypatch, capsys, 2, finished, scenes[0], "--batch-size", "0", "--out", out)
    assert not out.exists()


def test_tool_names_what_is_wrong_with_a_run(finished, scenes, monkeypatch, capsys, tmp_path):
    assert "is not a run folder" in failing(monkeypatch, capsys, 2, tmp_path / "none", scenes[0])
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_bytes((finished / "config.yaml").read_bytes())
    assert "last.safetensors: no such weights" in failing(
        monkeypatch, capsys, 2, bare, scenes[0], "--out", tmp_path / "out"
    )
    run = Run.open(finished)
    run.config.model.backbone.activation = "relu"
    twin = Run.create(tmp_path / "twin", run.config, RunInfo(command="twin"))
    twin.save(build_detector(run.config), "last")
    error = failing(monkeypatch, capsys, 2, twin.folder, scenes[0], "--spikes", "--out", tmp_path / "out")
    assert "no spike layers (activation relu)" in error
    assert not (tmp_path / "out").exists()


def test_tool_never_overwrites(finished, scenes, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        run_tool(monkeypatch, "predict", finished, scenes[0], "--no-images")
    assert {path.name for path in (tmp_path / "predictions").iterdir()} == {"run", "run2"}
    assert {path.name for path in (tmp_path / "predictions" / "run").iterdir()} == {"predictions.json", "images.json"}
    error = failing(monkeypatch, capsys, 2, finished, scenes[0], "--out", tmp_path / "predictions" / "run")
    assert "exists already" in error


@pytest.mark.parametrize("code", ["avi", "mp4"])
def test_tool_draws_videos_and_keeps_what_a_cut_one_has(finished, monkeypatch, capsys, tmp_path, code, attempt):
    whole, cut = tmp_path / f"whole.{code}", tmp_path / f"cut.{code}"
    write_video(whole, {"avi": "MJPG", "mp4": "mp4v"}[code], 12)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    out = tmp_path / "out"
    error = failing(monkeypatch, capsys, 1, finished, whole, cut, "--batch-size", "5", "--spikes", "--out", out)
    assert min(Image.open(out / "whole_spikes.png").size) > 300
    assert count_frames(out / "whole.mp4") == (12, (480, 640, 3))
    images = json.loads((out / "images.json").read_text())["images"]
    frames = [(entry["id"], entry["frame"]) for entry in images if entry["file_name"] == str(whole)]
    assert frames == [(number + 1, number) for number in range(12)]
    with attempt("batch jobs"):
        if code == "mp4":  # whose index lies at its end
            assert "cut.mp4: no readable video" in error
        else:
            kept = len(images) - 12
            assert 4 <= kept < 12
            assert f"cut.avi: cut off or damaged, {kept} of 12 frames could be read" in error
            assert count_frames(out / "cut.mp4")[0] == kept


def test_camera_runs_until_it_is_stopped(finished, monkeypatch, capsys, tmp_path):
    class Camera:
        def __init__(self, number: int) -> None:
            assert number == 98
            self.left = 3

        def isOpened(self) -> bool:
            return True

        def get(self, key: int) -> float:
            return 0.0

        def read(self) -> tuple[bool, np.ndarray]:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            return True, np.zeros((48, 64, 3), dtype=np.uint8)

        def release(self) -> None:
            self.left = 0

    original = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    run_tool(monkeypatch, "predict", finished, "98", "--out", tmp_path / "out")
    monkeypatch.setattr(cv2, "VideoCapture", original)
    assert "camera 98: 3 frames" in capsys.readouterr().out
    assert count_frames(tmp_path / "out" / "camera98.mp4")[0] == 3
    assert len(json.loads((tmp_path / "out" / "images.json").read_text())["images"]) == 3


def test_the_readmes_example(finished, tmp_path, monkeypatch, capsys):
    (example,) = [text for text in EXAMPLES if "import detection" in text]
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (70, 50), (90, 20, 20)).save("image.jpg")
    exec(compile(example.replace("runs/demo", str(finished)), "README.md", "exec"), {})
    assert "detections" in capsys.readouterr().out
    assert Image.open("drawn.png").width > 0
