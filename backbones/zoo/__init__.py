"""The zoo: trained networks that come with the package, each a run folder here, called "zoo:NAME" elsewhere.

A file of an entry, such as the one for the event-driven engine, is "zoo:NAME/model.events".
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
PREFIX = "zoo:"
NAME = re.compile("[a-z0-9_]+")
# In these, what the weights were trained for has to be what they are used for; the rest their shapes tell.
KEYS = ("name", "width", "stem", "activation", "arithmetic", "extremum", "pool_first", "pooling", "shortcut")
KEYS += ("norm_first", "head", "thresholds", "threshold", "levels", "time_steps", "reset")


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


def settings(source: str | Path) -> dict[str, Any]:
    """Return the arguments of `backbones.create` for a trained backbone, of a detector or classifier, but its weights.

    The backbone wants images in [0, 1] that are normalised by `normalisation`.

    Args:
        source: the name of an entry, or a run folder.

    Example:
        >>> backbones.create(**backbones.zoo.settings("runs/mine"), weights="runs/mine")

    Raises:
        ValueError: neither of both, or a run of an older version, whose run.json does not say it.
    """
    return _facts(source)["backbone"]


def normalisation(source: str | Path) -> dict[str, list[float]]:
    """Return "mean" and "std" per channel, by which a trained backbone wants images in [0, 1]: (x - mean) / std.

    Source and errors are those of `settings`.

    Example:
        >>> backbones.Classifier(backbone, num_classes=10, **backbones.zoo.normalisation("cifar10_vgg11"))
    """
    return _facts(source)["normalisation"]


def _facts(source: str | Path) -> dict[str, Any]:
    name = str(source).removeprefix(PREFIX)
    is_run = name not in names() and (Path(source) / "config.yaml").is_file()
    found = recorded(Path(source) if is_run else find(name))
    if not found:
        raise ValueError(f"{source}: its run.json does not say what its backbone is; its config.yaml does")
    return found


def recorded(folder: Path) -> dict[str, Any]:
    """Return what run.json in a folder says of the run's backbone; nothing where there is none, or an older one."""
    try:
        found = json.loads((folder / "run.json").read_bytes())
        backbone = dict(found["backbone"])
        return found | {"backbone": backbone | backbone.pop("options", {})}  # the neuron's own
    except (OSError, ValueError, KeyError, TypeError):
        return {}


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


def first_difference(trained: Mapping[str, Any], wanted: Mapping[str, Any], keys: Sequence[str] = KEYS) -> str | None:
    """Return the first key in which weights do not fit what is wanted: one threshold or time step fits several.

    Where either has no value, it follows from other keys, or the shapes tell.
    """
    for key in keys:
        if None not in (trained.get(key), wanted.get(key)) and not _fits(key, trained, wanted):
            return key
    return None


def _fits(key: str, trained: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    then, now, name = trained[key], wanted[key], key.rpartition(".")[2]
    beside = key.removesuffix(name)
    if name in ("thresholds", "time_steps"):
        return then in (1, now) or (name == "time_steps" and now > 1)
    unused = {
        "levels": trained.get(f"{beside}activation") != "graded",
        "reset": trained.get(f"{beside}time_steps") == 1,
    }
    return then == now or unused.get(name, False)


def require_same(source: str | Path, wanted: Mapping[str, Any]) -> None:
    """Raise ValueError that names the first of `KEYS` in which an entry's or run's backbone is not the wanted one."""
    path = locate(source)
    trained = recorded(path if path.is_dir() else path.parent).get("backbone", {})
    key = first_difference(trained, wanted)
    if key is not None:
        raise ValueError(
            f"{source}: trained with {key} {trained[key]!r}, wanted is {wanted[key]!r}; "
            f"backbones.zoo.settings() gives what it takes"
        )
