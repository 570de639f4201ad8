"""Part of one set as its validation set: chosen by a seed, whole groups of images together."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from detection.config.schema import Data
from detection.data.records import Annotations


def take_part(whole: Annotations, split: Literal["train", "val"], data: Data) -> Annotations:
    """Return the training or validation part of a set, `data.val_fraction` being the latter.

    Sentences about what was left out go with the training part.

    Raises:
        ValueError: there is nothing to choose, or a part has no box.
    """
    chosen = choose_groups([record.path for record in whole.records], data)
    records = tuple(record for index, record in enumerate(whole.records) if (index in chosen) == (split == "val"))
    if not any((~record.ignore).any() for record in records):
        number = len(records)
        raise ValueError(
            f"{data.root}: the {number} images of the {split} part by data.val_fraction {data.val_fraction:g} have no "
            "box to use; another data.split_seed or share may give some"
        )
    return replace(whole, records=records, dropped=whole.dropped if split == "train" else ())


def _of(match: re.Match[str]) -> str:
    first = match[1] if match.re.groups else None
    return match[0] if first is None else first


def choose_groups(paths: Sequence[Path], data: Data) -> set[int]:
    """Return the indices of the images for validation: whole groups, as near to the wanted share as they allow.

    Groups come in the order of a hash of the seed and their name, so that neither the order of the files nor where
    the folder lies matters.

    Args:
        paths: of the images; those of one path belong together in any case.
        data: root, val_fraction, split_seed and group_by.

    Raises:
        ValueError: `group_by` matches no file name, or there is one group alone.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    matched = 0
    for index, path in enumerate(paths):
        match = re.search(data.group_by, path.name) if data.group_by else None
        matched += match is not None
        name = path.relative_to(data.root).as_posix() if path.is_relative_to(data.root) else path.name
        groups[f"image {name}" if match is None else f"group {_of(match)}"].append(index)
    if data.group_by and not matched:
        raise ValueError(
            f"data.group_by: {data.group_by!r} is found in none of {len(paths)} file names, such as {paths[0].name}"
        )
    if len(groups) < 2:
        raise ValueError(f"data.val_fraction: all {len(paths)} images are one group; there is no part to choose")

    def place(name: str) -> str:
        return hashlib.sha256(f"{data.split_seed} {name}".encode(errors="surrogateescape")).hexdigest()

    wanted = data.val_fraction * len(paths)
    chosen: list[int] = []
    *most, last = sorted(groups, key=place)  # the last stays for training
    for name in most:
        if abs(len(chosen) + len(groups[name]) - wanted) < abs(len(chosen) - wanted):
            chosen += groups[name]
    return set(chosen or min((groups[name] for name in (*most, last)), key=len))
