"""Muon: its step by singular values, the weights that it takes, exact continuation, work shared by processes."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import run_together, run_tool
from test_resume import CLASSIFICATION, expect_equal, stop_after, write_recipe
from torch import Tensor, nn

import backbones
from detection.config import schema
from detection.models import build_detector
from detection.runs import Run
from detection.tasks import task_of
from detection.tasks.recipes import DetectionRecipe
from detection.training.checkpoint import Checkpoint
from detection.training.muon import COEFFICIENTS, Muon, orthogonalise, orthogonalise_shared
from detection.training.optim import build_optimizer, hidden_convolutions


def reference(update: Tensor, steps: int) -> Tensor:
    """The update with its singular values replaced: divided by their norm, then `steps` times a s + b s^3 + c s^5."""
    left, values, right = torch.linalg.svd(update.flatten(1).double(), full_matrices=False)
    values, (a, b, c) = values / values.norm(), COEFFICIENTS
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    return (left @ values.diag() @ right).view(update.shape)


SHAPES = {"wide": (4, 12), "tall": (12, 4), "square": (8, 8), "conv": (8, 2, 3, 3), "tall conv": (32, 2, 3, 3)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_three_steps_are_those_of_the_formula(shape):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    weight = nn.Parameter(start.clone())
    if len(shape) == 4:
        weight = nn.Parameter(start.to(memory_format=torch.channels_last))
    lr, decay, mu = 0.1, 0.25, 0.9
    muon = Muon([{"params": [weight], "weight_decay": decay}], [], lr=1.0, muon_lr=lr, momentum=mu, newton_steps=3)
    expected, momentum = start.double(), torch.zeros(shape, dtype=torch.float64)
    scale = math.sqrt(max(1, shape[0] / math.prod(shape[1:])))
    for step in range(1, 4):
        gradient = torch.randn(shape, generator=generator)
        weight.grad = gradient.clone(memory_format=torch.preserve_format)
        muon.step()
        momentum = mu * momentum + (1 - mu) * gradient
        update = mu * momentum + (1 - mu) * gradient
        expected = (1 - lr * decay) * expected - lr * scale * reference(update, 3)
        # bfloat16 has 8 bits, of singular values near 1: the error of a step is below 2 % of the step.
        error = (weight.detach() - expected).norm() / (lr * scale * math.sqrt(min(shape[0], math.prod(shape[1:]))))
        assert error < 0.02 * step
    torch.testing.assert_close(muon.state[weight]["momentum"].double(), momentum, rtol=1e-5, atol=1e-6)
    assert muon.state[weight]["momentum"].stride() == muon.state[weight]["update"].stride() == weight.stride()


@pytest.mark.parametrize("shape", [(3, 16, 64), (3, 64, 16)])
def test_singular_values_come_near_one_and_vectors_stay(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    found = orthogonalise(matrices.bfloat16(), 5)
    assert found.dtype == torch.bfloat16 and found.shape == shape
    inner = left.mT @ found.double() @ right.mT
    values = inner.diagonal(dim1=1, dim2=2)
    assert (values > 0.6).all() and (values < 1.3).all()
    assert (inner - torch.diag_embed(values)).abs().max() < 0.05
    assert torch.equal(orthogonalise(torch.zeros(1, 4, 4).bfloat16(), 5), torch.zeros(1, 4, 4).bfloat16())


def test_the_rest_is_adamw_to_the_last_bit():
    matrix, vector, linear = (nn.Parameter(torch.ones(shape)) for shape in ((4, 4), (4,), (3, 4)))
    alone = [nn.Parameter(each.detach().clone()) for each in (vector, linear)]
    groups = [
        [{"params": [b], "weight_decay": 0.1}, {"params": [a], "weight_decay": 0}] for a, b in ((vector, linear), alone)
    ]
    muon = Muon([{"params": [matrix]}], groups[0], lr=0.01, muon_lr=0.1)
    adamw = torch.optim.AdamW(groups[1], lr=0.01)
    for step in range(3):
        for each in (matrix, vector, linear, *alone):
            each.grad = torch.sin(torch.arange(each.numel()) + step).view(each.shape)
        muon.step()
        adamw.step()
    assert torch.equal(vector, alone[0]) and torch.equal(linear, alone[1])
    assert [group["lr"] for group in muon.param_groups] == [0.1, 0.01, 0.01]
    assert (matrix != 1).all()


def test_an_interval_orthogonalises_in_turn_and_applies_the_last_in_between():
    weights = [nn.Parameter(torch.zeros(4, 4)) for _ in range(3)]
    muon = Muon([{"params": weights, "weight_decay": 0.0}], [], lr=1.0, muon_lr=0.5, interval=2)
    generator, updates = torch.Generator().manual_seed(0), []
    for _ in range(4):
        before = [weight.detach().clone() for weight in weights]
        for weight in weights:
            weight.grad = torch.randn(4, 4, generator=generator)
        muon.step()
        updates.append([muon.state[weight]["update"].clone() for weight in weights])
        for weight, old, update in zip(weights, before, updates[-1], strict=True):
            torch.testing.assert_close(weight.detach(), old - 0.5 * update)
    # All in the first step; from then on the second in even steps, the first and third in odd ones.
    changed = [
        [not torch.equal(now, before) for now, before in zip(updates[step], updates[step - 1], strict=True)]
        for step in (1, 2, 3)
    ]
    assert changed == [[False, True, False], [True, False, True], [False, True, False]]


def test_weights_without_a_gradient_stay_as_they_are():
    used, unused = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    muon = Muon([{"params": [unused, used], "weight_decay": 0.5}], [], lr=1.0, muon_lr=0.5)
    used.grad = torch.eye(2)
    muon.step()
    assert torch.equal(unused, torch.ones(2, 2)) and unused not in muon.state and not torch.equal(used, unused)


# The weights that it takes


def names_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, tuple]:
    """Learning rate, decay, and whether Muon takes it, of each parameter by name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found[names[parameter]] = group["lr"], group["weight_decay"], group["muon"]
    return found


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "mobilenetv1", "mobilenetv2"])
def test_hidden_convolutions_go_to_muon_and_the_rest_to_adamw(name):
    model = backbones.Classifier(backbones.create(name, width=0.125, stem="cifar"), 10)
    config = schema.Optimizer(name="muon", lr=0.002, muon_lr=0.03, muon_decay=0.1, weight_decay=0.05)
    found = names_of(build_optimizer(model, config), model)
    assert found.keys() == dict(model.named_parameters()).keys()
    convolutions = [(key, each) for key, each in model.named_modules() if isinstance(each, nn.Conv2d)]
    expected = {f"{key}.weight" for key, each in convolutions[1:] if each.groups == 1}
    assert {key for key, (*_, muon) in found.items() if muon} == expected == hidden_convolutions(model)
    assert len(expected) == {"vgg11": 7, "resnet18": 21, "mobilenetv1": 13, "mobilenetv2": 34}[name]
    for key, parameter in model.named_parameters():
        rest = (0.002, 0.05 if parameter.dim() >= 2 else 0.0, False)
        assert found[key] == ((0.03, 0.1, True) if key in expected else rest)


@pytest.mark.parametrize("detector", ["retinanet", "fasterrcnn"])
def test_the_predictions_of_a_detector_do_not_go_to_muon(detector):
    values = {"model": {"detector": detector, "backbone": {"name": "resnet18", "width": 0.125}}}
    values["model"] |= {"neck": {"out_channels": 16}, "head": {"num_convs": 1, "representation_size": 16}}
    config = DetectionRecipe.model_validate(values | {"data": {"format": "synthetic", "classes": ["a", "b"]}})
    model = build_detector(config)
    found = hidden_convolutions(model, task_of(config).prediction_layers)
    layers = {"retinanet": ("cls_logits", "bbox_reg"), "fasterrcnn": ("cls_logits", "bbox_pred")}[detector]
    assert all(any(f"{layer}.weight" in key for key in dict(model.named_parameters())) for layer in layers)
    assert not [key for key in found if any(layer in key for layer in layers)]
    assert [key for key in found if key.startswith("backbone.neck")] and "backbone.body.stem.0.weight" not in found


# Continuation, processes


def test_a_stopped_run_goes_on_exactly(monkeypatch, tmp_path, attempt):
    model = {"backbone": {"name": "resnet18", "width": 0.125, "stem": "cifar"}}
    recipe = write_recipe(tmp_path, CLASSIFICATION | {"model": model}, data={"num_train": 40, "num_val": 8})
    options = ["optimizer.name=muon", "optimizer.muon_interval=2", "train.channels_last=True", "hoyer.warmup_epochs=2"]
    with attempt("kills"):
        run_tool(monkeypatch, "train_cls", recipe, *options, "--out", tmp_path / "whole")
        with monkeypatch.context() as patch:
            stop_after(patch, 7)
            with pytest.raises(SystemExit):
                run_tool(monkeypatch, "train_cls", recipe, *options, "--out", tmp_path / "run")
        state = Checkpoint.load(tmp_path / "run").optimizer["state"]
        assert sum("update" in each for each in state.values()) == 21
        run_tool(monkeypatch, "train_cls", "--resume", tmp_path / "run")
        expect_equal(tmp_path / "run", tmp_path / "whole")
    assert Run.open(tmp_path / "run").history()[-1].losses["hoyer"] > 0


def share_the_work(folder: Path) -> None:
    dist.init_process_group("gloo", init_method="env://")
    generator = torch.Generator().manual_seed(0)
    for number in (1, 3, 4):  # fewer than the processes, and no multiple of them
        matrices = torch.randn(number, 8, 24, generator=generator).bfloat16()
        found = orthogonalise_shared(matrices, 3)
        alone = torch.cat([orthogonalise(each[None], 3) for each in matrices])
        torch.testing.assert_close(found, alone, rtol=1e-2, atol=1e-2)
        parts = [torch.empty(found.shape) for _ in range(2)]
        dist.all_gather(parts, found.float())
        assert torch.equal(*parts) and found.dtype == torch.bfloat16
    weight = nn.Parameter(torch.ones(4, 6))
    weight.grad = torch.randn(4, 6, generator=generator)
    Muon([{"params": [weight]}], [], lr=1.0, muon_lr=0.1).step()
    (folder / f"{dist.get_rank()}.done").write_text(repr(weight.tolist()))


def test_processes_share_the_work_and_get_the_numbers_of_one(tmp_path, attempt):
    with attempt("two processes"):
        run_together(2, share_the_work, tmp_path, log=tmp_path / "log.txt")
        one, other = (path.read_text() for path in sorted(tmp_path.glob("*.done")))
        assert one == other
