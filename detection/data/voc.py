"""PASCAL VOC folders -> `Annotations`."""

from __future__ import annotations

import difflib
import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from detection.data.image_files import EXTENSIONS, image_size
from detection.data.records import (
    Annotations,
    RawObject,
    Record,
    Verify,
    build_annotations,
    build_record,
    check_classes,
    require_file,
    require_folder,
)
from detection.files import read_text

CORNERS = ("xmin", "ymin", "xmax", "ymax")
TRUE = ("1", "true", "yes", "y")
HEADER = {"folder", "filename", "path", "source", "owner", "size", "segmented", "annotation"}  # no objects in these
DECLARATION = re.compile(rb"^\s*<\?xml[^>]*?encoding\s*=\s*[\"']([A-Za-z0-9._-]+)[\"'][^>]*\?>")
MAX_XML = 64 * 2**20  # bytes


class VocFile(NamedTuple):
    """An annotation file that was parsed, and the image that it describes."""

    image_id: int
    image: Path
    source: Path
    tree: ElementTree.Element


def read_voc(
    root: Path, splits: Sequence[str], classes: Sequence[str] = (), *, verify: Verify = "header"
) -> Annotations:
    """Return images and boxes of one or several VOC splits, joined; images without objects are kept.

    An image's id is its position in the joined list, counted from 1, so it does not change when another image is
    left out. Boxes count pixels from 1 and include the last one: (xmin - 1, ymin - 1, xmax, ymax) here.

    Args:
        root: folder that the splits start from.
        splits: "FOLDER/NAME" is root/FOLDER/ImageSets/Main/NAME.txt, with FOLDER/JPEGImages and FOLDER/Annotations.
        classes: class names, label 1 first; empty: all names found, sorted. Objects of other classes are left out.
        verify: how images are checked, see `image_problem`; those that fail are left out.

    Raises:
        FileNotFoundError: no such root, split, image folder or annotation folder.
        ValueError: a class given twice or misspelt, or nothing to train on.
    """
    root = Path(root)
    require_folder(root, "the folder with the VOC data")
    check_classes(classes)
    dropped: list[str] = []
    files = list(_read_files(root, splits, dropped))
    found = {_name(item) for file in files for item in _objects(file.tree)} - {""}
    where = f"{root} {', '.join(splits)}"
    _refuse_misspelt(classes, found, where)
    categories = tuple(classes) or tuple(sorted(found))
    records = [record for file in files if (record := _build(file, categories, dropped)) is not None]
    return build_annotations(records, categories, range(1, len(categories) + 1), dropped, source=where, verify=verify)


def _read_files(root: Path, splits: Sequence[str], dropped: list[str]) -> Iterator[VocFile]:
    """Every file that the splits list, once; a sentence for each that has no use."""
    listed: set[tuple[str, str]] = set()
    image_id = 0
    for split in splits:
        folder, _, name = split.rpartition("/")
        split_file = root / folder / "ImageSets" / "Main" / f"{name}.txt"
        images = require_folder(root / folder / "JPEGImages", f"the images of split {split!r}")
        sources = require_folder(root / folder / "Annotations", f"the XML files of split {split!r}")
        require_file(split_file, f"the image names of split {split!r}, one per line")
        by_stem = _images_by_stem(images)
        for key in filter(None, map(str.strip, read_text(split_file).splitlines())):
            image_id += 1
            source = sources / f"{key}.xml"
            if (folder, key) in listed:
                dropped.append(f"{split_file}: {key} is listed already; left out the second time")
                continue
            listed.add((folder, key))
            try:
                tree = parse_xml(source)
            except FileNotFoundError:
                dropped.append(f"{source}: no such file, though {split_file.name} lists it; image left out")
                continue
            except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:
                dropped.append(f"{source}: not an XML file: {error}; image left out")
                continue
            path = _find_image(images, by_stem, key, source, tree, dropped)
            if path is not None:
                yield VocFile(image_id, path, source, tree)


def parse_xml(path: Path) -> ElementTree.Element:
    """Return the root of an XML file in any encoding that Python knows, names without namespaces and in lower case.

    Raises:
        FileNotFoundError: no such file.
        OSError, ValueError, LookupError, ElementTree.ParseError: it cannot be read; the message says why.
    """
    if path.stat().st_size > MAX_XML:
        raise ValueError(f"larger than {MAX_XML // 2**20} MiB")
    content = path.read_bytes()
    declared = DECLARATION.match(content)
    if declared and declared[1].lower() not in (b"utf-8", b"utf-16", b"us-ascii", b"iso-8859-1"):
        # The parser itself knows those alone.
        content = content[declared.end() :].decode(declared[1].decode("ascii")).encode()
    tree = ElementTree.fromstring(content)
    for element in tree.iter():
        if isinstance(element.tag, str):
            element.tag = element.tag.rpartition("}")[2].lower()
    return tree


def _refuse_misspelt(classes: Sequence[str], found: set[str], source: str) -> None:
    """A class without objects may be missing from a small split, but not if one of nearly its name is left out."""
    others = {name.lower(): name for name in sorted(found - set(classes))}
    for name in (name for name in classes if name not in found):
        close = difflib.get_close_matches(name.lower(), others, n=1, cutoff=0.8)
        if close:
            raise ValueError(
                f"{source}: no object of class {name!r}; did you mean {others[close[0]]!r}? "
                f"(found: {', '.join(sorted(found))})"
            )


def _build(file: VocFile, categories: tuple[str, ...], dropped: list[str]) -> Record | None:
    source, tree = file.source, file.tree
    size = _size(tree, file.image)
    if size is None:
        dropped.append(f"{source}: no image size, and {file.image.name} has no readable header; image left out")
        return None
    objects = []
    for position, item in enumerate(_objects(tree), start=1):
        name = _name(item)
        if name not in categories:
            allowed = ", ".join(categories)
            dropped.append(f"{source}: object {position} has class {name!r} (allowed: {allowed}); left out")
            continue
        ignore = item.findtext("difficult", "0").strip().lower() in TRUE
        what = f"object {position} ({name})"
        boxes = item.findall("bndbox")  # its own: those of parts, such as hands, stand a level lower
        if len(boxes) > 1:
            dropped.append(f"{source}: {what} has {len(boxes)} boxes; each is taken for an object")
        for box in boxes or [item.makeelement("bndbox", {})]:
            corners = [box.findtext(corner, "").strip() for corner in CORNERS]
            objects.append(RawObject(what, corners, categories.index(name) + 1, ignore))
    others = sorted({child.tag for child in tree if isinstance(child.tag, str)} - HEADER - {"object"})
    if not objects and others and not _objects(tree):
        dropped.append(
            f"{source}: no object in it that is understood, it has {', '.join(others[:5])}; expected object with name "
            "and bndbox. The image counts as one without objects"
        )
    return build_record(file.image, file.image_id, *size, objects, layout="voc", source=source, dropped=dropped)


def _objects(tree: ElementTree.Element) -> list[ElementTree.Element]:
    """All objects, at any level."""
    return list(tree.iter("object"))


def _name(item: ElementTree.Element) -> str:
    return item.findtext("name", "").strip()


def _images_by_stem(folder: Path) -> dict[str, list[str]]:
    """Names of the image files in a folder by what is in front of the suffix, those with the first suffixes first."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in folder.iterdir():
        if path.suffix.lower() in EXTENSIONS:
            found[path.stem].append(path.name)
    for names in found.values():
        names.sort(key=lambda name: (EXTENSIONS.index(Path(name).suffix.lower()), name))
    return found


def _find_image(
    folder: Path,
    by_stem: dict[str, list[str]],
    key: str,
    source: Path,
    tree: ElementTree.Element,
    dropped: list[str],
) -> Path | None:
    """The image of the annotation's own name with any suffix, else the one that its <filename> says."""
    own = [folder / name for name in by_stem.get(key, []) if (folder / name).is_file()]
    # The last part alone: some tools write the path on the annotator's machine.
    said = re.split(r"[\\/]", tree.findtext("filename", "").strip())[-1]
    other = folder / said if said and (folder / said).is_file() else None
    if own:
        if len(own) > 1:
            dropped.append(f"{source}: {', '.join(path.name for path in own)}: {own[0].name} is taken for its image")
        elif other is not None and other.stem != own[0].stem:
            dropped.append(f"{source}: its <filename> is {said}; {own[0].name}, of its own name, is taken")
        return own[0]
    if other is not None:
        dropped.append(f"{source}: no image of its own name; {said}, its <filename>, is taken")
        return other
    problem = "a folder, not an image" if (folder / f"{key}.jpg").is_dir() else "no such image"
    dropped.append(f"{folder / key}.jpg: {problem}, though {source.name} describes it; left out")
    return None


def _size(tree: ElementTree.Element, path: Path) -> tuple[int, int] | None:
    """Width and height from the XML, else from the image's header, else None."""
    try:
        width, height = (int(tree.findtext(f"size/{key}", "")) for key in ("width", "height"))
        if width > 0 and height > 0:
            return width, height
    except ValueError:
        pass
    return image_size(path)
