"""The sections of a recipe that say where its images come from, and how they are augmented."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from detection.config.base import Section


class Scenes(Section):
    """Drawn scenes, for `data.format: synthetic` and `synthetic_events`; the same seed gives the same files."""

    num_train: int = Field(600, gt=0, le=10**7, description="training scenes")
    num_val: int = Field(100, gt=0, le=10**7, description="validation scenes")
    size: int = Field(128, ge=32, le=4096, description="side of a scene in pixels")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the drawing")


class Events(Section):
    """Recordings of event cameras, for `data.format: events`: an image has a channel per time step and polarity."""

    steps: int = Field(1, ge=1, le=64, description="time steps of an image, each with two channels")
    by: Literal["time", "count"] = Field("time", description="steps of the same length, or of as many events")
    full: float = Field(
        3.0, gt=0, lt=math.inf, description="so many events of a pixel in a step are the value 1, more too"
    )
    sensor: tuple[int, int] | None = Field(
        None, description="height and width in pixels; None: what a file says, else as far as its events reach"
    )
    train_share: float = Field(
        0.9, gt=0, lt=1, description="classification, sets without splits (data.train and val ''): the training part"
    )
    window: float = Field(
        0.05, ge=1e-6, le=60, description="detection: seconds of events before boxes that an image shows"
    )
    tolerance: float = Field(
        0.0,
        ge=0,
        le=60,
        description="detection: boxes within so many seconds belong to one image, at the last one's time",
    )
    skip: float = Field(0.5, ge=0, le=3600, description="detection: boxes of so many first seconds are left out")
    min_diagonal: float = Field(30.0, ge=0, le=10**5, description="detection: pixels; smaller boxes are left out")
    min_side: float = Field(10.0, ge=0, le=10**5, description="detection: pixels; boxes with a shorter side too")

    @model_validator(mode="after")
    def _sensible(self) -> Events:
        if self.sensor is not None and not all(0 < side <= 1 << 14 for side in self.sensor):
            raise ValueError(f"sensor: expected two sides of 1 to {1 << 14} pixels, got {list(self.sensor)}")
        return self


EVENT_FORMATS = ("events", "synthetic_events")


class Channels:
    """Mixin of the sections of data: what the channels of their images are."""

    @property
    def are_events(self) -> bool:
        """Whether images are frames of events, not RGB."""
        return self.format in EVENT_FORMATS

    @property
    def channels(self) -> int:
        """Number of channels of an image."""
        return 2 * self.frames if self.are_events else 3

    @property
    def frames(self) -> int:
        """Number of frames in these channels, one after the other."""
        return self.events.steps if self.are_events else 1

    @property
    def colours(self) -> str:
        """Words for the channels."""
        return "events, darker and brighter of each step," if self.are_events else "RGB"


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
    mosaic: float = Field(0.0, ge=0, le=1, description="probability of a mosaic of the image and three others")
    mixup: float = Field(0.0, ge=0, le=1, description="probability that another image is blended with the image")
    plain_share: float = Field(
        0.1, ge=0, le=1, description="share of the epochs, the last ones, that has neither mosaic nor mixup"
    )


class Data(Channels, Section):
    """The source of images and boxes."""

    format: str = Field(
        "coco",
        description="layout of the files under root: voc, coco, yolo, csv, events for Prophesee's; synthetic for "
        "scenes and synthetic_events for recordings that are drawn first",
    )
    root: Path = Field(Path("data"), description="folder that the other paths start from")
    train: list[str] = Field(
        [],
        description="voc: FOLDER/SPLIT, several are joined (VOC2007/trainval), or flat folders (train) and lists "
        "(train.txt); coco: one annotation file; yolo: a split of data.yaml, folder or list, empty: its train; csv: "
        "one file, or FILE:VALUE of its column split; events: folders",
    )
    val: list[str] = Field([], description="the same for validation")
    train_images: str = Field(
        "", description="coco, csv: folder of the training images; empty: root, for csv and Roboflow's that of the file"
    )
    val_images: str = Field("", description="coco, csv: folder of the validation images")
    val_fraction: float = Field(
        0.0, ge=0, lt=1, description="without val: share of the training images that are for validation; 0: none"
    )
    split_seed: int = Field(0, ge=0, lt=2**63, description="val_fraction: seed of the choice")
    group_by: str = Field(
        "",
        description="val_fraction: regular expression; images with the same match in their file names (its first group "
        "if it has one) stay on one side",
    )
    classes: list[str] = Field([], description="class names, label 1 first; empty: all that the data declare")
    scenes: Scenes = Scenes()
    events: Events = Events()
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

    @model_validator(mode="after")
    def _one_validation_set(self) -> Data:
        if self.val_fraction and self.val:
            raise ValueError(f"val_fraction {self.val_fraction:g}: val names a validation set, {self.val}; drop one")
        if self.group_by and not self.val_fraction:
            raise ValueError("group_by: for val_fraction, which is 0")
        try:
            re.compile(self.group_by)
        except re.error as error:
            raise ValueError(f"group_by {self.group_by!r}: not a regular expression: {error}") from None
        return self


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


class ImageData(Channels, Section):
    """The source of labelled images."""

    format: str = Field(
        "folder",
        description="folder: root/SPLIT/CLASS/*; events: recordings in such folders; cifar10, cifar100: torchvision's; "
        "synthetic: drawn shapes; synthetic_events: recordings of them, drawn first",
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
    num_train: int = Field(2000, gt=0, le=10**7, description="synthetic, synthetic_events: training images")
    num_val: int = Field(500, gt=0, le=10**7, description="synthetic, synthetic_events: validation images")
    events: Events = Events()
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
