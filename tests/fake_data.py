"""Small VOC folders and COCO files that tests are read from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from detection.data import Record
from detection.data.records import Annotations

WIDTH, HEIGHT = 40, 30


def write_image(path: Path, width: int = WIDTH, height: int = HEIGHT, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def voc_object(name="cat", box=(1, 1, 10, 10), difficult=None) -> str:
    corners = "".join(
        f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True) if v is not None
    )
    extra = "" if difficult is None else f"<difficult>{difficult}</difficult>"
    return f"<object><name>{name}</name>{extra}<bndbox>{corners}</bndbox></object>"


def write_voc(root: Path, images: dict[str, str | list[str]], split="VOC/train", size=(WIDTH, HEIGHT)) -> Path:
    """A VOC folder; per image its objects, or the whole text of its XML file."""
    folder, name = root / split.rpartition("/")[0], split.rpartition("/")[2]
    (folder / "Annotations").mkdir(parents=True, exist_ok=True)
    (folder / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    (folder / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{key}\n" for key in images))
    for key, content in images.items():
        write_image(folder / "JPEGImages" / f"{key}.jpg")
        if not isinstance(content, str):
            width, height = size
            content = (
                f"<annotation><size><width>{width}</width><height>{height}</height></size>"
                f"{''.join(content)}</annotation>"
            )
        (folder / "Annotations" / f"{key}.xml").write_text(content)
    return root


def coco_content(boxes=((1.0, 2.0, 10.0, 8.0),)) -> dict:
    """Two images (ids 7 and 3, the second empty), categories 18 and 5, every box a cat (18) of image 7."""
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
            {"id": 3, "file_name": "b.png", "width": WIDTH, "height": HEIGHT},
        ],
        "annotations": [
            {"id": 11 + i, "image_id": 7, "category_id": 18, "bbox": list(box), "area": 33.25, "iscrowd": 0}
            for i, box in enumerate(boxes)
        ],
        "categories": [{"id": 18, "name": "cat"}, {"id": 5, "name": "dog"}],
    }


def write_coco(root: Path, content: dict | str) -> tuple[Path, Path]:
    for name in ("a.png", "b.png"):
        write_image(root / "images" / name)
    file = root / "instances.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file, root / "images"


def make_record(path: Path, boxes, labels, ignore=None) -> Record:
    boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    ignore = np.zeros(len(boxes), dtype=bool) if ignore is None else np.array(ignore)
    area = (boxes[:, 2] - boxes[:, 0]).astype(np.float64) * (boxes[:, 3] - boxes[:, 1])
    return Record(path, 1, WIDTH, HEIGHT, boxes, np.array(labels, dtype=np.int64), ignore, area)


def sentence(annotations: Annotations, *parts: str) -> str:
    """The one sentence of `dropped` that has all parts."""
    found = [text for text in annotations.dropped if all(part in text for part in parts)]
    assert len(found) == 1, annotations.dropped
    return found[0]


def write_yolo(root: Path, content: str, *places: str) -> Path:
    """A data.yaml with this content, and an image with one object of class 0 for each place, such as train/images/a."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "data.yaml").write_text(content)
    for place in places:
        write_image(root / f"{place}.jpg")
        label = root / f"{place.replace('images', 'labels')}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text("0 .5 .5 .4 .4\n")
    return root
