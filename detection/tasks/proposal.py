"""A recipe for data that nobody has written one for: each value with its reason."""

from __future__ import annotations

import math
import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from detection.config.yaml_files import flow_yaml
from detection.data.records import Annotations
from detection.tasks.checks import PADDED, Objects, best_overlaps, resized

SMALL_SET = 2000  # images, below which a pretrained backbone is taken
ZOO = "zoo:bccd_retinanet_resnet18"
LEAST_OBJECT = 22  # pixels that 95 of 100 objects should have at least: nearly three cells of stride 8
CHEAP = 320  # pixels of a shorter side up to which images are enlarged, twofold at most
LARGEST = (800, 1333)  # as published for COCO
STEPS, EPOCHS, MOST_EPOCHS = 1500, 40, 200
SCALES = (3.0, 2.5, 3.5, 2.0, 4.0, 1.5)  # smallest anchors of a level in its strides; the first was measured most
COVERED = 0.5  # IoU
REASONS = {  # of keys of the section data
    "val_fraction": "a part of the training images is for validation, chosen by data.split_seed; where images are "
    "near-duplicates, such as frames of a film, data.group_by keeps those together",
    "verify": "full decodes every image beforehand, header is faster; training stops at damage that is not found",
}
LEFT_RIGHT = re.compile(r"(^|[^a-z])(left|right)([^a-z]|$)", re.IGNORECASE)


class Choice(NamedTuple):
    """A value of a recipe, by its key "section.key", and why it is so."""

    key: str
    value: Any
    why: str


def propose(data: Mapping[str, Any], train: Annotations, saw: str) -> list[Choice]:
    """Return the values of a recipe for a data set, in the order of a file.

    It is made as `bccd_retinanet_resnet18_fast`: a RetinaNet on a spiking ResNet18, sized for hours on two CPU cores.

    Args:
        data: keys of the recipe's section `data` by which the set is read, but `classes`; those of `augment`
            take the place of what is proposed.
        train: its training images.
        saw: how the format was recognised.

    Raises:
        ValueError: there is no object to train on.
    """
    number, small = len(train.records), len(train.records) < SMALL_SET
    min_size, max_size, why = _input_size(train)
    objects = resized(train, min_size, max_size)
    levels, extra, scale, covered = _levels(objects)
    batch = _batch(number, max_size)
    per_epoch = math.ceil(number / batch)
    epochs = min(max(EPOCHS, round(STEPS / per_epoch, -1)), MOST_EPOCHS)
    steps = epochs * per_epoch
    backbone: dict[str, Any] = {"name": "resnet18", "width": 0.5, "activation": "hoyer"}
    if small:
        backbone["weights"] = ZOO
        origin = f"starts from {ZOO}, a detector trained on microscope images, since {number} images are few; "
        origin += "from scratch: --model.backbone.weights None"
    else:
        backbone |= {"width": 1.0, "shortcut": "real", "norm_first": True}
        origin = f"of full width and from scratch, for {number} images; half is four times cheaper"
    neck = {"source": "spikes", "levels": levels, "extra_levels": extra, "out_channels": 128}
    others = [key for key in data if key not in ("format", "root", "augment")]
    augment, mirrored = _augment(train.categories)
    return [
        Choice("model.detector", "retinanet", "one stage; spikes up to the last layer with --model.neck.spiking True "
               "--model.head.spiking True"),
        Choice("model.backbone", backbone, f"spikes in one time step; {origin}"),
        Choice("model.neck", neck, covered),
        Choice("model.head", {"num_convs": 2, "norm": "group", "anchor_scale": scale},
               "a small head; anchor_scale was chosen together with the levels"),
        Choice("model.min_size", [min_size], why),
        Choice("model.max_size", max_size, "the longer side belongs to it, by the images' shapes"),
        Choice("data.format", data["format"], saw),
        Choice("data.root", data["root"], ""),
        *(Choice(f"data.{key}", data[key], REASONS.get(key, "")) for key in others),
        Choice("data.classes", list(train.categories), "label 1 first"),
        Choice("data.augment", augment | data.get("augment", {}), mirrored),
        Choice("hoyer", {"weight": 0.03, "reduction": "network", "warmup_epochs": min(4, epochs // 10)},
               "pulls every neuron alike; warm-up, or it would silence the network: a tenth of the epochs, at most 4"),
        Choice("optimizer", _optimizer(steps), f"Muon learns in few epochs; warm-up over a tenth of the {steps} steps, "
               "at most 100"),
        Choice("train", _train(batch, epochs, steps), f"{number} images in batches of {batch} are "
               f"{per_epoch} steps per epoch; {EPOCHS} epochs or {STEPS} steps, whichever is more, but "
               f"no more than {MOST_EPOCHS} epochs"),
    ]  # fmt: skip


def _input_size(train: Annotations) -> tuple[int, int, str]:
    """Shorter and longer side of the network's images, and why."""
    shorts = np.array([min(record.width, record.height) for record in train.records], dtype=np.float64)
    ratios = np.array([max(each.width, each.height) / min(each.width, each.height) for each in train.records])
    shares = [
        np.sqrt(np.prod(record.boxes[~record.ignore][:, 2:] - record.boxes[~record.ignore][:, :2], axis=1)) / short
        for record, short in zip(train.records, shorts, strict=True)
    ]
    sizes = np.concatenate(shares)
    if not len(sizes):
        raise ValueError("no object to train on: a recipe follows from the objects' sizes")
    native, small, ratio = float(np.median(shorts)), float(np.percentile(sizes, 5)), float(np.percentile(ratios, 95))
    most = min(max(native, min(2 * native, CHEAP)), LARGEST[0])
    wanted = min(LEAST_OBJECT / small, most)
    short = math.ceil(wanted / PADDED) * PADDED
    long = min(math.ceil(short * ratio / PADDED) * PADDED, max(LARGEST[1], short))
    why = (
        f"images have {native:g} pixels on their shorter side, and 95 of 100 objects there at least "
        f"{small * native:.0f} (root of the area): so large that these have {small * short:.0f}"
    )
    return short, long, why + ("" if wanted < most else "; larger images would cost more than they give")


def _levels(objects: Objects) -> tuple[list[str], int, float, str]:
    """Levels, extra levels and anchor scale: the fewest levels whose anchors cover nearly all that any would."""
    fine = float(np.percentile(objects.sides, 5)) < LEAST_OBJECT / 2
    names = ["c2", "c3", "c4", "c5"] if fine else ["c3", "c4", "c5"]
    first = 4 if fine else 8
    strides_of = [[first * 2**step for step in range(len(names) + extra)] for extra in range(3)]
    lost = {
        (extra, scale): float((best_overlaps(objects, strides, scale) < COVERED).mean())
        for extra, strides in enumerate(strides_of)
        for scale in SCALES
    }
    least = min(lost.values())
    extra, scale = next(key for key in lost if lost[key] <= least + 0.01)
    strides = strides_of[extra]
    why = (
        f"cells of {strides[0]} to {strides[-1]} pixels and anchors of {scale * strides[0]:g} to "
        f"{scale * strides[-1] * 2 ** (2 / 3):.0f}, for objects of {objects.sides.min():.0f} to "
        f"{objects.sides.max():.0f}: no anchor covers {100 * lost[extra, scale]:.1f} % of them at IoU {COVERED}"
    )
    return names, extra, scale, why + ("; c2, since objects are small" if fine else "")


def _batch(number: int, max_size: int) -> int:
    largest = 4 if max_size > 800 else 16 if number >= SMALL_SET and max_size <= 512 else 8
    return min(largest, max(1, number // 4))


def _augment(classes: Sequence[str]) -> tuple[dict[str, float], str]:
    """Augmentation and why; what a mirror would make of the classes is seen by their names."""
    sides = [name for name in classes if LEFT_RIGHT.search(name)]
    signs = len(classes) > 1 and all(len(name) == 1 for name in classes)
    shared = {"crop": 0.5, "color": 0.5}
    if sides or signs:
        which = ", ".join(sides[:3]) if sides else "letters or digits"
        return {"hflip": 0.0, **shared}, f"no mirror images: {which} would become something else"
    why = "mirror images, crops that keep whole boxes, colours; images from above or of a microscope: vflip 0.5, too"
    return {"hflip": 0.5, **shared}, why


def _optimizer(steps: int) -> dict[str, Any]:
    values = {"name": "muon", "lr": 1.0e-3, "weight_decay": 1.0e-2, "muon_lr": 0.01, "muon_decay": 0.05}
    return values | {"schedule": "cosine", "warmup_steps": min(100, steps // 10), "clip_norm": 1.0}


def _train(batch: int, epochs: int, steps: int) -> dict[str, Any]:
    values = {"epochs": epochs, "batch_size": batch, "eval_every": max(1, epochs // 20), "precision": "auto"}
    decay = 0.99 if steps <= 5000 else 0.998
    return values | {"channels_last": True, "ema_decay": decay}


def as_yaml(choices: Sequence[Choice], path: Path, folder: Path) -> str:
    """Return the text of a recipe: each value under a comment with its reason."""
    head = f"A RetinaNet on a one-time-step spiking ResNet18 for {folder}, written by hoyer-det init."
    starts = any(choice.key == "model.backbone" and "weights" in choice.value for choice in choices)
    lines = [
        *_comment(head, ""),
        f"#   hoyer-det train {shlex.quote(str(path))}",
        f"# The analogue twin: --model.backbone.activation relu{' --model.backbone.weights None' * starts}",
    ]
    open_section = ""
    for choice in choices:
        section, _, key = choice.key.rpartition(".")
        if section != open_section and section:
            lines.append(f"{section}:")
        open_section, indent = section, "  " if section else ""
        lines += _comment(choice.why, indent) if choice.why else []
        lines.append(f"{indent}{key}: {flow_yaml(choice.value)}")
    return "\n".join(lines) + "\n"


def _comment(text: str, indent: str) -> list[str]:
    return [f"{indent}# {line}" for line in textwrap.wrap(text, 116 - len(indent), break_on_hyphens=False)]
