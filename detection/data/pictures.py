"""Images of any kind that people have at hand, as tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detection.data.image_files import decode_image, rgb_pixels
from detection.files import EVENT_SUFFIXES, kind_of

ImageLike = str | Path | np.ndarray | Image.Image | Tensor
Channels = Literal["rgb", "bgr"]


def read_image(image: ImageLike, channels: Channels = "rgb", number: int = 3) -> Tensor:
    """Return the image as (3, H, W): uint8 RGB, or float32 in [0, 1] if it came as floats.

    An image of another number of channels, of events, comes as a tensor only: (number, H, W).

    Files and PIL images are turned as their EXIF orientation says, as every viewer does. (Training does not: there,
    annotations count stored pixels.) Transparency is dropped, 16 bits are scaled to 8, grey becomes RGB.

    Args:
        image: a path; a PIL image of any mode; an array (H, W), (H, W, 3) or (H, W, 4), RGB, of uint8, uint16 or floats
            in [0, 1]; a tensor (3, H, W) or (1, H, W) of uint8 or of floats in [0, 1].
        channels: order of an array's or tensor's colours: "rgb", or "bgr" as OpenCV has them; files and PIL images know
            theirs.
        number: of channels that the network takes.

    Raises:
        ValueError: a file that is missing or does not decode, or another type, shape, range or order; says which.
    """
    if channels not in get_args(Channels):
        raise ValueError(f"channels: expected {' or '.join(get_args(Channels))}, got {channels!r}")
    if number != 3:
        if not isinstance(image, Tensor) or image.dim() != 3 or len(image) != number:
            given = f"a tensor {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            place, got = (image, "") if isinstance(image, str | Path) else ("image", f", got {given}")
            raise ValueError(
                f"{place}: the network takes events in {number} channels, a recording ({' '.join(EVENT_SUFFIXES)}) or "
                f"a tensor ({number}, H, W){got}"
            )
        return _check_values(image.detach())
    picture = _read(image)
    return picture.flip(0) if channels == "bgr" and isinstance(image, (np.ndarray, Tensor)) else picture


def _read(image: ImageLike) -> Tensor:
    match image:
        case str() | Path():
            return _from_array(_read_file(Path(image)))
        case Image.Image():
            try:
                return _from_array(rgb_pixels(image, upright=True))
            except (OSError, SyntaxError, ValueError) as error:
                raise ValueError(f"image: the PIL image of mode {image.mode} does not decode: {error}") from error
        case np.ndarray():
            return _from_array(image)
        case Tensor():
            if image.dim() != 3 or image.shape[0] not in (1, 3):
                raise ValueError(f"image: expected a tensor (3, H, W) or (1, H, W), got {tuple(image.shape)}")
            return _check_values(image.detach().expand(3, -1, -1))
        case _:
            raise ValueError(
                f"image: expected a path, a NumPy array, a PIL image or a tensor, got {type(image).__name__}"
            )


def _read_file(path: Path) -> np.ndarray:
    kind = kind_of(path)
    if kind != "a file":
        raise ValueError(f"{path}: {kind}{', not an image' if kind.startswith('a ') else ''}")
    try:
        return decode_image(path, upright=True)
    except ValueError as error:
        raise ValueError(f"{path}: the image does not decode: {error}") from None


def _from_array(pixels: np.ndarray) -> Tensor:
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[:, :, None], 3, axis=2)
    if pixels.ndim != 3 or pixels.shape[2] not in (3, 4):
        raise ValueError(f"image: expected an array (H, W), (H, W, 3) or (H, W, 4), got {pixels.shape}")
    if pixels.dtype == np.uint16:
        pixels = (pixels // 256).astype(np.uint8)
    if np.issubdtype(pixels.dtype, np.floating):
        pixels = pixels.astype(np.float32)  # torch has neither long floats nor those of the other byte order
    elif pixels.dtype != np.uint8:
        raise ValueError(f"image: expected uint8, uint16 or floats in [0, 1], got {pixels.dtype}")
    return _check_values(torch.from_numpy(np.ascontiguousarray(pixels[:, :, :3].transpose(2, 0, 1))))


def _check_values(picture: Tensor) -> Tensor:
    if picture.numel() == 0:
        raise ValueError(f"image: it has no pixels, its shape is {tuple(picture.shape)}")
    if picture.dtype == torch.uint8:
        return picture
    if not picture.is_floating_point():
        raise ValueError(f"image: expected uint8 or floats in [0, 1], got {picture.dtype}")
    picture = picture.float()
    low, high = picture.aminmax()
    if not (low >= 0 and high <= 1):  # NaN too
        raise ValueError(f"image: expected floats in [0, 1], found {low.item():g} to {high.item():g}; divide by 255?")
    return picture


def unit(picture: Tensor) -> Tensor:
    """Return float32 in [0, 1], divided as in training, so that the numbers are the same."""
    return picture if picture.is_floating_point() else picture.float().div_(255)


def pixels_of(picture: Tensor) -> np.ndarray:
    """Return (H, W, 3) uint8, to look at; see `as_rgb`."""
    whole = as_rgb((255 * picture).round().byte() if picture.is_floating_point() else picture)
    return whole.permute(1, 2, 0).cpu().numpy()


def as_rgb(image: Tensor) -> Tensor:
    """Return (3, H, W) to look at: of events, (2 T, H, W), red where it became darker and green where brighter."""
    if image.shape[0] in (1, 3):
        return image.expand(3, -1, -1)
    darker, brighter = image[0::2].amax(0), image[1::2].amax(0)
    return torch.stack([darker, brighter, torch.zeros_like(darker)])
