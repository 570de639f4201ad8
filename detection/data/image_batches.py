"""Batches of labelled images: augmented on the training device, or read from disk one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from detection.config.schema import ImageAugment, ImageData
from detection.data.batches import TrainingBatches, derive_seed, evaluation_batches, take_share
from detection.data.image_files import load_image
from detection.data.images import ImageFiles, Images


class MemoryBatches:
    """Batches (images, labels) of a split that lies on the training device, augmented there, a whole batch at a time.

    An image is padded with black, a window of its own size is cut out at a random place, flipped, and a square of it
    blackened, as `augment` says. Without `augment` they come in order, as they are.

    Args:
        data: the split; its pixels are moved to `device`.
        device: where the batches lie.
        batch_size: images per batch and process; the last one may have fewer.
        augment: None in evaluation.
        seed: of order and augmentation, which differ from epoch to epoch.
        share: (index, number) of the processes that share the split, see `TrainingBatches` and `evaluation_batches`.

    Shape: images (B, 3, size, size) float32 in [0, 1], labels (B,) int64.
    """

    def __init__(
        self,
        data: Images,
        device: torch.device,
        *,
        batch_size: int,
        augment: ImageAugment | None = None,
        seed: int = 0,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.pixels, self.labels = data.pixels.to(device), data.labels.to(device)
        self.augment, self.seed, self.share = augment, seed, share
        self.turned = torch.rand(len(self.labels), generator=torch.Generator().manual_seed(seed)) < 0.5
        self.order = TrainingBatches(len(self.labels), batch_size, seed=seed, share=share)

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """The next pass is that of `epoch`, counted from 1, without its first `first` batches."""
        self.order.set_epoch(epoch, first)

    def __len__(self) -> int:
        if self.augment is None:
            return len(evaluation_batches(len(self.labels), self.order.batch_size, self.share))
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.augment is None:
            for batch in evaluation_batches(len(self.labels), self.order.batch_size, self.share):
                yield self._load(torch.tensor(batch))
            return
        epoch, batches = self.order.draw()
        for position, batch in batches:
            # On the CPU, so the same on every device, and for the whole batch, so the same for every process.
            generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, position))
            drawn = draw_augmentation(len(batch), self.pixels.shape[-1], self.augment, generator)
            if "flip" in drawn and self.augment.flip == "alternating":
                drawn["flip"] = self.turned[batch] ^ bool(epoch % 2)
            chosen = take_share(range(len(batch)), self.share)
            yield self._load(torch.tensor(batch)[chosen], {name: values[chosen] for name, values in drawn.items()})

    def _load(self, indices: Tensor, drawn: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        device = self.pixels.device
        indices = indices.to(device)
        images = self.pixels[indices]
        if drawn is not None:
            images = augment_batch(images, self.augment, {name: values.to(device) for name, values in drawn.items()})
        return images / 255, self.labels[indices]


def draw_augmentation(number: int, size: int, augment: ImageAugment, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw what `augment_batch` does to each image.

    "top" and "left" of its window, "flip", "y" and "x" of its square, "rectangle": first row and column, and those
    behind the last ones, (number, 4); "seed" of what RandAugment draws.

    Shape: each (number,), but for the rectangle.
    """
    drawn: dict[str, Tensor] = {}
    if augment.padding:
        for name in ("top", "left"):
            drawn[name] = torch.randint(2 * augment.padding + 1, (number,), generator=generator)
    if augment.hflip:
        drawn["flip"] = torch.rand(number, generator=generator) < augment.hflip
    if augment.cutout:
        for name in ("y", "x"):  # the square's middle: near the border a part of it falls outside
            drawn[name] = torch.randint(size, (number,), generator=generator)
    if augment.erase:
        drawn["rectangle"] = draw_rectangles(number, size, augment.erase, generator)
    if augment.randaugment:
        drawn["seed"] = torch.randint(2**62, (number,), generator=generator)
    return drawn


def draw_rectangles(number: int, size: int, probability: float, generator: torch.Generator) -> Tensor:
    """Draw rectangles of random erasing (Zhong et al., arXiv:1708.04896): 2 to 33 % of an image, sides up to 1 to 3.3.

    Shape: (number, 4), rows and columns from and to; empty ones where nothing is erased.
    """
    chosen, area, ratio, *place = torch.rand(5, number, generator=generator)
    area, ratio = size**2 * (0.02 + 0.31 * area), 0.3 * (3.3 / 0.3) ** ratio
    sides = [side.sqrt().round().clamp(1, size).long() for side in (area * ratio, area / ratio)]
    starts = [(share * (size - side + 1)).long() for share, side in zip(place, sides, strict=True)]
    ends = [start + side * (chosen < probability) for start, side in zip(starts, sides, strict=True)]
    return torch.stack([starts[0], starts[1], ends[0], ends[1]], dim=1)


def augment_batch(images: Tensor, augment: ImageAugment, drawn: Mapping[str, Tensor]) -> Tensor:
    """Square images (B, C, S, S) cut, flipped and blackened in part, each by draws of its own; dtype kept.

    Args:
        drawn: from `draw_augmentation`, on the images' device.
    """
    device, size = images.device, images.shape[-1]
    if "seed" in drawn:
        images = torch.stack(
            [rand_augment(*each, augment) for each in zip(images, drawn["seed"].tolist(), strict=True)]
        )
    if "top" in drawn:
        rows = drawn["top"][:, None] + torch.arange(size, device=device)
        columns = drawn["left"][:, None] + torch.arange(size, device=device)
        padded = F.pad(images, [augment.padding] * 4)
        each = torch.arange(len(images), device=device)[:, None, None]
        # Indices on both sides of the channels put these last: (B, S, S, C).
        images = padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if "flip" in drawn:
        images = torch.where(drawn["flip"][:, None, None, None], images.flip(-1), images)
    if "y" in drawn:
        near_rows, near_columns = (
            (torch.arange(size, device=device) - drawn[name][:, None] + augment.cutout // 2) // augment.cutout == 0
            for name in ("y", "x")
        )
        images = images.masked_fill((near_rows[:, :, None] & near_columns[:, None, :])[:, None], 0)
    if "rectangle" in drawn:
        lines = torch.arange(size, device=device)
        top, left, bottom, right = drawn["rectangle"].mT[:, :, None]
        rows, columns = (lines >= top) & (lines < bottom), (lines >= left) & (lines < right)
        images = images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)
    return images


def rand_augment(image: Tensor, seed: int, augment: ImageAugment) -> Tensor:
    """One image (3, S, S) uint8, changed as RandAugment (Cubuk et al., arXiv:1909.13719) draws it from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return v2.RandAugment(augment.randaugment, augment.randaugment_magnitude)(image)


class FolderImages(Dataset):
    """Items (image (3, size, size) float32 in [0, 1], label) read from disk one by one.

    Training cuts a random part of the image and resizes it; evaluation resizes the short side to 256/224 of `size` and
    cuts out the centre, as is usual for ImageNet.

    Args:
        files: path and label of every image.
        data: size and augmentation.
        train: with augmentation or without.
    """

    def __init__(self, files: ImageFiles, data: ImageData, *, train: bool) -> None:
        self.files = files
        if train:
            self.transform = v2.Compose(
                [
                    v2.RandomResizedCrop(data.size, scale=(data.augment.min_area, 1.0), antialias=True),
                    v2.RandomHorizontalFlip(data.augment.hflip),
                    v2.ToDtype(torch.float32, scale=True),
                ]
            )
        else:
            self.transform = evaluation_transform(data.size)

    def __len__(self) -> int:
        return len(self.files.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files.files[index]
        pixels = torch.from_numpy(load_image(path, upright=True).transpose(2, 0, 1).copy())
        return self.transform(pixels), label


def evaluation_transform(size: int) -> v2.Transform:
    """Return the usual preparation of large images: the short side to 256/224 of `size`, then the centre.

    Shape: (3, H, W) uint8 -> (3, size, size) float32 in [0, 1].
    """
    resize = v2.Resize(round(size * 256 / 224), antialias=True)
    return v2.Compose([resize, v2.CenterCrop(size), v2.ToDtype(torch.float32, scale=True)])
