"""The stem of a network: a convolution of an image in fixed point, its max-pool and what is made of the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fixed_point import FIXED_POINT
from . import library
from .bits import Bits, Comparison, Window, bind_outputs, check_values, padded, words_of


class Affine(NamedTuple):
    """scale * x + shift per channel, each float32 (C,)."""

    scale: Tensor
    shift: Tensor


@dataclass(eq=False)
class EventStem:
    """A `FixedPointConv`, then perhaps a max-pool, comparisons, and an affine map of the real values: exact.

    Args:
        weight: int16 (C', C, kh, kw).
        window: geometry of the convolution, without dilation.
        step: of the input.
        output: from sums to real values.
        pool: geometry of the max-pool; None: there is none.
        ceil: whether the pool rounds sizes up.
        spikes: comparisons of the real values, pooled.
        more: applied to the real values that leave; None: they leave as they are.
        keeps_real: whether real values are wanted.
        normalise: "factor", "mean" and "std" per channel of the input, (C,), each of which may be missing: the stem
            sees (factor * x - mean) / std.

    Raises:
        ValueError: more outputs than the kernels take, or values of other lengths or types.
    """

    weight: Tensor
    window: Window
    step: float
    output: Affine
    pool: Window | None = None
    ceil: bool = False
    spikes: Sequence[Comparison] = ()
    more: Affine | None = None
    keeps_real: bool = False
    normalise: Mapping[str, Tensor] = field(default_factory=dict)
    _packed: dict[str, tuple[library.EventStem, list[Tensor]]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        real = [(each, torch.float32) for each in (*self.output, *(self.more or ()))]
        weight = self.weight[:, 0, 0, 0], torch.int16
        check_values(len(self.weight), self.spikes, torch.float32, weight, *real)
        check_values(self.weight.shape[1], (), torch.float32, *((x, torch.float32) for x in self.normalise.values()))

    def __call__(self, x: Tensor) -> tuple[Tensor | None, list[Bits]]:
        """Return the real values, float32 (N, C', H', W') in the order N, H, W, C, and the maps of spikes.

        Args:
            x: float32 (N, C, H, W).

        Raises:
            MemoryError: there is not enough memory.
            ValueError: images of another type, with other channels, or too small.
        """
        self.check(x)
        if library.current() == "torch":
            return self._reference(x)
        x = x.contiguous()
        call, shape, size = self.call_for(x.shape)
        found = [torch.empty(shape, dtype=torch.int64) for _ in self.spikes]
        real = torch.empty(size) if self.keeps_real else None
        call.input = x.data_ptr()
        bind_outputs(call, real, found)
        if library.LIBRARY.events_stem(call):
            raise MemoryError(f"not enough memory for a convolution of {tuple(x.shape)}")
        return None if real is None else real.permute(0, 3, 1, 2), [Bits(words, size[3]) for words in found]

    def check(self, x: Tensor) -> None:
        """Raise ValueError for images of another type, with other channels, or too small."""
        channels = self.weight.shape[1]
        if x.dtype != torch.float32 or x.dim() != 4 or x.shape[1] != channels:
            raise ValueError(
                f"images of {str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}: expected float32 "
                f"(N, {channels}, height, width)"
            )
        self._sizes(x.shape)

    def _sizes(self, shape: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return height and width of the convolution and of its pool for images of a shape."""
        size = self.window.out_size(shape[2:])
        return size, size if self.pool is None else self.pool.out_size(size, ceil=self.ceil)

    def call_for(self, shape: Sequence[int]) -> tuple[library.EventStem, tuple[int, ...], tuple[int, ...]]:
        """Return a call of one's own for images of a shape, the shape of its spikes and that of its real values."""
        name = library.current()
        template, _ = self._packed.get(name) or self._packed.setdefault(name, self._prepare())
        call = library.EventStem.from_buffer_copy(template)
        number, _, call.height, call.width = shape
        out_channels, (out_size, size) = len(self.weight), self._sizes(shape)
        call.images, call.threads = number, torch.get_num_threads()
        (call.out_height, call.out_width), (call.pooled_height, call.pooled_width) = out_size, size
        return call, (number, *size, words_of(out_channels)), (number, *size, out_channels)

    def _reference(self, x: Tensor) -> tuple[Tensor | None, list[Bits]]:
        x = x * self.normalise["factor"].view(-1, 1, 1) if "factor" in self.normalise else x
        x = x - self.normalise["mean"].view(-1, 1, 1) if "mean" in self.normalise else x
        x = x / self.normalise["std"].view(-1, 1, 1) if "std" in self.normalise else x
        level = (x / self.step).clamp(-FIXED_POINT, FIXED_POINT).round()
        sums = F.conv2d(level.double(), self.weight.double(), stride=self.window.stride, padding=self.window.padding)
        y = sums.float() * self.output.scale.view(-1, 1, 1) + self.output.shift.view(-1, 1, 1)
        if self.pool is not None:
            y = F.max_pool2d(y, self.pool.kernel, self.pool.stride, self.pool.padding, ceil_mode=self.ceil)
        spikes = [Bits.pack(each.of_real(y)) for each in self.spikes]
        if self.more is not None:
            y = y * self.more.scale.view(-1, 1, 1) + self.more.shift.view(-1, 1, 1)
        return y.contiguous(memory_format=torch.channels_last) if self.keeps_real else None, spikes

    def _prepare(self) -> tuple[library.EventStem, list[Tensor]]:
        out_channels, channels = self.weight.shape[:2]
        pool = self.pool or Window((1, 1))
        call = library.EventStem(channels=channels, out_channels=out_channels, num_spikes=len(self.spikes))
        call.step, call.limit = self.step, FIXED_POINT
        library.set_pairs(call, kernel=self.window.kernel, stride=self.window.stride, pad=self.window.padding)
        library.set_pairs(call, pool=pool.kernel, pool_stride=pool.stride, pool_pad=pool.padding)
        weight = self.weight.contiguous()
        kept = [torch.empty(library.LIBRARY.events_packed_stem_bytes(call), dtype=torch.int8)]
        library.LIBRARY.events_pack_stem(call, weight.data_ptr(), kept[0].data_ptr())
        call.packed = kept[0].data_ptr()

        def address(value: Tensor) -> int:
            kept.append(value)
            return value.data_ptr()

        call.scale, call.bias = (address(padded(value, 0.0)) for value in self.output)
        for name, value in self.normalise.items():
            setattr(call, name, address(value.contiguous()))
        if self.more is not None:
            call.more_scale, call.more_bias = (address(padded(value, 0.0)) for value in self.more)
        for index, each in enumerate(self.spikes):
            call.level[index] = address(each.padded)
            if each.sign is not None:
                call.sign[index] = address(each.sign)
        return call, kept
