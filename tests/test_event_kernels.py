"""The kernels of the event-driven engine: every one gives what integers give, bit for bit, for every input."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from backbones.deploy.events import Bits, Comparison, EventLayer, Window, bits, library, max_pool, threshold, using
from backbones.deploy.events.stem import Affine, EventStem

KERNELS = library.available()
FIXED = settings(derandomize=True, deadline=None, database=None)
LEAST, MOST = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max
EXTREMES = [LEAST, LEAST + 1, -32769, -32768, -32767, -32766, -1, 0, 1, 32766, 32767, 32768, 32769, MOST - 1, MOST]
DENSITIES = st.sampled_from([0.0, 0.03, 0.15, 0.5, 0.51, 0.85, 1.0])
WEIGHTS = st.sampled_from(["random", "small", "all 127", "all -127", "alternating", "zero"])


@dataclass
class Case:
    """A layer and its input.

    Attributes:
        layer: channels, out_channels, groups and kernel.
        window: geometry.
        shape: N, C, H, W of the input.
        density: share of the inputs that fire.
        weights: kind of the weights.
        threads: of the kernels.
        seed: of everything random.
    """

    out_channels: int
    groups: int
    window: Window
    shape: tuple[int, int, int, int]
    density: float
    weights: str
    threads: int
    seed: int

    def make(self) -> tuple[Tensor, Tensor, Tensor, torch.Generator]:
        """Return the map (bool), weights (int8), sums in int64, by float64, and a generator for what else is needed."""
        generator = torch.Generator().manual_seed(self.seed)
        spikes = torch.rand(self.shape, generator=generator) < self.density
        shape = (self.out_channels, self.shape[1] // self.groups, *self.window.kernel)
        weight = weights_of(self.weights, shape, generator)
        _, stride, padding, dilation = self.window
        sums = F.conv2d(spikes.double(), weight.double(), None, stride, padding, dilation, self.groups)
        return spikes, weight, sums.long(), generator


def weights_of(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if kind == "alternating":  # by input: sums of all cancel, of some do not
        flat = 127 - 254 * (torch.arange(int(np.prod(shape[1:]))) % 2)
        return flat.expand(shape[0], -1).reshape(shape).to(torch.int8)
    least, most = {
        "random": (-127, 127), "small": (-3, 3), "all 127": (127, 127), "all -127": (-127, -127), "zero": (0, 0),
    }[kind]  # fmt: skip
    return torch.randint(least, most + 1, shape, generator=generator, dtype=torch.int8)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(["plain", "plain", "grouped", "depthwise", "multiplied", "linear"]))
    channels, groups = draw(st.integers(1, 200)), 1
    out_channels = draw(st.one_of(st.integers(1, 200), st.sampled_from([8, 16, 32])))  # few: several neurons at once
    if kind == "linear":
        channels, window, size = draw(st.integers(1, 5000)), Window((1, 1)), (1, 1)
    else:
        if kind == "grouped":
            groups = draw(st.integers(2, 5))
            channels, out_channels = (groups * draw(st.integers(1, 70)) for _ in range(2))
        elif kind != "plain":
            groups = channels
            out_channels = channels * (1 if kind == "depthwise" else draw(st.integers(2, 3)))
        kernel = tuple(draw(st.sampled_from([1, 3, 5, 7])) for _ in range(2))
        pairs = st.tuples(st.integers(1, 2), st.integers(1, 2))
        padding = tuple(draw(st.integers(0, side // 2 + 2)) for side in kernel)
        stride = draw(pairs)
        if channels == 1:  # where oneDNN (torch 2.14) is wrong for 5x5 with strides of 1 and 2
            stride = stride[:1] * 2
        window = Window(kernel, stride, padding, draw(st.one_of(st.just((1, 1)), pairs)))
        reach = [d * (k - 1) + 1 - 2 * p for k, p, d in zip(kernel, padding, window.dilation, strict=True)]
        size = tuple(max(draw(st.integers(1, 9)), least) for least in reach)
    shape = (draw(st.integers(1, 3)), channels, *size)
    numbers = draw(st.integers(1, 2)), draw(st.integers(0, 2**31))
    return Case(out_channels, groups, window, shape, draw(DENSITIES), draw(WEIGHTS), *numbers)


def levels_of(values: Tensor, generator: torch.Generator, others: list[Any]) -> Tensor:
    """Return a level per channel: a value of the channel, which just reaches it, one next to it, or an extreme."""
    per_channel = values.transpose(0, 1).flatten(1)
    number, count = per_channel.shape
    found = per_channel[torch.arange(number), torch.randint(count, (number,), generator=generator)]
    infinity = torch.tensor(torch.inf)
    beyond = torch.nextafter(found, infinity) if values.is_floating_point() else found + 1
    extreme = torch.tensor(others, dtype=values.dtype)[torch.randint(len(others), (number,), generator=generator)]
    which = torch.randint(3, (number,), generator=generator)
    return torch.where(which == 0, found, torch.where(which == 1, beyond, extreme))


def turned_of(number: int, generator: torch.Generator) -> Tensor | None:
    """Return channels that are turned round: some, all or, as None, none."""
    share = (0.0, 0.5, 1.0)[int(torch.randint(3, (), generator=generator))]
    return torch.rand(number, generator=generator) < share if share else None


def per_channel(value: Tensor) -> Tensor:
    return value.view(-1, 1, 1)


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def equal(found: Bits, expected: Bits) -> bool:
    """Return whether bits are the same, those beyond the channels included."""
    return found.channels == expected.channels and torch.equal(found.words, expected.words)


def packed(spikes: Tensor) -> Bits:
    """Return the bits of a map (N, C, H, W), one by one: another way than that of `Bits.pack`."""
    number, channels, height, width = spikes.shape
    words = torch.zeros(number, height, width, -(-channels // 64), dtype=torch.int64)
    for channel in range(channels):
        bit = 1 << channel % 64
        bit -= 2**64 * (bit >= 2**63)  # the sign of int64
        words[..., channel // 64] |= torch.where(spikes[:, channel], bit, 0)
    return Bits(words, channels)


def run_all(layer: EventLayer, x: Bits, residual: Tensor | None = None) -> Iterator[tuple[Tensor | None, list[Bits]]]:
    """Yield the results of every kernel, of the first time and of the second, from which on it may be a dense layer."""
    for name in KERNELS:
        with using(name):
            yield layer(x, residual)
            yield layer(x, residual)


# --- layers -----------------------------------------------------------------------------------------------------------


def test_the_kernels_are_there_where_they_must_be():
    if KERNELS == ["torch"]:
        reason = "the extension is not compiled"
        (pytest.fail if os.environ.get("REQUIRE_REAL_DATA") else pytest.skip)(reason)
    assert KERNELS[-2:] == ["portable", "torch"] and set(KERNELS[:-2]) <= {"avx512vnni", "avx512", "avx2"}


@settings(FIXED, max_examples=150)
@given(cases())
def test_spikes_of_sums_are_those_of_integers(case):
    spikes, weight, sums, generator = case.make()
    number = int(torch.randint(1, 4, (), generator=generator))
    levels = [levels_of(sums, generator, EXTREMES).clamp(LEAST, MOST).int() for _ in range(number)]
    turned = [turned_of(len(weight), generator) for _ in range(number)]
    layer = EventLayer(
        weight, case.window, case.groups, [Comparison(*each) for each in zip(levels, turned, strict=True)]
    )
    expected = [
        packed((sums >= per_channel(level)) ^ (False if turn is None else per_channel(turn)))
        for level, turn in zip(levels, turned, strict=True)
    ]
    with threads(case.threads):
        for real, found in run_all(layer, Bits.pack(spikes)):
            assert real is None and len(found) == number
            assert all(map(equal, found, expected))


@settings(FIXED, max_examples=100)
@given(cases(), st.booleans(), st.integers(0, 2))
def test_real_values_and_their_spikes_are_those_of_float32(case, with_residual, number):
    spikes, weight, sums, generator = case.make()
    scale, bias = (torch.randn(len(weight), generator=generator) * factor for factor in (0.01, 1.0))
    scale[::5], bias[::3] = 0.0, 0.0
    residual = torch.randn(sums.shape, generator=generator) if with_residual else None
    y = sums.numpy().astype(np.float32) * scale.numpy()[:, None, None]  # each operation rounded, by numpy
    y = y + bias.numpy()[:, None, None]
    y = torch.from_numpy(y if residual is None else residual.numpy() + y)
    turned = [turned_of(len(weight), generator) for _ in range(number)]
    signs = [torch.ones(len(weight)) if turn is None else 1 - 2 * turn.float() for turn in turned]
    signed = [y * per_channel(sign) for sign in signs]
    levels = [levels_of(each, generator, [-torch.inf, torch.inf, 0.0, -0.0]) for each in signed]
    layer = EventLayer(
        weight,
        case.window,
        case.groups,
        [Comparison(*each) for each in zip(levels, turned, strict=True)],
        scale,
        bias,
        keeps_real=True,
    )
    expected = [packed(each >= per_channel(level)) for each, level in zip(signed, levels, strict=True)]
    with threads(case.threads):
        for real, found in run_all(layer, Bits.pack(spikes), residual):
            assert torch.equal(real, y) and real.is_contiguous(memory_format=torch.channels_last)
            assert len(found) == number and all(map(equal, found, expected))
        layer.keeps_real = False
        for real, found in run_all(layer, Bits.pack(spikes), residual):
            assert real is None and all(map(equal, found, expected))


@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("kind", "total"), [("all 127", 585216), ("all -127", -585216), ("alternating", 0)])
def test_sums_beyond_16_bits_are_exact(kind, total, density):
    """512 channels and 9 taps: 4608 * 127 = 585216."""
    generator = torch.Generator().manual_seed(0)
    weight = weights_of(kind, (70, 512, 3, 3), generator)
    spikes = torch.rand(1, 512, 3, 4, generator=generator) < density
    sums = F.conv2d(spikes.double(), weight.double()).long()
    if density != 0.5:
        assert sums.unique().tolist() == [total * int(density)]
    levels = [sums[0, :, 0, 0].int(), sums[0, :, 0, 0].int() + 1, torch.full((70,), 32767, dtype=torch.int32)]
    window, ones = Window((3, 3)), torch.ones(70)
    layer = EventLayer(weight, window, spikes=[Comparison(level) for level in levels])
    real = EventLayer(weight, window, scale=ones, bias=0 * ones, keeps_real=True)
    for _, found in run_all(layer, Bits.pack(spikes)):
        assert all(map(equal, found, [packed(sums >= per_channel(level)) for level in levels]))
    for y, _ in run_all(real, Bits.pack(spikes)):
        assert torch.equal(y.long(), sums)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("number", [257, 258, 259, 516, 517, 5000])
def test_where_16_bits_end(number, sign):
    """258 * 127 is 32766, and one more than 258 no longer fits; whole inputs, and those without the last one."""
    weight = torch.full((3, number, 1, 1), sign * 127, dtype=torch.int8)
    level = torch.tensor([sign * number * 127, 32766, -32767], dtype=torch.int32)
    layer = EventLayer(weight, Window((1, 1)), spikes=[Comparison(level), Comparison(level + 1)])
    assert layer.safe == min(number, 258)
    spikes = torch.ones(2, number, 1, 1, dtype=torch.bool)
    spikes[1, -1] = False
    sums = (spikes.sum(1) * 127 * sign)[:, None]
    for _, found in run_all(layer, Bits.pack(spikes)):
        assert equal(found[0], packed(sums >= per_channel(level)))
        assert equal(found[1], packed(sums > per_channel(level)))


def test_a_depthwise_filter_beyond_16_bits():
    """17 * 17 * 127 = 36703, where the whole filter lies in the map."""
    weight = torch.full((70, 1, 17, 17), 127, dtype=torch.int8)
    weight[1::2] = -127
    spikes = torch.ones(1, 70, 19, 18, dtype=torch.bool)
    sums = F.conv2d(spikes.double(), weight.double(), padding=8, groups=70).long()
    assert (sums.max(), sums.min()) == (36703, -36703)
    levels = [torch.full((70,), value, dtype=torch.int32) for value in (36703, -36702, 32767, -32768)]
    layer = EventLayer(weight, Window((17, 17), padding=(8, 8)), 70, [Comparison(level) for level in levels])
    for _, found in run_all(layer, Bits.pack(spikes)):
        assert all(map(equal, found, [packed(sums >= per_channel(level)) for level in levels]))


def test_a_layer_is_used_again_for_other_sizes_and_kernels():
    """Its weights stay packed for each of them; larger and smaller maps, and no image at all, follow one another."""
    generator = torch.Generator().manual_seed(0)
    weight = weights_of("random", (130, 33, 3, 3), generator)
    level = torch.randint(-200, 200, (130,), generator=generator, dtype=torch.int32)
    layer = EventLayer(weight, Window((3, 3), padding=(1, 1)), spikes=[Comparison(level)])
    for shape in [(1, 33, 4, 4), (3, 33, 9, 7), (2, 33, 1, 1), (0, 33, 4, 4), (1, 33, 4, 4)]:
        spikes = torch.rand(shape, generator=generator) < 0.2
        expected = packed(F.conv2d(spikes.double(), weight.double(), padding=1) >= per_channel(level))
        for number in (1, 2):
            with threads(number):
                assert all(equal(found[0], expected) for _, found in run_all(layer, Bits.pack(spikes)))


@pytest.mark.parametrize(
    ("channels", "out_channels", "window"),
    [
        (256, 256, Window((3, 3), padding=(1, 1))),
        (67, 192, Window((5, 3), (1, 2), (3, 0), (2, 1))),
        (130, 16, Window((3, 3), padding=(1, 1))),  # four neurons at once
        (700, 70, Window((1, 1))),
    ],
)
def test_an_active_layer_is_computed_as_a_dense_one(channels, out_channels, window):
    generator = torch.Generator().manual_seed(0)
    x, dense = torch.rand(2, channels, 9, 8, generator=generator) < 0.5, []
    for kind in ("all 127", "all -127", "random"):
        weight = weights_of(kind, (out_channels, channels, *window.kernel), generator)
        sums = F.conv2d(x.double(), weight.double(), None, *window[1:]).long()
        level = levels_of(sums, generator, EXTREMES).clamp(LEAST, MOST).int()
        layer = EventLayer(weight, window, spikes=[Comparison(level)])
        for number in (1, 2):
            with threads(number):
                for _, (found,) in run_all(layer, Bits.pack(x)):
                    assert equal(found, packed(sums >= per_channel(level)))
        dense += [key[0] for key in layer._packed if key[-1] == "dense"]
    assert len(dense) >= 3 * (len(KERNELS) > 1)  # by the fastest kernels, at least
    event_driven = EventLayer(weight, window, spikes=[Comparison(level)], may_be_dense=False)
    assert all(equal(found, packed(sums >= per_channel(level))) for _, (found,) in run_all(event_driven, Bits.pack(x)))
    assert "dense" not in {key[-1] for key in event_driven._packed}


def test_what_the_kernels_do_not_take_is_refused():
    weight, level = torch.ones(4, 2, 1, 1, dtype=torch.int8), torch.zeros(4, dtype=torch.int32)
    with pytest.raises(ValueError, match="a weight of -128"):
        EventLayer(torch.full_like(weight, -128), Window((1, 1)))
    with pytest.raises(ValueError, match=r"9 maps of spikes of one layer \(allowed: up to 8\)"):
        EventLayer(weight, Window((1, 1)), spikes=[Comparison(level)] * 9)
    ones = torch.ones(4)
    for options in (
        {"spikes": [Comparison(level[:2])]},
        {"spikes": [Comparison(level.float())]},
        {"spikes": [Comparison(level)], "scale": ones, "bias": ones},  # of sums that are real values then
        {"spikes": [Comparison(level, torch.ones(2, dtype=torch.bool))]},
        {"scale": ones[:2], "bias": ones},
        {"scale": ones, "bias": ones.double()},
    ):
        with pytest.raises(ValueError, match="levels, scale or bias of other numbers than 4 channels have"):
            EventLayer(weight, Window((1, 1)), **options)
    with pytest.raises(ValueError, match="of other numbers than 4 channels have"):
        EventLayer(weight.int(), Window((1, 1)))
    real = EventLayer(weight, Window((1, 1)), scale=ones, bias=ones, keeps_real=True)
    with pytest.raises(ValueError, match=r"a residual of .* for a map of 1x1, torch\.float64 for float32"):
        real(Bits.pack(torch.ones(1, 2, 1, 1)), torch.ones(1, 4, 1, 1).double())
    eight = EventLayer(weight, Window((1, 1)), spikes=[Comparison(level + number) for number in range(8)])
    for _, found in run_all(eight, Bits.pack(torch.ones(1, 2, 1, 1))):  # sums of 2
        assert [each.unpack().mean().item() for each in found] == [1.0] * 3 + [0.0] * 5


def test_a_layer_over_flattened_vectors_leaves_their_padding_out():
    vector = torch.rand(3, 100) < 0.5
    layer = EventLayer(
        torch.ones(4, 100, 1, 1, dtype=torch.int8),
        Window((1, 1)),
        scale=torch.ones(4),
        bias=torch.zeros(4),
        keeps_real=True,
    )
    for real, _ in run_all(layer, Bits.pack(vector).flatten()):
        assert torch.equal(real.flatten(1), vector.sum(1, keepdim=True).expand(3, 4).float())


# --- the stem ---------------------------------------------------------------------------------------------------------


@st.composite
def stems(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], Window, Window | None, bool, int]:
    """Return shapes of input and weights, geometry of convolution and pool, whether that rounds up, and a seed."""
    few = st.integers(1, 4)
    sides, steps = st.sampled_from((1, 3, 4, 7)), st.sampled_from((1, 2, 4))
    kernel, stride = draw(st.tuples(sides, sides)), draw(st.tuples(steps, steps))
    padding = tuple(draw(st.integers(0, side)) for side in kernel)
    size = tuple(draw(st.integers(side, side + 20)) for side in kernel)
    window, pool, channels = Window(kernel, stride, padding), None, draw(few)
    if draw(st.booleans()):
        longest = [min(3, side) for side in window.out_size(size)]
        sides = tuple(draw(st.integers(1, side)) for side in longest)
        pool = Window(sides, draw(st.tuples(few, few)), tuple(draw(st.integers(0, side // 2)) for side in sides))
    shapes = (draw(st.integers(1, 2)), channels, *size), (draw(st.integers(1, 150)), channels, *kernel)
    return *shapes, window, pool, draw(st.booleans()), draw(st.integers(0, 2**31))


@settings(FIXED, max_examples=80)
@given(stems(), st.integers(0, 2), st.booleans(), st.integers(1, 2))
def test_a_stem_is_that_of_integers(case, number, with_more, num_threads):
    shape, weight_shape, window, pool, ceil, seed = case
    generator = torch.Generator().manual_seed(seed)
    most = min(32766, (2**31 - 1) // (32767 * int(np.prod(weight_shape[1:]))))
    kind, step = int(torch.randint(3, (), generator=generator)), np.float32(0.01)
    weight = torch.randint(most if kind == 0 else -most, most + 1, weight_shape, generator=generator)
    x = torch.randn(shape, generator=generator) * (1000.0, 10.0, 1.0)[kind]
    for value in (torch.inf, -torch.inf, 0.005, 0.015, -0.025):  # beyond the range, and between two integers
        x[torch.rand(shape, generator=generator) < 0.02] = value
    normalise = {name: torch.rand(shape[1], generator=generator) + 0.5 for name in ("factor", "mean", "std")}
    for name in ("factor", "mean", "std"):  # some, and in this order
        if torch.rand((), generator=generator) < 0.5:
            del normalise[name]
    seen = x.numpy()
    for name, operation in (("factor", np.multiply), ("mean", np.subtract), ("std", np.divide)):
        seen = operation(seen, normalise[name].numpy()[:, None, None]) if name in normalise else seen
    quantised = np.rint(np.clip(seen / step, np.float32(-32767), np.float32(32767)))
    sums = F.conv2d(torch.from_numpy(quantised).double(), weight.double(), None, window.stride, window.padding).long()
    assert sums.abs().max() < 2**31
    values = [torch.randn(weight_shape[0], generator=generator) * factor for factor in (1e-4, 1.0, 1.0, 1.0)]
    values[0].abs_()  # of what a convolution's weights are rounded to: a step
    scale, bias, more, shift = (value.numpy()[:, None, None] for value in values)
    y = torch.from_numpy(sums.numpy().astype(np.float32) * scale + bias)  # each operation rounded, by numpy
    if pool is not None:
        y = F.max_pool2d(y, *pool[:3], ceil_mode=ceil)
    turned = [turned_of(len(weight), generator) for _ in range(number)]
    signed = [y if turn is None else torch.where(per_channel(turn), -y, y) for turn in turned]
    levels = [levels_of(each, generator, [-torch.inf, torch.inf, 0.0]) for each in signed]
    expected = [packed(each >= per_channel(level)) for each, level in zip(signed, levels, strict=True)]
    stem = EventStem(
        weight.short(),
        window,
        float(step),
        Affine(*values[:2]),
        pool,
        ceil,
        [Comparison(*each) for each in zip(levels, turned, strict=True)],
        Affine(*values[2:]) if with_more else None,
        with_more or not number,
        normalise,
    )
    y = torch.from_numpy(y.numpy() * more + shift) if with_more else y
    for name in KERNELS:
        with using(name), threads(num_threads):
            real, found = stem(x)
        assert torch.equal(real, y) if stem.keeps_real else real is None
        assert len(found) == number and all(map(equal, found, expected))


def test_a_stem_takes_its_own_images_alone():
    one = torch.ones(1)
    stem = EventStem(torch.ones(1, 3, 3, 3, dtype=torch.int16), Window((3, 3)), 0.5, Affine(one, one), keeps_real=True)
    for wrong in (torch.rand(1, 1, 8, 8), torch.rand(1, 4, 8, 8), torch.rand(3, 8, 8), torch.rand(1, 3, 8, 8).double()):
        for name in KERNELS:
            with using(name), pytest.raises(ValueError, match=r"expected float32 \(N, 3, height, width\)"):
                stem(wrong)
    for name in KERNELS:
        with using(name), pytest.raises(ValueError, match="a map of 2x8 is too small for a window of 3x3"):
            stem(torch.rand(1, 3, 2, 8))


def test_a_stem_whose_values_the_kernels_would_not_read_is_refused():
    ones, weight = torch.ones(4), torch.ones(4, 3, 3, 3, dtype=torch.int16)
    fine = {"weight": weight, "window": Window((3, 3)), "step": 0.5, "output": Affine(ones, ones)}
    EventStem(**fine, spikes=[Comparison(ones)], more=Affine(ones, ones), normalise={"std": ones[:3]})
    for channels, wrong in (
        (4, {"weight": weight.int()}),
        (4, {"output": Affine(ones, ones[:2])}),
        (4, {"more": Affine(ones.double(), ones)}),
        (4, {"spikes": [Comparison(ones[:2])]}),
        (4, {"spikes": [Comparison(ones.int())]}),
        (4, {"spikes": [Comparison(ones, torch.ones(2, dtype=torch.bool))]}),
        (3, {"normalise": {"mean": ones}}),
        (3, {"normalise": {"std": ones[:3].double()}}),
    ):
        with pytest.raises(ValueError, match=f"of other numbers than {channels} channels have"):
            EventStem(**fine | wrong)
    with pytest.raises(ValueError, match=r"9 maps of spikes of one layer \(allowed: up to 8\)"):
        EventStem(**fine, spikes=[Comparison(ones)] * 9)


# --- comparisons and pools --------------------------------------------------------------------------------------------


@settings(FIXED, max_examples=60)
@given(st.integers(1, 200), st.integers(1, 12), st.integers(1, 12), st.integers(1, 2), st.integers(0, 2**31))
def test_a_comparison_of_real_values(channels, height, width, number, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, channels, height, width, generator=generator)
    for value in (torch.inf, -torch.inf, torch.nan, 0.0, -0.0):  # a NaN reaches nothing
        x[torch.rand(x.shape, generator=generator) < 0.02] = value
    turned = turned_of(channels, generator)
    signed = x if turned is None else torch.where(per_channel(turned), -x, x)
    level = levels_of(signed, generator, [torch.inf, -torch.inf, 0.0]).nan_to_num(nan=0.3)
    expected, comparison = packed(signed >= per_channel(level)), Comparison(level, turned)
    for name in KERNELS:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            with using(name), threads(number):
                assert equal(threshold(x.contiguous(memory_format=memory_format), comparison), expected)
    with pytest.raises(ValueError, match=r"a map in torch\.float32 for comparisons in torch\.int32: both"):
        threshold(x, Comparison(torch.zeros(channels, dtype=torch.int32)))


@settings(FIXED, max_examples=60)
@given(st.data())
def test_pools_of_bits_are_those_of_torch(data):
    channels, kernel = data.draw(st.integers(1, 150)), data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    stride = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    padding = tuple(data.draw(st.integers(0, side // 2)) for side in kernel)
    size = tuple(data.draw(st.integers(side, side + 8)) for side in kernel)
    ceil, generator = data.draw(st.booleans()), torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    spikes = torch.rand(data.draw(st.integers(1, 3)), channels, *size, generator=generator) < data.draw(DENSITIES)
    turned = turned_of(channels, generator)
    expected = F.max_pool2d(spikes.double(), kernel, stride, padding, ceil_mode=ceil) > 0
    mask = None if turned is None else packed(turned[None, :, None, None]).words.flatten()
    expected = packed(expected if turned is None else expected ^ per_channel(turned))
    x, window = Bits.pack(spikes), Window(kernel, stride, padding)
    for name in KERNELS:
        with using(name):
            assert equal(max_pool(x, window, ceil=ceil, inverted=mask), expected)
            with pytest.raises(ValueError, match=r"words a pixel, of which .* are to be inverted"):
                max_pool(x, window, ceil=ceil, inverted=torch.zeros(99, dtype=torch.int64))


# --- bits -------------------------------------------------------------------------------------------------------------


def test_bits_have_channels_in_order():
    x = torch.zeros(1, 66, 1, 2)
    x[0, 0, 0, 0], x[0, 3, 0, 0], x[0, 63, 0, 0], x[0, 65, 0, 1] = 1.0, -0.5, torch.inf, torch.nan
    found = Bits.pack(x)
    assert found.words.tolist() == [[[[9 - 2**63, 0], [0, 2]]]] and found.channels == 66
    assert found.unpack().mean() == torch.tensor(4 / 132)
    assert found.flatten().words.tolist() == [[[[9 - 2**63, 0, 0, 2]]]] and found.flatten().channels == 256
    assert Bits.pack(torch.tensor([[0.0, 1.0, 1.0]])).words.tolist() == [[[[6]]]]


@settings(FIXED, max_examples=40)
@given(st.integers(1, 200), st.integers(0, 3), st.integers(1, 5), DENSITIES, st.integers(0, 2**31))
def test_bits_are_their_map(channels, number, side, density, seed):
    spikes = torch.rand(number, channels, side, 3, generator=torch.Generator().manual_seed(seed)) < density
    found = Bits.pack(spikes.float())
    assert equal(found, packed(spikes)) and torch.equal(found.unpack(), spikes.float())
    assert found.words.is_contiguous()
    if number:
        assert found.unpack().is_contiguous(memory_format=torch.channels_last)
        assert found.unpack().mean().item() == pytest.approx(spikes.float().mean().item())
    whole = F.pad(spikes.permute(0, 2, 3, 1), (0, bits.words_of(channels) * 64 - channels)).flatten(1)
    assert equal(found.flatten(), packed(whole[..., None, None]))


# --- the choice -------------------------------------------------------------------------------------------------------

CHOICE = """
import runpy, sys
print(runpy.run_path(sys.argv[1])["current"]())
"""


def chosen_with(name: str | None) -> subprocess.CompletedProcess[str]:
    """Return the kernels that a new process takes; of `library` alone, which needs no torch."""
    environment = os.environ | ({} if name is None else {library.VARIABLE: name})
    command = [sys.executable, "-c", CHOICE, library.__file__]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", [None, *KERNELS])
def test_an_environment_variable_chooses(name, monkeypatch):
    monkeypatch.delenv(library.VARIABLE, raising=False)
    assert chosen_with(name).stdout == f"{name or KERNELS[0]}\n"


def test_kernels_that_do_not_run_here_are_named():
    allowed = f"'sse9' do not run here (allowed: {', '.join(KERNELS)})"
    assert f"{library.VARIABLE}: kernels {allowed}" in chosen_with("sse9").stderr
    before = library.current()
    with pytest.raises(ValueError, match="'sse9' do not run here"), using("sse9"):
        pass
    with pytest.raises(KeyError), using("torch"):
        assert library.current() == "torch"
        raise KeyError
    assert library.current() == before
