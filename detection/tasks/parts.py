"""Parts of a network that leave this package: for files, and for NIR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from backbones import Backbone


class Deployable(NamedTuple):
    """The part of a network that goes into a file, and what it takes and gives.

    Attributes:
        network: images (N, 3, H, W), RGB in [0, 1], as the file will be given them -> a tensor or a tuple of them.
        outputs: what each of them means, by the name that it has in the file.
        meaning: of the images, in words.
        keep: parts of names of layers that stay in floating point over spikes too.
        decoding: all that makes boxes of the outputs, see `describe_decoding`; empty: there are none.
    """

    network: nn.Module
    outputs: Mapping[str, str]
    meaning: str
    keep: tuple[str, ...] = ()
    decoding: Mapping[str, Any] = {}


class SpikingPart(NamedTuple):
    """The part of a network that NIR can say.

    Attributes:
        network: images (N, 3, H, W) normalised -> a tensor, or tensors by name.
        backbone: the one in `network`; its stem may become the caller's to run.
        mean, std: that images in [0, 1] are normalised by.
    """

    network: nn.Module
    backbone: Backbone
    mean: Sequence[float]
    std: Sequence[float]
