"""COCO instances files -> `Annotations`."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detection.data.records import (
    Annotations,
    RawObject,
    Verify,
    build_annotations,
    build_record,
    check_classes,
    require_file,
    require_folder,
)


def read_coco(
    annotation_file: Path, image_folder: Path, classes: Sequence[str] = (), *, verify: Verify = "header"
) -> Annotations:
    """Images and boxes of a COCO instances file; images without boxes are kept, segmentations are not read.

    Args:
        annotation_file: JSON with "images", "annotations" and "categories".
        image_folder: folder that each "file_name" starts from.
        classes: names of the classes to keep, label 1 first; empty: all, in the file's order. Objects of other
            categories are left out, with one sentence per category.
        verify: how images are checked, see `image_problem`; those that fail are left out.

    Raises:
        FileNotFoundError: no such annotation file or image folder.
        ValueError: not a COCO file, a class that it does not have, or nothing to train on.
    """
    annotation_file, image_folder = Path(annotation_file), Path(image_folder)
    require_file(annotation_file, "a COCO instances JSON file")
    require_folder(image_folder, f"the images of {annotation_file.name}")
    content = _load(annotation_file)
    dropped: list[str] = []

    names = _categories(content["categories"], annotation_file)
    id_of = {name: category_id for category_id, name in names.items()}
    check_classes(classes, list(id_of), source=str(annotation_file))
    categories = tuple(classes) or tuple(id_of)
    category_ids = tuple(id_of[name] for name in categories)
    label_of = {category_id: label for label, category_id in enumerate(category_ids, start=1)}

    images = _images(content["images"], annotation_file, dropped)
    objects, other = _objects(content, names, label_of, annotation_file, dropped)
    for category_id, count in other.items():
        dropped.append(
            f"{annotation_file}: {count} objects of category {names[category_id]!r} left out, not among the classes "
            f"{', '.join(categories)}"
        )

    records = [
        build_record(
            image_folder / image["file_name"],
            image_id,
            image["width"],
            image["height"],
            objects[image_id],
            layout="coco",
            source=annotation_file,
            dropped=dropped,
        )
        for image_id, image in images.items()
    ]
    return build_annotations(records, categories, category_ids, dropped, source=str(annotation_file), verify=verify)


def _load(path: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # includes JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{path}: not a JSON file: {error}") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{path}: not a COCO instances file: no list {key!r}")
    return content


def _categories(items: list[Any], source: Path) -> dict[int, str]:
    names: dict[int, str] = {}
    for position, item in enumerate(items):
        problem = _problem(item, {"id": int, "name": str})
        if problem is None and (item["id"] in names or item["name"] in names.values()):
            problem = f"repeats an id or a name: {item['id']} {item['name']!r}"
        if problem is not None:
            raise ValueError(f"{source}: category at position {position} {problem}")
        names[item["id"]] = item["name"]
    return names


def _images(items: list[Any], source: Path, dropped: list[str]) -> dict[int, dict[str, Any]]:
    images: dict[int, dict[str, Any]] = {}
    for position, item in enumerate(items):
        problem = _problem(item, {"id": int, "file_name": str, "width": int, "height": int})
        if problem is not None:
            dropped.append(f"{source}: image at position {position} {problem}; left out")
        elif item["id"] in images:
            dropped.append(f"{source}: image id {item['id']} of {item['file_name']} is taken already; left out")
        elif item["width"] < 1 or item["height"] < 1:
            size = f"{item['width']}x{item['height']}"
            dropped.append(f"{source}: image {item['id']} ({item['file_name']}) has size {size}; left out")
        else:
            images[item["id"]] = item
    return images


def _objects(
    content: dict[str, list[Any]],
    names: dict[int, str],
    label_of: dict[int, int],
    source: Path,
    dropped: list[str],
) -> tuple[dict[int, list[RawObject]], Counter[int]]:
    """Return the objects by image, and how many there are of each category that has no label."""
    # Annotations of an image that was itself left out need no sentence of their own.
    image_ids = {image["id"] for image in content["images"] if _problem(image, {"id": int}) is None}
    objects: dict[int, list[RawObject]] = defaultdict(list)
    other: Counter[int] = Counter()
    seen: set[int] = set()
    for position, item in enumerate(content["annotations"]):
        problem = _problem(item, {"id": int, "image_id": int, "category_id": int, "bbox": object})
        if problem is not None:
            dropped.append(f"{source}: annotation at position {position} {problem}; left out")
            continue
        name, category_id = f"annotation {item['id']}", item["category_id"]
        if item["id"] in seen:
            dropped.append(f"{source}: {name} occurs a second time at position {position}; left out")
        elif item["image_id"] not in image_ids:
            dropped.append(f"{source}: {name} belongs to image {item['image_id']}, not in the file; left out")
        elif category_id not in names:
            allowed = ", ".join(map(str, names))
            dropped.append(f"{source}: {name} has category {category_id} (allowed: {allowed}); left out")
        elif category_id not in label_of:
            other[category_id] += 1
        else:
            ignore = item.get("iscrowd", 0) == 1
            raw = RawObject(name, item["bbox"], label_of[category_id], ignore, item.get("area"))
            objects[item["image_id"]].append(raw)
        seen.add(item["id"])
    return objects, other


def _problem(item: Any, required: dict[str, type]) -> str | None:
    """What is wrong with an entry of the file, None if it has every required key in the required type."""
    if not isinstance(item, dict):
        return f"is {type(item).__name__}, not an object"
    for key, kind in required.items():
        if key not in item:
            return f"has no {key!r}"
        if not isinstance(item[key], kind):
            return f"has {key!r} {item[key]!r}, expected {kind.__name__}"
    return None
