"""Corruptions of images, as a worse camera or connection make them."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from backbones import hook_layers
from detection.robustness import IMAGE_KINDS

HIGHEST = {"contrast": 1.0, "brightness": 1.0, "jpeg": 99.0}


def corrupt(images: Tensor, kind: str, severity: float, *, seed: int = 0, first: int = 0) -> Tensor:
    """Return the images corrupted; severity 0 gives them as they are.

    - gaussian_noise: severity is the standard deviation, of each pixel and colour for itself.
    - blur: severity is the standard deviation of a Gaussian kernel in pixels.
    - contrast: severity in [0, 1] is how far every pixel goes to the mean grey of its image.
    - brightness: severity in [0, 1] is how far every pixel goes to black: a darker picture.
    - jpeg: compressed with quality 100 - severity, severity up to 99.

    Args:
        images: RGB, in [0, 1].
        kind: one of `IMAGE_KINDS`.
        severity: from 0.
        seed: of gaussian_noise.
        first: number of the first image: the noise of an image depends on its number and the seed alone.

    Shape: (N, 3, H, W) -> (N, 3, H, W) in [0, 1].

    Raises:
        ValueError: another kind, or a severity that it does not have.
    """
    if kind not in IMAGE_KINDS:
        raise ValueError(f"kind {kind!r}: not a corruption of images (allowed: {', '.join(IMAGE_KINDS)})")
    highest = HIGHEST.get(kind, math.inf)
    if not 0 <= severity <= highest or severity == math.inf:
        raise ValueError(f"severity {severity:g} of {kind}: allowed is 0 to {highest:g}, finite")
    if severity == 0:
        return images
    match kind:
        case "gaussian_noise":
            draws = [
                np.random.default_rng((seed, 2, first + index)).standard_normal(images.shape[1:], dtype=np.float32)
                for index in range(len(images))
            ]
            changed = images + severity * torch.from_numpy(np.stack(draws)).to(images.device)
        case "blur":
            radius = min(math.ceil(3 * severity), min(images.shape[-2:]) - 1)  # the border is mirrored, so no more
            changed = F.gaussian_blur(images, [2 * radius + 1] * 2, [severity] * 2)
        case "contrast":
            changed = F.adjust_contrast(images, 1 - severity)
        case "brightness":
            changed = F.adjust_brightness(images, 1 - severity)
        case _:
            changed = torch.stack([_compress(image, round(100 - severity)) for image in images])
    return changed.clamp(0, 1)


def _compress(image: Tensor, quality: int) -> Tensor:
    """(3, H, W) in [0, 1] -> the same, as a JPEG file gives it back."""
    pixels = (255 * image).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    file = io.BytesIO()  # by PIL: torchvision's own JPEG is going to be removed from it
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    with Image.open(file) as read:
        back = torch.from_numpy(np.array(read)).permute(2, 0, 1)
    return back.to(image.device, image.dtype) / 255


@contextmanager
def corrupted_input(model: nn.Module, severities: Mapping[str, float], *, seed: int = 0) -> Iterator[list[Tensor]]:
    """Corrupt the images of every batch that goes into `model` while the context is open, by one kind after the other.

    Args:
        model: takes a tensor (N, 3, H, W) or a list of (3, H, W), in [0, 1].
        severities: of some of `IMAGE_KINDS`, see `corrupt`.
        seed: of gaussian_noise.

    Yields:
        A list that has the corrupted images of the last batch.
    """
    last: list[Tensor] = []

    def enter(name: str, module: nn.Module, images: Any) -> Any:
        for kind, severity in severities.items():
            ((images, _),) = corrupt_batches([(images, None)], kind, severity, seed)
        last[:] = images
        return images

    with hook_layers({"": model} if severities else {}, before=enter):
        yield last


def corrupt_batches(
    batches: Iterable[tuple[Any, Any]], kind: str, severity: float, seed: int
) -> Iterator[tuple[Any, Any]]:
    """Yield evaluation batches with every image corrupted.

    Args:
        batches: (images, targets), images in [0, 1], a tensor (N, 3, H, W) or a list of (3, H, W); always in the same
            order.
        kind, severity, seed: as in `corrupt`.
    """
    first = 0
    for images, targets in batches:
        if isinstance(images, Tensor):
            changed: Any = corrupt(images, kind, severity, seed=seed, first=first)
        else:  # images differ in size
            numbered = enumerate(images, start=first)
            changed = [corrupt(image[None], kind, severity, seed=seed, first=number)[0] for number, image in numbered]
        first += len(images)
        yield changed, targets
