import copy

import pytest
import torch
from torch import nn

import backbones
from backbones import HoyerSpike, hoyer_penalty
from detection.config import Config
from detection.models import BackboneWithNeck, build_detector


def make_config(**model) -> Config:
    backbone = {"name": "resnet18", "width": 0.125} | model.pop("backbone", {})
    defaults = {"min_size": [64], "max_size": 96, "neck": {"out_channels": 16}, "head": {"num_convs": 1}}
    return Config.model_validate(
        {
            "model": {"backbone": backbone} | defaults | model,
            "data": {"format": "synthetic", "classes": ["circle", "square", "star"]},
        }
    )


def make_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, 64, 96, generator=generator), torch.rand(3, 64, 64, generator=generator)]
    targets = [
        {"boxes": torch.tensor([[4.0, 6, 40, 50], [30, 10, 90, 60]]), "labels": torch.tensor([1, 3])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)},
    ]
    return images, targets


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "resnet50"])
@pytest.mark.parametrize("source", ["spikes", "membrane"])
def test_every_parameter_gets_a_finite_gradient(name, source):
    torch.manual_seed(0)
    model = build_detector(make_config(backbone={"name": name}, neck={"source": source, "out_channels": 16})).train()
    losses = model(*make_batch())
    assert set(losses) == {"classification", "bbox_regression"}
    loss = sum(losses.values()) + 0.01 * hoyer_penalty(model, "mean")
    assert torch.isfinite(loss)
    loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key


def test_inputs_are_not_changed():
    images, targets = make_batch()
    before = copy.deepcopy((images, targets))
    build_detector(make_config()).train()(images, targets)
    for now, then in zip(images, before[0], strict=True):
        assert torch.equal(now, then)
    for now, then in zip(targets, before[1], strict=True):
        assert torch.equal(now["boxes"], then["boxes"])
        assert torch.equal(now["labels"], then["labels"])


def test_an_image_alone_and_in_a_batch_of_equal_sizes_gives_the_same_detections():
    torch.manual_seed(0)
    model = build_detector(make_config(head={"num_convs": 1, "score_threshold": 0.0, "max_detections": 20}))
    images = [torch.rand(3, 64, 96) for _ in range(3)]
    targets = [{"boxes": torch.tensor([[4.0, 6, 40, 50]]), "labels": torch.tensor([2])} for _ in images]
    model.train()
    for _ in range(3):  # so that the extrema and statistics are not those of the start
        model(images, targets)
        hoyer_penalty(model)
    model.eval()
    with torch.no_grad():
        together = model(images)
        for image, expected in zip(images, together, strict=True):
            alone = model([image])[0]
            assert len(alone["boxes"]) == 20
            torch.testing.assert_close(alone["scores"], expected["scores"], atol=1e-5, rtol=1e-4)
            assert torch.equal(alone["labels"], expected["labels"])
            torch.testing.assert_close(alone["boxes"], expected["boxes"], atol=1e-2, rtol=1e-4)


def test_label_zero_is_never_returned_and_boxes_are_inside_the_image():
    torch.manual_seed(0)
    model = build_detector(make_config(head={"num_convs": 0, "score_threshold": 0.0, "max_detections": 300})).eval()
    with torch.no_grad():  # a background logit that would win everywhere
        model.head.classification_head.cls_logits.bias.view(-1, 4)[:, 0] = 10.0
        detections = model([torch.rand(3, 50, 70)])[0]
    assert len(detections["labels"]) > 100
    assert set(detections["labels"].tolist()) <= {1, 2, 3}
    boxes = detections["boxes"]
    assert (boxes >= 0).all()
    assert (boxes[:, 0::2] <= 70).all()
    assert (boxes[:, 1::2] <= 50).all()


def spied_inputs(module: nn.Module, run) -> dict[str, torch.Tensor]:
    seen = {}
    handles = [
        layer.register_forward_pre_hook(lambda layer, inputs, name=name: seen.__setitem__(name, inputs[0].detach()))
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Conv2d)
    ]
    run()
    for handle in handles:
        handle.remove()
    return seen


def is_binary(x: torch.Tensor) -> bool:
    return bool(((x == 0) | (x == 1)).all())


@pytest.mark.parametrize("training", [True, False])
def test_backbone_and_laterals_see_only_spikes(training):
    torch.manual_seed(0)
    model = build_detector(make_config()).train(training)
    inputs = spied_inputs(model.backbone, lambda: model.backbone(torch.randn(2, 3, 64, 96)))
    laterals = [name for name in inputs if name.startswith("neck.fpn.inner_blocks")]
    assert len(laterals) == 3
    checked = [name for name in inputs if name.startswith("body.") and name != "body.stem.0"] + laterals
    assert len(checked) > 20
    assert [name for name in checked if not is_binary(inputs[name])] == []


def test_membrane_source_gives_the_laterals_real_values():
    model = build_detector(make_config(neck={"source": "membrane", "out_channels": 16})).eval()
    inputs = spied_inputs(model.backbone, lambda: model.backbone(torch.randn(2, 3, 64, 96)))
    assert not any(is_binary(value) for name, value in inputs.items() if name.startswith("neck.fpn.inner_blocks"))


def test_the_twin_has_no_spike_layer_and_the_same_weights_otherwise():
    hoyer = build_detector(make_config())
    twin = build_detector(make_config(backbone={"activation": "relu"}))
    assert not any(isinstance(module, HoyerSpike) for module in twin.modules())
    spiking = {"v_th", "extremum", "num_batches_tracked"}
    layers = {name for name, module in hoyer.named_modules() if isinstance(module, HoyerSpike)}
    kept = {
        key: value.shape
        for key, value in hoyer.state_dict().items()
        if not (key.rpartition(".")[0] in layers and key.rpartition(".")[2] in spiking)
    }
    assert kept == {key: value.shape for key, value in twin.state_dict().items()}


def test_pyramid_maps_have_the_declared_strides_and_anchors_follow_them():
    model = build_detector(make_config(neck={"out_channels": 16, "levels": ["c2", "c4"], "extra_levels": 2}))
    assert model.backbone.strides == (4, 16, 32, 64)
    maps = model.backbone(torch.randn(1, 3, 64, 128))
    assert [tuple(x.shape[1:]) for x in maps.values()] == [(16, 16, 32), (16, 4, 8), (16, 2, 4), (16, 1, 2)]
    assert model.anchor_generator.sizes[1] == (64, 81, 102)


def test_pretrained_backbone_is_taken_over_bit_by_bit(tmp_path):
    from safetensors.torch import save_file

    classifier = backbones.Classifier(backbones.create("resnet18", width=0.125), 10)
    for module in classifier.modules():
        if isinstance(module, HoyerSpike):
            nn.init.uniform_(module.v_th)
            nn.init.uniform_(module.extremum)
    save_file(classifier.state_dict(), tmp_path / "last.safetensors")
    detector = build_detector(make_config(backbone={"weights": str(tmp_path / "last.safetensors")}))
    wanted = classifier.backbone.state_dict()
    found = detector.backbone.body.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)


def test_levels_must_exist_and_be_in_order():
    body = backbones.create("vgg11", width=0.125)
    with pytest.raises(ValueError, match="finest first; got c4, c3"):
        BackboneWithNeck(body, backbones.SpikeFactory(), levels=["c4", "c3"], out_channels=8)


def test_classes_are_needed():
    config = Config.model_validate({"data": {"format": "synthetic"}})
    with pytest.raises(ValueError, match=r"data\.classes is empty"):
        build_detector(config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_training_step_is_finite(dtype):
    torch.manual_seed(0)
    model = build_detector(make_config()).train()
    with torch.autocast("cpu", dtype):
        losses = model(*make_batch())
    loss = sum(losses.values()) + hoyer_penalty(model, "mean")
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
