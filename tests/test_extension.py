"""The package from outside: a backbone, a neuron, a data format and a task, each a small module that a recipe names."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import backbones
from backbones import spike_layers
from backbones.networks import base as families
from detection import tasks
from detection.config import load_config, override, read_recipe, registry
from detection.config.schema import Data, ImageData
from detection.data import draw_scene, formats, images
from detection.predict import Predictor
from detection.records import EpochLog
from detection.runs import Run
from detection.tasks.evaluate import evaluate_run
from detection.tasks.run import load_model, train_run

MOST_LINES = 40
SHORT = {"train": {"epochs": 2, "batch_size": 4}, "optimizer": {"warmup_steps": 1}, "hoyer": {"weight": 0.01}}
CLASSIFIER = SHORT | {
    "task": "classification",
    "model": {"backbone": {"name": "resnet18", "width": 0.125, "stem": "cifar"}},
    "data": {"format": "synthetic", "size": 32, "num_train": 12, "num_val": 8},
}
SCENES = {"num_train": 8, "num_val": 4, "size": 64}


def detector(backbone: dict, data: dict) -> dict:
    neck = {"levels": ["c2", "c3"], "extra_levels": 0, "out_channels": 16}
    model = {"backbone": backbone, "neck": neck, "head": {"num_convs": 1}, "min_size": [64], "max_size": 96}
    return SHORT | {"model": model, "data": data | {"workers": 0}}


@pytest.fixture(autouse=True)
def own_registries(monkeypatch):
    """What a test registers is gone after it, and its modules are imported anew."""
    for name in (registry.BUILT_IN, *tasks.BUILT_IN):
        importlib.import_module(name)
    for module, name in (
        (families, "_FAMILIES"),
        (backbones.spiking, "_NEURONS"),
        (formats, "READERS"),
        (images, "READERS"),
        (tasks, "_TASKS"),
        (registry, "_RECIPES"),
    ):
        monkeypatch.setattr(module, name, dict(getattr(module, name)))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("own_"):
            del sys.modules[name]


@pytest.fixture
def write_plugin(tmp_path, monkeypatch):
    """(name, text) -> the module's file, where Python finds it."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, text: str) -> Path:
        path = tmp_path / f"{name}.py"
        path.write_text(dedent(text).strip() + "\n")
        assert len(path.read_text().splitlines()) < MOST_LINES
        return path

    return write


def write_recipe(folder: Path, values: dict, *plugins: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"plugins": list(plugins)} | values))
    return path


def train(folder: Path, values: dict, *plugins: str) -> tuple[Run, list[EpochLog]]:
    """Train a recipe file, and evaluate the run again: the numbers are those of its log in every digit."""
    recipe = write_recipe(folder, values, *plugins)
    train_run(load_config(recipe), folder / "run", ["test"])
    run = Run.open(folder / "run")
    assert run.config.plugins == list(plugins) and run.finished
    found, logged = evaluate_run(run.folder)
    assert found.metrics == logged.evaluation.metrics and found.activity == logged.evaluation.activity
    history = run.history()
    assert [line.epoch for line in history] == [1, 2]
    return run, history


# --- a backbone -------------------------------------------------------------------------------------------------------

BACKBONE = """
    from torch import nn

    from backbones import Backbone, FeatureInfo, register_backbone


    @register_backbone("plain4", "plain8")
    class Plain(Backbone):
        '''Convolutions of stride 2, spikes between them.'''

        def __init__(self, name, spike, *, in_channels=3, stem="imagenet", width=1.0, kernel_size=3):
            super().__init__()
            self.make_spike = spike
            channels = [int(name[5:]) * round(4 * width) * factor for factor in (1, 2, 4)]
            first = nn.Conv2d(in_channels, channels[0], kernel_size, 2, kernel_size // 2)
            self.stem = nn.Sequential(first, nn.BatchNorm2d(channels[0]))
            self.stages = nn.ModuleList(
                nn.Sequential(
                    spike(before), nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after)
                )
                for before, after in zip(channels, channels[1:])
            )
            self.feature_info = (FeatureInfo("c2", channels[1], 4), FeatureInfo("c3", channels[2], 8))
"""


def test_a_backbone_from_elsewhere_carries_a_detector(tmp_path, write_plugin):
    write_plugin("own_backbone", BACKBONE)
    data = {"format": "synthetic", "root": str(tmp_path / "scenes"), "scenes": SCENES}
    backbone = {"name": "plain4", "width": 0.5, "options": {"kernel_size": 5}}
    run, history = train(tmp_path, detector(backbone, data), "own_backbone")
    assert {"plain4", "plain8"} < set(backbones.names())
    model = load_model(run)
    assert type(model.backbone.body).__name__ == "Plain" and model.backbone.body.stem[0].kernel_size == (5, 5)
    assert [info.channels for info in model.backbone.body.feature_info] == [16, 32]
    layers = list(spike_layers(model))
    assert list(history[-1].layers["hoyer_per_layer"]) == list(history[-1].layers["v_th"]) == layers
    assert list(history[-1].evaluation.activity_per_layer) == layers and len(layers) == 4
    assert (run.folder / "predictions.png").is_file()
    predictor = Predictor(run)
    image = np.zeros((48, 64, 3), dtype=np.uint8)
    assert predictor.predict(image, score_threshold=0.0).class_names == ("circle", "square", "triangle", "star")
    assert [entry.name for entry in predictor.spike_maps(image)] == ["c2", "c3", "neck c2", "neck c3"]


def test_a_backbone_from_elsewhere_is_a_classifier_whose_weights_move_to_a_detector(tmp_path, write_plugin):
    write_plugin("own_backbone", BACKBONE)
    values = CLASSIFIER | {"model": {"backbone": {"name": "plain8", "width": 0.5}}}
    run, _ = train(tmp_path, values, "own_backbone")
    x = torch.rand(2, 3, 32, 32)
    model = load_model(run)
    with torch.no_grad():
        torch.testing.assert_close(backbones.fold(model)(x), model(x))
    data = {"format": "synthetic", "classes": ["a"]}
    recipe = write_recipe(tmp_path, detector({"name": "plain8", "width": 0.5, "weights": str(run.folder)}, data))
    body = tasks.task_of(read_recipe(recipe)).build_model().backbone.body
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(body.state_dict()[key], value)


# --- a neuron ---------------------------------------------------------------------------------------------------------

NEURON = """
    import torch

    from backbones import SpikeLayer, register_neuron


    class Fire(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u, theta):
            ctx.save_for_backward(u - theta)
            return (u >= theta).to(u.dtype)

        @staticmethod
        def backward(ctx, gradient):
            (distance,) = ctx.saved_tensors
            return gradient * (1 - distance.abs()).clamp(min=0), None


    @register_neuron("triangle", words="triangular surrogate")
    class Triangle(SpikeLayer):
        def __init__(self, channels, theta=1.0):
            super().__init__()
            self.register_buffer("theta", torch.tensor(float(theta)))

        @property
        def threshold(self):
            return self.theta

        def forward(self, u):
            return Fire.apply(u, self.theta)

        def logged(self):
            return {"theta": self.theta.item()}
"""


def test_a_neuron_from_elsewhere_trains_with_its_own_option(tmp_path, write_plugin):
    write_plugin("own_neuron", NEURON)
    backbone = CLASSIFIER["model"]["backbone"] | {"activation": "triangle", "options": {"theta": 0.25}}
    run, history = train(tmp_path, CLASSIFIER | {"model": {"backbone": backbone}}, "own_neuron")
    model = load_model(run)
    layers = spike_layers(model)
    assert {type(layer).__name__ for layer in layers.values()} == {"Triangle"}
    assert {layer.threshold.item() for layer in layers.values()} == {0.25}
    line = history[-1]
    assert line.layers == {"theta": dict.fromkeys(layers, 0.25)}  # and no Hoyer term, which it does not have
    assert list(line.losses) == ["classification"] and 0 < line.evaluation.activity < 1
    assert list(line.evaluation.activity_per_layer) == list(layers)
    assert backbones.neurons()["triangle"].words == "triangular surrogate"
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    assert Predictor(run).predict(image).probabilities.sum().item() == pytest.approx(1)
    assert len(Predictor(run).spike_maps(image)) == 5


def test_a_neuron_from_elsewhere_is_measured_and_folded(tmp_path, write_plugin):
    write_plugin("own_neuron", NEURON)
    registry.import_plugins(["own_neuron"])
    torch.manual_seed(0)
    model = backbones.Classifier(
        backbones.create("vgg11", width=0.125, stem="cifar", activation="triangle", theta=0.5, extremum="channel"), 4
    ).eval()
    x = torch.randn(4, 3, 32, 32)
    measured = backbones.measure_activity(model, [x])
    with torch.no_grad():
        expected = model.double()(x.double())
    assert backbones.certify(measured).is_binary
    assert 0 < backbones.spike_activity(measured.spikes) < 1
    folded = backbones.fold(model)
    with torch.no_grad():
        assert torch.equal(folded(x.double()), expected)
    assert not spike_layers(folded)


# --- a data format ----------------------------------------------------------------------------------------------------

FORMAT = """
    import csv
    from collections import defaultdict

    from PIL import Image

    from detection.data import RawObject, build_annotations, build_record, register_format


    @register_format("own_csv")
    def read_csv(data, split, classes):
        '''Rows of file, xmin, ymin, xmax, ymax, class in root/SPLIT.csv.'''
        source = data.root / f"{split}.csv"
        with source.open(newline="") as file:
            rows = list(csv.reader(file, delimiter=str(data.options.get("delimiter", ","))))
        names = tuple(classes) or tuple(sorted({row[5] for row in rows}))
        objects, dropped = defaultdict(list), []
        for number, (file, xmin, ymin, xmax, ymax, name) in enumerate(rows, start=1):
            objects[file].append(RawObject(f"row {number}", (xmin, ymin, xmax, ymax), names.index(name) + 1, False))
        records = []
        for number, file in enumerate(sorted(objects), start=1):
            path = data.root / file
            with Image.open(path) as image:
                size = image.size
            records.append(
                build_record(path, number, *size, objects[file], layout="voc", source=source, dropped=dropped)
            )
        return build_annotations(records, names, range(1, len(names) + 1), dropped, source=str(source))
"""


def write_csv(root: Path) -> None:
    root.mkdir()
    for split, number in (("train", 8), ("val", 4)):
        rows = []
        for index in range(number):
            scene = draw_scene(64, 4, np.random.default_rng([number, index]))
            Image.fromarray(scene.image).save(root / f"{split}{index}.png")
            for box, label in zip(scene.boxes, scene.labels, strict=True):
                corners = (box[0] + 1, box[1] + 1, box[2], box[3])
                rows.append(";".join([f"{split}{index}.png", *(f"{side:g}" for side in corners), f"shape{label}"]))
        (root / f"{split}.csv").write_text("\n".join(rows) + "\n")
    with (root / "train.csv").open("a") as file:
        file.write("train0.png;9;9;9;4;shape1\n")


def test_a_data_format_from_elsewhere_trains_a_detector(tmp_path, write_plugin, capsys):
    write_plugin("own_format", FORMAT)
    write_csv(tmp_path / "boxes")
    data = {"format": "own_csv", "root": str(tmp_path / "boxes"), "options": {"delimiter": ";"}}
    run, history = train(tmp_path, detector({"name": "resnet18", "width": 0.125}, data), "own_format")
    assert run.config.data.classes == ["shape1", "shape2", "shape3", "shape4"]
    assert run.info().category_ids == [1, 2, 3, 4]
    assert list(history[-1].evaluation.tables["per_class"]) == run.config.data.classes
    (left_out,) = {line for line in capsys.readouterr().err.splitlines() if line.startswith("train: ")}
    assert "train.csv: row" in left_out and "no area" in left_out
    assert Predictor(run).predict(tmp_path / "boxes" / "val0.png").size == (64, 64)


def test_an_image_format_from_elsewhere_trains_a_classifier(tmp_path, write_plugin):
    write_plugin(
        "own_images",
        """
        import torch

        from detection.data.images import Images, register_image_format


        @register_image_format("stripes")
        def read_stripes(data, split, download):
            number = 12 if split == "train" else 8
            pixels = torch.zeros(number, 3, data.size, data.size, dtype=torch.uint8)
            labels = torch.arange(number) % 2
            pixels[labels == 0, :, ::4] = pixels[labels == 1, :, :, ::4] = int(data.options["brightness"])
            return Images(pixels, labels, ("rows", "columns"))
        """,
    )
    data = {"format": "stripes", "size": 32, "options": {"brightness": 200}}
    run, _ = train(tmp_path, CLASSIFIER | {"data": data}, "own_images")
    assert run.config.data.classes == ["rows", "columns"]
    assert tasks.task_of(run.config).read("val").pixels.max() == 200


# --- a task -----------------------------------------------------------------------------------------------------------

TASK = """
    from typing import Literal

    import torch

    from backbones import Classifier
    from detection.config import Recipe, register_recipe, schema
    from detection.data.image_batches import MemoryBatches
    from detection.data.images import read_image_split
    from detection.models import build_backbone
    from detection.records import Evaluation
    from detection.tasks import register_task
    from detection.tasks.base import Task, record_spikes

    @register_recipe
    class BrightnessRecipe(Recipe):
        task: Literal["brightness"] = "brightness"
        model: schema.Classifier = schema.Classifier()
        data: schema.ImageData

    @register_task
    class Brightness(Task):
        recipe, best_by, headline, metrics = BrightnessRecipe, "fit", ("error",), ("error", "fit")
        def read(self, split):
            return read_image_split(self.config.data, split)
        def training_batches(self, dataset, accelerator):
            train, augment = self.config.train, self.config.data.augment
            return MemoryBatches(dataset, accelerator.device, batch_size=train.batch_size, augment=augment)
        def evaluation_batches(self, dataset, accelerator):
            return MemoryBatches(dataset, accelerator.device, batch_size=self.config.train.batch_size)
        def build_model(self):
            return Classifier(build_backbone(self.config.model.backbone), 1)
        def losses(self, model, batch):
            return {"brightness": (model(batch[0])[:, 0] - batch[0].mean((1, 2, 3))).square().mean()}
        @torch.no_grad()
        def evaluate(self, model, batches, dataset, accelerator, *, save=None):
            with record_spikes(model) as spikes:
                error = torch.stack([self.losses(model, batch)["brightness"] for batch in batches]).mean().item()
            return Evaluation(metrics={"error": error, "fit": 1 / (1 + error)}, **spikes())
"""


@pytest.mark.pictures
def test_a_task_from_elsewhere_trains_and_evaluates(tmp_path, write_plugin, capsys):
    write_plugin("own_task", TASK)
    values = CLASSIFIER | {"task": "brightness"}
    run, history = train(tmp_path, values | {"train": SHORT["train"] | {"ema_decay": 0.5}}, "own_task")
    assert run.config.task == "brightness" and type(run.config).__name__ == "BrightnessRecipe"
    assert [list(line.losses) for line in history] == [["brightness", "hoyer"]] * 2
    assert list(history[-1].evaluation.metrics) == ["error", "fit"] == list(history[-1].ema.metrics)
    best = max(history, key=lambda line: line.metrics["fit"])
    assert run.logged("best", "fit") == best and (run.folder / "best.safetensors").is_file()
    assert f"fit {history[-1].metrics['fit']:.4f}  error {history[-1].metrics['error']:.4f}" in capsys.readouterr().out
    assert {path.name for path in run.folder.glob("*.png")} == {"curves.png", "dynamics.png"}
    assert run.info().normalisation is None  # its network has none, whatever the keys of its recipe say


def test_what_a_task_from_elsewhere_does_not_do_is_refused_by_name(tmp_path, write_plugin):
    write_plugin("own_task", TASK)
    values = CLASSIFIER | {"task": "brightness", "train": {"epochs": 1, "batch_size": 4}}
    recipe = write_recipe(tmp_path, values, "own_task")
    train_run(load_config(recipe), tmp_path / "run", ["test"])
    predictor = Predictor(Run.open(tmp_path / "run"))
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    for ask in (predictor.predict, predictor.spike_maps):
        with pytest.raises(ValueError, match=r"^task brightness: has no predictions of single images$"):
            ask(image)
    with pytest.raises(ValueError, match=r"^task brightness: cannot be exported$"):
        predictor.task.deployable(predictor.model)
    with pytest.raises(ValueError, match=r"^task brightness: downloads nothing$"):
        train_run(load_config(recipe), tmp_path / "other", ["test"], download=True)
    student = load_config(recipe, [f"--distillation.teacher={tmp_path / 'run'}"])
    with pytest.raises(ValueError, match=r"task brightness: learns from no teacher \(distillation\.teacher\)"):
        train_run(student, tmp_path / "other", ["test"])
    assert not (tmp_path / "other").exists()


# --- errors -----------------------------------------------------------------------------------------------------------


def refusal(folder: Path, values: dict, *plugins: str) -> str:
    recipe = write_recipe(folder, values, *plugins)
    with pytest.raises(ValueError) as error:
        read_recipe(recipe)
    message = str(error.value)
    assert message.startswith(f"{recipe}: plugins: ") and "\n" not in message
    return message


@pytest.mark.parametrize(("kind", "read"), [(Data, formats.read_split), (ImageData, images.read_image_split)])
def test_formats_of_the_package_have_no_options(kind, read):
    with pytest.raises(ValueError, match=r"data\.options: mirror: data\.format 'synthetic' has none"):
        read(kind(format="synthetic", options={"mirror": True}), "train")


def test_a_plugin_that_is_not_there(tmp_path):
    message = refusal(tmp_path, CLASSIFIER, "own_nothing")
    assert "own_nothing: cannot be imported" in message and "is it installed, or on PYTHONPATH?" in message


def test_a_plugin_of_a_command_line_is_imported(tmp_path, write_plugin):
    write_plugin("own_late", "raise RuntimeError('it was imported')")
    recipe = read_recipe(write_recipe(tmp_path, CLASSIFIER))
    with pytest.raises(ValueError, match=r"plugins: own_late: cannot be imported .RuntimeError: it was"):
        override(recipe, ["--plugins", "own_late"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import torch\n\n1 / 0", "ZeroDivisionError: division by zero"),
        ("def broken(:", "SyntaxError: "),
        ("from backbones import nothing_of_this_name", "ImportError: cannot import name 'nothing_of_this_name'"),
    ],
)
def test_a_plugin_that_fails_says_why(tmp_path, write_plugin, text, reason):
    write_plugin("own_failure", text)
    message = refusal(tmp_path, CLASSIFIER, "own_failure")
    assert f"own_failure: cannot be imported ({reason}" in message


TAKEN = {
    "backbone": ("backbones", "@backbones.register_backbone('resnet18')", "backbone 'resnet18'", "networks.resnet"),
    "neuron": ("backbones", "@backbones.register_neuron('hoyer')", "neuron 'hoyer'", "backbones.activations"),
    "format": ("detection.data", "@detection.data.register_format('voc')", "data.format 'voc'", "data.formats"),
    "images": (
        "detection.data.images",
        "@detection.data.images.register_image_format('folder')",
        "data.format 'folder'",
        "data.images",
    ),
}


@pytest.mark.parametrize("kind", TAKEN)
def test_a_name_that_is_taken_is_refused_with_its_owner(tmp_path, write_plugin, kind):
    module, decorator, name, owner = TAKEN[kind]
    write_plugin("own_twice", f"import {module}\n\n\n{decorator}\nclass Other:\n    pass")
    message = refusal(tmp_path, CLASSIFIER, "own_twice")
    assert f"{name} is registered already, by " in message and owner in message
    assert families.find_family("resnet18")[0].__name__ == "ResNet"


def test_a_task_that_is_taken_is_refused_with_its_owner(tmp_path, write_plugin):
    write_plugin("own_task", TASK)
    write_plugin("own_other", TASK)
    message = refusal(tmp_path, CLASSIFIER, "own_task", "own_other")
    assert "own_other: cannot be imported (ValueError: task 'brightness' is registered already, by own_task)" in message


def test_a_module_that_is_imported_twice_registers_once(tmp_path, write_plugin):
    write_plugin("own_neuron", NEURON)
    recipe = write_recipe(tmp_path, CLASSIFIER, "own_neuron", "own_neuron")
    assert read_recipe(recipe) == read_recipe(recipe)
    del sys.modules["own_neuron"]
    read_recipe(recipe)


def test_without_its_plugin_a_run_says_what_it_lacks(tmp_path, write_plugin):
    write_plugin("own_backbone", BACKBONE)
    values = CLASSIFIER | {"model": {"backbone": {"name": "plain8"}}}
    with pytest.raises(ValueError, match=r"model\.backbone\.name: unknown 'plain8'.*\(allowed: .*resnet18"):
        train_run(read_recipe(write_recipe(tmp_path, values)), tmp_path / "run", ["test"])
    assert not (tmp_path / "run").exists()
    close = CLASSIFIER | {"model": {"backbone": {"name": "plain16"}}}
    config = read_recipe(write_recipe(tmp_path, close, "own_backbone"))
    with pytest.raises(ValueError, match=r"unknown 'plain16'; did you mean 'plain"):
        train_run(config, tmp_path / "run", ["test"])
    task = write_recipe(tmp_path, CLASSIFIER | {"task": "brightness"})
    with pytest.raises(ValueError, match=r"task: expected detection or classification, got 'brightness'"):
        read_recipe(task)
