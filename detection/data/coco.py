"""COCO instances files -> `Annotations`."""

from __future__ import annotations

import json
import os
import reprlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from detection.data.records import (
    Annotations,
    RawObject,
    Record,
    Verify,
    build_annotations,
    build_record,
    check_classes,
    few,
    image_left_out,
    is_true,
    others_left_out,
    outside_of,
    require_file,
    require_folder,
)
from detection.text import plural

ImageId = int | str
MAX_BYTES = 4 * 2**30  # of an annotation file; COCO's own largest has an eighth of it
MAX_SIDE = 2**31  # pixels
# Keys that an entry needs, and the kinds of their values.
CATEGORY = {"id": "int", "name": "text"}
ID = {"id": "int or text"}
IMAGE = ID | {"file_name": "text", "width": "int", "height": "int"}
ANNOTATION = {"image_id": "int or text", "category_id": "int", "bbox": "anything"}


def read_coco(
    annotation_file: Path,
    image_folder: Path,
    classes: Sequence[str] = (),
    *,
    verify: Verify = "header",
    may_lack_classes: bool = False,
) -> Annotations:
    """Return images and boxes of a COCO instances file; images without boxes are kept, segmentations are not read.

    Args:
        annotation_file: JSON with "images", "annotations" and "categories". Ids of images are integers or texts; those
            of annotations are not used.
        image_folder: folder that each "file_name" starts from.
        classes: names of the classes to keep, label 1 first; empty: all, in the file's order. Objects of other
            categories are left out, with one sentence per category.
        verify: how images are checked, see `examine_image`; those that fail are left out.
        may_lack_classes: a class that the file does not list has no objects in it, which is told; False: an error.

    Raises:
        FileNotFoundError: no such annotation file or image folder.
        ValueError: not a COCO file, a class that it does not have, or nothing to train on.
    """
    source, folder = Path(annotation_file), Path(image_folder)
    require_file(source, "a COCO instances JSON file")
    require_folder(folder, f"the images of {source.name}")
    content, dropped = _load(source), []

    names = _categories(content, classes, source, dropped)
    id_of = {name: category_id for category_id, name in names.items()}
    check_classes(classes, [*id_of, *classes] if may_lack_classes else list(id_of), source=str(source))
    categories = tuple(classes) or tuple(id_of)
    for name in categories:
        if name not in id_of:
            id_of[name] = 1 + max(id_of.values(), default=0)
            dropped.append(f"{source}: does not list the class {name!r}: no objects of it here")
    category_ids = tuple(id_of[name] for name in categories)

    objects = _objects(content, names, categories, source, dropped)
    records = _records(content["images"], objects, folder, source, dropped)
    return build_annotations(records, categories, category_ids, dropped, source=str(source), verify=verify)


def _load(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: larger than {MAX_BYTES // 2**30} GiB, too large for an annotation file")
    try:
        content = json.loads(path.read_bytes())  # of any encoding that JSON may have, with or without a mark
    except (ValueError, RecursionError, MemoryError) as error:  # ValueError: among others JSON's and Unicode's
        raise ValueError(f"{path}: not a JSON file: {error or 'not enough memory'}") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{path}: not a COCO instances file: no list {key!r}")
    return content


def _categories(content: dict[str, Any], classes: Sequence[str], source: Path, dropped: list[str]) -> dict[int, str]:
    """Names by id, without a root category that has no objects, as Roboflow's exports have one."""
    names: dict[int, str] = {}
    roots, parents = set(), set()
    used = {item["category_id"] for item in _entries(content["annotations"], ANNOTATION)}
    listed = Counter(item["name"] for item in _entries(content["categories"], CATEGORY))
    for position, item in enumerate(content["categories"]):
        problem = _problem(item, CATEGORY)
        root = problem is None and item["id"] == 0 and item.get("supercategory") == "none"
        if root and listed[item["name"]] > 1 and 0 not in used and not names:
            # Roboflow calls its root as the project, which may be called as its one class.
            dropped.append(f"{source}: category 0, {item['name']!r}, is the root of others and has no objects")
            continue
        if problem is None and (item["id"] in names or item["name"] in names.values()):
            problem = f"repeats an id or a name: {item['id']} {item['name']!r}"
        if problem is not None:
            raise ValueError(f"{source}: category at position {position} {problem}")
        names[int(item["id"])] = item["name"]
        parent = item.get("supercategory")
        if parent in (None, "", "none"):
            roots.add(int(item["id"]))
        elif _is_text(parent):
            parents.add(parent)
    lone = len(roots) == 1 and len(names) > 1  # all others have parents, if under other names
    for category_id in sorted(roots - used):
        wanted = names[category_id] in classes
        if not wanted and (names[category_id] in parents or (lone and category_id == 0)):
            name = names.pop(category_id)
            dropped.append(f"{source}: category {name!r} is the parent of others and has no objects; it is no class")
    return names


def _objects(
    content: dict[str, Any], names: dict[int, str], categories: Sequence[str], source: Path, dropped: list[str]
) -> dict[ImageId, list[RawObject]]:
    """The annotations that can be used, by image."""
    image_ids = {_id(item["id"]) for item in _entries(content["images"], ID)}
    label_of = {name: label for label, name in enumerate(categories, start=1)}
    numbers = Counter(item["id"] for item in _entries(content["annotations"], ID))
    found: dict[ImageId, list[RawObject]] = defaultdict(list)
    others: Counter[str] = Counter()
    seen, repeated = set(), sum(count - 1 for count in numbers.values())
    for position, item in enumerate(content["annotations"]):
        name = f"annotation at position {position}"
        problem = _problem(item, ANNOTATION)
        if problem is None:
            number = item["id"] if _problem(item, ID) is None else None
            name = name if number is None else f"annotation {number}"
            image_id, category_id = _id(item["image_id"]), int(item["category_id"])
            whole = (number, image_id, category_id, reprlib.repr(item["bbox"]))
            if whole in seen:
                problem = f"occurs a second time at position {position}, box and all"
                repeated -= number is not None
            elif image_id not in image_ids:
                problem = f"belongs to image {image_id}, not in the file"
            elif category_id not in names:
                problem = f"has category {category_id} (allowed: {few(names)})"
            elif number is None or numbers[number] > 1:
                seen.add(whole)
        if problem is not None:
            dropped.append(f"{source}: {name} {problem}; object left out")
        elif names[category_id] not in label_of:
            others[names[category_id]] += 1
        else:
            ignore, label = is_true(item.get("iscrowd")), label_of[names[category_id]]
            found[image_id].append(RawObject(name, item["bbox"], label, ignore, item.get("area")))
    dropped += others_left_out(others, categories, source)
    if repeated:
        dropped.append(f"{source}: {plural(repeated, 'annotation')} with the id of another one; numbered anew")
    return found


def _records(
    items: list[Any], objects: dict[ImageId, list[RawObject]], folder: Path, source: Path, dropped: list[str]
) -> list[Record]:
    """A record for each image that can be used; a sentence for each other one, which counts its objects."""
    images: dict[ImageId, dict[str, Any]] = {}
    refused: list[tuple[str, Any]] = []
    for position, item in enumerate(items):
        problem = _problem(item, IMAGE)
        if problem is not None:
            refused.append((f"image at position {position} {problem}", item))
        elif _id(item["id"]) in images:
            refused.append((f"image id {item['id']} of {item['file_name']} is taken already", item))
        elif not all(1 <= item[key] <= MAX_SIDE for key in ("width", "height")):
            size = f"{item['width']}x{item['height']}"
            refused.append((f"image {item['id']} ({item['file_name']}) has size {size}", item))
        else:
            images[_id(item["id"])] = item
    records = []
    for image_id, item in images.items():
        name = item["file_name"]
        if "\\" in name and not os.path.exists(folder / name):
            name = name.replace("\\", "/")  # as some tools on Windows write it; elsewhere it would be part of the name
        size = int(item["width"]), int(item["height"])
        raw = objects.pop(image_id, [])
        records.append(build_record(folder / name, image_id, *size, raw, layout="coco", source=source, dropped=dropped))
    dropped += outside_of(folder, (record.path for record in records), source)
    for sentence, item in refused:
        lost = [] if _problem(item, ID) else objects.pop(_id(item["id"]), [])
        dropped.append(f"{source}: {sentence}; {image_left_out(len(lost))}")
    return records


def _entries(items: list[Any], required: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The entries that have no `_problem`."""
    return (item for item in items if _problem(item, required) is None)


def _problem(item: Any, required: dict[str, str]) -> str | None:
    """What is wrong with an entry of the file, None if it has every required key with a value of the required kind."""
    if not isinstance(item, dict):
        return f"is {type(item).__name__}, not an object"
    for key, kind in required.items():
        if key not in item:
            return f"has no {key!r}"
        value = item[key]
        right = kind == "anything" or ("int" in kind and _is_int(value)) or ("text" in kind and _is_text(value))
        if not right:
            return f"has {key!r} {reprlib.repr(value)}, expected {kind}"
    return None


def _is_int(value: Any) -> bool:
    """Whether it is a whole number; JSON's writers may have made 1.0 of 1."""
    return not isinstance(value, bool) and (isinstance(value, int) or (isinstance(value, float) and value.is_integer()))


def _is_text(value: Any) -> bool:
    """Whether it is a text that may be a name: JSON allows halves of characters, which cannot be written again."""
    try:
        return isinstance(value, str) and b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


def _id(value: float | str) -> ImageId:
    return value if isinstance(value, str) else int(value)
