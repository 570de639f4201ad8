"""PASCAL VOC folders -> `Annotations`."""

from __future__ import annotations

import codecs
import difflib
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path, PurePath, PurePosixPath
from typing import NamedTuple

from detection.data.image_files import EXTENSIONS, is_image, size_as_stored, visible_files
from detection.data.records import (
    Annotations,
    RawObject,
    Record,
    Verify,
    build_annotations,
    build_record,
    check_classes,
    few,
    finite_number,
    image_left_out,
    is_true,
    outside_of,
    require_file,
    require_folder,
)
from detection.files import read_text
from detection.text import plural

IMAGES = ("images", "jpegimages", "image", "imgs", "img")
SOURCES = ("annotations", "annotation", "xmls", "xml", "labels")
CORNERS = ("xmin", "ymin", "xmax", "ymax")
HEADER = {"folder", "filename", "path", "source", "owner", "size", "segmented"}  # what a file has beside objects
DECLARATION = re.compile(rb"^\s*<\?xml[^>]*?encoding\s*=\s*[\"']([A-Za-z0-9._-]+)[\"'][^>]*\?>")
KNOWN_TO_EXPAT = (b"utf-8", b"utf-16", b"us-ascii", b"iso-8859-1")
MAX_XML = 64 * 2**20  # bytes
Listing = Callable[[Path], dict[str, list[Path]]]  # a folder's images by the part of their names before the suffix


class VocObject(NamedTuple):
    """An object of a file: each box with the texts of its corners, normally one."""

    name: str
    difficult: bool
    boxes: list[list[str]]


class VocFile(NamedTuple):
    """An annotation file, the image that it describes, and the image's size."""

    image_id: int
    image: Path
    source: Path
    size: tuple[int, int]
    objects: list[VocObject]


def read_voc(
    root: Path, splits: Sequence[str], classes: Sequence[str] = (), *, verify: Verify = "header"
) -> Annotations:
    """Return images and boxes of one or several VOC splits, joined; images without objects are kept.

    An image's id is its position in the joined list, counted from 1, so it does not change when another image is
    left out. Boxes count pixels from 1 and include the last one: (xmin - 1, ymin - 1, xmax, ymax) here.

    Args:
        root: folder that the splits start from.
        splits: "FOLDER/NAME" is root/FOLDER/ImageSets/Main/NAME.txt, with FOLDER/JPEGImages and FOLDER/Annotations; or
            a flat folder, see `find_split`.
        classes: class names, label 1 first; empty: all names found, sorted. Objects of other classes are left out.
        verify: how images are checked, see `examine_image`; those that fail are left out.

    Raises:
        FileNotFoundError: no such root, split, image folder or annotation folder.
        ValueError: a class given twice or misspelt, or nothing to train on.
    """
    root = Path(root)
    require_folder(root, "the folder with the VOC data")
    check_classes(classes)
    dropped: list[str] = []
    files = list(_read_splits(root, splits, dropped))
    found = {item.name for file in files for item in file.objects} - {""}
    where = f"{root} {', '.join(splits)}"
    _refuse_misspelt(classes, found, where)
    categories = tuple(classes) or tuple(sorted(found))
    records = [_build(file, categories, dropped) for file in files]
    return build_annotations(records, categories, range(1, len(categories) + 1), dropped, source=where, verify=verify)


def _read_splits(root: Path, splits: Sequence[str], dropped: list[str]) -> Iterator[VocFile]:
    """Every file that the splits list, once; a sentence for each that has no use."""
    listed: set[tuple[Path, str]] = set()
    image_id = 0
    images_by_stem = cache(_images_by_stem)
    for split in splits:
        images, sources, keys, split_file = find_split(root, split, dropped)
        dropped += outside_of(images, (images / key for key in keys), split_file)
        for key in keys:
            image_id += 1
            source = xml_file(sources, key)
            if (sources, key) in listed:
                dropped.append(f"{split_file}: {key} is listed already; left out the second time")
                continue
            listed.add((sources, key))
            if not os.path.isfile(source):
                dropped.append(f"{source}: no such file, though {split_file.name} lists it; image left out")
                continue
            file = _read_file(image_id, images / key, source, images_by_stem, dropped)
            if file is not None:
                yield file


def _read_file(image_id: int, place: Path, source: Path, images_by_stem: Listing, dropped: list[str]) -> VocFile | None:
    """An annotation file and its image, `place` without the suffix; None with a sentence if it has no use."""
    try:
        tree = parse_xml(source)
    except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:
        dropped.append(f"{source}: not an XML file: {error}; image left out")
        return None
    objects = [_object(item) for item in tree.iter("object")]
    left_out = image_left_out(sum(len(item.boxes) or 1 for item in objects))
    image = _find_image(place, _text(tree, "filename"), images_by_stem, source, dropped)
    if image is None:
        problem = "a folder, not an image" if os.path.isdir(f"{place}.jpg") else "no such image"
        dropped.append(f"{place}.jpg: {problem}, though {source.name} describes it; {left_out}")
        return None
    size = _size(tree, image, source, dropped)
    if size is None:
        dropped.append(f"{source}: no image size, and {image.name} has no readable header; {left_out}")
        return None
    tags = {element.tag for top in (tree, *tree.iter("annotation")) for element in top}
    others = tags - HEADER - {"annotation"}
    if others and not objects:
        dropped.append(
            f"{source}: no object in it that is understood, but {few(sorted(others))}; expected object with name and "
            "bndbox. The image counts as one without objects"
        )
    return VocFile(image_id, image, source, size, objects)


def parse_xml(path: Path) -> ElementTree.Element:
    """Return the root of an XML file in any encoding that Python knows, names without namespaces and in lower case.

    Raises:
        OSError, ValueError, LookupError, ElementTree.ParseError: it cannot be read; the message says why.
    """
    if path.stat().st_size > MAX_XML:
        raise ValueError(f"larger than {MAX_XML // 2**20} MiB")
    content = path.read_bytes()
    declared = DECLARATION.match(content)
    if declared and declared[1].lower() not in KNOWN_TO_EXPAT:
        content = content[declared.end() :].decode(declared[1].decode("ascii")).encode()
    try:
        tree = ElementTree.fromstring(content)
    except ElementTree.ParseError:
        utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        if not declared and not utf16 and content.decode(errors="ignore").encode() != content:
            raise ValueError("not in UTF-8, and its first line declares no other encoding") from None
        raise
    for element in tree.iter():
        element.tag = element.tag.rpartition("}")[2].lower()
    return tree


def _text(tree: ElementTree.Element, path: str) -> str:
    """The text of an element at its place, or further down."""
    return (tree.findtext(path) or tree.findtext(f".//{path}") or "").strip()


def _object(item: ElementTree.Element) -> VocObject:
    # Its own boxes: those of its parts, such as hands, stand a level lower.
    boxes = [[box.findtext(corner, "").strip() for corner in CORNERS] for box in item.findall("bndbox")]
    return VocObject(item.findtext("name", "").strip(), is_true(item.findtext("difficult")), boxes)


def _images_by_stem(folder: Path) -> dict[str, list[Path]]:
    """The image files in a folder by the part of their names before the suffix, in the order of `EXTENSIONS`."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if is_image(path) and path.is_file():
            found[path.stem].append(path)
    return {
        stem: sorted(paths, key=lambda path: EXTENSIONS.index(path.suffix.lower())) for stem, paths in found.items()
    }


def _find_image(place: Path, filename: str, images_by_stem: Listing, source: Path, dropped: list[str]) -> Path | None:
    """The image of the annotation's own name with any suffix, else the one that its <filename> says."""
    said = re.split(r"[\\/]", filename)[-1]  # some tools write the path on the annotator's machine
    other = place.parent / said
    own = images_by_stem(place.parent).get(place.name, [])
    found = own or ([other] if said and os.path.isfile(other) else images_by_stem(place.parent).get(said, []))
    if not found:
        return None
    chosen = other if other in found else found[0]
    if len(found) > 1 and chosen != other:
        dropped.append(f"{source}: images {few(path.name for path in found)}; {chosen.name} is taken")
    if not own:
        dropped.append(f"{source}: no image of its own name; {chosen.name}, its <filename>, is taken")
    elif said and chosen.stem not in (said, PurePath(said).stem):
        dropped.append(f"{source}: its <filename> is {said}; {chosen.name}, of its own name, is taken")
    return chosen


def _size(tree: ElementTree.Element, image: Path, source: Path, dropped: list[str]) -> tuple[int, int] | None:
    """Width and height from the XML, else from the image's header, else None."""
    width, height = (finite_number(_text(tree, f"size/{key}")) or 0 for key in ("width", "height"))
    if width >= 1 and height >= 1 and width.is_integer() and height.is_integer():
        return int(width), int(height)
    return size_as_stored(image, source, dropped)


def _refuse_misspelt(classes: Sequence[str], found: set[str], source: str) -> None:
    """A class without objects may be missing from a small split, but not if one of nearly its name is left out."""
    others = {name.lower(): name for name in sorted(found - set(classes))}
    for name in (name for name in classes if name not in found):
        close = difflib.get_close_matches(name.lower(), others, n=1, cutoff=0.8)
        if close:
            hint = f"did you mean {others[close[0]]!r}? (found: {few(sorted(found))})"
            raise ValueError(f"{source}: no object of class {name!r}; {hint}")


def _build(file: VocFile, categories: tuple[str, ...], dropped: list[str]) -> Record:
    objects = []
    for position, item in enumerate(file.objects, start=1):
        what = f"object {position} ({item.name})"
        if item.name not in categories:
            number = "object" if len(item.boxes) < 2 else plural(len(item.boxes), "object")
            allowed = f"(allowed: {few(categories)})"
            dropped.append(f"{file.source}: object {position} has class {item.name!r} {allowed}; {number} left out")
        elif not item.boxes:
            dropped.append(f"{file.source}: {what} of {file.image.name}: no bndbox; object left out")
        elif len(item.boxes) > 1:
            dropped.append(f"{file.source}: {what} has {len(item.boxes)} boxes; each is taken for an object")
        if item.name in categories:
            label = categories.index(item.name) + 1
            objects += [RawObject(what, box, label, item.difficult) for box in item.boxes]
    source, image = file.source, file.image
    return build_record(image, file.image_id, *file.size, objects, layout="voc", source=source, dropped=dropped)


# Places


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
    listing = _with_suffix(base / "ImageSets" / "Main", name, ".txt")
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
    if both and any(map(_is_xml, visible_files(sources))):
        return images, sources
    return (folder, folder) if not split and any(map(_is_xml, inside.values())) else None


def xml_file(folder: Path, key: str) -> Path:
    """Return the XML file of a name, which need not be there; its suffix may be in capitals."""
    return _with_suffix(folder, key, ".xml")


def _with_suffix(folder: Path, name: str, suffix: str) -> Path:
    choices = [folder / f"{name}{suffix}", folder / f"{name}{suffix.upper()}"]
    return next(filter(os.path.isfile, choices), choices[0])


def _is_xml(path: Path) -> bool:
    return path.suffix in (".xml", ".XML")


def _flat(images: Path, sources: Path, dropped: list[str]) -> VocSplit:
    names = {path.relative_to(sources).with_suffix("") for path in filter(_is_xml, visible_files(sources))}
    pictures = filter(is_image, visible_files(images))
    alone = sorted(path for path in pictures if path.relative_to(images).with_suffix("") not in names)
    if alone:
        dropped.append(f"{sources}: no XML file for {plural(len(alone), 'image')}, the first: {alone[0]}; not used")
    return VocSplit(images, sources, sorted(name.as_posix() for name in names), sources)


def _names(listing: Path) -> list[str]:
    return list(filter(None, map(str.strip, read_text(listing).splitlines())))


def _key(line: str, sources: Path) -> str:
    """The name of an image in a list, which may have a suffix and a folder in front."""
    key = line[: -len(PurePosixPath(line).suffix)] if is_image(Path(line)) else line
    return key if xml_file(sources, key).is_file() else PurePosixPath(key).name
