"""Start from a whole network, freeze parts, learn at rates of their own, end early, go on behind the end."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers import log_lines, run_tool
from test_resume import stop_after
from torch import nn

import detection
from backbones import create, spike_layers, tensors_to_bytes
from detection.config import read_recipe, schema, set_values
from detection.data.synthetic import CATEGORIES
from detection.records import Evaluation, RunInfo
from detection.runs import Run
from detection.tasks import task_of
from detection.tasks.classification import ClassificationTask
from detection.tasks.recipes import ClassificationRecipe, DetectionRecipe
from detection.tasks.run import load_model, train_run
from detection.tasks.start import describe, start_from
from detection.training.optim import build_optimizer
from detection.training.parts import factors_of, find_parts, freeze

SIZES = {"min_size": [64], "max_size": 64}
BACKBONE = {"name": "resnet18", "width": 0.125}


def detector(kind: str = "retinanet", classes=("c", "x", "a"), **model) -> DetectionRecipe:
    head = {"num_convs": 1, "representation_size": 16}
    model = {"detector": kind, "backbone": BACKBONE, "neck": {"out_channels": 16}, "head": head} | SIZES | model
    return DetectionRecipe.model_validate({"model": model, "data": {"format": "synthetic", "classes": list(classes)}})


def classifier(classes=("c", "x", "a"), **model) -> ClassificationRecipe:
    model = {"backbone": BACKBONE | {"stem": "cifar"}} | model
    return ClassificationRecipe.model_validate(
        {"model": model, "data": {"format": "synthetic", "classes": list(classes)}}
    )


def new(config) -> nn.Module:
    return task_of(config).build_model().eval()


def test_more_epochs_are_for_a_run_that_goes_on(tmp_path):
    """Of a new one they say nothing: it begins with the weights that its recipe names."""
    save(tmp_path / "source", classifier(CATEGORIES))
    config = classifier(CATEGORIES, weights=str(tmp_path / "source"))
    data = {"size": 32, "num_train": 8, "num_val": 4, "root": str(tmp_path / "data"), "workers": 0}
    config = set_values(config, {f"data.{key}": value for key, value in data.items()} | {"train.epochs": 1})
    line = train_run(config, tmp_path / "run", "by hand", extend=2)
    assert line.epoch == 1
    assert Run.open(tmp_path / "run").info().start is not None


def test_several_processes_do_not_finish_a_run_and_extend_it_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    save(tmp_path / "run", classifier())  # of which no epoch is done
    with pytest.raises(ValueError, match="not finished; several processes go on with --resume first, then with"):
        detection.train(resume=tmp_path / "run", extend=1)


def save(folder: Path, config) -> nn.Module:
    """Leave a run of random weights in a folder, and return its network."""
    torch.manual_seed(1)
    model = new(config)
    for parameter in model.parameters():
        if parameter.dim() < 2:  # of biases that are all equal no order can be told
            nn.init.uniform_(parameter, 0.5, 1.0)
    run = Run.create(folder, config, RunInfo())
    run.save(model, "last")
    run.unlock()
    return model


def outputs(model: nn.Module, kind: str) -> tuple[torch.Tensor, ...]:
    """Class logits (..., K + 1) of noise, and what else depends on the classes."""
    torch.manual_seed(2)
    images = torch.rand(2, 3, 64, 64)
    if kind == "classifier":
        return (model(images[:, :, :32, :32]),)
    maps = model.backbone(images)
    if kind == "fasterrcnn":
        scores, boxes = model.roi_heads.box_predictor(torch.rand(5, 16))
        return scores, boxes.view(5, -1, 4).mT
    return (model.head(list(maps.values()))["cls_logits"],)


@pytest.mark.parametrize("kind", ["retinanet", "fcos", "ssd", "fasterrcnn", "classifier"])
def test_equal_classes_keep_their_logits_bit_for_bit(tmp_path, kind):
    def recipe(classes, **model):
        return classifier(classes, **model) if kind == "classifier" else detector(kind, classes, **model)

    before = save(tmp_path / "run", recipe("cxa"))
    config = recipe("abc", weights=str(tmp_path / "run"))
    torch.manual_seed(3)
    model, untouched = new(config), new(config)
    untouched.load_state_dict(model.state_dict())
    start = start_from(task_of(config), model)
    front = 0 if kind == "classifier" else 1
    for old, now in zip(outputs(before, kind), outputs(model, kind), strict=True):
        old, now = old.detach(), now.detach()
        assert old.shape == now.shape and now.shape[-1] == front + 3
        # c, x, a there; a, b, c here.
        assert torch.equal(now[..., front + 0], old[..., front + 2])
        assert torch.equal(now[..., front + 2], old[..., front + 0])
        assert torch.equal(now[..., :front], old[..., :front])
        assert not torch.isclose(now[..., front + 1], old[..., front + 1]).all()
    for key in start.partly:  # b's outputs are those of the new network
        shape = (-1, front + 3, 4 if "bbox_pred" in key else 1)
        fresh, found = (each.state_dict()[key].unflatten(0, shape)[:, front + 1] for each in (untouched, model))
        assert torch.equal(found, fresh)
    per_class = {"retinanet": 2, "fcos": 2, "ssd": 12, "fasterrcnn": 4, "classifier": 2}[kind]
    assert len(start.partly) == per_class and start.new == start.left_out == [] and start.classes == ["a", "c"]
    assert {*start.taken, *start.partly} == model.state_dict().keys()
    for key in start.taken:
        assert torch.equal(model.state_dict()[key], before.state_dict()[key])
    assert f"{len(start.taken)} tensors taken, {per_class} in part (classes a, c), 0 new, 0 left out" in describe(start)


def test_which_tensors_are_taken_new_and_left_out(tmp_path):
    before = save(tmp_path / "run", detector())
    layers = ["head.classification_head.cls_logits.weight", "head.classification_head.cls_logits.bias"]

    def start(classes, weights):
        config = detector(classes=classes, weights=str(weights))
        return start_from(task_of(config), new(config))

    same = start("cxa", tmp_path / "run")
    assert same.taken == list(before.state_dict()) and not (same.partly or same.new or same.left_out)
    fewer = start("x", tmp_path / "run" / "last.safetensors")
    assert (fewer.partly, fewer.classes, fewer.new) == (layers, ["x"], [])
    other = start("uvwyz", tmp_path / "run")
    assert (other.new, other.left_out, other.partly) == (layers, layers, [])
    assert len(other.taken) == len(before.state_dict()) - 2
    # Without a recipe beside the file nobody knows which class an output is of.
    shutil.copy(tmp_path / "run" / "last.safetensors", tmp_path / "alone.safetensors")
    alone = start("cxa", tmp_path / "alone.safetensors")
    assert (alone.new, alone.left_out) == (layers, layers)


def test_a_zoo_entry_of_other_classes():
    recipe = read_recipe(Path("backbones/zoo/scenes_retinanet_resnet18/config.yaml"))
    recipe.model.weights = "zoo:scenes_retinanet_resnet18"
    recipe.data.classes = ["star", "moon"]
    model = task_of(recipe).build_model()
    start = start_from(task_of(recipe), model)
    assert start.classes == ["star"] and len(start.partly) == 2 and not start.new


def test_one_step_weights_start_several_steps(tmp_path):
    save(tmp_path / "run", detector())
    config = detector(weights=str(tmp_path / "run"), backbone=BACKBONE | {"time_steps": 2})
    model = new(config)
    start = start_from(task_of(config), model)
    assert start.new == [key for key in model.state_dict() if key.endswith(".leak")] and len(start.new) > 10
    assert all(model.state_dict()[key] == 1 for key in start.new)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kind": "fcos"}, "trained with model.detector 'retinanet', this recipe's is 'fcos'"),
        ({"backbone": BACKBONE | {"width": 0.25}}, "trained with model.backbone.width 0.125, this recipe's is 0.25"),
        ({"backbone": BACKBONE | {"activation": "relu"}}, "trained with model.backbone.activation 'hoyer', this"),
        ({"neck": {"out_channels": 32}}, "trained with model.neck.out_channels 16, this recipe's is 32"),
        ({"neck": {"out_channels": 16, "source": "membrane"}}, "trained with model.neck.source 'spikes', this"),
        (
            {"neck": {"out_channels": 16, "levels": ["c4", "c5"]}},
            ".bias' is unknown here (and 21 more)",
        ),
        ({"head": {"num_convs": 2}}, "trained with model.head.num_convs 1, this recipe's is 2"),
        (
            {"head": {"num_convs": 1, "anchor_scale": 3.0}},
            "trained with model.head.anchor_scale 4, this recipe's is 3",
        ),
        ({"mean": (0.5, 0.5, 0.5)}, "trained with model.mean [0.485, 0.456, 0.406], this recipe's is [0.5, 0.5, 0.5]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(attempt, tmp_path, change, sentence):
    save(tmp_path / "run", detector())
    config = detector(weights=str(tmp_path / "run"), **change)
    with attempt("wrong values"), pytest.raises(ValueError) as error:
        start_from(task_of(config), new(config))
    assert str(error.value).startswith(f"model.weights {tmp_path / 'run'}") and sentence in str(error.value)


def test_weights_of_another_kind_are_refused(attempt, tmp_path):
    save(tmp_path / "run", classifier())
    backbone = create("resnet18", width=0.125)
    (tmp_path / "backbone.safetensors").write_bytes(tensors_to_bytes(backbone.state_dict()))

    def refusal(**model) -> str:
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            start_from(task_of(detector(**model)), new(detector(**model)))
        return str(error.value)

    with attempt("wrong values", 5):
        assert "trained for classification, not for detection" in refusal(weights=str(tmp_path / "run"))
        assert "(model.backbone.weights takes a backbone" in refusal(weights=str(tmp_path / "backbone.safetensors"))
        assert "is not a run folder" in refusal(weights=str(tmp_path))
        assert "no such entry of the zoo" in refusal(weights="zoo:nothing")
        with pytest.raises(ValueError, match=r"weights and backbone\.weights are both given"):
            detector(weights="a", backbone=BACKBONE | {"weights": "b"})


# Parts of a network


def test_names_of_parts():
    model, parts = new(detector("fasterrcnn")), task_of(detector("fasterrcnn")).parts
    assert find_parts(model, ["backbone.stem", "neck", "backbone.body.stem", "head", "rpn"], parts, "key") == {
        "backbone.stem": ("backbone.body.stem",),
        "neck": ("backbone.neck",),
        "backbone.body.stem": ("backbone.body.stem",),
        "head": ("rpn", "roi_heads"),
        "rpn": ("rpn",),
    }
    with pytest.raises(ValueError) as error:
        find_parts(model, ["backbone.body.sten"], parts, "train.freeze")
    assert str(error.value) == (
        "train.freeze: the network has no part 'backbone.body.sten'; did you mean 'backbone.body.stem'? (allowed: "
        "backbone, neck, head, transform, rpn, roi_heads, and what they contain)"
    )
    with pytest.raises(ValueError, match=r"train\.freeze: normalise, backbone, head leaves no parameter to train"):
        freeze(new(classifier()), ["normalise", "backbone", "head"], {})


def test_rates_of_parts_are_multiplied_by_the_factor_of_the_longest_name():
    model = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(2, 2), "c": nn.Linear(2, 2)}), "d": nn.Linear(2, 2)})
    factors = factors_of(model, {"a.b": 0.5, "a": 0.1}, {})
    assert factors == {"a.b.weight": 0.5, "a.b.bias": 0.5, "a.c.weight": 0.1, "a.c.bias": 0.1}
    optimizer = build_optimizer(model, schema.Optimizer(name="sgd", lr=2.0, weight_decay=0.0), (), factors)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, rate in {"a.b.weight": 1.0, "a.c.bias": 0.2, "d.weight": 2.0}.items():
        assert torch.allclose(before[name] - model.state_dict()[name], torch.tensor(rate)), name
    with pytest.raises(ValueError, match=r"optimizer\.lr_factors: the network has no part 'e' \(allowed: a, d, and"):
        factors_of(model, {"e": 0.5}, {})


@pytest.mark.parametrize("name", ["adamw", "adam", "muon"])
def test_groups_of_every_optimiser_have_their_rates(name):
    model, config = new(classifier()), schema.Optimizer(name=name, lr=0.01, muon_lr=0.2)
    groups = build_optimizer(model, config, (), factors_of(model, {"backbone": 0.5}, {})).param_groups
    of = {id(parameter): group for group in groups for parameter in group["params"]}
    assert len(of) == len(list(model.parameters()))
    for key, parameter in model.named_parameters():
        group = of[id(parameter)]
        rate = 0.2 if group.get("muon") else 0.01
        assert group["lr"] == rate * (0.5 if key.startswith("backbone.") else 1.0)
        assert group["weight_decay"] == (0.0 if group.get("muon") or parameter.dim() < 2 else 1e-4)


# Trainings


def recipe_file(folder: Path, config, **sections) -> Path:
    """The file of a tiny training by `config`'s model and data."""
    tree = config.model_dump(mode="json", exclude_defaults=True)
    if isinstance(config, DetectionRecipe):
        tree["data"] |= {"root": str(folder / "scenes"), "scenes": {"num_train": 6, "num_val": 2, "size": 64}}
        tree["data"] |= {"workers": 0, "classes": ["circle", "star"]}
    else:
        tree["data"] |= {"size": 32, "num_train": 32, "num_val": 8, "classes": []}
    tree |= {"task": config.task, "optimizer": {"lr": 0.01, "warmup_steps": 3}, "hoyer": {"weight": 0.01}}
    tree["train"] = {"epochs": 1, "batch_size": 2 if isinstance(config, DetectionRecipe) else 8, "ema_decay": 0.5}
    for section, values in sections.items():
        tree[section] = tree.get(section, {}) | values
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def train(monkeypatch, *arguments) -> None:
    run_tool(monkeypatch, "train_det", *arguments)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_parts_do_not_move_by_one_bit(monkeypatch, capsys, tmp_path, name):
    before = save(tmp_path / "run", detector(classes=["star", "circle"])).state_dict()
    config = detector(classes=(), weights=str(tmp_path / "run"))
    parts = ["backbone.stem", "backbone.stages.0", "backbone.stages.1", "neck"]
    recipe = recipe_file(tmp_path, config, train={"freeze": parts, "low_memory": name == "muon"})
    arguments = ("--optimizer.name", name, "--optimizer.lr_factors", "head", 0.5)
    train(monkeypatch, recipe, "--out", tmp_path / "new", *arguments)
    run = Run.open(tmp_path / "new")
    frozen = ("backbone.body.stem.", "backbone.body.stages.0.", "backbone.body.stages.1.", "backbone.neck.")
    classes = "head.classification_head.cls_logits."
    moved = set()
    for weights in ("last", "ema"):
        for key, value in run.read(weights).items():
            if key.startswith(frozen):
                assert torch.equal(value, before[key]), key
            elif not key.startswith(classes) and not torch.equal(value, before[key]):
                moved.add(key)
    rest = [key for key in before if not key.startswith((*frozen, classes))]
    assert len(moved) > 0.9 * len(rest)
    trained = {key for key in spike_layers(load_model(run)) if not key.startswith(frozen)}
    (line,) = run.history()
    assert line.layers["hoyer_per_layer"].keys() == trained and 0 < len(trained) < len(line.layers["v_th"])
    start = run.info().start
    assert start.source == str(tmp_path / "run") and start.classes == ["circle", "star"]
    assert len(start.taken) + len(start.partly) == len(before) and len(start.partly) == 2
    printed = capsys.readouterr().out
    assert "2 in part (classes circle, star), 0 new, 0 left out" in printed
    assert "frozen: " in printed and "learning rate times 0.5: " in printed


def test_a_training_without_a_spike_layer_has_no_regulariser(monkeypatch, tmp_path):
    recipe = recipe_file(tmp_path, detector(classes=()), train={"freeze": ["backbone", "neck"]})
    train(monkeypatch, recipe, "--out", tmp_path / "run")
    (line,) = Run.open(tmp_path / "run").history()
    assert line.losses.keys() == {"classification", "bbox_regression"} and "hoyer_per_layer" not in line.layers


def expect_equal(found: Path, expected: Path) -> None:
    """The same weights to the last bit, and the same log but for the times."""
    clock = {"seconds", "images_per_second", "memory_mib", "eval_seconds"}
    logs = [[{k: v for k, v in line.items() if k not in clock} for line in log_lines(run)] for run in (found, expected)]
    assert logs[0] == logs[1]
    assert Run.open(found).checksums() == Run.open(expected).checksums() == Run.open(found).info().sha256


def test_a_run_goes_on_behind_its_end(monkeypatch, capsys, tmp_path):
    save(tmp_path / "first", classifier())
    recipe = recipe_file(tmp_path, classifier((), weights=str(tmp_path / "first")), train={"epochs": 2})
    whole, other = tmp_path / "whole", tmp_path / "other"
    train(monkeypatch, recipe, "--out", whole)
    log = (whole / "metrics.jsonl").read_bytes()
    train(monkeypatch, "--resume", whole, "--extend", 2)
    assert (whole / "metrics.jsonl").read_bytes().startswith(log)
    run, lines = Run.open(whole), log_lines(whole)
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4] and lines[-1]["step"] == 16
    # 4 steps an epoch, warm-up of 3: the first step at 1/4 of the peak; then a cosine over 5 steps, one of them done.
    cosine = (1 + math.cos(math.pi / 5)) / 2
    assert [line["lr"] for line in lines] == pytest.approx([0.0025, 0.01 * cosine, 0.00125, 0.005 * cosine])
    info = run.info()
    assert [each.model_dump() for each in info.extended] == [{"after": 2, "epochs": 2, "lr_factor": 0.5}]
    assert run.config.train.epochs == 4 and run.finished and len(info.resumed) == 1 and info.start is not None
    # The same with a stop in either part; what the run started from is not needed any longer.
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        with pytest.raises(SystemExit):
            train(patch, recipe, "--out", other)
    shutil.rmtree(tmp_path / "first")
    with monkeypatch.context() as patch:
        stop_after(patch, 5)  # two steps to the end, three behind it
        with pytest.raises(SystemExit):
            train(patch, "--resume", other, "--extend", 2)
    assert "first to its end, then 2 epochs more" in capsys.readouterr().out
    assert not Run.open(other).finished and Run.open(other).config.train.epochs == 4
    train(monkeypatch, "--resume", other)
    expect_equal(other, whole)


@pytest.mark.parametrize("part", ["head", "rpn", "roi_heads"])
def test_a_frozen_head_has_its_losses(part):
    config = detector(kind="fasterrcnn")
    task = task_of(config)
    model = task.build_model().train()
    for module in freeze(model, [part], task.parts):
        module.eval()
    target = {"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([1])}
    assert len(model([torch.rand(3, 64, 64)], [target])) == 4


def test_a_run_ends_when_its_patience_does(monkeypatch, capsys, tmp_path):
    found = iter([0.2, 0.3, 0.25, 0.3, 0.9])
    evaluate = staticmethod(
        lambda *_, **__: Evaluation(
            metrics={"top1": next(found), "top5": 1.0, "val_loss": 1.0}, potentials={"spike": [0.5, 0.5]}
        )
    )
    monkeypatch.setattr(ClassificationTask, "evaluate", evaluate)
    recipe = recipe_file(tmp_path, classifier(()), train={"epochs": 9, "patience": 2, "ema_decay": 0.0})
    with monkeypatch.context() as patch:
        stop_after(patch, 10)
        with pytest.raises(SystemExit):
            train(patch, recipe, "--out", tmp_path / "run")
    assert [line["epoch"] for line in log_lines(tmp_path / "run")] == [1, 2]
    train(monkeypatch, "--resume", tmp_path / "run")
    run = Run.open(tmp_path / "run")
    assert [line.epoch for line in run.history()] == [1, 2, 3, 4] and run.finished
    assert [bool(line.evaluation.potentials) for line in run.history()] == [True, False, False, True]
    assert "ended early: 2 evaluations without more than top1 0.3000 (train.patience 2)" in capsys.readouterr().out
    train(monkeypatch, "--resume", tmp_path / "run")
    assert "finished already" in capsys.readouterr().out


def test_what_is_not_extended(attempt, monkeypatch, capsys):
    def refusal(*arguments) -> str:
        with pytest.raises(SystemExit) as stop:
            train(monkeypatch, *arguments)
        assert stop.value.code == 2
        return capsys.readouterr().err

    with attempt("wrong values", 4):
        assert "--resume RUN --extend EPOCHS" in refusal("scenes_retinanet_resnet18", "--extend", 2)
        assert "part of the package" in refusal("--resume", "zoo:cifar10_vgg11", "--extend", 2)
        assert "--extend -1: expected a number above 0" in refusal("--resume", "zoo:cifar10_vgg11", "--extend", -1)
        assert "--extend-lr 0.0: expected" in refusal("--resume", "zoo:cifar10_vgg11", "--extend", 1, "--extend-lr", 0)


def test_records_of_old_runs_have_neither_start_nor_extension():
    info = RunInfo.parse({"command": "hoyer-det train"}, "run.json")
    assert info.start is None and info.extended == [] and not {"start", "extended"} & info.to_json().keys()
    values = {"start": {"source": "run", "taken": ["a"]}, "extended": [{"after": 1, "epochs": 2, "lr_factor": 0.5}]}
    found = RunInfo.parse(json.loads(json.dumps(RunInfo.parse(values, "run.json").to_json())), "run.json")
    assert (found.start.taken, found.start.new, found.extended[0].epochs) == (["a"], [], 2)
    with pytest.raises(ValueError, match=r"run\.json: damaged, extended\.0\.after: "):
        RunInfo.parse({"extended": [{"after": "1", "epochs": 2, "lr_factor": 0.5}]}, "run.json")
