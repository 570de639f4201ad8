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

ImageId = int | str
MAX_BYTES = 4 * 2**30  # of an annotation file; COCO's own largest has an eighth of it


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
        verify: how images are checked, see `image_problem`; those that fail are left out.
        may_lack_classes: a class that the file does not list has no objects in it, which is told; False: an error.

    Raises:
        FileNotFoundError: no such annotation file or image folder.
        ValueError: not a COCO file, a class that it does not have, or nothing to train on.
    """
    annotation_file, image_folder = Path(annotation_file), Path(image_folder)
    require_file(annotation_file, "a COCO instances JSON file")
    require_folder(image_folder, f"the images of {annotation_file.name}")
    content = _load(annotation_file)
    dropped: list[str] = []

    used = {item.get("category_id") for item in content["annotations"] if _is_id(item, "category_id")}
    names = _categories(content["categories"], used, annotation_file, dropped)
    id_of = {name: category_id for category_id, name in names.items()}
    known = [name for name in classes if name in id_of] if may_lack_classes else classes
    check_classes(known, list(id_of), source=str(annotation_file))
    categories = tuple(classes) or tuple(id_of)
    for name in (name for name in categories if name not in id_of):
        id_of[name] = 1 + max(id_of.values(), default=0)
        dropped.append(f"{annotation_file}: does not list the class {name!r}: no objects of it here")
    category_ids = tuple(id_of[name] for name in categories)

    images = _images(content["images"], image_folder, annotation_file, dropped)
    objects = _objects(content, names, dict(zip(category_ids, range(1, len(categories) + 1), strict=True)), dropped)
    for category_id, count in objects.others.items():
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
            objects.by_image[image_id],
            layout="coco",
            source=annotation_file,
            dropped=dropped,
        )
        for image_id, image in images.items()
    ]
    return build_annotations(records, categories, category_ids, dropped, source=str(annotation_file), verify=verify)


class _Objects:
    """Objects by image, and how many of each category were left out."""

    def __init__(self) -> None:
        self.by_image: dict[ImageId, list[RawObject]] = defaultdict(list)
        self.others: Counter[int] = Counter()


def _objects(content: dict[str, Any], names: dict[int, str], label_of: dict[int, int], dropped: list[str]) -> _Objects:
    """The annotations that can be used; a sentence for each other one."""
    source = content["source"]
    # Annotations of an image that was itself left out need no sentence of their own.
    image_ids = {_id(image["id"]) for image in content["images"] if _is_id(image, "id", text=True)}
    found, seen, ids = _Objects(), set(), Counter()
    for position, item in enumerate(content["annotations"]):
        problem = _problem(item, {"image_id": ImageId, "category_id": int, "bbox": object})
        if problem is not None:
            dropped.append(f"{source}: annotation at position {position} {problem}; left out")
            continue
        name = f"annotation {item['id']}" if _is_id(item, "id", text=True) else f"annotation at position {position}"
        image_id, category_id = _id(item["image_id"]), _id(item["category_id"])
        whole = json.dumps([item.get("id"), image_id, category_id, item["bbox"]], default=repr)
        ids[item.get("id") if _is_id(item, "id", text=True) else None] += 1
        if whole in seen:
            dropped.append(f"{source}: {name} comes a second time at position {position}, box and all; left out")
        elif image_id not in image_ids:
            dropped.append(f"{source}: {name} belongs to image {image_id}, not in the file; left out")
        elif category_id not in names:
            allowed = ", ".join(map(str, names))
            dropped.append(f"{source}: {name} has category {category_id} (allowed: {allowed}); left out")
        elif category_id not in label_of:
            found.others[category_id] += 1
        else:
            ignore = item.get("iscrowd", 0) == 1
            raw = RawObject(name, item["bbox"], label_of[category_id], ignore, item.get("area"))
            found.by_image[image_id].append(raw)
        seen.add(whole)
    repeated = sum(count - 1 for count in ids.values() if count > 1)
    if repeated:
        dropped.append(f"{source}: {repeated} annotations have the id of another one; numbered anew")
    return found


def _load(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: larger than {MAX_BYTES // 2**30} GiB, too large for an annotation file")
    try:
        content = json.loads(path.read_bytes())  # of any encoding that JSON may have, with or without a mark
    except (ValueError, RecursionError) as error:  # ValueError includes JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{path}: not a JSON file: {error}") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{path}: not a COCO instances file: no list {key!r}")
    return content | {"source": path}


def _categories(items: list[Any], used: set[int], source: Path, dropped: list[str]) -> dict[int, str]:
    """Names by id, without a root category that has no objects, as Roboflow's exports have one."""
    names: dict[int, str] = {}
    parents = {item.get("supercategory") for item in items if isinstance(item, dict)}
    for position, item in enumerate(items):
        problem = _problem(item, {"id": int, "name": str})
        if problem is None and (item["id"] in names or item["name"] in names.values()):
            problem = f"repeats an id or a name: {item['id']} {item['name']!r}"
        if problem is not None:
            raise ValueError(f"{source}: category at position {position} {problem}")
        if item["id"] not in used and item["name"] in parents and item.get("supercategory") in (None, "none", ""):
            dropped.append(f"{source}: category {item['name']!r} is the parent of others and has no objects; left out")
        else:
            names[_id(item["id"])] = item["name"]
    return names


def _images(items: list[Any], folder: Path, source: Path, dropped: list[str]) -> dict[ImageId, dict[str, Any]]:
    images: dict[ImageId, dict[str, Any]] = {}
    root = folder.resolve()
    for position, item in enumerate(items):
        problem = _problem(item, {"id": ImageId, "file_name": str, "width": int, "height": int})
        if problem is not None:
            dropped.append(f"{source}: image at position {position} {problem}; left out")
            continue
        image_id = _id(item["id"])
        if image_id in images:
            dropped.append(f"{source}: image id {image_id} of {item['file_name']} is taken already; left out")
        elif item["width"] < 1 or item["height"] < 1:
            size = f"{item['width']}x{item['height']}"
            dropped.append(f"{source}: image {image_id} ({item['file_name']}) has size {size}; left out")
        elif "\0" in item["file_name"]:
            dropped.append(f"{source}: image {image_id}: {item['file_name']!r} is no file name; left out")
        else:
            # On Windows some tools write these; elsewhere they would be part of the name.
            name = item["file_name"] if (folder / item["file_name"]).exists() else item["file_name"].replace("\\", "/")
            if not (root / name).resolve().is_relative_to(root):
                dropped.append(f"{source}: image {image_id}: {name} lies outside of {folder}")
            images[image_id] = item | {"file_name": name}
    return images


def _problem(item: Any, required: dict[str, Any]) -> str | None:
    """What is wrong with an entry of the file, None if it has every required key in the required type."""
    if not isinstance(item, dict):
        return f"is {type(item).__name__}, not an object"
    for key, kind in required.items():
        if key not in item:
            return f"has no {key!r}"
        if kind in (int, ImageId):
            if not _is_id(item, key, text=kind == ImageId):
                return f"has {key!r} {_short(item[key])}, expected int"
        elif not isinstance(item[key], kind):
            return f"has {key!r} {_short(item[key])}, expected {kind.__name__}"
    return None


def _is_id(item: Any, key: str, *, text: bool = False) -> bool:
    """Whether an entry has a whole number under the key, or a text where that is allowed."""
    value = item.get(key) if isinstance(item, dict) else None
    if isinstance(value, bool):
        return False
    return (
        isinstance(value, int) or (isinstance(value, float) and value.is_integer()) or (text and isinstance(value, str))
    )


def _id(value: float | str) -> ImageId:
    return value if isinstance(value, str) else int(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."
