"""Several time steps: by hand, against a plain loop over single steps, through networks, detectors and measurements."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_energy import make_config, make_detector, make_images
from test_neurons import learn
from torch import Tensor, nn

import backbones
from backbones import (
    HoyerSpike,
    MultiStepSpike,
    average_so_far,
    certify,
    energy,
    fold,
    hoyer_penalty,
    measure_activity,
    record_activity,
    record_potentials,
    spike_layers,
    spiking,
)
from detection.analysis import analyze_run
from detection.exporters import export_run
from detection.models import build_classifier
from detection.robustness.studies import study
from detection.runs import Run
from detection.spikemaps import spike_maps
from detection.tasks import task_of
from detection.tasks.recipes import ClassificationRecipe
from detection.tasks.run import load_model, train_run
from detection.training.distillation import watch
from detection.training.distributed import synchronise

RECIPE = {
    "model": {"backbone": {"name": "resnet18", "width": 0.25, "time_steps": 2}},
    "data": {"format": "synthetic", "size": 32, "num_train": 32, "num_val": 24},
    "hoyer": {"weight": 0.01},
    "optimizer": {"lr": 0.003, "warmup_steps": 1},
    "train": {"epochs": 2, "batch_size": 8, "eval_every": 2},
}


def make_layer(steps: int, channels: int = 1, **options) -> MultiStepSpike:
    layer = MultiStepSpike(channels, time_steps=steps, **options)
    with torch.no_grad():
        layer.leak.fill_(0.5)
    return layer


# The neuron


@pytest.mark.parametrize(
    "options", [{}, {"per_channel": True, "threshold_per_channel": True}, {"fixed": True}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_step_is_the_methods_layer_bit_for_bit(options, dtype):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(3, 5, 6, 7, generator=generator).to(dtype) for _ in range(3)]
    ours, theirs = (
        learn(layer, batches) for layer in (MultiStepSpike(5, time_steps=1, **options), HoyerSpike(5, **options))
    )
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, theirs, strict=True))
    assert type(backbones.SpikeFactory(time_steps=1)(5)) is HoyerSpike
    assert type(backbones.SpikeFactory(time_steps=2)(5)) is MultiStepSpike


@pytest.mark.parametrize(
    ("reset", "potentials", "spikes"),
    # v_th 2, E 1/2, so theta 1; leak 1/2; u = 1.5, 0.5, 0.875 and 0.5, 0.5, 0.5.
    [
        # 1.5 fires; 0.5 (1.5 - 1) + 0.5 = 0.75 does not; 0.375 + 0.875 = 1.25 does.
        ("subtract", [[1.5, 0.5], [0.75, 0.75], [1.25, 0.875]], [[1, 0], [0, 0], [1, 0]]),
        # 1.5 fires; 0 + 0.5 does not; 0.25 + 0.875 = 1.125 does.
        ("zero", [[1.5, 0.5], [0.5, 0.75], [1.125, 0.875]], [[1, 0], [0, 0], [1, 0]]),
    ],
)
def test_three_steps_by_hand(reset, potentials, spikes):
    layer = make_layer(3, reset=reset).eval()
    layer.v_th.data.fill_(-2.0)
    layer.extremum.fill_(0.5)
    u = torch.tensor([[1.5], [0.5], [0.5], [0.5], [0.875], [0.5]])  # step by step, two neurons in each
    assert layer.membrane(u).view(3, 2).tolist() == potentials
    assert layer(u).view(3, 2).tolist() == spikes
    with record_potentials(layer) as histogram:
        layer(u)
    # u / theta is what it was before, so the bins of width 0.1 from -1 on have the potentials themselves.
    wanted = torch.histc(torch.tensor(potentials), 40, -1, 3) / 6
    assert histogram[""] == wanted.tolist()


def test_the_extremum_is_that_of_a_pass_that_fires_at_the_extremum_of_the_first_step():
    layer = make_layer(2)
    # Step 1: z = 0.5, 1, E_1 = 1.25 / 1.5 = 5/6: the second fires. Step 2: z = 0.5 * 0.5 + 0.25 = 0.5 and
    # 0.5 * (1 - 5/6) + 0.5 = 7/12. E = (1.25 + 0.25 + 49/144) / (1.5 + 0.5 + 7/12) = 265/372.
    u = torch.tensor([[0.5], [1.0], [0.25], [0.5]], dtype=torch.float64)
    spikes = layer(u)
    assert layer.extremum.item() == pytest.approx(265 / 372, rel=1e-6)
    # Fired at it: z of step 2 is 0.5 and 0.5 (1 - 265/372) + 0.5 = 479/744; neither fires again.
    assert spikes.flatten().tolist() == [0, 1, 0, 0]
    sums = 1.5 + 0.5 + 479 / 744, 1.25 + 0.25 + (479 / 744) ** 2
    assert hoyer_penalty(layer).item() == pytest.approx(sums[0] ** 2 / sums[1], rel=1e-12)
    assert layer.has_pending_penalty is False and layer.num_batches_tracked == 1


class SurrogateStep(torch.autograd.Function):
    """A spike with its surrogate gradient, written anew."""

    @staticmethod
    def forward(ctx, z: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return (z >= threshold).to(z.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        return gradient * 0.5 * ((z > 0) & (z < 2)), None


def plain_loop(u: Tensor, v_th: Tensor, leak: Tensor, reset: str, per_channel: bool, fixed: bool) -> tuple[Tensor, ...]:
    """Spikes (T, N, ...), H and E of inputs (T, N, C, H, W) by the formulas, a step at a time."""
    shape = (-1, 1, 1) if per_channel else ()
    v = v_th.abs().view(-1, 1, 1) if v_th.dim() else v_th.abs()

    def of(zs: list[Tensor]) -> Tensor:
        c = torch.stack(zs).detach().clip(0, 1)
        dims = (0, 1, 3, 4) if per_channel else (0, 1, 2, 3, 4)
        return ((c**2).sum(dims) / c.sum(dims)).view(shape)

    def run(e: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        m, s, zs, fired = torch.zeros_like(u[0]), torch.zeros_like(u[0]), [], []
        for step in u:
            m = leak * (m - s * v * e if reset == "subtract" else m * (1 - s)) + step
            s = SurrogateStep.apply(m / v, e)
            zs.append(m / v)
            fired.append(s)
        return zs, fired

    e = torch.ones((), dtype=u.dtype) if fixed else of(run(of([u[0] / v]))[0])
    zs, fired = run(e)
    c = torch.stack(zs).clip(0, 1)
    return torch.stack(fired), c.sum() ** 2 / (c**2).sum(), e


@pytest.mark.parametrize("reset", ["subtract", "zero"])
@pytest.mark.parametrize(("per_channel", "fixed"), [(False, False), (True, False), (False, True)])
def test_three_steps_agree_with_a_plain_loop_in_values_and_gradients(reset, per_channel, fixed):
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(3, 4, 5, 6, 7, generator=generator, dtype=torch.float64).requires_grad_()
    upstream = torch.randn(3, 4, 5, 6, 7, generator=generator, dtype=torch.float64)
    options = {"per_channel": per_channel, "threshold_per_channel": per_channel, "fixed": fixed, "reset": reset}
    layer = MultiStepSpike(5, time_steps=3, **options).double()
    with torch.no_grad():
        layer.leak.fill_(0.8)
        layer.v_th.mul_(-torch.linspace(0.6, 1.2, 5) if per_channel else 0.7)
    spikes = layer(u.flatten(0, 1))
    penalty = hoyer_penalty(layer)
    wanted = [u, layer.v_th, layer.leak]
    ours = torch.autograd.grad((spikes.view_as(u) * upstream).sum() + 0.3 * penalty, wanted)
    fired, h, e = plain_loop(u, layer.v_th, layer.leak, reset, per_channel, fixed)
    theirs = torch.autograd.grad((fired * upstream).sum() + 0.3 * h, wanted)
    assert torch.equal(spikes.view_as(u), fired) and 0.1 < fired.mean() < 0.6
    torch.testing.assert_close(penalty, h)
    torch.testing.assert_close(ours, theirs)
    assert all(gradient.abs().min() > 0 for gradient in ours[1:])
    if not fixed:
        torch.testing.assert_close(layer.extremum, e.flatten() if per_channel else e)
    with torch.no_grad():
        u[:, 0, 0, 0, 0] += 1  # the first image alone, below, does not see it
    alone, together = layer.eval()(u[:, 1].reshape(3, 5, 6, 7)), layer(u.flatten(0, 1)).view_as(u)
    assert torch.equal(alone, together[:, 1])


def test_a_first_step_is_a_network_of_one_step():
    one, three = HoyerSpike(4).eval(), make_layer(3, 4).eval()
    one.extremum.fill_(0.6)
    three.extremum.fill_(0.6)
    u = torch.randn(6, 4, 5, 5)
    assert torch.equal(three(u)[:2], one(u[:2]))
    assert not torch.equal(three(u)[2:], one(u[2:]))


def test_compiled_layer_equals_the_eager_one():
    torch.manual_seed(0)
    torch.compiler.reset()
    eager, plain = make_layer(2, 4), make_layer(2, 4)
    compiled, results = torch.compile(plain, fullgraph=True), []
    u, upstream = torch.randn(4, 4, 5, 5), torch.randn(4, 4, 5, 5)
    for layer, forward in ((eager, eager), (plain, compiled)):
        x = u.clone().requires_grad_()
        spikes = forward(x)
        ((spikes * upstream).sum() + hoyer_penalty(layer, "mean")).backward()
        gradients = [x.grad, *(parameter.grad for parameter in layer.parameters())]
        results.append((spikes, gradients, [buffer.clone() for buffer in layer.buffers()], layer.eval()(u)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][3], results[1][3])
    torch.testing.assert_close(results[1][1:3], results[0][1:3], rtol=1e-4, atol=1e-5)


def test_a_silent_batch_has_an_extremum_of_one():
    layer = make_layer(2, 3)
    u = -torch.ones(4, 3, 2, 2, requires_grad=True)
    assert layer(u).sum() == 0 and layer.extremum == 1 and hoyer_penalty(layer) == 0
    with torch.no_grad():
        assert layer(u).sum() == 0 and not layer.has_pending_penalty


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: backbones.create("vgg11", width=0.125, time_steps=0), "time_steps must be a whole number from 1 on"),
        (
            lambda: backbones.create("vgg11", width=0.125, reset="half"),
            "reset must be 'subtract' or 'zero', got 'half'",
        ),
        (lambda: make_layer(2)(torch.ones(3, 1)), "3 maps are no multiple of 2 time steps"),
        (lambda: synchronise(make_layer(2), spikes=True, batch_norm=False), "hoyer.sync: several time steps"),
        (lambda: fold(backbones.create("resnet18", width=0.125, time_steps=2)), "2 time steps: fold, integers"),
    ],
)
def test_what_is_not_allowed_is_said(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_neuron_that_knows_one_step_alone_is_refused(monkeypatch):
    monkeypatch.setitem(spiking._NEURONS, "own", spiking.Neuron(HoyerSpike, True, "own"))
    with pytest.raises(ValueError, match=r"activation 'own' has one time step alone \(allowed: hoyer, fixed, graded\)"):
        backbones.create("vgg11", activation="own", time_steps=2)


# Networks


@pytest.mark.parametrize("name", backbones.names())
def test_every_backbone_runs_in_two_steps_behind_one_stem(name):
    torch.manual_seed(0)
    stem = "cifar" if name in ("vgg13", "resnet20") else "imagenet"
    backbone = backbones.create(name, width=0.125, stem=stem, time_steps=2)
    model, images = backbones.Classifier(backbone, 3), torch.rand(2, 3, 64, 64)
    stems, first = [], next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    with backbones.hook_layers({"": first}, after=lambda name, module, x, y: stems.append(len(x))):
        logits = model(images)
    assert logits.shape == (2, 3) and stems == [2]
    maps = backbone(images)
    sizes = {info.name: (4, info.channels, 64 // info.stride, 64 // info.stride) for info in backbone.feature_info}
    assert {name: tuple(x.shape) for name, x in maps.items()} == sizes
    (logits.square().sum() + hoyer_penalty(model, "mean")).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    model.eval()
    with torch.no_grad():
        together, alone = model(images), model(images[1:])
    torch.testing.assert_close(together[1:], alone)


def test_a_compiled_backbone_equals_the_eager_one():
    torch.manual_seed(0)
    torch.compiler.reset()
    eager, images = backbones.create("vgg13", width=0.125, stem="cifar", time_steps=2), torch.rand(2, 3, 32, 32)
    traced, found = copy.deepcopy(eager), []
    traced.compile(backend="eager", fullgraph=True)  # the graph, without the C++ that the layer's own test compiles
    for backbone in (eager, traced):
        maps = backbone(images)
        (sum(x.square().mean() for x in maps.values()) + hoyer_penalty(backbone, "mean")).backward()
        gradients = [parameter.grad for parameter in backbone.parameters() if parameter.grad is not None]
        found.append([*maps.values(), *gradients, *backbone.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_steps_of_a_network_are_single_steps_averaged():
    """A network whose layers forget at once (leak 0) is one of one step, whatever the number of steps."""
    torch.manual_seed(0)
    options = {"width": 0.25, "stem": "cifar"}
    one = backbones.Classifier(backbones.create("resnet18", **options), 4)
    one(torch.rand(8, 3, 32, 32))
    state, several = one.backbone.state_dict(), backbones.create("resnet18", **options, time_steps=3)
    backbones.load_weights(several, state)
    assert {name for name in several.state_dict() if name not in state} == {
        f"{name}.leak" for name in spike_layers(several)
    }
    assert all(layer.leak == 1 for layer in spike_layers(several).values())
    three = backbones.Classifier(several, 4).eval()
    three.head.load_state_dict(one.head.state_dict() | {"1.leak": torch.zeros(())})
    for layer in spike_layers(several).values():
        layer.leak.data.zero_()
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(three(images), one.eval()(images))
    with pytest.raises(ValueError, match="leak' is unknown to this backbone"):
        backbones.load_weights(one.backbone, several.state_dict())


def test_averages_so_far():
    x = torch.tensor([[1.0], [2.0], [3.0], [6.0], [5.0], [7.0]])  # three steps of two
    assert average_so_far(x, 3).squeeze(-1).tolist() == [[1, 2], [2, 4], [3, 5]]
    assert backbones.average_steps(x, 3).flatten().tolist() == [3, 5]


@pytest.mark.parametrize("detector", ["retinanet", "fcos", "ssd", "fasterrcnn"])
def test_every_detector_learns_from_the_means_of_two_steps(detector):
    torch.manual_seed(0)
    head = {"num_convs": 1, "spiking": detector in ("retinanet", "fcos"), "representation_size": 16}
    config = make_config(detector, backbone={"time_steps": 2}, neck={"out_channels": 16}, head=head)
    model, images = make_detector(config), make_images()
    found = {}
    part = model.head if hasattr(model, "head") else model.rpn.head
    with backbones.hook_layers({"": part}, after=lambda name, module, x, y: found.update(inputs=x, outputs=y)):
        model.eval()(images)
    inputs = list(found["inputs"]) if not isinstance(found["inputs"], dict) else list(found["inputs"].values())
    assert {len(x) for x in inputs} == {2 * len(images)}
    outputs = found["outputs"].values() if isinstance(found["outputs"], dict) else itertools.chain(*found["outputs"])
    assert {len(x) for x in outputs} == {len(images)}
    boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0]])
    targets = [{"boxes": boxes, "labels": torch.ones(1, dtype=torch.int64)} for _ in images]
    losses = model.train()(images, targets)
    (sum(losses.values()) + hoyer_penalty(model, "mean")).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients.values())
    assert any(gradient is not None and gradient.any() for name, gradient in gradients.items() if "leak" in name)
    certificate = certify(measure_activity(model, [images]), task_of(config).analogue_parts(model))
    assert certificate.is_binary and certificate.time_steps == 2


# Measurements


class TwoLayers(nn.Sequential):
    """conv (1 -> 1, 1x1, weight 1) -> spike -> linear (4 -> 2), images of 2x2, in steps."""

    def __init__(self, steps: int) -> None:
        conv, linear = nn.Conv2d(1, 1, 1, bias=False), nn.Linear(4, 2, bias=False)
        nn.init.ones_(conv.weight)
        repeat = [backbones.RepeatSteps(steps)] if steps > 1 else []
        spike = MultiStepSpike(1, time_steps=steps) if steps > 1 else HoyerSpike(1)
        super().__init__(conv, *repeat, spike, nn.Flatten(), linear)


def test_operations_and_energy_of_two_steps_by_hand():
    model = TwoLayers(2).eval()  # v_th, E and leak are 1
    # Pixels 1, 0.5, 0.25, 0: step 1 fires for the first; in step 2 it is at 0 + 1, the second at 1: both fire.
    images = torch.tensor([1.0, 0.5, 0.25, 0.0]).view(1, 1, 2, 2)
    measured = measure_activity(model, [images])
    conv, linear = measured.layers["0"], measured.layers["4"]
    assert (conv.num_exact_macs, conv.num_inputs, conv.time_steps, conv.output_bits) == (4, 4, 1, 2)
    assert (linear.num_exact_macs, linear.num_synops, linear.time_steps) == (16, 6, 2)
    spikes = measured.spikes["2"]
    assert (spikes.num_spikes, spikes.num_neurons, spikes.time_steps, spikes.firing_rate) == (3, 8, 2, 0.375)
    with record_activity(model) as activity:
        model(images)
    assert activity["2"] == spikes
    report = energy(measured)
    assert (certify(measured).time_steps, certify(measured).is_binary) == (2, True)
    spiking, twin, binary = (report.networks[name] for name in ("spiking", "twin", "binary"))
    # 4 MACs of the stem, and 4 neurons that carry their potential once.
    assert (spiking.macs, spiking.acs, spiking.comparisons) == (8, 6, 8)
    # Read: 4 pixels of 32 bits, 8 spikes, 4 potentials of 32; written: 2 spikes for each of 4 neurons, 4 potentials,
    # and 4 outputs of 32 bits. Weights: 1 + 8 numbers.
    assert (spiking.read_bits, spiking.write_bits, spiking.weight_bits) == (264, 264, 288)
    one = energy(measure_activity(TwoLayers(1).eval(), [images]))
    assert (twin, binary) == (one.networks["twin"], one.networks["binary"])
    assert (twin.macs, binary.acs, binary.comparisons, binary.write_bits) == (12, 8, 4, 4 + 64)
    first = report.first_layer
    assert (first.spike_bits, first.image_bits, first.spikes_suffice) == (8, 32, True)


def test_spike_maps_are_means_over_the_steps():
    torch.manual_seed(0)
    data = RECIPE["data"] | {"classes": ["a", "b", "c"]}
    model = build_classifier(ClassificationRecipe.model_validate(RECIPE | {"data": data})).eval()
    image, found = torch.rand(3, 32, 32), {}
    layers = {
        name: list(spike_layers(part).values())[-1] for name, part in model.backbone.parts().items() if name != "stem"
    }
    for layer in spike_layers(model).values():
        layer.extremum.fill_(0.1)
    with backbones.hook_layers(layers, after=lambda name, layer, u, spikes: found.update({name: spikes})):
        maps = {each.name: each for each in spike_maps(model, image)}
    assert list(maps) == list(layers) == ["c2", "c3", "c4", "c5"]
    assert 0 < maps["c2"].activity < 1 and not torch.equal(*found["c2"].chunk(2))
    for name, spikes in found.items():
        assert torch.equal(torch.from_numpy(maps[name].rate), spikes.mean((0, 1)))


# A run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A classifier of two steps, trained for four optimiser steps."""
    folder = tmp_path_factory.mktemp("multistep") / "two"
    train_run(ClassificationRecipe.model_validate(RECIPE), folder, ["test"])
    return folder


def test_a_run_of_two_steps_from_its_log_to_its_analysis(run, tmp_path):
    line = Run.open(run).history()[-1]
    model = load_model(Run.open(run))
    assert set(line.layers["leak"]) == set(line.layers["hoyer_per_layer"]) == set(spike_layers(model))
    assert any(value != 1 for value in line.layers["leak"].values())  # it has learnt
    task = task_of(Run.open(run).config)
    assert task.describe() == "ResNet18 \N{MULTIPLICATION SIGN}0.25, spiking, 2 time steps"
    early = line.evaluation.tables["anytime"]
    assert list(early) == ["top1 after 1 of 2 steps"]
    # The first of two steps: the same weights in one.
    config = task.config.model_copy(deep=True)
    config.model.backbone.time_steps = 1
    one = build_classifier(config)
    one.load_state_dict({name: value for name, value in model.state_dict().items() if not name.endswith(".leak")})
    val = task.read("val")
    answers = one.eval()(val.pixels / 255).argmax(1)
    assert early["top1 after 1 of 2 steps"] == pytest.approx((answers == val.labels).double().mean().item())
    assert len(answers.unique()) > 1
    found = analyze_run(run, num_images=8).to_dict()
    assert found["time_steps"] == 2 and found["certificate"]["binary"]
    assert found["metrics"]["anytime"].keys() == early.keys()


def test_a_run_of_two_steps_is_refused_by_name(run, tmp_path):
    for options in ({}, {"int8": True}, {"file_format": "nir"}, {"file_format": "torch"}):
        with pytest.raises(ValueError, match=r"two: cannot be exported, spike layer .*: 2 time steps: fold, integers"):
            export_run(run, out=tmp_path / "net", **options)
    with pytest.raises(ValueError, match="two: no single time step: --kinds membrane cannot be asked"):
        study([run], tmp_path / "noise", ["test"], kinds=["membrane"])
    assert list(tmp_path.iterdir()) == []
    found = study([run], tmp_path / "noise", ["test"], kinds=["membrane", "brightness"], num_images=4)
    assert found["left_out"][0]["kinds"] == ["membrane"] and not found["flips"]


def test_a_student_in_steps_is_compared_by_its_means(monkeypatch):
    head = nn.Identity()
    monkeypatch.setattr("detection.training.distillation.time_steps", lambda model: 2)
    seen = watch(SimpleNamespace(head_of=lambda model: model, receiver_of=lambda model: model), head)
    head(torch.tensor([[1.0], [2.0], [5.0], [8.0]]))
    assert seen["logits"].tolist() == seen["features"][0].tolist() == [[3], [5]]
