"""Show the layers, parameters and operations of a network: of a recipe before it is trained, or of a run.

The network is built with new weights and sees one image of noise, of the largest size that the recipe lets it see in
evaluation; no data are needed. So that no layer is silent, the potentials of spike layers are noise, too. MACs are in
the usual convention, padding included.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detection.cli.common import check_run, parse_recipe, recipe_parser, show_table
from detection.text import plural

if TYPE_CHECKING:
    from torch import nn

    from backbones import Measurement, SpikeLayer
    from detection.tasks.base import Task

NUM_CLASSES = 10  # where neither recipe nor command line says


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Print the summary of a command line's recipe or run."""
    parser = recipe_parser(__doc__, prog, "RECIPE_OR_RUN")
    parser.add_argument("--classes", type=int, metavar="N", help="number of classes (default: those that it names)")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    source = parser.parse_known_args(arguments)[0].config or ""
    if source.startswith("zoo:") or (source and Path(source).is_dir()):  # no recipe, but a run
        arguments[arguments.index(source)] = str(check_run(source) / "config.yaml")
    config, options = parse_recipe(parser, arguments)
    if options.classes is not None and options.classes < 1:
        raise ValueError(f"--classes {options.classes}: at least one class is needed")

    from detection.tasks import task_of

    task = with_classes(task_of(config), options.classes)
    task.check_names(options.config)
    model, measured, shapes = measure(task)
    backbone = config.model.backbone
    title = f"{source}: {backbone.name} x{backbone.width:g}, activation {backbone.activation}"
    title += f", arithmetic {backbone.arithmetic}" if backbone.arithmetic != "float" else ""
    numeric = ("output", "parameters", "million MACs")
    rows = layer_rows(measured, shapes, dict(model.named_modules()), task.analogue_parts(model))
    show_table(title, ("layer", "kind", *numeric, "sees"), rows, numeric=numeric)
    for line in totals(model, measured):
        print(line)
    if not (options.classes or config.data.classes):
        print(f"built with {NUM_CLASSES} classes, since the recipe names none; --classes N says how many")


def with_classes(task: Task, number: int | None) -> Task:
    """Return the task with so many classes; None: those that the recipe names, or `NUM_CLASSES`."""
    named = len(task.config.data.classes)
    number = number or named or NUM_CLASSES
    return task if number == named else task.with_classes([f"class {index}" for index in range(1, number + 1)])


def measure(task: Task) -> tuple[nn.Module, Measurement, dict[str, list[tuple[int, ...]]]]:
    """Return the network with new weights, its counts for one image, and the output shapes of each layer's calls.

    Raises:
        ValueError: it cannot be built as the recipe says, or there is no memory for it.
    """
    import torch

    from backbones import hook_layers, measure_activity, spike_layers
    from detection.tasks.run import build_model
    from detection.tasks.start import without_weights

    torch.manual_seed(0)
    model = build_model(without_weights(task))
    shapes: dict[str, list[tuple[int, ...]]] = {}
    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}

    def note(name: str, module: nn.Module, x: Any, output: torch.Tensor) -> None:
        shape = tuple(output.shape)
        shapes.setdefault(name, []).append(shape[1:] if shape[0] == 1 else shape)

    def excite(name: str, layer: SpikeLayer, u: torch.Tensor) -> torch.Tensor:
        return 2 * torch.rand_like(u) * layer.broadcast(layer.threshold, u)

    spikes = spike_layers(model)
    with hook_layers(spikes, before=excite), hook_layers(layers | spikes, after=note):
        measured = measure_activity(model, [task.example()])
    return model, measured, shapes


def layer_rows(
    measured: Measurement,
    shapes: Mapping[str, Sequence[tuple[int, ...]]],
    modules: Mapping[str, nn.Module],
    analogue: Mapping[str, str],
) -> Iterator[Sequence[str]]:
    """Yield a row per layer that ran, in the order of the first calls.

    Args:
        measured: counts for one image.
        shapes: of each layer's outputs.
        modules: of the network by name.
        analogue: the parts that are meant to see real values.
    """
    for name in measured.ran:
        own = sum(parameter.numel() for parameter in modules[name].parameters())
        layer = measured.layers.get(name)
        macs = "" if layer is None else f"{layer.num_macs / 1e6:,.3f}"
        seen = "potentials" if layer is None else seen_by(name, measured, analogue)
        # Of a shared head the output's shape is the first one.
        calls = f" ({len(shapes[name])} calls)" if len(shapes[name]) > 1 else ""
        yield name, describe(modules[name]), "x".join(map(str, shapes[name][0])) + calls, f"{own:,}", macs, seen


def seen_by(name: str, measured: Measurement, analogue: Mapping[str, str]) -> str:
    """Return what a convolution or linear layer sees: "pixels" (the stem), "spikes" or real values."""
    layer = measured.layers[name]
    if name == measured.stem:
        return "pixels (stem)"
    if layer.is_binary or layer.is_sign:
        return "spikes" if layer.is_binary else "signs"
    part = next((why for part, why in analogue.items() if name == part or name.startswith(f"{part}.")), None)
    return f"real values ({part})" if part else "real values"


def describe(module: nn.Module) -> str:
    """Return the kind of a layer in a few words, such as "conv 3x3 64 -> 128 /2"."""
    from torch import nn

    if isinstance(module, nn.Linear):
        return f"linear {module.in_features} -> {module.out_features}"
    if isinstance(module, nn.Conv2d):
        size, stride = "x".join(map(str, module.kernel_size)), module.stride[0]
        groups = f", {module.groups} groups" if module.groups > 1 else ""
        step = f" /{stride}" if stride > 1 else ""
        kind = " ".join(filter(None, (getattr(module, "arithmetic", ""), "conv")))
        return f"{kind} {size} {module.in_channels} -> {module.out_channels}{step}{groups}"
    return type(module).__name__


def totals(model: nn.Module, measured: Measurement) -> list[str]:
    """Return the sums over the network as sentences."""
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    layers = [layer for layer in measured.layers.values() if layer.num_calls]
    binary = [layer for layer in layers if layer.is_binary]
    macs, over_spikes = (sum(layer.num_macs for layer in some) for some in (layers, binary))
    neurons = sum(layer.num_neurons for layer in measured.spikes.values())
    lines = [
        f"{parameters:,} parameters in all, those of normalisation included",
        f"{macs / 1e6:,.3f} million MACs in {plural(len(layers), 'layer')}, "
        f"{over_spikes / 1e6:,.3f} of them in {plural(len(binary), 'layer')} over spikes",
        f"{plural(len(measured.spikes), 'spike layer')}, {neurons:,} neurons",
    ]
    idle = [name for name, layer in measured.layers.items() if not layer.num_calls]
    return lines + ([f"did not run: {', '.join(idle)}"] if idle else [])
