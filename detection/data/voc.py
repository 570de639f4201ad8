"""PASCAL VOC folders -> `Annotations`."""

from __future__ import annotations

import difflib
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

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

CORNERS = ("xmin", "ymin", "xmax", "ymax")
SUFFIXES = (".jpeg", ".JPG", ".JPEG", ".png", ".PNG", ".bmp", ".tif", ".tiff", ".webp")


def read_voc(
    root: Path, splits: Sequence[str], classes: Sequence[str] = (), *, verify: Verify = "header"
) -> Annotations:
    """Images and boxes of one or several VOC splits, joined; images without objects are kept.

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
    parsed: list[tuple[int, Path, Path, ElementTree.Element]] = []
    listed: set[tuple[str, str]] = set()
    image_id = 0
    for split in splits:
        folder, _, name = split.rpartition("/")
        split_file = root / folder / "ImageSets" / "Main" / f"{name}.txt"
        images = require_folder(root / folder / "JPEGImages", f"the images of split {split!r}")
        sources = require_folder(root / folder / "Annotations", f"the XML files of split {split!r}")
        require_file(split_file, f"the image names of split {split!r}, one per line")
        for key in filter(None, map(str.strip, split_file.read_text(encoding="utf-8").splitlines())):
            image_id += 1
            source = sources / f"{key}.xml"
            if (folder, key) in listed:
                dropped.append(f"{split_file}: {key} is listed already; left out the second time")
                continue
            listed.add((folder, key))
            try:
                tree = ElementTree.parse(source).getroot()
            except FileNotFoundError:
                dropped.append(f"{source}: no such file, though {split_file.name} lists it; image left out")
                continue
            except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:
                dropped.append(f"{source}: not an XML file: {error}; image left out")
                continue
            path = _find_image(images, key, tree)
            if path is None:
                problem = "a folder, not an image" if (images / f"{key}.jpg").is_dir() else "no such image"
                dropped.append(f"{images / key}.jpg: {problem}, though {source.name} describes it; left out")
                continue
            parsed.append((image_id, path, source, tree))

    found = {_name(item) for *_, tree in parsed for item in _objects(tree)} - {""}
    where = f"{root} {', '.join(splits)}"
    _refuse_misspelt(classes, found, where)
    categories = tuple(classes) or tuple(sorted(found))
    records = [record for item in parsed if (record := _build(*item, categories, dropped)) is not None]
    return build_annotations(records, categories, range(1, len(categories) + 1), dropped, source=where, verify=verify)


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


def _build(
    image_id: int,
    path: Path,
    source: Path,
    tree: ElementTree.Element,
    categories: tuple[str, ...],
    dropped: list[str],
) -> Record | None:
    size = _size(tree, path)
    if size is None:
        dropped.append(f"{source}: no image size, and {path.name} has no readable header; image left out")
        return None
    objects = []
    for position, item in enumerate(_objects(tree), start=1):
        name = _name(item)
        if name not in categories:
            allowed = ", ".join(categories)
            dropped.append(f"{source}: object {position} has class {name!r} (allowed: {allowed}); left out")
            continue
        box = [item.findtext(f"bndbox/{corner}", "").strip() for corner in CORNERS]
        ignore = item.findtext("difficult", "0").strip() == "1"
        objects.append(RawObject(f"object {position} ({name})", box, categories.index(name) + 1, ignore))
    return build_record(path, image_id, *size, objects, layout="voc", source=source, dropped=dropped)


def _objects(tree: ElementTree.Element) -> list[ElementTree.Element]:
    return tree.findall("object")


def _name(item: ElementTree.Element) -> str:
    return item.findtext("name", "").strip()


def _find_image(folder: Path, key: str, tree: ElementTree.Element) -> Path | None:
    candidates = [f"{key}.jpg", tree.findtext("filename", "").strip(), *(key + suffix for suffix in SUFFIXES)]
    return next((folder / name for name in candidates if name and (folder / name).is_file()), None)


def _size(tree: ElementTree.Element, path: Path) -> tuple[int, int] | None:
    """Width and height from the XML, else from the image's header, else None."""
    try:
        width, height = (int(tree.findtext(f"size/{key}", "")) for key in ("width", "height"))
        if width > 0 and height > 0:
            return width, height
    except ValueError:
        pass
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, Image.DecompressionBombError):
        return None
