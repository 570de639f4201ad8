"""The certificate: whether what the layers with weights of a measured network saw was binary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from .operations import Measurement, WeightedLayer


class Finding(NamedTuple):
    """A layer that is not binary, or not known to be, and why."""

    layer: str
    reason: str


@dataclass(frozen=True)
class Certificate:
    """Whether the input of every convolution and linear layer was exactly 0 or 1 in every measured pass.

    Attributes:
        strict: nothing but the stem was allowed to see real values.
        num_images: how many images were measured.
        num_binary: layers whose inputs were 0/1.
        exceptions: allowed: the stem, and layers that the caller declared analogue.
        violations: everything else that was not binary.
        silent: layers that saw nothing but zeros, for which being binary says little.
        time_steps: of each image, the most of any layer.
        levels: values that a spike can take, the most of any layer; 2 are 0 and 1.
        arithmetics: convolutions that ran by their arithmetic, ordinary ones left out: ("adder", 7).
    """

    strict: bool
    num_images: int
    num_binary: int
    exceptions: tuple[Finding, ...]
    violations: tuple[Finding, ...]
    silent: tuple[str, ...]
    time_steps: int = 1
    levels: int = 2
    arithmetics: tuple[tuple[str, int], ...] = ()

    @property
    def is_binary(self) -> bool:
        """Whether there is no violation."""
        return not self.violations


def certify(measured: Measurement, analogue: Mapping[str, str] | None = None, *, strict: bool = False) -> Certificate:
    """The certificate of a measured network.

    The stem, the first convolution that ran, sees pixels and is always allowed to. A layer that never ran, or that is
    of a kind that is not measured, is a violation too: nothing is known about it.

    Args:
        measured: of `measure_activity` or `record_layers`.
        analogue: reason by module name of each part that may see real values with all that is in it, such as
            {"roi_heads": "analogue head"}.
        strict: allow nothing but the stem; `analogue` is then left aside.

    Raises:
        RuntimeError: nothing was measured.
        ValueError: there is no layer in a part of `analogue`.
    """
    if not measured.num_images:
        raise RuntimeError("nothing was measured: pass images through the model first")
    analogue = dict(analogue or {})
    names = [*measured.layers, *measured.unhandled]
    for part in analogue:
        if not any(is_within(name, [part]) for name in names):
            raise ValueError(f"analogue part {part!r}: no convolution or linear layer has a name in it")
    exceptions, violations, stem = [], [], measured.stem
    if not measured.spikes:
        violations.append(Finding("network", "it has no spike layer"))
    for name in names:
        if name in measured.unhandled:
            reason = f"a {measured.unhandled[name]}, which is not measured"
        elif not measured.layers[name].num_calls:
            reason = "never ran, so nothing is known about it"
        elif measured.layers[name].example is not None:
            reason = _describe(measured.layers[name])
        else:
            continue
        if name == stem:
            exceptions.append(Finding(name, "stem: sees pixels"))
            continue
        declared = next((why for part, why in analogue.items() if is_within(name, [part])), None)
        if declared is None or strict:
            violations.append(Finding(name, reason))
        else:
            exceptions.append(Finding(name, declared))
    ran = [layer for layer in measured.layers.values() if layer.num_calls]
    return Certificate(
        strict,
        measured.num_images,
        num_binary=sum(layer.is_binary for layer in ran),
        exceptions=tuple(exceptions),
        violations=tuple(violations),
        silent=tuple(layer.name for layer in ran if not layer.num_active),
        time_steps=measured.time_steps,
        levels=max((layer.levels for layer in measured.spikes.values()), default=2),
        arithmetics=tuple(sorted(Counter(layer.arithmetic for layer in ran if layer.accumulates).items())),
    )


def _describe(layer: WeightedLayer) -> str:
    own = f"; arithmetic {layer.arithmetic}" if layer.accumulates else ""
    return ("its input is -1 and 1" if layer.is_sign else f"its input is not 0/1, {layer.example:.6g} for one") + own


def is_within(name: str, parts: Iterable[str]) -> bool:
    """Return whether a module or parameter is one of the parts, or lies in one."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)
