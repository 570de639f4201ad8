"""Counts of synaptic operations, picojoules, and the certificate that what layers see is binary."""

import copy
import json
import math
from dataclasses import asdict
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import backbones
from backbones import HOROWITZ_45NM, HoyerSpike, certify, energy, measure_activity, read_costs, record_layers
from detection.models import build_detector
from detection.tasks.recipes import DetectionRecipe

SPIKING_NECK = {"out_channels": 16, "spiking": True}
SPIKING_HEAD = {"num_convs": 1, "spiking": True}


def make_config(detector="retinanet", **model) -> DetectionRecipe:
    defaults = {
        "detector": detector,
        "backbone": {"name": "vgg11", "width": 0.125} | model.pop("backbone", {}),
        "min_size": [64] if detector == "ssd" else [48],
        "max_size": 64,
        "neck": {"out_channels": 16},
        "head": {"num_convs": 1, "representation_size": 32},
    }
    data = {"format": "synthetic", "classes": ["circle", "square", "star"]}
    return DetectionRecipe.model_validate({"model": defaults | model, "data": data})


def make_detector(config: DetectionRecipe) -> nn.Module:
    """A detector of random weights, its thresholds so low that its neurons fire."""
    torch.manual_seed(0)
    model = build_detector(config).eval()
    for module in model.modules():
        if isinstance(module, HoyerSpike):
            module.extremum.fill_(0.05)
    return model


def make_images(seed=0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, 48, 64, generator=generator), torch.rand(3, 33, 47, generator=generator)]


def count_by_loops(layer: nn.Conv2d, x: torch.Tensor) -> tuple[int, int]:
    """Synaptic operations and exact MACs of a zero-padded convolution: every tap of every output, one by one."""
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if layer.padding == "same":
        before = [d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True)]
    else:
        before = (0, 0) if layer.padding == "valid" else layer.padding
    out_height, out_width = layer(x).shape[-2:]
    synops = macs = 0
    for image, channel, row, column, tap_row, tap_column in product(
        range(x.shape[0]), range(x.shape[1]), range(out_height), range(out_width), *map(range, kernel)
    ):
        y = row * stride[0] - before[0] + tap_row * dilation[0]
        z = column * stride[1] - before[1] + tap_column * dilation[1]
        if 0 <= y < x.shape[2] and 0 <= z < x.shape[3]:
            macs += layer.out_channels // layer.groups
            synops += layer.out_channels // layer.groups * int(x[image, channel, y, z] != 0)
    return synops, macs


def count_by_convolution(layer: nn.Conv2d | nn.Linear, x: torch.Tensor) -> tuple[int, int]:
    """Synaptic operations and exact MACs: the layer's own forward with all weights 1 over the active inputs."""
    ones = copy.deepcopy(layer).double()
    ones.weight.data.fill_(1.0)
    ones.bias = None
    with torch.no_grad():
        return int(ones((x != 0).double()).sum()), int(ones(torch.ones_like(x, dtype=torch.float64)).sum())


# --- synaptic operations --------------------------------------------------------------------------------------------


@st.composite
def convolutions(draw, modes=("zeros",)):
    groups = draw(st.sampled_from([1, 1, 2]))
    kernel, dilation = (
        draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
    )
    padding = draw(st.one_of(st.sampled_from(["same", "valid"]), st.tuples(st.integers(0, 2), st.integers(0, 2))))
    stride = (1, 1) if padding == "same" else draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    layer = nn.Conv2d(
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(modes)),
    )
    size = [draw(st.integers(d * (k - 1) + 1, 7)) for k, d in zip(kernel, dilation, strict=True)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    shape = (draw(st.integers(1, 2)), layer.in_channels, *size)
    x = (torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))).float()
    return layer, x if draw(st.booleans()) else x * torch.randn(shape, generator=generator)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=30, deadline=None)
@given(convolutions())
def test_synaptic_operations_of_convolutions_equal_a_count_by_loops(case):
    layer, x = case
    counted = measure_activity(layer, [x, x]).layers[""]
    synops, macs = count_by_loops(layer, x)
    assert (counted.num_synops, counted.num_exact_macs) == (2 * synops, 2 * macs)
    outputs = layer(x).numel()
    assert counted.num_macs == 2 * outputs * layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    assert (counted.num_calls, counted.num_images) == (2, 2 * len(x))
    assert (counted.num_inputs, counted.num_active) == (2 * x.numel(), 2 * int((x != 0).sum()))
    assert (counted.num_outputs, counted.num_weights) == (2 * outputs, layer.weight.numel())
    assert counted.num_biases == (0 if layer.bias is None else layer.out_channels)
    assert counted.is_binary == bool(((x == 0) | (x == 1)).all())


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=30, deadline=None)
@given(convolutions(modes=("zeros", "reflect", "replicate", "circular")))
def test_synaptic_operations_with_any_padding_equal_a_convolution_of_ones(case):
    layer, x = case
    try:
        expected = count_by_convolution(layer, x)
    except RuntimeError as error:  # more padding than pixels
        assert "pad" in str(error).lower()
        return
    counted = measure_activity(layer, [x]).layers[""]
    assert (counted.num_synops, counted.num_exact_macs) == expected


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.lists(st.integers(0, 3), min_size=1, max_size=3), st.integers(0, 99))
def test_synaptic_operations_of_linear_layers(in_features, out_features, leading, seed):
    x = torch.randn(*leading, in_features, generator=torch.Generator().manual_seed(seed)).relu()
    layer = nn.Linear(in_features, out_features)
    with record_layers(layer) as measured:
        layer(x)
    counted = measured.layers[""]
    assert counted.num_synops == out_features * int((x != 0).sum())
    assert counted.num_exact_macs == counted.num_macs == x.numel() * out_features
    assert counted.kind == "linear"


def test_rate_times_macs_counts_padding_and_synaptic_operations_do_not():
    x = torch.zeros(1, 1, 2, 2)
    x[0, 0, 0, 0] = 1
    counted = measure_activity(nn.Conv2d(1, 1, 3, padding=1, bias=False), [x]).layers[""]
    assert (counted.num_macs, counted.num_exact_macs, counted.num_synops) == (36, 16, 4)
    assert counted.rate_times_macs == 9


DETECTORS = [("fcos", {"neck": SPIKING_NECK, "head": SPIKING_HEAD}), ("fasterrcnn", {})]


@pytest.mark.parametrize(("detector", "model"), DETECTORS)
def test_every_layer_of_a_detector_counts_all_its_calls(detector, model):
    """Shared heads included, which see one level of the pyramid after the other."""
    model = make_detector(make_config(detector, **model))
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda layer, inputs, name=name: seen.setdefault(name, []).append(inputs[0].detach())
        )
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear, HoyerSpike))
    ]
    images = make_images()
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    measured = measure_activity(model, [images, images])
    assert measured.num_images == 4
    assert set(measured.ran) == set(seen)
    modules = dict(model.named_modules())
    for name, inputs in seen.items():
        if name in measured.spikes:
            assert measured.spikes[name].num_neurons == 2 * sum(x.numel() for x in inputs)
            continue
        layer, expected = measured.layers[name], [count_by_convolution(modules[name], x) for x in inputs]
        assert layer.num_calls == 2 * len(inputs)
        assert layer.num_images == 4
        assert layer.num_synops == 2 * sum(synops for synops, _ in expected)
        assert layer.num_exact_macs == 2 * sum(macs for _, macs in expected)
    # PyTorch counts a MAC as two operations; this model saw the images once, the measured one twice.
    assert flops.get_total_flops() == sum(layer.num_macs for layer in measured.layers.values())
    shared = [layer for name, layer in measured.layers.items() if name.startswith(("head.", "rpn."))]
    assert {layer.num_calls for layer in shared} == {2 * len(model.backbone.strides)}
    # Every comparison is some layer's.
    from_spikes = [name for layer in measured.layers.values() for name in layer.spikes_from]
    assert sorted(from_spikes) == sorted(measured.spikes)


def test_spikes_are_those_of_record_activity():
    model = backbones.Classifier(backbones.create("vgg11", stem="cifar", width=0.125), 3).eval()
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad(), record_layers(model) as measured, backbones.record_activity(model) as activity:
        model(x)
    assert measured.spikes == activity
    assert backbones.spike_activity(measured.spikes) > 0


@pytest.mark.parametrize("change", ["channels_last", "bfloat16", "inference_mode", "compiled"])
def test_counts_do_not_depend_on_how_the_network_is_run(change):
    torch.manual_seed(0)
    model = nn.Sequential(HoyerSpike(4), nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), HoyerSpike(6)).eval()
    x = torch.randn(2, 4, 9, 7).bfloat16().float()  # so that rounding flips no spike
    expected = measure_activity(model, [x]).layers["1"]
    if change == "channels_last":
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    elif change == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16()
    elif change == "compiled":
        model.compile(backend="eager")
    with torch.inference_mode(change == "inference_mode"):
        counted = measure_activity(model, [x]).layers["1"]
    assert counted == expected
    assert expected.num_synops > 0


def test_nothing_is_left_behind_and_modes_are_kept():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), HoyerSpike(4), nn.Conv2d(4, 2, 1)).train()
    model[1].eval()
    measure_activity(model, [(torch.rand(1, 3, 8, 8), "a label")])
    images = TensorDataset(torch.rand(4, 3, 8, 8), torch.arange(4))
    assert measure_activity(model, DataLoader(images, batch_size=2)).num_images == 4  # batches [images, labels]
    assert [module.training for module in model] == [True, False, True, True]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model[2].num_batches_tracked == 0


def test_a_pass_that_fails_does_not_spoil_the_next():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), HoyerSpike(4), nn.Conv2d(4, 2, 1, bias=False))
    with record_layers(model) as measured:
        with pytest.raises(RuntimeError):
            model(torch.rand(1, 3, 2, 2))
        measured.num_images = 0
        model(torch.rand(1, 3, 8, 8))
    assert measured.layers["0"].output_bits == 1
    assert measured.layers["2"].spikes_from == ["1"]
    assert torch.rand(2).add(1).shape == (2,)  # outside nothing follows tensors any more


def test_what_cannot_be_measured_is_said():
    with pytest.raises(ValueError, match="no images to measure"):
        measure_activity(nn.Conv2d(1, 1, 1), [])
    with pytest.raises(ValueError, match="Conv2d was given dict"):
        measure_activity(nn.Conv2d(1, 1, 1), [{"image": torch.rand(1, 1, 2, 2)}])
    with record_layers(nn.Conv2d(1, 1, 1)) as measured:
        pass
    with pytest.raises(RuntimeError, match="nothing was measured"):
        energy(measured)
    with pytest.raises(RuntimeError, match="nothing was measured"):
        certify(measured)


# --- where outputs go -----------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.spike, self.conv = nn.Conv2d(1, 1, 1), HoyerSpike(1), nn.Conv2d(1, 1, 1)

    def forward(self, x):
        u = self.stem(x)
        return u + self.conv(self.spike(u)) if u.shape[0] else u


def test_an_output_that_a_residual_sum_needs_too_leaves_as_a_real_value():
    measured = measure_activity(Residual(), [torch.rand(1, 1, 2, 2)])
    assert measured.layers["stem"].spikes_to == ["spike"]
    assert measured.layers["stem"].output_bits is None
    assert not energy(measured).first_layer.spikes_suffice


@pytest.mark.parametrize(
    "between",
    [
        [],
        [nn.MaxPool2d(2), nn.BatchNorm2d(4)],
        [nn.GroupNorm(2, 4), nn.Dropout(0.5), nn.Identity()],
        [nn.AdaptiveAvgPool2d(1), nn.Flatten()],
    ],
)
def test_an_output_goes_straight_into_a_spike_layer(between):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *between, HoyerSpike(4), nn.Identity())
    measured = measure_activity(model, [torch.rand(1, 3, 8, 8)])
    assert measured.layers["0"].spikes_to == [str(1 + len(between))]
    assert measured.layers["0"].output_bits == 1


@pytest.mark.parametrize("between", [nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Softmax2d()])
def test_an_output_that_something_else_takes_does_not(between):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), between, HoyerSpike(4))
    measured = measure_activity(model, [torch.rand(1, 3, 8, 8)])
    assert measured.layers["0"].spikes_to == []
    assert measured.layers["0"].output_bits is None


def test_outputs_of_real_networks():
    x = torch.rand(1, 3, 64, 64)
    resnet = measure_activity(backbones.create("resnet50", width=0.125), [x]).layers
    # The first block's shortcut and its branch have a spike layer each.
    assert resnet["stem.0"].output_bits == 2
    assert resnet["stages.0.0.branch.2"].output_bits == resnet["stages.0.0.branch.5"].output_bits == 1
    assert resnet["stages.0.0.branch.8"].output_bits is None
    vgg = measure_activity(backbones.create("vgg11", width=0.125), [x])
    assert vgg.layers["stages.0.0"].output_bits == 1
    assert vgg.layers["stages.4.4"].output_bits is None  # it is returned
    assert vgg.layers["stages.1.1"].output_bits is None  # the map c2 is returned and thresholded
    resnet = measure_activity(backbones.create("resnet18", width=0.125), [x])
    assert resnet.layers["stem.0"].output_bits is None  # its residual stream starts there
    # In a detector a map goes on into the next stage and into the neck: two spike layers.
    ssd = measure_activity(build_detector(make_config("ssd")), [make_images()]).layers
    (to_neck,) = [layer for layer in ssd.values() if "backbone.neck.leaving.0.1" in layer.spikes_to]
    assert len(to_neck.spikes_to) == to_neck.output_bits == 2


# --- energy ---------------------------------------------------------------------------------------------------------


def two_layers() -> nn.Module:
    """stem 1x1 -> spike -> 3x3 convolution with bias, on 2x2 pixels; the spikes are the pixels of 1 or more."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), HoyerSpike(1), nn.Conv2d(1, 2, 3, padding=1)).eval()
    nn.init.ones_(model[0].weight)
    return model


# Two spikes of four neurons. Each of the four positions reaches 4 outputs in each of 2 channels, which makes 16
# synaptic operations and 32 exact MACs; the stem has 4 MACs. 19 weights, 2 biases. A word has 32 bits.
BY_HAND = {
    "spiking": {
        "macs": 4,
        "acs": 16,
        "comparisons": 4,
        "compute_pj": 4 * 4.6 + 16 * 0.9,
        "comparison_pj": 3.6,
        "weight_bits": 19 * 32 + 2 * 32,
        "read_bits": 4 * 32 + 4,
        "write_bits": 4 + 8 * 32,
        "activation_bits": 392,
        "memory_sram_pj": 166.25,  # 33.25 words
        "memory_dram_pj": 21280,
        "total_pj": 36.4,
        "total_sram_pj": 202.65,
        "total_dram_pj": 21316.4,
    },
    "spiking_int8": {
        "macs": 4,
        "acs": 16,
        "comparisons": 4,
        "compute_pj": 4 * 0.3 + 16 * 0.1,
        "comparison_pj": 0.4,
        "weight_bits": 19 * 8 + 2 * 32,
        "read_bits": 4 * 8 + 4,
        "write_bits": 4 + 8 * 8,
        "activation_bits": 104,
        "memory_sram_pj": 50,  # 10 words
        "memory_dram_pj": 6400,
        "total_pj": 3.2,
        "total_sram_pj": 53.2,
        "total_dram_pj": 6403.2,
    },
    "twin": {
        "macs": 36,
        "acs": 0,
        "comparisons": 0,
        "compute_pj": 36 * 4.6,
        "comparison_pj": 0,
        "weight_bits": 672,
        "read_bits": 8 * 32,
        "write_bits": 12 * 32,
        "activation_bits": 640,
        "memory_sram_pj": 205,  # 41 words
        "memory_dram_pj": 26240,
        "total_pj": 165.6,
        "total_sram_pj": 370.6,
        "total_dram_pj": 26405.6,
    },
    "twin_int8": {
        "macs": 36,
        "acs": 0,
        "comparisons": 0,
        "compute_pj": 36 * 0.3,
        "comparison_pj": 0,
        "weight_bits": 216,
        "read_bits": 8 * 8,
        "write_bits": 12 * 8,
        "activation_bits": 160,
        "memory_sram_pj": 58.75,  # 11.75 words
        "memory_dram_pj": 7520,
        "total_pj": 10.8,
        "total_sram_pj": 69.55,
        "total_dram_pj": 7530.8,
    },
    "binary": {
        "macs": 4,
        "acs": 32,
        "comparisons": 4,
        "compute_pj": 4 * 4.6 + 32 * 0.9,
        "comparison_pj": 3.6,
        "weight_bits": 672,
        "read_bits": 132,
        "write_bits": 260,
        "activation_bits": 392,
        "memory_sram_pj": 166.25,
        "memory_dram_pj": 21280,
        "total_pj": 50.8,
        "total_sram_pj": 217.05,
        "total_dram_pj": 21330.8,
    },
}


def test_energy_of_two_layers_equals_a_calculation_by_hand():
    image = torch.tensor([[2.0, 0.0], [0.5, 3.0]]).view(1, 1, 2, 2)
    # Three images: what is reported is per image.
    report = energy(measure_activity(two_layers(), [image, torch.cat([image, image])]))
    assert {name: asdict(network) for name, network in report.networks.items()} == {
        name: pytest.approx(columns) for name, columns in BY_HAND.items()
    }
    for one, other in (
        ("spiking", "twin"),
        ("spiking", "twin_int8"),
        ("spiking_int8", "twin_int8"),
        ("spiking", "binary"),
    ):
        totals = {"operations": "total_pj", "with_sram": "total_sram_pj", "with_dram": "total_dram_pj"}
        quotients = {key: BY_HAND[one][total] / BY_HAND[other][total] for key, total in totals.items()}
        assert report.ratios[f"{one}/{other}"] == pytest.approx(quotients)
    first = asdict(report.first_layer)
    assert first == {
        "spike_layer": "1",
        "num_neurons": 4,
        "firing_rate": 0.5,
        "spike_bits": 4,
        "entropy_bits": 4,
        "image_bits": 32,
        "spikes_suffice": True,
        "reduction": 8,
        "entropy_reduction": 8,
    }


def test_energy_of_each_of_two_layers():
    image = torch.tensor([[2.0, 0.0], [0.5, 3.0]]).view(1, 1, 2, 2)
    report = energy(measure_activity(two_layers(), [image]))
    stem, last = report.layers["0"], report.layers["2"]
    assert stem["spiking"].total_pj == pytest.approx(4 * 4.6)
    assert last["spiking"].total_pj == pytest.approx(16 * 0.9 + 4 * 0.9)  # the comparisons stand with the second
    assert (last["spiking"].read_bits, last["twin"].read_bits, last["twin_int8"].read_bits) == (4, 128, 32)
    assert (stem["spiking"].write_bits, stem["twin"].write_bits) == (4, 128)
    for name, network in report.networks.items():
        for key in BY_HAND[name]:
            layers = getattr(stem[name], key) + getattr(last[name], key)
            assert layers == pytest.approx(getattr(network, key))


def test_sparser_spikes_cost_the_spiking_networks_less_and_the_others_the_same():
    measured = [measure_activity(two_layers(), [torch.full((1, 1, 2, 2), value)]) for value in (0.5, 2.0)]
    silent, dense = (energy(each).networks for each in measured)
    assert silent["spiking"].acs == 0
    assert dense["spiking"] == dense["binary"]
    assert all(silent[name] == dense[name] for name in ("twin", "twin_int8", "binary"))
    assert energy(measured[0]).first_layer.entropy_reduction is None


def test_weights_shared_by_several_calls_move_once_per_image():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.spike, self.conv = nn.Conv2d(1, 1, 1), HoyerSpike(1), nn.Conv2d(1, 2, 1, bias=False)

        def forward(self, x):
            u = self.stem(x)
            return [self.conv(self.spike(u)), self.conv(self.spike(u))]

    layer = energy(measure_activity(Shared(), [torch.rand(3, 1, 2, 2)])).layers["conv"]["twin"]
    assert layer.weight_bits == 2 * 32
    assert layer.read_bits == 2 * 4 * 32


def test_the_twin_alone_has_no_spiking_columns():
    report = energy(measure_activity(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), [torch.rand(1, 3, 8, 8)]))
    assert set(report.networks) == {"twin", "twin_int8"}
    assert report.ratios == {}
    assert report.first_layer is None


def test_the_twin_of_a_spiking_network_costs_what_the_analogue_network_itself_does():
    images = [make_images()]
    twins = [
        energy(measure_activity(make_detector(make_config(backbone={"activation": activation})), images)).networks
        for activation in ("hoyer", "relu")
    ]
    assert twins[0]["twin"] == twins[1]["twin"]
    assert twins[0]["twin_int8"] == twins[1]["twin_int8"]


COSTS = {
    "mac_pj": 1,
    "ac_pj": 0.5,
    "comparison_pj": 0.25,
    "int8_mac_pj": 0.2,
    "int8_ac_pj": 0.1,
    "int8_comparison_pj": 0.05,
    "sram_pj": 2,
    "dram_pj": 100,
}


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_costs_from_a_file(tmp_path, suffix):
    path = tmp_path / f"mine{suffix}"
    path.write_text(json.dumps(COSTS))  # which is YAML too
    costs = read_costs(path)
    assert costs.name == "mine"
    report = energy(measure_activity(two_layers(), [torch.full((1, 1, 2, 2), 2.0)]), costs)
    assert report.networks["spiking"].compute_pj == pytest.approx(4 + 32 * 0.5)
    assert report.networks["spiking_int8"].comparison_pj == pytest.approx(0.2)
    path.write_text(json.dumps(COSTS | {"name": "another"}))
    assert read_costs(path).name == "another"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", json.dumps(COSTS | {"mac_pJ": 1}), r"a\.yaml: unknown key 'mac_pJ' \(allowed: name, mac_pj"),
        ("a.yaml", json.dumps({"mac_pj": 1, "sram_pj": 2}), r"a\.yaml: missing ac_pj, comparison_pj, int8_mac_pj"),
        ("a.yaml", json.dumps(COSTS | {"ac_pj": -1}), r"a\.yaml: ac_pj -1: a cost is a number of picojoules"),
        ("a.yaml", json.dumps(COSTS | {"ac_pj": "0.9 pJ"}), r"ac_pj '0.9 pJ': a cost is a number"),
        ("a.yaml", json.dumps(COSTS | {"ac_pj": math.nan}), "ac_pj"),
        ("a.yaml", "- 1\n- 2\n", r"a\.yaml: expected the keys mac_pj, .*, got list"),
        ("a.yaml", "{", r"a\.yaml: not a YAML file"),
        ("a.json", "{", r"a\.json: not a JSON file"),
        ("a.json", "", r"a\.json: not a JSON file"),
    ],
)
def test_a_cost_file_that_is_wrong_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_costs(tmp_path / name)


def test_a_cost_file_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such cost file"):
        read_costs(tmp_path / "none.yaml")
    (tmp_path / "picture.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ValueError, match="not a text file"):
        read_costs(tmp_path / "picture.yaml")


def test_the_published_costs():
    assert (HOROWITZ_45NM.mac_pj, HOROWITZ_45NM.ac_pj) == (4.6, 0.9)
    assert (HOROWITZ_45NM.sram_pj, HOROWITZ_45NM.dram_pj) == (5.0, 640.0)


def test_frames_of_zeros_and_ones_cost_a_twin_what_they_cost_itself():
    """Its stem has weights for all of them, and a binary network's adds up each."""
    options = {"width": 0.125, "stem": "cifar", "in_channels": 6, "frames": 3, "time_steps": 3}
    found = {}
    for activation in ("hoyer", "relu"):
        model = backbones.Classifier(backbones.create("vgg9", activation=activation, **options), 4).eval()
        measured = measure_activity(model, [torch.randint(0, 2, (2, 6, 32, 32), generator=torch.Generator()).float()])
        found[activation] = energy(measured)
    own, twin = found["hoyer"].networks["twin"], found["relu"].networks["twin"]
    assert (own.macs, own.weight_bits) == (twin.macs, twin.weight_bits)
    stem = found["hoyer"].layers[measured.stem]
    assert stem["binary"].acs == stem["twin"].macs > 0
