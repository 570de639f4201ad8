"""Networks on event data: a frame for each time step, recordings as sources of predictions, what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from helpers import run_tool
from PIL import Image
from test_event_sets import RECIPES
from test_multistep import SurrogateStep
from torch import Tensor, nn

import backbones
import detection
from backbones import (
    FramesToSteps,
    MultiStepSpike,
    RepeatSteps,
    certify,
    energy,
    measure_activity,
    spike_layers,
    stop_after,
)
from detection.config import load_config, read_recipe
from detection.config.schema import Augment, Events
from detection.data.events import Recording, events_to_frames, read_windows
from detection.data.pictures import as_rgb
from detection.data.transforms import build_transform
from detection.predict import predict_images
from detection.robustness.studies import study
from detection.runs import Run
from detection.tasks import task_of
from detection.tasks.run import read_evaluation_data, train_run

# Networks


def test_a_network_that_is_stopped_early_has_seen_its_first_frames_alone():
    torch.manual_seed(0)
    backbone = backbones.create("vgg9", in_channels=6, frames=3, time_steps=3, width=0.125, stem="cifar")
    model = backbones.Classifier(backbone, 4)
    images = torch.rand(2, 6, 32, 32)
    model(images)
    model.eval()
    whole = measure_activity(model, [images])
    assert whole.layers[whole.stem].time_steps == 3
    for steps in (1, 2):
        other = images.clone()
        other[:, 2 * steps :] = torch.rand(2, 6 - 2 * steps, 32, 32)
        with stop_after(model, steps):
            assert torch.equal(backbone(images)["c2"], backbone(other)["c2"])
            assert measure_activity(model, [images]) == whole.stopped(steps)
    assert not torch.equal(backbone(images)["c2"], backbone(other)["c2"])


class Carried(nn.Module):
    """One spike layer of a network that is given a frame at a time: keeps its potential from call to call."""

    def __init__(self, layer: MultiStepSpike, leak: Tensor) -> None:
        super().__init__()
        self.v, self.e, self.leak = layer.v_th.detach().abs(), layer.extremum.clone(), leak
        self.m: Tensor | float = 0.0
        self.s: Tensor | float = 0.0

    def forward(self, u: Tensor) -> Tensor:
        self.m = self.leak * (self.m - self.s * self.v * self.e) + u
        self.s = SurrogateStep.apply(self.m / self.v, self.e)
        return self.s


@pytest.mark.parametrize(("name", "pooling"), [("vgg9", "stride"), ("resnet18", "max"), ("mobilenetv1", "max")])
def test_frames_in_steps_equal_a_loop_over_frames(name, pooling):
    torch.manual_seed(0)
    options = {"width": 0.125, "stem": "cifar", "pooling": pooling}
    joined = backbones.create(name, in_channels=6, frames=3, time_steps=3, **options).double()
    joined(torch.rand(4, 6, 32, 32, dtype=torch.float64))  # running averages
    joined.eval()
    leaks = {layer: torch.tensor(0.8, dtype=torch.float64, requires_grad=True) for layer in spike_layers(joined)}
    for layer in spike_layers(joined).values():
        layer.leak.data.fill_(0.8)
    one = backbones.create(name, in_channels=2, **options).double().eval()
    one.load_state_dict({key: value for key, value in joined.state_dict().items() if not key.endswith("leak")})
    for layer in spike_layers(one):
        parent, _, child = layer.rpartition(".")
        setattr(one.get_submodule(parent), child, Carried(joined.get_submodule(layer), leaks[layer]))
    images = torch.rand(2, 6, 32, 32, dtype=torch.float64, requires_grad=True)
    again = images.detach().clone().requires_grad_()
    ours = joined(images)
    theirs = [one(again[:, 2 * step : 2 * step + 2]) for step in range(3)]
    for key, found in ours.items():
        torch.testing.assert_close(found, torch.cat([step[key] for step in theirs]))
    upstream = torch.randn_like(ours["c5"])
    (ours["c5"] * upstream).sum().backward()
    (torch.cat([step["c5"] for step in theirs]) * upstream).sum().backward()
    torch.testing.assert_close(images.grad, again.grad)
    wanted = {layer: leak.grad for layer, leak in leaks.items() if leak.grad is not None}
    found = {layer: spike_layers(joined)[layer].leak.grad for layer in wanted}
    torch.testing.assert_close(found, wanted)
    assert images.grad.abs().sum() > 0 and any(grad != 0 for grad in wanted.values())


def test_frames_become_steps_and_an_image_alone_is_that_of_a_batch():
    x = torch.arange(8.0).view(2, 4, 1, 1)  # two images of two frames of two channels
    assert FramesToSteps(2)(x).flatten(1).tolist() == [[0, 1], [4, 5], [2, 3], [6, 7]]
    torch.manual_seed(0)
    model = backbones.Classifier(backbones.create("vgg9", width=0.125, in_channels=4, frames=2, time_steps=2), 3)
    images = torch.rand(3, 4, 64, 64)
    model(images)
    model.eval()
    assert model(images).shape == (3, 3) and model.backbone.time_steps == 2
    torch.testing.assert_close(model(images[1:2]), model(images)[1:2])
    # Other events in the second frame change the second step alone.
    before = model.backbone(images)["c2"].unflatten(0, (2, 3))
    images[:, 2:] = torch.rand(3, 2, 64, 64)
    after = model.backbone(images)["c2"].unflatten(0, (2, 3))
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
    assert certify(measure_activity(model, [images])).is_binary


def test_energy_of_a_stem_that_sees_a_frame_in_each_step():
    conv, linear = nn.Conv2d(1, 1, 1, bias=False), nn.Linear(4, 2, bias=False)
    nn.init.ones_(conv.weight)
    model = nn.Sequential(FramesToSteps(2), conv, MultiStepSpike(1, time_steps=2), nn.Flatten(), linear).eval()
    # v_th, E and leak are 1: the first pixel fires in the first step, the second in the second, at 0.5 + 0.5.
    measured = measure_activity(model, [torch.tensor([[1, 0.5, 0.0, 0.0], [0.0, 0.5, 0, 0]]).view(1, 2, 2, 2)])
    assert (measured.layers["1"].num_exact_macs, measured.layers["1"].time_steps) == (8, 2)
    spiking, twin = (energy(measured).networks[name] for name in ("spiking", "twin"))
    # The stem's 8 in both; 4 potentials carried once; the twin's linear layer 8, the spiking one's 2 spikes x 2.
    assert (spiking.macs, spiking.acs, twin.macs) == (8 + 4, 4, 8 + 8)
    assert twin.read_bits == 32 * (8 + 4) and twin.write_bits == 32 * (4 + 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 4, "frames": 2, "time_steps": 3}, "2 frames for 3 time steps: each step takes one, or all"),
        ({"in_channels": 5, "frames": 2}, "in_channels 5 are no 2 frames of as many channels"),
        ({"in_channels": 2, "frames": 0}, "frames must be a whole number from 1 on, got 0"),
        ({"pooling": "mean"}, "pooling must be 'max' or 'stride', got 'mean'"),
    ],
)
def test_refused_frames(options, message):
    with pytest.raises(ValueError, match=message):
        backbones.create("vgg9", width=0.125, **options)


def recipe_of(task: str, folder: Path, steps: int, time_steps: int, **backbone) -> Path:
    recipe = RECIPES[task] | {"train": {"epochs": 1, "batch_size": 4}}
    recipe["data"] = recipe["data"] | {"format": "synthetic_events", "root": str(folder / f"made_{task}"), "workers": 0}
    recipe["data"]["events"] = {"steps": steps, "window": 0.1, "skip": 0, "min_diagonal": 0, "min_side": 0}
    model = dict(recipe["model"])
    if task == "detection":
        model["head"] = model["head"] | {"score_threshold": 0, "max_detections": 5}
    model["backbone"] = model["backbone"] | {"time_steps": time_steps} | backbone
    path = folder / f"{task}.yaml"
    path.write_text(yaml.safe_dump(recipe | {"model": model}), encoding="utf-8")
    return path


@pytest.mark.parametrize("task", RECIPES)
def test_which_frames_a_recipe_gives_to_which_steps(task, tmp_path):
    # Channels of the stem: all steps in one image, one frame in all steps, a frame for each; the twin has one step.
    for steps, time_steps, activation, channels, kind in (
        (3, 1, "hoyer", 6, None),
        (1, 3, "hoyer", 2, RepeatSteps),
        (3, 3, "hoyer", 2, FramesToSteps),
        (3, 3, "relu", 6, None),
    ):
        path = recipe_of(task, tmp_path, steps, time_steps, activation=activation)
        model = task_of(load_config(path, ["--data.classes", "a", "b"])).build_model()
        first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        found = [type(module) for module in model.modules() if isinstance(module, RepeatSteps)]
        assert first.in_channels == channels and found == ([] if kind is None else [kind])
    path = recipe_of(task, tmp_path, 2, 2)
    with pytest.raises(ValueError, match=r"model\.backbone\.time_steps 3: data\.events\.steps is 2; allowed are the"):
        load_config(path, ["--model.backbone.time_steps", "3"])
    both = load_config(path, ["--model.backbone.time_steps", "3", "--data.events.steps", "3"])
    assert both.data.channels == 6 and both.data.frames == 3
    plain = load_config(path, ["--data.format", "synthetic", "--model.backbone.time_steps", "3"])
    assert (plain.data.channels, plain.data.frames, plain.data.are_events) == (3, 1, False)


def test_the_recipe_of_dvscifar10_has_strides_and_ten_frames():
    config = read_recipe(Path(detection.__file__).parents[1] / "configs" / "dvscifar10_vgg.yaml")
    config.data.classes = list("abcdefghij")
    config.model.backbone.width = 0.125
    model = task_of(config).build_model()
    assert not any(isinstance(module, nn.MaxPool2d) for module in model.modules())
    seen = {}
    with backbones.hook_layers({"": model.head}, before=lambda name, module, x: seen.update(x=x)):
        assert model(torch.rand(2, 20, 48, 48)).shape == (2, 10)
    assert seen["x"].shape == (20, 64, 3, 3)  # 48, 24, 12, 6, 3


# Predictions


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Run folders of a detector and a classifier of two time steps, each with its own frame."""
    folder = tmp_path_factory.mktemp("events")
    for task in RECIPES:
        train_run(load_config(recipe_of(task, folder, 2, 2)), folder / task, ["test"])
    return {task: folder / task for task in RECIPES}


@pytest.fixture(scope="module")
def recording(runs) -> Path:
    return Run.open(runs["detection"]).config.data.root / "val" / "000001_td.dat"


def predict(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    """Exit status and standard error of hoyer-det predict."""
    status = 0
    try:
        run_tool(monkeypatch, "predict", *arguments)
    except SystemExit as stop:
        status = int(stop.code)
    return status, capsys.readouterr().err


def count_frames(path: Path) -> int:
    capture, number = cv2.VideoCapture(str(path)), 0
    while capture.read()[0]:
        number += 1
    return number


def test_windows_of_a_recording(recording, tmp_path):
    whole = Recording(recording)
    settings = read_recipe(recording.parents[2] / "detection.yaml").data.events
    pictures = list(read_windows(recording, settings))
    assert len(pictures) == math.ceil((whole.end + 1 - whole.start) / 100_000) == 10
    first = whole.start + 3 * 100_000
    counts = events_to_frames(whole.between(first, first + 100_000), (64, 64), 2, window=(first, first + 100_000))
    assert torch.equal(pictures[3], (255 * (counts / 3).clamp(max=1)).round().byte().flatten(0, 1))
    nothing = whole.path.read_bytes().replace(b"% Width 64\n", b"")
    (tmp_path / "old.dat").write_bytes(nothing)
    with pytest.raises(ValueError, match=r"old\.dat: its header has no size of the sensor; the recipe has no data"):
        next(read_windows(tmp_path / "old.dat", settings))


def test_windows_of_other_files(tmp_path):
    pytest.importorskip("tonic")
    # N-MNIST's five bytes: x, y, polarity in the highest bit of 23 bits of microseconds.
    rows = [(3, 1, 1, 10), (4, 2, 0, 20_000), (5, 0, 1, 100_015)]
    content = b"".join(bytes([x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255]) for x, y, p, t in rows)
    (tmp_path / "a.bin").write_bytes(content)
    settings = Events(full=1)
    first, second, third = read_windows(tmp_path / "a.bin", settings)
    assert first.shape == (2, 3, 6) and first.nonzero().tolist() == [[0, 2, 4], [1, 1, 3]]
    assert not second.any() and third.nonzero().tolist() == [[1, 0, 5]]


def test_a_detectors_film_of_a_recording(runs, recording, monkeypatch, capsys, tmp_path):
    out = tmp_path / "out"
    arguments = (runs["detection"], recording, "--score", "0", "--spikes", "--out", out)
    assert predict(monkeypatch, capsys, *arguments)[0] == 0
    assert {path.name for path in out.iterdir()} == {
        "predictions.json",
        "images.json",
        "000001_td.mp4",
        "000001_td_spikes.png",
    }
    assert count_frames(out / "000001_td.mp4") == 10
    images = json.loads((out / "images.json").read_text())["images"]
    assert [entry["frame"] for entry in images] == list(range(10))
    assert {(entry["file_name"], entry["width"], entry["height"]) for entry in images} == {(str(recording), 64, 64)}
    predictor = detection.load(runs["detection"], device="cpu")
    found = predictor.predict(str(recording), score_threshold=0)
    pictures = list(read_windows(recording, predictor.run.config.data.events))
    assert len(found) == 10 and {each.path for each in found} == {recording}
    assert np.array_equal(found[6].image, as_rgb(pictures[6]).permute(1, 2, 0).numpy()) and found[6].image.any()
    rows = json.loads((out / "predictions.json").read_text())
    assert [row["image_id"] for row in rows] == [number for number, each in enumerate(found, 1) for _ in each.scores]
    assert rows and [each.name for each in predictor.spike_maps(pictures[6])] == ["c2", "c3", "neck c3"]
    alone = predictor.predict(pictures[6], score_threshold=0)
    torch.testing.assert_close(alone.boxes, found[6].boxes, atol=1e-3, rtol=1e-4)


def test_a_classifiers_answer_to_a_recording(runs, monkeypatch, capsys, tmp_path):
    run = Run.open(runs["classification"])
    folder = run.config.data.root / "val" / "star"
    (path,) = folder.glob("*.dat")
    predictor = detection.load(runs["classification"], device="cpu")
    dataset = read_evaluation_data(run)
    with torch.no_grad():
        wanted = predictor.model(dataset.pixels[dataset.labels == dataset.classes.index("star")] / 255).softmax(1)[0]
    found = predictor.predict([path])[0]
    torch.testing.assert_close(found.probabilities, wanted)
    assert predict(monkeypatch, capsys, runs["classification"], folder, "--out", tmp_path / "out")[0] == 0
    (row,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert row["probabilities"] == pytest.approx(dict(found.top()), abs=1e-5)
    assert Image.open(tmp_path / "out" / f"{path.stem}.png").size[0] > 32


def test_what_a_network_does_not_take_is_named(runs, recording, monkeypatch, capsys, tmp_path):
    content = bytearray(recording.read_bytes())
    half = len(content) - len(content) // 16 * 8
    content[half : half + 4] = (5).to_bytes(4, "little")
    (tmp_path / "jumps.dat").write_bytes(content)
    (tmp_path / "empty.dat").touch()
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "film.mp4").write_bytes(b"no film")
    sources = ("jumps.dat", "empty.dat", "a.png", "film.mp4")
    arguments = [tmp_path / name for name in sources] + ["--out", tmp_path / "out"]
    status, errors = predict(monkeypatch, capsys, runs["detection"], *arguments)
    assert status == 1
    for sentence in (
        "jumps.dat: the clock jumps backwards",
        "empty.dat: an empty file, 0 bytes",
        "a.png: the network takes events in 4 channels, a recording (.dat .bin .aedat) or a tensor (4, H, W)\n",
        "film.mp4: a film, and the network takes recordings of events",
    ):
        assert sum(sentence in line for line in errors.splitlines(keepends=True)) == 1, errors
    images = json.loads((tmp_path / "out" / "images.json").read_text())["images"]
    assert 2 < len(images) < 10 and {entry["drawn"] for entry in images} == {"jumps.mp4"}  # what came before the jump
    predictor = detection.load(runs["detection"], device="cpu")
    for image, message in (
        ([recording], r"index 0: .*000001_td\.dat: a recording, which is many images to detection"),
        (torch.rand(3, 64, 64), r"takes events in 4 channels, .* got a tensor \(3, 64, 64\)"),
        (np.zeros((64, 64, 3), np.uint8), "got ndarray"),
        (torch.full((4, 64, 64), 2.0), r"expected floats in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            predictor.predict(image)
    for task in RECIPES:  # networks of RGB images
        path = recipe_of(task, tmp_path, 1, 1)
        subject = task_of(load_config(path, ["--data.format", "synthetic", "--data.classes", "a", "b"]))
        with pytest.raises(ValueError, match=rf"a recording of events, and {task} of synthetic data takes images"):
            predict_images(subject, subject.build_model().eval(), recording)


# Augmentation


def test_five_frames_are_scaled_each_as_if_alone(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (40, 50, 10), dtype=np.uint8)
    for factor in (0.7, 1.3):
        transform = build_transform(Augment(hflip=0, scale=1, scale_range=(factor, factor)))
        torch.manual_seed(0)
        together = transform(image, np.zeros((0, 4)), np.zeros(0, np.int64))[0]
        for first in (0, 3, 7):  # torch's seed draws the same place again
            torch.manual_seed(0)
            # Four channels, since the ground of three is grey.
            alone = transform(image[:, :, [first, *[first + 1] * 3]], np.zeros((0, 4)), np.zeros(0, np.int64))[0]
            assert np.array_equal(together[:, :, first : first + 2], alone[:, :, :2]) and together.shape == image.shape
    config = load_config(recipe_of("detection", tmp_path, 1, 1), ["--data.augment.color", "0.5"])
    with pytest.raises(ValueError, match=r"data\.augment\.color 0\.5: it takes pictures, not events"):
        task_of(config).read("train")


# Other commands


def test_check_data_of_events(runs, monkeypatch, capsys, tmp_path):
    for task, counted in (("detection", "train: images"), ("classification", "train: ")):
        run_tool(monkeypatch, "check_data", recipe_of(task, tmp_path, 2, 2))
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1] == "training can go on" and any(line.startswith(counted) for line in lines)


def test_noise_that_needs_colours_is_left_out_for_events(runs, tmp_path, capsys):
    found = study([runs["classification"]], tmp_path / "out", ["test"], kinds=["jpeg", "blur", "membrane"], seeds=[0])
    assert found["left_out"] == [
        {
            "run": "classification",
            "kinds": ["membrane"],
            "reason": "no single time step: what is put into one is carried over to the next",
        },
        {"run": "classification", "kinds": ["jpeg"], "reason": "images of events, which have no three colours"},
    ]
    assert {row["kind"] for row in found["results"]} == {"clean", "blur"}
    assert "classification: images of events; left out: jpeg" in capsys.readouterr().err
    with pytest.raises(
        ValueError, match=r"images of events: --kinds jpeg cannot be asked of it; .* one of gaussian_noise, blur"
    ):
        study([runs["classification"]], tmp_path / "other", ["test"], kinds=["jpeg"])
