"""One recipe = one YAML file = one `Config`: read, checked, overridden from the command line, written back."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

import backbones
from detection.files import write_whole

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are checked on assignment too."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, protected_namespaces=(), hide_input_in_errors=True
    )


class Backbone(Section):
    """The feature extractor, `backbones.create(name, ...)`."""

    name: str = Field("resnet18", description="one of `backbones.names()`: vgg11 ... resnet152, mobilenetv1")
    width: float = Field(1.0, gt=0, description="multiplier of every channel count (rounded to multiples of 8)")
    stem: Literal["imagenet", "cifar"] = Field("imagenet", description="first layers: for large images, or for 32x32")
    activation: Literal["hoyer", "relu", "fixed"] = Field(
        "hoyer", description="hoyer: the method; relu: the analogue twin; fixed: threshold v_th without extremum"
    )
    extremum: Literal["layer", "channel"] = Field("layer", description="scope of the Hoyer extremum")
    momentum: float = Field(0.1, gt=0, le=1, description="weight of a batch in the extremum's running average")
    pool_first: bool = Field(True, description="max-pool before BatchNorm, as published; false: after it")
    weights: str | None = Field(None, description="pretrained weights: a .safetensors file, a run folder or zoo:NAME")

    @model_validator(mode="after")
    def _known_name(self) -> Backbone:
        if self.name not in backbones.names():
            raise ValueError(f"name: unknown backbone {self.name!r}{_nearest(self.name, backbones.names())}")
        return self


class Neck(Section):
    """Feature pyramid between backbone and head."""

    source: Literal["spikes", "membrane"] = Field(
        "spikes", description="what the lateral convolutions see: spikes (0/1), or real-valued stage outputs"
    )
    levels: list[Literal["c2", "c3", "c4", "c5"]] | None = Field(
        None,
        min_length=1,
        description="backbone maps that enter, finest first; None: c2 to c5 for fasterrcnn, else c3 to c5",
    )
    extra_levels: int | None = Field(
        None,
        ge=0,
        le=4,
        description="coarser maps added on top, each of half the size; None: 1 for fasterrcnn (by pooling, and no more "
        "than that), 2 for retinanet and fcos, 3 for ssd (by convolutions)",
    )
    out_channels: int = Field(256, gt=0, description="channels of every pyramid map; ssd: of the extra maps")
    spiking: bool = Field(
        False, description="spikes in front of the pyramid's output convolutions and extra maps too (not ssd)"
    )


class Head(Section):
    """The detection head, torchvision's."""

    spiking: bool = Field(
        False, description="spikes in front of every convolution of the head, prediction included (retinanet, fcos)"
    )
    num_convs: int = Field(4, ge=0, le=8, description="convolutions before each prediction layer (retinanet, fcos)")
    norm: Literal["none", "group"] | None = Field(
        None,
        description="group: GroupNorm after each of them; None: as published, none for retinanet and group for fcos. A "
        "spiking head has a BatchNorm per level in front of every spike instead",
    )
    anchor_scale: float | None = Field(
        None,
        gt=0,
        description="smallest anchor side of a level in strides of that level; None: 8 for fasterrcnn, 4 for retinanet "
        "(fcos and ssd have rules of their own)",
    )
    representation_size: int = Field(1024, gt=0, description="features of the box head's linear layers (fasterrcnn)")
    num_regions: int = Field(
        512,
        gt=0,
        description="regions per image that the box head is trained on, objects at most a quarter (fasterrcnn)",
    )
    score_threshold: float = Field(0.05, ge=0, lt=1, description="detections below it are not returned")
    nms_threshold: float = Field(0.5, gt=0, le=1, description="IoU above which the weaker of two boxes is dropped")
    max_detections: int = Field(100, gt=0, description="detections kept per image")


class Model(Section):
    """The detector: images -> normalise, resize -> backbone -> neck -> head."""

    detector: Literal["fasterrcnn", "retinanet", "fcos", "ssd"] = Field(
        "retinanet", description="torchvision detector to build on"
    )
    backbone: Backbone = Backbone()
    neck: Neck = Neck()
    head: Head = Head()
    min_size: list[int] = Field(
        [800], min_length=1, description="short side in pixels; several: one is drawn per training image, last tests"
    )
    max_size: int = Field(1333, gt=0, description="upper bound of the long side in pixels")
    mean: tuple[float, float, float] = Field((0.485, 0.456, 0.406), description="RGB mean, images in [0, 1]")
    std: tuple[Positive, Positive, Positive] = Field((0.229, 0.224, 0.225), description="RGB standard deviation")

    @model_validator(mode="after")
    def _fits_the_detector(self) -> Model:
        name, neck, head = self.detector, self.neck, self.head
        if head.spiking and name not in ("retinanet", "fcos"):
            raise ValueError(f"head.spiking: retinanet and fcos have a spiking head, {name} has none")
        if head.anchor_scale is not None and name not in ("fasterrcnn", "retinanet"):
            raise ValueError(f"head.anchor_scale: for fasterrcnn and retinanet; {name} sets its boxes by itself")
        if name == "fasterrcnn" and (neck.extra_levels or 0) > 1:
            raise ValueError(f"neck.extra_levels: fasterrcnn takes 0 or 1, got {neck.extra_levels}")
        if name == "ssd" and neck.spiking:
            raise ValueError(
                "neck.spiking: ssd has no pyramid; neck.source 'spikes' makes all that its head sees spikes"
            )
        if name == "ssd" and self.min_size != [self.max_size]:
            raise ValueError(
                f"min_size: ssd resizes every image to a square, so min_size must be [max_size]; "
                f"got {self.min_size} and max_size {self.max_size}"
            )
        return self


class Scenes(Section):
    """Drawn scenes, for `data.format: synthetic`; the same seed gives the same files."""

    num_train: int = Field(600, gt=0, description="training scenes")
    num_val: int = Field(100, gt=0, description="validation scenes")
    size: int = Field(128, ge=32, description="side of a scene in pixels")
    seed: int = Field(0, ge=0, description="seed of the drawing")


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
    """Where images and boxes come from."""

    format: Literal["voc", "coco", "synthetic"] = Field("coco", description="layout of the files under root")
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
        3, ge=0, description="batches hold images of similar shape: so many bins on either side of a square; 0: off"
    )
    workers: int = Field(2, ge=0, description="loader processes")

    @model_validator(mode="after")
    def _complete(self) -> Data:
        if self.format != "synthetic":
            for key in ("train", "val"):
                if not getattr(self, key):
                    raise ValueError(f"{key}: empty; data.format {self.format!r} needs it")
        if self.format == "coco":
            for key in ("train", "val"):
                if len(getattr(self, key)) > 1:
                    raise ValueError(f"{key}: {getattr(self, key)}; data.format 'coco' takes one annotation file")
        return self


class Hoyer(Section):
    """The Hoyer regulariser: weight * sum over spike layers of H."""

    weight: float = Field(0.0, ge=0, description="weight of the term; it belongs to the reduction")
    reduction: Literal["sum", "mean"] = Field(
        "mean",
        description="sum: H as in the paper, grows with resolution and with the batch of each process (1e-8 belongs "
        "to 128 images of 32x32); "
        "mean: H / number of neurons, in (0, 1], carries over between sizes",
    )
    sync: bool = Field(
        False,
        description="several processes: extremum and H over the images of all of them, as if one process had them; "
        "false: over those of each",
    )


class Optimizer(Section):
    """Optimiser and learning-rate schedule."""

    name: Literal["adamw", "adam", "sgd"] = Field(
        "adamw", description="adamw; adam with AMSGrad and the decay in its gradient; or sgd with momentum 0.9"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    weight_decay: float = Field(1e-4, ge=0, description="only on tensors of two or more dimensions, so not on v_th")
    schedule: Literal["cosine", "step"] = Field("cosine", description="cosine to zero, or steps at `milestones`")
    milestones: list[Fraction] = Field([0.6, 0.8, 0.9], description="step: fractions of the run where lr falls")
    gamma: float = Field(0.2, gt=0, le=1, description="step: factor at each milestone")
    warmup_steps: int = Field(100, ge=0, description="optimiser steps of linear warm-up")
    clip_norm: float = Field(0.0, ge=0, description="gradients are scaled down to this norm; 0: never")


class Distillation(Section):
    """Learning from a trained network, such as the analogue twin."""

    teacher: Path | None = Field(
        None, description="run folder, or zoo:NAME, of a network of the same classes; None: no teacher"
    )
    logits: float = Field(1.0, ge=0, description="weight of the distance to the teacher's predictions")
    temperature: float = Field(4.0, gt=0, description="softens both predictions (classification)")
    features: float = Field(0.0, ge=0, description="weight of the distance to what the teacher's head sees")

    @model_validator(mode="after")
    def _teaches_something(self) -> Distillation:
        if self.teacher is not None and not self.logits and not self.features:
            raise ValueError("logits and features are both 0: the teacher would teach nothing")
        return self


class Train(Section):
    """Length and size of a run."""

    epochs: int = Field(12, gt=0, description="passes over the training data")
    batch_size: int = Field(8, gt=0, description="images per batch and process")
    accumulate: int = Field(1, gt=0, description="batches whose mean gradient makes one optimiser step")
    eval_every: int = Field(1, gt=0, description="epochs between evaluations; the last epoch is always evaluated")
    precision: Literal["no", "bf16", "fp16"] = Field("no", description="mixed precision; no: float32")
    compile: bool = Field(False, description="torch.compile the backbone")
    low_memory: bool = Field(
        False,
        description="not compiled: keep what convolutions give and compute the rest again for the gradient: less "
        "memory, more time",
    )
    channels_last: bool = Field(
        False, description="keep feature maps in the order N, H, W, C, which is faster as a rule"
    )
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="weights and buffers averaged over about 1 / (1 - decay) steps, evaluated and saved beside the raw "
        "ones; 0: none",
    )
    sync_batchnorm: bool = Field(
        False, description="several processes: BatchNorm over the images of all of them; false: over those of each"
    )
    tensorboard: bool = Field(False, description="write TensorBoard curves too (pip install hoyer-det[tensorboard])")
    seed: int = Field(0, ge=0, description="seed of weights, data order and augmentation")
    deterministic: bool = Field(
        False, description="only algorithms that give the same bits every time: slower on a GPU, an error where none is"
    )
    save_minutes: float = Field(2.0, ge=0, description="minutes between saved states, see --resume; 0: not by time")
    save_steps: int = Field(0, ge=0, description="optimiser steps between saved states; 0: not by steps")
    timeout_minutes: float = Field(
        10.0, gt=0, description="several processes: how long one waits for the others before the training ends"
    )


class Evaluation(Section):
    """Average precision."""

    backend: Literal["pycocotools", "faster-coco-eval"] = Field(
        "pycocotools",
        description="who counts COCO's numbers; faster-coco-eval (pip install hoyer-det[fast]) for large sets",
    )


class Config(Section):
    """A training recipe. Every key can be overridden: --model.backbone.activation relu"""

    task: Literal["detection"] = Field("detection", description="what is trained")
    model: Model = Model()
    data: Data
    hoyer: Hoyer = Hoyer()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    distillation: Distillation = Distillation()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _teachable(self) -> Config:
        if self.distillation.teacher is not None and self.model.detector not in ("retinanet", "fcos"):
            raise ValueError(
                f"distillation.teacher: retinanet and fcos learn from a teacher; {self.model.detector} predicts in "
                "several stages and does not"
            )
        return self


class Classifier(Section):
    """A backbone with the classification head of its family."""

    backbone: Backbone = Backbone()
    dropout: float = Field(0.0, ge=0, lt=1, description="probability in the head, while training")


class ImageAugment(Section):
    """Training augmentation of a classifier."""

    hflip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    padding: int = Field(4, ge=0, description="in memory: black pixels around the image, of which a window is cut")
    cutout: int = Field(0, ge=0, description="in memory: side of a black square at a random place; 0: none")
    min_area: float = Field(
        0.08, gt=0, le=1, description="not in memory: least share of the image in the random resized crop"
    )


class ImageData(Section):
    """Where labelled images come from."""

    format: Literal["cifar10", "cifar100", "folder", "synthetic"] = Field(
        "folder", description="folder: root/SPLIT/CLASS/*; cifar10, cifar100: torchvision's; synthetic: drawn shapes"
    )
    root: Path = Field(Path("data"), description="folder of the data set")
    train: str = Field("train", description="folder: name of the training split")
    val: str = Field("val", description="folder: name of the validation split")
    size: int = Field(32, gt=0, description="side in pixels that the network sees")
    in_memory: bool = Field(
        True,
        description="keep all pixels on the training device and augment whole batches there, for small images; false: "
        "loader processes with random resized crops, for large ones",
    )
    classes: list[str] = Field([], description="class names in label order; empty: those of the data, sorted")
    num_train: int = Field(2000, gt=0, description="synthetic: training images")
    num_val: int = Field(500, gt=0, description="synthetic: validation images")
    augment: ImageAugment = ImageAugment()
    mean: tuple[float, float, float] = Field((0.485, 0.456, 0.406), description="RGB mean, images in [0, 1]")
    std: tuple[Positive, Positive, Positive] = Field((0.229, 0.224, 0.225), description="RGB standard deviation")
    verify: Literal["header", "full"] = Field(
        "header",
        description="not in memory: how images are checked before training, header and end of file, or decoded "
        "completely; what fails is left out and named",
    )
    workers: int = Field(2, ge=0, description="loader processes, if not in memory")


class ClassificationConfig(Section):
    """A recipe of classification, such as the pretraining of a backbone."""

    task: Literal["classification"] = Field("classification", description="what is trained")
    model: Classifier = Classifier()
    data: ImageData
    hoyer: Hoyer = Hoyer()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    distillation: Distillation = Distillation()
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")


Recipe = Config | ClassificationConfig
AnyConfig = TypeVar("AnyConfig", Config, ClassificationConfig)


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    kind: type[AnyConfig] = Config,
    prog: str | None = None,
) -> AnyConfig:
    """The recipe in `path` with command-line overrides on top.

    Args:
        path: YAML file.
        kind: `Config` (detection) or `ClassificationConfig`.
        overrides: `--section.key value` or `section.key=value`, as typed on a command line.
        prog: program name in help texts.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not YAML, or a key or value is not allowed; the message names file, key and remedy.
        SystemExit: an override is wrong (explained on standard error), or `--help` was among them.
    """
    config = read_recipe(path)
    if not isinstance(config, kind):
        wanted = kind.model_fields["task"].default
        raise ValueError(f"{path}: task is {config.task!r}; a recipe of {wanted} is needed here")
    return override(config, overrides, prog=prog)


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in `path`, of the kind that its `task` says; errors as in `load_config`."""
    values = _read_values(path)
    kind = _kind(path, values)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{path}: " + "; ".join(_explain(error, kind))) from None


def override(config: AnyConfig, overrides: Sequence[str], *, prog: str | None = None) -> AnyConfig:
    """`config` with `--section.key value` or `section.key=value` arguments applied; see `load_config`."""
    arguments = [f"--{text}" if "=" in text and not text.startswith("-") else text for text in overrides]
    return tyro.cli(
        type(config),
        default=config,
        args=arguments,
        prog=prog,
        config=(tyro.conf.FlagConversionOff,),
        use_underscores=True,
    )


def save_config(config: Section, path: str | Path) -> None:
    """Writes every value of `config`, defaults included, as YAML that `load_config` reads back equal."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_whole(Path(path), text.encode())


# What may differ when a run goes on, because no number depends on it.
FREE_KEYS = {
    "data.root",
    "data.workers",
    "evaluation.backend",
    "train.save_minutes",
    "train.save_steps",
    "train.tensorboard",
    "train.timeout_minutes",
}


def flatten(config: Section) -> dict[str, Any]:
    """{"train.epochs": 3, ...} of a recipe, plain values."""

    def walk(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(walk(config.model_dump(mode="json"), ""))


def require_same(found: Mapping[str, Any], wanted: Section, source: str, *, free: Collection[str] = FREE_KEYS) -> None:
    """Nothing; raises ValueError that names the first key in which a recipe differs from a `flatten`ed one.

    Args:
        found: of the run that is there.
        wanted: the recipe now.
        source: what `found` belongs to, for the message.
        free: keys that may differ.
    """
    now = flatten(wanted)
    for key in sorted((found.keys() | now.keys()) - set(free)):
        if key in found and found[key] != now.get(key):
            raise ValueError(
                f"{source}: trained with {key} {found[key]!r}, wanted is {now.get(key)!r}; name another folder"
            )


def _kind(path: str | Path, values: dict[str, Any]) -> type[Config] | type[ClassificationConfig]:
    kinds = {"detection": Config, "classification": ClassificationConfig}
    task = values.get("task", "detection")
    if task not in kinds:
        raise ValueError(f"{path}: task: expected {' or '.join(kinds)}, got {task!r}")
    return kinds[task]


def _read_values(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected sections {', '.join(Config.model_fields)}, got {type(values).__name__}")
    return values


def _explain(error: ValidationError, kind: type[Section]) -> Iterator[str]:
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = _known_keys(kind, item["loc"][:-1])
            yield f"unknown key {key!r}{_nearest(str(item['loc'][-1]), known)}"
        elif item["type"] == "missing":
            yield f"{key} is missing"
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = item["input"]
            yield f"{key}: {message}" + ("" if isinstance(given, dict) else f" (got {given!r})")


def _known_keys(kind: type[Section], location: Sequence[Any]) -> list[str]:
    section: Any = kind
    for part in location:
        section = section.model_fields[part].annotation
    return list(section.model_fields)


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return (f"; did you mean {close[0]!r}?" if close else "") + f" (allowed: {', '.join(known)})"
