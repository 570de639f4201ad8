"""The event-driven engine: runs a `Program`, layers over spikes by events and everything else by torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...weights import checksum
from . import library
from .bits import Bits, Comparison, EventLayer, Window, highest, mask_of, max_pool, threshold
from .plan import FOREVER, Maker, Plan, Run, Step
from .program import Operation, Program
from .stem import Affine, EventStem

FORMAT = "hoyer-det events"
VERSION = 1
MOST_PLANS = 8  # for images of other shapes and numbers of threads
Value = Tensor | Bits
ByKernels = tuple[Run, Callable[..., Sequence[Value] | None]]  # what runs an operation, and what plans it


class Engine:
    """A `Program` ready to run: images in, the network's outputs out.

    Layers over spikes add up the weights of the inputs that fired; what sees real values is computed by torch, in
    float32 and in the order N, H, W, C. Results are bit for bit those of the network of integers in that order.

    Args:
        program: of `to_program`, or `from_bytes`.

    Raises:
        ValueError: the program has an operation that this version does not know.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        unknown = sorted({each["op"] for each in program.operations} - set(PREPARE))
        if unknown:
            raise ValueError(f"unknown operation {unknown[0]!r}: written by a later version")
        self.steps = [self._prepare(each) for each in program.operations]
        self.last_use: dict[str, int] = {}
        for index, each in enumerate(program.operations):
            self.last_use |= {name: index for name in each["inputs"] if isinstance(name, str)}
        self.last_use |= dict.fromkeys(program.outputs, FOREVER)
        self.plans: dict[Any, list[Plan]] = {}  # those that nobody runs

    def _prepare(self, operation: Operation) -> Step:
        tensors = {key: self.program.tensors[name] for key, name in operation["tensors"].items()}
        made = PREPARE[operation["op"]](operation["attributes"], tensors)
        run, plan = made if isinstance(made, tuple) else (made, None)
        return Step(operation["inputs"], operation["outputs"], run, plan)

    @torch.no_grad()
    def __call__(
        self, images: Tensor, *, observe: Callable[[Operation, list[Value]], None] | None = None
    ) -> list[Tensor]:
        """Return the outputs for images, float32 (N, C, H, W).

        Args:
            images: on the CPU.
            observe: called with each operation and what enters it.

        Raises:
            MemoryError: there is not enough memory.
            ValueError: images on another device, or that the network does not take.
        """
        if images.device.type != "cpu":
            raise ValueError(f"images on {images.device}: the event-driven engine computes on the CPU")
        if observe is None and library.current() != "torch" and images.numel():
            return self._planned(images)
        values: dict[str, Value] = {"images": images.contiguous()}
        for index, (inputs, outputs, run, _) in enumerate(self.steps):
            entering = [values[name] if isinstance(name, str) else name for name in inputs]
            if observe is not None:
                observe(self.program.operations[index], entering)
            values.update(zip(outputs, run(*entering), strict=True))
            for name in [name for name in inputs if isinstance(name, str) and self.last_use[name] == index]:
                values.pop(name, None)
        return [_real(values[name]) for name in self.program.outputs]

    def _planned(self, images: Tensor) -> list[Tensor]:
        """Return the outputs by a plan that no other thread runs."""
        key = (library.current(), torch.get_num_threads(), images.shape, images.dtype)
        if key not in self.plans and len(self.plans) >= MOST_PLANS:
            self.plans.clear()
        idle = self.plans.setdefault(key, [])
        try:
            plan = idle.pop()
        except IndexError:
            plan = Plan(self.steps, self.last_use, self.program.outputs, images)
        found = plan.run(images)
        idle.append(plan)
        return [_real(each) for each in found]


def _real(value: Value) -> Tensor:
    return value.unpack() if isinstance(value, Bits) else value


def _analogue(compute: Callable[..., Tensor]) -> Callable[..., list[Value]]:
    """Return what runs an operation over real values: spikes become 0 and 1."""
    return lambda *inputs: [compute(*(_real(each) if isinstance(each, Bits) else each for each in inputs))]


def _comparisons(tensors: Mapping[str, Tensor], name: str) -> list[Comparison]:
    number = sum(key.startswith(f"{name}_") for key in tensors)
    return [Comparison(tensors[f"{name}_{index}"], tensors.get(f"turned_{index}")) for index in range(number)]


def _layer_options(weight: Tensor, conv: dict[str, Any] | None) -> dict[str, Any]:
    """Return `weight`, `window` and `groups` of an `EventLayer` for a layer of torch.

    Args:
        weight: int8 (C', C / groups, kh, kw) or (C', C).
        conv: stride, padding, dilation and groups; None: a linear layer.
    """
    if conv is None:
        return {"weight": weight[..., None, None], "window": Window((1, 1))}
    pairs = [(value, value) if isinstance(value, int) else tuple(value) for value in map(conv.get, Window._fields[1:])]
    return {"weight": weight, "window": Window(tuple(weight.shape[2:]), *pairs), "groups": conv["groups"]}


def _layer(attributes: dict[str, Any], tensors: dict[str, Tensor]) -> ByKernels:
    real = "scale" in tensors
    layer = EventLayer(
        **_layer_options(tensors["weight"], attributes["conv"]),
        spikes=_comparisons(tensors, "level" if real else "threshold"),
        scale=tensors.get("scale"),
        bias=tensors.get("bias"),
        keeps_real=attributes["keeps_real"],
    )
    flat = attributes["conv"] is None

    def run(x: Bits, residual: Tensor | None = None) -> list[Value]:
        y, spikes = layer(x, residual)
        if y is None:
            return list(spikes)
        return [y.flatten(1) if flat else y, *spikes]

    return run, lambda maker, *inputs: maker.layer(layer, flat, *inputs)


def _stem(attributes: dict[str, Any], tensors: dict[str, Tensor]) -> ByKernels:
    pool, more = attributes["pool"], tensors.get("more_scale")
    stem = EventStem(
        tensors["weight"],
        Window(tuple(tensors["weight"].shape[2:]), tuple(attributes["stride"]), tuple(attributes["padding"])),
        tensors["step"].item(),
        Affine(tensors["scale"], tensors["bias"]),
        pool=None if pool is None else _window(pool),
        ceil=pool is not None and pool["ceil_mode"],
        spikes=_comparisons(tensors, "level"),
        more=None if more is None else Affine(more, tensors["more_bias"]),
        keeps_real=attributes["keeps_real"],
        normalise={name: tensors[name] for name in ("factor", "mean", "std") if name in tensors},
    )

    def run(x: Tensor) -> list[Value]:
        y, spikes = stem(x)
        return [*spikes] if y is None else [y, *spikes]

    return run, lambda maker, x: maker.stem(stem, x)


def _threshold(attributes: dict[str, Any], tensors: dict[str, Tensor]) -> ByKernels:
    (comparison,) = _comparisons(tensors, "level")
    return (
        lambda x: [threshold(x[..., None, None] if x.dim() == 2 else x, comparison)],
        lambda maker, x: maker.threshold(comparison, x),
    )


def _window(attributes: Mapping[str, Any]) -> Window:
    keys = ("kernel_size", "stride", "padding", "dilation")
    return Window(*(tuple(attributes[key]) for key in keys))


def _pool_bits(attributes: dict[str, Any], tensors: dict[str, Tensor]) -> ByKernels:
    window, ceil, turned = _window(attributes), attributes["ceil_mode"], tensors.get("inverted")
    mask = None if turned is None else mask_of(turned)
    return (
        lambda x: [max_pool(x, window, ceil=ceil, inverted=mask)],
        lambda maker, x: maker.pool(window, ceil, mask, x),
    )


def _with_weights(
    compute: Callable[..., Tensor], *keys: str
) -> Callable[[dict[str, Any], dict[str, Tensor]], Callable[..., Sequence[Value]]]:
    """Return the maker of an operation of torch whose arguments are `keys` of its tensors, then its attributes."""

    def prepare(attributes: dict[str, Any], tensors: dict[str, Tensor]) -> Callable[..., Sequence[Value]]:
        weights = [tensors.get(key) for key in keys]
        weights = [
            w.contiguous(memory_format=torch.channels_last) if w is not None and w.dim() == 4 else w for w in weights
        ]
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in attributes.items()}
        return _analogue(lambda *inputs: compute(*inputs, *weights, **options))

    return prepare


PREPARE: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], Run | ByKernels]] = {
    "layer": _layer,
    "stem": _stem,
    "affine": _with_weights(lambda x, a, b: x * a.view(-1, 1, 1) + b.view(-1, 1, 1), "scale", "shift"),
    "threshold": _threshold,
    "pool_bits": _pool_bits,
    "highest": lambda attributes, tensors: (lambda *spikes: [highest(*spikes)], Maker.highest),
    "flatten_bits": lambda attributes, tensors: lambda x: [x.flatten()],  # a view, which is planned as one
    "constant": lambda attributes, tensors: lambda: [tensors["value"]],
    "add": lambda attributes, tensors: (_analogue(torch.add), Maker.sum),
    "sub": _with_weights(torch.sub),
    "mul": _with_weights(lambda a, b: a * b),
    "div": _with_weights(torch.true_divide),
    "relu": _with_weights(torch.relu),
    "cat": _with_weights(lambda *parts, dim: torch.cat(parts, dim)),
    "resize_as": lambda attributes, tensors: (_analogue(lambda x, y: F.interpolate(x, y.shape[-2:])), Maker.enlarge),
    "conv2d": _with_weights(F.conv2d, "weight", "bias"),
    "linear": _with_weights(F.linear, "weight", "bias"),
    "batch_norm": _with_weights(F.batch_norm, "running_mean", "running_var", "weight", "bias"),
    "group_norm": _with_weights(
        lambda x, weight, bias, num_groups, eps: F.group_norm(x, num_groups, weight, bias, eps), "weight", "bias"
    ),
    "max_pool2d": _with_weights(F.max_pool2d),
    "avg_pool2d": _with_weights(F.avg_pool2d),
    "adaptive_avg_pool2d": _with_weights(F.adaptive_avg_pool2d),
    "flatten": _with_weights(torch.flatten),
    "permute": _with_weights(lambda x, arguments: x.permute(*arguments)),
    "unflatten": _with_weights(lambda x, arguments: x.unflatten(*arguments)),
}


def to_bytes(program: Program, description: Mapping[str, Any]) -> bytes:
    """Return the content of a file: safetensors, whose metadata have the graph, a description and their checksum."""
    from safetensors.torch import save

    graph = json.dumps({"operations": program.operations, "outputs": program.outputs})
    tensors = {name: value.contiguous().clone() for name, value in program.tensors.items()}
    text = json.dumps(dict(description))
    metadata = {"format": FORMAT, "version": str(VERSION), "graph": graph, "description": text}
    return save(tensors, metadata | {"sha256": checksum(tensors, f"{graph}\0{text}")})


def from_bytes(content: bytes, source: str) -> tuple[Program, dict[str, Any]]:
    """Return the program and the description in the content of a file.

    Args:
        content: by `to_bytes`.
        source: its name, for messages.

    Raises:
        ValueError: damaged, none of this project, or of another version.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
        tensors = load(content)
    except (SafetensorError, ValueError, AttributeError, KeyError, RecursionError) as error:
        raise ValueError(f"{source}: damaged, or no file of the event-driven engine ({error})") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{source}: no file of the event-driven engine (export --format events writes one)")
    if metadata.get("version") != str(VERSION):
        raise ValueError(
            f"{source}: version {metadata.get('version')} of the format (this package reads version {VERSION}); "
            "export the run again"
        )
    graph, text = metadata.get("graph", ""), metadata.get("description", "")
    if metadata.get("sha256") != checksum(tensors, f"{graph}\0{text}"):
        raise ValueError(f"{source}: damaged, its checksum is not that of its content")
    parts = json.loads(graph)
    return Program(parts["operations"], parts["outputs"], tensors), json.loads(text)
