"""The sections of a recipe as pydantic models: keys, types, defaults, and what each key means."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from detection.config.base import Positive, Section
from detection.config.data_sections import Augment, Data, Events, ImageAugment, ImageData, Scenes
from detection.config.training_sections import Distillation, Hoyer, Optimizer, Train

__all__ = [
    "Augment",
    "Backbone",
    "Classifier",
    "Data",
    "Distillation",
    "Evaluation",
    "Events",
    "Head",
    "Hoyer",
    "ImageAugment",
    "ImageData",
    "Model",
    "Neck",
    "Network",
    "Optimizer",
    "Recipe",
    "Scenes",
    "Section",
    "Train",
]
_AS_LIST = BeforeValidator(lambda value: [value] if isinstance(value, int) else value)


class Backbone(Section):
    """The feature extractor, `backbones.create(name, ...)`."""

    name: str = Field("resnet18", description="one of `backbones.names()`: vgg9 ... resnet152, mobilenetv2")
    width: float = Field(1.0, gt=0, le=64, description="multiplier of every channel count (rounded to multiples of 8)")
    stem: Literal["imagenet", "cifar"] = Field("imagenet", description="first layers: for large images, or for 32x32")
    activation: str = Field(
        "hoyer",
        description="one of `backbones.neurons()`: hoyer, the method; relu, the analogue twin; fixed, threshold v_th "
        "without extremum; graded, spikes of several levels; sign, of a binary network. Left open, it is that of the "
        "arithmetic: hoyer, sign and relu, also where a command line changes the arithmetic alone",
    )
    arithmetic: str = Field(
        "float",
        description="of all convolutions but the first, one of `backbones.ARITHMETICS`: float; binary, 1-bit weights; "
        "adder, sums of absolute differences",
    )
    extremum: Literal["layer", "channel"] = Field("layer", description="scope of the Hoyer extremum")
    momentum: float = Field(0.1, gt=0, le=1, description="weight of a batch in the extremum's running average")
    threshold: Literal["layer", "channel"] = Field("layer", description="scope of the trainable threshold v_th")
    window: tuple[float, float] = Field(
        (0.0, 2.0), description="ends of the surrogate gradient's window, in thresholds v_th; it contains 0 to 1"
    )
    levels: int = Field(4, ge=2, le=16, description="values that a spike of the activation graded can take")
    time_steps: int = Field(
        1,
        ge=1,
        le=64,
        description="steps in which spike layers carry their potential over; the image is the same in each, or of "
        "events the frame of each of as many data.events.steps; the outputs are averaged; the analogue twin has no use "
        "for them",
    )
    reset: Literal["subtract", "zero"] = Field(
        "subtract",
        description="several time_steps: what a spike does to its potential; subtract the threshold, or zero",
    )
    thresholds: int = Field(
        1,
        ge=1,
        le=16,
        description="neurons of each potential, with thresholds of their own, for hoyer and fixed: as many bits in "
        "place of one, and as many weights of the layer behind them; the analogue twin has no use for them",
    )
    pool_first: bool = Field(True, description="max-pool before BatchNorm, as published; false: after it")
    pooling: Literal["max", "stride"] = Field(
        "max", description="vgg: max-pool, or stride 2 in the convolution before it in its place"
    )
    shortcut: Literal["spiking", "real"] = Field(
        "spiking",
        description="resnet: where the stream changes its shape; spiking, as published; real: average pool, channels "
        "repeated, no spikes",
    )
    norm_first: bool = Field(False, description="resnet: BatchNorm in front of the spike of every basic block")
    head: Literal["linear", "normalised", "pooled"] = Field(
        "linear",
        description="vgg, as a classifier: linear, as published; normalised: BatchNorm in the hidden layers; pooled: "
        "global average pool and one linear layer",
    )
    options: dict[str, bool | int | float | str] = Field(
        {}, description="further options of a backbone or activation that was registered from elsewhere"
    )
    weights: str | None = Field(None, description="pretrained weights: a .safetensors file, a run folder or zoo:NAME")

    @model_validator(mode="after")
    def _window_has_room(self) -> Backbone:
        low, high = self.window
        if not low <= 0 < 1 <= high:
            raise ValueError(f"window: expected ends that contain 0 to 1, got {low:g} to {high:g}")
        return self

    @model_validator(mode="after")
    def _activation_of_the_arithmetic(self) -> Backbone:
        if self.arithmetic != "float" and "activation" not in self.model_fields_set:
            from backbones import ARITHMETICS  # with torch, which a network of this kind needs soon

            if self.arithmetic in ARITHMETICS:  # unknown ones are reported with the other names
                self.__dict__["activation"] = ARITHMETICS[self.arithmetic].activation
        return self

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `backbones.create`, name and weights left out."""
        keys = [key for key in type(self).model_fields if key not in ("name", "weights", "options")]
        return {key: getattr(self, key) for key in keys} | self.options


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
    out_channels: int = Field(256, gt=0, le=65536, description="channels of every pyramid map; ssd: of the extra maps")
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
    representation_size: int = Field(
        1024, gt=0, le=65536, description="features of the box head's linear layers (fasterrcnn)"
    )
    num_regions: int = Field(
        512,
        gt=0,
        le=10**6,
        description="regions per image that the box head is trained on, objects at most a quarter (fasterrcnn)",
    )
    score_threshold: float = Field(0.05, ge=0, lt=1, description="detections below it are not returned")
    nms_threshold: float = Field(0.5, gt=0, le=1, description="IoU above which the weaker of two boxes is dropped")
    max_detections: int = Field(100, gt=0, le=10**5, description="detections kept per image")


class Network(Section):
    """Base of a network's section, which has a `backbone`: what all of it starts from."""

    weights: str | None = Field(
        None,
        description="a whole trained network to start from: a run folder or zoo:NAME (last weights), or a .safetensors "
        "file of one; outputs of classes of equal names stay, those of others are new",
    )

    @model_validator(mode="after")
    def _one_start(self) -> Network:
        if None not in (self.weights, self.backbone.weights):
            raise ValueError("weights and backbone.weights are both given: leave one of them out")
        return self


class Model(Network):
    """The detector: images -> normalise, resize -> backbone -> neck -> head."""

    detector: Literal["fasterrcnn", "retinanet", "fcos", "ssd"] = Field(
        "retinanet", description="torchvision detector to build on"
    )
    backbone: Backbone = Backbone()
    neck: Neck = Neck()
    head: Head = Head()
    min_size: Annotated[list[Annotated[int, Field(gt=0, le=16384)]], _AS_LIST] = Field(
        [800], min_length=1, description="short side in pixels; several: one is drawn per training image, last tests"
    )
    max_size: int = Field(1333, gt=0, le=16384, description="upper bound of the long side in pixels")
    mean: tuple[float, float, float] = Field((0.485, 0.456, 0.406), description="RGB mean, images in [0, 1]")
    std: tuple[Positive, Positive, Positive] = Field((0.229, 0.224, 0.225), description="RGB standard deviation")

    @property
    def anchor_scale(self) -> float | None:
        """`head.anchor_scale`, or what it is by default; None for detectors without."""
        return self.head.anchor_scale or {"fasterrcnn": 8.0, "retinanet": 4.0}.get(self.detector)

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


class Evaluation(Section):
    """Average precision."""

    backend: Literal["pycocotools", "faster-coco-eval"] = Field(
        "pycocotools",
        description="who counts COCO's numbers; faster-coco-eval (pip install hoyer-det[fast]) for large sets",
    )


class Classifier(Network):
    """A backbone with the classification head of its family."""

    backbone: Backbone = Backbone()
    dropout: float = Field(0.0, ge=0, lt=1, description="probability in the head, while training")
    mean: tuple[float, float, float] = Field((0.485, 0.456, 0.406), description="RGB mean, images in [0, 1]")
    std: tuple[Positive, Positive, Positive] = Field((0.229, 0.224, 0.225), description="RGB standard deviation")


class Recipe(Section):
    """The sections of every kind of recipe; a task fills in `task`, `model` and `data` and adds what else it needs.

    `model` has a section `backbone`, a `Backbone`; `data` has `root` and `classes`.
    """

    task: str
    plugins: list[str] = Field([], description="Python modules to import first, which register what they bring")
    model: Section
    data: Section
    hoyer: Hoyer = Hoyer()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    distillation: Distillation = Distillation()

    @model_validator(mode="after")
    def _a_frame_per_step(self) -> Recipe:
        frames, steps = getattr(self.data, "frames", 1), self.model.backbone.time_steps
        if frames > 1 and steps > 1 and frames != steps:
            raise ValueError(
                f"model.backbone.time_steps {steps}: data.events.steps is {frames}; allowed are the same number, a "
                "frame for each time step, or 1 for either"
            )
        return self
