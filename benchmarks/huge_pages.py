#!/usr/bin/env python3
"""Seconds and memory of one training step on a CPU with pages of 4 KiB and with huge pages, one environment variable.

GLIBC_TUNABLES=glibc.malloc.hugetlb=1 (glibc 2.35 or newer) lets malloc ask for pages of 2 MiB where Linux gives them to
those who ask alone: where /sys/kernel/mm/transparent_hugepage/enabled says [madvise]. It is read when a process starts,
so that each way has a process of its own. They take turns, the medians count. Memory is the largest resident size of
the process.

    python benchmarks/huge_pages.py
    python benchmarks/huge_pages.py --networks vgg16 --batch 16 --width 0.25 --rounds 2 --log /tmp/quick.json
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import add_log_option, print_table, ratios_of, run_benchmark, write_log
from training import SIZES, make_step

VARIABLE = "GLIBC_TUNABLES"
WAYS = {"4 KiB pages": "", "huge pages": "glibc.malloc.hugetlb=1"}
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
BATCHES = {"vgg16": 128, "resnet18": 16, "resnet50": 8, "retinanet_resnet18": 8}

step: Callable[[], None]  # of a process of its own


def prepare(network: str, way: str, size: dict[str, Any]) -> None:
    """Build the step of this process, and take a first one."""
    global step
    step = make_step(network, way, **size, device=torch.device("cpu"))
    step()


def measure() -> tuple[float, float, int]:
    """Return seconds and processor seconds of one step, and the largest resident size of the process in bytes."""
    started = time.perf_counter(), time.process_time()
    step()
    seconds = time.perf_counter() - started[0], time.process_time() - started[1]
    return *seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compare(network: str, way: str, rounds: int, size: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A row for each kind of pages; every second round runs backwards."""
    pools = {}
    for pages, value in WAYS.items():
        pools[pages] = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        with mock.patch.dict(os.environ, {VARIABLE: value}):
            pools[pages].submit(prepare, network, way, size).result()
    found: dict[str, list[tuple[float, float, int]]] = {pages: [] for pages in pools}
    for current in range(rounds):
        for pages, pool in list(pools.items())[:: -1 if current % 2 else 1]:
            found[pages].append(pool.submit(measure).result())
    for pool in pools.values():
        pool.shutdown()
    rows = {}
    for pages, measured in found.items():
        seconds, cpu, peaks = zip(*measured, strict=True)
        rows[pages] = {"seconds": statistics.median(seconds), "cpu_seconds": statistics.median(cpu)}
        rows[pages] |= {"each_seconds": seconds, "each_cpu_seconds": cpu, "peak_bytes": max(peaks)}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["vgg16", "retinanet_resnet18"]
    parser.add_argument("--networks", nargs="+", choices=SIZES, default=default, help=f"default: {' '.join(default)}")
    parser.add_argument("--batch", type=int, help="images, in place of each network's own number")
    parser.add_argument("--width", type=float, default=1.0, help="of the backbones (default: 1)")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="bf16", help="default: bf16")
    parser.add_argument("--rounds", type=int, default=8, help="steps of each way, in turn (default: 8)")
    add_log_option(parser, "huge_pages", picture=False)
    options = parser.parse_args()
    for name in ("batch", "rounds"):
        if (getattr(options, name) or 1) < 1:
            parser.error(f"--{name} {getattr(options, name)}: at least 1")
    enabled = ENABLED.read_text().strip() if ENABLED.is_file() else "no such file"
    print(f"{ENABLED}: {enabled}")
    rows, ratios = [], []
    for network, way in itertools.product(options.networks, ("hoyer eager", "twin eager")):
        size = {"batch": options.batch or BATCHES[network], "side": SIZES[network][1], "width": options.width}
        size["precision"] = options.precision
        found = compare(network, way, options.rounds, size)
        rows += [{"network": network, **size, "way": way, "pages": pages, **row} for pages, row in found.items()]
        (quotient,) = ratios_of(found, [tuple(reversed(WAYS))])
        ratios.append({"network": network, "way": way, **quotient})
        lines = [
            [pages, f"{row['seconds']:.3f}", f"{row['cpu_seconds']:.3f}", f"{row['peak_bytes'] / 2**20:.0f}"]
            for pages, row in found.items()
        ]
        lines.append(["ratio", *(f"{quotient[name]:.2f}" for name in ("time", "cpu_time", "memory"))])
        print_table(f"{network}, {way}", ["pages", "seconds", "processor seconds", "peak MiB"], lines)
    result = {"rounds": options.rounds, "enabled": enabled, "libc": os.confstr("CS_GNU_LIBC_VERSION")}
    write_log(options.log, {**result, "threads": torch.get_num_threads(), "rows": rows, "ratios": ratios})


if __name__ == "__main__":
    run_benchmark(main)
