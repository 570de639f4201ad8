"""Spike maps as bits, and what the engine does with them, by the compiled kernels or by torch with the same results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import library

MOST_SHAPES = 256  # of inputs, for which a layer keeps a prepared call
PLACES = torch.arange(64)  # of the bits of a word
NEVER = torch.iinfo(torch.int32).max
LEAST_SUM = 32766  # of what 16 bits hold, less one: so a bound beyond it can be told from it


class Bits(NamedTuple):
    """Spikes of a map: bit c % 64 of word c // 64 is channel c; bits beyond the channels are 0.

    Attributes:
        words: int64 (N, H, W, ceil(channels / 64)), contiguous.
        channels: of the map.
    """

    words: Tensor
    channels: int

    @classmethod
    def pack(cls, x: Tensor) -> Bits:
        """Return the bits of a map (N, C, H, W) or (N, C) of 0 and other numbers."""
        x = x[..., None, None] if x.dim() == 2 else x
        number, channels, height, width = x.shape
        bits = torch.zeros((number, height, width, words_of(channels) * 64), dtype=torch.int64)
        bits[..., :channels] = x.ne(0).permute(0, 2, 3, 1)
        return cls((bits.unflatten(3, (-1, 64)) << PLACES).sum(4), channels)

    def unpack(self) -> Tensor:
        """Return the map, float32 (N, C, H, W) in the order N, H, W, C."""
        bits = (self.words[..., None] >> PLACES & 1).flatten(3)
        return bits[..., : self.channels].float().permute(0, 3, 1, 2)

    def flatten(self) -> Bits:
        """Return the whole of each image as the channels of one pixel, its padding included: H, W, then C."""
        flat = self.words.flatten(1)[:, None, None]
        return Bits(flat, flat.shape[3] * 64)


def words_of(channels: int) -> int:
    """Return the words of 64 bits that so many channels take."""
    return -(-channels // 64)


def padded(value: Tensor, filler: float) -> Tensor:
    """Return values per channel with others behind them, up to a multiple of 64."""
    return F.pad(value, (0, words_of(len(value)) * 64 - len(value)), value=filler).contiguous()


def mask_of(turned: Tensor) -> Tensor:
    """Return bool (C,) as the bits of a pixel, int64 (words,)."""
    return Bits.pack(turned[None]).words.flatten()


class Comparison:
    """Spikes per channel of sums or real values, turned round in some channels.

    Args:
        level: (C,), int32 for sums, which fire where sum >= level; float32 for real values: sign * y >= level.
        turned: bool (C,): of sums, whose spikes are inverted; of real values, whose sign is -1.
    """

    def __init__(self, level: Tensor, turned: Tensor | None = None) -> None:
        self.level = level
        self.turned = turned if turned is not None and bool(turned.any()) else None
        integer = level.dtype == torch.int32
        self.padded = padded(level, NEVER if integer else float("inf"))
        self.sign: Tensor | None = None
        self.mask: Tensor | None = None
        if self.turned is not None and integer:
            self.mask = mask_of(self.turned)
        elif self.turned is not None:
            self.sign = padded(torch.where(self.turned, -1.0, 1.0), 1.0)

    def check(self, channels: int, dtype: torch.dtype) -> None:
        """Raise ValueError for a map of another number of channels, or of other numbers than the kernels read."""
        if channels != len(self.level):
            raise ValueError(f"a map of {channels} channels for comparisons of {len(self.level)}")
        if {dtype, self.level.dtype} != {torch.float32}:
            raise ValueError(f"a map in {dtype} for comparisons in {self.level.dtype}: both are torch.float32 here")

    def of_sums(self, sums: Tensor) -> Tensor:
        """Return the spikes of sums (N, C, H, W), bool: the reference."""
        reached = sums >= self.level.view(-1, 1, 1)
        return reached if self.turned is None else reached ^ self.turned.view(-1, 1, 1)

    def of_real(self, y: Tensor) -> Tensor:
        """Return the spikes of real values (N, C, H, W), bool: the reference."""
        if self.turned is not None:
            y = y * torch.where(self.turned, -1.0, 1.0).view(-1, 1, 1)
        return y >= self.level.view(-1, 1, 1)


def threshold(x: Tensor, comparison: Comparison) -> Bits:
    """Return the spikes of a real map, float32 (N, C, H, W).

    Raises:
        ValueError: a map of other channels, or of other numbers.
    """
    number, channels, height, width = x.shape
    comparison.check(channels, x.dtype)
    if library.current() == "torch":
        return Bits.pack(comparison.of_real(x))
    x = x.permute(0, 2, 3, 1).contiguous()
    words = torch.empty((number, height, width, words_of(channels)), dtype=torch.int64)
    sign = None if comparison.sign is None else comparison.sign.data_ptr()
    library.LIBRARY.events_threshold(
        x.data_ptr(),
        number * height * width,
        channels,
        comparison.padded.data_ptr(),
        sign,
        words.data_ptr(),
        torch.get_num_threads(),
    )
    return Bits(words, channels)


def check_values(channels: int, spikes: Sequence[Comparison], levels: torch.dtype, *values: tuple[Tensor, Any]) -> None:
    """Raise ValueError for more comparisons than the kernels take, or values of other lengths or types."""
    if len(spikes) > library.MAX_OUTPUTS:
        raise ValueError(f"{len(spikes)} maps of spikes of one layer (allowed: up to {library.MAX_OUTPUTS})")
    turned = [(each.turned, torch.bool) for each in spikes if each.turned is not None]
    for value, kind in (*values, *((each.level, levels) for each in spikes), *turned):
        if (value.shape, value.dtype) != ((channels,), kind):
            raise ValueError(f"weights, levels, scale or bias of other numbers than {channels} channels have")


class Window(NamedTuple):
    """Geometry of a convolution or pool, height before width."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def out_size(self, size: Sequence[int], *, ceil: bool = False) -> tuple[int, int]:
        """Return height and width of the output for those of the input, as torch has them.

        Raises:
            ValueError: the input is too small.
        """
        height, width = map(self._length, size, range(2), (ceil, ceil))
        if height < 1 or width < 1:
            kernel = "x".join(map(str, self.kernel))
            raise ValueError(f"a map of {size[0]}x{size[1]} is too small for a window of {kernel}: images too small?")
        return height, width

    def _length(self, length: int, axis: int, ceil: bool) -> int:
        reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        free, stride = length + 2 * self.padding[axis] - reach, self.stride[axis]
        steps = -(-free // stride) if ceil else free // stride
        if ceil and steps * stride >= length + self.padding[axis]:
            steps -= 1  # a window that begins behind the map
        return steps + 1


def max_pool(x: Bits, window: Window, *, ceil: bool = False, inverted: Tensor | None = None) -> Bits:
    """Return, for each window, whether a neuron of it fired; inverted where the bit of `inverted` (words,) is set."""
    shape, geometry = pool_call(x, window, ceil, inverted)
    if library.current() == "torch":
        pooled = F.max_pool2d(x.unpack(), window.kernel, window.stride, window.padding, ceil_mode=ceil)
        return Bits(Bits.pack(pooled).words ^ (0 if inverted is None else inverted), x.channels)
    out = torch.empty(shape, dtype=torch.int64)
    library.LIBRARY.events_pool(x.words.data_ptr(), *geometry, out.data_ptr())
    return Bits(out, x.channels)


def pool_call(x: Bits, window: Window, ceil: bool, inverted: Tensor | None) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """Return the shape of a max-pool's words and what its kernel takes between both maps, or raise ValueError."""
    number, height, width, words = x.words.shape
    size = window.out_size((height, width), ceil=ceil)
    if inverted is not None and len(inverted) != words:
        raise ValueError(f"a map of {words} words a pixel, of which {len(inverted)} are to be inverted")
    geometry = (number, height, width, words, *size, *window.kernel, *window.stride, *window.padding)
    return (number, *size, words), (*geometry, None if inverted is None else inverted.data_ptr())


def highest(*spikes: Bits) -> Bits:
    """Return the spikes of the last map that fires, set behind set, each with its padding."""
    above, kept = torch.zeros_like(spikes[0].words), []
    for each in reversed(spikes):
        kept.append(each.words & ~above)
        above = above | each.words
    words = torch.cat(kept[::-1], dim=3)
    return Bits(words, words.shape[3] * 64)


@dataclass(eq=False)
class EventLayer:
    """A convolution or linear layer of int8 weights over spikes, and what is made of its sums, exact for every input.

    Args:
        weight: int8 (C', C / groups, kh, kw) in -127..127; (C', C, 1, 1) of a linear layer.
        window: geometry.
        groups: of the convolution.
        spikes: comparisons, each of which gives a map of spikes: of the sums, or of the real values.
        scale: float32 (C',), with `bias`: the real value is scale * sum + bias (+ residual), each operation rounded to
            float32; None: spikes of the sums are all that the layer gives.
        bias: float32 (C',).
        keeps_real: whether the real values themselves are wanted.
        may_be_dense: where so many neurons fire that a dense layer is estimated to be faster, compute it as one from
            the second time on.

    Raises:
        ValueError: more outputs than the kernels take, or weights out of range.
    """

    weight: Tensor
    window: Window
    groups: int = 1
    spikes: Sequence[Comparison] = ()
    scale: Tensor | None = None
    bias: Tensor | None = None
    keeps_real: bool = False
    may_be_dense: bool = True
    _packed: dict[Any, tuple[library.EventConv, list[Tensor]]] = field(default_factory=dict, init=False, repr=False)
    _calls: dict[Any, tuple[Any, ...]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if bool((self.weight == -128).any()):
            raise ValueError("a weight of -128 (allowed: -127 to 127)")
        self.weight = self.weight.contiguous()
        levels = torch.int32 if self.scale is None else torch.float32
        values = [(each, torch.float32) for each in (self.scale, self.bias) if each is not None]
        check_values(len(self.weight), self.spikes, levels, (self.weight[:, 0, 0, 0], torch.int8), *values)

    def __call__(self, x: Bits, residual: Tensor | None = None) -> tuple[Tensor | None, list[Bits]]:
        """Return the real values, float32 (N, C', H', W') in the order N, H, W, C, and the maps of spikes.

        Args:
            x: spikes.
            residual: float32, shape of the real values.

        Raises:
            MemoryError: there is not enough memory.
            ValueError: spikes of other channels, a map that is too small, or a residual of another shape.
        """
        self.check(x, residual)
        if library.current() == "torch":
            return self._reference(x, residual)
        template, shape, size, beside = self.call_for(x)
        found = [torch.empty(shape, dtype=torch.int64) for _ in self.spikes]
        real = torch.empty(size) if self.keeps_real else None
        if residual is not None:
            residual = residual.permute(0, 2, 3, 1).contiguous()
        call = bind(template, x, residual, real, found)
        if library.LIBRARY.events_conv(call):
            raise MemoryError(f"not enough memory for a layer of {size[3]} channels over {tuple(x.words.shape)}")
        if call.wants_dense and not call.dense and self.may_be_dense:
            template.dense = self.pack_dense(template, beside)
        return None if real is None else real.permute(0, 3, 1, 2), [Bits(words, size[3]) for words in found]

    def check(self, x: Bits, residual: Tensor | None = None) -> None:
        """Raise ValueError for inputs that are not this layer's, such as those of images of another size."""
        channels = self.weight.shape[1] * self.groups
        if x.words.shape[3] != words_of(channels):
            raise ValueError(f"spikes of {x.channels} channels for a layer of {channels}: images of another size?")
        size = self.window.out_size(x.words.shape[1:3])
        wanted = (len(x.words), len(self.weight), *size)
        if residual is not None and (residual.shape, residual.dtype) != (wanted, torch.float32):
            what = f"a residual of shape {tuple(residual.shape)} for a map of {size[0]}x{size[1]}"
            raise ValueError(f"{what}, {residual.dtype} for float32")

    def call_for(self, x: Bits) -> tuple[library.EventConv, tuple[int, ...], tuple[int, ...], int]:
        """Return a call for inputs of this shape, the shape of its spikes, that of its real values, and `beside`."""
        shape = (library.current(), x.words.shape)
        if shape in self._calls:
            return self._calls[shape]
        if len(self._calls) >= MOST_SHAPES:
            self._calls.clear()
        number, height, width, _ = x.words.shape
        out_height, out_width = self.window.out_size((height, width))
        beside = self._beside(out_width)
        key = (library.current(), beside)
        # Of two threads the first to be ready sets it: calls point to what is kept there.
        template, _ = self._packed.get(key) or self._packed.setdefault(key, self._prepare(beside))
        call = library.EventConv.from_buffer_copy(template)
        call.images, call.height, call.width = number, height, width
        call.out_height, call.out_width = out_height, out_width // beside
        place = (number, out_height, out_width)
        self._calls[shape] = found = call, (*place, words_of(len(self.weight))), (*place, len(self.weight)), beside
        return found

    def _beside(self, out_width: int) -> int:
        """Return how many neurons beside each other are computed at once, so that a narrow layer fills 64 channels."""
        several = 64 // len(self.weight) if len(self.weight) in (8, 16, 32) else 1
        fits = self.groups == 1 and self.window.dilation[1] == 1 and out_width % several == 0
        return several if fits and self.window.kernel != (1, 1) else 1

    def sums(self, x: Bits) -> Tensor:
        """Return the sums (N, C', H', W'), float32 and exact: the reference."""
        keys = {"stride": self.window.stride, "padding": self.window.padding, "dilation": self.window.dilation}
        spikes = Bits(x.words, self.weight.shape[1] * self.groups).unpack()  # of flattened ones without their padding
        return F.conv2d(spikes, self.weight.float(), groups=self.groups, **keys)

    def _reference(self, x: Bits, residual: Tensor | None) -> tuple[Tensor | None, list[Bits]]:
        sums = self.sums(x)
        if self.scale is None:
            return None, [Bits.pack(each.of_sums(sums)) for each in self.spikes]
        y = sums * self.scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)
        y = (y if residual is None else residual + y).contiguous(memory_format=torch.channels_last)
        return y if self.keeps_real else None, [Bits.pack(each.of_real(y)) for each in self.spikes]

    def _prepare(self, beside: int) -> tuple[library.EventConv, list[Tensor]]:
        """Return a call with all that does not depend on the input, and what it points to.

        A layer of r neurons beside each other has the weights of the second one column, or stride, further right: it is
        a convolution of r times the channels and the stride over a wider window.
        """
        _, stride, padding, dilation = self.window
        weight, stride = self._weight_of(beside), (stride[0], beside * stride[1])
        call = library.EventConv(
            channels=weight.shape[1] * self.groups, out_channels=len(weight), groups=self.groups, beside=beside
        )
        library.set_pairs(call, kernel=weight.shape[2:], stride=stride, pad=padding, dilation=dilation)
        call.num_spikes, call.safe = len(self.spikes), self.safe
        kept = [torch.empty(library.LIBRARY.events_packed_bytes(call), dtype=torch.int8)]
        library.LIBRARY.events_pack(call, weight.data_ptr(), kept[0].data_ptr())
        call.packed = kept[0].data_ptr()

        def address(value: Tensor) -> int:
            kept.append(value if beside == 1 else value[: len(self.weight)].repeat(beside))
            return kept[-1].data_ptr()

        if self.scale is not None:
            call.scale, call.bias = address(padded(self.scale, 0.0)), address(padded(self.bias, 0.0))
        for index, each in enumerate(self.spikes):
            levels = call.threshold if self.scale is None else call.level
            levels[index] = address(each.padded)
            if each.mask is not None:
                mask = mask_of(each.turned.repeat(beside))
                kept.append(mask)
                call.inverted[index] = mask.data_ptr()
            if each.sign is not None:
                call.sign[index] = address(each.sign)
        return call, kept

    def _weight_of(self, beside: int) -> Tensor:
        """Return the weights of so many neurons beside each other."""
        step = self.window.stride[1]
        ends = [(index * step, (beside - 1 - index) * step) for index in range(beside)]
        return torch.cat([F.pad(self.weight, end) for end in ends])

    def pack_dense(self, call: library.EventConv, beside: int) -> int:
        """Return the address of the weights for a dense layer, packed when they are wanted for the first time."""
        key = (library.current(), beside, "dense")
        if key not in self._packed:
            weight = self._weight_of(beside)
            packed = torch.empty(library.LIBRARY.events_packed_dense_bytes(call), dtype=torch.int8)
            library.LIBRARY.events_pack_dense(call, weight.data_ptr(), packed.data_ptr())
            self._packed.setdefault(key, (call, [packed]))
        return self._packed[key][1][0].data_ptr()

    @property
    def safe(self) -> int:
        """The number of weights of a neuron that never add up to more than 16 bits hold, whichever they are."""
        sizes = self.weight.flatten(1).abs().int().sort(1, descending=True).values.cumsum(1)
        return max(1, int((sizes <= LEAST_SUM).sum(1).min()))


def bind(
    template: library.EventConv, x: Bits, residual: Tensor | None, real: Tensor | None, spikes: Sequence[Tensor]
) -> library.EventConv:
    """Return a call of a layer with what enters it and leaves it.

    Args:
        template: by `call_for`.
        x: spikes.
        residual: float32 (N, H, W, C), contiguous; as `real` it may be the same memory.
        real: likewise; None: it is not wanted.
        spikes: of `words` of a `Bits`, each.
    """
    call = library.EventConv.from_buffer_copy(template)
    call.threads, call.input = torch.get_num_threads(), x.words.data_ptr()
    call.residual = None if residual is None else residual.data_ptr()
    bind_outputs(call, real, spikes)
    return call


def bind_outputs(call: library.EventConv | library.EventStem, real: Tensor | None, spikes: Sequence[Tensor]) -> None:
    """Set what leaves a layer or stem: real values, float32 (N, H, W, C), and `words` of each `Bits`."""
    call.real = None if real is None else real.data_ptr()
    for index, words in enumerate(spikes):
        call.spikes[index] = words.data_ptr()
