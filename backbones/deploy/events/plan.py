"""A program's calls for images of one shape, with all memory that they need: what the engine repeats image by image.

Maps between layers lie in memory that is used again as soon as nobody needs them, so that they stay in the caches, and
calls of the kernels that follow each other are made as one.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import bits, library
from .bits import Bits, Comparison, EventLayer, Window, words_of
from .stem import EventStem

Value = Tensor | Bits
Run = Callable[..., Sequence[Value]]
FOREVER = 1 << 60


class _Enlarged(NamedTuple):
    """A map that is to be added to a larger one, each of whose pixels takes the nearest of it."""

    small: Tensor


class Step(NamedTuple):
    """An operation of a program.

    Attributes:
        inputs: names of values, and numbers.
        outputs: names.
        run: from inputs to outputs.
        plan: from a `Maker` and the inputs to the outputs, or None where torch computes them; None: it always does.
    """

    inputs: list[Any]
    outputs: list[str]
    run: Run
    plan: Callable[..., Sequence[Value] | None] | None


class _Patch(NamedTuple):
    """A value that lies elsewhere every time, and the field of a call that is to point to it."""

    call: ctypes.Structure
    field: str
    name: str
    arrange: Callable[[Tensor], Tensor]


class _Calls:
    """Calls of the kernels that follow each other."""

    def __init__(self) -> None:
        self.calls: list[ctypes.Structure] = []
        self.patches: list[_Patch] = []
        self.layers: list[tuple[EventLayer, library.EventConv, library.EventConv, int]] = []
        self.wanting = ctypes.c_int64()

    def finish(self) -> None:
        steps = [library.EventStep(library.KINDS.index(type(each)), ctypes.addressof(each)) for each in self.calls]
        self.steps = (library.EventStep * len(steps))(*steps)

    def run(self, values: Mapping[str, Value]) -> None:
        held = []  # until the calls have been made
        for call, field, name, arrange in self.patches:
            held.append(arrange(values[name]))
            setattr(call, field, held[-1].data_ptr())
        if library.LIBRARY.events_run(self.steps, len(self.steps), self.wanting):
            raise MemoryError("not enough memory for these images")
        if self.wanting.value:
            for layer, template, call, beside in self.layers:
                if call.wants_dense and not call.dense and layer.may_be_dense:
                    template.dense = call.dense = layer.pack_dense(template, beside)


class _Memory:
    """Blocks for the values of a plan."""

    def __init__(self) -> None:
        self.blocks: dict[int, Tensor] = {}
        self.free: list[Tensor] = []
        self.last: dict[int, int] = {}  # of blocks in use: the step after which nobody needs them

    def take(self, shape: Sequence[int], dtype: torch.dtype, *, new: bool = False) -> Tensor:
        """Return memory for a map: the block given back last that is large enough, or a new one."""
        size = max(math.prod(shape), 1) * dtype.itemsize
        fitting = [each for each in self.free if not new and size <= len(each) <= 2 * size + 4096]
        block = fitting[-1] if fitting else torch.empty(-(-size // 64) * 64, dtype=torch.uint8)
        self.free = [each for each in self.free if each is not block]
        self.blocks[block.data_ptr()] = block
        return block.view(dtype)[: math.prod(shape)].view(*shape)

    def owns(self, value: Any) -> bool:
        return _address(value) in self.blocks

    def keep(self, value: Value, until: int) -> None:
        """Keep what a value lies in until after a step."""
        address = _address(value)
        self.last[address] = max(self.last.get(address, until), until)

    def give_back(self, index: int) -> None:
        """Take back what nobody needs after this step."""
        for address in [each for each, last in self.last.items() if last <= index]:
            del self.last[address]
            self.free.append(self.blocks[address])


def _address(value: Any) -> int:
    tensor = value.words if isinstance(value, Bits) else value.small if isinstance(value, _Enlarged) else value
    return tensor.untyped_storage().data_ptr() if isinstance(tensor, Tensor) else 0


class Maker:
    """The making of a plan: operations call its methods for those of the kernels."""

    def __init__(self, steps: Sequence[Step], last_use: Mapping[str, int], images: Tensor) -> None:
        self.memory = _Memory()
        self.values: dict[str, Value] = {"images": images}
        self.parts: list[_Calls | Step] = []
        self.pending = _Calls()
        self.fixed: dict[str, Value] = {}
        self.kept: list[Tensor] = []  # to which calls point
        self.sources: dict[int, tuple[Any, int, tuple[int, ...]]] = {}  # of real maps: call, neurons beside, shape
        self.steps, self.last_use = steps, last_use
        for self.index, step in enumerate(steps):
            self.names = step.inputs
            entering = [self.values[each] if isinstance(each, str) else each for each in step.inputs]
            planned = None if step.plan is None else step.plan(self, *entering)
            found = step.run(*entering) if planned is None else planned
            named = dict(zip(step.outputs, found, strict=True))
            ours = {name: value for name, value in named.items() if self.memory.owns(value)}
            if planned is None and len(ours) < len(named):  # else views of what is known, the same ones every time
                self._end_calls()
                self.parts.append(step)
            else:
                self.fixed |= ours
            for name, value in ours.items():
                self.memory.keep(value, last_use.get(name, self.index))
            self.values |= named
            self.memory.give_back(self.index)
        self._end_calls()

    def _end_calls(self) -> None:
        if self.pending.calls:
            self.pending.finish()
            self.parts.append(self.pending)
            self.pending = _Calls()

    def _enters(
        self, call: ctypes.Structure, field: str, place: int, value: Tensor, arrange: Callable[..., Tensor]
    ) -> None:
        """Point to a value as a kernel takes it: now, if it stays where it is, else each time anew."""
        arranged = arrange(value)
        if self.memory.owns(value) and arranged.data_ptr() == value.data_ptr():
            setattr(call, field, arranged.data_ptr())
            return
        if self.memory.owns(value):
            self._end_calls()  # the value is to be there when it is arranged
        self.pending.patches.append(_Patch(call, field, self.names[place], arrange))

    def layer(self, layer: EventLayer, flat: bool, x: Bits, residual: Tensor | None = None) -> list[Value]:
        """Return the outputs of a layer over spikes, in place of its residual where that ends here."""
        layer.check(x, residual)
        template, shape, size, beside = layer.call_for(x)
        spikes = [self.memory.take(shape, torch.int64) for _ in layer.spikes]
        real = None
        if layer.keeps_real:
            ends = residual is not None and self.memory.last.get(_address(residual)) == self.index
            in_place = ends and _rows(residual).shape == size and _rows(residual).is_contiguous()
            real = _rows(residual) if in_place else self.memory.take(size, torch.float32)
        call = bits.bind(template, x, None, real, spikes)
        if residual is not None:
            self._enters(call, "residual", 1, residual, _arranged)
        self.pending.calls.append(call)
        self.pending.layers.append((layer, template, call, beside))
        found: list[Value] = [Bits(words, size[3]) for words in spikes]
        if real is None:
            return found
        self.sources[real.data_ptr()] = call, beside, size
        return [real.view(size[0], -1) if flat else real.permute(0, 3, 1, 2), *found]

    def stem(self, layer: EventStem, x: Tensor) -> list[Value]:
        """Return the outputs of a stem."""
        layer.check(x)
        call, shape, size = layer.call_for(x.shape)
        spikes = [self.memory.take(shape, torch.int64) for _ in layer.spikes]
        real = self.memory.take(size, torch.float32) if layer.keeps_real else None
        bits.bind_outputs(call, real, spikes)
        self._enters(call, "input", 0, x, Tensor.contiguous)
        self.pending.calls.append(call)
        found: list[Value] = [Bits(words, size[3]) for words in spikes]
        if real is None:
            return found
        if layer.more is None:
            self.sources[real.data_ptr()] = call, 1, size
        return [real.permute(0, 3, 1, 2), *found]

    def threshold(self, comparison: Comparison, x: Tensor) -> list[Value]:
        """Return the spikes of real values, (N, C, H, W) or (N, C), by the call that makes these, if there is one."""
        rows = _arranged(x)
        comparison.check(rows.shape[3], rows.dtype)
        shape = (*rows.shape[:3], words_of(rows.shape[3]))
        source, beside, size = self.sources.get(rows.data_ptr(), (None, 1, ()))
        if source is not None and size == tuple(rows.shape) and source.num_spikes < library.MAX_OUTPUTS:
            words = self.memory.take(shape, torch.int64, new=True)  # which nobody else has until now
            for name, value in (("level", comparison.padded), ("sign", comparison.sign)):
                if value is not None:
                    self.kept.append(value if beside == 1 else value[: size[3]].repeat(beside))
                    getattr(source, name)[source.num_spikes] = self.kept[-1].data_ptr()
            source.spikes[source.num_spikes] = words.data_ptr()
            source.num_spikes += 1
            return [Bits(words, size[3])]
        words = self.memory.take(shape, torch.int64)
        call = library.EventThreshold(None, math.prod(shape[:3]), rows.shape[3], comparison.padded.data_ptr())
        call.sign = None if comparison.sign is None else comparison.sign.data_ptr()
        call.spikes, call.threads = words.data_ptr(), torch.get_num_threads()
        self._enters(call, "x", 0, x, _arranged)
        self.pending.calls.append(call)
        return [Bits(words, rows.shape[3])]

    def enlarge(self, x: Value, like: Value) -> Sequence[Any] | None:
        """Return a map that is to have the size of another one, if a sum alone sees it; None: torch enlarges it."""
        (name,) = self.steps[self.index].outputs
        users = [step for step in self.steps if name in step.inputs]
        alone = len(users) == 1 and users[0].plan is Maker.sum and self.last_use[name] != FOREVER
        if not alone or not self._is_ours(x) or not isinstance(like, Tensor):
            return None
        others = [self.values.get(each) for each in users[0].inputs if each != name]
        fits = [self._is_ours(each) and each.shape == (*x.shape[:2], *like.shape[2:]) for each in others]
        return [_Enlarged(x)] if fits == [True] else None

    def sum(self, a: Any, b: Any) -> Sequence[Value] | None:
        """Return the sum of two maps, in place of the larger one where that ends here; None: torch adds them."""
        large, small = (b, a.small) if isinstance(a, _Enlarged) else (a, b.small if isinstance(b, _Enlarged) else b)
        enlarged = isinstance(a, _Enlarged) or isinstance(b, _Enlarged)
        if not enlarged and not (self._is_ours(a) and self._is_ours(b) and a.shape == b.shape):
            return None
        rows, other = _rows(large), _rows(small)
        ends = self.memory.last.get(_address(large)) == self.index
        out = rows if ends else self.memory.take(rows.shape, torch.float32)
        call = library.EventSum(*rows.shape, *other.shape[1:3], torch.get_num_threads())
        call.input, call.other, call.sum = rows.data_ptr(), other.data_ptr(), out.data_ptr()
        self.sources[out.data_ptr()] = call, 1, tuple(rows.shape)
        self.pending.calls.append(call)
        return [out.permute(0, 3, 1, 2)]

    def _is_ours(self, value: Any) -> bool:
        """Return whether a value is a real map (N, C, H, W) in the memory of the plan, in the order N, H, W, C."""
        real = isinstance(value, Tensor) and value.dim() == 4 and value.dtype == torch.float32
        return real and self.memory.owns(value) and _rows(value).is_contiguous()

    def pool(self, window: Window, ceil: bool, inverted: Tensor | None, x: Bits) -> list[Value]:
        """Return a max-pool of spikes."""
        shape, geometry = bits.pool_call(x, window, ceil, inverted)
        words = self.memory.take(shape, torch.int64)
        self.pending.calls.append(library.EventPool(x.words.data_ptr(), *geometry, words.data_ptr()))
        return [Bits(words, x.channels)]

    def highest(self, *spikes: Bits) -> list[Value]:
        """Return the spikes of the last map that fires."""
        if len(spikes) > library.MAX_OUTPUTS or len({each.words.shape for each in spikes}) > 1:
            raise ValueError(f"{len(spikes)} maps of a potential (allowed: up to {library.MAX_OUTPUTS}, of one size)")
        number, height, width, words = spikes[0].words.shape
        out = self.memory.take((number, height, width, len(spikes) * words), torch.int64)
        call = library.EventHighest(number * height * width, words, len(spikes), out=out.data_ptr())
        for index, each in enumerate(spikes):
            call.spikes[index] = each.words.data_ptr()
        self.pending.calls.append(call)
        return [Bits(out, out.shape[3] * 64)]


def _rows(x: Tensor) -> Tensor:
    """Return a map (N, C, H, W), or (N, C), in the order N, H, W, C."""
    return (x[..., None, None] if x.dim() == 2 else x).permute(0, 2, 3, 1)


def _arranged(x: Tensor) -> Tensor:
    return _rows(x).contiguous()


class Plan:
    """Calls and other steps of a program for images of one shape, run by one caller at a time.

    Args:
        steps: of the program.
        last_use: of each value by name, the last step that needs it; FOREVER: it is returned.
        outputs: names of what is returned.
        images: float32 (N, C, H, W).
    """

    def __init__(
        self, steps: Sequence[Step], last_use: Mapping[str, int], outputs: Sequence[str], images: Tensor
    ) -> None:
        made = Maker(steps, last_use, images)
        self.parts, self.fixed, self.outputs, self.kept = made.parts, made.fixed, outputs, made.kept

    def run(self, images: Tensor) -> list[Value]:
        """Return the outputs for images of this plan's shape."""
        values: dict[str, Value] = {**self.fixed, "images": images}
        for part in self.parts:
            if isinstance(part, _Calls):
                part.run(values)
            else:
                entering = [values[each] if isinstance(each, str) else each for each in part.inputs]
                values.update(zip(part.outputs, part.run(*entering), strict=True))
        return [_own(values[name]) if name in self.fixed else values[name] for name in self.outputs]


def _own(value: Value) -> Value:
    return Bits(value.words.clone(), value.channels) if isinstance(value, Bits) else value.clone()
