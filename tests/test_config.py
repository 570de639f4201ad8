"""Recipes: read, checked, overridden, written back; names that are not registered; what the published ones say."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROOT

from detection.config import (
    find_recipe,
    load_config,
    override,
    print_keys,
    read_recipe,
    recipe_names,
    save_config,
    set_values,
)
from detection.config.io import _value_of, upgrade
from detection.config.schema import Data, ImageData
from detection.tasks import task_of
from detection.tasks.recipes import ClassificationRecipe, DetectionRecipe
from detection.tasks.run import train_run

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
MINIMAL = {"data": {"format": "synthetic"}}
CLASSIFICATION = MINIMAL | {"task": "classification"}


def write(path: Path, values) -> Path:
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_loads_and_names_its_own_command(path):
    text = path.read_text()
    assert type(read_recipe(path)) is (ClassificationRecipe if "task: classification" in text else DetectionRecipe)
    assert f"train {path.stem}" in text


def test_there_are_recipes():
    assert len(CONFIGS) >= 2


def test_saved_config_reads_back_equal(tmp_path):
    config = load_config(write(tmp_path / "a.yaml", MINIMAL), ["--train.epochs", "3", "--data.classes", "a b", "c"])
    save_config(config, tmp_path / "b.yaml")
    assert config.data.classes == ["a b", "c"]
    assert load_config(tmp_path / "b.yaml") == config


def test_overrides_are_typed_and_both_spellings_work(tmp_path):
    path = write(tmp_path / "a.yaml", MINIMAL)
    config = load_config(
        path,
        [
            "--model.backbone.activation",
            "relu",
            "model.backbone.width=0.25",
            "--model.min_size",
            "64",
            "96",
            "--train.compile",
            "True",
            "--data.root",
            "elsewhere",
        ],
    )
    assert config.model.backbone.activation == "relu"
    assert config.model.backbone.width == 0.25
    assert config.model.min_size == [64, 96]
    assert config.train.compile is True
    assert config.data.root == Path("elsewhere")


def test_overrides_in_one_text_are_those_of_a_list(tmp_path):
    path = write(tmp_path / "a.yaml", MINIMAL)
    assert load_config(path, "train.epochs=3").train.epochs == 3
    assert load_config(path, "--data.classes 'a b' c --train.epochs 3").data.classes == ["a b", "c"]
    for wrong in (3, [3], {"train.epochs": 3}):
        with pytest.raises(ValueError, match=r"overrides: expected a list of texts such as train\.epochs=3, got "):
            load_config(path, wrong)


def test_an_override_leaves_the_rest_of_its_section_alone(tmp_path):
    path = write(tmp_path / "a.yaml", MINIMAL | {"model": {"backbone": {"name": "vgg11", "width": 0.5}}})
    backbone = load_config(path, ["--model.backbone.activation", "fixed"]).model.backbone
    assert (backbone.name, backbone.width, backbone.activation) == ("vgg11", 0.5, "fixed")


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"modle": {}}, ["'modle'", "did you mean 'model'"]),
        ({"model": {"backbone": {"nmae": "vgg11"}}}, ["'model.backbone.nmae'", "did you mean 'name'"]),
        ({"train": {"epochs": "many"}}, ["train.epochs", "integer", "'many'"]),
        ({"train": {"epochs": 0}}, ["train.epochs", "greater than 0", "got 0"]),
        ({"hoyer": {"reduction": "median"}}, ["hoyer.reduction", "'sum', 'mean' or 'network'", "'median'"]),
        ({"model": 3}, ["model", "got 3"]),
        ({"data": {"events": {"window": 1e-7}}}, ["data.events.window", "greater than or equal to 0.000001"]),
    ],
)
def test_a_wrong_key_or_value_is_named_with_what_is_allowed(tmp_path, values, parts, attempt):
    path = write(tmp_path / "bad.yaml", MINIMAL | values)
    with attempt("wrong values"), pytest.raises(ValueError) as error:
        load_config(path)
    message = str(error.value)
    assert "\n" not in message
    for part in [str(path), *parts]:
        assert part in message


@pytest.mark.parametrize("text", ["false", "False", "FALSE"])
def test_an_option_of_a_neuron_may_be_a_truth_value(text):
    values = _value_of(["soft", text, "gain", "3"], dict[str, bool | int | float | str])
    assert values == {"soft": False, "gain": 3}


BACKBONES = ["allowed: ", "resnet18", "vgg16", "mobilenetv1", "mobilenetv2"]
NEURONS = ["allowed: ", "hoyer", "relu", "fixed", "graded"]


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"model": {"backbone": {"activation": "relu6"}}}, ["model.backbone.activation", "mean 'relu'", *NEURONS]),
        ({"model": {"backbone": {"name": "resnet17"}}}, ["model.backbone.name", "'resnet17'", "'resnet1", *BACKBONES]),
        ({"model": {"backbone": {"name": "x"}}}, ["model.backbone.name: unknown 'x' (allowed: ", *BACKBONES]),
        ({"model": {"backbone": {"options": {"level": 2}}}}, ["model.backbone.options", "'level'", "mean 'levels'"]),
        ({"data": {"format": "cocoa"}}, ["data.format: unknown 'cocoa'", "mean 'coco'", "voc", "synthetic"]),
        (CLASSIFICATION | {"data": {"format": "cifar"}}, ["data.format", "mean 'cifar10", "folder", "synthetic"]),
        (CLASSIFICATION | {"model": {"backbone": {"name": "vgg12"}}}, ["model.backbone.name", "mean 'vgg1"]),
    ],
)
def test_names_that_nothing_is_registered_by_are_said_before_anything_is_read(
    tmp_path, monkeypatch, values, parts, attempt
):
    config = read_recipe(write(tmp_path / "bad.yaml", MINIMAL | values))
    task = task_of(config)
    with attempt("wrong values"), pytest.raises(ValueError) as error:
        task.check_names("bad.yaml")
    for part in ["bad.yaml: ", *parts]:
        assert part in str(error.value)
    monkeypatch.setattr(type(task), "read", lambda *_: pytest.fail("data were read"))
    with attempt("wrong values"), pytest.raises(ValueError, match=parts[0].partition(":")[0]):
        train_run(config, tmp_path / "run", ["test"])
    assert not (tmp_path / "run").exists()


def test_all_unknown_names_are_said_at_once(tmp_path, attempt):
    values = {"model": {"backbone": {"name": "vgg12", "activation": "gelu"}}, "data": {"format": "vok"}}
    with (
        attempt("wrong values"),
        pytest.raises(ValueError, match=r"backbone\.name: unknown 'vgg12'.*activation: unknown 'gelu'.*'vok'.*'voc'"),
    ):
        task_of(read_recipe(write(tmp_path / "a.yaml", values))).check_names()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_names_what_there_is(path):
    task_of(read_recipe(path)).check_names(path)


def test_an_unknown_task_is_named_with_those_there_are(tmp_path, attempt):
    with (
        attempt("wrong values"),
        pytest.raises(ValueError, match=r"a\.yaml: task: expected detection or classification, got 'detect'"),
    ):
        read_recipe(write(tmp_path / "a.yaml", MINIMAL | {"task": "detect"}))


def test_mean_and_std_of_an_old_classifier_move_to_its_model(tmp_path):
    """Files of 0.1 had them among the data; nothing else of a file changes, nor a file that says where they belong."""
    mean, std = [0.4, 0.5, 0.6], [0.1, 0.2, 0.3]
    old = CLASSIFICATION | {"model": {"dropout": 0.5}, "data": {"format": "synthetic", "mean": mean, "std": std}}
    config = read_recipe(write(tmp_path / "old.yaml", old))
    assert (config.model.mean, config.model.std, config.model.dropout) == (tuple(mean), tuple(std), 0.5)
    save_config(config, tmp_path / "new.yaml")
    new = yaml.safe_load((tmp_path / "new.yaml").read_text())
    assert new["model"]["mean"] == mean and not {"mean", "std"} & new["data"].keys()
    assert read_recipe(tmp_path / "new.yaml") == config and upgrade(new) == new
    both = old | {"model": {"mean": list(std)}}
    with pytest.raises(ValueError, match=r"unknown key 'data\.mean'"):
        read_recipe(write(tmp_path / "both.yaml", both))
    detector = MINIMAL | {"model": {"detector": "fcos"}, "data": {"format": "synthetic", "mean": mean}}
    with pytest.raises(ValueError, match=r"unknown key 'data\.mean'"):
        read_recipe(write(tmp_path / "detector.yaml", detector))


def test_values_are_set_by_their_keys():
    config = DetectionRecipe(data=Data(format="synthetic"))
    changed = set_values(config, {"train.epochs": 3, "model.backbone.activation": "relu"})
    assert (changed.train.epochs, changed.model.backbone.activation) == (3, "relu")
    assert (config.train.epochs, config.model.backbone.activation) == (12, "hoyer")
    with pytest.raises(ValueError, match=r"unknown key 'train\.epoch'; did you mean 'epochs'\?"):
        set_values(config, {"train.epoch": 3})
    with pytest.raises(ValueError, match=r"train\.epochs: Input should be greater than 0 \(got 0\)"):
        set_values(config, {"train.epochs": 0})


@pytest.mark.parametrize(
    ("hoyer", "weight", "warmup_epochs"),
    [
        ({}, 0.03, 4),
        ({"reduction": "network"}, 0.03, 4),
        ({"reduction": "mean"}, 0.01, 4),
        ({"reduction": "sum"}, 1e-8, 4),
        ({"reduction": "sum", "weight": None, "warmup_epochs": None}, 1e-8, 4),
        ({"reduction": "mean", "warmup_epochs": 0}, 0.01, 0),
        ({"reduction": "mean", "weight": 0.5}, 0.5, 0),
        ({"weight": 0}, 0, 0),
        ({"weight": 0.5, "warmup_epochs": 2}, 0.5, 2),
    ],
)
def test_a_weight_that_is_left_open_belongs_to_the_reduction(tmp_path, hoyer, weight, warmup_epochs):
    config = read_recipe(write(tmp_path / "a.yaml", MINIMAL | {"hoyer": hoyer}))
    assert (config.hoyer.weight, config.hoyer.warmup_epochs) == (weight, warmup_epochs)
    save_config(config, tmp_path / "b.yaml")
    found = read_recipe(tmp_path / "b.yaml")
    assert found == config and found.hoyer.weight == weight
    # In a file it is a number from then on; a recipe that leaves it open still does under other values.
    assert set_values(found, {"hoyer.reduction": "sum"}).hoyer.weight == weight
    left_open = "weight" not in hoyer or hoyer["weight"] is None
    changed = set_values(config, {"hoyer.reduction": "sum"}).hoyer
    assert (changed.weight, changed.warmup_epochs) == (1e-8 if left_open else weight, warmup_epochs)
    assert set_values(config, {"hoyer.weight": 0.25}).hoyer.weight == 0.25
    assert override(found, ["hoyer.weight=None", "hoyer.reduction=sum"]).hoyer.weight == 1e-8


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*/config.yaml")), ids=lambda path: path.parent.name)
def test_the_recipe_of_an_old_run_keeps_the_weight_that_it_was_trained_with(path):
    given, found = yaml.safe_load(path.read_text())["hoyer"], read_recipe(path).hoyer
    assert given.keys() >= {"weight", "reduction"}
    assert (found.weight, found.reduction) == (given["weight"], given["reduction"])
    assert found.warmup_epochs == given.get("warmup_epochs", 0)


def test_recipes_are_found_by_name_or_path(tmp_path, monkeypatch):
    assert recipe_names() == [path.stem for path in CONFIGS]
    for path in CONFIGS:
        assert find_recipe(path.stem).resolve() == path and find_recipe(path) == path
    with pytest.raises(FileNotFoundError, match=rf"no such recipe, .*; did you mean '{CONFIGS[0].stem}'\? \(allowed: "):
        find_recipe(CONFIGS[0].stem + "x")
    (tmp_path / CONFIGS[0].stem).mkdir()  # such as the folder of its runs
    monkeypatch.chdir(tmp_path)
    assert find_recipe(CONFIGS[0].stem).resolve() == CONFIGS[0]
    with pytest.raises(FileNotFoundError, match=r"nothing\.yaml: no such config file"):
        find_recipe(tmp_path / "nothing.yaml")


def test_recipes_are_read_without_torch():
    check = (
        "import sys, detection.config as c; c.read_recipe(c.find_recipe(c.recipe_names()[0])); print([*sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "'detection.tasks.recipes'" in done.stdout and "'torch'" not in done.stdout


def test_data_section_is_required(tmp_path, attempt):
    with attempt("wrong values"), pytest.raises(ValueError, match="data is missing"):
        load_config(write(tmp_path / "a.yaml", {"train": {"epochs": 3}}))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.yaml: no such config file"):
        load_config(tmp_path / "nothing.yaml")


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", ""])
def test_a_file_without_sections(tmp_path, text, attempt):
    with attempt("wrong values"), pytest.raises(ValueError, match="expected sections task, plugins, model, data"):
        load_config(write(tmp_path / "a.yaml", text))


def test_a_file_that_is_not_yaml(tmp_path, attempt):
    with attempt("wrong values"), pytest.raises(ValueError, match=r"a\.yaml: not a YAML file"):
        load_config(write(tmp_path / "a.yaml", "a: [1, 2"))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--model.bakbone.width", "1"], ["--model.bakbone.width", "--model.backbone.width"]),
        (["--train.epochs", "many"], ["train.epochs", "integer", "many"]),
        (["--train.epochs", "-1"], ["greater than 0"]),
        (["--model.detector", "yolo"], ["yolo", "fasterrcnn", "retinanet", "fcos", "ssd"]),
    ],
)
def test_a_wrong_override_is_named_with_what_is_allowed(tmp_path, arguments, parts, attempt):
    path = write(tmp_path / "a.yaml", MINIMAL)
    with attempt("wrong values"), pytest.raises(ValueError) as error:
        load_config(path, arguments)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("config", "least"),
    [
        (DetectionRecipe(data=Data(format="synthetic")), 60),
        (ClassificationRecipe(data=ImageData(format="synthetic")), 40),
    ],
    ids=["detection", "classification"],
)
def test_help_documents_every_field(capsys, config, least):
    def fields(model, prefix=""):
        for name, field in model.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                yield from fields(field.annotation, f"{prefix}{name}.")
            else:
                yield f"--{prefix}{name}", field.description

    print_keys(config)
    text = capsys.readouterr().out
    flat = " ".join(text.replace("│", " ").split())
    seen = 0
    for flag, description in fields(type(config)):
        assert flag in text
        assert description, flag
        assert " ".join(description.split())[:25] in flat, flag
        seen += 1
    assert seen > least


# The table of the authors' recipes: optimiser, learning rate, epochs, batch, weight decay, Hoyer weight, extremum
PUBLISHED = {
    "cifar10_vgg16": ("adam", 1e-4, 600, 128, 1e-4, 1e-8, "channel"),
    "cifar10_resnet18": ("sgd", 0.1, 600, 128, 1e-4, 1e-8, "channel"),
    "cifar10_resnet34": ("sgd", 0.2, 400, 256, 1e-4, 1e-8, "channel"),
    "cifar10_mobilenetv1": ("adam", 1e-4, 600, 256, 1e-4, 1e-9, "channel"),
    "cifar10_mobilenetv2": ("adam", 1e-4, 600, 256, 1e-4, 1e-9, "channel"),  # that of V1
    "imagenet_vgg16": ("adam", 1e-4, 150, 4 * 128, 5e-4, 1e-8, "channel"),
    "imagenet_resnet50": ("sgd", 0.2, 400, 4 * 64, 5e-4, 2e-9, "layer"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_have_the_published_values(name):
    config = read_recipe(CONFIGS[0].parent / f"{name}.yaml")
    devices = 4 if name.startswith("imagenet") else 1
    optimizer, train = config.optimizer, config.train
    found = (optimizer.name, optimizer.lr, train.epochs, devices * train.batch_size, optimizer.weight_decay)
    assert (*found, config.hoyer.weight, config.model.backbone.extremum) == PUBLISHED[name]
    assert config.hoyer.reduction == "sum"
    assert (optimizer.schedule, optimizer.gamma) == ("step", 0.2)
    assert optimizer.milestones == ([0.5, 0.7, 0.85] if "mobilenet" in name else [0.6, 0.8, 0.9])
    assert optimizer.warmup_steps == (1000 if name == "imagenet_vgg16" else 0)
    assert config.model.backbone.pool_first
