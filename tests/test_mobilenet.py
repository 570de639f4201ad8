"""MobileNetV2: layer by layer beside torchvision's, a block by hand, a detector on it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from backbones import Classifier, HoyerSpike, create, hoyer_penalty
from backbones.measure.certificate import certify
from backbones.measure.operations import measure_activity
from backbones.networks.mobilenet import InvertedResidual
from detection.models import build_detector
from detection.tasks import task_of
from detection.tasks.recipes import DetectionRecipe


def weighted(model: nn.Module) -> list[tuple]:
    """What defines each convolution and linear layer, in their order."""
    layers = [each for each in model.modules() if isinstance(each, nn.Conv2d | nn.Linear)]
    return [
        (
            tuple(each.weight.shape),
            each.bias is None,
            *(getattr(each, key, None) for key in ("stride", "padding", "groups")),
        )
        for each in layers
    ]


def macs(model: nn.Module, images: Tensor) -> int:
    """Multiply-accumulates of all convolutions and linear layers, counted from their outputs."""
    counted = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(
                lambda layer, inputs, output: counted.append(output.numel() * layer.weight[0].numel())
            )
    model(images)
    return sum(counted)


@torch.no_grad()
def test_layers_parameters_and_operations_are_those_of_torchvision():
    published = torchvision.models.mobilenet_v2(weights=None).eval()
    twin = Classifier(create("mobilenetv2", activation="relu"), 1000).eval()
    assert weighted(twin) == weighted(published)
    assert [tuple(p.shape) for p in twin.parameters()] == [tuple(p.shape) for p in published.parameters()]
    assert sum(p.numel() for p in twin.parameters()) == 3_504_872
    backbone = sum(p.numel() for p in published.features[:18].parameters())
    assert sum(p.numel() for p in twin.backbone.parameters()) == backbone == 1_811_712
    images = torch.rand(1, 3, 224, 224)
    measured = measure_activity(twin, [images])
    assert sum(layer.num_macs for layer in measured.layers.values()) == macs(published, images) == 300_774_272
    # In front of every layer with weights but the first there is one neuron, where the paper has two in three of them.
    spiking = Classifier(create("mobilenetv2"), 1000)
    assert sum(isinstance(module, HoyerSpike) for module in spiking.modules()) == len(weighted(published)) - 1 == 52
    assert sum(p.numel() for p in spiking.parameters()) == 3_504_872 + 52


@pytest.mark.parametrize(
    ("stem", "size", "sides"),
    [
        ("imagenet", (224, 224), [(56, 56), (28, 28), (14, 14), (7, 7)]),
        ("imagenet", (97, 33), [(25, 9), (13, 5), (7, 3), (4, 2)]),
        ("cifar", (32, 32), [(32, 32), (32, 32), (16, 16), (8, 8)]),
        ("cifar", (33, 51), [(33, 51), (33, 51), (17, 26), (9, 13)]),
    ],
)
def test_maps_at_full_width(stem, size, sides):
    with torch.device("meta"):
        backbone = create("mobilenetv2", stem=stem)
        maps = backbone(torch.empty(2, 3, *size))
    strides = (4, 8, 16, 32) if stem == "imagenet" else (1, 1, 2, 4)
    assert list(backbone.feature_info) == list(zip(maps, (24, 32, 96, 320), strides, strict=True))
    assert [tuple(each.shape) for each in maps.values()] == [
        (2, channels, *side) for channels, side in zip((24, 32, 96, 320), sides, strict=True)
    ]


def test_the_stream_is_added_where_its_shape_stays():
    with torch.device("meta"):
        stages = create("mobilenetv2").stages
    found = [[block.is_residual for block in stage] for stage in stages]
    # 16 | 24 24 | 32 32 32 | 64 64 64 64 96 96 96 | 160 160 160 320
    expected = ["-", "-+", "-++", "-+++-++", "-++-"]
    assert found == [[sign == "+" for sign in stage] for stage in expected]


@pytest.mark.parametrize(("channels", "stride", "expansion"), [(8, 1, 6), (8, 1, 1), (8, 2, 6), (16, 1, 3)])
def test_a_block_by_hand(channels, stride, expansion):
    torch.manual_seed(0)
    block = InvertedResidual(8, channels, stride, lambda number: HoyerSpike(number), expansion).double().eval()
    *first, dw, dw_norm, pw, pw_norm = [each for each in block.branch if not isinstance(each, HoyerSpike)]
    layers = [*([first] if first else []), (dw, dw_norm), (pw, pw_norm)]
    u = torch.randn(2, 8, 7, 5, dtype=torch.float64)
    expected = u
    for conv, norm in layers:
        norm.weight.data.uniform_(0.5, 2)
        norm.running_mean.normal_(0, 0.1)
        spikes = (expected >= 1).double()  # v_th and the extremum are 1 at first
        assert 0 < spikes.mean() < 1
        options = (conv.stride, 1, 1, 8 * expansion) if conv is dw else ()
        expected = F.conv2d(spikes, conv.weight, None, *options) - norm.running_mean.view(-1, 1, 1)
        expected = expected / (1 + norm.eps) ** 0.5 * norm.weight.view(-1, 1, 1)
    if (channels, stride) == (8, 1):
        expected = u + expected
    torch.testing.assert_close(block(u), expected, rtol=1e-12, atol=1e-12)


def test_the_head_widens_and_a_truncated_network_has_one_too():
    with torch.device("meta"):
        backbone = create("mobilenetv2", width=0.5)
        backbone.truncate("c4")
        head = backbone.make_head(10, 0.1)
        assert head(torch.empty(2, 48, 5, 5)).shape == (2, 10)
    names = " ".join(type(layer).__name__ for layer in head)
    assert names == "HoyerSpike Conv2d BatchNorm2d AdaptiveAvgPool2d HoyerSpike Flatten Dropout Linear"
    assert tuple(head[1].weight.shape) == (640, 48, 1, 1) and head[7].in_features == 640


@pytest.mark.parametrize("detector", ["retinanet", "fasterrcnn"])
def test_a_detector_on_it_trains(detector):
    spiking = detector == "retinanet"
    values = {"detector": detector, "min_size": [64], "max_size": 64}
    values["backbone"] = {"name": "mobilenetv2", "width": 0.25, "extremum": "channel"}
    values |= {"neck": {"out_channels": 16, "spiking": spiking}, "head": {"num_convs": 1, "spiking": spiking}}
    values["head"] |= {"representation_size": 32}
    data = {"format": "synthetic", "classes": ["circle", "square"]}
    config = DetectionRecipe.model_validate({"model": values, "data": data})
    torch.manual_seed(0)
    model = build_detector(config).train()
    images = torch.rand(4, 3, 64, 64) * 0.2
    images[:, :, 10:40, 20:50] += 0.7
    targets = [{"boxes": torch.tensor([[20.0, 10, 50, 40]]), "labels": torch.tensor([1])}] * 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = sum(model(list(images), targets).values())
        optimizer.zero_grad()
        (loss + 0.01 * hoyer_penalty(model, "mean")).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    certificate = certify(measure_activity(model, [list(images)]), task_of(config).analogue_parts(model))
    assert certificate.is_binary
    assert (len(certificate.exceptions) == 1) == spiking  # the stem, which sees pixels
