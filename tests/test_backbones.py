"""The networks: what they declare, what their convolutions see, how their weights come and go."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import backbones
from backbones import Classifier, HoyerSpike, create, hoyer_penalty, load_weights, record_activity, spike_activity
from backbones.networks.base import scale_channels

WIDTH = 0.125
STEMS = ("imagenet", "cifar")
# By family, at WIDTH: 128, 256, 512, 512 channels of a VGG; 64 ... 512 of a ResNet, four times that from resnet50 on.
CHANNELS = {"vgg": (16, 32, 64, 64), "basic": (8, 16, 32, 64), "bottleneck": (32, 64, 128, 256)}
CHANNELS["mobilenet"] = (16, 32, 64, 128)
every_name = pytest.mark.parametrize("name", backbones.names())
every_stem = pytest.mark.parametrize("stem", STEMS)
one_of_each_family = pytest.mark.parametrize("name", ["vgg11", "resnet18", "resnet50", "mobilenetv1"])


def family(name: str) -> str:
    if name in ("resnet18", "resnet20", "resnet34"):
        return "basic"
    return "bottleneck" if name.startswith("resnet") else name.rstrip("0123456789").removesuffix("v")


def images(stem: str, num: int = 2, seed: int = 1) -> Tensor:
    size = 64 if stem == "imagenet" else 32
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(seed))


def classifier(name: str, stem: str, seed: int = 0, **options) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(create(name, stem=stem, width=WIDTH, **options), 10)


def with_statistics(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, every running average being that of one batch, so that its layers fire."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = None  # a plain mean over the batches
    with torch.no_grad():
        model.train()(images("cifar", 4, seed=2).to(next(model.parameters()).dtype))
    return model.eval()


def synapses(model: nn.Module) -> dict[str, nn.Module]:
    """Convolutions and linear layers by name, in the order in which they are built."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}


def is_binary(x: Tensor) -> bool:
    return bool(((x == 0) | (x == 1)).all())


def inputs_of_synapses(model: nn.Module, x: Tensor) -> tuple[set[str], set[str], set[str]]:
    """Names of the synaptic layers that ran, of those that saw anything but 0 and 1, and of those that saw only 0."""
    seen, real, silent = set(), set(), set()

    def hook(name: str):
        def check(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.add(name)
            if not is_binary(inputs[0]):
                real.add(name)
            if not inputs[0].any():
                silent.add(name)

        return check

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in synapses(model).items()]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen, real, silent


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_equal_state(state: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert state.keys() == other.keys()
    for key, value in state.items():
        assert torch.equal(value, other[key]), key


# What a network declares


def test_names():
    vggs, resnets = (11, 13, 16, 19), (18, 20, 34, 50, 101, 152)
    published = ["mobilenetv1", *(f"resnet{depth}" for depth in resnets), *(f"vgg{depth}" for depth in vggs)]
    assert backbones.names() == published


@every_name
@every_stem
@pytest.mark.parametrize("size", [(64, 96), (65, 103)], ids=["even", "odd"])
def test_maps_are_as_declared_and_real_valued(name, stem, size):
    torch.manual_seed(0)
    backbone = create(name, stem=stem, width=WIDTH)
    if stem == "cifar":
        size = (size[0] // 2 + size[0] % 2, size[1] // 2)  # (32, 48) and (33, 51)
    maps = backbone(torch.randn(2, 3, *size))
    strides = (4, 8, 16, 32) if stem == "imagenet" else (4, 8, 16, 16) if family(name) == "vgg" else (2, 4, 8, 16)
    rounded = math.floor if family(name) == "vgg" else math.ceil
    assert tuple(backbone.feature_info) == tuple(
        zip(("c2", "c3", "c4", "c5"), CHANNELS[family(name)], strides, strict=True)
    )
    assert list(maps) == [info.name for info in backbone.feature_info]
    for info in backbone.feature_info:
        height, width = (rounded(side / info.stride) for side in size)
        assert maps[info.name].shape == (2, info.channels, height, width), info
        assert not is_binary(maps[info.name]), info
        assert (maps[info.name] < 0).any(), info  # a membrane potential, not a rectified one


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "resnet50"])
def test_truncated_backbone_gives_the_same_maps_up_to_there(name):
    torch.manual_seed(0)
    whole = backbones.create(name, width=0.125).eval()
    torch.manual_seed(0)
    part = backbones.create(name, width=0.125).eval()
    part.truncate("c3")
    assert [info.name for info in part.feature_info] == ["c2", "c3"]
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected, found = whole(x), part(x)
    assert list(found) == ["c2", "c3"]
    assert all(torch.equal(found[key], expected[key]) for key in found)
    assert sum(p.numel() for p in part.parameters()) < sum(p.numel() for p in whole.parameters()) / 2
    with pytest.raises(ValueError, match=r"no map 'c4' \(allowed: c2, c3\)"):
        part.truncate("c4")


@one_of_each_family
def test_images_with_another_number_of_channels(name):
    backbone = create(name, in_channels=2, stem="cifar", width=WIDTH)
    assert backbone(torch.randn(2, 2, 32, 32))["c5"].shape[0] == 2
    assert next(iter(synapses(backbone).values())).in_channels == 2


@pytest.mark.parametrize(
    ("channels", "width", "expected"),
    # 6.4 -> 8 (the least), 12.8 -> 16, 25.6 -> 24, 51.2 -> 48: the nearest multiple of 8
    [(64, 0.1, 8), (128, 0.1, 16), (256, 0.1, 24), (512, 0.1, 48), (64, 0.001, 8), (64, 1.5, 96), (512, 1.0, 512)],
)
def test_width_rounds_to_multiples_of_eight(channels, width, expected):
    assert scale_channels(channels, width) == expected


def test_width_scales_every_map():
    with torch.device("meta"):
        assert [info.channels for info in create("vgg16", width=0.1).feature_info] == [16, 24, 48, 48]
        assert [info.channels for info in create("resnet18", width=0.1).feature_info] == [8, 16, 24, 48]
        assert [info.channels for info in create("resnet50", width=0.1).feature_info] == [32, 64, 96, 192]
        assert [info.channels for info in create("resnet50").feature_info] == [256, 512, 1024, 2048]


# How a network is built


def vgg16_parameters(num_classes: int, side: int) -> int:
    """By hand: 13 convolutions 3x3 without bias, BN after each, 3 linear layers without bias, v_th of 15 layers."""
    widths = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    convolutions = sum(9 * c_in * c_out for c_in, c_out in zip([3, *widths], widths, strict=False))  # 14,710,464
    norms = 2 * sum(widths)  # 8,448
    linear = 512 * side**2 * 4096 + 4096 * 4096 + 4096 * num_classes
    thresholds = 12 + 3  # between 13 convolutions; in front of 3 linear layers
    return convolutions + norms + linear + thresholds


def resnet18_parameters(num_classes: int) -> int:
    """By hand: stem, 4 stages of 4 single-convolution blocks, 3 shortcuts, head."""
    total = 7 * 7 * 3 * 64 + 2 * 64
    c_in = 64
    for c in (64, 128, 256, 512):
        if c != c_in:
            total += 2 * c_in + 1 + c_in * c  # shortcut: BN, v_th, convolution 1x1
        total += (1 + 9 * c_in * c + 2 * c) + 3 * (1 + 9 * c * c + 2 * c)  # v_th, convolution 3x3, BN
        c_in = c
    return total + 1 + 512 * num_classes + num_classes


@pytest.mark.parametrize(
    ("name", "stem", "num_classes", "derived", "expected"),
    [
        ("vgg16", "cifar", 10, vgg16_parameters(10, 2), 39_925_711),
        ("vgg16", "imagenet", 1000, vgg16_parameters(1000, 7), 138_352_591),
        ("resnet18", "imagenet", 1000, resnet18_parameters(1000), 11_688_636),
    ],
)
def test_number_of_parameters(name, stem, num_classes, derived, expected):
    with torch.device("meta"):
        model = Classifier(create(name, stem=stem), num_classes)
    assert derived == expected
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_vgg_layer_shapes():
    with torch.device("meta"):
        model = Classifier(create("vgg16", stem="cifar"), 10)
    linear = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear)]
    assert linear == [(4096, 2048), (4096, 4096), (10, 4096)]
    assert all(m.bias is None for m in synapses(model).values())
    convolutions = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert convolutions == [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    assert sum(isinstance(m, nn.MaxPool2d) for m in model.modules()) == 4
    with torch.device("meta"):
        assert sum(isinstance(m, nn.MaxPool2d) for m in create("vgg16").modules()) == 5


def kinds(sequence: nn.Module) -> list[str]:
    short = {"Conv2d": "conv", "MaxPool2d": "pool", "BatchNorm2d": "norm", "HoyerSpike": "spike"}
    return [short.get(type(module).__name__, type(module).__name__) for module in sequence]


def test_order_of_layers_in_a_vgg():
    with torch.device("meta"):
        backbone = create("vgg13", stem="cifar", width=WIDTH)
    first, *pooled, last = [kinds(stage) for stage in backbone.stages]
    assert first == ["conv", "norm", "spike", "conv", "pool", "norm"]
    assert pooled == [["spike", "conv", "norm", "spike", "conv", "pool", "norm"]] * 3
    assert last == ["spike", "conv", "norm", "spike", "conv", "norm"]


def test_order_of_layers_in_a_resnet():
    with torch.device("meta"):
        basic = create("resnet18", stem="cifar", width=WIDTH)
        bottleneck = create("resnet50", stem="imagenet", width=WIDTH)
    assert kinds(basic.stem) == ["conv", "norm", "spike", "conv", "norm", "spike", "conv", "pool", "norm"]
    assert kinds(bottleneck.stem) == ["conv", "pool", "norm"]
    for backbone, branch, stages in (
        (basic, "spike conv norm", (4, 4, 4, 4)),
        (bottleneck, "norm spike conv " * 3, (3, 4, 6, 3)),
    ):
        assert tuple(len(stage) for stage in backbone.stages) == stages
        for index, stage in enumerate(backbone.stages):
            assert all(kinds(block.branch) == branch.split() for block in stage)
            assert all(isinstance(block.shortcut, nn.Identity) for block in stage[1:])
            if index:
                assert kinds(stage[0].shortcut) == ["pool", "norm", "spike", "conv"]
    assert isinstance(basic.stages[0][0].shortcut, nn.Identity)
    assert kinds(bottleneck.stages[0][0].shortcut) == ["norm", "spike", "conv"]


@every_name
def test_number_of_layers_is_the_one_in_the_name(name):
    # Counted are convolutions and linear layers without the shortcuts' 1x1 convolutions.
    stem = "cifar" if name == "resnet20" else "imagenet"
    shortcuts = {"vgg": 0, "basic": 3, "bottleneck": 4, "mobilenet": 0}[family(name)]
    named = 28 if family(name) == "mobilenet" else int(name.lstrip("vgresnt"))
    counts = []
    for _ in range(2):  # the second network must not find anything that the first one left
        with torch.device("meta"):
            model = Classifier(create(name, stem=stem, width=WIDTH), 10)
        assert len(synapses(model)) == named + shortcuts
        counts.append([type(module) for module in model.modules()])
    assert counts[0] == counts[1]


@every_name
@every_stem
def test_the_analogue_twin_has_the_same_topology(name, stem):
    with torch.device("meta"):
        spiking, fixed, twin = (
            Classifier(create(name, stem=stem, width=WIDTH, activation=activation), 10)
            for activation in ("hoyer", "fixed", "relu")
        )
    spikes = {name for name, module in spiking.named_modules() if isinstance(module, HoyerSpike)}
    assert spikes == {name for name, module in twin.named_modules() if isinstance(module, nn.ReLU)}
    assert spikes == {name for name, module in fixed.named_modules() if isinstance(module, HoyerSpike) and module.fixed}
    assert not any(isinstance(module, HoyerSpike) for module in twin.modules())
    shapes = {key: value.shape for key, value in spiking.state_dict().items() if key.rpartition(".")[0] not in spikes}
    assert shapes == {key: value.shape for key, value in twin.state_dict().items()}


@one_of_each_family
def test_options_reach_every_spike_layer(name):
    with torch.device("meta"):
        model = Classifier(create(name, width=WIDTH, extremum="channel", momentum=0.3), 10)
    layers = [module for module in model.modules() if isinstance(module, HoyerSpike)]
    assert len(layers) >= 10
    assert all(layer.per_channel and layer.momentum == 0.3 and not layer.fixed for layer in layers)
    assert all(layer.extremum.shape == (layer.channels,) for layer in layers)


@one_of_each_family
def test_the_same_seed_gives_the_same_weights(name):
    assert_equal_state(classifier(name, "cifar").state_dict(), classifier(name, "cifar").state_dict())
    other = classifier(name, "cifar", seed=1).state_dict()
    first = next(iter(other))
    assert not torch.equal(other[first], classifier(name, "cifar").state_dict()[first])


# What a network computes


@every_name
@every_stem
def test_every_parameter_gets_a_gradient(name, stem):
    model = classifier(name, stem)
    loss = F.cross_entropy(model(images(stem)), torch.tensor([1, 2]))
    (loss + 1e-2 * hoyer_penalty(model, "mean")).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@every_name
@every_stem
def test_every_layer_but_the_first_convolution_sees_spikes(name, stem):
    model = classifier(name, stem)
    layers = list(synapses(model))
    assert len(layers) >= 11
    for mode in (True, False):  # the training pass leaves the averages that evaluation needs
        seen, real, silent = inputs_of_synapses(model.train(mode), images("cifar"))
        assert seen == set(layers)
        assert real == {layers[0]}
        assert not silent or not mode


@one_of_each_family
def test_the_layers_of_the_analogue_twin_see_real_values(name):
    model = with_statistics(classifier(name, "cifar", activation="relu"))
    seen, real, _ = inputs_of_synapses(model, images("cifar"))
    assert real == seen == set(synapses(model))


@one_of_each_family
def test_dropout_leaves_the_convolutions_alone_and_is_off_in_evaluation(name):
    torch.manual_seed(0)
    model = Classifier(create(name, stem="cifar", width=WIDTH), 10, dropout=0.5)
    linear = {key for key, module in synapses(model).items() if isinstance(module, nn.Linear)}
    first, *_ = synapses(model)
    _, real, _ = inputs_of_synapses(model, images("cifar"))
    assert real == {first} | linear  # scaled by 1 / (1 - p)
    _, real, _ = inputs_of_synapses(model.eval(), images("cifar"))
    assert real == {first}


@every_name
def test_evaluation_does_not_depend_on_batch_mates(name):
    model = with_statistics(classifier(name, "cifar"))
    first, second = images("cifar", 2), images("cifar", 2)
    second[1] = 0.1 * images("cifar", 1, seed=3)[0]
    with torch.no_grad():
        out = model(first)
        assert out[0].std() > 0
        assert not torch.equal(out[0], out[1])
        assert torch.equal(out[0], model(second)[0])
        model.train()
        assert not torch.equal(model(first)[0], model(second)[0])  # so the comparison can fail


@one_of_each_family
def test_evaluation_of_an_image_alone(name):
    model = with_statistics(classifier(name, "cifar").double())  # in double no spike hangs on the order of a sum
    x = images("cifar", 3).double()
    with torch.no_grad():
        torch.testing.assert_close(model(x[:1]), model(x)[:1])


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


# Wrong arguments


def test_unknown_name_lists_the_allowed_ones():
    with pytest.raises(ValueError, match="'vgg12'") as error:
        create("vgg12")
    assert all(name in str(error.value) for name in backbones.names())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "coco"}, "'imagenet' or 'cifar', got 'coco'"),
        ({"activation": "gelu"}, "'hoyer', 'relu', 'fixed', 'graded', got 'gelu'"),
        ({"extremum": "row"}, "'layer' or 'channel', got 'row'"),
        ({"width": 0}, "width must be positive, got 0"),
        ({"width": -0.5}, "width must be positive, got -0.5"),
        ({"width": float("nan")}, "width must be positive, got nan"),
        ({"momentum": 0}, r"momentum must be in \(0, 1\], got 0"),
    ],
)
@pytest.mark.parametrize("name", ["vgg11", "resnet18"])
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        create(name, **options)


# Weights


def trained(name: str) -> Classifier:
    """A classifier whose running averages differ from a new one's."""
    return with_statistics(classifier(name, "cifar", seed=3))


@one_of_each_family
def test_weights_load_bit_equal_from_every_source(name, tmp_path):
    model = trained(name)
    expected = snapshot(model.backbone)
    assert any(key.endswith(".extremum") and value.item() < 1 for key, value in expected.items())
    detector = {f"backbone.body.{key}": value for key, value in expected.items()}
    detector |= {"backbone.fpn.weight": torch.ones(3), "head.weight": torch.ones(2)}
    save_file(expected, tmp_path / "backbone.safetensors")
    save_file(model.state_dict(), tmp_path / "classifier.safetensors")
    sources = {
        "backbone": expected,
        "classifier": model.state_dict(),
        "detector": detector,
        "file": tmp_path / "backbone.safetensors",
        "name of a file": str(tmp_path / "classifier.safetensors"),
    }
    for source in sources.values():
        torch.manual_seed(5)
        backbone = create(name, stem="cifar", width=WIDTH, weights=source)
        assert_equal_state(backbone.state_dict(), expected)
    x = images("cifar")
    model.eval()
    with torch.no_grad():
        assert torch.equal(backbone.eval()(x)["c5"], model.backbone(x)["c5"])


def test_loaded_weights_are_copies():
    state = trained("vgg11").backbone.state_dict()
    backbone = create("vgg11", stem="cifar", width=WIDTH, weights=state)
    before = {key: value.clone() for key, value in state.items()}
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.zero_()
    assert_equal_state(state, before)


# The second convolution of a VGG11, 8 -> 16 channels at WIDTH
KEY = "stages.1.1.weight"


def without_key(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key != KEY}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_key, rf"'{KEY}' is missing"),
        (lambda state: state | {"stages.1.1.bias": torch.ones(16)}, r"'stages\.1\.1\.bias' is unknown"),
        (lambda state: state | {KEY: torch.ones(2, 3)}, rf"'{KEY}' has the shape \(2, 3\), .* \(16, 8, 3, 3\)"),
        (lambda state: without_key(state) | {"extra": torch.ones(1)}, rf"'{KEY}' is missing \(and 1 more\)"),
        (lambda state: {}, r"'stages\.0\.0\.weight' is missing"),
    ],
    ids=["missing", "unknown", "shape", "two", "empty"],
)
@pytest.mark.parametrize("prefix", ["", "backbone.", "backbone.body."])
def test_weights_that_do_not_fit_are_named_and_change_nothing(damage, message, prefix, tmp_path):
    state = damage(snapshot(trained("vgg11").backbone))
    state = {prefix + key: value for key, value in state.items()}
    save_file(state, tmp_path / "damaged.safetensors")
    backbone = classifier("vgg11", "cifar").backbone
    before = snapshot(backbone)
    with pytest.raises(ValueError, match="state dict.*" + message):
        load_weights(backbone, state)
    with pytest.raises(ValueError, match=r"damaged\.safetensors.*" + message):
        load_weights(backbone, tmp_path / "damaged.safetensors")
    assert_equal_state(backbone.state_dict(), before)


def test_weights_of_another_stem_width_extremum_or_activation_do_not_fit():
    spiking = create("resnet18", stem="cifar", width=WIDTH).state_dict()
    for options, key in (
        ({"stem": "imagenet"}, r"stem\.2\.weight"),
        ({"width": 0.25}, r"stem\.0\.weight"),
        ({"extremum": "channel"}, "extremum"),
        ({"activation": "relu"}, "v_th"),
    ):
        with pytest.raises(ValueError, match=rf"{key}'"):
            create("resnet18", **({"stem": "cifar", "width": WIDTH} | options), weights=spiking)


def test_weights_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        create("vgg11", stem="cifar", width=WIDTH, weights=tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("content", [b"", b"no weights at all, but more than eight bytes"], ids=["empty", "text"])
def test_weights_file_that_is_not_safetensors(content, tmp_path):
    path = tmp_path / "text.safetensors"
    path.write_bytes(content)
    backbone = classifier("vgg11", "cifar").backbone
    before = snapshot(backbone)
    with pytest.raises(ValueError, match=r"text\.safetensors: damaged weights file"):
        load_weights(backbone, path)
    assert_equal_state(backbone.state_dict(), before)


# In other projects


def test_import_brings_nothing_but_torch():
    code = """
import sys
import torch
before = set(sys.modules)
import backbones
backbones.create("vgg11", stem="cifar", width=0.125)
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=root)
    assert run.returncode == 0, run.stderr
    new, loaded = (set(line.split()) for line in run.stdout.splitlines())
    assert new - sys.stdlib_module_names - {"torch", "numpy"} == {"backbones"}
    others = {"torchvision", "albumentations", "pydantic", "detection", "PIL", "cv2", "safetensors", "yaml", "rich"}
    assert not loaded & others


class PoolC5(nn.Module):
    """(N, channels) from the last map of a backbone."""

    def forward(self, maps: dict[str, Tensor]) -> Tensor:
        return maps["c5"].mean(dim=(2, 3))


def spiking_perceptron() -> nn.Sequential:
    return nn.Sequential(
        *[nn.Flatten(), nn.Linear(3 * 32 * 32, 16), nn.BatchNorm1d(16), HoyerSpike(16)],
        *[nn.Linear(16, 16), nn.BatchNorm1d(16), HoyerSpike(16, per_channel=True), nn.Linear(16, 3)],
    )


def backbone_and_pool() -> nn.Sequential:
    return nn.Sequential(create("resnet20", stem="cifar", width=WIDTH), PoolC5(), nn.Linear(64, 3))


@pytest.mark.parametrize("build", [spiking_perceptron, backbone_and_pool])
def test_one_training_step_inside_a_sequential(build):
    torch.manual_seed(0)
    model = build()
    x, y = images("cifar", 4), torch.tensor([0, 1, 2, 0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y) + 1e-3 * hoyer_penalty(model, "mean")

    before = loss()
    parameters = snapshot(model)
    before.backward()
    optimizer.step()
    for key, parameter in model.named_parameters():
        assert parameter.isfinite().all(), key
        if not key.endswith(("1.bias", "4.bias")):  # of a linear layer in front of a BN, which takes it out again
            assert not torch.equal(parameter, parameters[key]), key
    assert loss().isfinite()


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "resnet50"])
@every_stem
def test_norm_before_pool_has_the_same_maps_and_parameters(name, stem):
    published, swapped = (create(name, stem=stem, width=WIDTH, pool_first=first) for first in (True, False))
    x = images(stem)
    shapes = [{key: value.shape for key, value in network(x).items()} for network in (published, swapped)]
    assert shapes[0] == shapes[1]
    assert swapped.feature_info == published.feature_info
    assert sorted(p.shape for p in swapped.parameters()) == sorted(p.shape for p in published.parameters())

    def neighbours(network: nn.Module) -> list[tuple[bool, bool]]:
        """Of every pooling: is there a BatchNorm just before, and just after?"""
        found = []
        for sequence in (module for module in network.modules() if isinstance(module, nn.Sequential)):
            kinds = [None, *(type(layer) for layer in sequence), None]
            places = [place for place, kind in enumerate(kinds) if kind is nn.MaxPool2d]
            found += [(kinds[p - 1] is nn.BatchNorm2d, kinds[p + 1] is nn.BatchNorm2d) for p in places]
        return found

    assert set(neighbours(published)) == {(False, True)}
    assert neighbours(swapped) == [(True, False)] * len(neighbours(published))


def test_mobilenet_has_no_pooling_to_move():
    with pytest.raises(ValueError, match="pool_first must be True for mobilenetv1"):
        create("mobilenetv1", pool_first=False)


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
