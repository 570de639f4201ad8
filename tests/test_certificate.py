"""The certificate that what the layers of a network see is binary, and what it finds where it is not."""

import math
from itertools import product

import pytest
import torch
from test_energy import SPIKING_HEAD, SPIKING_NECK, make_config, make_detector, make_images, two_layers
from torch import nn

import backbones
from backbones import HoyerSpike, certify, energy, measure_activity
from detection.tasks import task_of

STEM = "backbone.body.stages.0.0"
SETTINGS = [
    ("fasterrcnn", False, False),
    ("fasterrcnn", True, False),
    *product(["retinanet"], [False, True], [False, True]),
    ("fcos", False, False),
    ("fcos", True, True),
    ("ssd", False, False),
]


@pytest.mark.parametrize(("detector", "neck", "head"), SETTINGS)
def test_every_setting_of_a_detector_is_binary_where_it_says_so(detector, neck, head):
    config = make_config(
        detector,
        neck={"out_channels": 16, "spiking": neck},
        head={"num_convs": 1, "spiking": head, "representation_size": 32},
    )
    model = make_detector(config)
    measured, parts = measure_activity(model, [make_images()]), task_of(config).analogue_parts(model)
    certificate = certify(measured, parts)
    assert certificate.is_binary, certificate.violations
    assert certificate.silent == ()  # else 0/1 would mean nothing
    assert certificate.exceptions[0] == (STEM, "stem: sees pixels")
    reasons = {reason for _, reason in certificate.exceptions[1:]}
    if detector == "ssd":
        assert reasons == set()
    else:
        assert reasons == ({"analogue head"} if not head else set()) | ({"analogue neck"} if not neck else set())
    laterals = [name for name in measured.layers if name.startswith("backbone.neck.fpn.inner_blocks")]
    assert len(laterals) == {"fasterrcnn": 4, "ssd": 0}.get(detector, 3)
    must = [name for name in measured.layers if name.startswith("backbone.body.") and name != STEM] + laterals
    assert all(measured.layers[name].is_binary for name in must)
    strict = certify(measured, parts, strict=True)
    assert strict.is_binary == (detector == "ssd" or (neck and head))
    assert strict.exceptions == ((STEM, "stem: sees pixels"),)
    assert (certificate.time_steps, certificate.levels) == (1, 2)


def test_the_twin_is_not_binary():
    config = make_config(backbone={"activation": "relu"}, neck=SPIKING_NECK, head=SPIKING_HEAD)
    model = make_detector(config)
    certificate = certify(measure_activity(model, [make_images()]), task_of(config).analogue_parts(model))
    assert certificate.violations[0] == ("network", "it has no spike layer")
    layers = {name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    assert {layer for layer, _ in certificate.violations[1:]} == layers - {STEM}


@pytest.mark.parametrize(
    ("detector", "violation"), [("retinanet", "backbone.neck.fpn.inner_blocks"), ("ssd", "head.classification_head")]
)
def test_membrane_potentials_into_the_neck_are_not_binary(detector, violation):
    config = make_config(detector, neck={"out_channels": 16, "source": "membrane"})
    model = make_detector(config)
    certificate = certify(measure_activity(model, [make_images()]), task_of(config).analogue_parts(model))
    assert [layer for layer, _ in certificate.violations if layer.startswith(violation)]
    assert all(not layer.startswith("backbone.body") for layer, _ in certificate.violations)


@pytest.mark.parametrize("place", ["backbone.body.stages.1.0", "head.classification_tower.spikes.1.1.1"])
def test_one_spike_layer_that_is_missing_is_found(place):
    config = make_config(neck=SPIKING_NECK, head=SPIKING_HEAD)
    model = make_detector(config)
    parent, _, child = place.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    certificate = certify(measure_activity(model, [make_images()]), task_of(config).analogue_parts(model))
    (violation,) = certificate.violations
    following = {"0": "backbone.body.stages.1.1", "1": "head.classification_head.cls_logits"}
    assert violation.layer == following[child]
    assert "its input is not 0/1" in violation.reason


@pytest.mark.parametrize("name", ["vgg11", "resnet20", "mobilenetv1", "mobilenetv2"])
def test_every_classifier_is_binary_with_dropout_and_all(name):
    torch.manual_seed(0)
    model = backbones.Classifier(backbones.create(name, stem="cifar", width=0.0625), 3, dropout=0.5)
    measured = measure_activity(model, [torch.randn(2, 3, 16, 16)])
    certificate = certify(measured, strict=True)
    assert certificate.is_binary, certificate.violations
    (exception,) = certificate.exceptions
    assert exception.layer == measured.stem
    assert certificate.num_binary == len(measured.layers) - 1
    assert certificate.num_images == 2


@pytest.mark.parametrize("value", [1 - 2**-24, 1 + 2**-23, -1.0, 2.0, 2.0**-140, math.nan, math.inf])
def test_a_single_value_that_is_neither_0_nor_1_is_found(value):
    model = nn.Sequential(nn.Conv2d(1, 1, 1), HoyerSpike(1), nn.Identity(), nn.Conv2d(1, 1, 1))
    model[2].register_forward_hook(lambda module, inputs, output: output.index_fill(3, torch.tensor([2]), value))
    (violation,) = certify(measure_activity(model, [torch.rand(1, 1, 3, 3)])).violations
    assert violation.layer == "3"
    assert f"{value:.6g}" in violation.reason


def test_a_later_batch_can_break_the_certificate():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), HoyerSpike(1), nn.Identity(), nn.Conv2d(1, 1, 1))
    model[2].register_forward_hook(lambda module, inputs, output: output / 2 if len(output) == 3 else output)
    nn.init.constant_(model[0].bias, 5.0)
    assert certify(measure_activity(model, [torch.rand(1, 1, 3, 3)])).is_binary
    assert not certify(measure_activity(model, [torch.rand(number, 1, 3, 3) for number in (1, 3, 1)])).is_binary


def test_a_layer_that_saw_only_zeros_is_named():
    measured = measure_activity(two_layers(), [torch.full((1, 1, 2, 2), 0.5)])
    certificate = certify(measured)
    assert certificate.is_binary
    assert certificate.silent == ("2",)


def test_layers_that_never_ran_or_are_not_measured_are_named():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.spike, self.unused = nn.Conv2d(1, 2, 1), HoyerSpike(2), nn.Conv2d(2, 2, 1)
            self.up, self.norm = nn.ConvTranspose2d(2, 2, 2), nn.LayerNorm([2, 5, 5])
            self.line, self.volume, self.table = nn.Conv1d(2, 2, 1), nn.Conv3d(2, 2, 1), nn.Embedding(3, 2)

        def forward(self, x):
            lines = self.line(x.expand(-1, 2, -1, -1).flatten(2))
            return self.norm(self.up(self.spike(self.stem(x)))) + lines.mean()

    measured = measure_activity(Odd(), [torch.rand(1, 1, 4, 4)])
    assert measured.unhandled == {
        "up": "ConvTranspose2d",
        "line": "Conv1d",
        "volume": "Conv3d",
        "table": "Embedding",
    }
    violations = dict(certify(measured).violations)
    assert violations.keys() == {"unused", *measured.unhandled}
    assert violations["unused"] == "never ran, so nothing is known about it"
    assert violations["up"] == "a ConvTranspose2d, which is not measured"
    exceptions = dict(certify(measured, dict.fromkeys(violations, "analogue")).exceptions)
    assert exceptions == dict.fromkeys(violations, "analogue") | {"stem": "stem: sees pixels"}
    report = energy(measured)
    assert report.layers["unused"]["twin"].total_dram_pj == 0


@pytest.mark.parametrize(
    ("multiply", "name"),
    [
        (lambda y, weight: y.flatten(2) @ y.flatten(2).transpose(1, 2), "matmul"),
        (lambda y, weight: nn.functional.conv2d(y, weight), "conv2d"),
        (lambda y, weight: torch.einsum("nchw,oc->nohw", y, weight[:, :, 0, 0]), "einsum"),
        (lambda y, weight: nn.functional.conv_transpose2d(y, weight), "conv_transpose2d"),
        (lambda y, weight: torch.tensordot(y, weight[:, :, 0, 0], dims=([1], [0])), "tensordot"),
        (lambda y, weight: torch.inner(y.permute(0, 2, 3, 1), weight[:, :, 0, 0]), "inner"),
        (lambda y, weight: nn.functional.bilinear(y[0, :, 0], y[0, :, 1], torch.randn(2, 4, 4)), "bilinear"),
    ],
)
def test_products_outside_of_the_layers_are_named(multiply, name):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.spike, self.conv = nn.Conv2d(1, 2, 1), HoyerSpike(2), nn.Conv2d(2, 2, 1)
            self.register_buffer("weight", torch.randn(2, 2, 1, 1))

        def forward(self, x):
            return multiply(self.conv(self.spike(self.stem(x))), self.weight)

    measured = measure_activity(Odd(), [torch.rand(1, 1, 4, 4)])
    assert measured.unhandled == {name: "product outside of the layers"}
    for strict in (False, True):
        (found,) = certify(measured, strict=strict).violations
        assert found == (name, "a product outside of the layers, which is not measured")


def test_a_parametrised_layer_counts_once_under_its_own_name():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), HoyerSpike(2), nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3)))
    measured = measure_activity(model, [torch.rand(1, 1, 4, 4)])
    assert measured.unhandled == {}
    assert certify(measured).is_binary
    assert measured.layers["2"].num_weights == 36


def test_a_declared_part_without_layers_is_refused():
    measured = measure_activity(two_layers(), [torch.rand(1, 1, 2, 2)])
    with pytest.raises(ValueError, match="analogue part 'heads': no convolution or linear layer"):
        certify(measured, {"heads": "analogue head"})
