"""BatchNorm and spike layer as one comparison: the same spikes, for every network; sums in integers."""

import copy
from itertools import product

import pytest
import torch
from torch import fx, nn

import backbones
from backbones import HoyerSpike
from backbones.deploy.fold import ChannelThreshold, fold, round_up
from backbones.deploy.integer import IntegerReal, IntegerSpikes, QuantisedReal, fix_size, to_integers
from detection.models import build_detector
from detection.tasks.recipes import DetectionRecipe

FAMILIES = ["vgg11", "resnet18", "resnet50", "mobilenetv1", "mobilenetv2"]


def scramble(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random statistics, scales of either sign and some of 0, thresholds of either sign."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.3, 2, generator=generator)
                module.weight.normal_(0.6, 0.6, generator=generator)
                module.weight[::7] = 0
                module.bias.normal_(0, 0.3, generator=generator)
            elif isinstance(module, HoyerSpike):
                module.v_th.uniform_(-1.2, 1.2, generator=generator)
                module.extremum.uniform_(0.1, 0.6, generator=generator)
    return model.eval()


def classifier(name="vgg11", *, seed=0, **options) -> backbones.Classifier:
    torch.manual_seed(seed)
    options = {"width": 0.125, "stem": "cifar"} | options
    return scramble(backbones.Classifier(backbones.create(name, **options), 10), seed)


def detector(kind="retinanet", **model) -> nn.Module:
    settings = {
        "detector": kind,
        "backbone": {"name": "resnet18", "width": 0.125},
        "neck": {"out_channels": 16, "spiking": kind != "ssd"},
        "head": {"num_convs": 2, "spiking": kind != "ssd"},
        "min_size": [96] if kind == "ssd" else [64],
        "max_size": 96,
    }
    data = {"format": "synthetic", "classes": ["circle", "square", "star"]}
    torch.manual_seed(0)
    return scramble(build_detector(DetectionRecipe.model_validate({"model": settings | model, "data": data})))


@torch.no_grad()
def run_and_record(model: nn.Module, x, kind: type[nn.Module]):
    """Output, and what every layer of a kind gave, in the order of the calls."""
    given = []
    layers = [module for module in model.modules() if isinstance(module, kind)]
    handles = [layer.register_forward_hook(lambda layer, inputs, output: given.append(output)) for layer in layers]
    result = model(x)
    for handle in handles:
        handle.remove()
    return result, given


# --- every network ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("activation", "extremum"), [("hoyer", "layer"), ("hoyer", "channel"), ("fixed", "layer")])
def test_spikes_are_the_same_in_float64(name, activation, extremum):
    for seed, (stem, shape) in enumerate({"cifar": (3, 3, 35, 33), "imagenet": (1, 3, 65, 97)}.items()):
        model = classifier(name, activation=activation, extremum=extremum, stem=stem, seed=seed).double()
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        expected, spikes = run_and_record(model, x, HoyerSpike)
        folded = fold(model)
        result, ours = run_and_record(folded, x, ChannelThreshold)
        assert len(spikes) == len(ours) > 5
        assert 0.02 < torch.cat([s.flatten() for s in spikes]).mean() < 0.9
        assert all(torch.equal(a, b) for a, b in zip(spikes, ours, strict=True))
        assert torch.equal(result, expected)


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "resnet50"])
def test_a_norm_before_the_pool_folds_too(name):
    model = classifier(name, pool_first=False).double()
    x = torch.randn(2, 3, 33, 40, dtype=torch.float64)
    folded = fold(model)
    with torch.no_grad():
        assert torch.equal(folded(x), model(x))
    assert len([m for m in folded.modules() if isinstance(m, ChannelThreshold)]) == len(
        [m for m in model.modules() if isinstance(m, HoyerSpike)]
    )


@pytest.mark.parametrize(
    ("name", "pool_first"), [(n, p) for n, p in product(FAMILIES, (True, False)) if p or n[0] != "m"]
)
def test_the_twin_folds_into_its_convolutions(name, pool_first):
    model = classifier(name, activation="relu", pool_first=pool_first).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.abs_().add_(0.1)
    x = torch.randn(2, 3, 35, 33, dtype=torch.float64)
    folded = fold(model)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-9, atol=1e-9)
    left = [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    # What stays stands over the residual stream, where there is no convolution to go into.
    assert len(left) == {"resnet18": 3, "resnet50": 20}.get(name, 0)


def test_a_negative_scale_keeps_a_pooled_twin_right():
    model = classifier("vgg11", activation="relu").double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fold(model)(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(3, 2, padding=1),
        nn.AvgPool2d(2, divisor_override=1),
        nn.AvgPool2d(3, 2, padding=1, count_include_pad=False),
        nn.AvgPool2d(2, ceil_mode=True),
    ],
    ids=["zeros", "divisor", "cells", "ceil"],
)
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_norm_changes_places_with_true_averages_alone(pool, norm_first):
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    for activation in (HoyerSpike(4), nn.ReLU()):
        between = [nn.BatchNorm2d(4), pool] if norm_first else [pool, nn.BatchNorm2d(4)]
        model = scramble(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *between, activation)).double()
        torch.testing.assert_close(fold(model)(x), model(x))


def test_few_spikes_flip_in_float32():
    flipped = total = 0
    for name in FAMILIES:
        model = classifier(name)
        x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        _, spikes = run_and_record(model, x, HoyerSpike)
        _, ours = run_and_record(fold(model), x, ChannelThreshold)
        flipped += sum(int((a != b).sum()) for a, b in zip(spikes, ours, strict=True))
        total += sum(a.numel() for a in spikes)
    assert flipped / total < 1e-4


def test_the_argument_stays_as_it_is_and_attributes_are_kept():
    backbone = scramble(backbones.create("resnet18", width=0.125)).train()
    before = copy.deepcopy(backbone.state_dict())
    folded = fold(backbone)
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())
    assert backbone.training and not folded.training
    assert folded.feature_info == backbone.feature_info
    x = torch.randn(1, 3, 64, 64)
    backbone.eval()
    with torch.no_grad():
        maps, expected = folded(x), backbone(x)
    assert list(maps) == list(expected)
    for name in maps:
        torch.testing.assert_close(maps[name], expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["retinanet", "fcos", "ssd", "fasterrcnn"])
def test_detectors_fold_in_their_parts(kind):
    model = detector(kind, **({"head": {"spiking": False}} if kind == "fasterrcnn" else {})).double()
    images = [torch.rand(3, 64, 90, dtype=torch.float64), torch.rand(3, 71, 64, dtype=torch.float64)]
    folded = fold(model)
    assert type(folded) is type(model)
    assert not [m for m in folded.modules() if isinstance(m, HoyerSpike)]
    with torch.no_grad():
        for ours, expected in zip(folded(images), model(images), strict=True):
            assert all(torch.equal(ours[key], expected[key]) for key in ("boxes", "scores", "labels"))


# --- the comparison itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.5, -0.5])
def test_a_potential_on_the_threshold_fires(gamma):
    """Numbers that every type holds exactly: the threshold itself, and its neighbours on both sides."""
    norm, layer = nn.BatchNorm2d(1, eps=0.0), HoyerSpike(1)
    with torch.no_grad():
        norm.weight.fill_(gamma)
        norm.bias.fill_(0.25)
        layer.v_th.fill_(-2.0)
        layer.extremum.fill_(0.5)
    model = nn.Sequential(norm, layer).eval()
    on = torch.tensor(0.75 / gamma)
    x = torch.stack([torch.nextafter(on, torch.tensor(-9.0)), on, torch.nextafter(on, torch.tensor(9.0))]).view(
        3, 1, 1, 1
    )
    (folded,) = [m for m in fold(model).modules() if isinstance(m, ChannelThreshold)]
    expected = [0.0, 1.0, 1.0] if gamma > 0 else [1.0, 1.0, 0.0]
    assert folded(x).flatten().tolist() == expected
    assert fold(model.double())(x.double()).flatten().tolist() == expected


def test_a_threshold_that_float32_does_not_hold_is_rounded_up():
    exact = torch.tensor([0.1, -0.1, 1 / 3, 0.5, 1e-50], dtype=torch.float64)
    rounded = round_up(exact, torch.float32)
    below = torch.nextafter(rounded, torch.full_like(rounded, float("-inf")))
    assert (rounded.double() >= exact).all() and (below.double() < exact).all()


def test_a_scale_of_zero_is_a_constant():
    norm, layer = nn.BatchNorm2d(3), HoyerSpike(3)
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.copy_(torch.tensor([0.9, 1.0, 1.1]))  # the threshold is 1
    folded = fold(nn.Sequential(norm, layer))
    x = torch.randn(4, 3, 5, 5) * 100
    assert folded(x).mean((0, 2, 3)).tolist() == [0, 1, 1]


# --- integers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_sums_are_integers_and_rates_are_kept(name):
    model = classifier(name)
    images = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    folded = fold(model)
    integers = to_integers(folded, images)
    layers = [m for m in integers.modules() if isinstance(m, (IntegerSpikes, IntegerReal))]
    # All but the first. Twice, for the stream and for spikes straight from their sums: the last of a ResNet's stem, and
    # the last of a MobileNetV2's block that changes the shape in front of one that does not.
    twice = {"resnet18": 1, "resnet50": 1, "mobilenetv2": 3}.get(name, 0)
    expected = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules()) - 1 + twice
    assert len(layers) == expected
    assert all(layer.weight.dtype == torch.int8 and layer.weight.abs().max() <= 127 for layer in layers)
    for layer in layers:
        x = (torch.rand(2, layer.weight.shape[1] * (layer.conv or {"groups": 1})["groups"], 5, 5) < 0.2).float()
        if layer.conv is None:
            x = x[:, :, 0, 0]
            exact = x.double() @ layer.weight.double().t()
        else:
            exact = nn.functional.conv2d(x.double(), layer.weight.double(), **layer.conv)
        assert torch.equal(layer.accumulate(x).double(), exact)
    _, floats = run_and_record(folded, images, ChannelThreshold)
    _, ours = run_and_record(integers, images, (ChannelThreshold, IntegerSpikes))
    rates = torch.stack([s.mean() for s in floats]), torch.stack([s.mean() for s in ours])
    assert sum(s.numel() for s in floats) == sum(s.numel() for s in ours)
    assert abs(rates[0].sort().values - rates[1].sort().values).mean() < 0.03


def test_calibration_brings_a_channel_back_to_its_rate():
    torch.manual_seed(0)
    conv, threshold = nn.Conv2d(16, 8, 3, padding=1), ChannelThreshold(torch.full((8,), 0.2))
    x = (torch.rand(16, 16, 12, 12) < 0.2).float()
    with torch.no_grad():
        rate = threshold(conv(x)).mean((0, 2, 3))
        layer = IntegerSpikes(conv, threshold)
        layer.threshold += 20  # a rounding much worse than that of weights
        before = (layer(x).mean((0, 2, 3)) - rate).abs().max()
        layer.calibrate(x, rate)
        after = (layer(x).mean((0, 2, 3)) - rate).abs().max()
    assert after < 0.005 < before


def test_channels_that_fall_behind_a_pool_are_inverted():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1)
    sign = torch.tensor([1.0, -1, 1, -1, -1, 1])
    threshold, pool = ChannelThreshold(sign * 0.1, sign), nn.MaxPool2d(2)
    x = (torch.rand(4, 4, 10, 10) < 0.3).float()
    for pooling in (pool, None):
        layer = IntegerSpikes(conv, threshold, pooling)
        assert layer.inverted.tolist() == ([False] * 6 if pooling is None else (sign < 0).tolist())
        with torch.no_grad():
            y = conv(x) if pooling is None else pool(conv(x))
            agree = (layer(x) == threshold(y)).float().mean()
        assert agree > 0.98  # weights are rounded, signs are not


def test_analogue_convolutions_round_to_8_bits_if_asked():
    model = detector("retinanet", neck={"out_channels": 16}, head={"num_convs": 1})
    body = fold(model.backbone)
    assert isinstance(body, fx.GraphModule)
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    without, everything = to_integers(body, images), to_integers(body, images, analogue=True)
    assert not any(isinstance(m, QuantisedReal) for m in without.modules())
    layers = [m for m in everything.modules() if isinstance(m, QuantisedReal)]
    assert len(layers) == 5  # three output convolutions and two of the extra maps
    assert all(layer.weight.abs().max() <= 64 for layer in layers)
    with torch.no_grad():
        for ours, expected in zip(everything(images).values(), without(images).values(), strict=True):
            assert 0 < (ours - expected).norm() < 0.3 * expected.norm()


def test_what_cannot_become_integers_is_refused():
    x = torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match="no layer sees spikes"):
        to_integers(fold(classifier(activation="relu")), x)
    with pytest.raises(ValueError, match="is not one graph"):
        to_integers(fold(detector()), x)
    with pytest.raises(ValueError, match="does not divide into the 2x2 cells"):
        fix_size(fold(classifier()), torch.randn(1, 3, 48, 48))
    with pytest.raises(ValueError, match="shape"):
        ChannelThreshold(torch.zeros(3), torch.ones(2))


class ByName(nn.Module):
    """Calls its layers with named arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.spike = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), HoyerSpike(8)

    def forward(self, x):
        return self.spike(u=self.norm(input=self.conv(x)))


def test_layers_that_are_called_by_name_are_folded():
    model, images = scramble(ByName()), torch.randn(2, 3, 9, 9)
    folded = fold(model)
    assert torch.equal(folded(images), model(images)) and isinstance(folded.spike_threshold, ChannelThreshold)


def test_a_folded_network_takes_the_state_of_another():
    one, other = (fold(classifier(seed=seed)) for seed in (0, 1))
    one.load_state_dict(other.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(one(images), other(images))


def test_integers_leave_the_folded_network_as_it_was():
    folded, images = fold(classifier("resnet18").double()), torch.randn(16, 3, 32, 32, dtype=torch.float64)
    before = folded(images)
    integers = to_integers(folded, images, keep="head")
    assert torch.equal(folded(images), before)
    assert not any("head" in name for name, layer in integers.named_modules() if isinstance(layer, IntegerReal))


@pytest.mark.parametrize("analogue", [False, True])
@pytest.mark.parametrize("gamma", [1e-3, 1e-7, 1e-10, 0.0])
def test_a_channel_whose_weights_fade_keeps_its_bias(gamma, analogue):
    """In the unit of weights that small it would not fit into 32 bits."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), HoyerSpike(8), nn.Conv2d(8, 4, 3, bias=False)]
    network = nn.Sequential(*layers, nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).train()
    images = torch.rand(16, 3, 8, 8)
    network(images)
    with torch.no_grad():
        network[4].weight[0], network[4].bias[0] = gamma, 0.5
        network[5].weight.copy_(torch.eye(4)[:2].view(2, 4, 1, 1))
        network[5].bias.zero_()
    folded = fold(network.eval())
    found = to_integers(folded, images, analogue=analogue)(images)[:, 0]
    torch.testing.assert_close(found, folded(images)[:, 0], rtol=0, atol=0.02)
