#!/usr/bin/env python3
"""What does the analysis cost? Seconds of a plain evaluation and of one with every layer counted, same images.

The ratio is that of processor time, which other work on the machine hardly changes: use --data.workers 0, since loader
processes are not in it. Times by the clock stand beside it.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from common import add_log_option, write_log

from backbones import Certificate, certify, record_layers
from detection.analysis import analogue_parts
from detection.cli import parse_recipe, recipe_parser, run_tool
from detection.data import DetectionDataset
from detection.models import build_detector
from detection.tasks import evaluate_detector, evaluation_loader, read_data


def main() -> None:
    parser = recipe_parser(__doc__)
    parser.add_argument("--images", type=int, help="first so many evaluation images (default: all)")
    parser.add_argument("--repeats", type=int, default=3, help="of each of the two (default: 3)")
    add_log_option(parser, "analysis", picture=False)
    config, options = parse_recipe(parser, sys.argv[1:])
    set_seed(config.train.seed)
    train, val = read_data(config)
    config.data.classes = list(train.annotations.categories)
    val = DetectionDataset(replace(val.annotations, records=val.annotations.records[: options.images]))
    accelerator = Accelerator(mixed_precision=config.train.precision)
    model = accelerator.unwrap_model(accelerator.prepare(build_detector(config)))
    settle(model, val, config.train.batch_size)
    loader = evaluation_loader(val, config, accelerator)

    def plain() -> None:
        evaluate_detector(model, loader, val, config, accelerator)

    def analysis() -> None:
        with record_layers(model) as measured:
            evaluate_detector(model, loader, val, config, accelerator)
        certificates.append(certify(measured, analogue_parts(config, model)))

    certificates: list[Certificate] = []
    cpu: dict[str, list[float]] = {"plain": [], "analysis": []}
    clock: dict[str, list[float]] = {"plain": [], "analysis": []}
    plain()  # warms caches up
    for repeat in range(options.repeats):
        pair = [("plain", plain), ("analysis", analysis)]
        for name, function in pair if repeat % 2 == 0 else reversed(pair):
            started = time.process_time(), time.perf_counter()
            function()
            cpu[name].append(round(time.process_time() - started[0], 3))
            clock[name].append(round(time.perf_counter() - started[1], 3))
    medians = {name: statistics.median(values) for name, values in cpu.items()}
    result = {
        "num_images": len(val),
        "plain_cpu_seconds": medians["plain"],
        "analysis_cpu_seconds": medians["analysis"],
        "analysis_over_plain": round(medians["analysis"] / medians["plain"], 3),
        "all_cpu_seconds": cpu,
        "all_clock_seconds": clock,
        "binary": certificates[-1].is_binary,
    }
    print(json.dumps(result, indent=2))
    write_log(options.log, result)


@torch.no_grad()
def settle(model: torch.nn.Module, dataset: DetectionDataset, batch_size: int, num_batches: int = 5) -> None:
    """Running averages of random weights: without them hardly a neuron would fire."""
    device = next(model.parameters()).device
    model.train()
    for start in range(0, min(num_batches * batch_size, len(dataset)), batch_size):
        items = [dataset[index] for index in range(start, min(start + batch_size, len(dataset)))]
        images = [image.to(device) for image, _ in items]
        targets = [{key: target[key].to(device) for key in ("boxes", "labels")} for _, target in items]
        model(images, targets)
    model.eval()


if __name__ == "__main__":
    run_tool(main)
