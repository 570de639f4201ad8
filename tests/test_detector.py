"""The four detectors: gradients, what their convolutions see, outputs, and what they refuse."""

import copy
from itertools import product
from pathlib import Path

import pytest
import torch
from helpers import build_datasets
from pydantic import ValidationError
from torch import nn

import backbones
from backbones import HoyerSpike, hoyer_penalty
from detection.config import load_config, read_recipe
from detection.models import BackboneWithNeck, SpikingFPN, build_detector
from detection.tasks import task_of
from detection.tasks.recipes import DetectionRecipe

DETECTORS = ["fasterrcnn", "retinanet", "fcos", "ssd"]
LOSSES = {
    "fasterrcnn": {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"},
    "retinanet": {"classification", "bbox_regression"},
    "fcos": {"classification", "bbox_regression", "bbox_ctrness"},
    "ssd": {"classification", "bbox_regression"},
}
SPIKING = {"neck": {"out_channels": 16, "spiking": True}, "head": {"num_convs": 2, "spiking": True}}


def make_config(detector="retinanet", **model) -> DetectionRecipe:
    backbone = {"name": "resnet18", "width": 0.125} | model.pop("backbone", {})
    defaults = {
        "detector": detector,
        "min_size": [96] if detector == "ssd" else [64],
        "max_size": 96,
        "neck": {"out_channels": 16},
        "head": {"num_convs": 1, "representation_size": 32},
    }
    return DetectionRecipe.model_validate(
        {
            "model": {"backbone": backbone} | defaults | model,
            "data": {"format": "synthetic", "classes": ["circle", "square", "star"]},
        }
    )


def make_batch(seed=0):
    """Two images; the second has no boxes."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, 64, 96, generator=generator), torch.rand(3, 64, 64, generator=generator)]
    targets = [
        {"boxes": torch.tensor([[4.0, 6, 40, 50], [30, 10, 90, 60]]), "labels": torch.tensor([1, 3])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)},
    ]
    return images, targets


def assert_every_parameter_has_a_finite_gradient(model: nn.Module) -> None:
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize(
    ("detector", "model"),
    [
        *(
            (detector, {"neck": {"source": source, "out_channels": 16}})
            for detector in DETECTORS
            for source in ("spikes", "membrane")
        ),
        ("retinanet", SPIKING),
        ("fcos", SPIKING),
        ("fasterrcnn", {"neck": SPIKING["neck"]}),
    ],
)
def test_every_parameter_gets_a_finite_gradient(detector, model):
    torch.manual_seed(0)
    model = build_detector(make_config(detector, **model)).train()
    losses = model(*make_batch())
    assert set(losses) == LOSSES[detector]
    loss = sum(losses.values()) + 0.01 * hoyer_penalty(model, "mean")
    assert torch.isfinite(loss)
    loss.backward()
    assert_every_parameter_has_a_finite_gradient(model)


# --- real images ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_samples(real_data):
    """Images of VOC and of COCO128 with their targets, two each with boxes and one without, at most 96 pixels."""
    folder = real_data("voc", "coco128")
    sources = {
        "voc": {"format": "voc", "root": folder / "VOCdevkit", "train": ["VOC2007/val"], "val": ["VOC2007/val"]},
        "coco128": {
            "root": folder / "coco128",
            "train": ["annotations/instances_train2017.json"],
            "val": ["annotations/instances_train2017.json"],
            "train_images": "train2017",
            "val_images": "train2017",
        },
    }
    samples = {}
    for name, source in sources.items():
        data = DetectionRecipe.model_validate({"data": source | {"workers": 0}}).data
        _, dataset = build_datasets(data)
        numbers = [len(record.boxes) - record.ignore.sum() for record in dataset.annotations.records]
        chosen = [index for index, number in enumerate(numbers) if 2 <= number <= 6][:2]
        empty = [index for index, number in enumerate(numbers) if number == 0][:1]
        items = [dataset[index] for index in chosen]
        if empty:
            items += [dataset[empty[0]]]
        else:  # VOC has no image without objects: one with its boxes taken away
            image, target = dataset[chosen[-1] + 1]
            items += [(image, target | {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)})]
        assert len(items) == 3
        samples[name] = (items, list(dataset.annotations.categories))
    return samples


@pytest.mark.parametrize("data", ["voc", "coco128"])
@pytest.mark.parametrize(("detector", "backbone"), list(product(DETECTORS, ["vgg16", "resnet18", "resnet50"])))
def test_two_steps_on_real_images_and_one_image_alone(real_samples, detector, backbone, data):
    torch.manual_seed(0)
    items, classes = real_samples[data]
    config = make_config(detector, backbone={"name": backbone}, head={"num_convs": 1, "score_threshold": 0.0})
    config.data.classes = classes
    model = build_detector(config).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    images, targets = [list(column) for column in zip(*items, strict=True)]
    for _ in range(2):
        losses = model(images, targets)
        assert set(losses) == LOSSES[detector]
        loss = sum(losses.values()) + 0.01 * hoyer_penalty(model, "mean")
        assert torch.isfinite(loss), losses
        optimizer.zero_grad()
        loss.backward()
        assert_every_parameter_has_a_finite_gradient(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    # In double precision: in single, sums in another order swap detections of almost equal scores.
    model.eval().double()
    size = [min(image.shape[axis] for image in images) for axis in (1, 2)]
    equal_sizes = [image[:, : size[0], : size[1]].double() for image in images]
    with torch.no_grad():
        together = model(equal_sizes)
        alone = [model([image])[0] for image in equal_sizes]
    for one, expected in zip(alone, together, strict=True):
        assert len(expected["boxes"]) > 0
        assert set(expected["labels"].tolist()) <= set(range(1, len(classes) + 1))
        assert torch.equal(one["labels"], expected["labels"])
        torch.testing.assert_close(one["scores"], expected["scores"], atol=1e-9, rtol=0)
        torch.testing.assert_close(one["boxes"], expected["boxes"], atol=1e-6, rtol=0)


# --- outputs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("detector", DETECTORS)
def test_inputs_are_not_changed(detector):
    images, targets = make_batch()
    before = copy.deepcopy((images, targets))
    build_detector(make_config(detector)).train()(images, targets)
    for now, then in zip(images, before[0], strict=True):
        assert torch.equal(now, then)
    for now, then in zip(targets, before[1], strict=True):
        assert torch.equal(now["boxes"], then["boxes"])
        assert torch.equal(now["labels"], then["labels"])


@pytest.mark.parametrize(
    ("detector", "model"), [*((name, {}) for name in DETECTORS), ("retinanet", SPIKING), ("fcos", SPIKING)]
)
def test_an_image_alone_and_in_a_batch_of_equal_sizes_gives_the_same_detections(detector, model):
    torch.manual_seed(0)
    config = make_config(detector, **copy.deepcopy(model))
    config.model.head.score_threshold, config.model.head.max_detections = 0.0, 20
    model = build_detector(config)
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


@pytest.mark.parametrize("detector", ["retinanet", "fcos"])
def test_label_zero_is_never_returned_and_boxes_are_inside_the_image(detector):
    torch.manual_seed(0)
    head = {"num_convs": 0, "score_threshold": 0.0, "max_detections": 300}
    model = build_detector(make_config(detector, head=head)).eval()
    with torch.no_grad():  # a background logit that would win everywhere
        model.head.classification_head.cls_logits.bias.view(-1, 4)[:, 0] = 10.0
        detections = model([torch.rand(3, 50, 70)])[0]
    assert len(detections["labels"]) > 50
    assert set(detections["labels"].tolist()) <= {1, 2, 3}
    boxes = detections["boxes"]
    assert (boxes >= 0).all()
    assert (boxes[:, 0::2] <= 70).all()
    assert (boxes[:, 1::2] <= 50).all()


# --- binarity -------------------------------------------------------------------------------------------------------


def spied_inputs(module: nn.Module, run) -> dict[str, list[torch.Tensor]]:
    """Every input of every convolution and linear layer, by its name; a head's are called once per level."""
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda layer, inputs, name=name: seen.setdefault(name, []).append(inputs[0].detach())
        )
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    run()
    for handle in handles:
        handle.remove()
    return seen


def is_binary(inputs: list[torch.Tensor]) -> bool:
    return all(bool(((x == 0) | (x == 1)).all()) for x in inputs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backbone", ["resnet18", "vgg11", "resnet50", "mobilenetv2"])
@pytest.mark.parametrize(("detector", "model"), [("retinanet", SPIKING), ("fcos", SPIKING), ("ssd", {})])
def test_spiking_from_the_stem_to_the_last_prediction_layer(detector, model, backbone, training):
    torch.manual_seed(0)
    model = build_detector(make_config(detector, backbone={"name": backbone}, **model)).train(training)
    batch = make_batch()
    inputs = spied_inputs(model, lambda: model(*batch) if training else model(batch[0]))
    convolutions = {name for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    assert inputs.keys() == convolutions
    stem = "backbone.body.stages.0.0" if backbone == "vgg11" else "backbone.body.stem.0"
    assert [name for name in inputs if not is_binary(inputs[name])] == [stem]
    firing = [x.mean().item() for name, values in inputs.items() if name != stem for x in values]
    assert max(firing) > 0  # not binary because silent


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


# --- structure ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("detector", "model"), [*((name, {}) for name in DETECTORS), ("retinanet", SPIKING), ("fcos", SPIKING)]
)
def test_the_twin_has_no_spike_layer_and_the_same_weights_otherwise(detector, model):
    hoyer = build_detector(make_config(detector, **model))
    twin = build_detector(make_config(detector, backbone={"activation": "relu"}, **model))
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
    assert list(maps) == ["c2", "c4", "p5", "p6"]
    assert [tuple(x.shape[1:]) for x in maps.values()] == [(16, 16, 32), (16, 4, 8), (16, 2, 4), (16, 1, 2)]
    assert model.anchor_generator.sizes[1] == (64, 81, 102)


@pytest.mark.parametrize("name", ["vgg11", "resnet18"])
def test_what_no_level_needs_is_not_there(name):
    model = build_detector(make_config(backbone={"name": name}, neck={"out_channels": 16, "levels": ["c2", "c3"]}))
    assert [info.name for info in model.backbone.body.feature_info] == ["c2", "c3"]
    model.train()
    (sum(model(*make_batch()).values()) + hoyer_penalty(model, "mean")).backward()
    assert_every_parameter_has_a_finite_gradient(model)


@pytest.mark.parametrize(
    ("detector", "names"),
    [
        ("fasterrcnn", ["c2", "c3", "c4", "c5", "pool"]),
        ("retinanet", ["c3", "c4", "c5", "p6", "p7"]),
        ("fcos", ["c3", "c4", "c5", "p6", "p7"]),
        ("ssd", ["c3", "c4", "c5", "p6", "p7", "p8"]),
    ],
)
def test_maps_that_each_detector_takes_unless_told_otherwise(detector, names):
    model = build_detector(make_config(detector)).eval()
    assert list(model.backbone(torch.randn(1, 3, 64, 64))) == names
    assert len(model.backbone.strides) == len(names)


def test_ssd300_has_the_default_boxes_of_torchvision():
    from torchvision.models.detection import ssd300_vgg16

    theirs = ssd300_vgg16(weights=None, weights_backbone=None).anchor_generator
    config = make_config("ssd", backbone={"name": "vgg16"}, min_size=[300], max_size=300)
    model = build_detector(config).eval()
    assert model.anchor_generator.aspect_ratios == theirs.aspect_ratios
    assert model.anchor_generator.scales == pytest.approx(theirs.scales)
    assert model.backbone.strides[:2] == (8, 16)
    maps = model.backbone(torch.randn(1, 3, 300, 300))
    assert [x.shape[-1] for x in maps.values()] == [37, 18, 9, 5, 3, 2]


def test_a_copy_of_a_model_in_the_middle_of_a_step_is_whole():
    torch.manual_seed(0)
    model = build_detector(make_config()).train()
    model(*make_batch())
    twin = copy.deepcopy(model)
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="no Hoyer term"):
        hoyer_penalty(twin)
    assert hoyer_penalty(model) > 0


@pytest.mark.parametrize("name", ["last.safetensors", ""])
def test_pretrained_backbone_is_taken_over_bit_by_bit(tmp_path: Path, name):
    from safetensors.torch import save_file

    classifier = backbones.Classifier(backbones.create("resnet18", width=0.125), 10)
    for module in classifier.modules():
        if isinstance(module, HoyerSpike):
            nn.init.uniform_(module.v_th)
            nn.init.uniform_(module.extremum)
    save_file(classifier.state_dict(), tmp_path / "last.safetensors")
    detector = build_detector(make_config(backbone={"weights": str(tmp_path / name)}))
    wanted = classifier.backbone.state_dict()
    found = detector.backbone.body.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "configs").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_recipe_builds_its_network_and_by_one_override_its_twin(path):
    kind = type(read_recipe(path))
    small = ["--model.backbone.width", "0.125", "--data.classes", "a", "b"]
    small += ["--model.neck.out_channels", "16"] if kind is DetectionRecipe else []
    spiking = task_of(load_config(path, small)).build_model()
    twin = task_of(load_config(path, [*small, "--model.backbone.activation", "relu"])).build_model()
    least = {"events_vgg9": 6, "dvscifar10_vgg": 8}.get(path.stem, 10)
    assert sum(isinstance(module, HoyerSpike) for module in spiking.modules()) >= least
    assert not any(isinstance(module, HoyerSpike) for module in twin.modules())


# --- refusals -------------------------------------------------------------------------------------------------------


def test_levels_must_exist_and_be_in_order():
    body = backbones.create("vgg11", width=0.125)
    with pytest.raises(ValueError, match="finest first; got c4, c3"):
        BackboneWithNeck(body, SpikingFPN([64, 64], 8, backbones.SpikeFactory()), levels=["c4", "c3"])


@pytest.mark.parametrize(
    ("detector", "model", "message"),
    [
        ("fasterrcnn", {"head": {"spiking": True}}, r"head\.spiking: retinanet and fcos"),
        ("ssd", {"head": {"spiking": True}}, r"head\.spiking: retinanet and fcos"),
        ("fcos", {"head": {"anchor_scale": 4.0}}, r"head\.anchor_scale"),
        ("ssd", {"head": {"anchor_scale": 4.0}}, r"head\.anchor_scale"),
        ("fasterrcnn", {"neck": {"extra_levels": 2}}, "fasterrcnn takes 0 or 1, got 2"),
        ("ssd", {"neck": {"spiking": True}}, r"neck\.spiking: ssd has no pyramid"),
        ("ssd", {"min_size": [64]}, r"min_size must be \[max_size\]; got \[64\] and max_size 96"),
    ],
)
def test_what_a_detector_cannot_have_is_refused(detector, model, message):
    with pytest.raises(ValidationError, match=message):
        make_config(detector, **model)


def test_faster_rcnn_needs_strides_that_double():
    config = make_config("fasterrcnn", neck={"levels": ["c2", "c4"], "out_channels": 16})
    with pytest.raises(ValueError, match="c2, c4 have the strides 4, 16: fasterrcnn needs"):
        build_detector(config)


def test_classes_are_needed():
    config = DetectionRecipe.model_validate({"data": {"format": "synthetic"}})
    with pytest.raises(ValueError, match=r"data\.classes is empty"):
        build_detector(config)


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_training_step_is_finite(detector, dtype):
    torch.manual_seed(0)
    model = build_detector(make_config(detector)).train()
    with torch.autocast("cpu", dtype):
        losses = model(*make_batch())
    loss = sum(losses.values()) + hoyer_penalty(model, "mean")
    loss.backward()
    assert torch.isfinite(loss)
    assert_every_parameter_has_a_finite_gradient(model)
