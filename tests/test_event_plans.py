"""Plans of the event-driven engine: programs as calls over memory that is used again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from backbones import HoyerSpike, fold, to_integers
from backbones.deploy.events import Bits, Engine, Program, available, to_program, using
from backbones.deploy.events import engine as engine_module
from backbones.deploy.events.plan import _Calls, _Memory

KERNELS = available()[:-1]
CONV = {"stride": 1, "padding": 1, "dilation": 1, "groups": 1}
needs_kernels = pytest.mark.skipif(not KERNELS, reason="built without kernels")


class Writer:
    """A program, operation by operation, with random tensors."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.operations: list[dict[str, Any]] = []
        self.tensors: dict[str, Tensor] = {}

    def emit(self, op: str, inputs: str, outputs: str, tensors: dict[str, Tensor] | None = None, **keys: Any) -> None:
        named = {key: f"{outputs.split()[0]}.{key}" for key in tensors or {}}
        self.tensors |= {named[key]: value for key, value in (tensors or {}).items()}
        entering, leaving = inputs.split(), outputs.split()
        self.operations.append({"op": op, "inputs": entering, "outputs": leaving, "attributes": keys, "tensors": named})

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def layer(self, inputs: str, outputs: str, channels: tuple[int, int], *, real: bool, conv: Any = CONV) -> None:
        weight = (40 * self.draw(channels[1], channels[0], *((3, 3) if conv else ()))).clamp(-127, 127).to(torch.int8)
        levels = {f"level_{i}": self.draw(channels[1]) for i in range(len(outputs.split()) - real)}
        scale = {"scale": self.draw(channels[1]) / 300, "bias": self.draw(channels[1])}
        self.emit("layer", inputs, outputs, {"weight": weight} | scale | levels, conv=conv, keeps_real=real)


def everything(seed: int, width: int) -> Program:
    """Streams that end in a sum and that live on, views, operations of torch, and each kind of output."""
    w = Writer(seed)
    w.emit("threshold", "images", "bits", {"level_0": w.draw(5)})
    w.layer("bits", "a a_bits", (5, width), real=True)
    w.layer("a_bits a", "b b_bits b_other", (width, width), real=True)  # a is needed below
    w.layer("b_bits b", "c c_bits", (width, width), real=True)  # b ends here
    w.emit("threshold", "c", "c_chosen", {"level_0": w.draw(width), "turned_0": w.draw(width) > 0})  # with c's layer
    w.emit("add", "a c", "sum")
    w.emit("relu", "sum", "positive")
    w.emit("threshold", "positive", "again", {"level_0": w.draw(width).abs()})
    w.layer("again positive", "d d_bits", (width, width), real=True)
    pool = {"kernel_size": [2, 2], "stride": [2, 2], "padding": [0, 0], "dilation": [1, 1], "ceil_mode": True}
    w.emit("pool_bits", "d_bits", "pooled", **pool)
    w.layer("pooled", "e_bits", (width, 2 * width), real=False)
    w.layer("pooled", "small", (width, width), real=True)
    w.emit("resize_as", "small c", "larger")
    w.emit("add", "sum larger", "top")
    w.emit("threshold", "top", "top_bits", {"level_0": w.draw(width)})
    w.emit("resize_as", "small images", "shown")  # which more than a sum sees
    w.emit("flatten_bits", "pooled", "flat")
    words = -(-width // 64) * 64
    w.layer("flat", "logits f_bits", (4 * 5 * words, 7), real=True, conv=None)
    w.emit("threshold", "logits", "chosen", {"level_0": w.draw(7)})
    w.emit("permute", "c", "rows", arguments=[0, 2, 3, 1])
    w.emit("flatten", "rows", "row", start_dim=1)  # a view
    w.emit("flatten", "a", "copied", start_dim=1)  # a copy
    w.emit("cat", "copied row", "both", dim=1)
    outputs = ["both", "row", "logits", "d", "e_bits", "b_other", "chosen", "f_bits", "images"]
    outputs += ["c_chosen", "top", "top_bits", "shown"]
    return Program(w.operations, outputs, w.tensors)


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(map(torch.equal, found, expected))


@needs_kernels
@settings(derandomize=True, deadline=None, database=None, max_examples=12)
@given(st.integers(0, 2**31), st.sampled_from([3, 40, 64, 130]), st.integers(1, 2), st.sampled_from(KERNELS))
def test_a_plan_gives_what_one_operation_after_the_other_gives(seed, width, number, name):
    program = everything(seed, width)
    batches = torch.randn(4, number, 5, 7, 9, generator=torch.Generator().manual_seed(seed))
    with using("torch"):
        expected = [Engine(program)(images) for images in batches]
    with using(name):
        ours = Engine(program)
        singly = [ours(images, observe=lambda operation, entering: None) for images in batches]
        assert not ours.plans
        found = [ours(images) for images in batches]  # those before stay as they are
    (plan,) = next(iter(ours.plans.values()))
    assert all(map(same, singly, expected)) and all(map(same, found, expected))
    parts = [len(each.calls) if isinstance(each, _Calls) else each.outputs[0] for each in plan.parts]
    # Views, as "rows" and "row" are, take no time; spikes of "c", "top" and "logits" come with these.
    assert parts == [5, "positive", 6, "shown", 1, "copied", "both"]


@needs_kernels
def test_memory_is_used_again():
    memory = _Memory()
    first, second = (memory.take((1, 4, 4, 64), torch.float32) for _ in range(2))
    memory.keep(first, 3)
    memory.keep(second, 5)
    memory.keep(Bits(first, 64), 4)  # another name of it, for longer
    memory.give_back(3)
    third = memory.take((1, 4, 4, 64), torch.float32)
    memory.give_back(4)
    fourth = memory.take((1, 4, 4, 32), torch.int64)  # as many bytes
    small = memory.take((1, 1, 1, 1), torch.int64)
    places = [each.data_ptr() for each in (first, second, third, fourth, small)]
    assert places[3] == places[0] and len(set(places)) == 4


@needs_kernels
def test_a_stream_is_added_to_in_place_where_it_ends():
    ours, images = Engine(everything(1, 64)), torch.rand(1, 5, 7, 9)
    ours(images)
    (plan,) = next(iter(ours.plans.values()))
    calls = [call for part in plan.parts if isinstance(part, _Calls) for *_, call, _ in part.layers]
    in_place = [call.residual == call.real for call in calls if call.residual]
    assert in_place == [False, True, False]  # b and c; d's residual is torch's and lies elsewhere each time


@needs_kernels
def test_plans_are_few_and_each_has_its_shape(monkeypatch):
    monkeypatch.setattr(engine_module, "MOST_PLANS", 2)
    ours = Engine(everything(0, 8))
    for number in (1, 2, 3, 1):
        images = torch.rand(number, 5, 7, 9)
        assert same(ours(images), ours(images, observe=lambda operation, entering: None))
        assert number in {key[2][0] for key in ours.plans} and len(ours.plans) <= 2
    assert ours(torch.rand(0, 5, 7, 9))[2].shape == (0, 7)
    monkeypatch.setattr(engine_module.library.LIBRARY, "events_run", lambda *arguments: 1)
    with pytest.raises(MemoryError, match="not enough memory for these images"):
        ours(images)


@pytest.mark.parametrize("name", available())
def test_images_that_a_program_does_not_take_are_refused_before_a_kernel_sees_them(name):
    """Else they would read beside the memory; each kind by a plan and by one operation after the other."""
    ours, at_once = Engine(everything(0, 8)), {"observe": lambda operation, entering: None}
    small = Writer(0)
    small.emit("threshold", "images", "bits", {"level_0": small.draw(5)})
    small.layer("bits", "a a_bits", (5, 8), real=True, conv=CONV | {"padding": 0})
    pool = {"kernel_size": [2, 2], "stride": [2, 2], "padding": [0, 0], "dilation": [1, 1], "ceil_mode": False}
    small.emit("pool_bits", "a_bits", "pooled", **pool)
    small.layer("pooled a", "b", (8, 8), real=True)
    tight = Engine(Program(small.operations, ["b"], small.tensors))
    cases = [
        (ours, (1, 5, 14, 18), "spikes of .* channels for a layer of 1280: images of another size"),
        (ours, (1, 4, 7, 9), "a map of 4 channels for comparisons of 5"),
        (tight, (1, 5, 2, 9), "a map of 2x9 is too small for a window of 3x3"),
        (tight, (1, 5, 3, 3), "a map of 1x1 is too small for a window of 2x2"),
        (tight, (1, 5, 6, 6), r"a residual of shape \(1, 8, 4, 4\) for a map of 2x2"),
    ]
    with using(name):
        for engine, shape, message in cases:
            for options in ({}, at_once):
                with pytest.raises(ValueError, match=message):
                    engine(torch.rand(shape), **options)
        for options in ({}, at_once):
            with pytest.raises(ValueError, match=r"a map in torch\.float64 for comparisons in torch\.float32"):
                ours(torch.rand((1, 5, 7, 9), dtype=torch.float64), **options)
        with pytest.raises(ValueError, match="images on meta: the event-driven engine computes on the CPU"):
            ours(torch.rand(1, 5, 7, 9, device="meta"))


def test_a_map_that_is_enlarged_added_and_returned():
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.spike, self.fine, self.coarse = HoyerSpike(8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1, stride=2)
            self.stem = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x):
            spikes = self.spike(self.stem(x))
            fine = self.fine(spikes)
            up = F.interpolate(self.coarse(spikes), size=fine.shape[-2:], mode="nearest")
            return fine + up, up

    torch.manual_seed(0)
    images = torch.rand(2, 3, 8, 8)
    network = to_integers(fold(Pyramid().eval()), images, exact=True)
    for ours, theirs in zip(Engine(to_program(network))(images), network(images), strict=True):
        assert torch.equal(ours, theirs)
