#!/usr/bin/env python3
"""Seconds and memory against what grows: a training step, a detector's training and evaluation, several processes.

One quantity grows at a time, the others stay. A training step: 8 images of 128x128 in a ResNet18 of width 0.25; for the
number of layers VGG11 to VGG19; for the objects in an image a RetinaNet on that ResNet18. Each point measures the
spiking network, the analogue twin and, where no detector is around it, the same with low memory, in turn. An
evaluation: drawn detections, counted by both packages, see evaluation.py. Processes: the same step in 1 and 2 processes
over gloo, each with a thread and a batch of its own, so that only what they tell each other can take longer; of two
that share one core each has half of it, so that processor time says more than seconds.

Exponents are those of powers fitted to all points of a series: least squares of the logarithms.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --points 2 --rounds 1 --log /tmp/quick.json
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
from common import add_log_option, peak_bytes, print_table, run_benchmark, time_in_turn, write_log
from evaluation import measure as evaluate
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import SIZES, build

import backbones
from backbones import recompute_activations, spike_layers
from detection.training.distributed import synchronise

DEPTH, OBJECTS, PROCESSES = "spike layers", "objects per image", "processes"
BASE = {"network": "resnet18", "batch": 8, "side": 128, "width": 0.25}
STEPS: dict[str, list[dict[str, Any]]] = {
    "batch, images": [{"batch": batch} for batch in (4, 8, 16, 32)],
    "side, pixels": [{"side": side} for side in (64, 96, 128, 192)],
    "width": [{"width": width} for width in (0.125, 0.25, 0.5, 1.0)],
    DEPTH: [{"network": network} for network in ("vgg11", "vgg13", "vgg16", "vgg19")],
    OBJECTS: [{"network": "retinanet_resnet18", "objects": number} for number in (1, 8, 64, 256)],
}
WAYS = {"hoyer": ("hoyer", False), "hoyer low memory": ("hoyer", True), "twin": ("relu", False)}
PACKAGES = ("pycocotools", "faster-coco-eval")
EVALUATION = {"images": 1000, "boxes": 7, "detections": 8, "classes": 10}
EVALUATIONS: dict[str, list[dict[str, int]]] = {
    "images evaluated": [{"images": number} for number in (1000, 2000, 4000, 8000)],
    "objects evaluated per image": [{"boxes": number, "detections": number} for number in (4, 8, 16, 32)],
}
# What processes tell each other beside gradients: of spikes, of BatchNorms.
SHARED = {"gradients": (False, False), "and Hoyer's moments": (True, False), "and BatchNorm's": (True, True)}
MANY_STEPS = 5  # of a measurement of processes, as one


def make_step(
    network: str,
    activation: str,
    *,
    low_memory: bool,
    batch: int,
    side: int,
    width: float,
    device: torch.device,
    objects: int = 1,
) -> tuple[Callable[[], None], nn.Module]:
    """Forward, backward and SGD of a backbone or detector on random images, and the network."""
    torch.manual_seed(0)
    images = torch.rand(batch, 3, side, side, device=device)
    if network.startswith("retinanet_"):
        model = build(network, activation, side, width).to(device).train()
        corners = torch.rand(objects, 2, device=device) * side / 2
        boxes = torch.cat([corners, corners + side / 8 + torch.rand(objects, 2, device=device) * side / 4], 1)
        targets = [{"boxes": boxes, "labels": torch.ones(objects, dtype=torch.long, device=device)}] * batch

        def loss_of() -> torch.Tensor:
            return sum(model(list(images), targets).values())
    else:
        model = backbones.create(network, activation=activation, width=width).to(device).train()

        def loss_of() -> torch.Tensor:
            return sum(features.square().mean() for features in model(images).values())

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    context = recompute_activations if low_memory else contextlib.nullcontext

    def step() -> None:
        with context():
            loss = loss_of() + 1e-8 * backbones.hoyer_penalty(model).to(device)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, model


def measure(series: str, point: dict[str, Any], rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """A row of times and peak bytes for each way at one point of a series."""
    steps, num_layers = {}, 0
    for way, (activation, low_memory) in WAYS.items():
        if series == OBJECTS and low_memory:
            continue
        steps[way], model = make_step(activation=activation, low_memory=low_memory, device=device, **point)
        steps[way]()
        num_layers = max(num_layers, len(spike_layers(model)))
    memory = {way: peak_bytes(step, device) for way, step in steps.items()}
    value = num_layers if series == DEPTH else point[series.split(",")[0].split()[0]]
    place = {"series": series, "value": value, **point, "spike_layers": num_layers}
    times = time_in_turn(steps, rounds, device)
    return [{**place, "way": way, **times[way], "peak_bytes": memory[way]} for way in steps]


def measure_evaluation(series: str, point: dict[str, int]) -> list[dict[str, Any]]:
    """A row for each counting package, each in a process of its own, whose memory beyond the libraries is counted."""
    context, rows = multiprocessing.get_context("forkserver"), []
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # for the server, which imports everything once
    context.set_forkserver_preload(["evaluation"])
    for package in PACKAGES:
        with context.Pool(1) as pool:
            found = pool.apply(evaluate, (package, EVALUATION | point))
        row = {"series": series, "value": next(iter(point.values())), "way": package, **EVALUATION, **point}
        row["seconds"] = found["detecting_seconds"] + found["counting_seconds"]
        row["peak_bytes"] = found["peak_bytes"] - found["before_bytes"]
        rows.append(row | {"cpu_seconds": found["cpu_seconds"]})
    return rows


def exchange(rank: int, number: int, port: int, way: str, rounds: int) -> dict[str, float] | None:
    """Return what a process needs for a step while it trains with the others, of the first one."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, number, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=number)
    torch.manual_seed(0)
    model = backbones.create(BASE["network"], activation="hoyer", width=BASE["width"]).train()
    spikes, batch_norm = SHARED[way]
    wrapped = DistributedDataParallel(synchronise(model, spikes=spikes, batch_norm=batch_norm), broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images = torch.rand(BASE["batch"], 3, BASE["side"], BASE["side"])
    sizes: list[int] = []
    reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        sizes.append(tensor.numel() * tensor.element_size())
        return reduce(tensor, *arguments, **options)

    def steps() -> None:
        for _ in range(MANY_STEPS):
            loss = sum(features.square().mean() for features in wrapped(images).values())
            (loss + 1e-8 * backbones.hoyer_penalty(model)).backward()
            optimizer.step()
            optimizer.zero_grad()

    dist.all_reduce = counted
    steps()
    dist.all_reduce = reduce
    found = time_in_turn({"steps": steps}, rounds, torch.device("cpu"))["steps"]
    dist.barrier()
    dist.destroy_process_group()
    if rank:
        return None
    times = {key: found[key] / MANY_STEPS for key in ("seconds", "cpu_seconds")}
    return times | {"all_reduces": len(sizes) / MANY_STEPS, "reduced_bytes": sum(sizes) / MANY_STEPS}


def measure_processes(rounds: int) -> list[dict[str, Any]]:
    """A row for each number of processes and each thing that they share."""
    context, rows = multiprocessing.get_context("spawn"), []
    for number in (1, 2):
        with context.Pool(number) as pool:
            for way in SHARED:
                with socket.socket() as free:
                    free.bind(("127.0.0.1", 0))
                    port = free.getsockname()[1]
                calls = [pool.apply_async(exchange, (rank, number, port, way, rounds)) for rank in range(number)]
                found = [call.get(timeout=600) for call in calls]
                rows.append({"series": PROCESSES, "value": number, "way": way, **BASE, **found[0]})
    return rows


def describe_networks() -> list[dict[str, Any]]:
    """Return what several processes exchange in a step of each network of training.py, by its structure."""
    rows = []
    for network, (batch, side) in SIZES.items():
        model = build(network, "hoyer", side, 1.0)
        channels = [module.num_features for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        rows.append(
            {
                "network": network,
                "batch": batch,
                "gradient_bytes": sum(each.numel() * 4 for each in model.parameters() if each.requires_grad),
                "spike_layers": len(spike_layers(model)),
                "batch_norms": len(channels),
                "batch_norm_channels": sum(channels),
            }
        )
    return rows


def lines_of(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return the rows of each series and way."""
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["series"], row["way"]), []).append(row)
    return lines


def fit(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the exponents of powers of the value fitted to time and memory of each series and way of 2 points."""
    slopes = []
    for (series, way), line in lines_of(rows).items():
        if series == PROCESSES or len(line) < 2:
            continue
        x = np.log([row["value"] for row in line])
        powers = {"time": "cpu_seconds", "memory": "peak_bytes"}
        found = {name: np.polyfit(x, np.log([row[key] for row in line]), 1)[0] for name, key in powers.items()}
        slopes.append({"series": series, "way": way} | {name: round(float(value), 3) for name, value in found.items()})
    return slopes


def plot(path: Path, rows: list[dict[str, Any]], slopes: list[dict[str, Any]]) -> None:
    """PNG: processor time above, memory below, a column per series, both axes logarithmic, exponents in the legends."""
    series = list(dict.fromkeys(each["series"] for each in slopes))
    if not series:
        return
    figure, axes = plt.subplots(2, len(series), figsize=(3.4 * len(series), 6.4), squeeze=False, layout="constrained")
    power = {(each["series"], each["way"]): each for each in slopes}
    colours = {way: f"C{index}" for index, way in enumerate((*WAYS, *PACKAGES))}
    for (name, way), line in lines_of(rows).items():
        if (name, way) not in power:
            continue
        column, x = series.index(name), [row["value"] for row in line]
        for axis, key, kind, unit in zip(
            axes[:, column], ("cpu_seconds", "peak_bytes"), ("time", "memory"), (1, 2**20), strict=True
        ):
            y = [row[key] / unit for row in line]
            axis.loglog(x, y, marker="o", color=colours[way], label=f"{way}, exponent {power[name, way][kind]:.2f}")
            axis.set_xticks(x, [f"{value:g}" for value in x], minor=False)
            axis.set_xticks([], minor=True)
            axis.grid(alpha=0.3, which="both")
            axis.set_xlabel(name)
            axis.legend(fontsize=7)
    axes[0][0].set_ylabel("seconds of processor time")
    axes[1][0].set_ylabel("peak MiB")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row of the printed table."""
    memory = f"{row['peak_bytes'] / 2**20:.1f}" if "peak_bytes" in row else ""
    return [f"{row['series']}, {row['way']}", f"{row['value']:g}", f"{row['cpu_seconds']:.3f}", memory]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=4, help="first so many of each series (default: all 4)")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each way, in turn (default: 5)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_log_option(parser, "scaling")
    options = parser.parse_args()
    for name in ("points", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: at least 1")
    device, started = torch.device(options.device), time.monotonic()
    rows: list[dict[str, Any]] = []
    for name, points in EVALUATIONS.items():
        for point in points[: options.points]:
            rows += measure_evaluation(name, point)
    print(f"evaluation: {time.monotonic() - started:.0f} s", flush=True)
    rows += measure_processes(options.rounds)
    print(f"processes: {time.monotonic() - started:.0f} s", flush=True)
    for name, changes in STEPS.items():
        for change in changes[: options.points]:
            rows += measure(name, BASE | change, options.rounds, device)
    print(f"training steps: {time.monotonic() - started:.0f} s")
    slopes = fit(rows)
    print_table("all points", ["series, way", "value", "processor time, s", "peak MiB"], list(map(cells, rows)))
    table = [[f"{row['series']}, {row['way']}", f"{row['time']:.2f}", f"{row['memory']:.2f}"] for row in slopes]
    print_table("exponents", ["series, way", "time", "memory"], table)
    facts = {"device": str(device), "rounds": options.rounds, "networks": describe_networks()}
    write_log(options.log, facts | {"rows": rows, "slopes": slopes})
    plot(options.log.with_suffix(".png"), rows, slopes)


if __name__ == "__main__":
    run_benchmark(main)
