"""Neurons beside the method's own: graded spikes by hand, and a graded network from training to refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import backbones
from backbones import HoyerSpike, fold, hoyer_penalty, neurons, spike_layers
from backbones.activations import GradedSpike
from backbones.deploy.events import using
from detection.analysis import analyze_run
from detection.exporters import export_run
from detection.runs import Run
from detection.tasks.recipes import ClassificationRecipe
from detection.tasks.run import load_model, train_run

RECIPE = {
    "model": {"backbone": {"name": "vgg11", "width": 0.125, "stem": "cifar", "activation": "graded", "levels": 4}},
    "data": {"format": "synthetic", "size": 32, "num_train": 16, "num_val": 8},
    "hoyer": {"weight": 0.01},
    "train": {"epochs": 1, "batch_size": 8},
}


def learn(layer: HoyerSpike, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """All that comes out of training passes and one evaluation: outputs, H, gradients, running average."""
    found = []
    for batch in batches:
        u = batch.clone().requires_grad_()
        spikes = layer.train()(u)
        penalty = hoyer_penalty(layer)
        gradients = torch.autograd.grad((spikes * u.detach().cos()).sum() + 0.1 * penalty, [u, layer.v_th])
        found += [spikes.detach(), penalty.detach(), *gradients, layer.extremum.clone()]
    return [*found, layer.eval()(batches[0]), layer.threshold.detach(), layer.num_batches_tracked]


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_levels_are_the_methods_spike_bit_for_bit(per_channel, dtype):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(3, 5, 6, 7, generator=generator).to(dtype) for _ in range(3)]
    with using("torch"):  # whose sums graded spikes have
        ours, theirs = (
            learn(layer, batches)
            for layer in (GradedSpike(5, levels=2, per_channel=per_channel), HoyerSpike(5, per_channel=per_channel))
        )
    assert len(ours) == 18 and 0 < ours[0].mean() < 1
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, theirs, strict=True))


def test_levels_are_reached_at_equal_steps_up_to_twice_the_extremum():
    # n = 3 steps; with |v_th| = 2 and E = 1/2 they lie at u = 2 * 2 i E / 4 = 0.5, 1, 1.5
    layer = GradedSpike(1, levels=4).eval()
    layer.v_th.data.fill_(-2.0)
    layer.extremum.fill_(0.5)
    u = torch.tensor([[-1.0], [0.0], [0.49], [0.5], [0.99], [1.0], [1.49], [1.5], [9.0]], requires_grad=True)
    spikes = layer(u)
    torch.testing.assert_close(3 * spikes.flatten(), torch.tensor([0.0, 0, 0, 1, 1, 2, 2, 3, 3]))
    assert layer.threshold.item() == 0.5
    assert not layer.binary and layer.levels == 4
    # The surrogate gradient is the method's: 1 / 2 / |v_th| where 0 < u / |v_th| < 2.
    spikes.sum().backward()
    assert u.grad.flatten().tolist() == [0, 0, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0]


def test_many_levels_approach_the_ramp():
    layer = GradedSpike(1, levels=16).eval()
    u = torch.linspace(-1, 3, 401).view(-1, 1)
    ramp = (u / 2).clamp(0, 1)
    assert (layer(u) - ramp).abs().max() <= 1 / 15


@pytest.mark.parametrize("levels", [1, 17, 2.5, "4"])
def test_levels_that_are_not_allowed_are_named(levels):
    with pytest.raises(ValueError, match=rf"levels must be in 2\.\.16, got {levels!r}"):
        backbones.create("vgg11", width=0.125, activation="graded", levels=levels)


def test_a_twin_takes_the_options_of_the_graded_network_and_leaves_them_aside():
    options = ("extremum", "momentum", "threshold", "window", "levels", "time_steps", "reset")
    assert neurons()["graded"].options == options
    model = backbones.create("vgg11", width=0.125, activation="relu", levels=4)
    assert spike_layers(model) == {} and not neurons()["relu"].spiking


# A network


@pytest.fixture(scope="module")
def graded(tmp_path_factory) -> Path:
    """A classifier of four levels, trained for two steps."""
    folder = tmp_path_factory.mktemp("graded") / "graded"
    train_run(ClassificationRecipe.model_validate(RECIPE), folder, ["test"])
    return folder


def test_a_graded_network_trains_and_logs_its_layers(graded):
    (line,) = Run.open(graded).history()
    layers = spike_layers(load_model(Run.open(graded)))
    assert {layer.levels for layer in layers.values()} == {4}
    assert line.step == 2 and set(line.layers["v_th"]) == set(line.layers["hoyer_per_layer"]) == set(layers)
    assert any(value != 1 for value in line.layers["v_th"].values())  # it has learnt
    assert line.losses["hoyer"] > 0


def test_a_graded_network_is_not_binary_and_the_layers_are_named(graded, tmp_path):
    analysis = analyze_run(graded)
    certificate = analysis.certificate
    assert not certificate.is_binary and certificate.levels == 4
    model = load_model(Run.open(graded))
    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    named = [name for name, reason in certificate.violations if "its input is not 0/1, 0." in reason]
    assert named and set(named) <= set(layers) - {"backbone.stages.0.0"}
    assert "backbone.stages.1.1" in named
    result = analysis.to_dict()
    assert result["levels"] == 4 and result["certificate"]["binary"] is False
    analysis.save(tmp_path)
    text = (tmp_path / "analysis.md").read_text()
    assert "## NOT binary: " in text and "levels 4\n" in text


def test_a_graded_network_is_refused_where_spikes_must_be_0_or_1(graded, tmp_path):
    sentence = r"spike layer backbone\.stages\.1\.0: GradedSpike has 4 levels: one comparison gives 0 and 1 alone"
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        fold(load_model(Run.open(graded)))
    for options in ({"int8": True}, {"file_format": "nir"}, {"file_format": "torch"}, {}):
        with pytest.raises(ValueError, match=rf"graded: cannot be exported, {sentence}$"):
            export_run(graded, out=tmp_path / "net", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_layer_in_a_part_that_cannot_be_traced_has_its_whole_name():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Sequential(nn.BatchNorm2d(2), GradedSpike(2, levels=3))

        def forward(self, x):
            return self.part(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match=r"spike layer part\.1: GradedSpike has 3 levels"):
        fold(Odd())
