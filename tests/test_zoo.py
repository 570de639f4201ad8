"""The zoo: every entry is whole and gives its log's numbers, "zoo:NAME" works wherever a run does, and adding one."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT, build_datasets, run_tool
from PIL import Image
from safetensors.torch import load_file
from test_training import TINY_MODEL, tiny_recipe
from torch import nn
from torchvision.ops import box_iou

import backbones
import detection
from backbones import create, load_weights, read_tensors, zoo
from backbones.weights import STEP
from detection.cli import benchmark
from detection.config import parse_recipe
from detection.evaluation import METRICS
from detection.models import build_detector
from detection.records import EpochLog, RunInfo
from detection.robustness.studies import study
from detection.runs import Run
from detection.tasks import task_of
from detection.tasks.evaluate import evaluate_run
from detection.tasks.recipes import ClassificationRecipe, DetectionRecipe
from detection.tasks.run import find_teacher, load_model

NAMES = ("bccd_retinanet_resnet18", "cifar10_vgg11", "scenes_retinanet_resnet18")
EVENTS = {"model.events", "model.events.json"}
FILES = {"config.yaml", "run.json", "metrics.jsonl", "last.safetensors"}


def refused(monkeypatch, capsys, tool: str, *arguments) -> str:
    """What a tool says that ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        run_tool(monkeypatch, tool, *arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below a folder, but compiled modules: its bytes, and when it was written."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def use_copy(monkeypatch, folder: Path, *names: str) -> Path:
    """From now on the zoo is `folder`, with copies of these entries in it."""
    folder.mkdir()
    for name in names:
        shutil.copytree(zoo.find(name), folder / name)
    monkeypatch.setattr(zoo, "FOLDER", folder)
    return folder


# The entries that come with the package


def test_names_and_folders():
    assert zoo.names() == sorted(zoo.names())
    assert set(NAMES) <= set(zoo.names())
    for name in zoo.names():
        assert zoo.find(name) == Path(backbones.__file__).parent / "zoo" / name
        assert zoo.locate(f"zoo:{name}") == zoo.locate(Path(f"zoo:{name}")) == zoo.find(name)
    assert zoo.locate("runs/demo") == Path("runs/demo")
    assert zoo.locate("./zoo:demo") == Path("./zoo:demo")


@pytest.mark.parametrize("name", zoo.names())
def test_entry_is_whole_and_says_where_it_comes_from(name):
    folder, run = zoo.find(name), Run.open(f"zoo:{name}")
    files = {path.name for path in folder.iterdir()}
    assert files in (FILES, FILES | EVENTS)
    file = folder / "last.safetensors"
    assert file.stat().st_size <= 26_000_000
    if files >= EVENTS:
        said, whole = json.loads((folder / "model.events.json").read_text()), (folder / "model.events").read_bytes()
        assert said["sha256"] == hashlib.sha256(whole).hexdigest()
        described = detection.load(f"zoo:{name}/model.events").description
        assert described["classes"] == said["classes"] and described["batch_size"] == run.config.train.batch_size
    info = run.info()
    assert info.sha256 == {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}
    assert info.versions and info.machine.cpu != "unknown CPU" and info.command != "unknown"
    (line,) = run.history()
    assert line.seconds is None  # of one epoch: it would pass for the training's
    detector = isinstance(run.config, DetectionRecipe)
    metrics = METRICS if detector else ("top1", "top5", "val_loss")
    assert set(line.metrics) == {*metrics, "activity"} and line.evaluation.activity_per_layer
    if detector:
        assert len(info.category_ids) == len(run.config.data.classes)
        assert line.evaluation.tables["per_class"].keys() == set(run.config.data.classes)
    backbone = yaml.safe_load((folder / "config.yaml").read_text())["model"]["backbone"]
    assert zoo.settings(name) == {key: value for key, value in backbone.items() if key not in ("weights", "options")}
    assert not backbone.get("options")
    for text in ((folder / "config.yaml").read_text(), json.dumps([info.command, info.trained_in])):
        assert not re.search(r"""(^|[\s"'=])(/|~)""", text), "a path of one machine"

    trained = Run.open(ROOT / info.trained_in)
    assert trained.info().sha256[info.trained_weights] == info.trained_sha256
    assert trained.info().command == info.command
    (logged,) = (each for each in trained.history() if each.epoch == line.epoch)
    for key in ("AP", "AP50") if detector else ("top1", "top5"):
        assert line.metrics[key] == pytest.approx(logged.metrics[key], abs=0.01)  # 16 bits flip a few spikes
    assert line.layers["v_th"] == logged.layers["v_th"]
    assert line.layers["extremum"] == logged.layers["extremum"]


@pytest.mark.parametrize("name", zoo.names())
def test_only_weights_of_convolutions_and_linear_layers_are_shortened(name):
    path = zoo.find(name) / "last.safetensors"
    (state, _), stored, model = read_tensors(path), load_file(path), load_model(Run.open(f"zoo:{name}"))
    weighted = {f"{key}.weight" for key, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    assert state.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert value.dtype == (torch.int64 if key.endswith("num_batches_tracked") else torch.float32)
        shorter = torch.int8 if key + STEP in stored else torch.float16
        assert stored[key].dtype == (shorter if key in weighted else value.dtype), key
        assert torch.equal(state[key].to(value.dtype), value)


# 0.005: on another CPU, with another number of threads or another version sums are rounded differently, a potential at
# its threshold falls on the other side, and a few boxes or answers with it.


def test_blood_cell_detector_gives_its_numbers_again(real_data):
    found, logged = evaluate_run("zoo:bccd_retinanet_resnet18", data_root=real_data("bccd") / "bccd")
    for key in ("AP", "AP50"):
        assert found.metrics[key] == pytest.approx(logged.metrics[key], abs=0.005)
    assert found.activity == pytest.approx(logged.evaluation.activity, abs=0.005)


def test_cifar10_classifier_gives_its_numbers_again(real_data):
    found, logged = evaluate_run("zoo:cifar10_vgg11", data_root=real_data("cifar10") / "cifar10")
    for key in ("top1", "top5"):
        assert found.metrics[key] == pytest.approx(logged.metrics[key], abs=0.005)
    assert found.activity == pytest.approx(logged.evaluation.activity, abs=0.005)


def test_the_engine_file_of_vgg16_gives_its_numbers_again(real_data):
    """The full network of results/c5_cifar10_vgg16: hoyer-det benchmark FILE --data.root CIFAR10."""
    path = ROOT / "results" / "c5_cifar10_vgg16" / "hoyer" / "export" / "model.events"
    logged = json.loads(path.with_name("model.events.json").read_text())["evaluation"]
    found = detection.load(path).evaluate(real_data("cifar10") / "cifar10")
    assert found["top1"] == logged["file"]["top1"]
    assert found["top1"] == pytest.approx(logged["run"]["top1"], abs=0.002)


def test_a_classifier_of_three_thresholds_gives_its_numbers_again(real_data):
    """hoyer-det evaluate results/widths_cifar10/hoyer_w0125_t3_seed0 --data.root CIFAR10."""
    run = ROOT / "results" / "widths_cifar10" / "hoyer_w0125_t3_seed0"
    found, logged = evaluate_run(run, data_root=real_data("cifar10") / "cifar10")
    assert found.metrics["top1"] == pytest.approx(logged.metrics["top1"], abs=0.005)
    assert found.activity == pytest.approx(logged.evaluation.activity, abs=0.005)


def test_the_detector_of_three_thresholds_gives_its_numbers_again(real_data):
    """hoyer-det benchmark results/bccd_thresholds/thresholds3/export/model.events --data.root BCCD."""
    path = ROOT / "results" / "bccd_thresholds" / "thresholds3" / "export" / "model.events"
    logged = json.loads(path.with_name("model.events.json").read_text())["evaluation"]
    found = detection.load(path).evaluate(real_data("bccd") / "bccd")
    assert found == {key: pytest.approx(logged["file"][key], abs=1e-6) for key in found}
    assert found["AP"] > logged["run"]["AP"] - 0.01  # on 72 images rounding moves it by a point either way


def test_the_detector_of_voc_gives_its_numbers_again(real_data):
    """hoyer-det benchmark backbones/zoo/voc_retinanet_resnet18_spiking/model.events --data.root VOCDEVKIT."""
    path = zoo.find("voc_retinanet_resnet18_spiking") / "model.events"
    logged = json.loads(path.with_name("model.events.json").read_text())["evaluation"]["file"]
    found = detection.load(path).evaluate(real_data("voc") / "VOCdevkit")
    assert found == {key: pytest.approx(logged[key], abs=1e-6) for key in found}


# Where a run or weights are wanted


@pytest.mark.parametrize("name", zoo.names())
def test_backbone_of_an_entry(name):
    backbone = create(**zoo.settings(name), weights=f"zoo:{name}")
    whole = load_model(Run.open(f"zoo:{name}")).backbone
    wanted = getattr(whole, "body", whole).state_dict()
    assert backbone.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[key]) for key, value in backbone.state_dict().items())
    assert {value.dtype for value in backbone.parameters()} == {torch.float32}
    config = Run.open(f"zoo:{name}").config.model
    assert zoo.normalisation(name) == {"mean": list(config.mean), "std": list(config.std)}
    other = create(**zoo.settings(name))
    load_weights(other, f"zoo:{name}")
    assert all(torch.equal(value, wanted[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "resnet34"),
        ("width", 0.25),
        ("stem", "cifar"),
        ("activation", "fixed"),
        ("extremum", "channel"),
        ("pool_first", False),
    ],
)
def test_another_backbone_is_refused_by_the_name_of_what_differs(key, value):
    entry = "zoo:bccd_retinanet_resnet18"
    settings = zoo.settings("bccd_retinanet_resnet18") | {key: value}
    with pytest.raises(ValueError, match=rf"{entry}: trained with {key} .*, wanted is {value!r}"):
        create(**settings, weights=entry)
    recipe = {"model": {"backbone": settings | {"weights": entry}}}
    recipe["data"] = {"format": "synthetic", "classes": ["a"]}
    with pytest.raises(ValueError, match=rf"bccd_retinanet_resnet18: trained with {key} "):
        build_detector(DetectionRecipe.model_validate(recipe))


@pytest.mark.parametrize(
    ("trained", "wanted", "key"),
    [
        ({"time_steps": 1, "reset": "zero"}, {"time_steps": 4, "reset": "subtract"}, None),
        ({"time_steps": 2, "reset": "zero"}, {"time_steps": 4, "reset": "zero"}, None),
        ({"time_steps": 2, "reset": "zero"}, {"time_steps": 2, "reset": "subtract"}, "reset"),
        ({"time_steps": 2}, {"time_steps": 1}, "time_steps"),
        ({"activation": "graded", "levels": 4}, {"activation": "graded", "levels": 2}, "levels"),
        ({"activation": "hoyer", "levels": 4}, {"activation": "hoyer", "levels": 2}, None),
        ({"threshold": "layer"}, {"threshold": "channel"}, "threshold"),
        ({"thresholds": 1}, {"thresholds": 3}, None),
        ({"thresholds": 2}, {"thresholds": 3}, "thresholds"),
    ],
)
def test_where_weights_mean_something_else(trained, wanted, key):
    assert zoo.first_difference(trained, wanted) == key
    theirs, ours = ({f"backbone.{name}": value for name, value in each.items()} for each in (trained, wanted))
    assert zoo.first_difference(theirs, ours, list(theirs)) == (key and f"backbone.{key}")


def test_shapes_that_do_not_fit_name_the_entry():
    with pytest.raises(ValueError, match="zoo:cifar10_vgg11 does not fit the backbone"):
        load_weights(create("vgg11", stem="cifar", width=0.125), "zoo:cifar10_vgg11")


def test_recipe_starts_from_an_entry_and_learns_from_one(monkeypatch, tmp_path):
    entry = "zoo:scenes_retinanet_resnet18"
    backbone = zoo.settings("scenes_retinanet_resnet18") | {"weights": entry}
    recipe = tiny_recipe(tmp_path, model={"backbone": backbone}, train={"epochs": 1})
    run_tool(monkeypatch, "train_det", recipe, "optimizer.lr=1e-9", "--out", tmp_path / "run")
    run = Run.open(tmp_path / "run")
    assert run.config.model.backbone.weights == entry
    theirs, ours = (load_model(Run.open(source)).backbone.body for source in (entry, tmp_path / "run"))
    wanted = dict(theirs.named_parameters())
    for key, found in ours.named_parameters():
        torch.testing.assert_close(found, wanted[key], atol=1e-6, rtol=0)
    run.config.distillation.teacher, run.config.model.head.anchor_scale = Path(entry), 3.0
    teacher = load_model(find_teacher(task_of(run.config)))
    assert torch.equal(teacher.backbone.body.stem[0].weight, theirs.stem[0].weight)
    assert create(**zoo.settings(run.folder), weights=entry)
    assert zoo.normalisation(run.folder) == zoo.normalisation("scenes_retinanet_resnet18")
    for weights in (run.folder, run.folder / "last.safetensors"):
        with pytest.raises(ValueError, match=r"run.*: trained with activation 'hoyer', wanted is 'fixed'"):
            create(**zoo.settings(run.folder) | {"activation": "fixed"}, weights=weights)
    (run.folder / "run.json").write_text('{"command": "of an older version"}')
    with pytest.raises(ValueError, match=r"run: its run\.json does not say what its backbone is"):
        zoo.settings(run.folder)


def test_detector_of_the_zoo_finds_shapes_that_it_has_not_seen(tmp_path):
    config = Run.open("zoo:scenes_retinanet_resnet18", tmp_path / "scenes").config
    assert config.data.root == tmp_path / "scenes"
    config.data.scenes.num_train, config.data.scenes.num_val, config.data.scenes.seed = 1, 8, 5
    _, scenes = build_datasets(config.data)
    predictor = detection.load("zoo:scenes_retinanet_resnet18", device="cpu")
    right = number = 0
    for image, target in scenes:
        found = predictor.predict(image, score_threshold=0.3)
        same = found.labels[None, :] == target["labels"][:, None]
        right += int(((box_iou(target["boxes"], found.boxes) > 0.5) & same).any(1).sum())
        number += len(target["boxes"])
    assert right / number > 0.6


def test_classifier_of_the_zoo_answers_with_its_classes():
    prediction = detection.load("zoo:cifar10_vgg11", device="cpu").predict(Image.new("RGB", (40, 40), "blue"))
    assert prediction.class_names[:2] == ("airplane", "automobile")
    assert prediction.probabilities.sum().item() == pytest.approx(1, abs=1e-5)


def test_unknown_name_lists_those_there_are(monkeypatch, capsys, tmp_path):
    sentence = re.escape(f"zoo:nothing: no such entry of the zoo (allowed: {', '.join(zoo.names())})")
    for use in (
        lambda: zoo.find("nothing"),
        lambda: zoo.settings("nothing"),
        lambda: Run.open("zoo:nothing"),
        lambda: detection.load("zoo:nothing"),
        lambda: create("vgg11", weights="zoo:nothing"),
        lambda: load_weights(create("vgg11", width=0.125), "zoo:nothing"),
    ):
        with pytest.raises(ValueError, match=sentence):
            use()
    for tool in ("evaluate", "analyze", "report"):
        assert re.search(sentence, refused(monkeypatch, capsys, tool, "zoo:nothing"))
    assert re.search(sentence, refused(monkeypatch, capsys, "predict", "zoo:nothing", tmp_path))
    for name in ("", "..", "__pycache__", "../../runs/demo"):
        with pytest.raises(ValueError, match="no such entry of the zoo"):
            zoo.find(name)
    monkeypatch.setattr(zoo, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match=re.escape("zoo:cifar10_vgg11: no such entry of the zoo (allowed: none)")):
        zoo.find("cifar10_vgg11")


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_weights_are_an_error(monkeypatch, capsys, tmp_path, damage):
    folder = use_copy(monkeypatch, tmp_path / "zoo", "cifar10_vgg11")
    file = folder / "cifar10_vgg11" / "last.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "truncated":
        data = data[:-1000]
    else:
        data[-1000] ^= 1
    file.write_bytes(data)
    for use in (
        lambda: detection.load("zoo:cifar10_vgg11"),
        lambda: create(**zoo.settings("cifar10_vgg11"), weights="zoo:cifar10_vgg11"),
    ):
        with pytest.raises(ValueError, match=r"last\.safetensors: damaged weights file"):
            use()
    assert "damaged weights file" in refused(monkeypatch, capsys, "evaluate", "zoo:cifar10_vgg11")


# Adding one


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run folder of a tiny detector with averaged weights."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = tiny_recipe(folder, train={"ema_decay": 0.5})
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_tool(monkeypatch, "train_det", recipe, "--out", folder / "run")
    return folder / "run"


@pytest.fixture
def own_zoo(monkeypatch, tmp_path):
    """An empty zoo for this test, and a working directory beside it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return use_copy(monkeypatch, tmp_path / "zoo")


def test_added_entry_gives_its_log_in_every_digit(trained, own_zoo, monkeypatch, capsys):
    (own_zoo / ".tiny.part").mkdir()  # of a call that was killed
    (own_zoo / ".tiny.part" / "run.json").touch()
    assert zoo.names() == []
    shutil.copytree(trained, "results/tiny")
    before = content(trained)
    run_tool(monkeypatch, "zoo", "add", trained, "tiny", "--trained-in", "results/tiny")
    assert "zoo:tiny" in capsys.readouterr().out
    assert zoo.names() == ["tiny"]
    assert [path.name for path in own_zoo.iterdir()] == ["tiny"]
    assert content(trained) == before
    entry, source = Run.open("zoo:tiny"), Run.open(trained)
    root = source.config.data.root
    assert root.is_absolute()
    assert entry.config.data.root == Path("data/scenes")
    assert str(root.parent) not in (entry.folder / "config.yaml").read_text()
    assert entry.config.model == source.config.model
    info, (line,) = entry.info(), entry.history()
    assert info.trained_in == "results/tiny"
    assert info.trained_sha256 == source.checksums()["last.safetensors"]
    assert info.sha256 == entry.checksums()
    assert info.category_ids == source.info().category_ids == [1, 2, 3, 4]
    assert zoo.normalisation("tiny") == {"mean": list(entry.config.model.mean), "std": list(entry.config.model.std)}
    assert info.command == source.info().command
    logged = source.history()[-1]
    assert line.ema is line.seconds is line.eval_seconds is line.images_per_second is line.memory_mib is None
    assert (line.epoch, line.loss, line.layers) == (logged.epoch, logged.loss, logged.layers)
    run_tool(monkeypatch, "evaluate", "zoo:tiny", "--data.root", root)
    assert "equal to the log in every digit" in capsys.readouterr().out
    run_tool(monkeypatch, "zoo")
    listed = capsys.readouterr().out
    for text in ("tiny", "detection", "retinanet, resnet18 x0.125", "scenes", info.sha256["last.safetensors"][:16]):
        assert text in listed
    run_tool(monkeypatch, "zoo", "list")
    assert capsys.readouterr().out == listed


@pytest.mark.parametrize("which", ["best", "ema"])
def test_other_weights_of_a_run(trained, own_zoo, monkeypatch, capsys, which):
    run_tool(monkeypatch, "zoo", "add", trained, f"tiny_{which}", "--weights", which)
    entry, source = Run.open(f"zoo:tiny_{which}"), Run.open(trained)
    assert entry.info().trained_weights == f"{which}.safetensors"
    assert entry.info().trained_sha256 == source.checksums()[f"{which}.safetensors"]
    assert entry.info().trained_in is None
    (line,), state = entry.history(), load_model(source, which).state_dict()
    assert {f"{name}.v_th": value for name, value in line.layers["v_th"].items()} == {
        key: pytest.approx(value.abs().item()) for key, value in state.items() if key.endswith("v_th")
    }
    for key, value in load_model(entry).state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=1e-3, atol=1e-6)
    run_tool(monkeypatch, "evaluate", f"zoo:tiny_{which}", "--data.root", source.config.data.root)
    assert "equal to the log in every digit" in capsys.readouterr().out


def test_an_entry_of_8_bits(trained, own_zoo, monkeypatch, capsys):
    run_tool(monkeypatch, "zoo", "add", trained, "tiny", "--bits", "8")
    entry, source = Run.open("zoo:tiny"), Run.open(trained)
    state, stored = load_model(source).state_dict(), load_file(entry.folder / "last.safetensors")
    weighted = {key.removesuffix(STEP) for key in stored if key.endswith(STEP)}
    assert len(weighted) > 20 and stored.keys() == state.keys() | {key + STEP for key in weighted}
    for key, value in load_model(entry).state_dict().items():
        if key in weighted:
            step = stored[key + STEP]
            assert stored[key].dtype == torch.int8 and step.numel() == len(value)
            assert torch.equal(value, stored[key] * step)
            assert ((value - state[key]).abs() <= 0.5001 * step).all()
        else:
            assert torch.equal(value, state[key])
    run_tool(monkeypatch, "evaluate", "zoo:tiny", "--data.root", source.config.data.root)
    assert "equal to the log in every digit" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_tool(monkeypatch, "zoo", "add", trained, "other", "--bits", "4")
    assert "invalid choice: 4" in capsys.readouterr().err


def test_an_entry_has_a_file_for_the_engine(trained, own_zoo, monkeypatch, capsys):
    run_tool(monkeypatch, "zoo", "add", trained, "tiny", "--events")
    assert "model.events" in capsys.readouterr().out
    (line,), root = Run.open("zoo:tiny").history(), Run.open(trained).config.data.root
    description = json.loads((own_zoo / "tiny" / "model.events.json").read_text())
    assert description["evaluation"]["run"]["AP50"] == line.metrics["AP50"]
    image = next((root / "val").glob("*.png"))
    prediction = detection.load("zoo:tiny/model.events").predict(image)
    beside = detection.load(own_zoo / "tiny" / "model.events").predict(image)
    assert np.array_equal(prediction.boxes, beside.boxes) and np.array_equal(prediction.scores, beside.scores)
    before = content(own_zoo)
    run_tool(monkeypatch, "predict", "zoo:tiny/model.events", image)
    assert (Path("predictions/tiny") / image.name).is_file()
    capsys.readouterr()
    benchmark.main(["zoo:tiny/model.events", "--repeats", "2"])
    assert "images per second" in capsys.readouterr().out
    assert content(own_zoo) == before
    for use in (detection.load, zoo.locate):
        with pytest.raises(ValueError, match=r"no such file of the entry \(allowed: config.yaml, last"):
            use("zoo:tiny/other.events")
    with pytest.raises(ValueError, match="zoo:none: no such entry"):
        zoo.locate("zoo:none/model.events")


def test_what_is_made_from_an_entry_goes_elsewhere(trained, own_zoo, monkeypatch, capsys):
    run_tool(monkeypatch, "zoo", "add", trained, "tiny")
    before, root = content(own_zoo), Run.open(trained).config.data.root
    image = next((root / "val").glob("*.png"))
    run_tool(monkeypatch, "analyze", "zoo:tiny", "--data.root", root)
    run_tool(monkeypatch, "report", "zoo:tiny", "--data.root", root)
    run_tool(monkeypatch, "predict", "zoo:tiny", image)
    study(["zoo:tiny"], "noise", ["test"], kinds=["blur"], seeds=[0], data_root=root)
    assert content(own_zoo) == before
    made = Path("runs/zoo/tiny")
    assert {path.name for path in made.iterdir()} == {"analysis", "report.html"}
    assert json.loads((made / "analysis" / "analysis.json").read_text())["run"] == "zoo:tiny"
    page = (made / "report.html").read_text()
    assert "zoo:tiny" in page
    assert re.search(r"Training time(\s|<[^>]*>)*unknown", page)
    assert str(own_zoo) not in page
    assert (Path("predictions/tiny") / image.name).is_file()
    found = json.loads(Path("noise/robustness.json").read_text())
    assert found["runs"]["tiny"]["folder"] == "zoo:tiny"
    run = Run.open(own_zoo / "tiny")  # by its path
    assert (run.address, run.products) == ("zoo:tiny", made)
    run = Run.open(trained)
    assert (run.address, run.products) == (str(trained), trained)


def test_what_is_refused_leaves_the_zoo_as_it_was(trained, own_zoo, monkeypatch, capsys, tmp_path):
    run_tool(monkeypatch, "zoo", "add", trained, "tiny")
    before = content(own_zoo)

    def copy(name: str, **info) -> Path:
        shutil.copytree(trained, name)
        run = Run.open(name)
        run.write_info(run.info().model_copy(update=info))
        return Path(name)

    def says(*arguments) -> str:
        message = refused(monkeypatch, capsys, "zoo", "add", *arguments)
        assert content(own_zoo) == before
        assert [path.name for path in own_zoo.iterdir()] == ["tiny"]
        return message

    assert "zoo:tiny exists already" in says(trained, "tiny")
    for name in ("Tiny", "a/b", "..", "ti-ny", "a.b", ""):
        assert f"name {name!r}: not allowed" in says(trained, name)
    assert "none is not a run folder" in says("none", "new")
    assert "the training has to be finished" in says(copy("unfinished", sha256={}), "new")
    other = copy("other", sha256=dict.fromkeys(("last.safetensors", "best.safetensors"), "0" * 64))
    assert f"{other / 'run.json'} has 0000000000000000..." in says(other, "new")
    assert "these are not the weights of that training" in says(trained, "new", "--trained-in", other)
    assert "expected a folder relative to the repository" in says(trained, "new", "--trained-in", trained)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter.txt").touch()
    assert "something else than drawn scenes" in says(trained, "new", "--data.root", tmp_path / "letters")
    bare = copy("bare")
    (bare / "ema.safetensors").unlink()
    assert "ema.safetensors: no such weights file" in says(bare, "new", "--weights", "ema")


def test_weights_that_are_too_large_or_too_many_are_refused(own_zoo, monkeypatch, capsys):
    def run_of(name: str, width: float, weight: float) -> Path:
        model = TINY_MODEL | {"backbone": {"name": "resnet18", "width": width}, "neck": {"out_channels": 16}}
        data = {"format": "synthetic", "classes": ["circle", "square", "triangle", "star"]}
        run = Run.create(name, parse_recipe({"model": model, "data": data}, "test"), RunInfo(command="test"))
        network = build_detector(run.config)
        with torch.no_grad():
            network.backbone.body.stem[0].weight[0, 0, 0, 0] = weight
        run.save(network, "last")
        run.log(EpochLog.parse({"epoch": 1, "loss": 1.0, "AP": 0.0, "AP50": 0.0}, "test"))
        run.write_info(run.info().model_copy(update={"sha256": run.checksums()}))
        return run.folder

    message = refused(monkeypatch, capsys, "zoo", "add", run_of("wide", 1.25, 1.0), "wide")
    assert re.search(r"wide: its weights take [34]\d\.\d MB in the zoo \(allowed: 26 MB\)", message)
    message = refused(monkeypatch, capsys, "zoo", "add", run_of("huge", 0.125, 70000.0), "huge")
    assert re.search(r"stem\.0\.weight: up to 70000, too large for 16 bits", message)
    assert list(own_zoo.iterdir()) == []


def test_classifier_becomes_an_entry(own_zoo, monkeypatch, capsys, tmp_path):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        "task: classification\n"
        "model: {backbone: {name: vgg11, stem: cifar, width: 0.125, activation: relu}}\n"
        f"data: {{format: synthetic, root: {tmp_path}, num_train: 32, num_val: 16, size: 32, workers: 0}}\n"
        "train: {epochs: 1, batch_size: 16}\n"
    )
    run_tool(monkeypatch, "train_cls", recipe, "--out", "run")
    run_tool(monkeypatch, "zoo", "add", "run", "twin")
    capsys.readouterr()
    entry = Run.open("zoo:twin")
    assert isinstance(entry.config, ClassificationRecipe)
    assert entry.info().category_ids is None
    assert zoo.settings("twin")["activation"] == "relu"
    run_tool(monkeypatch, "evaluate", "zoo:twin", "--data.root", tmp_path)
    assert "equal to the log in every digit" in capsys.readouterr().out
    message = refused(monkeypatch, capsys, "zoo", "add", "run", "other", "--events")
    assert "other has no spike layers" in message
    assert zoo.names() == ["twin"]
    run_tool(monkeypatch, "zoo")
    assert re.search(r"twin .* vgg11 x0\.125 .* top1 [01]\.\d{4}, top5 [01]\.\d{4} .* none ", capsys.readouterr().out)
