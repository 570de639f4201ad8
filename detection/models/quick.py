"""The work of torchvision's detectors around their networks, in evaluation on a CPU, by kernels.

Images are resized and overlapping boxes left out by `backbones.deploy.events.vision`; scores are computed of boxes that
can have enough of it, and anchors once per size. Without those kernels, on a GPU and in training all is torchvision's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import clip_boxes_to_image

from backbones.deploy.events.vision import has_vision, resize_and_pad, suppress

MOST_SIZES = 256  # of images, for which something is kept
BY_LABEL = 1000  # boxes, from which on torchvision compares those of each label; of fewer it moves labels apart
SURE = 0.99  # of scores up to it a logit tells well enough whether they are reached
MARGIN = 1e-4  # of the logit, for the rounding of the score
VECTORS = 64  # numbers of which torch computes none one by one, which may round otherwise


class PlainBatch(GeneralizedRCNNTransform):
    """A detector's transform whose batches stay in [0, 1]: padded with the mean colour, and not normalised.

    Args:
        transform: of a torchvision detector.
    """

    def __init__(self, transform: GeneralizedRCNNTransform) -> None:
        mean = list(transform.image_mean)
        ones = [1.0] * len(mean)
        super().__init__(
            transform.min_size, transform.max_size, mean, ones, transform.size_divisible, transform.fixed_size
        )
        self.sizes: dict[tuple[int, ...], tuple[int, int]] = {}
        self.eval()

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[ImageList, list[dict[str, Tensor]] | None]:
        """Return the batch; padded with 0 once the mean is taken off, that is with the mean."""
        channels = len(self.image_mean)
        plain = all(has_vision(image) and image.dim() == 3 and len(image) == channels for image in images)
        if targets is None and images and plain:
            return self._by_kernels(images), None
        batch, targets = super().forward(images, targets)
        batch.tensors += batch.tensors.new_tensor(self.image_mean).view(-1, 1, 1)
        return batch, targets

    def _by_kernels(self, images: list[Tensor]) -> ImageList:
        mean, sizes = torch.tensor(self.image_mean), [self._size_of(image.shape) for image in images]
        step = self.size_divisible
        height, width = (math.ceil(max(lengths) / step) * step for lengths in zip(*sizes, strict=True))
        batch = torch.empty(len(images), len(mean), height, width)
        for image, size, place in zip(images, sizes, batch, strict=True):
            resize_and_pad(image, mean, size, place)
        return ImageList(batch, sizes)

    def _size_of(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return height and width that an image is resized to."""
        if shape not in self.sizes:
            if len(self.sizes) >= MOST_SIZES:
                self.sizes.clear()
            resized = self.resize(torch.empty(shape, device="meta"))[0]  # sizes alone, nothing is computed
            self.sizes[shape] = tuple(resized.shape[1:])
        return self.sizes[shape]


class KeptAnchors(nn.Module):
    """A detector's generator of anchors that computes those of a size once.

    Args:
        generator: of torchvision.
    """

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator = generator
        self.known: dict[tuple[object, ...], list[Tensor]] = {}

    def forward(self, images: ImageList, maps: list[Tensor]) -> list[Tensor]:
        """Return the anchors of each image, which nobody is to change."""
        key = (images.tensors.shape, images.tensors.dtype, images.tensors.device, *(x.shape for x in maps))
        if key not in self.known:
            if len(self.known) >= MOST_SIZES:
                self.known.clear()
            self.known[key] = self.generator(images, maps)
        return self.known[key]


def retinanet_boxes(
    detector: RetinaNet, logits: list[Tensor], regression: list[Tensor], anchors: list[Tensor], size: tuple[int, int]
) -> dict[str, Tensor]:
    """Return the detections of one image, as RetinaNet.postprocess_detections does, without those of label 0.

    Args:
        detector: its thresholds and numbers of boxes count.
        logits: of each level, (A_i, K + 1).
        regression: of each level, (A_i, 4).
        anchors: of each level, (A_i, 4).
        size: height and width of the image, resized.
    """
    least, columns = detector.score_thresh, logits[0].shape[1]
    can_reach = math.log(least / (1 - least)) - MARGIN if 0 < least <= SURE else -math.inf
    found: list[list[Tensor]] = []
    for logits_of, regression_of, anchors_of in zip(logits, regression, anchors, strict=True):
        chosen = logits_of > can_reach
        chosen[:, 0] = False
        places = chosen.flatten().nonzero().squeeze(1)
        values = logits_of.flatten()[places]
        scores = torch.sigmoid(nn.functional.pad(values, (0, -len(values) % VECTORS)))[: len(values)]
        enough = scores > least
        if not bool(enough.all()):
            scores, places = scores[enough], places[enough]
        scores, best = scores.topk(min(detector.topk_candidates, len(scores)))
        places = places[best]
        rows = torch.div(places, columns, rounding_mode="floor")
        found.append([regression_of[rows], anchors_of[rows], scores, places % columns])
    codes, around, scores, labels = map(torch.cat, zip(*found, strict=True))
    boxes = clip_boxes_to_image(detector.box_coder.decode_single(codes, around), size)
    most, threshold = detector.detections_per_img, detector.nms_thresh
    if len(boxes) > BY_LABEL or len(boxes) == 0:
        kept = suppress(boxes, scores, labels, threshold, most)
    else:
        apart = labels.to(boxes) * (boxes.max() + 1)
        kept = suppress(boxes + apart[:, None], scores, None, threshold, most)
    return {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}
