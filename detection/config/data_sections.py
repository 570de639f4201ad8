"""The sections of a recipe that say where its images come from, and how they are augmented."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from detection.config.base import Section


class Scenes(Section):
    """Drawn scenes, for `data.format: synthetic`; the same seed gives the same files."""

    num_train: int = Field(600, gt=0, le=10**7, description="training scenes")
    num_val: int = Field(100, gt=0, le=10**7, description="validation scenes")
    size: int = Field(128, ge=32, le=4096, description="side of a scene in pixels")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the drawing")


class Augment(Section):
    """Training augmentation; every probability in [0, 1]."""

    hflip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    vflip: float = Field(0.0, ge=0, le=1, description="probability of a vertical flip")
    crop: float = Field(0.0, ge=0, le=1, description="probability of a random crop that keeps whole boxes")
    iou_crop: float = Field(0.0, ge=0, le=1, description="probability of SSD's random crop, which may cut boxes")
    scale: float = Field(
        0.0, ge=0, le=1, description="probability of scale jitter: the image shrunk or enlarged within its own frame"
    )
    scale_range: tuple[float, float] = Field((0.5, 1.5), description="least and greatest factor of the scale jitter")

    @model_validator(mode="after")
    def _ordered(self) -> Augment:
        low, high = self.scale_range
        if not 0 < low <= high < math.inf:
            raise ValueError(f"scale_range: expected 0 < least <= greatest, got {low:g} {high:g}")
        return self

    color: float = Field(0.0, ge=0, le=1, description="probability of a change of brightness, contrast, saturation")


class Data(Section):
    """The source of images and boxes."""

    format: str = Field(
        "coco", description="layout of the files under root: voc, coco, or synthetic for scenes that are drawn first"
    )
    root: Path = Field(Path("data"), description="folder that the other paths start from")
    train: list[str] = Field(
        [], description="voc: FOLDER/SPLIT, several are joined (VOC2007/trainval); coco: one annotation file"
    )
    val: list[str] = Field([], description="the same for validation")
    train_images: str = Field("", description="coco: folder of the training images")
    val_images: str = Field("", description="coco: folder of the validation images")
    classes: list[str] = Field([], description="class names, label 1 first; empty: all that the data declare")
    scenes: Scenes = Scenes()
    augment: Augment = Augment()
    verify: Literal["header", "full"] = Field(
        "header",
        description="how images are checked before training: header and end of file, or decoded completely; what fails "
        "is left out and named",
    )
    aspect_groups: int = Field(
        3,
        ge=0,
        le=100,
        description="batches hold images of similar shape: so many bins on either side of a square; 0: off",
    )
    workers: int = Field(2, ge=0, le=1024, description="loader processes")
    options: dict[str, bool | int | float | str] = Field(
        {}, description="further options of a format that was registered from elsewhere"
    )


class ImageAugment(Section):
    """Training augmentation of a classifier."""

    hflip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    flip: Literal["random", "alternating"] = Field(
        "random", description="in memory: alternating: half of the images in odd epochs, the others in even ones"
    )
    padding: int = Field(
        4, ge=0, le=4096, description="in memory: black pixels around the image, of which a window is cut"
    )
    cutout: int = Field(0, ge=0, le=4096, description="in memory: side of a black square at a random place; 0: none")
    erase: float = Field(0.0, ge=0, le=1, description="in memory: probability that a random rectangle is blackened")
    randaugment: int = Field(0, ge=0, le=10, description="in memory: changes of colour and shape per image; 0: none")
    randaugment_magnitude: int = Field(9, ge=0, le=30, description="in memory: how strong those are")
    min_area: float = Field(
        0.08, gt=0, le=1, description="not in memory: least share of the image in the random resized crop"
    )


class ImageData(Section):
    """The source of labelled images."""

    format: str = Field(
        "folder", description="folder: root/SPLIT/CLASS/*; cifar10, cifar100: torchvision's; synthetic: drawn shapes"
    )
    root: Path = Field(Path("data"), description="folder of the data set")
    train: str = Field("train", description="folder: name of the training split")
    val: str = Field("val", description="folder: name of the validation split")
    size: int = Field(32, gt=0, le=4096, description="side in pixels that the network sees")
    in_memory: bool = Field(
        True,
        description="keep all pixels on the training device and augment whole batches there, for small images; false: "
        "loader processes with random resized crops, for large ones",
    )
    classes: list[str] = Field([], description="class names in label order; empty: those of the data, sorted")
    num_train: int = Field(2000, gt=0, le=10**7, description="synthetic: training images")
    num_val: int = Field(500, gt=0, le=10**7, description="synthetic: validation images")
    augment: ImageAugment = ImageAugment()
    verify: Literal["header", "full"] = Field(
        "header",
        description="not in memory: how images are checked before training, header and end of file, or decoded "
        "completely; what fails is left out and named",
    )
    workers: int = Field(2, ge=0, le=1024, description="loader processes, if not in memory")
    options: dict[str, bool | int | float | str] = Field(
        {}, description="further options of a format that was registered from elsewhere"
    )
