#!/usr/bin/env python3
"""Seconds and memory of one training step: spiking networks, their analogue twins, and the textbook formulation.

A step is forward pass, backward pass and optimiser. The ways take turns, the medians count. "low memory" is eager under
`backbones.memory.keep_less`. Memory is that of tensors during the step, beyond weights and optimiser.

    python benchmarks/training.py --log benchmarks/training.json
    python benchmarks/training.py --networks resnet18 --batch 2 --side 64 --width 0.125 --rounds 2   # in a minute
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import (
    peak_bytes,
    plot_bars,
    print_table,
    synchronise,
    textbook_penalty,
    time_in_turn,
    use_textbook,
    write_log,
)
from torch import Tensor, nn

import backbones
from backbones.memory import keep_less
from detection.cli import run_tool
from detection.config import Config
from detection.models import build_detector

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
        model = build_detector(Config(model=parts, data={"format": "synthetic", "classes": ["circle", "star"]}))
    else:
        cifar = network == "vgg16"
        backbone = backbones.create(network, stem="cifar" if cifar else "imagenet", **settings)
        model = backbones.Classifier(backbone, num_classes=10 if cifar else 1000)
    if activation == TEXTBOOK:
        use_textbook(model)
    return model


def make_step(
    network: str, way: str, *, batch: int, side: int, width: float, device: torch.device
) -> Callable[[], None]:
    """Forward, backward and SGD with momentum on random images; gradients are gone afterwards."""
    activation, mode = WAYS[way]
    model = build(network, activation, side, width).to(device).train()
    # Compiled is the backbone: what follows it in a detector depends on the boxes of each image.
    if mode == "compiled":
        model.backbone.compile()
    context = keep_less if mode == "low memory" else contextlib.nullcontext
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
        with context():
            loss = task_loss()
            if activation == TEXTBOOK:
                loss = loss + HOYER_WEIGHT * textbook_penalty(model)
            else:
                loss = loss + HOYER_WEIGHT * backbones.hoyer_penalty(model).to(device)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(network: str, ways: Iterable[str], rounds: int, **size: Any) -> dict[str, Any]:
    """Times, memory in bytes and ratios of a network."""
    device = size["device"]
    torch.compiler.reset()
    steps, first = {}, {}
    for way in ways:
        started = time.perf_counter()
        steps[way] = make_step(network, way, **size)
        steps[way]()
        synchronise(device)
        first[way] = time.perf_counter() - started
        print(f"{network}, {way}: first step after {first[way]:.1f} s", flush=True)
    memory = {way: peak_bytes(step, device) for way, step in steps.items()}
    timing = time_in_turn(steps, rounds, device)
    ratios = {
        f"{ours} / {other}": {
            "time": timing["median"][ours] / timing["median"][other],
            "cpu_time": timing["cpu_median"][ours] / timing["cpu_median"][other],
            "memory": memory[ours] / memory[other],
        }
        for ours, other in RATIOS
        if ours in steps and other in steps
    }
    return {**timing, "first_step_seconds": first, "peak_bytes": memory, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument(
        "--compile",
        nargs="*",
        choices=SIZES,
        default=["vgg16", "resnet18"],
        help="networks to be measured compiled, too, a minute or two each (default: vgg16 resnet18)",
    )
    parser.add_argument("--batch", type=int, help="images, in place of each network's own number")
    parser.add_argument("--side", type=int, help="pixels, in place of each network's own number")
    parser.add_argument("--width", type=float, default=1.0, help="of the backbones (default: 1)")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each way, in turn (default: 5)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--log", type=Path, help="JSON file to write, with a picture of the same name beside it")
    options = parser.parse_args()
    for name in ("batch", "side", "rounds"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: at least 1")
    device = torch.device(options.device)
    results, panels = {}, {}
    for network in options.networks:
        batch, side = options.batch or SIZES[network][0], options.side or SIZES[network][1]
        ways = [way for way, (_, mode) in WAYS.items() if mode != "compiled" or network in options.compile]
        found = measure(network, ways, options.rounds, batch=batch, side=side, width=options.width, device=device)
        title = f"{network}, {batch} images of {side}x{side}"
        results[network] = {"batch": batch, "side": side, "width": options.width, **found}
        megabytes = {way: value / 2**20 for way, value in found["peak_bytes"].items()}
        panels[f"{title}: seconds per step"] = found["median"]
        panels[f"{title}: peak MiB"] = megabytes
        rows = [
            [way, f"{found['median'][way]:.3f}", f"{found['cpu_median'][way]:.3f}", f"{megabytes[way]:.0f}"]
            for way in ways
        ]
        print_table(title, ["way", "seconds", "processor seconds", "peak MiB"], rows)
        rows = [[pair, *(f"{value:.2f}" for value in ratio.values())] for pair, ratio in found["ratios"].items()]
        print_table("ratios", ["ratio", "time", "processor time", "memory"], rows)
    if options.log:
        write_log(options.log, {"device": str(device), "rounds": options.rounds, "networks": results})
        plot_bars(options.log.with_suffix(".png"), panels)


if __name__ == "__main__":
    run_tool(main)
