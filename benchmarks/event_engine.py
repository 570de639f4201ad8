#!/usr/bin/env python3
"""How fast is the event-driven engine on one image at a time, beside the analogue twin in float and in 8 bits?

Networks: VGG16 on 32x32, ResNet18 on 224x224 and a RetinaNet with spiking neck and head on 320x240, whole from images
to boxes, with random weights and thresholds at which a given share of the neurons of every layer fires. Trained:
networks of the zoo on real images, from decoded image to boxes or logits; their twins have random weights, and boxes
are made of the trained network's outputs for both. Layers: one layer alone, in units of the dense product that
it replaces, beside the same layer as a dense 8-bit convolution (ONNX Runtime, the mean of a chain of four), the largest
dense 8-bit product that was measured, and what memory gives if every weight of an input that fired is read once.

Forms take turns, each several images in a row, since that is how a network is used; every form sees the same eight.

    python benchmarks/event_engine.py
    python benchmarks/event_engine.py --networks vgg16 --threads 1 --rates 0.1 --rounds 2 --width 0.25 --log quick.json
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import inference
import matplotlib.pyplot as plt
import torch
from common import add_log_option, print_table, run_benchmark, write_log
from inference import SIZES, Run, build, quantise_statically, session, settling_images
from torch import Tensor, nn

import detection
from backbones import find_neuron, fold, record_activity, spike_activity, to_integers
from backbones.deploy.events import Bits, Comparison, Engine, EventLayer, Window, current, to_program
from backbones.deploy.integer import fix_size
from detection.exporters import OnnxFile, import_extra, open_file, to_onnx
from detection.runs import Run as SavedRun
from detection.tasks import task_of
from detection.tasks.base import Task
from detection.tasks.detection import PREDICTION_LAYERS
from detection.tasks.run import load_model, make_accelerator

RATES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
DENSITIES = (*RATES, 0.5, 0.8, 1.0)
NUM_IMAGES = 8
FLOAT = "twin float, ONNX Runtime"
TWINS = ("twin int8, ONNX Runtime", "twin int8, OpenVINO")
TRAINED = ("zoo:cifar10_vgg11=cifar10", "zoo:bccd_retinanet_resnet18_spiking=bccd")
# Channels in and out, side of the map, kernel.
LAYERS = (
    (64, 64, 56, 3),
    (128, 128, 28, 3),
    (256, 256, 14, 3),
    (512, 512, 7, 3),
    (32, 32, 64, 3),
    (128, 128, 32, 3),
    (256, 512, 14, 1),
    (4096, 4096, 1, 1),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in SIZES if name != "retinanet"]
    parser.add_argument("--networks", nargs="+", choices=names, default=names, help="default: all")
    help = "trained networks and the folders of their data in --data (default: two of the zoo)"
    parser.add_argument("--trained", nargs="+", metavar="RUN=FOLDER", default=list(TRAINED), help=help)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="default: 1 2")
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="shares of neurons that fire")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every form (default: 5)")
    parser.add_argument("--width", type=float, default=1.0, help="times every channel count, for a quick look")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of bccd and cifar10 (default: data)")
    add_log_option(parser, "event_engine")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # of the processes below: idle threads must not slow others
    if options.rounds < 1 or min(options.threads) < 1:
        parser.error("--rounds and --threads: at least 1")
    packages = {name: import_extra(name).__version__ for name in ("onnx", "onnxruntime")}
    packages["openvino"] = __import__("openvino").__version__
    result: dict[str, Any] = {"rounds": options.rounds, "width": options.width, "packages": packages}
    result |= {"kernels": current(), "rows": []}
    # A process for each part: OpenVINO is not to be beside what it does not need, it has ended whole processes.
    processes = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    for part in options.parts:
        result["rows"] += processes.submit(rows_of_part, part, options).result()
    if "layers" in options.parts:
        result["limits"] = processes.submit(limits).result()
    processes.shutdown()
    write_log(options.log, result)
    if "layers" in options.parts:
        plot_layers(result["rows"], result["limits"], options.log.with_suffix(".png"))


def rows_of_part(part: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of a part, in a process of its own."""
    torch.set_grad_enabled(False)
    return [{"part": part, **row} for row in PARTS[part](options)]


def measure_networks(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows of networks with random weights."""
    for name in options.networks:
        images = settling_images(SIZES[name])
        twin, wrap_twin, outputs = build(name, "relu", options.width)
        folded = fix_size(fold(twin), images[:2])
        file = to_onnx(folded, dynamic_size=False, example=images[:2], outputs=outputs)
        spiking, wrap, _ = build(name, "hoyer", options.width)
        integers = to_integers(fix_size(fold(spiking), images[:2]), images, keep=PREDICTION_LAYERS)
        ours = to_onnx(integers, dynamic_size=False, example=images[:2], outputs=outputs)
        engines, activities = {}, {}
        for rate in options.rates:
            network, wrap, _ = build(name, "hoyer", options.width, rate)
            with record_activity(network) as activity:
                network(images)
            activities[rate] = spike_activity(activity)
            exact = to_integers(fix_size(fold(network), images[:2]), images, exact=True)
            engines[rate] = Engine(to_program(exact))
        pictures = [image[None, :, :240] if name.startswith("retinanet") else image[None] for image in images]
        quantised = quantise_statically(file, images)
        for threads in options.threads:
            torch.set_num_threads(threads)
            forms: dict[str, Run] = {FLOAT: wrap_twin(session(file.SerializeToString(), threads))}
            forms[TWINS[0]] = wrap_twin(session(quantised.SerializeToString(), threads))
            forms[TWINS[1]] = wrap_twin(openvino_session(quantised, threads))
            forms["int8, ONNX Runtime"] = wrap(session(ours.SerializeToString(), threads))
            forms |= {f"events, {rate:.0%}": wrap(engine) for rate, engine in engines.items()}
            known = {f"events, {rate:.0%}": value for rate, value in activities.items()}
            known["int8, ONNX Runtime"] = inference.RATE
            yield from rows_of(name, forms, pictures[:NUM_IMAGES], threads, options.rounds, known)


def measure_trained(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows of trained networks on real images."""
    for address, _, folder in (each.rpartition("=") for each in options.trained):
        root = options.data / folder
        with tempfile.TemporaryDirectory() as place:
            torch.set_num_threads(max(options.threads))
            written = detection.export(
                address,
                Path(place) / "model.events",
                file_format="events",
                data_root=root,
                evaluate=True,
                num_calibration=256,
            )
            file = open_file(written.path)
        run = SavedRun.open(address, root)
        task, model = task_of(run.config), load_model(run, "last")
        images = single_images(task, task.read("val"))
        with record_activity(model) as activity:
            for image in images:
                model(image)
        answers = {id(image): answer_of(file, image) for image in images}
        calibration = task.calibration_images(model, 32)
        twin = run.config.model_copy(deep=True)
        twin.model.backbone.activation, twin.model.backbone.weights = "relu", None
        twin_task = type(task)(twin)
        part = twin_task.deployable(twin_task.build_model().eval())
        outputs = list(part.outputs)
        folded = fix_size(fold(part.network), calibration[:2])
        onnx_file = to_onnx(folded, dynamic_size=False, example=calibration[:2], outputs=outputs)
        quantised = quantise_statically(onnx_file, calibration)
        for threads in options.threads:
            torch.set_num_threads(threads)
            in_twin = {
                FLOAT: session(onnx_file.SerializeToString(), threads),
                TWINS[0]: session(quantised.SerializeToString(), threads),
                TWINS[1]: openvino_session(quantised, threads),
            }
            forms = {name: around(twin_task, each, answers) for name, each in in_twin.items()}
            forms["events"] = file
            known = {"events": spike_activity(activity)}
            for row in rows_of(address, forms, images, threads, options.rounds, known):
                yield row | ({"accuracy": written.description["evaluation"]} if row["form"] == "events" else {})


def single_images(task: Task, dataset: Any) -> list[Any]:
    """Return the first evaluation images as the network takes them, one at a time."""
    batches, found = task.evaluation_batches(dataset, make_accelerator(task.config)), []
    for images, _ in batches:
        found += [images[index : index + 1] for index in range(len(images))]
        if len(found) >= NUM_IMAGES:
            break
    return found[:NUM_IMAGES]


def answer_of(file: OnnxFile, image: Any) -> dict[str, Tensor]:
    """Return what the network in a file gives for an image, by the outputs' names."""
    found: dict[str, Tensor] = {}
    file.task.model_around(lambda batch: found.update(file.run(batch)) or found)(image)
    return found


def around(task: Task, run: Run, answers: dict[int, dict[str, Tensor]]) -> Callable[[Any], Any]:
    """Return what computes a network of random weights, and makes boxes or logits of a trained one's answers."""
    answer: dict[str, Tensor] = {}

    def compute(batch: Tensor) -> dict[str, Tensor]:
        run(batch)
        return answer

    whole = task.model_around(compute)

    def form(image: Any) -> Any:
        answer.update(answers[id(image)])
        return whole(image)

    return form


def openvino_session(model: Any, threads: int) -> Run:
    """Return an ONNX model in OpenVINO: images to a list of tensors."""
    import openvino

    core = openvino.Core()
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", options)
    request = compiled.create_infer_request()

    def run(images: Tensor) -> list[Tensor]:
        results = request.infer({"images": images.numpy()})
        return [torch.from_numpy(results[output]) for output in compiled.outputs]

    return run


def rows_of(
    network: str, forms: dict[str, Any], images: list[Any], threads: int, rounds: int, activities: dict[str, float]
) -> list[dict[str, Any]]:
    """Return a row for each form, and print them."""
    medians = measure(forms, images, rounds)
    best = min(medians[name] for name in TWINS)
    rows = [
        {
            "network": network,
            "form": form,
            "threads": threads,
            "milliseconds": round(seconds * 1e3, 4),
            "times_best_twin_int8": round(best / seconds, 3),
            **({"activity": round(activities[form], 4)} if form in activities else {}),
        }
        for form, seconds in medians.items()
    ]
    print_table(
        f"{network}, one image, {threads} thread{'s' * (threads > 1)}",
        ["form", "ms", "x best twin int8", "activity"],
        [
            [
                row["form"],
                f"{row['milliseconds']:.3f}",
                f"{row['times_best_twin_int8']:.2f}",
                str(row.get("activity", "")),
            ]
            for row in rows
        ],
    )
    return rows


def measure(forms: dict[str, Any], images: list[Any], rounds: int) -> dict[str, float]:
    """Return median seconds per image of each form: in every round each has all images, after two that do not count."""
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    for current_round in range(rounds + 1):
        order = list(forms.items())
        for form, run in order if current_round % 2 else reversed(order):
            for image in images[:2]:
                run(image)
            for image in images:
                started = time.perf_counter()
                run(image)
                if current_round:
                    seconds[form].append(time.perf_counter() - started)
    return {form: statistics.median(values) for form, values in seconds.items()}


def measure_layers(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows of single layers, one thread: thousand million products per second that the dense layer has."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    for channels, out_channels, side, kernel in LAYERS:
        weight = (35 * torch.randn(out_channels, channels, kernel, kernel, generator=generator)).clamp(-127, 127)
        comparison = Comparison(torch.full((out_channels,), 500, dtype=torch.int32))
        window = Window((kernel, kernel), (1, 1), (kernel // 2, kernel // 2))
        layer = EventLayer(weight.round().to(torch.int8), window, spikes=[comparison])
        products = kernel**2 * channels * out_channels * side**2
        inputs = {
            density: [
                Bits.pack(torch.rand(1, channels, side, side, generator=generator) < density) for _ in range(NUM_IMAGES)
            ]
            for density in DENSITIES
        }
        medians = {
            density: measure({"events": layer}, maps, options.rounds)["events"] for density, maps in inputs.items()
        }
        dense = dense_seconds(channels, out_channels, side, kernel, options.rounds)
        shape = f"{kernel}x{kernel}, {channels} to {out_channels}, {side}x{side}"
        rows = [
            {"layer": shape, "density": density, "gmacs": round(products / seconds / 1e9, 1)}
            for density, seconds in medians.items()
        ]
        rows.append({"layer": shape, "form": "dense int8, ONNX Runtime", "gmacs": round(products / dense / 1e9, 1)})
        table = [[str(row.get("density", row.get("form"))), f"{row['gmacs']:.0f}"] for row in rows]
        print_table(shape, ["activity", "GMAC/s"], table)
        yield from rows


def dense_seconds(channels: int, out_channels: int, side: int, kernel: int, rounds: int) -> float:
    """Return the seconds of one such layer over spikes in 8 bits in ONNX Runtime: a chain of five less one of one."""
    seconds = []
    for number in (5, 1):
        torch.manual_seed(0)
        spike = find_neuron("hoyer").make
        width = [channels, *[out_channels] * number]
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 1), nn.BatchNorm2d(channels)]
        for index in range(number):
            pair = width[index : index + 2]
            layers += [
                spike(pair[0]),
                nn.Conv2d(*pair, kernel, padding=kernel // 2, bias=False),
                nn.BatchNorm2d(pair[1]),
            ]
        network = nn.Sequential(*layers, spike(out_channels)).eval()
        images = [torch.rand(1, 3, side, side) for _ in range(NUM_IMAGES)]
        integers = to_integers(fix_size(fold(network), images[0]), torch.cat(images))
        file = to_onnx(integers, dynamic_size=False, example=images[0], outputs=["spikes"])
        seconds.append(measure({"dense": session(file.SerializeToString(), 1)}, images, rounds)["dense"])
    return (seconds[0] - seconds[1]) / 4


def limits() -> dict[str, float]:
    """Return the largest dense 8-bit product's GMAC/s, and GB/s of reading from main memory, on one thread."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    product = 1024 * 1024 * 32 * 32 / dense_seconds(1024, 1024, 32, 1, 3) / 1e9
    large = torch.ones(1 << 26, dtype=torch.int64)
    seconds = measure({"sum": lambda _: large.sum()}, [None] * 4, 3)["sum"]
    return {
        "dense_int8_gmacs": round(product, 1),
        "memory_gigabytes_per_second": round(8 * len(large) / seconds / 1e9, 1),
    }


def plot_layers(rows: list[dict[str, Any]], limit: dict[str, float], path: Path) -> None:
    """Draw GMAC/s over activity for each layer, with the same layer as a dense one and the two limits."""
    layers = list(dict.fromkeys(row["layer"] for row in rows if row["part"] == "layers"))
    figure, axes = plt.subplots(2, -(-len(layers) // 2), figsize=(12, 6), sharex=True, sharey=True)
    for axis, name in zip(axes.flat, layers, strict=False):
        own = [row for row in rows if row.get("layer") == name]
        events = [row for row in own if "density" in row]
        dense = next(row["gmacs"] for row in own if "form" in row)
        densities = [row["density"] for row in events]
        axis.loglog(densities, [row["gmacs"] for row in events], marker="o", markersize=3, label="events")
        axis.axhline(dense, color="tab:gray", label="this layer dense, 8 bits")
        axis.axhline(limit["dense_int8_gmacs"], color="black", linestyle=":", label="largest dense product, 8 bits")
        memory = [limit["memory_gigabytes_per_second"] / density for density in densities]
        axis.loglog(densities, memory, color="tab:red", linestyle="--", label="each weight from main memory")
        axis.set_title(name, fontsize=9)
        axis.set_xticks(densities[1::2], [f"{density:.0%}" for density in densities[1::2]])
        axis.minorticks_off()
        axis.tick_params(labelsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("GMAC/s of the dense layer", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("neurons that fire", fontsize=8)
    axes.flat[0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "networks": measure_networks,
    "trained": measure_trained,
    "layers": measure_layers,
}

if __name__ == "__main__":
    run_benchmark(main)
