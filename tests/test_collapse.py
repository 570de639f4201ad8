"""Signs of a network that falls silent, fires everywhere or learns nothing; warm-up and balance of the regulariser."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from test_trainer import Batches, Goal
from torch import nn

from backbones import HoyerSpike, hoyer_penalties, hoyer_penalty, record_gradient_shares, regulariser, spike
from backbones.deploy.events import available, using
from detection.records import EpochLog, Evaluation, RunInfo
from detection.report import write_report
from detection.runs import Run
from detection.tasks import task_of
from detection.tasks.recipes import ClassificationRecipe
from detection.tasks.run import describe_run, require_same_origin, train_run
from detection.training import precision
from detection.training.collapse import REMEDY, warnings_of
from detection.training.precision import autocast, choose_precision
from detection.training.trainer import Trainer


def log_of(*rates: dict[str, float], top1: float = 0.9) -> list[EpochLog]:
    """A line for each epoch, in which spike layers fire at these rates, all of equal size."""
    lines = []
    for epoch, layers in enumerate(rates, start=1):
        activity = sum(layers.values()) / len(layers) if layers else None
        evaluation = Evaluation(metrics={"top1": top1, "top5": 1.0}, activity=activity, activity_per_layer=layers)
        lines.append(EpochLog(epoch=epoch, loss=1.0, evaluation=evaluation))
    return lines


def warn(log: list[EpochLog], warmup: float = 0.0) -> dict[str, str]:
    return warnings_of(log, lambda metrics: metrics["top1"] < 0.15, warmup)


def test_a_layer_under_one_percent_is_named_with_its_value_and_a_remedy():
    found = warn(log_of({"first": 0.2, "deep": 0.0099, "deeper": 0.004}))
    assert found == {
        "low": "spike layer deeper fires at 0.40% of its neurons (under 1%) and 1 more under 1%; "
        "a lower hoyer.weight, hoyer.reduction network, or a longer hoyer.warmup_epochs lets it fire"
    }
    assert warn(log_of({"first": 0.2, "deep": 0.01})) == {}


def test_a_layer_over_sixty_percent_is_named_with_its_value_and_a_remedy():
    found = warn(log_of({"first": 0.605, "deep": 0.3}))
    assert found == {
        "high": "spike layer first fires at 60.50% of its neurons (over 60%); "
        "a higher hoyer.weight, or BatchNorm in front of it (norm_first, head normalised), lets it fire less"
    }
    both = warn(log_of({"first": 0.7, "second": 0.9, "deep": 0.001}))
    assert both["high"].startswith("spike layer second fires at 90.00% of its neurons (over 60%) and 1 more over 60%;")
    assert both["low"].startswith("spike layer deep fires at 0.10%") and warn(log_of({"first": 0.6})) == {}


@pytest.mark.parametrize(
    ("rates", "falls"),
    [
        ((0.4, 0.3, 0.25, 0.2), True),
        ((0.9, 0.4, 0.3, 0.25, 0.2), True),  # the last four
        ((0.4, 0.3, 0.25, 0.21), False),  # more than half is left
        ((0.4, 0.1, 0.3, 0.2), False),
        ((0.4, 0.3, 0.3, 0.2), False),
        ((0.4, 0.1, 0.05), False),  # too few
    ],
)
def test_a_falling_trend_is_one_of_four_evaluations_to_half(rates, falls):
    found = warn(log_of(*({"layer": rate} for rate in rates)))
    assert set(found) == ({"falling"} if falls else set())
    if falls:
        assert found["falling"] == (
            "spike activity falls, from 40.00% to 20.00% in 4 evaluations; "
            "a lower hoyer.weight or a longer hoyer.warmup_epochs holds it"
        )


def test_epochs_without_an_evaluation_are_no_part_of_a_trend():
    log = log_of(*({"layer": rate} for rate in (0.4, 0.3, 0.25, 0.2)))
    gaps = [EpochLog(epoch=2 * line.epoch - 1, loss=1.0) for line in log]
    mixed = [each for pair in zip(gaps, log, strict=True) for each in pair]
    assert set(warn(mixed)) == {"falling"} and warn([*mixed, gaps[0]]) == {}


def test_accuracy_at_chance_is_told_after_the_warm_up_only():
    log = log_of(*[{"layer": 0.2}] * 4, top1=0.134)
    assert warn(log, warmup=3.0) == {}
    found = warn(log, warmup=2.5)
    assert found == {
        "chance": "the network is no better than chance after epoch 4: top1 0.1340, top5 1.0000; "
        "a lower optimizer.lr or hoyer.weight, or a longer warm-up, may help"
    }
    assert warn(log_of({}, {}, top1=0.1))["chance"].startswith("the network is no better than chance after epoch 2")


def test_chance_of_a_task():
    task = task_of(ClassificationRecipe(data={"format": "synthetic", "classes": list("abcdefghij")}))
    assert task.is_at_chance({"top1": 0.149}) and not task.is_at_chance({"top1": 0.151})
    two = task.with_classes(["a", "b"])
    assert two.is_at_chance({"top1": 0.59}) and not two.is_at_chance({"top1": 0.61})


# In a training


class Learner(Goal):
    best_by, headline = "top1", ("top1",)

    def is_at_chance(self, metrics) -> bool:
        return metrics["top1"] < 0.15


def train(folder: Path, evaluations: list[Evaluation], **sections) -> Run:
    """A training of a tiny network whose evaluations find what they are given."""
    values = {"data": {"format": "synthetic", "classes": ["a", "b"]}, "optimizer": {"lr": 1e-12, "warmup_steps": 0}}
    config = ClassificationRecipe.model_validate(values | {"train": {"epochs": len(evaluations)}} | sections)
    run = Run.create(folder, config, RunInfo(command="test"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), HoyerSpike(4), nn.Conv2d(4, 1, 1))
    found = iter(evaluations)
    Trainer(
        model,
        Batches(),
        losses=lambda model, batch: {"task": model(batch[0]).square().mean()},
        evaluate=lambda model: next(found),
        goal=Learner(),
        config=config,
        run=run,
        accelerator=Accelerator(),
    ).fit()
    return run


def test_the_old_reduction_that_silences_deep_layers_is_warned_of_once_in_log_and_report(tmp_path, capsys):
    """The activities of VGG16 at a quarter of its width, trained by weight 0.01 in the reduction "mean"."""
    rates = [{"first": 0.08, "deep": 0.02}, {"first": 0.05, "deep": 0.009}, {"first": 0.03, "deep": 0.007}]
    rates.append({"first": 0.02, "deep": 0.006})
    log = log_of(*rates, top1=0.134)
    run = train(tmp_path / "run", [line.evaluation for line in log], hoyer={"weight": 0.01, "reduction": "mean"})
    assert [set(line.warnings) for line in run.history()] == [
        set(),
        {"low", "chance"},
        {"low", "chance"},
        {"low", "chance", "falling"},
    ]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    kinds = {"low": ("2", "deep fires at 0.90%"), "chance": ("2", "0.1340"), "falling": ("4", "from 5.00% to 1.30%")}
    assert len(said) == 3
    for kind, (epoch, value) in kinds.items():
        (line,) = [each for each in said if each.endswith(REMEDY[kind])]
        assert line.startswith(f"warning: epoch {epoch}: ") and value in line
    page = write_report([run.folder], log_only=True).read_text()
    for sentence in run.history()[-1].warnings.values():
        assert page.count(f"Warning after epoch 4: {sentence}.") == 1


def test_weight_001_silences_deep_layers_by_the_old_reduction_and_not_by_the_one_over_the_network(tmp_path, capsys):
    """VGG16 at an eighth of its width, trained for 160 steps: the same but for the reduction."""
    values = {
        "model": {"backbone": {"name": "vgg16", "width": 0.125, "stem": "cifar"}},
        "data": {"format": "synthetic", "root": tmp_path / "shapes", "num_train": 1024, "num_val": 64, "workers": 0},
        "optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0.05, "warmup_steps": 8},
        "train": {"epochs": 10, "batch_size": 64, "eval_every": 2, "seed": 2},
    }
    last = {}
    for reduction in ("mean", "network"):
        hoyer = {"weight": 0.01, "reduction": reduction, "warmup_epochs": 0}
        config = ClassificationRecipe.model_validate(values | {"hoyer": hoyer})
        train_run(config, tmp_path / reduction, ["test"])
        log = Run.open(tmp_path / reduction).history()
        said = capsys.readouterr().err
        # The extremum's running averages need the first two epochs to catch up.
        collapse = [
            sentence for line in log[2:] for kind, sentence in line.warnings.items() if kind in ("low", "falling")
        ]
        assert bool(collapse) == (reduction == "mean"), collapse
        assert all(sentence in said for sentence in collapse[:1])
        last[reduction] = log[-1].metrics
    assert last["mean"]["activity"] < 0.06 < 0.08 < last["network"]["activity"]
    assert last["mean"]["top1"] + 0.1 < last["network"]["top1"]


def test_nothing_is_said_of_a_network_that_learns(tmp_path, capsys):
    log = log_of(*[{"first": 0.2, "deep": 0.1}] * 3)
    run = train(tmp_path / "run", [line.evaluation for line in log])
    assert [line.warnings for line in run.history()] == [{}] * 3 and "warning" not in capsys.readouterr().err
    assert "Warning after epoch" not in write_report([run.folder], log_only=True).read_text()


# Warm-up and shares


@pytest.mark.parametrize(
    ("epoch", "step", "weight"),
    [(1, 0, 0), (1, 5, 0.00375), (2, 0, 0.0075), (3, 0, 0.015), (4, 9, 0.02925), (5, 0, 0.03)],
)
def test_the_weight_rises_step_by_step_over_the_warm_up(epoch, step, weight):
    hoyer = ClassificationRecipe(data={"format": "synthetic"}).hoyer  # 0.03 after 4 epochs
    trainer = SimpleNamespace(
        config=SimpleNamespace(hoyer=hoyer), progress=SimpleNamespace(epoch=epoch, step=step), num_steps=10
    )
    assert Trainer.hoyer_weight(trainer) == pytest.approx(weight)
    trainer.progress.epoch = 100
    assert Trainer.hoyer_weight(trainer) == 0.03


def test_the_log_has_the_weighted_term_of_the_warm_up(tmp_path):
    """With weights that hardly move, H stays: an epoch of four steps has the mean of their four weights."""
    log = log_of(*[{"layer": 0.2}] * 4)
    options = {"weight": 0.5, "warmup_epochs": 2}
    lines = train(tmp_path / "run", [line.evaluation for line in log], hoyer=options).history()
    means = [0.5 * (0 + 1 + 2 + 3) / 4 / 8, 0.5 * (4 + 5 + 6 + 7) / 4 / 8, 0.5, 0.5]
    (h,) = lines[-1].layers["hoyer_per_layer"].values()
    assert [line.losses["hoyer"] for line in lines[2:]] == pytest.approx([0.5 * h] * 2, rel=1e-5)
    # The batches differ, so the first two only nearly have it.
    assert [line.losses["hoyer"] for line in lines] == pytest.approx([mean * h for mean in means], rel=0.1)
    assert lines[0].losses["hoyer"] > 0
    for line in lines:
        for quantity in ("potential", "threshold"):
            (share,) = line.layers[f"hoyer_share_of_{quantity}"].values()
            assert 0 <= share <= 1


def shares_by_autograd(u, v_th, upstream, weight: float, *, per_channel: bool) -> tuple[torch.Tensor, ...]:
    """The gradients over z of the regulariser and of the task, and of each over the thresholds."""
    z = (u / v_th.abs().view(-1, 1, 1)).detach().requires_grad_()
    c = z.clamp(0, 1)
    sums = c.sum(), c.square().sum()
    (ours,) = torch.autograd.grad(weight * regulariser(*sums), z)
    (task,) = torch.autograd.grad((spike(z, (sums[1] / sums[0]).detach()) * upstream).sum(), z)
    dims = (0, 2, 3) if per_channel else (0, 1, 2, 3)
    return ours, task, (z * ours).sum(dims), (z * task).sum(dims)


@pytest.mark.parametrize("per_channel", [False, True])
def test_shares_of_the_gradients_are_those_that_autograd_finds(per_channel):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), HoyerSpike(3, threshold_per_channel=per_channel)).double()
    layer = model[1]
    layer.v_th.data.copy_(torch.tensor([0.5, -1.0, 2.0]) if per_channel else torch.tensor(-0.8))
    batches = [torch.randn(2, 3, 4, 5).double() for _ in range(2)]
    upstream, found, expected = torch.randn(2, 3, 4, 5).double(), [], []
    for watched in (False, True):
        layer.zero_grad()
        with record_gradient_shares(model) if watched else torch.enable_grad() as shares:
            for u in batches:
                x = u.clone().requires_grad_()
                ((model(x) * upstream).sum() + 0.3 * hoyer_penalty(model)).backward()
                found.append(x.grad)
        found.append(layer.v_th.grad.clone())
    for one, other in zip(found[:3], found[3:], strict=True):
        assert torch.equal(one, other)  # to be watched changes nothing
    expected = [shares_by_autograd(u, layer.v_th, upstream, 0.3, per_channel=per_channel) for u in batches]
    ours, task, ours_v, task_v = (list(each) for each in zip(*expected, strict=True))
    potential = [sum(each.abs().sum() for each in part).item() for part in (ours, task)]
    threshold = [sum(part).abs().sum().item() for part in (ours_v, task_v)]
    assert shares["potential"] == {"1": pytest.approx(potential[0] / sum(potential))}
    assert shares["threshold"] == {"1": pytest.approx(threshold[0] / sum(threshold))}
    assert 0.01 < shares["potential"]["1"] < 0.99


def test_shares_where_one_part_or_both_are_absent():
    def shares_of(loss) -> tuple[float, float]:
        layer = HoyerSpike(2)
        with record_gradient_shares(layer) as shares:
            loss(layer, torch.rand(3, 2, requires_grad=True)).backward()
        (potential,), (threshold,) = shares["potential"].values(), shares["threshold"].values()
        return potential, threshold

    assert shares_of(lambda layer, u: layer(u).sum() + 0 * hoyer_penalty(layer)) == (0, 0)
    assert shares_of(lambda layer, u: 0 * layer(u).sum() + hoyer_penalty(layer)) == (1, 1)
    assert shares_of(lambda layer, u: 0 * layer(u).sum() + 0 * hoyer_penalty(layer)) == (0, 0)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shares_are_those_of_torch_where_kernels_compute_the_layer(dtype, compiled):
    """By those of the package, or by those that are compiled, as on a GPU."""
    found = []
    for kernels in ("torch" if compiled else available()[0], "torch"):
        layer = HoyerSpike(4)
        layer.v_th.data.fill_(-0.75)
        if compiled and not found:
            layer.can_fuse = lambda u: True
        u = torch.randn(5, 4, 6, 6, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        with using(kernels), record_gradient_shares(layer) as shares:
            (layer(u).float().square().mean() + 1e-3 * hoyer_penalty(layer)).backward()
        found.append([value for each in shares.values() for value in each.values()])
    assert len(found[0]) == 2 and all(0 < share < 1 for share in found[0])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


# The reduction that carries over


def densities(u: torch.Tensor, v: torch.Tensor, reduction: str) -> dict[str, float]:
    model = nn.ModuleDict({"first": HoyerSpike(u.shape[1]), "second": HoyerSpike(v.shape[1])})
    model["first"](u)
    model["second"](v)
    return {name: value.item() for name, value in hoyer_penalties(model, reduction).items()}


def test_the_network_reduction_is_h_of_all_layers_over_the_neurons_of_all_layers():
    first = torch.tensor([[0.5, 0.5, 1.0, -1.0]])  # H = 4 / 1.5 of 4 neurons
    second = torch.tensor([[2.0, -3.0]])  # H = 1 of 2
    assert densities(first, second, "network") == pytest.approx({"first": 8 / 3 / 6, "second": 1 / 6})
    assert densities(first, second, "mean") == pytest.approx({"first": 8 / 3 / 4, "second": 1 / 2})


def test_the_network_reduction_is_free_of_batch_resolution_and_width():
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, 3, 4, 4, generator=generator), torch.randn(2, 5, 2, 2, generator=generator)
    expected = densities(u, v, "network")
    assert 0 < sum(expected.values()) <= 1
    for times in ((4, 1, 1, 1), (1, 2, 1, 1), (1, 1, 3, 2)):
        assert densities(u.repeat(times), v.repeat(times), "network") == pytest.approx(expected, rel=1e-5)
        total = densities(u.repeat(times), v.repeat(times), "sum")
        assert total == pytest.approx(
            {key: h * torch.tensor(times).prod().item() for key, h in densities(u, v, "sum").items()}
        )


def test_the_network_reduction_pulls_every_neuron_alike_as_the_sum_does():
    gradients = {}
    for reduction in ("sum", "network", "mean"):
        # The same potentials, in one layer of 800 neurons and in one of 8.
        values = torch.tensor([0.2, 0.4, 0.6, 0.8, 0.2, 0.4, 0.6, 0.8])
        large, small = (values.repeat(each, 1).requires_grad_() for each in (100, 1))
        model = nn.ModuleList([HoyerSpike(8), HoyerSpike(8)])
        model[0](large), model[1](small)
        hoyer_penalty(model, reduction).backward()
        gradients[reduction] = large.grad[0], small.grad[0]
    for reduction in ("sum", "network"):
        torch.testing.assert_close(*gradients[reduction])
    torch.testing.assert_close(gradients["network"][0], gradients["sum"][0] / 808)
    torch.testing.assert_close(100 * gradients["mean"][0], gradients["mean"][1])


# What "auto" stands for


@pytest.mark.parametrize(
    ("cuda", "native", "capabilities", "expected"),
    [
        (True, True, {}, "bf16"),
        (True, False, {"amx_bf16": True}, "no"),
        (False, False, {"avx512_bf16": True}, "bf16"),
        (False, False, {"amx_bf16": True, "avx512_bf16": False}, "bf16"),
        (False, False, {"bf16": True}, "bf16"),
        (False, True, {"avx512_bf16": False, "avx2": True}, "no"),
        (False, False, {}, "no"),
    ],
)
def test_auto_is_bf16_where_it_is_multiplied_natively(monkeypatch, cuda, native, capabilities, expected):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: asked.append(including_emulation) or native
    )
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_precision("auto") == expected and asked == [False] * cuda
    assert [choose_precision(each) for each in ("no", "bf16", "fp16")] == ["no", "bf16", "fp16"]


def test_run_json_says_what_auto_stood_for(monkeypatch):
    class Split(list):
        def fingerprint(self) -> str:
            return "0"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for capabilities, expected in (({"amx_bf16": True}, "bf16"), ({}, "no")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        config = ClassificationRecipe(data={"format": "synthetic", "classes": ["a"]}, train={"precision": "auto"})
        info = describe_run(task_of(config), Split("ab"), Split("a"), ["test"])
        assert info.precision == expected and info.to_json()["precision"] == expected
        assert (info.data["train"].images, info.data["val"].images) == (2, 1)


def test_a_run_does_not_go_on_in_another_precision(tmp_path, attempt):
    config = ClassificationRecipe(data={"format": "synthetic"}, train={"precision": "auto"})
    run = Run.create(tmp_path / "run", config, RunInfo(precision="bf16"))
    require_same_origin(run, RunInfo(precision="bf16"))
    sentence = "run: trained in the precision bf16, for which train.precision auto stood; here it stands for no: go on"
    with attempt("wrong values"), pytest.raises(ValueError, match=sentence):
        require_same_origin(run, RunInfo(precision="no"))
    run.write_info(RunInfo())  # of a version that did not know
    require_same_origin(run, RunInfo(precision="no"))


@pytest.mark.parametrize(
    ("kind", "dtype"), [("no", None), ("bf16", torch.bfloat16), ("fp16", None), ("auto", torch.bfloat16)]
)
def test_passes_without_an_accelerator(monkeypatch, kind, dtype):
    monkeypatch.setattr(precision, "choose_precision", lambda each: "bf16" if each == "auto" else each)
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    with autocast(kind, torch.device("cpu")):
        assert layer(x).dtype == (dtype or torch.float32)
