"""Fetches Pascal VOC and COCO from where torchvision and the COCO site keep them, whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from torchvision.datasets.utils import download_url, extract_archive
from torchvision.datasets.voc import DATASET_YEAR_DICT

from detection.config.schema import Data
from detection.files import read_text

COCO = "http://images.cocodataset.org"  # its certificate is that of another host: checksums take its place
COCO_MD5 = {
    "zips/train2017.zip": "cced6f7f71b7629ddf16f17bbcfab6b2",
    "zips/val2017.zip": "442b8da7639aecaf257c1dceb8ba8c80",
    "annotations/annotations_trainval2017.zip": "f4bbac642086de4f52a3fdda2de5fa2c",
}
COCO_IMAGES = {"train2017": 118_287, "val2017": 5_000}
PARTS = ".download"  # folder of what is not whole yet


def download(data: Data) -> None:
    """Put the files that `data` names under `data.root`; splits that are whole already are not fetched again.

    Archives have to have their known checksums. What is unpacked takes its place only when all of it is there, so that
    nothing half is taken for whole later.

    Raises:
        OSError: the download failed.
        ValueError: `data` names something else than VOC's or COCO's own splits and folders, or, for VOC, `data.root`
            is not called VOCdevkit, the folder that VOC's archives unpack to.
    """
    try:
        if data.format == "voc":
            _download_voc(data)
        elif data.format == "coco":
            _download_coco(data)
    except ValueError:
        raise
    except Exception as error:  # no network, a wrong checksum, half an archive: libraries fail in many ways
        raise OSError(
            f"{data.root}: the download failed ({error}); fetch the archives by hand, or try again"
        ) from error


def _download_voc(data: Data) -> None:
    if data.root.name != "VOCdevkit":
        raise ValueError(
            f"data.root {data.root}: VOC's archives unpack to a folder VOCdevkit; end data.root in it to download"
        )
    for split in dict.fromkeys([*data.train, *data.val]):
        # Not 2011, whose archive unpacks to another folder.
        match = re.fullmatch(r"VOC(20(?:0[7-9]|10|12))/(train|val|trainval|test)", split)
        if match is None or (match[2] == "test" and match[1] != "2007"):
            raise ValueError(
                f"{split}: cannot be downloaded (allowed: VOC2007 to VOC2010 and VOC2012 with train, val or trainval, "
                "VOC2007/test)"
            )
        if not _has_voc(data.root / f"VOC{match[1]}", match[2]):
            archive = DATASET_YEAR_DICT[f"{match[1]}-test" if match[2] == "test" else match[1]]
            fetch(archive["url"], archive["md5"], data.root.parent)


def _download_coco(data: Data) -> None:
    for files, images in ((data.train, data.train_images), (data.val, data.val_images)):
        if not files:  # with val_fraction; else the reader says what is missing
            continue
        match = re.fullmatch(r"(train|val)2017", images)
        if match is None or files != [f"annotations/instances_{images}.json"]:
            raise ValueError(
                f"{files[0]} with images in {images!r}: cannot be downloaded (allowed: "
                "annotations/instances_train2017.json with train2017, the same with val2017)"
            )
        archives = []
        # An interrupted unpacking by other means may have left a part of the images.
        if sum(1 for _ in (data.root / images).glob("*.jpg")) < COCO_IMAGES[images]:
            archives.append(f"zips/{images}.zip")
        if not (data.root / files[0]).is_file():
            archives.append("annotations/annotations_trainval2017.zip")
        for archive in archives:
            fetch(f"{COCO}/{archive}", COCO_MD5[archive], data.root)


def _has_voc(folder: Path, split: str) -> bool:
    """Whether a year's folder has the list of a split and all that it lists."""
    names = folder / "ImageSets" / "Main" / f"{split}.txt"
    return names.is_file() and all(
        (folder / "JPEGImages" / f"{name}.jpg").is_file() and (folder / "Annotations" / f"{name}.xml").is_file()
        for name in read_text(names).split()
    )


def fetch(url: str, md5: str, folder: Path) -> None:
    """Fetch an archive and unpack it into a folder, into which its own folders are merged.

    An archive that an earlier call left is used if its checksum is right, else fetched again.
    """
    parts = folder / PARTS
    parts.mkdir(parents=True, exist_ok=True)
    name = url.rpartition("/")[2]
    download_url(url, str(parts), name, md5)
    unpacked = parts / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)  # of a call that was interrupted
    extract_archive(str(parts / name), str(unpacked))
    for entry in sorted(unpacked.iterdir()):
        if not (folder / entry.name).exists():  # a whole folder in one step
            os.replace(entry, folder / entry.name)
            continue
        # Lists of images come last: where one is, its images are.
        files = (path for path in entry.rglob("*") if path.is_file())
        for path in sorted(files, key=lambda path: ("ImageSets" in path.parts, path)):
            target = folder / path.relative_to(unpacked)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    shutil.rmtree(parts)
