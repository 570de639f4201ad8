"""The zoo: trained networks that come with the package, each a run folder here, called "zoo:NAME" elsewhere.

A file of an entry, such as the one for the event-driven engine, is "zoo:NAME/model.events".
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
PREFIX = "zoo:"
NAME = re.compile("[a-z0-9_]+")
# In these, what the weights were trained for has to be what they are used for; the rest their shapes tell.
KEYS = ("name", "width", "stem", "activation", "arithmetic", "extremum", "pool_first", "pooling", "shortcut")
KEYS += ("norm_first", "head", "thresholds")


def names() -> list[str]:
    """Names of all entries, sorted."""
    return sorted(path.parent.name for path in FOLDER.glob("*/run.json") if NAME.fullmatch(path.parent.name))


def find(name: str) -> Path:
    """The folder of an entry, a run folder: recipe, log and last.safetensors. It is part of the package: only read it.

    Raises:
        ValueError: there is no such entry.
    """
    if name not in names():
        raise ValueError(f"{PREFIX}{name}: no such entry of the zoo (allowed: {', '.join(names()) or 'none'})")
    return FOLDER / name


def settings(name: str) -> dict[str, Any]:
    """Arguments of `backbones.create` for the backbone of an entry, detector or classifier; its weights not among them.

    The backbone wants images in [0, 1] that are normalised by `normalisation`.

    Raises:
        ValueError: there is no such entry.
    """
    found = _facts(name)["backbone"]
    return found | found.pop("options", {})  # the neuron's own


def normalisation(name: str) -> dict[str, list[float]]:
    """Return "mean" and "std" per channel, by which the backbone of an entry wants images in [0, 1]: (x - mean) / std.

    Example:
        >>> backbones.Classifier(backbone, num_classes=10, **backbones.zoo.normalisation("cifar10_vgg11"))

    Raises:
        ValueError: there is no such entry.
    """
    return _facts(name)["normalisation"]


def _facts(name: str) -> dict[str, Any]:
    return json.loads((find(name) / "run.json").read_text(encoding="utf-8"))


def locate(source: str | Path) -> Path:
    """The folder of the entry where `source` is "zoo:NAME", a file of it where it is "zoo:NAME/FILE".

    Any other path is returned as it is (so ./zoo:NAME is a file).

    Raises:
        ValueError: there is no such entry, or no such file of it.
    """
    if not is_entry(source):
        return Path(source)
    name, _, file = str(source).removeprefix(PREFIX).partition("/")
    folder = find(name)
    if not file:
        return folder
    files = sorted(path.name for path in folder.iterdir())
    if file not in files:
        raise ValueError(f"{source}: no such file of the entry (allowed: {', '.join(files)})")
    return folder / file


def is_entry(source: object) -> bool:
    """Whether `source` is a text or path of the form "zoo:NAME"."""
    return isinstance(source, (str, Path)) and str(source).startswith(PREFIX)


def name_of(folder: Path) -> str | None:
    """The name of the entry whose folder this is; None for any other folder."""
    folder = folder.resolve()
    return folder.name if folder.parent == FOLDER.resolve() else None


def differ(key: str, trained: Any, wanted: Any) -> bool:
    """Whether weights that were trained with one value of a setting do not fit another: one threshold fits several."""
    return trained != wanted and (key.rpartition(".")[2], trained) != ("thresholds", 1)


def require_same(source: str | Path, wanted: Mapping[str, Any]) -> None:
    """Raise ValueError that names the first of `KEYS` in which an entry's backbone is not the wanted one."""
    trained = settings(str(source).removeprefix(PREFIX).partition("/")[0])
    for key in KEYS:
        if key in trained and differ(key, trained[key], wanted[key]):
            raise ValueError(
                f"{source}: trained with {key} {trained[key]!r}, wanted is {wanted[key]!r}; "
                f"backbones.zoo.settings() gives what it takes"
            )
