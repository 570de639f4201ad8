"""Predict with a saved run: draw boxes into images and videos, and write COCO results.

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
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from detection.cli.common import check_run, make_parser
from detection.records import Weights

if TYPE_CHECKING:
    from torch import Tensor

    from detection.cli.pictures import Output, Session
    from detection.predict import Predictor
    from detection.runs import Run

VIDEO_EXTENSIONS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
THRESHOLDS = {"score": "score_threshold", "nms": "nms_threshold"}
SCORE = 0.3
WINDOW = 4  # batches that are read at a time, of which those of similar shape go together


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Predict as a command line says."""
    options = build_parser(prog).parse_args(arguments)
    check_run(options.run)
    failures: list[str] = []
    images, videos = find_sources(options.source, failures)
    if not images and not videos:
        raise ValueError("; ".join(failures))
    if options.batch_size < 1:
        raise ValueError(f"--batch-size: expected at least 1, got {options.batch_size}")

    import detection
    from backbones import spike_layers
    from detection.cli.pictures import Output, Session
    from detection.models.inference import check_unit_interval
    from detection.runs import Run

    for name in THRESHOLDS:
        if getattr(options, name) is not None:
            check_unit_interval(f"--{name}", getattr(options, name))
    run = Run.open(options.run)
    folder = Run.check_free(options.out) if options.out else free_folder(run)
    predictor = detection.load(options.run, options.weights, options.device)
    if options.spikes and not spike_layers(predictor.model):
        activation = run.config.model.backbone.activation
        raise ValueError(f"--spikes: {options.run} has no spike layers (activation {activation})")
    asked = {**thresholds(predictor, options), "batch_size": options.batch_size}
    output = Output(folder, predictor, draw=not options.no_images, spikes=options.spikes)
    info = {"description": f"predictions of {options.run}, {options.weights} weights"}
    info |= {key: value for key, value in asked.items() if value is not None}
    session = Session(output, asked, failures)
    stopped = predict_all(session, images, videos, info)
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    if output.images:
        print_summary(session)
    if stopped:
        until = "what was done until then is written" if output.images else "nothing was written"
        print(f"stopped before the end; {until}", file=sys.stderr)
        sys.exit(130)
    if failures and not output.images:
        raise ValueError("nothing could be read, so nothing was written")
    if failures:
        sys.exit(1)


def build_parser(prog: str | None) -> argparse.ArgumentParser:
    """Return the parser of the verb."""
    parser = make_parser(__doc__, prog)
    parser.add_argument("run", metavar="RUN", help="run folder, or zoo:NAME")
    parser.add_argument(
        "source",
        metavar="SOURCE",
        nargs="+",
        help="image, folder of images (not those below it), glob in quotes, video, or number of a camera, which runs "
        "until Ctrl+C",
    )
    parser.add_argument("--out", metavar="FOLDER", help="new folder for all that is written (default: see above)")
    parser.add_argument("--weights", choices=get_args(Weights), default="last", help="default: last")
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: the first GPU, if there is one)")
    parser.add_argument(
        "--score", type=float, help=f"detections must score higher, in [0, 1]; may be lower than the recipe's ({SCORE})"
    )
    parser.add_argument("--nms", type=float, help="IoU above which the weaker box goes, in [0, 1] (the recipe's)")
    parser.add_argument("--batch-size", type=int, default=8, help="images at a time (8)")
    parser.add_argument("--spikes", action="store_true", help="draw spike maps too")
    parser.add_argument("--no-images", action="store_true", help="draw no images and videos, only write JSON")
    return parser


def thresholds(predictor: Predictor, options: argparse.Namespace) -> dict[str, float | None]:
    """Return the thresholds of a command line as `predictor.predict` takes them.

    Raises:
        ValueError: one is given that the task does not have.
    """
    given = {name: getattr(options, name) for name in THRESHOLDS}
    for name, value in given.items():
        if value is not None and THRESHOLDS[name] not in predictor.options:
            raise ValueError(f"{options.run}: trained for {predictor.task.name}, which has no boxes for --{name}")
    given["score"] = SCORE if given["score"] is None else given["score"]
    return {THRESHOLDS[name]: value for name, value in given.items() if THRESHOLDS[name] in predictor.options}


def predict_all(session: Session, images: Sequence[str], videos: Sequence[str], info: dict[str, Any]) -> bool:
    """Predict on all images, then on all videos, and write the JSON files; return whether Ctrl-C ended it before."""
    from rich.console import Console

    from detection.cli.film import film
    from detection.cli.pictures import in_batches
    from detection.training.display import progress_bar

    console, output = Console(highlight=False, soft_wrap=True), session.output
    with progress_bar(console) as progress:
        try:
            bar = progress.add_task("images", total=len(images), visible=bool(images))
            for names in in_batches(images, WINDOW * session.asked["batch_size"]):
                read = dict(read_images(names, session.failures))
                for name, prediction in zip(read, session.predict(list(read.values())), strict=True):
                    output.add_image(prediction, name)
                    console.print(f"{name}: {prediction}", markup=False)
                progress.advance(bar, len(names))
            bar = progress.add_task("frames", total=None, visible=bool(videos))
            for source in videos:
                sentence = film(source, session, lambda bar=bar: progress.advance(bar))
                if sentence is not None:
                    console.print(sentence, markup=False)
        except KeyboardInterrupt:
            return True
        finally:  # also where a disk is full: the results so far are not lost with the pictures
            if output.images:
                output.write(info)
    return False


def find_sources(sources: Sequence[str], failures: list[str]) -> tuple[list[str], list[str]]:
    """Return image files, and video files and cameras, in the order given.

    `failures` gets a sentence for each source that gives none.
    """
    images: list[str] = []
    videos: list[str] = []
    for source in sources:
        if source.isdecimal() and not Path(source).exists():
            videos.append(source)
            continue
        for file in _files_of(source, failures):
            (videos if Path(file).suffix.lower() in VIDEO_EXTENSIONS else images).append(file)
    # A file that two sources name is one image.
    return list(dict.fromkeys(images)), list(dict.fromkeys(videos))


def _files_of(source: str, failures: list[str]) -> list[str]:
    path = Path(source)
    if path.is_dir():
        from torchvision.datasets.folder import IMG_EXTENSIONS

        found = sorted(str(file) for file in path.iterdir() if file.suffix.lower() in IMG_EXTENSIONS)
        if not found:
            failures.append(f"{source}: no images in this folder (allowed: {' '.join(IMG_EXTENSIONS)})")
        return found
    if path.exists():
        return [source]
    if glob.has_magic(source):
        found = [file for file in sorted(glob.glob(source, recursive=True)) if Path(file).is_file()]
        if not found:
            failures.append(f"{source}: no file matches")
        return found
    failures.append(f"{source}: no such file or folder")
    return []


def read_images(names: Sequence[str], failures: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield name and pixels of each image that can be read; `failures` gets a sentence for each other one."""
    from detection.data.pictures import read_image

    for name in names:
        try:
            yield name, read_image(name)
        except ValueError as error:
            failures.append(str(error))


def print_summary(session: Session) -> None:
    """Print what was found, how fast, and where it lies."""
    output: Output = session.output
    parts = [f"{len(output.images)} images"]
    parts += [] if output.num_found is None else [f"{output.num_found} detections"]
    parts.append(f"{len(output.images) / session.seconds:.1f} images/s in the network")
    activity = session.activity()
    parts += [] if activity is None else [f"spike activity {100 * activity:.1f} %"]
    print("  ".join(parts))
    print(f"written to {output.folder}")
    task, data = output.predictor.task, output.predictor.run.config.data
    if data.format == "coco" and getattr(task, "category_source", data) is None:
        print("category ids: 1..K, since the run's annotation file is not where it was in training", file=sys.stderr)


def free_folder(run: Run) -> Path:
    """Return predictions/RUN, with a number behind it if there is such a folder already."""
    name, number = run.folder.resolve().name, 1
    while (folder := Path("predictions") / f"{name}{'' if number == 1 else number}").exists():
        number += 1
    return folder
