"""Weights on disk: safetensors files that carry a checksum of what they hold, loaded strictly."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from . import zoo
from .net2net import add_thresholds
from .networks.base import Backbone

# The one entry in the metadata of a file that this project wrote: the checksum, and behind it a text. One, because the
# order of several in the file would be random; of a shape that is known even where its name is damaged.
STEP = "#step"  # behind the name of a tensor of integers
CHECKSUM = "sha256"
LEAK = ".leak"  # of `MultiStepSpike`
WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")  # of torch's data parallelism and compiler
PICKLED = (b"PK\x03\x04", b"\x80\x02")  # begin files of torch.save, new and old
DIGEST = re.compile("[0-9a-f]{64}")


def load_weights(backbone: Backbone, weights: str | Path | Mapping[str, Tensor]) -> None:
    """Load weights into `backbone`, strictly.

    Args:
        backbone: changed in place, only if every key fits.
        weights: "zoo:NAME" or a file of it, a run folder, a .safetensors file, or a state dict. The keys are those of a
            bare backbone, of a `Classifier` ("backbone.*") or of a detector ("backbone.body.*"), also of one within
            other modules or compiled; other parts of those are left out. Those of one time step fit several, too: every
            leak is then 1; and those of one threshold, see `add_thresholds`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a key is missing, unknown, or of another shape, or has numbers that are not finite; the message
            names it. Or no such entry of the zoo.
    """
    if not isinstance(weights, (str, Path, Mapping)):
        raise ValueError(f"weights must be a path, 'zoo:NAME' or a state dict, got {weights!r}")
    source = "state dict" if isinstance(weights, Mapping) else str(weights)
    if isinstance(weights, Mapping):
        state = dict(weights)
    else:
        file = zoo.locate(weights)
        state, _ = read_tensors(file / "last.safetensors" if file.is_dir() else file)
    for part in ("backbone.body.", "backbone."):
        if any(part in key for key in state):
            several = sorted({key.split(part, 1)[0] for key in state if part in key})
            if len(several) > 1:
                raise ValueError(f"{source} has several backbones: {', '.join(several)}; give the state dict of one")
            state = {key.split(part, 1)[1]: value for key, value in state.items() if part in key}
            break
    state = {WRAPPERS.sub("", key): value for key, value in state.items()}
    wanted = backbone.state_dict()
    if not any(key.endswith(LEAK) for key in state):  # a network of one time step has none; 1 is where it starts
        state |= {key: torch.ones_like(value) for key, value in wanted.items() if key.endswith(LEAK)}
    state = add_thresholds(state, backbone)
    problems = [f"{key!r} is missing" for key in wanted if key not in state]
    problems += [f"{key!r} is unknown to this backbone" for key in state if key not in wanted]
    problems += [
        f"{key!r} has the shape {tuple(state[key].shape)}, this backbone wants {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(
            f"{source} does not fit the backbone: {problems[0]}{more}; "
            "name, width, stem, in_channels, activation, time_steps, threshold, thresholds, shortcut, norm_first, "
            "extremum and pool_first must be those that the weights were trained with"
        )
    require_finite(state, source)
    backbone.load_state_dict(state)


def require_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise ValueError that names the first tensor with a number that is not finite."""
    for name, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{source}: {name} has numbers that are not finite; the network would predict nothing")


def checksum(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256, in 64 hexadecimal digits, of names, types, shapes and bytes of the tensors, and of a text."""
    digest = hashlib.sha256(text.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def tensors_to_bytes(tensors: Mapping[str, Tensor], text: str = "") -> bytes:
    """A .safetensors file of tensors and a text with a checksum of both, for `read_tensors`; needs safetensors.

    The same content gives the same bytes.
    """
    from safetensors.torch import save

    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    return save(tensors, {CHECKSUM: checksum(tensors, text) + text})


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], str]:
    """Tensors, on the CPU, and text of a .safetensors file; nothing is unpickled.

    A file by `tensors_to_bytes` must have the content that its checksum says; files of others have none, and no text.
    Tensors of integers that come with their step are those numbers times it, in float32.

    Raises:
        FileNotFoundError: no such file.
        ImportError: safetensors is not installed.
        ValueError: the file is no safetensors file (one of torch.save: says how to convert it), is damaged, or is one
            of the event-driven engine.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights file")
    try:
        from safetensors import SafetensorError, safe_open  # the one thing that needs more than torch
    except ImportError:
        raise ImportError(f"reading {path} needs safetensors: pip install safetensors") from None
    try:
        with path.open("rb") as opened, safe_open(_utf8_name(path, opened.fileno()), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        with path.open("rb") as file:
            pickled = file.read(4).startswith(PICKLED)
        if pickled:
            raise ValueError(
                f"{path}: written by torch.save, which may run programs when it is read; only .safetensors files are "
                "read. If you trust it, convert it, or the part of it that holds the weights:\n  python -c "
                f"\"import torch, safetensors.torch as s; s.save_file(torch.load({str(path)!r}, 'cpu'), "
                f'{str(path.with_suffix(".safetensors"))!r})"'
            ) from None
        what = "damaged weights file" if path.suffix == ".safetensors" else "no .safetensors file"
        raise ValueError(f"{path}: {what} ({' '.join(str(error).split())})") from None
    if not (CHECKSUM in metadata or any(DIGEST.match(value) for value in metadata.values())):
        return times_steps(tensors), ""
    if "graph" in metadata:
        raise ValueError(f"{path}: a file of the event-driven engine; its run has the weights")
    entry = metadata.get(CHECKSUM, "")
    if entry[:64] != checksum(tensors, entry[64:]):
        raise ValueError(f"{path}: damaged weights file (its content is not what its checksum says)")
    return times_steps(tensors), entry[64:]


def times_steps(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in float32 in the place of integers and their steps, which are called NAME#step; all else as it is."""
    found = {name: value for name, value in tensors.items() if not name.endswith(STEP)}
    for name in found:
        if (step := tensors.get(name + STEP)) is not None:
            found[name] = found[name] * step
    return found


def _utf8_name(path: Path, descriptor: int) -> str:
    """A name of an open file that safetensors takes, even where its own is no UTF-8."""
    try:
        return str(path).encode().decode()
    except UnicodeEncodeError:
        return f"/dev/fd/{descriptor}"
