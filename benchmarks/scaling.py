#!/usr/bin/env python3
"""Seconds and memory of one training step against batch, resolution, width and number of spike layers.

One of them grows at a time, the others stay: 8 images of 128x128 in a ResNet18 of width 0.25; for the number of layers
VGG11 to VGG19. Each point measures the spiking network, the same with low memory, and the analogue twin, in turn.

    python benchmarks/scaling.py
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from common import add_log_option, peak_bytes, print_table, run_benchmark, time_in_turn, write_log

import backbones
from backbones import recompute_activations, spike_layers

DEPTH = "spike layers"
BASE = {"network": "resnet18", "batch": 8, "side": 128, "width": 0.25}
SERIES: dict[str, list[dict[str, Any]]] = {
    "batch, images": [{"batch": batch} for batch in (4, 8, 16, 32)],
    "side, pixels": [{"side": side} for side in (64, 96, 128, 192)],
    "width": [{"width": width} for width in (0.125, 0.25, 0.5, 1.0)],
    DEPTH: [{"network": network} for network in ("vgg11", "vgg13", "vgg16", "vgg19")],
}
WAYS = {"hoyer": ("hoyer", False), "hoyer low memory": ("hoyer", True), "twin": ("relu", False)}


def make_step(
    network: str, activation: str, *, low_memory: bool, batch: int, side: int, width: float, device: torch.device
) -> tuple[Callable[[], None], int]:
    """Forward, backward and SGD of a backbone on random images, and its number of activation layers."""
    torch.manual_seed(0)
    backbone = backbones.create(network, activation=activation, width=width).to(device).train()
    optimizer = torch.optim.SGD(backbone.parameters(), lr=1e-3, momentum=0.9)
    images = torch.rand(batch, 3, side, side, device=device)
    context = recompute_activations if low_memory else contextlib.nullcontext

    def step() -> None:
        with context():
            maps = backbone(images)
            loss = sum(features.square().mean() for features in maps.values())
            loss = loss + 1e-8 * backbones.hoyer_penalty(backbone).to(device)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, len(spike_layers(backbone))


def measure(series: str, point: dict[str, Any], rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """A row of times and peak bytes for each way at one point of a series."""
    steps, num_layers = {}, 0
    for way, (activation, low_memory) in WAYS.items():
        steps[way], number = make_step(activation=activation, low_memory=low_memory, device=device, **point)
        steps[way]()
        num_layers = max(num_layers, number)
    memory = {way: peak_bytes(step, device) for way, step in steps.items()}
    value = num_layers if series == DEPTH else point[series.split(",")[0]]
    place = {"series": series, "value": value, **point, "spike_layers": num_layers}
    times = time_in_turn(steps, rounds, device)
    return [{**place, "way": way, **times[way], "peak_bytes": memory[way]} for way in WAYS]


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """PNG: time above, memory below, a column per series."""
    series = list(dict.fromkeys(row["series"] for row in rows))
    figure, axes = plt.subplots(2, len(series), figsize=(3.6 * len(series), 6), squeeze=False, layout="constrained")
    for column, name in enumerate(series):
        for way in WAYS:
            line = [row for row in rows if (row["series"], row["way"]) == (name, way)]
            x = [row["value"] for row in line]
            axes[0][column].plot(x, [row["seconds"] for row in line], marker="o", label=way)
            axes[1][column].plot(x, [row["peak_bytes"] / 2**20 for row in line], marker="o", label=way)
        axes[1][column].set_xlabel(name)
        for axis in axes[:, column]:
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("seconds per step")
    axes[1][0].set_ylabel("peak MiB of a step")
    axes[0][0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


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
    device = torch.device(options.device)
    rows: list[dict[str, Any]] = []
    for name, changes in SERIES.items():
        table = []
        for change in changes[: options.points]:
            found = measure(name, BASE | change, options.rounds, device)
            rows += found
            memory = {row["way"]: row["peak_bytes"] for row in found}
            table.append(
                [
                    f"{found[0]['value']:g}",
                    *(f"{row['seconds']:.3f}" for row in found),
                    *(f"{row['peak_bytes'] / 2**20:.1f}" for row in found),
                    f"{memory['hoyer low memory'] / memory['twin']:.2f}",
                ]
            )
        columns = [name, *(f"{way}, s" for way in WAYS), *(f"{way}, MiB" for way in WAYS), "low / twin"]
        print_table(name, columns, table)
    write_log(options.log, {"device": str(device), "rounds": options.rounds, "rows": rows})
    plot(options.log.with_suffix(".png"), rows)


if __name__ == "__main__":
    run_benchmark(main)
