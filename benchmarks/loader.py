#!/usr/bin/env python3
"""Does loading hold up training? Images per second of the loader alone and of the training step alone, same recipe."""

from __future__ import annotations

import itertools
import json
import sys
import time

import torch
from accelerate.utils import set_seed
from common import add_log_option, write_log

from backbones import hoyer_penalty
from detection.cli import parse_recipe, recipe_parser, run_tool
from detection.data import build_loader
from detection.engine import build_optimizer
from detection.models import build_detector
from detection.tasks import read_data


def main() -> None:
    parser = recipe_parser(__doc__)
    parser.add_argument("--batches", type=int, default=40, help="batches to load (default: 40)")
    parser.add_argument("--steps", type=int, default=8, help="training steps to time, after two more (default: 8)")
    add_log_option(parser, "loader", picture=False)
    config, options = parse_recipe(parser, sys.argv[1:])
    set_seed(config.train.seed)
    train, _ = read_data(config)
    config.data.classes = list(train.annotations.categories)
    loader = build_loader(
        train,
        batch_size=config.train.batch_size,
        workers=config.data.workers,
        shuffle=True,
        seed=config.train.seed,
        aspect_groups=config.data.aspect_groups,
    )

    # The workers run ahead: the clock starts after the first batches that they had prepared in advance.
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    ahead = 2 * max(1, config.data.workers)
    kept = [next(batches) for _ in range(ahead)]
    started, num_images = time.perf_counter(), 0
    for images, _ in itertools.islice(batches, options.batches):
        num_images += len(images)
    loading = num_images / (time.perf_counter() - started)
    del batches, loader

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_detector(config).to(device).train()
    optimizer = build_optimizer(model, config.optimizer)
    num_images = 0
    for step, (images, targets) in enumerate(itertools.islice(itertools.cycle(kept), options.steps + 2)):
        if step == 2:
            synchronise(device)
            started, num_images = time.perf_counter(), 0
        images = [image.to(device) for image in images]
        targets = [
            {key: value.to(device) if torch.is_tensor(value) else value for key, value in target.items()}
            for target in targets
        ]
        with torch.autocast(device, torch.bfloat16, enabled=config.train.precision == "bf16"):
            losses = model(images, targets)
        loss = sum(losses.values()) + config.hoyer.weight * hoyer_penalty(model, config.hoyer.reduction).to(device)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        num_images += len(images)
    synchronise(device)
    training = num_images / (time.perf_counter() - started)

    result = {
        "loader_images_per_second": round(loading, 2),
        "step_images_per_second": round(training, 2),
        "loader_over_step": round(loading / training, 2),
        "workers": config.data.workers,
        "batch_size": config.train.batch_size,
    }
    print(json.dumps(result, indent=2))
    write_log(options.log, result)


def synchronise(device: str) -> None:
    """Waits for the device, so that the clock sees its work."""
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    run_tool(main)
