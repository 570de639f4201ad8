"""The dataset of a detector over the records of a reader."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from detection.data.records import Annotations

Sample = tuple[np.ndarray, np.ndarray, np.ndarray]
Transform = Callable[[np.ndarray, np.ndarray, np.ndarray], Sample]
Mixture = Callable[[Sample, Callable[[], Sample]], Sample]


class DetectionDataset(Dataset):
    """Images and targets as torchvision's detectors take them.

    An item is (image, target): image (3, H, W) float32 RGB in [0, 1], or of as many channels as its record has; target
    {"boxes": (M, 4) float32 x1 y1 x2 y2, "labels": (M,) int64 in 1..K, "image_id": of the record}, without the ignored
    objects.

    Args:
        annotations: what to read.
        transform: augmentation of (image (H, W, 3) uint8, boxes, labels); the boxes are then pixels of its result.
        mixture: what `mixed` does before it: (such a sample, what draws another one by torch's generator) -> a sample.
    """

    def __init__(
        self, annotations: Annotations, transform: Transform | None = None, mixture: Mixture | None = None
    ) -> None:
        self.annotations = annotations
        self.transform, self.mixture = transform, mixture

    def __len__(self) -> int:
        return len(self.annotations.records)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels 1..K."""
        return self.annotations.categories

    @property
    def dropped(self) -> tuple[str, ...]:
        """A sentence for each thing that was left out or mended."""
        return self.annotations.dropped

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        return self._item(index, self._sample(index))

    def mixed(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        """Return an item into which the mixture has put other images."""
        return self._item(index, self.mixture(self._sample(index), self._draw))

    def _draw(self) -> Sample:
        return self._sample(int(torch.randint(len(self), ())))

    def _sample(self, index: int) -> Sample:
        record = self.annotations.records[index]
        image = record.read()
        height, width = image.shape[:2]
        if (width, height) != (record.width, record.height):
            raise ValueError(
                f"{record.path}: the image is {width}x{height} pixels, its annotations say "
                f"{record.width}x{record.height}; correct the annotation file"
            )
        return image, record.boxes[~record.ignore], record.labels[~record.ignore]

    def _item(self, index: int, sample: Sample) -> tuple[Tensor, dict[str, Any]]:
        image, boxes, labels = sample if self.transform is None else self.transform(*sample)
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        image_id = self.annotations.records[index].image_id
        target = {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels), "image_id": image_id}
        return pixels.float() / 255, target

    def fingerprint(self) -> str:
        """Return a SHA-256 of images' names and sizes, boxes, labels and classes: what a run depends on."""
        digest = hashlib.sha256(repr(self.annotations.categories).encode())
        for record in self.annotations.records:
            about = (record.path.name, record.path.stat().st_size, record.width, record.height, record.upright)
            about += (record.end,) if hasattr(record, "end") else ()  # of an image made of events
            digest.update(repr(about).encode())
            for column in (record.boxes, record.labels, record.ignore):
                digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()

    def choose(self, indices: Sequence[int]) -> DetectionDataset:
        """Return these images alone."""
        records = self.annotations.records
        chosen = replace(self.annotations, records=tuple(records[index] for index in indices))
        return DetectionDataset(chosen, self.transform, self.mixture)

    def ground_truth(self) -> dict[str, Any]:
        """A COCO dictionary for pycocotools, in pixels of the stored images; ignored objects have iscrowd = 1.

        A detection that lies on an ignored object counts neither as right nor as wrong.
        """
        annotations: list[dict[str, Any]] = []
        for record in self.annotations.records:
            columns = (record.xywh.tolist(), record.labels.tolist(), record.ignore.tolist(), record.area.tolist())
            for box, label, ignore, area in zip(*columns, strict=True):
                category_id = self.annotations.category_ids[label - 1]
                number = len(annotations) + 1  # pycocotools takes id 0 for "unmatched"
                row = {"id": number, "image_id": record.image_id, "category_id": category_id}
                annotations.append(row | {"bbox": box, "area": area, "iscrowd": int(ignore)})
        images = [
            {"id": each.image_id, "file_name": each.path.name, "width": each.width, "height": each.height}
            for each in self.annotations.records
        ]
        categories = [
            {"id": category_id, "name": name}
            for category_id, name in zip(self.annotations.category_ids, self.annotations.categories, strict=True)
        ]
        return {"info": {}, "images": images, "annotations": annotations, "categories": categories}
