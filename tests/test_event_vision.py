"""Images resized and boxes suppressed by the kernels, beside torch's and torchvision's own operations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import batched_nms

from backbones.deploy.events import available, library, using, vision
from backbones.deploy.events.vision import resize_and_pad, suppress
from detection.config import load_config
from detection.models import build_detector
from detection.models.quick import KeptAnchors, PlainBatch

KERNELS = available()[:-1]
FIXED = settings(derandomize=True, deadline=None, database=None, max_examples=60)
SIDES = st.integers(1, 90)
needs_kernels = pytest.mark.skipif(not KERNELS, reason="built without kernels")


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@needs_kernels
@FIXED
@given(SIDES, SIDES, SIDES, SIDES, st.integers(0, 5), st.integers(0, 20), st.integers(0, 2**31))
def test_images_are_resized_and_padded(height, width, out_height, out_width, below, beside, seed):
    mean, image = torch.tensor([0.5, -0.25]), randn(seed, 2, height, width)
    shifted = (image - mean.view(-1, 1, 1))[None]
    resized = F.interpolate(shifted, size=(out_height, out_width), mode="bilinear", align_corners=False)[0]
    expected = F.pad(resized, (0, beside, 0, below)) + mean.view(-1, 1, 1)
    found = []
    for name in KERNELS:
        out = torch.full((2, out_height + below, out_width + beside), torch.nan)
        with using(name):
            resize_and_pad(image, mean, (out_height, out_width), out)
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)  # torch's own last bits depend on its build
        found.append(out)
    assert all(torch.equal(each, found[0]) for each in found)


@needs_kernels
def test_a_row_is_resized_by_hand():
    """Columns of 0 and 8 as 4: at -0.25, 0.25, 0.75 and 1.25 of a column."""
    out = torch.empty(1, 2, 5)
    resize_and_pad(torch.tensor([[[0.0, 8.0]]]), torch.tensor([1.0]), (1, 4), out)
    assert out.tolist() == [[[0, 2, 6, 8, 1], [1, 1, 1, 1, 1]]]


@needs_kernels
@FIXED
@given(st.integers(1, 60), st.integers(1, 4), st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.integers(1, 70), st.data())
def test_boxes_are_those_of_torchvision(number, classes, threshold, most, data):
    """Corners and scores of few values: boxes lie on each other, have no area, and are equally good."""

    def draw(largest: int, count: int) -> Tensor:
        return torch.tensor(data.draw(st.lists(st.integers(0, largest), min_size=count, max_size=count)))

    corners, scores, labels = draw(6, 4 * number).view(-1, 4), draw(40, number) / 41, draw(classes - 1, number)
    boxes = torch.cat([corners[:, :2], corners[:, :2] + corners[:, 2:]], 1).float()
    apart = boxes + (labels * (boxes.max() + 1))[:, None]
    expected = batched_nms(boxes, scores, labels, threshold)[:most]
    for name in KERNELS:
        with using(name):
            assert torch.equal(suppress(apart, scores, None, threshold, most), expected)
            by_label = suppress(boxes, scores, labels, threshold, most)
        assert torch.equal(scores[by_label], scores[expected])  # equal ones may come in another order


@needs_kernels
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_many_boxes_are_those_of_torchvision(spread):
    """More than torchvision moves apart; with a spread of 30 most scores are 0 or 1, and equal."""
    corners, labels = 50 * randn(0, 3000, 2), randn(3, 3000).mul(2).long().abs()
    boxes, scores = torch.cat([corners, corners + 30 * randn(1, 3000, 2).abs()], 1), (spread * randn(2, 3000)).sigmoid()
    expected = batched_nms(boxes, scores, labels, 0.4)
    for name in KERNELS:
        with using(name):
            assert torch.equal(suppress(boxes, scores, labels, 0.4, 100), expected[:100])
            assert torch.equal(suppress(boxes, scores, labels, 0.4, 5000), expected)


@needs_kernels
@pytest.mark.parametrize(
    ("score", "shift", "finds"),
    [(0.05, -3.0, True), (0.0, -3.0, True), (0.05, -9.0, True), (0.995, 3.0, True), (1.0, 0.0, False)],
)
def test_a_retinanet_has_the_boxes_of_torchvision(score, shift, finds):
    config = load_config("configs/bccd_retinanet_resnet18.yaml")
    config.model.backbone.width, config.model.backbone.weights = 0.125, None
    model, sizes = build_detector(config).eval(), (768, 192)
    model.score_thresh = score
    logits = [2 * randn(index, 2, size, 4) + shift for index, size in enumerate(sizes)]
    outputs = {"cls_logits": logits, "bbox_regression": [randn(size, 2, size, 4) for size in sizes]}
    corners = [60 * randn(size + 1, size, 2).abs() for size in sizes]
    anchors = [[torch.cat([corner, corner + 20], 1) for corner in corners]] * 2
    with using("torch"):
        expected = model.postprocess_detections(outputs, anchors, [(64, 96), (50, 40)])
    found = model.postprocess_detections(outputs, anchors, [(64, 96), (50, 40)])
    assert finds == any(len(each["boxes"]) for each in found)
    for one, other in zip(found, expected, strict=True):
        assert 0 not in one["labels"] and one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@needs_kernels
def test_batches_are_those_of_torchvision_with_the_mean_added(monkeypatch):
    images = [torch.rand(3, 50, 90), torch.rand(3, 64, 40)]
    batch = PlainBatch(GeneralizedRCNNTransform(48, 64, [0.5, 0.25, 0.75], [1.0] * 3))
    found = batch(images)[0]
    with using("torch"):
        expected = batch(images)[0]
    assert found.image_sizes == expected.image_sizes == [(35, 64), (64, 40)]
    torch.testing.assert_close(found.tensors, expected.tensors, rtol=0, atol=1e-6)
    for name in ("events_resize", "events_suppress"):
        monkeypatch.setattr(library.LIBRARY, name, lambda call: -1)
    with pytest.raises(MemoryError, match=r"to resize an image of \(3, 50, 90\)"):
        batch(images)
    with pytest.raises(MemoryError, match="for 2 boxes"):
        vision.suppress(torch.rand(2, 4), torch.rand(2), None, 0.5, 2)


def test_images_of_other_channels_are_left_to_torchvision():
    """Of one channel it makes three, others it refuses; the kernels would read and write beside the memory."""
    plain = PlainBatch(GeneralizedRCNNTransform(64, 64, [0.5, 0.4, 0.3], [1.0] * 3))
    images = [torch.rand(3, 40, 64), torch.full((1, 40, 64), 0.7)]
    found = plain(images)[0].tensors
    expected = plain([images[0], images[1].expand(3, 40, 64)])[0].tensors
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    with pytest.raises(RuntimeError, match="must match the size"):
        plain([torch.rand(4, 40, 64)])


def test_anchors_are_computed_once_per_size():
    generator = AnchorGenerator(((8,),), ((1.0,),))
    kept, maps = KeptAnchors(generator), [torch.zeros(1, 1, 2, 2)]
    for side in (16, 32, 16):
        images = ImageList(torch.zeros(1, 3, side, side), [(side, side)])
        (found,), (expected,) = kept(images, maps), generator(images, maps)
        assert torch.equal(found, expected)
    assert kept(images, maps)[0] is found and len(kept.known) == 2
