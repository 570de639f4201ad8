#!/usr/bin/env python3
"""Seconds and memory of one training step: spiking networks, their analogue twins, and the textbook formulation.

A step is forward pass, backward pass and optimiser. The ways take turns, the medians count. "low memory" is eager under
`backbones.recompute_activations`. "compiled" is the backbone by torch.compile and the network's weights in the order N,
H, W, C, as `train.compile` with `train.channels_last`: of weights in another order the compiler makes copies, and keeps
them from the forward to the backward pass. In bf16 all ways have that order, in which a CPU multiplies bf16 faster.
Memory is that of tensors during the step, gradients included, beyond weights and optimiser.

    python benchmarks/training.py
    python benchmarks/training.py --networks vgg16 --precision float32 bf16 --ways "hoyer compiled" "twin compiled"
    python benchmarks/training.py --precision bf16 --networks resnet50 --batch 128 --log resnet50_gpu.json
    python benchmarks/training.py --networks resnet18 --batch 2 --side 64 --width 0.125 --rounds 2 --log /tmp/quick.json
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import (
    add_log_option,
    peak_bytes,
    plot_bars,
    print_table,
    ratios_of,
    run_benchmark,
    synchronise,
    textbook_penalty,
    time_in_turn,
    use_textbook,
    write_log,
)
from torch import Tensor, nn

import backbones
from backbones import recompute_activations
from detection.models import build_detector
from detection.tasks.recipes import DetectionRecipe

# Images per batch and their side, in pixels, where the command line gives none.
SIZES = {"vgg16": (128, 32), "resnet18": (16, 224), "resnet50": (4, 224), "retinanet_resnet18": (2, 320)}
HOYER_WEIGHT = 1e-8
TEXTBOOK = "textbook"
# Activation and how the network is run.
WAYS = {
    "hoyer eager": ("hoyer", "eager"),
    "hoyer low memory": ("hoyer", "low memory"),
    "hoyer compiled": ("hoyer", "compiled"),
    "twin eager": ("relu", "eager"),
    "twin compiled": ("relu", "compiled"),
    "textbook eager": (TEXTBOOK, "eager"),
}
RATIOS = [
    ("hoyer compiled", "twin compiled"),
    ("hoyer compiled", "twin eager"),
    ("hoyer compiled", "textbook eager"),
    ("hoyer eager", "twin eager"),
    ("hoyer low memory", "twin eager"),
]


def build(network: str, activation: str, side: int, width: float) -> nn.Module:
    """A classifier, or a RetinaNet for images of this size, its backbone in `.backbone`."""
    settings = {"activation": "hoyer" if activation == TEXTBOOK else activation, "width": width}
    torch.manual_seed(0)
    if network.startswith("retinanet_"):
        backbone = {"name": network.removeprefix("retinanet_"), **settings}
        parts = {"detector": "retinanet", "backbone": backbone, "min_size": [side], "max_size": side}
        model = build_detector(
            DetectionRecipe(model=parts, data={"format": "synthetic", "classes": ["circle", "star"]})
        )
    else:
        cifar = network == "vgg16"
        backbone = backbones.create(network, stem="cifar" if cifar else "imagenet", **settings)
        model = backbones.Classifier(backbone, num_classes=10 if cifar else 1000)
    if activation == TEXTBOOK:
        use_textbook(model)
    return model


def make_step(
    network: str, way: str, *, batch: int, side: int, width: float, precision: str, device: torch.device
) -> Callable[[], None]:
    """Forward, backward and SGD with momentum on random images; gradients are gone afterwards."""
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=precision == "bf16")
    activation, mode = WAYS[way]
    model = build(network, activation, side, width).to(device).train()
    if mode == "compiled" or precision == "bf16":
        model.to(memory_format=torch.channels_last)
    if mode == "compiled":
        model.backbone.compile()  # what follows it in a detector depends on the boxes of each image
    context = recompute_activations if mode == "low memory" else contextlib.nullcontext
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images = torch.rand(batch, 3, side, side, device=device)

    if network.startswith("retinanet_"):
        box = torch.tensor([[0.2, 0.2, 0.8, 0.8]], device=device) * side
        targets = [{"boxes": box, "labels": torch.ones(1, dtype=torch.long, device=device)}] * batch

        def task_loss() -> Tensor:
            return sum(model(list(images), targets).values())
    else:
        labels = torch.arange(batch, device=device) % 10

        def task_loss() -> Tensor:
            return F.cross_entropy(model(images), labels)

    def step() -> None:
        with context(), autocast():
            loss = task_loss()
            if activation == TEXTBOOK:
                loss = loss + HOYER_WEIGHT * textbook_penalty(model)
            else:
                loss = loss + HOYER_WEIGHT * backbones.hoyer_penalty(model).to(device)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(network: str, ways: Iterable[str], rounds: int, **size: Any) -> dict[str, dict[str, Any]]:
    """A row of times and memory in bytes for each way."""
    device = size["device"]
    steps, rows = {}, {}
    for way in ways:
        started = time.perf_counter()
        steps[way] = make_step(network, way, **size)
        steps[way]()
        synchronise(device)
        rows[way] = {"first_step_seconds": time.perf_counter() - started}
        print(f"{network}, {way}: first step after {rows[way]['first_step_seconds']:.1f} s", flush=True)
    for way, step in steps.items():
        rows[way]["peak_bytes"] = peak_bytes(step, device)
    for way, times in time_in_turn(steps, rounds, device).items():
        rows[way] |= times
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=SIZES, default=list(SIZES), help="default: all")
    parser.add_argument(
        "--compile",
        nargs="*",
        choices=SIZES,
        default=list(SIZES),
        help="networks to be measured compiled, too, two or three minutes each (default: all)",
    )
    parser.add_argument("--batch", type=int, help="images, in place of each network's own number")
    parser.add_argument("--side", type=int, help="pixels, in place of each network's own number")
    parser.add_argument("--width", type=float, default=1.0, help="of the backbones (default: 1)")
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=("float32", "bf16"),
        default=["float32"],
        help="one or both (default: float32)",
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default: all")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each way, in turn (default: 5)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_log_option(parser, "training")
    options = parser.parse_args()
    for name in ("batch", "side", "rounds"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: at least 1")
    device = torch.device(options.device)
    rows, ratios, panels = [], [], {}
    # A process for each network and precision: what was compiled before in the same one can change code and memory.
    processes = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    for network, precision in itertools.product(options.networks, options.precision):
        batch, side = options.batch or SIZES[network][0], options.side or SIZES[network][1]
        ways = [way for way in options.ways if WAYS[way][1] != "compiled" or network in options.compile]
        size = {"batch": batch, "side": side, "width": options.width, "precision": precision}
        found = processes.submit(measure, network, ways, options.rounds, **size, device=device).result()
        rows += [{"network": network, **size, "way": way, **row} for way, row in found.items()]
        quotients = ratios_of(found, RATIOS)
        ratios += [{"network": network, "precision": precision, **quotient} for quotient in quotients]
        title = f"{network}, {batch} images of {side}x{side}, {precision}"
        megabytes = {way: row["peak_bytes"] / 2**20 for way, row in found.items()}
        panels[f"{title}: seconds per step"] = {way: row["seconds"] for way, row in found.items()}
        panels[f"{title}: peak MiB"] = megabytes
        table = [
            [way, f"{row['seconds']:.3f}", f"{row['cpu_seconds']:.3f}", f"{megabytes[way]:.0f}"]
            for way, row in found.items()
        ]
        print_table(title, ["way", "seconds", "processor seconds", "peak MiB"], table)
        table = [
            [f"{each['ours']} / {each['other']}", *(f"{each[name]:.2f}" for name in ("time", "cpu_time", "memory"))]
            for each in quotients
        ]
        print_table("ratios", ["ratio", "time", "processor time", "memory"], table)
    processes.shutdown()
    write_log(options.log, {"device": str(device), "rounds": options.rounds, "rows": rows, "ratios": ratios})
    plot_bars(options.log.with_suffix(".png"), panels)


if __name__ == "__main__":
    run_benchmark(main)
