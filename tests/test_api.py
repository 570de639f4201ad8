"""The Python face: values of keys, what a prediction is asked of, how results look when printed; torch.hub."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image
from test_export import CLASSIFIER, make_run, with_log

import backbones
import detection
import hubconf
from detection.config import find_recipe, load_config, read_recipe, set_values, spread_values
from detection.data.pictures import read_image
from detection.exporters import OnnxClassifier
from detection.runs import Run

RECIPE = read_recipe(find_recipe("scenes_retinanet_resnet18"))


def test_overrides_in_every_spelling_are_those_of_the_command_line():
    path = find_recipe("scenes_retinanet_resnet18")
    typed = load_config(
        path, ["--train.epochs", "1", "--model.backbone.width", "0.25", "--model.neck.levels", "c3", "c4"]
    )
    spellings = [
        {"train": {"epochs": 1}, "model": {"backbone": {"width": 0.25}, "neck": {"levels": ["c3", "c4"]}}},
        {"train.epochs": 1, "model.backbone.width": 0.25, "model.neck.levels": ["c3", "c4"]},
        {"train__epochs": 1, "model": {"backbone.width": 0.25, "neck__levels": ["c3", "c4"]}},
    ]
    for values in spellings:
        assert set_values(RECIPE, spread_values(type(RECIPE), values)) == typed != RECIPE
    options = {"model": {"backbone": {"options": {"at": 0.25}}}}  # a dict that is a value
    assert spread_values(type(RECIPE), options) == {"model.backbone.options": {"at": 0.25}}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"train": {"epoch": 1}}, r"^train\.epoch: no such key of a recipe; did you mean train\.epochs\?"),
        ({"epochs": 1}, r"^epochs: no such key of a recipe; did you mean train\.epochs\?"),
        ({"model.backbone": {"widht": 1}}, r"did you mean model\.backbone\.width\?"),
        ({"train": 3}, r"^train: a section of a recipe; expected a mapping, or a key of it, such as train\.epochs \("),
        ({"model": {"backbone": 3}}, r"^model\.backbone: a section of a recipe; .* such as model\.backbone\.name \("),
        ({"train": {"epochs": 1}, "train.epochs": 2}, r"^train\.epochs: given twice, 1 and 2$"),
        ({"train": {"epochs": 0}}, r"^train\.epochs: .*greater than 0"),
        ({"zzzzzz": 3}, r"expected one of task, plugins, model"),
    ],
)
def test_a_wrong_key_gives_the_nearest(values, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        detection.train("scenes_retinanet_resnet18", tmp_path / "run", **values)
    assert not (tmp_path / "run").exists()


def test_a_recipe_or_a_run_to_go_on_with(tmp_path):
    for arguments in ((), (RECIPE, None), (None, tmp_path)):
        options = {} if not arguments else {"resume": tmp_path}
        with pytest.raises(ValueError, match="give a recipe, and perhaps a folder `out`, or the run to `resume` alone"):
            detection.train(*arguments, **options)
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        detection.train(resume=tmp_path)
    with pytest.raises(TypeError, match="colour"):
        detection.export(tmp_path, colour="red")


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda: detection.load(None), "^run: expected a run folder, zoo:NAME or an exported file, got None$"),
        (lambda: detection.evaluate(None), "^run: expected a run folder or zoo:NAME, got None$"),
        (lambda: detection.train(resume=3), "^run: expected a run folder or zoo:NAME, got 3$"),
        (lambda: detection.train(3), "^recipe: expected a file, or the name of a recipe .*, got 3$"),
        (lambda: detection.train(RECIPE, 3), "^out: expected a path, got 3$"),
        (lambda: detection.evaluate("zoo:cifar10_vgg11", save=3), "^save: expected a path, got 3$"),
        (lambda: detection.export("zoo:cifar10_vgg11", 3), "^out: expected a path, got 3$"),
        (lambda: detection.export("zoo:cifar10_vgg11", data_root=3), "^data_root: expected a path, got 3$"),
        (lambda: detection.build_detector({}), r"^config: expected the recipe of a detector, .*, got \{\}$"),
        (
            lambda: detection.build_detector(load_config("cifar10_vgg11")),
            r"the recipe of a detector, .*, got ClassificationRecipe\(",
        ),
    ],
)
def test_arguments_of_another_type_are_named_with_what_is_allowed(ask, sentence):
    with pytest.raises(ValueError, match=sentence):
        ask()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("api") / "run", CLASSIFIER)


def probabilities(predictions) -> torch.Tensor:
    return torch.stack([each.probabilities for each in predictions])


def test_predictions_of_folders_globs_and_orders_of_colours(run, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (3, 40, 30, 3), dtype=np.uint8)
    for name, image in zip(("b.png", "a.png", "c.bmp"), pixels, strict=True):
        Image.fromarray(image).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    network, file = detection.load(run, device="cpu"), OnnxClassifier(detection.export(run, tmp_path / "net.onnx")[0])
    for predictor in (network, file):
        expected = probabilities(predictor.predict(list(pixels)))
        assert expected[0].sum() == pytest.approx(1) and (expected[0] - expected[1]).abs().max() > 1e-3
        found = predictor.predict(tmp_path)
        assert [each.path.name for each in found] == ["a.png", "b.png", "c.bmp"]
        torch.testing.assert_close(probabilities(found), expected[[1, 0, 2]])
        found = predictor.predict(str(tmp_path / "*.png"), batch_size=1)
        assert [each.path.name for each in found] == ["a.png", "b.png"]
        flipped = [each[..., ::-1] for each in pixels] + [torch.from_numpy(pixels[0]).permute(2, 0, 1).flip(0)]
        found = predictor.predict(flipped, channels="bgr")
        torch.testing.assert_close(probabilities(found), expected[[0, 1, 2, 0]])
        assert np.array_equal(found[0].image, pixels[0])  # as RGB
        (one,) = predictor.predict([tmp_path / "b.png"], channels="bgr")  # a file knows its order
        torch.testing.assert_close(one.probabilities, expected[0])
        with pytest.raises(ValueError, match="channels: expected rgb or bgr, got 'gbr'"):
            predictor.predict(pixels[0], channels="gbr")
        with pytest.raises(ValueError, match=r"no images in this folder"):
            predictor.predict(run.parent)
        with pytest.raises(ValueError, match=r"none\*\.png: no file matches"):
            predictor.predict(tmp_path / "none*.png")
        with pytest.raises(ValueError, match=r"none\.png: no such file"):
            predictor.predict(tmp_path / "none.png")
    with_alpha = np.dstack([pixels[0][..., ::-1], np.zeros((40, 30), np.uint8)])
    assert torch.equal(read_image(with_alpha, "bgr"), read_image(pixels[0]))
    grey = pixels[0][:, :, 0]
    assert torch.equal(read_image(grey, "bgr"), read_image(grey))


def test_results_say_what_they_are(run, tmp_path):
    predictor = detection.load(run, device="cpu")
    assert repr(predictor) == f"Predictor('{run}': VGG11 \N{MULTIPLICATION SIGN}0.125, spiking, on cpu)"
    Image.new("RGB", (30, 20)).save(tmp_path / "image.png")
    prediction = predictor.predict(tmp_path / "image.png")
    assert repr(prediction) == f"ClassPrediction({tmp_path / 'image.png'}, 30x20 pixels: {prediction})"
    assert "circle 0." in repr(prediction) and len(repr(predictor.predict(np.zeros((9, 9), np.uint8)))) < 200
    assert repr(Run.open(run)) == f"Run('{run}': 0 epochs)"
    evaluated = detection.evaluate(with_log(run, {"top1": 2.0}))
    assert repr(Run.open(run)) == f"Run('{run}': 1 epoch)"
    top1, top5 = evaluated.metrics["top1"], evaluated.metrics["top5"]
    assert repr(evaluated).startswith(f"EvaluatedRun('{run}': top1 {top1:.4f}, top5 {top5:.4f}, val_loss ")
    assert repr(evaluated).endswith("; not as logged)")
    path, described = exported = detection.export(run, tmp_path / "net.onnx")
    assert path == tmp_path / "net.onnx" and described == json.loads((tmp_path / "net.onnx.json").read_text())
    assert repr(exported).startswith(f"ExportedFile('{path}': logits; spikes ")


def test_torch_hub_has_backbones_and_trained_networks():
    def load(name: str, **options):
        return torch.hub.load(str(ROOT), name, source="local", verbose=False, **options)

    from torch.hub import _import_module

    found = vars(_import_module("hubconf", str(ROOT / "hubconf.py")))
    entries = {name for name, value in found.items() if callable(value) and not name.startswith("_")}
    assert entries == {*backbones.names(), *backbones.zoo.names()}
    backbone = load("resnet18", width=0.25, activation="relu")
    assert [info.channels for info in backbone.feature_info] == [16, 32, 64, 128]
    trained = load("resnet18", pretrained="scenes_retinanet_resnet18")
    network = load("scenes_retinanet_resnet18")
    assert not network.training
    for ours, theirs in zip(trained.state_dict().values(), network.backbone.body.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    image = torch.rand(3, 64, 64)
    expected = detection.load("zoo:scenes_retinanet_resnet18", device="cpu").predict(image, score_threshold=0.05)
    with torch.no_grad():
        assert torch.equal(network([image])[0]["boxes"], expected.boxes)
    with pytest.raises(
        ValueError, match=r"pretrained='cifar10_vgg11': its backbone is a vgg11, not a resnet18 \(allowed: b"
    ):
        load("resnet18", pretrained="cifar10_vgg11")
    with pytest.raises(ValueError, match="no such entry of the zoo"):
        load("resnet18", pretrained="imagenet")


def test_what_torch_hub_loads_is_declared_there():
    code = "import hubconf, sys; hubconf.scenes_retinanet_resnet18(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split("[<>=]", each)[0] for each in project["dependencies"]}
    modules = {"pillow": "PIL", "opencv-python-headless": "cv2", "pyyaml": "yaml"}
    needed = {modules.get(name, name) for name in names} & set(loaded.split())
    assert "torch" in needed and needed <= set(hubconf.dependencies)


def test_a_run_goes_on_behind_its_end_from_python(tmp_path):
    data = CLASSIFIER["data"] | {"root": str(tmp_path / "data"), "workers": 0}
    values = CLASSIFIER | {"data": data, "train": {"epochs": 1, "batch_size": 20}}
    run = detection.train(values, tmp_path / "run", callbacks=detection.Callback())
    assert run.finished and run.config.task == "classification"
    run = detection.train(resume=tmp_path / "run", extend=1, extend_lr=0.25)
    assert [line.epoch for line in run.history()] == [1, 2]
    assert [each.model_dump() for each in run.info().extended] == [{"after": 1, "epochs": 1, "lr_factor": 0.25}]
    with pytest.raises(FileExistsError, match="finished already, nothing to go on with"):
        detection.train(resume=tmp_path / "run")
    with pytest.raises(ValueError, match=r"extend 1 and extend_lr 0\.5: above 0, with resume=RUN"):
        detection.train(values, extend=1)
    for factor in (0, "a", float("inf")):
        with pytest.raises(ValueError, match=f"extend_lr {factor!r}: above 0, with resume=RUN"):
            detection.train(resume=run.folder, extend=1, extend_lr=factor)
    for epochs in (-1, 1.5, "1"):
        with pytest.raises(ValueError, match=f"extend: expected a whole number of at least 0, got {epochs!r}"):
            detection.train(resume=run.folder, extend=epochs)
    with pytest.raises(ValueError, match=r"precision: Input should be 'no', 'bf16', 'fp16' or 'auto' \(got 'x'\)"):
        detection.evaluate(run.folder, precision="x")
    with pytest.raises(ValueError, match=r"^recipe: unknown key 'train\.epoch'; did you mean 'epochs'"):
        detection.train(values | {"train": {"epoch": 1}}, tmp_path / "other")
