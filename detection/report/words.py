"""Numbers, networks and layers in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from detection.config import Config, Recipe

METRICS = {"detection": ("AP50", "AP", "AP75"), "classification": ("top1", "top5")}


NAMES = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "retinanet": "RetinaNet",
    "fasterrcnn": "Faster R-CNN",
    "fcos": "FCOS",
    "ssd": "SSD",
    "hoyer": "spiking",
    "relu": "analogue twin",
    "fixed": "spiking, threshold without extremum",
    "spiking": "spiking",
    "spiking_int8": "spiking, 8-bit weights",
    "twin": "analogue twin",
    "twin_int8": "8-bit twin",
    "binary": "binary network",
}


def run_names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, with as many of the folders above them as it takes to tell them apart."""
    paths = [folder.resolve().parts for folder in folders]
    length = 1
    while len({path[-length:] for path in paths}) < len(paths):
        length += 1
    return ["/".join(path[-length:]) for path in paths]


def without_common(paths: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """The paths without the folders that all of them are in; each keeps at least its last part."""
    common = 0
    while len({tuple(path[: common + 1]) for path in paths}) == 1 and all(len(path) > common + 1 for path in paths):
        common += 1
    return [path[common:] for path in paths]


def describe_network(config: Recipe) -> str:
    """Such as "RetinaNet, ResNet18 x0.5, spiking, neck and head too"."""
    backbone = config.model.backbone
    name = backbone.name
    for word in ("ResNet", "VGG", "MobileNetV"):
        name = name.replace(word.lower(), word)
    width = "" if backbone.width == 1 else f" \N{MULTIPLICATION SIGN}{backbone.width:g}"
    parts = [f"{name}{width}", NAMES[backbone.activation]]
    if isinstance(config, Config):
        parts.insert(0, NAMES[config.model.detector])
        spiking = [part for part in ("neck", "head") if getattr(config.model, part).spiking]
        parts += [f"{' and '.join(spiking)} too"] if spiking else []
    return ", ".join(parts)


def describe_data(config: Recipe) -> str:
    """Such as "voc data in data/bccd, 3 classes"."""
    data = config.data
    where = "drawn scenes" if data.format == "synthetic" and isinstance(config, Config) else f"{data.format} data"
    num = len(data.classes)
    return f"{where} in {data.root}" + (f", {plural(num, 'class', 'classes')}" if num else "")


def show_value(value: Any) -> str:
    """A setting as a recipe would have it."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(show_value, value)) or "empty"
    return f"{value:g}" if isinstance(value, float) else str(value) or "empty"


def short_names(layers: Iterable[str]) -> dict[str, str]:
    """Layer -> its name without the modules that all of them are in."""
    layers = list(layers)
    paths = without_common([layer.split(".") for layer in layers])
    return {layer: ".".join(path) for layer, path in zip(layers, paths, strict=True)}


def format_number(value: float | None) -> str:
    """Three digits after the point; pycocotools' -1 for undefined in words."""
    if value is None:
        return "\N{EN DASH}"
    return "undefined" if value == -1 else f"{value:.3f}"


def format_count(value: float) -> str:
    """Such as 12.3 M."""
    for factor, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"


def format_energy(picojoule: float) -> str:
    """Such as 4.56 \N{MICRO SIGN}J."""
    for factor, unit in ((1e12, "J"), (1e9, "mJ"), (1e6, "\N{MICRO SIGN}J"), (1e3, "nJ")):
        if abs(picojoule) >= factor:
            return f"{picojoule / factor:.3g} {unit}"
    return f"{picojoule:.3g} pJ"


def plural(number: int, singular: str, several: str | None = None) -> str:
    """Such as 1 layer, 2 layers."""
    return f"{number} {singular if number == 1 else several or singular + 's'}"


def format_time(seconds: float) -> str:
    """Such as 1 h 5 min, 24 min or 12 s."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
