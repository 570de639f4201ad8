"""Spike layers of any kind: how they are found, made, watched, counted and asked for their term of the loss."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import torch
import torch.utils.checkpoint
from test_backbones import WIDTH, images, synapses, with_statistics
from torch import Tensor, nn

import backbones
from backbones import (
    HoyerSpike,
    SpikeFactory,
    SpikeLayer,
    create,
    find_neuron,
    hook_layers,
    hoyer_penalties,
    logged_state,
    neurons,
    record_activity,
    register_neuron,
    spike_activity,
    spike_layers,
)
from backbones.activations import GradedSpike


class Sign(SpikeLayer):
    """Fires above 0, without a term of its own."""

    @property
    def threshold(self) -> Tensor:
        return torch.zeros(())

    def forward(self, u: Tensor) -> Tensor:
        return (u >= 0).to(u.dtype)


# What every spike layer promises


def test_spike_layers_are_found_by_name_in_their_order():
    model = nn.Sequential(HoyerSpike(2), nn.Sequential(nn.ReLU(), Sign()), GradedSpike(3, levels=4))
    assert spike_layers(model) == {"0": model[0], "1.1": model[1][1], "2": model[2]}
    assert [layer.binary for layer in spike_layers(model).values()] == [True, True, False]
    assert spike_layers(model[0]) == {"": model[0]} and spike_layers(nn.ReLU()) == {}


def test_the_threshold_is_where_a_layer_begins_to_fire_in_evaluation():
    layers = [HoyerSpike(2), HoyerSpike(2, fixed=True), HoyerSpike(2, per_channel=True), GradedSpike(2, levels=3)]
    for layer in (*layers, Sign()):
        if isinstance(layer, HoyerSpike):
            with torch.no_grad():
                layer.v_th.fill_(-0.5)
                layer.extremum.copy_(torch.tensor([0.5, 0.25]) if layer.per_channel else torch.tensor(0.5))
        layer.eval()
        threshold = layer.broadcast(layer.threshold.detach(), torch.zeros(1, 2, 1, 1)).expand(1, 2, 1, 1)
        below = torch.nextafter(threshold, torch.tensor(-9.0))
        assert (layer(threshold) > 0).all() and not layer(below).any()
        if layer.binary:
            assert torch.equal(layer.fold_threshold().float(), layer.threshold.float())
    with pytest.raises(ValueError, match="GradedSpike has 3 levels: one comparison gives 0 and 1 alone"):
        layers[3].fold_threshold()


def test_a_threshold_of_one_value_or_of_one_per_channel_broadcasts():
    layer, u = Sign(), torch.zeros(2, 3, 4, 5)
    assert layer.broadcast(torch.ones(()), u).shape == ()
    assert layer.broadcast(torch.ones(3), u).shape == (3, 1, 1)
    assert layer.broadcast(torch.ones(3), u[:, :, 0, 0]).shape == (3,)
    with pytest.raises(NotImplementedError):
        _ = SpikeLayer().threshold


def test_state_of_the_layers_is_logged_by_quantity():
    model = nn.Sequential(HoyerSpike(2, per_channel=True), Sign(), HoyerSpike(2))
    with torch.no_grad():
        model[0].v_th.fill_(-0.5)
        model[0].extremum.copy_(torch.tensor([0.25, 0.5]))
    assert logged_state(model) == {"v_th": {"0": 0.5, "2": 1.0}, "extremum": {"0": 0.375, "2": 1.0}}
    assert logged_state(Sign()) == {}


def test_layers_without_a_term_are_left_out_of_the_penalty():
    model = nn.Sequential(HoyerSpike(2), Sign())
    u = torch.rand(3, 2, requires_grad=True)
    model(u)
    assert list(hoyer_penalties(model)) == ["0"]
    assert hoyer_penalties(Sign()) == {}
    with pytest.raises(RuntimeError, match="call once after each forward pass in training mode"):
        model[0].take_penalty()


def test_a_layer_from_elsewhere_gives_its_own_term():
    class Taxed(Sign):
        has_penalty = True

        def forward(self, u: Tensor) -> Tensor:
            if self.training and torch.is_grad_enabled():
                self.add_penalty(u.square().sum(), u.numel())
            return super().forward(u)

    layer, u = Taxed(), torch.tensor([[1.0, 2.0]], requires_grad=True)
    layer(u)
    assert layer.has_pending_penalty and not copy.deepcopy(layer).has_pending_penalty
    layer(3 * u)
    penalties = hoyer_penalties(nn.Sequential(layer), "mean")  # of both passes, over the neurons of both
    assert penalties["0"].item() == (5 + 45) / 4 and not layer.has_pending_penalty
    penalties["0"].backward()
    assert u.grad.tolist() == [[2 * (1 + 9) / 4, 4 * (1 + 9) / 4]]


def test_a_copy_of_a_layer_has_no_term_pending():
    layer = HoyerSpike(2)
    layer(torch.rand(3, 2))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert not twin.has_pending_penalty and torch.equal(twin.extremum, layer.extremum)
    assert layer.has_pending_penalty


# The registry


def test_the_neurons_that_come_with_the_package():
    known = neurons()
    assert list(known) == ["hoyer", "relu", "fixed", "graded", "sign"]
    assert [neuron.spiking for neuron in known.values()] == [True, False, True, True, False]
    shared = ("extremum", "momentum", "threshold", "window")
    assert known["hoyer"].options == known["fixed"].options == (*shared, "time_steps", "reset", "thresholds")
    assert set(known["graded"].options) == {*shared, "levels", "time_steps", "reset"} and known["relu"].options == ()
    known.clear()
    assert neurons()


def test_options_of_other_neurons_are_left_aside_and_unknown_ones_are_refused():
    factory = SpikeFactory("hoyer", extremum="channel", levels=7)
    assert factory.options == {"extremum": "channel"} and factory(5).extremum.shape == (5,)
    assert SpikeFactory("graded", levels=7)(3).levels == 7
    assert SpikeFactory("relu", extremum="channel", momentum=0.5).options == {}
    allowed = r"\(allowed: extremum, levels, momentum, reset, threshold, thresholds, time_steps, window\)"
    with pytest.raises(ValueError, match=rf"no neuron has the option 'level' {allowed}"):
        SpikeFactory("hoyer", level=7)
    for levels in (1, 17):
        with pytest.raises(ValueError, match=rf"levels must be in 2\.\.16, got {levels}"):
            SpikeFactory("graded", levels=levels)
    known = "'hoyer', 'relu', 'fixed', 'graded', 'sign'"
    with pytest.raises(ValueError, match=f"activation must be one of {known}, got 'gelu'"):
        find_neuron("gelu")


def test_a_name_belongs_to_one_neuron(monkeypatch):
    monkeypatch.setattr(backbones.spiking, "_NEURONS", dict(backbones.spiking._NEURONS))
    assert register_neuron("plain", words="a sign")(lambda channels: Sign()) is neurons()["plain"].make
    assert isinstance(SpikeFactory("plain", extremum="channel")(3), Sign)
    assert list(spike_layers(create("vgg11", stem="cifar", width=WIDTH, activation="plain")))
    with pytest.raises(ValueError, match=r"neuron 'hoyer' is registered already, by backbones\.activations"):
        register_neuron("hoyer")(Sign)
    assert neurons()["hoyer"].make is not Sign


# Hooks


def test_hooks_see_and_replace_the_first_argument():
    model, seen = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU()), []
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
    x = torch.tensor([[1.0, -2.0]])

    def double(name: str, module: nn.Module, u: Tensor) -> Tensor | None:
        return 2 * u if name == "first" else None

    def note(name: str, module: nn.Module, u: Tensor, output: Tensor) -> None:
        seen.append((name, type(module).__name__, u.tolist(), output.tolist()))

    with torch.no_grad(), hook_layers({"first": model[0], "second": model[1]}, before=double, after=note):
        assert model(x).tolist() == [[2.0, 0.0]]
        model[1](input=x)  # by name, too
    assert seen == [
        ("first", "Linear", [[2.0, -4.0]], [[2.0, -4.0]]),
        ("second", "ReLU", [[2.0, -4.0]], [[2.0, 0.0]]),
        ("second", "ReLU", [[1.0, -2.0]], [[1.0, 0.0]]),
    ]
    assert model(x).tolist() == [[1.0, 0.0]]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_hooks_are_gone_after_an_error_and_can_be_in_front_of_others():
    layer, order = nn.Identity(), []
    with pytest.raises(KeyError), hook_layers({"": layer}, before=lambda *_: order.append("late")):
        with hook_layers({"": layer}, before=lambda *_: order.append("early"), prepend=True):
            layer(torch.ones(1))
        raise KeyError
    assert order == ["early", "late"] and not layer._forward_pre_hooks


# Activity and potentials


def test_activity_counts_what_the_convolutions_receive():
    # In a bare backbone every spike layer feeds exactly one convolution.
    for name in ("vgg11", "resnet18", "resnet50"):
        backbone = with_statistics(create(name, stem="cifar", width=WIDTH))
        spikes, neurons = [], []

        def count(module: nn.Module, inputs: tuple[Tensor, ...], spikes=spikes, neurons=neurons) -> None:
            spikes.append(inputs[0].sum().item())
            neurons.append(inputs[0].numel())

        for layer in list(synapses(backbone).values())[1:]:
            layer.register_forward_pre_hook(count)
        with record_activity(backbone) as activity, torch.no_grad():
            backbone(images("cifar", 2))
            backbone(images("cifar", 3, seed=4))
        layers = [key for key, module in backbone.named_modules() if isinstance(module, HoyerSpike)]
        assert list(activity) == layers == [layer.name for layer in activity.values()]
        assert 0 < sum(spikes) < sum(neurons)
        assert sum(layer.num_spikes for layer in activity.values()) == sum(spikes)
        assert sum(layer.num_neurons for layer in activity.values()) == sum(neurons)
        assert spike_activity(activity) == pytest.approx(sum(spikes) / sum(neurons))


def test_activity_of_two_layers_by_hand():
    model = nn.Sequential(HoyerSpike(2, fixed=True), nn.Flatten(), nn.Linear(4, 1, bias=False), HoyerSpike(1))
    model[2].weight.data.fill_(1.0)
    model.eval()
    u = torch.tensor([[[0.5, 1.0], [2.0, -1.0]], [[0.9, 0.9], [-3.0, 0.0]]])
    with record_activity(model) as activity:
        assert (activity["0"].firing_rate, spike_activity(activity)) == (0.0, 0.0)  # before the first pass
        model(u)  # layer 0: 2 of 4 fire in the first image, none in the second; layer 3: its sums are 2 and 0
        model(u[:1])
    assert (activity["0"].num_spikes, activity["0"].num_neurons) == (4, 12)
    assert (activity["3"].num_spikes, activity["3"].num_neurons) == (2, 3)
    assert activity["3"].firing_rate == pytest.approx(2 / 3)
    assert spike_activity(activity) == pytest.approx(6 / 15)
    model(u)  # after the context nothing is counted
    assert activity["0"].num_neurons == 12


def test_activity_stops_counting_after_an_error():
    layer = HoyerSpike(2)
    with pytest.raises(KeyError), record_activity(layer) as activity:
        raise KeyError
    layer(torch.rand(1, 2))
    assert activity[""].num_neurons == 0


def test_activity_of_the_analogue_twin():
    twin = create("vgg11", stem="cifar", width=WIDTH, activation="relu")
    with record_activity(twin) as activity:
        twin(images("cifar"))
    assert activity == {}
    assert spike_activity(activity) == 0


def test_potentials_around_the_threshold():
    layer = HoyerSpike(2)
    with torch.no_grad():
        layer.v_th.fill_(-2.0)
        layer.extremum.fill_(0.25)
    model = nn.Sequential(layer).eval()
    # The threshold is 0.5: in units of it the potentials lie at -1.5 (outside), -0.96, 0.02, 0.98, 1.0, 1.06, 2.98, 4.
    u = 0.5 * torch.tensor([-1.5, -0.96, 0.02, 0.98, 1.0, 1.06, 2.98, 4.0]).view(4, 2)
    with backbones.record_potentials(model) as histograms:
        spikes = model(u)
        model(torch.zeros_like(u))  # only the first pass counts
    shares = histograms["0"]
    assert len(shares) == 40
    assert {index: share for index, share in enumerate(shares) if share} == {
        0: 0.125,
        10: 0.125,
        19: 0.125,
        20: 0.25,
        39: 0.125,
    }
    assert spikes.sum() == 4
    assert not model[0]._forward_pre_hooks


@pytest.mark.parametrize("options", [{"per_channel": True}, {"fixed": True}])
def test_potentials_of_other_thresholds(options):
    layer = HoyerSpike(3, **options).eval()
    with torch.no_grad():
        layer.v_th.fill_(2.0)
        layer.extremum.copy_(torch.tensor([0.25, 0.5, 1.0])) if layer.per_channel else layer.extremum.fill_(0.5)
    u = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with backbones.record_potentials(layer) as histograms:
        spikes = layer(u)
    ratio = u / (2 * layer.extremum.view(-1, 1, 1)) if layer.per_channel else u / 2
    assert torch.equal(spikes, (ratio >= 1).float())
    (shares,) = histograms.values()
    assert sum(shares[20:]) == pytest.approx(((ratio >= 1) & (ratio <= 3)).float().mean().item())
    assert sum(shares) == pytest.approx((ratio.abs() <= 1).logical_or((ratio > 1) & (ratio <= 3)).float().mean().item())


# The term of the loss in trainings of others


def test_what_a_backward_pass_computes_again_counts_once():
    torch.manual_seed(0)
    x = images("cifar").requires_grad_()
    found, state = {}, None
    for checkpointed in (False, True):
        model = create("resnet18", stem="cifar", width=WIDTH, shortcut="real", norm_first=True)
        state = state or copy.deepcopy(model.state_dict())
        model.load_state_dict(state)
        for _ in range(2):
            model.zero_grad()
            run = lambda z, model=model: model(z)["c5"]  # noqa: E731
            y = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False) if checkpointed else run(x)
            penalty = backbones.hoyer_penalty(model)
            (y.square().mean() + 1e-4 * penalty).backward()
        spikes = [layer for layer in spike_layers(model).values() if isinstance(layer, HoyerSpike)]
        found[checkpointed] = (
            penalty.detach(),
            [layer.num_batches_tracked.item() for layer in spikes],
            torch.stack([layer.extremum for layer in spikes]),
            torch.stack([layer.v_th.grad for layer in spikes]),
        )
    for plain, again in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(plain, again)


def test_terms_that_nobody_takes_go_with_their_pass():
    """So a training without the term keeps no graphs, and one that begins to take it gets that of its own pass."""
    model, x = create("resnet18", stem="cifar", width=WIDTH), images("cifar")
    model(x)["c5"].mean().backward()
    untaken = [weakref.ref(layer._penalty) for layer in spike_layers(model).values()]
    model(x)["c5"].mean().backward()
    assert all(each() is None for each in untaken)
    loss = model(x)["c5"].mean()
    penalty = backbones.hoyer_penalty(model)
    (loss + penalty).backward()
    model(x)
    torch.testing.assert_close(backbones.hoyer_penalty(model), penalty)


def test_frozen_layers_have_no_term():
    model, x = create("resnet18", stem="cifar", width=WIDTH), images("cifar")
    model.stages[0].requires_grad_(False).eval()
    model(x)
    assert hoyer_penalties(model).keys() == {name for name in spike_layers(model) if not name.startswith("stages.0.")}
    with pytest.raises(RuntimeError, match="no Hoyer term"):
        model.eval()(x)
        hoyer_penalties(model)
