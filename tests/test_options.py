"""Options beside the published networks: real shortcuts, BatchNorm in front, heads, window and scope of thresholds.

Each by hand, and then through fold, integers, certificate, energy and ONNX.
"""

import contextlib
import copy

import pytest
import torch
from test_backbones import kinds, with_statistics
from test_fold import ChannelThreshold, HoyerSpike, run_and_record, scramble
from test_recompute import trained
from torch import nn

import backbones
from backbones import certify, energy, fold, hoyer_penalty, measure_activity, spike, spike_layers
from backbones.deploy.events import using
from backbones.deploy.integer import IntegerReal, IntegerSpikes, fix_size, to_integers
from backbones.networks.resnet import RealShortcut
from backbones.recompute import recompute_activations
from detection.config import read_recipe
from detection.exporters import check_onnx, run_nir, to_nir, to_onnx
from detection.tasks import task_of
from detection.tasks.recipes import ClassificationRecipe

OPTIONS = {
    "real": ("resnet18", {"shortcut": "real"}),
    "real bottleneck": ("resnet50", {"shortcut": "real"}),
    "norm first": ("resnet18", {"norm_first": True}),
    "both": ("resnet18", {"shortcut": "real", "norm_first": True, "pool_first": False}),
    "normalised": ("vgg11", {"head": "normalised"}),
    "pooled": ("vgg11", {"head": "pooled"}),
    "window": ("vgg11", {"window": (-0.5, 1.5)}),
    "threshold": ("resnet18", {"threshold": "channel"}),
    "both scopes": ("vgg11", {"threshold": "channel", "extremum": "channel", "head": "normalised"}),
}
every_option = pytest.mark.parametrize(("name", "options"), OPTIONS.values(), ids=OPTIONS)


def classifier(name: str, seed: int = 0, **options) -> backbones.Classifier:
    torch.manual_seed(seed)
    model = backbones.Classifier(backbones.create(name, width=0.125, stem="cifar", **options), 10)
    scramble(model, seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.weight, 0.6, 0.6)
            nn.init.normal_(module.running_mean, 0, 0.3)
    return model


# By hand


def test_a_real_shortcut_averages_2x2_and_repeats_the_channels():
    shortcut = RealShortcut(2, 4, 2)
    assert not list(shortcut.parameters()) and not list(shortcut.buffers())
    x = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])
    found = shortcut(torch.stack([x, -10 * x])[None])
    # Cells at the odd border are means of what is there: (3 + 6) / 2, (7 + 8) / 2, 9.
    first = torch.tensor([[3.0, 4.5], [7.5, 9.0]])
    assert torch.equal(found, torch.stack([first, -10 * first, first, -10 * first])[None])
    assert torch.equal(RealShortcut(2, 4, 1)(x.expand(1, 2, 3, 3)), x.expand(1, 4, 3, 3))
    with pytest.raises(ValueError, match="40 channels are no multiple of 16; change the width"):
        backbones.create("resnet18", width=0.3, shortcut="real")


def test_a_real_shortcut_keeps_the_residual_stream():
    """With branches that give 0 the maps of each stage are averages of the stem's, its channels side by side."""
    model = backbones.create("resnet18", width=0.125, stem="cifar", shortcut="real").eval()
    for module in model.stages.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        maps, stream = model(x), model.stem(x)
        for index, name in enumerate(("c2", "c3", "c4", "c5")):
            if index:
                stream = nn.functional.avg_pool2d(stream, 2).repeat(1, 2, 1, 1)
            torch.testing.assert_close(maps[name], stream)
    spiking = backbones.create("resnet18", width=0.125, stem="cifar")
    assert len(spike_layers(spiking)) - len(spike_layers(model)) == 3  # one of each stage change
    assert not [key for key in model.state_dict() if "shortcut" in key]


def test_order_of_layers_with_the_norm_in_front():
    with torch.device("meta"):
        basic = backbones.create("resnet18", width=0.125, stem="cifar", norm_first=True)
        bottleneck = [backbones.create("resnet50", width=0.125, norm_first=first) for first in (False, True)]
    assert all(kinds(block.branch) == ["norm", "spike", "conv", "norm"] for stage in basic.stages for block in stage)
    assert kinds(basic.stages[1][0].shortcut) == ["pool", "norm", "spike", "conv"]
    assert str(bottleneck[0]) == str(bottleneck[1])  # it has one there in any case


def test_strides_in_place_of_the_pooling_of_a_vgg():
    torch.manual_seed(0)
    backbone = backbones.create("vgg9", width=0.125, stem="cifar", pooling="stride")
    strides = [[each.stride[0] for each in stage if isinstance(each, nn.Conv2d)] for stage in backbone.stages]
    assert (
        strides == [[2], [2], [1, 2], [2], [1]]
        and backbone.feature_info == backbones.create("vgg9", width=0.125, stem="cifar").feature_info
    )
    assert not any(isinstance(each, nn.MaxPool2d) for each in backbone.modules())
    images = torch.rand(2, 3, 33, 33)
    backbone(images)
    assert [tuple(x.shape[2:]) for x in backbone.eval()(images).values()] == [(9, 9), (5, 5), (3, 3), (3, 3)]
    model = backbones.Classifier(backbone.double(), 4).double().eval()
    found, folded = model(images.double()), backbones.fold(model)
    torch.testing.assert_close(folded(images.double()), found)


def test_heads_of_a_vgg():
    linear, normalised, pooled = (
        backbones.Classifier(backbones.create("vgg11", width=0.125, stem="cifar", head=head), 10).head
        for head in ("linear", "normalised", "pooled")
    )
    layers = [type(each).__name__ for each in linear if not isinstance(each, nn.Dropout)]
    assert " ".join(layers) == "AdaptiveAvgPool2d HoyerSpike Flatten Linear HoyerSpike Linear HoyerSpike Linear"
    layers = [type(each).__name__ for each in normalised if not isinstance(each, nn.Dropout)]
    first, *_, last = "Linear BatchNorm1d HoyerSpike", "Linear"
    assert " ".join(layers) == f"AdaptiveAvgPool2d HoyerSpike Flatten {first} {first} {last}"
    assert [tuple(each.weight.shape) for each in normalised if isinstance(each, nn.Linear)] == [
        (512, 256),
        (512, 512),
        (10, 512),
    ]
    assert " ".join(type(each).__name__ for each in pooled) == "AdaptiveAvgPool2d HoyerSpike Flatten Dropout Linear"
    assert pooled[0].output_size == 1 and tuple(pooled[-1].weight.shape) == (10, 64)
    features = torch.full((2, 64, 4, 4), 0.25)
    features[:, :32, 0, 0] = 12.25  # of which the mean is 1, the threshold
    pooled.eval()
    expected = pooled[-1].weight[:, :32].sum(1) + pooled[-1].bias
    torch.testing.assert_close(pooled(features), expected.expand(2, 10))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet18", {"shortcut": "identity"}, "shortcut must be 'spiking' or 'real', got 'identity'"),
        ("vgg11", {"head": "mean"}, "head must be 'linear', 'normalised' or 'pooled', got 'mean'"),
        ("vgg11", {"shortcut": "real"}, "shortcut must be 'spiking' for vgg11, which has no other, got 'real'"),
        ("resnet18", {"head": "pooled"}, "head must be 'linear' for resnet18, which has no other, got 'pooled'"),
        ("mobilenetv1", {"norm_first": True}, "norm_first must be False for mobilenetv1"),
        ("vgg11", {"threshold": "neuron"}, "threshold must be 'layer' or 'channel', got 'neuron'"),
        ("vgg11", {"window": (0.5, 2.0)}, r"window must contain \(0, 1\), got 0.5 to 2"),
        ("vgg11", {"window": (0.0, 0.9)}, r"window must contain \(0, 1\), got 0 to 0.9"),
    ],
)
def test_values_that_are_not_allowed_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        backbones.create(name, width=0.125, **options)


def test_a_window_that_is_not_allowed_is_refused_with_the_recipe(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("data: {format: synthetic}\nmodel: {backbone: {window: [0.5, 2.0]}}\n")
    with pytest.raises(ValueError, match=r"a\.yaml: model\.backbone: window: .*0 to 1.* got 0\.5 to 2"):
        read_recipe(path)


@pytest.mark.parametrize("window", [(0.0, 2.0), (-0.5, 1.5), (0.0, 1.0), (-3.0, 3.0)])
def test_the_surrogate_is_one_half_inside_of_its_window(window):
    layer = HoyerSpike(1, window=window)
    layer.v_th.data.fill_(-2.0)
    z = torch.tensor([-3.0, -2.5, -0.5, -0.25, 0.0, 0.25, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0])
    for training in (True, False):
        u = (2 * z).view(-1, 1).requires_grad_()
        layer.train(training)(u).sum().backward()
        inside = (z > window[0]) & (z < window[1])
        assert torch.equal(u.grad.flatten(), 0.25 * inside)  # 1/2 over |v_th|
    assert "window" not in str(layer.state_dict().keys())


def test_the_regulariser_does_not_depend_on_the_window():
    torch.manual_seed(0)
    u, found = torch.randn(3, 4, 5), []
    for window in ((0.0, 2.0), (-1.0, 4.0)):
        x = u.clone().requires_grad_()
        layer = HoyerSpike(4, window=window)
        layer(x)
        found.append(torch.autograd.grad(hoyer_penalty(layer), [x, layer.v_th]))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_threshold_per_channel_has_the_gradients_that_autograd_finds(per_channel):
    torch.manual_seed(0)
    layer = HoyerSpike(3, per_channel=per_channel, threshold_per_channel=True).double()
    layer.v_th.data.copy_(torch.tensor([0.5, -1.0, 2.0]))
    assert layer.state_dict()["v_th"].shape == (3,)
    u, upstream = torch.randn(2, 3, 4, 5).double().requires_grad_(), torch.randn(2, 3, 4, 5).double()
    spikes = layer(u)
    found = torch.autograd.grad((spikes * upstream).sum() + 3 * hoyer_penalty(layer), [u, layer.v_th])
    z = u / layer.v_th.abs().view(3, 1, 1)
    c = z.clamp(0, 1)
    dims = (0, 2, 3) if per_channel else (0, 1, 2, 3)
    level = (c.square().sum(dims, keepdim=True) / c.sum(dims, keepdim=True)).detach()
    assert torch.equal(spikes, (z >= level).double())
    penalty = c.sum().square() / c.square().sum()
    expected = torch.autograd.grad((spike(z, level) * upstream).sum() + 3 * penalty, [u, layer.v_th])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert layer.logged()["v_th"] == pytest.approx(3.5 / 3)
    layer.eval()
    torch.testing.assert_close(layer.threshold, layer.v_th.detach().abs() * layer.extremum)
    on = layer.threshold.detach().view(1, 3, 1)
    assert torch.equal(layer(torch.cat([on, on * 0.999], dim=2)), torch.tensor([[[1.0, 0.0]] * 3]).double())


@every_option
def test_training_with_less_memory_has_the_same_bits(name, options):
    found = []
    for context in (contextlib.nullcontext, recompute_activations):
        torch.manual_seed(0)
        model = backbones.create(name, width=0.125, stem="cifar", **options)
        with using("torch"):  # as spike layers are computed there
            found.append(trained(model, torch.randn(2, 3, 32, 32), context, None))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_published_networks_are_those_with_the_options_off():
    off = {"shortcut": "spiking", "norm_first": False, "threshold": "layer", "window": (0.0, 2.0)}
    for name, own in (
        ("resnet18", off),
        ("vgg11", off | {"head": "linear"}),
        ("mobilenetv1", off),
        ("mobilenetv2", off),
    ):
        torch.manual_seed(0)
        plain = backbones.Classifier(backbones.create(name, width=0.125), 3)
        torch.manual_seed(0)
        same = backbones.Classifier(backbones.create(name, width=0.125, **own), 3)
        assert str(plain) == str(same)
        for one, other in zip(plain.state_dict().values(), same.state_dict().values(), strict=True):
            assert torch.equal(one, other)


# Fold, integers, certificate, energy, export


@every_option
def test_options_fold_with_the_same_spikes_and_outputs(name, options):
    model = classifier(name, **options).double()
    x = torch.randn(2, 3, 35, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected, spikes = run_and_record(model, x, HoyerSpike)
    folded = fold(model)
    result, ours = run_and_record(folded, x, ChannelThreshold)
    assert len(spikes) == len(ours) > 5
    assert 0.02 < torch.cat([s.flatten() for s in spikes]).mean() < 0.9
    assert all(torch.equal(a, b) for a, b in zip(spikes, ours, strict=True)) and torch.equal(result, expected)
    left = [module for module in folded.modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))]
    assert len(left) == 0 or name != "vgg11"


@every_option
def test_options_become_integers_and_onnx(name, options):
    pytest.importorskip("onnxruntime")
    model = classifier(name, **options)
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    dynamic = name != "vgg11"  # whose head divides a map into cells
    folded = fold(model) if dynamic else fix_size(fold(model), images[:1])
    integers = to_integers(folded, images)
    layers = [each for each in integers.modules() if isinstance(each, (IntegerSpikes, IntegerReal))]
    synapses = sum(isinstance(each, (nn.Conv2d, nn.Linear)) for each in model.modules())
    assert len(layers) >= synapses - 1  # all but the first; one of the stem of a ResNet may be there twice
    for network in (folded, integers):
        file = to_onnx(network, dynamic_size=dynamic, example=images[:1], outputs=["logits"])
        report = check_onnx(file, network, [images[:1], images[:5]])
        assert report["spikes"] > 1000 and report["flipped_by_rounding"] <= 2
        assert report["largest_difference"] < 1e-5


@every_option
def test_options_are_binary_and_are_counted(name, options):
    model = with_statistics(classifier(name, **options))
    measured = measure_activity(model, [torch.randn(2, 3, 32, 32)])
    certificate = certify(measured, strict=True)
    assert certificate.is_binary, certificate.violations
    synapses = {key for key, each in model.named_modules() if isinstance(each, (nn.Conv2d, nn.Linear))}
    assert measured.layers.keys() == synapses and certificate.num_binary == len(synapses) - 1
    assert energy(measured).networks["spiking"].total_sram_pj > 0


def test_what_a_real_shortcut_saves_and_costs():
    """The 1x1 convolutions and their spikes go; what enters a sum leaves its convolution as a real value as before."""
    spiking, real = (
        measure_activity(with_statistics(classifier("resnet18", **options)), [torch.randn(2, 3, 32, 32)])
        for options in ({}, {"shortcut": "real"})
    )
    gone = spiking.layers.keys() - real.layers.keys()
    assert sorted(gone) == [f"backbone.stages.{index}.0.shortcut.3" for index in (1, 2, 3)]
    # channels in * channels out * cells, of two images
    assert [spiking.layers[key].num_macs for key in sorted(gone)] == [
        2 * 8 * 16 * 64,
        2 * 16 * 32 * 16,
        2 * 32 * 64 * 4,
    ]
    for key, layer in real.layers.items():
        assert layer.num_macs == spiking.layers[key].num_macs
        # What a block's convolution gives is added to the stream: 32 bits leave, as before.
        assert layer.output_bits == spiking.layers[key].output_bits == (None if "branch" in key else layer.output_bits)
    assert real.spikes.keys() == spiking.spikes.keys() - {key.replace("shortcut.3", "shortcut.2") for key in gone}


def test_recipes_with_options_build():
    backbone = {"name": "resnet18", "width": 0.125, "shortcut": "real", "norm_first": True, "threshold": "channel"}
    values = {
        "model": {"backbone": backbone | {"window": [-0.5, 2.5]}},
        "data": {"format": "synthetic", "classes": ["a", "b"]},
    }
    config = ClassificationRecipe.model_validate(values)
    model = task_of(config).build_model()
    layers = spike_layers(model)
    assert {layer.window for layer in layers.values()} == {(-0.5, 2.5)}
    assert all(layer.v_th.shape == (layer.channels,) for layer in layers.values())
    assert not [key for key in model.state_dict() if "shortcut" in key]
    assert torch.equal(copy.deepcopy(model).eval()(x := torch.rand(2, 3, 32, 32)), model.eval()(x))


# Layers of networks of others, in files


@pytest.mark.parametrize("flatten", [lambda x: x.flatten(1), lambda x: torch.flatten(x, 1)], ids=["method", "function"])
def test_spikes_of_a_map_that_was_flattened(flatten):
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.spike, self.linear = nn.Conv2d(3, 4, 3), backbones.HoyerSpike(64), nn.Linear(64, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.spike(flatten(self.conv(x))))

    network, images = fold(Network().eval()), torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    report = check_onnx(to_onnx(network, example=images, outputs=["y"]), network, [images])
    assert report["spikes"] > 0 and report["largest_difference"] < 1e-5


@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d(4), nn.AvgPool2d(3, 1), nn.AvgPool2d(3, 2, 1)], ids=str)
def test_averages_are_those_of_nir(pool):
    pytest.importorskip("nir")
    x = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Conv2d(2, 2, 1), backbones.HoyerSpike(2), pool, nn.Flatten(), nn.LazyLinear(2)).eval()
    model(x)
    network = fold(model)
    torch.testing.assert_close(run_nir(to_nir(network, x), x)["output"], network(x))
    model[2] = nn.AvgPool2d(3, 2, 1, count_include_pad=False)
    with pytest.raises(ValueError, match="averages that leave the padding out"):
        to_nir(fold(model[:3]), x)
