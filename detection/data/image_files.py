"""Image files: which are read, what may be wrong with one, and its pixels."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from detection.files import walk_once

Verify = Literal["header", "full"]

# Only these are tried, whatever a file's name says: others start programs (EPS) or are rare enough to be a mistake.
FORMATS = ("JPEG", "MPO", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "AVIF", "JPEG2000")
EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif", ".ppm", ".pgm")
# What a whole file has at its end. Some cameras write more behind it. In a JPEG it may also be the end of a thumbnail,
# which lies in front of the image's pixels; within these it cannot occur.
END_MARKERS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
JPEG_PIXELS = b"\xff\xda"  # their beginning
END_SEARCH = 4096  # bytes
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)  # of an image, above which PIL suspects a decompression bomb
ORIENTATION = 0x0112  # EXIF; 2 to 8 mirror or turn, those from 5 on by a quarter
BITS, SAMPLE_RANGE = 258, ((340, 341), (280, 281))  # TIFF: bits per sample; smallest and largest value
SCALED_TO_16_BITS = ("PPM", "JPEG2000")  # PIL does that, by the range that the file declares

# For the whole process, since images are opened in several threads: neither says which file, and both are dealt with.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", message="Corrupt EXIF data")


class Look(NamedTuple):
    """The result of `examine_image`.

    Attributes:
        problem: why the image cannot be used; None if it can.
        notes: what a reader should know of a usable image.
        upright: its annotations belong to the image as its EXIF orientation turns it.
        certain: their size says so, or the contrary; None: the image is not turned.
    """

    problem: str | None = None
    notes: tuple[str, ...] = ()
    upright: bool = False
    certain: bool | None = None


def is_image(path: Path) -> bool:
    """Return whether a file has the name of an image."""
    return path.suffix.lower() in EXTENSIONS


def visible_files(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder, through links too, but none that is hidden; a folder linked twice comes once."""

    def refuse(error: OSError) -> None:
        raise error  # else a folder that cannot be read would be taken for an empty one

    for place, names in walk_once(folder, refuse):
        yield from (Path(place, name) for name in names if not name.startswith("."))


def open_image(file: Path | BinaryIO) -> Image.Image:
    """Return an image of one of `FORMATS` as PIL opens it.

    Raises:
        ValueError: it is none, or has too many pixels.
    """
    try:
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


def stored_size(path: Path) -> tuple[int, int, int] | None:
    """Return width, height and EXIF orientation by the header of an image file; None if it has none."""
    try:
        with open_image(path) as image:
            return *image.size, _orientation(image)
    except (ValueError, OSError):
        return None


def size_as_stored(path: Path, source: Path, dropped: list[str]) -> tuple[int, int] | None:
    """Return width and height by an image's header, for annotations in `source` without a size; None if it has none.

    An orientation by which the image is turned gets a sentence in `dropped`.
    """
    stored = stored_size(path)
    if stored is None:
        return None
    width, height, orientation = stored
    if orientation >= 5:
        dropped.append(
            f"{source}: no image size, and {path.name} has EXIF orientation {orientation}: boxes are taken to count "
            "the pixels as stored"
        )
    return width, height


def examine_image(
    path: Path, width: int | None = None, height: int | None = None, verify: Verify = "header", upright: bool = False
) -> Look:
    """Look at an image file without decoding it, unless there is reason to.

    Args:
        path: the file.
        width, height: what its annotations say, in pixels; None: any size is right.
        verify: "header" reads the header and looks for the end of a JPEG or PNG file, well under a millisecond, and
            decodes only where there is no end or pixels have more than 8 bits; "full" decodes every image, which finds
            damage in between.
        upright: the annotations belong to the image turned upright, whatever its size.
    """
    try:
        if not path.is_file():
            return Look(
                "a folder, not an image" if path.is_dir() else "not a file" if path.exists() else "no such file"
            )
        with path.open("rb") as file:
            length = file.seek(0, os.SEEK_END)
            if length == 0:
                return Look("an empty file, 0 bytes")
            file.seek(-min(length, END_SEARCH), os.SEEK_END)
            end = file.read()
            file.seek(0)
            with open_image(file) as image:
                # Phones append whole films: an image without an end in sight may still be complete.
                endless = end.rfind(END_MARKERS.get(image.format or "", b"")) <= end.rfind(JPEG_PIXELS)
                doubtful = endless or verify == "full" or _has_many_bits(image)
                look = _compare(image, width, height, upright)
                try:
                    frames = getattr(image, "n_frames", 1) if image.format != "MPO" else 1
                except Exception:  # a decoder may fail in any way, and the first frame be whole
                    frames, doubtful = 1, True
    except (OSError, ValueError) as error:
        return Look(f"no readable image header ({error})")
    if look.problem is None and doubtful:
        try:
            decode_image(path)
        except ValueError as error:
            return Look("the image is cut off" if endless else str(error))
    if frames > 1 and look.problem is None:
        look = look._replace(notes=(f"{frames} frames or pages; only the first is used", *look.notes))
    return look


def _compare(image: Image.Image, width: int | None, height: int | None, upright: bool) -> Look:
    """The size and orientation in the header, beside the size that the annotations say."""
    orientation = _orientation(image)
    if width is None:
        return Look()
    if upright and orientation > 1:
        return Look(notes=(f"EXIF orientation {orientation}: its boxes count the upright image, which is used",))
    if image.size == (width, height):
        # Turned by a quarter, an image that is no square would have another size.
        if orientation == 1 or (orientation >= 5 and width != height):
            return Look(certain=None if orientation == 1 else True)
        note = f"EXIF orientation {orientation}: its boxes are taken to count the pixels as stored"
        return Look(notes=(note,), certain=False)
    if orientation >= 5 and image.size == (height, width):
        note = f"EXIF orientation {orientation}: its boxes have the size of the upright image, which is used"
        return Look(notes=(note,), upright=True, certain=True)
    return Look(f"the image is {image.width}x{image.height} pixels, its annotations say {width}x{height}")


def settle(looks: Sequence[Look]) -> list[Look]:
    """Return the looks at a set's images, those that are not certain as all others where these are upright."""
    if {look.upright for look in looks if look.certain} != {True}:
        return list(looks)
    note = "turned or mirrored by EXIF: its boxes are taken to count the upright image, as those of its set do by size"
    return [
        look._replace(notes=(*look.notes[:-1], note), upright=True) if look.certain is False else look for look in looks
    ]


def _orientation(image: Image.Image) -> int:
    """EXIF orientation in 1..8; 1, as it is, without a readable one."""
    # PIL itself turns a TIFF, and would decode a PNG for what may stand behind its pixels.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # of damaged EXIF data, which may fail in any way; the pixels may be whole
        return 1
    return found if found in range(1, 9) else 1


def load_image(path: Path, *, upright: bool = False) -> np.ndarray:
    """Return RGB pixels, see `decode_image`; a ValueError names the file, too."""
    try:
        return decode_image(path, upright=upright)
    except ValueError as error:
        raise ValueError(
            f"{path}: the image does not decode: {error} (data.verify full finds such files before training)"
        ) from None


def decode_image(path: Path, *, upright: bool = False) -> np.ndarray:
    """Return RGB pixels, (H, W, 3) uint8, of an image file of any PIL mode; the first frame or page.

    Args:
        path: the file.
        upright: turn the image as its EXIF orientation says: for pictures that no annotations belong to, or whose
            annotations count the upright image. Else pixels are as they are stored, which is how pycocotools and
            torchvision read the same files.

    Raises:
        ValueError: the file does not decode completely; the message is the reason alone.
    """
    try:
        with open_image(path) as image:
            return rgb_pixels(image, upright=upright)
    except Exception as error:  # a decoder may fail in any way
        raise ValueError(_sentence(error)) from None


def rgb_pixels(image: Image.Image, *, upright: bool = False) -> np.ndarray:
    """Return RGB pixels, (H, W, 3) uint8, of a PIL image of any mode; transparency is dropped, more bits are scaled.

    Raises:
        ValueError: the pixels have more than 8 bits, and nothing says which values are black and white.
    """
    many_bits = _has_many_bits(image)
    image.load()
    orientation = _orientation(image) if upright else 1
    if image.mode[0] in "IF":
        grey = _scale(np.asarray(image), *_value_range(image))
        pixels = np.repeat(grey[:, :, None], 3, axis=2)
    else:
        if "transparency" in image.info:
            image = image.convert("RGBA")  # PIL warns when a palette with transparency goes to RGB directly
        pixels = np.array(image.convert("RGB"))
        most = int(pixels.max(initial=0))
        if many_bits and 0 < most < 16:  # PIL keeps the upper 8 of 16 bits
            raise ValueError(_unknown_range("16-bit numbers", 0, 256 * most + 255))
    if orientation == 1:
        return pixels
    turned = Image.fromarray(pixels)
    turned.getexif()[ORIENTATION] = orientation
    return np.array(ImageOps.exif_transpose(turned))


def _has_many_bits(image: Image.Image) -> bool:
    """Whether a sample has more than 8 bits; of an image that is not decoded yet."""
    return image.mode[0] in "IF" or any(";16" in str(tile) for tile in getattr(image, "tile", ()))


def _value_range(image: Image.Image) -> tuple[float, float]:
    """The values that stand for black and white, by the file itself."""
    tags: Any = getattr(image, "tag_v2", {})
    for low_tag, high_tag in SAMPLE_RANGE:
        if high_tag in tags:
            low, high = float(_first(tags.get(low_tag, 0))), float(_first(tags[high_tag]))
            if low < high and math.isfinite(high - low):
                return low, high
    bits = _first(tags.get(BITS, 16))
    if 8 < bits < 16:
        return 0.0, float(2**bits - 1)
    pixels = np.asarray(image)
    least, most = (float(pixels.min()), float(pixels.max())) if pixels.size else (0.0, 0.0)
    # Sensors of 10 and 12 bits write files of 16, which would come out black.
    bright = image.format in SCALED_TO_16_BITS or 4095 < most <= 65535 or most == 0
    if bright and least >= 0 and (image.mode.startswith("I;16") or (image.mode == "I" and not tags)):
        return 0.0, 65535.0
    kind = {"F": "floating-point numbers", "I": "32-bit numbers"}.get(image.mode, "16-bit numbers")
    raise ValueError(_unknown_range(kind, least, most))


def _unknown_range(kind: str, least: float, most: float) -> str:
    return (
        f"its pixels are {kind} from {least:g} to {most:g}, and the file does not say which are black and white; "
        "convert it to 8 bits, or declare the range (TIFF tags SMinSampleValue and SMaxSampleValue)"
    )


def _scale(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    if (low, high) == (0.0, 65535.0):
        return (pixels // 256).clip(0, 255).astype(np.uint8)
    share = (pixels.astype(np.float64) - low) / (high - low)
    return (255 * np.nan_to_num(share).clip(0, 1)).round().astype(np.uint8)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


def _sentence(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "not enough memory"
    return " ".join(str(error).split()) or type(error).__name__
