#!/usr/bin/env python3
"""Seconds and memory of a training step and of a forward pass: float, binary and adder networks of one topology.

The float network is the analogue twin; its convolutions are oneDNN's or cuDNN's, an adder layer runs over slices of
differences in PyTorch. The ways take turns, the medians count. Memory is that of tensors beyond weights and optimiser.
The quotient of an adder step to a float one belongs to the width: wider convolutions use the processor better.

    taskset -c 0 python benchmarks/arithmetic.py
    python benchmarks/arithmetic.py --network resnet18 --width 0.5 --log /tmp/wider.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import add_log_option, peak_bytes, print_table, ratios_of, run_benchmark, time_in_turn, write_log

import backbones

WAYS = {"float": "relu", "binary": None, "adder": None}  # the activation; None: that of the arithmetic


def make_passes(
    arithmetic: str, network: str, batch: int, width: float, device: torch.device
) -> dict[str, Callable[[], None]]:
    """A training step (forward, backward, SGD with momentum) and a forward pass in evaluation, on random images."""
    torch.manual_seed(0)
    backbone = backbones.create(network, stem="cifar", width=width, arithmetic=arithmetic, activation=WAYS[arithmetic])
    model = backbones.Classifier(backbone, num_classes=10).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images, labels = torch.rand(batch, 3, 32, 32, device=device), torch.arange(batch, device=device) % 10

    def step() -> None:
        F.cross_entropy(model.train()(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def forward() -> None:
        model.eval()(images)

    return {"training step": step, "forward": forward}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--network", default="vgg11", choices=[name for name in backbones.names() if "mobile" not in name]
    )
    parser.add_argument("--batch", type=int, default=32, help="images of 32x32 (default: 32)")
    parser.add_argument("--width", type=float, default=0.25, help="default: 0.25")
    parser.add_argument("--rounds", type=int, default=5, help="passes of each, in turn (default: 5)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_log_option(parser, "arithmetic", picture=False)
    options = parser.parse_args()
    for name in ("batch", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: at least 1")
    device = torch.device(options.device)
    passes = {way: make_passes(way, options.network, options.batch, options.width, device) for way in WAYS}
    rows, ratios = [], []
    for kind in ("training step", "forward"):
        steps = {way: found[kind] for way, found in passes.items()}
        for step in steps.values():
            step()
        memory = {way: peak_bytes(step, device) for way, step in steps.items()}
        found = {
            way: row | {"peak_bytes": memory[way]} for way, row in time_in_turn(steps, options.rounds, device).items()
        }
        rows += [{"pass": kind, "way": way, **row} for way, row in found.items()]
        quotients = ratios_of(found, [("binary", "float"), ("adder", "float")])
        ratios += [{"pass": kind, **quotient} for quotient in quotients]
        table = [
            [way, f"{row['seconds']:.3f}", f"{row['cpu_seconds']:.3f}", f"{row['peak_bytes'] / 2**20:.1f}"]
            for way, row in found.items()
        ]
        title = f"{kind}, {options.network} x{options.width:g}, {options.batch} images of 32x32 on {device}"
        print_table(title, ["arithmetic", "seconds", "processor seconds", "peak MiB"], table)
        for each in quotients:
            print(f"{each['ours']} / {each['other']}: time {each['time']:.2f}, memory {each['memory']:.2f}")
    settings = {"network": options.network, "batch": options.batch, "width": options.width}
    write_log(
        options.log, {"device": str(device), "rounds": options.rounds, **settings, "rows": rows, "ratios": ratios}
    )


if __name__ == "__main__":
    run_benchmark(main)
