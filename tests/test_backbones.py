"""The networks: what they declare, what their convolutions see, the published ones layer by layer."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import backbones
from backbones import Classifier, HoyerSpike, create, hoyer_penalty
from backbones.networks.base import scale_channels

WIDTH = 0.125
STEMS = ("imagenet", "cifar")
# By family, at WIDTH: 128, 256, 512, 512 channels of a VGG; 64 ... 512 of a ResNet, four times that from resnet50 on.
CHANNELS = {"vgg": (16, 32, 64, 64), "basic": (8, 16, 32, 64), "bottleneck": (32, 64, 128, 256)}
CHANNELS |= {"mobilenetv1": (16, 32, 64, 128), "mobilenetv2": (8, 8, 16, 40)}
every_name = pytest.mark.parametrize("name", backbones.names())
every_stem = pytest.mark.parametrize("stem", STEMS)
one_of_each_family = pytest.mark.parametrize("name", ["vgg11", "resnet18", "resnet50", "mobilenetv1", "mobilenetv2"])


def family(name: str) -> str:
    if name in ("resnet18", "resnet20", "resnet34"):
        return "basic"
    return "bottleneck" if name.startswith("resnet") else "vgg" if name.startswith("vgg") else name


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
    vggs, resnets = (9, 11, 13, 16, 19), (18, 20, 34, 50, 101, 152)
    published = [
        "mobilenetv1",
        "mobilenetv2",
        *(f"resnet{depth}" for depth in resnets),
        *(f"vgg{depth}" for depth in vggs),
    ]
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
    of_cifar = {"vgg": (4, 8, 16, 16), "mobilenetv2": (1, 1, 2, 4)}.get(family(name), (2, 4, 8, 16))
    strides = (4, 8, 16, 32) if stem == "imagenet" else of_cifar
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
    whole = create(name, width=0.125).eval()
    torch.manual_seed(0)
    part = create(name, width=0.125).eval()
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
    shortcuts = {"basic": 3, "bottleneck": 4}.get(family(name), 0)
    named = {"mobilenetv1": 28, "mobilenetv2": 53}.get(name) or int(name.lstrip("vgresnt"))
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
    assert len(layers) >= (9 if name == "vgg9" else 11)
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


def test_a_classifier_normalises_images_between_0_and_1():
    mean, std, x = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), torch.rand(2, 3, 32, 32)
    backbone = create("vgg11", stem="cifar", width=WIDTH)
    model, bare = Classifier(backbone, 10, mean=mean, std=std), Classifier(backbone, 10)
    bare.head = model.head
    assert model.state_dict().keys() == bare.state_dict().keys()
    by_hand = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(model.normalise(x), by_hand, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), bare.eval()(model.normalise(x)))
        assert torch.equal(bare(x), bare.head(backbone(x)["c5"]))  # comes normalised
    for half in ({"mean": mean}, {"std": std}):
        with pytest.raises(ValueError, match="mean and std belong together"):
            Classifier(backbone, 10, **half)


@one_of_each_family
def test_parts_are_the_network_in_its_order(name):
    backbone, x = with_statistics(create(name, stem="cifar", width=WIDTH)), images("cifar")
    parts = backbone.parts()
    maps = [info.name for info in backbone.feature_info]
    assert list(parts)[-len(maps) :] == maps and (next(iter(parts)) == "stem") == (not name.startswith("vgg"))
    assert sum(count(part) for part in parts.values()) == count(backbone)
    with torch.no_grad():
        expected = backbone(x)
        for key, part in parts.items():
            x = part(x)
            assert key not in expected or torch.equal(x, expected[key])
    with pytest.raises(ValueError, match=r"no map 'c9' \(allowed: c2, c3, c4, c5\)"):
        backbone.truncate("c9")


# Wrong arguments


def test_unknown_name_lists_the_allowed_ones():
    with pytest.raises(ValueError, match="'vgg12'") as error:
        create("vgg12")
    assert all(name in str(error.value) for name in backbones.names())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "coco"}, "'imagenet' or 'cifar', got 'coco'"),
        ({"activation": "gelu"}, "'hoyer', 'relu', 'fixed', 'graded', 'sign', got 'gelu'"),
        ({"extremum": "row"}, "'layer' or 'channel', got 'row'"),
        ({"width": 0}, "width must be positive and finite, got 0"),
        ({"width": -0.5}, "width must be positive and finite, got -0.5"),
        ({"width": float("inf")}, "width must be positive and finite, got inf"),
        ({"width": float("nan")}, "width must be positive and finite, got nan"),
        ({"momentum": 0}, r"momentum must be in \(0, 1\], got 0"),
        ({"momentum": "a"}, r"momentum must be in \(0, 1\], got 'a'"),
        ({"width": "0.5"}, "width must be positive and finite, got '0.5'"),
        ({"in_channels": 0}, "in_channels must be a whole number from 1 on, got 0"),
        ({"in_channels": "3"}, "in_channels must be a whole number from 1 on, got '3'"),
        ({"frames": 1.0}, "frames must be a whole number from 1 on, got 1.0"),
        ({"pool_first": "no"}, "pool_first must be True or False, got 'no'"),
        ({"window": (0,)}, r"window must have two ends, such as \(0.0, 2.0\), got \(0,\)"),
        ({"activation": ["hoyer"]}, r"'sign', got \['hoyer'\]"),
        ({"activation": ""}, "'sign', got ''"),
        ({"activation": "graded", "levels": "4"}, "levels must be in 2..16, got '4'"),
        ({"arithmetic": ["binary"]}, r"'adder', got \['binary'\]"),
        ({"time_steps": float("nan")}, "time_steps must be a whole number from 1 on, got nan"),
        ({"weights": 1}, "weights must be a path, 'zoo:NAME' or a state dict, got 1"),
    ],
)
@pytest.mark.parametrize("name", ["vgg11", "resnet18"])
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        create(name, **options)


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


@pytest.mark.parametrize("name", ["mobilenetv1", "mobilenetv2"])
def test_mobilenet_has_no_pooling_to_move(name):
    with pytest.raises(ValueError, match=f"pool_first must be True for {name}"):
        create(name, pool_first=False)


# Published networks


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_published_vgg16_has_its_layers_and_parameters():
    """CIFAR: 13 convolutions, 4 poolings, then 2048 -> 4096 -> 4096 -> 10 without bias."""
    model = Classifier(create("vgg16", stem="cifar"), 10)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    plan = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    assert [(layer.in_channels, layer.out_channels) for layer in convs] == list(zip([3, *plan[:-1]], plan, strict=True))
    assert all(layer.kernel_size == (3, 3) and layer.bias is None for layer in convs)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linears] == [(4096, 2048), (4096, 4096), (10, 4096)]
    assert all(layer.bias is None for layer in linears)
    assert sum(isinstance(module, nn.MaxPool2d) for module in model.modules()) == 4
    spikes = [module for module in model.modules() if isinstance(module, HoyerSpike)]
    assert len(spikes) == 15  # one after each convolution, two between the linear layers
    weights = 9 * sum(a * b for a, b in zip([3, *plan[:-1]], plan, strict=True))
    assert weights == 14_710_464
    # weights, BN's scale and shift, the linear layers, a threshold per spike layer
    assert count(model) == weights + 2 * sum(plan) + 4096 * (2048 + 4096 + 10) + 15 == 39_925_711


def test_published_resnet18_has_its_layers_and_parameters():
    """Stages of 4, 4, 4, 4 one-convolution blocks; CIFAR stem of three convolutions; 1x1 shortcuts; one linear."""
    model = Classifier(create("resnet18", stem="cifar"), 10)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    shapes = [(layer.out_channels, layer.in_channels, layer.kernel_size[0], layer.stride[0]) for layer in convs]
    expected = [(64, 3, 3, 1), (64, 64, 3, 1), (64, 64, 3, 1)] + [(64, 64, 3, 1)] * 4
    for channels in (128, 256, 512):
        expected += [(channels, channels // 2, 1, 1), (channels, channels // 2, 3, 2)]
        expected += [(channels, channels, 3, 1)] * 3
    assert shapes == expected
    spikes = [module for module in model.modules() if isinstance(module, HoyerSpike)]
    assert len(spikes) == 2 + 16 + 3 + 1  # stem, blocks, shortcuts, head
    weights = sum(out * into * size * size for out, into, size, _ in expected)
    norms = 2 * (3 * 64 + 4 * 64 + 4 * (128 + 256 + 512) + (64 + 128 + 256))
    assert count(model) == weights + norms + 22 + 5130 == 11_247_072


@pytest.mark.parametrize("name", ["vgg16", "resnet18"])
def test_published_networks_at_imagenet_size(name):
    model = Classifier(create(name), 1000)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    expected = [(4096, 25088), (4096, 4096), (1000, 4096)] if name == "vgg16" else [(1000, 512)]
    assert [tuple(layer.weight.shape) for layer in linears] == expected
    pools = [module for module in model.modules() if isinstance(module, nn.MaxPool2d)]
    assert len(pools) == (5 if name == "vgg16" else 4)
