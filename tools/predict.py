#!/usr/bin/env python3
"""Predicts with a saved run: draws boxes into images and videos, and writes COCO results.

Writes into a new folder, predictions/RUN or, if that is taken, predictions/RUN2, RUN3, ...:
  predictions.json  a detector's boxes, a list of COCO results; a classifier's image_id and class probabilities
  images.json       image ids, file names and categories; a detector's as a COCO file without annotations, so that
                    pycocotools reads both: COCO("images.json").loadRes("predictions.json")
  NAME.jpg ...      each image with its boxes; a video or camera as NAME.mp4, every frame of it an image
  NAME_spikes.png   with --spikes: where the network fires, of a video its first frame

Goes on past a file that cannot be read, and lists all of them at the end. Exit status: 0 all went well, 1 some
could not be read (completely), 2 nothing could, or the command line or the run is wrong.
"""

from __future__ import annotations

import argparse
import glob
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

import detection
from backbones import record_activity, spike_activity
from detection.checkpoint import Run
from detection.cli import run_tool
from detection.engine import progress_bar, spike_layers
from detection.files import write_whole
from detection.predict import ClassPrediction, ClassPredictor, Prediction, Predictor, check_unit_interval, read_image
from detection.spikemaps import draw_spike_maps
from detection.tasks import sum_activity

VIDEO_EXTENSIONS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
Item = TypeVar("Item")
Predict = Callable[[Sequence[Tensor]], Sequence[Prediction | ClassPrediction]]
WINDOW = 4  # batches that are read at a time, of which those of similar shape go together


class Output:
    """The files of one call; the folder is made when the first of them is written.

    Args:
        folder: where they go.
        predictor: says what the labels mean.
        draw: also the images themselves.
        spikes: also spike maps.
    """

    def __init__(self, folder: Path, predictor: Predictor, *, draw: bool, spikes: bool) -> None:
        self.folder, self.predictor, self.draw, self.spikes = folder, predictor, draw, spikes
        self.images: list[dict[str, Any]] = []
        self.results: list[dict[str, Any]] = []
        self._taken: set[str] = set()

    def add(self, prediction: Prediction | ClassPrediction, source: str, **more: Any) -> None:
        """Takes the prediction into the JSON files under the next image id."""
        width, height = prediction.size
        entry = {"id": len(self.images) + 1, "file_name": source, "width": width, "height": height} | more
        self.images.append(entry)
        if isinstance(prediction, Prediction):
            self.results += prediction.to_coco(entry["id"])
        else:
            self.results.append({"image_id": entry["id"], "probabilities": dict(prediction.top())})

    def add_image(self, prediction: Prediction | ClassPrediction, source: str) -> None:
        """Takes one image in, and draws what was asked for."""
        path = Path(source)
        more = {}
        if self.draw:
            suffix = path.suffix if path.suffix.lower() in (".jpg", ".jpeg", ".png") else ".png"
            drawn = self.free_name(path.stem, suffix)
            prediction.draw().save(drawn, quality=95)
            more = {"drawn": drawn.name}
        self.add(prediction, source, **more)
        if self.spikes:
            self.save_spikes(prediction, path.stem, path.name)

    def save_spikes(self, prediction: Prediction | ClassPrediction, stem: str, title: str) -> None:
        """A panel of spike maps."""
        maps = self.predictor.spike_maps(torch.from_numpy(prediction.image).permute(2, 0, 1))
        figure = draw_spike_maps(prediction.image, maps, title=title)
        figure.savefig(self.free_name(f"{stem}_spikes", ".png"))

    def free_name(self, stem: str, suffix: str) -> Path:
        """A path in the folder that no other file of this call has: images of one name may come from many folders."""
        number = 1
        while (name := f"{stem}{'' if number == 1 else f'_{number}'}{suffix}").lower() in self._taken:
            number += 1
        self._taken.add(name.lower())
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / name

    def write(self, info: dict[str, Any]) -> None:
        """Writes predictions.json and images.json."""
        self.folder.mkdir(parents=True, exist_ok=True)
        predictor, names = self.predictor, self.predictor.class_names
        content: dict[str, Any] = {"info": info, "images": self.images}
        if isinstance(predictor, ClassPredictor):
            content["classes"] = names
        else:
            info["category_ids"] = str(predictor.category_source or "1..K, in the order of the run's data.classes")
            content["annotations"] = []
            content["categories"] = [
                {"id": category_id, "name": name}
                for category_id, name in zip(predictor.category_ids, names, strict=True)
            ]
        write_whole(self.folder / "predictions.json", json.dumps(self.results).encode())
        write_whole(self.folder / "images.json", (json.dumps(content, indent=1) + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder, or zoo:NAME")
    parser.add_argument(
        "source",
        nargs="+",
        help="image, folder of images (not those below it), glob in quotes, video, or number of a camera, which runs "
        "until Ctrl+C",
    )
    parser.add_argument("--out", metavar="FOLDER", help="new folder for all that is written (default: see above)")
    parser.add_argument("--weights", choices=("last", "best", "ema"), default="last", help="default: last")
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: the first GPU, if there is one)")
    parser.add_argument(
        "--score", type=float, help="detections must score higher, in [0, 1]; may be lower than the recipe's (0.3)"
    )
    parser.add_argument("--nms", type=float, help="IoU above which the weaker box goes, in [0, 1] (the recipe's)")
    parser.add_argument("--batch-size", type=int, default=8, help="images at a time (8)")
    parser.add_argument("--spikes", action="store_true", help="draw spike maps too")
    parser.add_argument("--no-images", action="store_true", help="draw no images and videos, only write JSON")
    options = parser.parse_args()
    for name in ("score", "nms"):
        if getattr(options, name) is not None:
            check_unit_interval(f"--{name}", getattr(options, name))
    if options.batch_size < 1:
        raise ValueError(f"--batch-size: expected at least 1, got {options.batch_size}")
    run = Run.open(options.run)
    folder = Run.check_free(options.out) if options.out else free_folder(run)
    failures: list[str] = []
    images, videos = find_sources(options.source, failures)
    if not images and not videos:
        raise ValueError("; ".join(failures))
    predictor = detection.load(options.run, options.weights, options.device)
    if isinstance(predictor, ClassPredictor):
        if options.score is not None or options.nms is not None:
            raise ValueError(f"{options.run}: a classifier, which has no boxes for --score and --nms")
        asked: dict[str, Any] = {"batch_size": options.batch_size}
    else:
        score = 0.3 if options.score is None else options.score
        asked = {"score_threshold": score, "nms_threshold": options.nms, "batch_size": options.batch_size}
    if options.spikes and not spike_layers(predictor.model):
        activation = run.config.model.backbone.activation
        raise ValueError(f"--spikes: {options.run} has no spike layers (activation {activation})")

    console = Console(highlight=False, soft_wrap=True)
    output = Output(folder, predictor, draw=not options.no_images, spikes=options.spikes)
    description = f"predictions of {options.run}, {options.weights} weights"
    seconds, spikes, stopped = 0.0, {}, False

    def predict(pictures: Sequence[Tensor]) -> Sequence[Prediction | ClassPrediction]:
        nonlocal seconds, spikes
        started = time.perf_counter()
        with record_activity(predictor.model) as activity:
            predictions = predictor.predict(list(pictures), **asked)
        spikes = sum_activity([spikes, activity] if spikes else [activity])
        seconds += time.perf_counter() - started
        return predictions

    with progress_bar(console) as progress:
        try:
            bar = progress.add_task("images", total=len(images), visible=bool(images))
            for names in in_batches(images, WINDOW * options.batch_size):
                read = dict(read_images(names, failures))
                for name, prediction in zip(read, predict(list(read.values())), strict=True):
                    output.add_image(prediction, name)
                    console.print(f"{name}: {prediction}", markup=False)
                progress.advance(bar, len(names))
            bar = progress.add_task("frames", total=None, visible=bool(videos))
            for source in videos:
                sentence = film(source, output, predict, options.batch_size, failures, lambda: progress.advance(bar))
                if sentence is not None:
                    console.print(sentence, markup=False)
        except KeyboardInterrupt:
            stopped = True
        finally:  # also where a disk is full: the results so far are not lost with the pictures
            if output.images:
                output.write(
                    {"description": description} | {key: asked[key] for key in asked if asked[key] is not None}
                )
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    if output.images:
        report(output, seconds, spike_activity(spikes) if spikes else None)
    if stopped:
        until = "what was done until then is written" if output.images else "nothing was written"
        print(f"stopped before the end; {until}", file=sys.stderr)
        sys.exit(130)
    if failures and not output.images:
        raise ValueError("nothing could be read, so nothing was written")
    if failures:
        sys.exit(1)


def find_sources(sources: Sequence[str], failures: list[str]) -> tuple[list[str], list[str]]:
    """Image files, and video files and cameras, in the order given; a sentence for each source that gives none."""
    images: list[str] = []
    videos: list[str] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            found = sorted(str(file) for file in path.iterdir() if file.suffix.lower() in IMG_EXTENSIONS)
            if not found:
                failures.append(f"{source}: no images in this folder (allowed: {' '.join(IMG_EXTENSIONS)})")
        elif path.exists():
            found = [source]
        elif source.isdecimal():
            videos.append(source)
            continue
        elif glob.has_magic(source):
            found = [file for file in sorted(glob.glob(source, recursive=True)) if Path(file).is_file()]
            if not found:
                failures.append(f"{source}: no file matches")
        else:
            failures.append(f"{source}: no such file or folder")
            continue
        for file in found:
            (videos if Path(file).suffix.lower() in VIDEO_EXTENSIONS else images).append(file)
    # A file that two sources name is one image.
    return list(dict.fromkeys(images)), list(dict.fromkeys(videos))


def read_images(names: Sequence[str], failures: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Name and pixels of each image that can be read; a sentence for each other one."""
    for name in names:
        try:
            yield name, read_image(name)
        except ValueError as error:
            failures.append(str(error))


def film(
    source: str,
    output: Output,
    predict: Predict,
    batch_size: int,
    failures: list[str],
    advance: Callable[[], None],
) -> str | None:
    """Takes in every frame of a video or camera, drawn as a video; gives a sentence, None if nothing was read."""
    camera = source.isdecimal() and not Path(source).exists()
    name = f"camera {source}" if camera else source
    # OpenCV and FFmpeg write lines of their own about what is said in one sentence here.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    capture = cv2.VideoCapture(int(source) if camera else source)
    if not capture.isOpened():
        failures.append(f"{name}: {'no such camera, or it cannot be opened' if camera else 'no readable video'}")
        return None
    # What the header says; negative or 0 if it does not, as for a camera.
    expected = 0 if camera else int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    rate = capture.get(cv2.CAP_PROP_FPS)
    stem = f"camera{source}" if camera else Path(source).stem
    writer, drawn, number, num_found = None, {}, 0, 0
    try:
        # What a camera sees is drawn at once, whatever the batch size.
        for frames in in_batches(read_frames(capture), 1 if camera else batch_size):
            for prediction in predict(frames):
                if output.draw:
                    picture = np.asarray(prediction.draw())
                    if writer is None:
                        path = output.free_name(stem, ".mp4")
                        writer, drawn = open_writer(path, rate, picture), {"drawn": path.name}
                    writer.write(np.ascontiguousarray(picture[:, :, ::-1]))
                if output.spikes and number == 0:
                    output.save_spikes(prediction, stem, f"{Path(name).name}, first frame")
                output.add(prediction, source, frame=number, **drawn)
                number += 1
                num_found += len(prediction) if isinstance(prediction, Prediction) else 0
                advance()
    except KeyboardInterrupt:
        if not camera:  # which has no other end
            raise
    finally:
        capture.release()
        if writer is not None:
            writer.release()
    if not number:
        failures.append(f"{name}: not one frame could be read")
        return None
    if number < expected - 1:  # where the header has no count, OpenCV's estimate may be one too many
        failures.append(f"{name}: cut off or damaged, {number} of {expected} frames could be read; these are kept")
    return f"{name}: {number} frames" + ("" if is_classifier(output) else f", {num_found} detections")


def in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items in lists of `size`, the last one perhaps shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def is_classifier(output: Output) -> bool:
    """Whether there are classes and no boxes."""
    return isinstance(output.predictor, ClassPredictor)


def read_frames(capture: cv2.VideoCapture) -> Iterator[Tensor]:
    """The frames of a video, RGB (3, H, W) uint8, up to its end or the first one that cannot be read."""
    while True:
        found, frame = capture.read()
        if not found:
            return
        yield read_image(frame[:, :, ::-1])


def open_writer(path: Path, rate: float, picture: np.ndarray) -> cv2.VideoWriter:
    """An MPEG-4 video of pictures of that size.

    Raises:
        OSError: OpenCV cannot write one here.
    """
    height, width = picture.shape[:2]
    rate = rate if math.isfinite(rate) and rate > 0 else 25.0  # many cameras do not say
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), rate, (width, height))
    if not writer.isOpened():
        raise OSError(f"{path}: OpenCV cannot write MPEG-4 videos here; --no-images writes the boxes alone")
    return writer


def report(output: Output, seconds: float, activity: float | None) -> None:
    """Prints what was found, how fast, and where it lies."""
    parts = [f"{len(output.images)} images"]
    parts += [] if is_classifier(output) else [f"{len(output.results)} detections"]
    parts.append(f"{len(output.images) / seconds:.1f} images/s in the network")
    parts += [] if activity is None else [f"spike activity {100 * activity:.1f} %"]
    print("  ".join(parts))
    print(f"written to {output.folder}")
    if not is_classifier(output) and output.predictor.run.config.data.format == "coco":
        source = output.predictor.category_source
        if source is None:
            print(
                "category ids: 1..K, since the run's annotation file is not where it was in training", file=sys.stderr
            )


def free_folder(run: Run) -> Path:
    """predictions/RUN, with a number behind it if there is such a folder already."""
    name, number = run.folder.resolve().name, 1
    while (folder := Path("predictions") / f"{name}{'' if number == 1 else number}").exists():
        number += 1
    return folder


if __name__ == "__main__":
    run_tool(main)
