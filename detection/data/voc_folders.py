"""The places of the images and the XML files of a VOC split: in a devkit, or in flat folders."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from detection.data.image_files import is_image, visible_files
from detection.data.records import require_file, require_folder
from detection.files import require_text
from detection.text import plural

IMAGES = ("images", "jpegimages", "image", "imgs", "img")
SOURCES = ("annotations", "annotation", "xmls", "xml", "labels")


class VocSplit(NamedTuple):
    """A split.

    Attributes:
        images, sources: folders of the images and of the XML files.
        keys: names in them without suffix, one per image.
        listing: the file or folder that has the names, for messages.
    """

    images: Path
    sources: Path
    keys: list[str]
    listing: Path


def find_split(root: Path, split: str, dropped: list[str]) -> VocSplit:
    """Return the place of a split.

    Args:
        root: folder that splits start from.
        split: FOLDER/NAME of a devkit, root/FOLDER/ImageSets/Main/NAME.txt; or a folder with images and XML files, in
            it or in folders such as images and annotations; or NAME with images/NAME and annotations/NAME; or a list
            of names, root/FOLDER/NAME.txt, beside such folders.
        dropped: receives a sentence about images without an XML file, which are not used.

    Raises:
        FileNotFoundError: a file or folder is missing.
    """
    folder, _, name = split.rpartition("/")
    base = root / folder
    if not (base / "ImageSets").is_dir():
        place = root / split
        if place.is_file() and place.suffix.lower() == ".txt":
            pair = flat_pair(base) or flat_pair(root)
            if pair is not None:
                return VocSplit(*pair, [_key(line, pair[1]) for line in _names(place)], place)
        pair = flat_pair(place) or flat_pair(root, split)
        if pair is not None:
            return _flat(*pair, dropped)
    listing = base / "ImageSets" / "Main" / f"{name}.txt"
    images = require_folder(base / "JPEGImages", f"the images of split {split!r}")
    sources = require_folder(base / "Annotations", f"the XML files of split {split!r}")
    require_file(listing, f"the image names of split {split!r}, one per line")
    return VocSplit(images, sources, _names(listing), listing)


def flat_pair(folder: Path, split: str = "") -> tuple[Path, Path] | None:
    """Return a folder's folders of images and XML files, which may be itself; None without any XML file.

    Args:
        folder: which.
        split: folder of that name within both.
    """
    inside = {path.name.lower(): path for path in sorted(folder.iterdir())} if folder.is_dir() else {}
    found = [next((inside[name] / split for name in names if name in inside), None) for names in (IMAGES, SOURCES)]
    images, sources = found
    both = images is not None and sources is not None and images.is_dir() and sources.is_dir()
    if both and has_xml(visible_files(sources)):
        return images, sources
    return (folder, folder) if not split and has_xml(inside.values()) else None


def has_xml(paths: Iterable[Path]) -> bool:
    """Return whether an XML file is among some files."""
    return any(path.suffix == ".xml" for path in paths)


def _flat(images: Path, sources: Path, dropped: list[str]) -> VocSplit:
    names = {path.relative_to(sources).with_suffix("") for path in visible_files(sources) if path.suffix == ".xml"}
    pictures = filter(is_image, visible_files(images))
    alone = sorted(path for path in pictures if path.relative_to(images).with_suffix("") not in names)
    if alone:
        dropped.append(f"{sources}: no XML file for {plural(len(alone), 'image')}, the first: {alone[0]}; not used")
    return VocSplit(images, sources, sorted(name.as_posix() for name in names), sources)


def _names(listing: Path) -> list[str]:
    return list(filter(None, map(str.strip, require_text(listing).splitlines())))


def _key(line: str, sources: Path) -> str:
    """The name of an image in a list, which may have a suffix and a folder in front."""
    key = line[: -len(PurePosixPath(line).suffix)] if is_image(Path(line)) else line
    return key if (sources / f"{key}.xml").is_file() else PurePosixPath(key).name
