#!/usr/bin/env python3
"""Milliseconds of processor time per image of `hoyer-det predict`, part by part, and images per second end to end.

Networks of the zoo on the images of BCCD, as JPEG and as PNG, and of CIFAR-10. The command runs as a whole, in this
process; functions on its way are timed, each without those that it calls and that are timed, too, so that the parts
add up to the whole. The start, which is imports and reading the weights, is in none of it.

    python benchmarks/predict.py --bccd data/bccd --cifar10 data/cifar10
    python benchmarks/predict.py --before LOG     # beside a log of another version of the package
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import shutil
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from common import add_log_option, plot_bars, print_table, run_benchmark, write_log
from PIL import Image

import detection.predict
from detection.cli import main as hoyer_det
from detection.cli import predict as verb
from detection.cli.call import Call
from detection.cli.output import Output
from detection.files import read_text
from detection.tasks.predictions import ClassPrediction, Prediction

REST = "everything else"
PARTS = ("decode", "resize", "network", "boxes", "draw", "encode and write", "spike maps", "results", REST)
BCCD, CIFAR10 = "zoo:bccd_retinanet_resnet18_spiking", "zoo:cifar10_vgg11"
# network, data, suffix of the image files, options of the command
CASES: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "BCCD, JPEG": (BCCD, "bccd", ".jpg", ()),
    "BCCD, PNG": (BCCD, "bccd", ".png", ()),
    "BCCD, --spikes": (BCCD, "bccd", ".jpg", ("--spikes",)),
    "CIFAR-10": (CIFAR10, "cifar10", ".jpg", ()),
}


class Clock:
    """Processor time of functions, each without the timed ones that it calls.

    Attributes:
        seconds: by part.
    """

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._now, self._since, self._stack = REST, time.process_time(), contextlib.ExitStack()

    def _turn(self, part: str) -> str:
        """Let the time count for another part from now on, and return the one before."""
        before, now = self._now, time.process_time()
        self.seconds[before] += now - self._since
        self._now, self._since = part, now
        return before

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Time a function or method as a part until the clock is closed."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **options: Any) -> Any:
            before = self._turn(part)
            try:
                return function(*args, **options)
            finally:
                self._turn(before)

        self._stack.callback(setattr, owner, name, function)
        setattr(owner, name, timed)

    def close(self) -> None:
        """Put back all functions."""
        self._turn(REST)
        self._stack.close()


def watch_call(clock: Clock, call: Call) -> None:
    """Time the parts of a call of the command."""
    model, task = call.predictor.model, call.predictor.task
    clock.watch(verb, "pixels_of_file", "decode")  # headers, so that no batch becomes too large
    clock.watch(detection.predict, "read_picture", "decode")
    clock.watch(task, "prepare", "resize")
    detector = hasattr(model, "transform")
    clock.watch(model, "forward", "boxes" if detector else "network")  # all of a detector but these:
    if detector:
        clock.watch(model.transform, "forward", "resize")
        for part in (model.backbone, model.head):
            clock.watch(part, "forward", "network")
    for kind in (Prediction, ClassPrediction):
        clock.watch(kind, "draw", "draw")
    clock.watch(Image.Image, "save", "encode and write")
    clock.watch(Call, "save_spikes", "spike maps")
    for name in ("add", "finish", "close"):
        clock.watch(Output, name, "results")


def run(network: str, images: Path, folder: Path, options: tuple[str, ...]) -> tuple[float, dict[str, float]]:
    """Return the seconds of a call of the command without its start, and processor seconds by part."""
    predict_all, seconds, parts = verb.predict_all, 0.0, {}

    def timed(call: Call, *sources: Any) -> int:
        nonlocal seconds, parts
        clock, started = Clock(), time.perf_counter()
        watch_call(clock, call)
        try:
            return predict_all(call, *sources)
        finally:
            clock.close()
            seconds, parts = time.perf_counter() - started, dict(clock.seconds)

    verb.predict_all = timed
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            hoyer_det(["predict", network, str(images), "--out", str(folder), "--device", "cpu", *options])
    finally:
        verb.predict_all = predict_all
    return seconds, parts


def write_images(paths: list[Path], folder: Path, suffix: str) -> Path:
    """Write the images into a folder, decoded and encoded anew if the suffix is another one."""
    folder.mkdir()
    for index, path in enumerate(paths):
        copy = folder / f"{index:04}{suffix}"
        if suffix == path.suffix:
            shutil.copy(path, copy)
        else:
            Image.open(path).save(copy)
    return folder


def measure(case: str, images: Path, rounds: int) -> list[dict[str, Any]]:
    """Return a row per part of the medians over some calls; one more before them is not counted."""
    network, options = CASES[case][0], CASES[case][3]
    number, found = len(list(images.iterdir())), []
    for _ in range(rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            found.append(run(network, images, Path(folder) / "out", options))
    found = found[1:]
    speed = number / statistics.median(seconds for seconds, _ in found)
    place = {"case": case, "network": network, "images": number, "images_per_second": speed}
    parts = [part for part in PARTS if any(part in each for _, each in found)]
    return [
        {**place, "part": part, "cpu_milliseconds": 1e3 * statistics.median(each[part] for _, each in found) / number}
        for part in parts
    ]


def tell(rows: list[dict[str, Any]], before: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Print a table per case, and return its bars."""
    earlier = {(row["case"], row["part"]): row["cpu_milliseconds"] for row in before}
    panels = {}
    for case in dict.fromkeys(row["case"] for row in rows):
        here = {row["part"]: row["cpu_milliseconds"] for row in rows if row["case"] == case}
        once = {part: earlier[case, part] for part in here if (case, part) in earlier}
        lines = [[part, f"{value:.1f}", f"{once[part]:.1f}" if part in once else ""] for part, value in here.items()]
        lines.append(["all", f"{sum(here.values()):.1f}", f"{sum(once.values()):.1f}" if once else ""])
        print_table(f"{case}, ms of processor time per image", ["part", "now", "before"], lines)
        bars = panels[f"{case}, ms of processor time per image"] = {}
        for part, value in here.items():
            bars |= {f"{part}, before": once[part]} if part in once else {}
            bars |= {part: value}
    return panels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bccd", type=Path, default=Path("data/bccd"), help="VOC folder (default: data/bccd)")
    parser.add_argument("--cifar10", type=Path, default=Path("data/cifar10"), help="(default: data/cifar10)")
    parser.add_argument("--images", type=int, default=64, help="of BCCD, four times as many of CIFAR-10 (default: 64)")
    parser.add_argument("--rounds", type=int, default=3, help="calls of each case (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--before", type=Path, metavar="LOG", help="log of another version, to stand beside this one")
    add_log_option(parser, "predict")
    options = parser.parse_args()
    for name in ("images", "rounds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: at least 1")
    before = [] if options.before is None else json.loads(read_text(options.before))["rows"]
    torch.set_num_threads(options.threads)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for index, (case, (_, kind, suffix, more)) in enumerate(CASES.items()):
            pattern, times = {"bccd": ("BCCD/JPEGImages/*.jpg", 1), "cifar10": ("test/*/*.*", 4)}[kind]
            root = getattr(options, kind)
            paths = sorted(root.glob(pattern))[: options.images * times]
            if not paths:
                raise FileNotFoundError(f"{root}: no {pattern} there; --{kind} names the folder")
            if "--spikes" in more:
                paths = paths[: max(1, options.images // 4)]
            images = write_images(paths, Path(place) / str(index), suffix)
            rows += measure(case, images, options.rounds)
    write_log(options.log, {"threads": options.threads, "rows": rows, "before": before})
    plot_bars(options.log.with_suffix(".png"), tell(rows, before))


if __name__ == "__main__":
    run_benchmark(main)
