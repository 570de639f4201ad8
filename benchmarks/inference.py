#!/usr/bin/env python3
"""How fast is a spiking network on an ordinary CPU, in PyTorch and as an exported file, beside its analogue twin?

Milliseconds per batch and images per second of every form of three networks: VGG16 on 32x32, ResNet18 on 224x224, and
RetinaNet on a ResNet18 of half width on 320x240, whole from images to boxes, with the analogue pyramid and head of
configs/bccd_retinanet_resnet18.yaml or with spiking ones. The ratios say how many times as fast as the twin's ONNX file
in floating point, folded as well. "compiled" is the folded network by torch.compile. Weights are random; BatchNorm's
averages and the thresholds are set so that a share of 15 % of the neurons fires in every layer.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from common import add_log_option, print_table, run_benchmark, write_log
from torch import Tensor, nn

import backbones
from backbones import fold, hook_layers, spike_layers, to_integers
from backbones.deploy.integer import fix_size
from detection.config import load_config
from detection.exporters import import_extra, to_onnx
from detection.models import build_detector
from detection.models.dense import DensePredictions, DetectorOf
from detection.tasks.detection import PREDICTION_LAYERS

RATE = 0.15
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BASE = "twin onnx float"
RECIPE = Path(__file__).parents[1] / "configs" / "bccd_retinanet_resnet18.yaml"
# Of the batches that enter the network; a detector's images have 240 rows and are padded.
SIZES = {"vgg16": (32, 32), "resnet18": (224, 224), "retinanet": (256, 320), "retinanet_spiking": (256, 320)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=tuple(SIZES), default=list(SIZES), help="default: all")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="images per batch (default: 1 8)")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="default: 1 2")
    parser.add_argument(
        "--repeats",
        type=int,
        default=9,
        help="of every form, in alternating order; a third of it for batches (default: 9)",
    )
    parser.add_argument(
        "--compile",
        nargs="*",
        choices=tuple(SIZES),
        default=["vgg16", "resnet18"],
        help="networks to be run compiled, too, which takes a minute or two each (default: vgg16 resnet18)",
    )
    parser.add_argument("--width", type=float, default=1.0, help="times every channel count, for a quick look")
    add_log_option(parser, "inference")
    options = parser.parse_args()
    for name, values in (("batches", options.batches), ("threads", options.threads), ("repeats", [options.repeats])):
        if min(values) < 1:
            parser.error(f"--{name} {min(values)}: at least 1")
    rows = [row for name in options.networks for row in measure_network(name, options)]
    packages = {name: import_extra(name).__version__ for name in ("onnx", "onnxruntime")}
    result = {"repeats": options.repeats, "width": options.width, "packages": packages, "rows": rows}
    write_log(options.log, result)
    plot(rows, options.log.with_suffix(".png"))


def measure_network(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows of a network, for every number of threads, batch and form."""
    forms, activity = build_forms(name, options.width, name in options.compile)
    for threads in options.threads:
        torch.set_num_threads(threads)
        torch.compiler.reset()  # code is made for a number of threads, and only so often
        runs = {form: start(threads) for form, start in forms.items()}
        for batch in options.batches:
            height, side = SIZES[name]
            height = 240 if name.startswith("retinanet") else height
            images = torch.rand(batch, 3, height, side, generator=torch.Generator().manual_seed(1))
            medians = measure(runs, images, options.repeats if batch == 1 else -(-options.repeats // 3))
            found = [
                {
                    "network": name,
                    "form": form,
                    "batch": batch,
                    "threads": threads,
                    "milliseconds": round(seconds * 1e3, 3),
                    "images_per_second": round(batch / seconds, 2),
                    "times_twin_onnx_float": round(medians[BASE] / seconds, 3),
                    "activity": round(activity, 4),
                }
                for form, seconds in medians.items()
            ]
            numbers = ("milliseconds", "images_per_second", "times_twin_onnx_float")
            print_table(
                f"{name}, batch of {batch}, {threads} threads, {activity:.1%} fire",
                ["form", "ms", "images/s", "x twin onnx float"],
                [[row["form"], *(f"{row[number]:.2f}" for number in numbers)] for row in found],
            )
            yield from found


Run = Callable[[Tensor], Any]


def build_forms(name: str, width: float, compiled: bool) -> tuple[dict[str, Callable[[int], Run]], float]:
    """Every form of a network as a function from a number of threads to something that runs, and the spike activity."""
    spiking, wrap, outputs = build(name, "hoyer", width)
    twin, wrap_twin, _ = build(name, "relu", width)
    images = torch.rand(16, 3, *SIZES[name], generator=torch.Generator().manual_seed(0))
    with backbones.record_activity(spiking) as activity, torch.no_grad():
        spiking(images)
    example = images[:2]
    folded, folded_twin = (fix_size(fold(network), example) for network in (spiking, twin))
    integers = to_integers(folded, images, keep=PREDICTION_LAYERS)
    everything = to_integers(folded, images, keep=PREDICTION_LAYERS, analogue=True)
    options = {"dynamic_size": False, "example": example, "outputs": outputs}
    files = {
        "onnx float": to_onnx(folded, **options),
        "onnx int8": to_onnx(integers, **options),
        "onnx int8, analogue too": to_onnx(everything, **options),
        BASE: to_onnx(folded_twin, **options),
    }
    files["twin onnx int8"] = quantise_statically(files[BASE], images)
    in_torch = {"eager": spiking, "folded": folded, "twin eager": twin, "twin folded": folded_twin}
    if compiled:
        compiler = partial(torch.compile, dynamic=False)  # code for each number of images
        in_torch |= {"compiled": compiler(folded), "twin compiled": compiler(folded_twin)}

    def torch_form(network: nn.Module, wrapper: Callable[[Run], Run]) -> Callable[[int], Run]:
        return lambda threads: wrapper(network)

    def onnx_form(file: Any, wrapper: Callable[[Run], Run]) -> Callable[[int], Run]:
        content = file.SerializeToString()
        return lambda threads: wrapper(session(content, threads))

    forms = {key: torch_form(network, wrap_twin if "twin" in key else wrap) for key, network in in_torch.items()}
    forms |= {key: onnx_form(file, wrap_twin if "twin" in key else wrap) for key, file in files.items()}
    return forms, backbones.spike_activity(activity)


def build(
    name: str, activation: str, width: float, rate: float = RATE
) -> tuple[nn.Module, Callable[[Run], Run], list[str]]:
    """A network over images, what makes a whole detector of it (nothing for a classifier), its outputs' names."""
    torch.manual_seed(0)
    if name.startswith("retinanet"):
        config = load_config(RECIPE)
        config.model.backbone.activation = activation
        config.model.backbone.width *= width
        config.model.neck.spiking = config.model.head.spiking = name == "retinanet_spiking"
        detector = build_detector(config)
        dense = DensePredictions(detector)
        settle(dense, SIZES[name], rate)

        def whole(run: Run) -> Run:
            # Only shapes, anchors and the making of boxes are left of the detector.
            rest = DetectorOf(copy.deepcopy(detector), lambda x: dict(zip(dense.outputs, run(x), strict=True)))
            return lambda images: rest(list(images))

        return dense.eval(), whole, dense.outputs
    stem, classes = ("cifar", 10) if name == "vgg16" else ("imagenet", 1000)
    backbone = backbones.create(name, activation=activation, stem=stem, width=width)
    network = backbones.Classifier(backbone, classes, mean=MEAN, std=STD)
    settle(network, SIZES[name], rate)
    return network.eval(), lambda run: run, ["logits"]


@torch.no_grad()
def settle(network: nn.Module, size: tuple[int, int], rate: float) -> None:
    """Set BatchNorm's averages to those of `settling_images`, and thresholds to where `rate` of each layer fires."""

    def set_threshold(name: str, layer: backbones.SpikeLayer, u: Tensor) -> None:
        values = u.flatten()
        values = values[:: max(1, len(values) // 100_000)]
        layer.extremum.fill_(values.quantile(1 - rate) / layer.v_th.abs())

    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    layers = spike_layers(network)
    for layer in layers.values():
        layer.eval()
    with hook_layers(layers, before=set_threshold):
        network(settling_images(size))


def settling_images(size: tuple[int, int]) -> Tensor:
    """Images of noise, (N, 3, H, W), more of them where a deep layer has few neurons."""
    return torch.rand(32 if size[0] == 32 else 8, 3, *size, generator=torch.Generator().manual_seed(2))


def session(content: bytes, threads: int) -> Run:
    """A file in ONNX Runtime: images to a list of tensors."""
    runtime = import_extra("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle sessions must not slow others
    running = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(value) for value in running.run(None, {"images": images.numpy()})]


def quantise_statically(model: Any, images: Tensor) -> Any:
    """The twin in 8 bits, weights and activations, by ONNX Runtime's own tool."""
    onnx = import_extra("onnx")
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left: Iterator[Tensor] = iter(images.split(4))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.left, None)
            return None if batch is None else {"images": batch.numpy()}

    with tempfile.TemporaryDirectory() as folder:
        source, prepared, result = (str(Path(folder) / name) for name in ("a.onnx", "b.onnx", "c.onnx"))
        onnx.save(model, source)
        logging.getLogger().setLevel(logging.ERROR)  # it warns of every BatchNorm that has no convolution to go into
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            result,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(result)


@torch.no_grad()
def measure(runs: dict[str, Run], images: Tensor, repeats: int) -> dict[str, float]:
    """Median seconds per batch of each form."""
    seconds: dict[str, list[float]] = {form: [] for form in runs}
    for run in runs.values():
        run(images)
        run(images)
    for repeat in range(repeats):
        order = list(runs.items())
        for form, run in order if repeat % 2 == 0 else reversed(order):
            started = time.perf_counter()
            run(images)
            seconds[form].append(time.perf_counter() - started)
    return {form: statistics.median(values) for form, values in seconds.items()}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """A bar per form and network, for the first number of threads and every batch size: speed over the base."""
    networks, batches = list(dict.fromkeys(row["network"] for row in rows)), sorted({row["batch"] for row in rows})
    threads = rows[0]["threads"]
    white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # behind numbers that meet the line at 1
    figure, axes = plt.subplots(
        len(batches), len(networks), figsize=(3.6 * len(networks), 2.9 * len(batches)), squeeze=False, sharex=True
    )
    for line, batch in zip(axes, batches, strict=True):
        for axis, network in zip(line, networks, strict=True):
            wanted = (network, batch, threads)
            bars = [row for row in rows if (row["network"], row["batch"], row["threads"]) == wanted][::-1]
            colours = ["tab:gray" if "twin" in row["form"] else "tab:blue" for row in bars]
            drawn = axis.barh(
                [row["form"] for row in bars], [row["times_twin_onnx_float"] for row in bars], color=colours
            )
            axis.bar_label(drawn, [f"{row['milliseconds']:.1f} ms" for row in bars], padding=2, fontsize=7, bbox=white)
            axis.axvline(1, color="black", linewidth=0.8)
            axis.set_title(f"{network}, batch {batch}", fontsize=9)
            axis.tick_params(labelsize=7)
            axis.margins(x=0.25)
    for axis in axes[-1]:
        axis.set_xlabel("times the twin's ONNX in float", fontsize=8)
    figure.suptitle(f"Speed of inference, {threads} thread{'s' if threads > 1 else ''}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    run_benchmark(main)
