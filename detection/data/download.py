"""Fetches Pascal VOC and COCO from where torchvision and the COCO site keep them."""

from __future__ import annotations

import re
from zipfile import BadZipFile

from torchvision.datasets import VOCDetection
from torchvision.datasets.utils import download_and_extract_archive

from detection.config.schema import Data

COCO = "http://images.cocodataset.org"


def download(data: Data) -> None:
    """Put the files that `data` names under `data.root`; those that are there already are not fetched again.

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
    except (OSError, RuntimeError, BadZipFile) as error:  # no network, a wrong checksum, half an archive
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
        if not (data.root / f"VOC{match[1]}" / "ImageSets" / "Main" / f"{match[2]}.txt").is_file():
            VOCDetection(str(data.root.parent), year=match[1], image_set=match[2], download=True)


def _download_coco(data: Data) -> None:
    for files, images in ((data.train, data.train_images), (data.val, data.val_images)):
        match = re.fullmatch(r"(train|val)2017", images)
        if match is None or files != [f"annotations/instances_{images}.json"]:
            raise ValueError(
                f"{files[0]} with images in {images!r}: cannot be downloaded (allowed: "
                "annotations/instances_train2017.json with train2017, the same with val2017)"
            )
        if not (data.root / images).is_dir():
            download_and_extract_archive(f"{COCO}/zips/{images}.zip", str(data.root), remove_finished=True)
        if not (data.root / files[0]).is_file():
            download_and_extract_archive(
                f"{COCO}/annotations/annotations_trainval2017.zip", str(data.root), remove_finished=True
            )
