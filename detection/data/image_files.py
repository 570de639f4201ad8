"""Image files: which are read, what may be wrong with one, and its pixels."""

from __future__ import annotations

import os
import warnings
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps

Verify = Literal["header", "full"]

# Only these are tried, whatever a file's name says: others start programs (EPS) or are rare enough to be a mistake.
FORMATS = ("JPEG", "MPO", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "AVIF", "JPEG2000")
EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".jfif",
    ".png",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".webp",
    ".avif",
    ".ppm",
    ".pgm",
    ".jp2",
)
# What a whole file has at its end. Some cameras write more behind it; the marker cannot occur inside of JPEG's data.
END_MARKERS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
END_SEARCH = 4096  # bytes
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)  # of an image, above which PIL suspects a decompression bomb
ORIENTATION = 0x0112  # EXIF; 5 to 8 turn by a quarter
BITS, SAMPLE_RANGE = 258, ((340, 341), (280, 281))  # TIFF: bits per sample; smallest and largest value


class Look(NamedTuple):
    """What `examine_image` found.

    Attributes:
        problem: why the image cannot be used; None if it can.
        notes: what a reader should know of a usable image.
        upright: its annotations belong to the image as its EXIF orientation turns it.
    """

    problem: str | None = None
    notes: tuple[str, ...] = ()
    upright: bool = False


def is_image(path: Path) -> bool:
    """Return whether a file has the name of an image, hidden files and those in hidden folders left out."""
    return path.suffix.lower() in EXTENSIONS and not any(part.startswith(".") for part in (path.name, path.parent.name))


def open_image(file: Path | BinaryIO) -> Image.Image:
    """Return an image of one of `FORMATS` as PIL opens it.

    Raises:
        ValueError: it is none, or has too many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(file, formats=_known_formats())
    except Image.UnidentifiedImageError:
        raise ValueError(f"no image of a known format (allowed: {', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise ValueError(f"more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # a decoder may fail in any way
        raise ValueError(_sentence(error)) from None


@cache
def _known_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this installation of PIL has a decoder for."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def image_size(path: Path) -> tuple[int, int] | None:
    """Return width and height by the header of an image file, as its pixels are stored; None if it has none."""
    try:
        with open_image(path) as image:
            return image.size
    except (ValueError, OSError):
        return None


def image_problem(
    path: Path, width: int | None = None, height: int | None = None, verify: Verify = "header"
) -> str | None:
    """Return what is wrong with an image file, None if nothing is; see `examine_image`."""
    return examine_image(path, width, height, verify).problem


def examine_image(path: Path, width: int | None = None, height: int | None = None, verify: Verify = "header") -> Look:
    """Look at an image file without decoding it, unless there is reason to.

    Args:
        path: the file.
        width, height: what its annotations say, in pixels; None: any size is right.
        verify: "header" reads the header and looks for the end of a JPEG or PNG file, well under a millisecond, and
            decodes only where there is no end or pixels have more than 8 bits; "full" decodes every image, which finds
            damage in between.
    """
    try:
        if not path.is_file():
            kind = "a folder, not an image" if path.is_dir() else "not a file" if path.exists() else "no such file"
            return Look(kind)
        with path.open("rb") as file:
            length = file.seek(0, os.SEEK_END)
            if length == 0:
                return Look("an empty file, 0 bytes")
            file.seek(-min(length, END_SEARCH), os.SEEK_END)
            end = file.read()
            file.seek(0)
            with open_image(file) as image:
                look, marker = _compare(image, width, height), END_MARKERS.get(image.format or "")
                deep = image.mode[0] in "IF"
    except (OSError, ValueError) as error:
        return Look(f"no readable image header ({error})")
    # Phones append whole films: an image without an end in sight may still be complete.
    endless = marker is not None and marker not in end
    if look.problem is None and (verify == "full" or endless or deep):
        try:
            load_image(path)
        except ValueError as error:
            return Look("the image is cut off" if endless else str(error.__cause__))
    return look


def _compare(image: Image.Image, width: int | None, height: int | None) -> Look:
    """What the header says, beside the size that the annotations say."""
    notes = []
    try:
        frames = getattr(image, "n_frames", 1) if image.format != "MPO" else 1
        turned = image.getexif().get(ORIENTATION, 1)
    except Exception as error:  # of a damaged file
        return Look(f"no readable image header ({_sentence(error)})")
    if frames > 1:
        notes.append(f"{frames} frames or pages; only the first is used")
    if width is None or image.size == (width, height):
        quarter = turned in (5, 6, 7, 8) and image.width != image.height
        if turned in range(2, 9) and not quarter and width is not None:
            notes.append(f"EXIF orientation {turned}: its boxes are taken to count the pixels as they are stored")
        return Look(None, tuple(notes))
    if turned in (5, 6, 7, 8) and image.size == (height, width):
        notes.append(f"EXIF orientation {turned}: its boxes have the size of the upright image, which is used")
        return Look(None, tuple(notes), upright=True)
    return Look(f"the image is {image.width}x{image.height} pixels, its annotations say {width}x{height}")


def load_image(path: Path, *, upright: bool = False) -> np.ndarray:
    """Return RGB pixels, (H, W, 3) uint8, of an image file of any PIL mode; the first frame or page.

    Args:
        path: the file.
        upright: turn the image as its EXIF orientation says: for pictures that no annotations belong to, or whose
            annotations count the upright image. Else pixels are as they are stored, which is how pycocotools and
            torchvision read the same files.

    Raises:
        ValueError: the file does not decode completely; its cause has the reason alone.
    """
    try:
        with open_image(path) as image:
            return rgb_pixels(ImageOps.exif_transpose(image) if upright else image)
    except Exception as error:  # a decoder may fail in any way
        reason = _sentence(error)
        raise ValueError(
            f"{path}: the image does not decode: {reason} (data.verify full finds such files before training)"
        ) from ValueError(reason)


def rgb_pixels(image: Image.Image) -> np.ndarray:
    """Return RGB pixels, (H, W, 3) uint8, of a PIL image of any mode; transparency is dropped, more bits are scaled.

    Raises:
        ValueError: the pixels have more than 8 bits, and nothing says which values are black and white.
    """
    if image.mode[0] in "IF":
        grey = _scale(np.asarray(image), *_value_range(image))
        return np.repeat(grey[:, :, None], 3, axis=2)
    if "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns when a palette with transparency goes to RGB directly
    return np.array(image.convert("RGB"))


def _value_range(image: Image.Image) -> tuple[float, float]:
    """The values that stand for black and white, by the file itself."""
    tags: Any = getattr(image, "tag_v2", {})
    for low_tag, high_tag in SAMPLE_RANGE:
        if high_tag in tags:
            low, high = (_first(tags.get(tag, 0)) for tag in (low_tag, high_tag))
            if low < high:
                return float(low), float(high)
    bits = _first(tags.get(BITS, 16))
    if 8 < bits < 16:
        return 0.0, float(2**bits - 1)
    pixels = np.asarray(image)
    least, most = (float(pixels.min()), float(pixels.max())) if pixels.size else (0.0, 0.0)
    # Sensors of 10 and 12 bits write such files, which would come out black.
    if image.mode.startswith("I;16") and (most > 4095 or most == 0):
        return 0.0, 65535.0
    if image.mode == "I" and image.format in ("PNG", "PPM") and (4095 < most <= 65535 or most == 0):
        return 0.0, 65535.0
    kind = {"F": "floating-point numbers", "I": "32-bit numbers"}.get(image.mode, "16-bit numbers")
    raise ValueError(
        f"its pixels are {kind} from {least:g} to {most:g}, and the file does not say which are black and white; "
        "convert it to 8 bits, or declare the range (TIFF tags SMinSampleValue and SMaxSampleValue)"
    )


def _scale(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    if (low, high) == (0.0, 65535.0):
        return (pixels // 256).clip(0, 255).astype(np.uint8)
    wide = (pixels.astype(np.float64) - low) / (high - low)
    return (255 * np.nan_to_num(wide).clip(0, 1)).round().astype(np.uint8)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


def _sentence(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "not enough memory"
    return " ".join(str(error).split()) or type(error).__name__
