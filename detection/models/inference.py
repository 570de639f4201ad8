"""Detectors on images of any shape, alone or in batches: padding, sizes, thresholds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.ops import clip_boxes_to_image


@contextmanager
def thresholds(model: nn.Module, score: float | None = None, nms: float | None = None) -> Iterator[None]:
    """While open, let the detector's own post-processing use these thresholds; None keeps the recipe's."""
    head = model.roi_heads if isinstance(model, FasterRCNN) else model
    before = head.score_thresh, head.nms_thresh
    head.score_thresh = before[0] if score is None else score
    head.nms_thresh = before[1] if nms is None else nms
    try:
        yield
    finally:
        head.score_thresh, head.nms_thresh = before


class AnyShape:
    """Mixin of torchvision's detectors: images so long and thin that resizing would leave nothing of them are padded.

    Boxes stay those of the images: what was padded is no part of them.

    Attributes:
        num_labels: K, the largest label that a target may have.
    """

    num_labels: float = math.inf

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return torchvision's losses in training, and in evaluation its detections, within each image.

        Raises:
            ValueError: in training, not as many targets as images, or a label that is not in 1..K.
        """
        if self.training and targets is not None:
            if len(targets) != len(images):
                raise ValueError(f"targets: expected one for each of {len(images)} images, got {len(targets)}")
            labels = torch.cat([target["labels"] for target in targets])
            wrong = labels[(labels < 1) | (labels > self.num_labels)]  # on a GPU the loss would end the process
            if len(wrong):
                raise ValueError(f"targets: found label {wrong[0].item()}; labels are in 1..K, K = {self.num_labels}")
        padded = [pad_for(self.transform, image) for image in images]
        found = super().forward(padded, targets)
        if self.training:
            return found
        pairs = zip(images, padded, found, strict=True)
        return [each if image is wide else within(each, image) for image, wide, each in pairs]


def within(found: dict[str, Tensor], image: Tensor) -> dict[str, Tensor]:
    """Return detections cut off at the border of an image, without those outside of it."""
    boxes = clip_boxes_to_image(found["boxes"], image.shape[1:])
    kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return {name: value[kept] for name, value in (found | {"boxes": boxes}).items()}


def pad_for(transform: nn.Module, picture: Tensor) -> Tensor:
    """Return the image, widened on the right or below where it is so thin that resizing would leave nothing of it.

    Fitted into `max_size`, an image of 20,000 x 20 pixels would be less than a pixel high, which torchvision cannot
    resize. The mean colour is put beside it, as torchvision does behind the images of a batch.
    """
    height, width = picture.shape[1:]
    if transform.fixed_size is not None or max(height, width) <= transform.max_size * min(height, width):
        return picture
    least = math.ceil(max(height, width) / transform.max_size * (1 + 1e-6))
    mean = torch.tensor(transform.image_mean, device=picture.device).view(-1, 1, 1)
    ground = mean if picture.is_floating_point() else (255 * mean).round()
    padded = ground.to(picture.dtype).repeat(1, max(height, least), max(width, least))
    padded[:, :height, :width] = picture
    return padded


def padded_size(transform: nn.Module, picture: Tensor) -> tuple[int, int]:
    """Return height and width in pixels that the network sees of an image that is alone in its batch."""
    empty = pad_for(transform, torch.empty(picture.shape, device="meta"))
    resized = transform.resize(empty)[0]  # sizes alone, nothing is computed
    step = transform.size_divisible
    height, width = (math.ceil(length / step) * step for length in resized.shape[1:])
    return height, width


def check_unit_interval(name: str, value: float) -> None:
    """Raise ValueError for a number that is not in [0, 1]."""
    if not isinstance(value, Real) or not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value!r}")
