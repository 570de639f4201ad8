"""Predict with a saved run or an exported file: draw into images, films and recordings of events, write COCO results.

Writes into a new folder, predictions/RUN or, if that is taken, predictions/RUN2, RUN3, ...:
  predictions.json  a detector's boxes, a list of COCO results; a classifier's image_id and the
                    five likeliest classes with their probabilities
  images.json       image ids, file names and categories; a detector's as a COCO file without annotations, so that
                    pycocotools reads both: COCO("images.json").loadRes("predictions.json")
  NAME.jpg ...      each image with its boxes; a film or camera as NAME.mp4, every frame of it an image; so a
                    recording of events, a frame for each of the recipe's windows (to a classifier it is one image)
  NAME_spikes.png   with --spikes: where the network fires, of a film its first frame

Goes on past a file that cannot be read, and lists all of them at the end. What was done when it is stopped, by Ctrl-C,
SIGTERM or a full disk, is written, and --resume FOLDER goes on from there. Exit status: 0 all went well, 1 some files
could not be read (completely), 2 none could, or the command line or the run is wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from detection.cli.call import Call
from detection.cli.common import Parser, check_run, locate
from detection.cli.output import JOURNAL, Output, arguments_of
from detection.files import is_exported, is_recording, kind_of
from detection.records import Weights
from detection.sources import find_sources
from detection.text import say

THRESHOLDS = {"score": "score_threshold", "nms": "nms_threshold"}
SCORE = 0.3
WINDOW = 4  # batches that are read at a time, of which those of similar shape go together


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Predict as a command line says."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser(prog)
    alone = Parser(None, parser.prog, add_help=False)  # the others need a run and a source
    alone.add_argument("--resume")
    resumed = alone.parse_known_args(arguments)[0].resume
    if resumed is not None:
        if arguments not in (["--resume", resumed], [f"--resume={resumed}"]):
            parser.error(f"--resume {resumed} has its own command line: leave all else out")
        arguments = arguments_of(Path(resumed))
    options = parser.parse_args(arguments)
    options.out = options.out if resumed is None else resumed
    if not is_exported(options.run):
        check_run(options.run)
    failures: list[str] = []
    images, films = find_sources(options.source, failures)
    if not images and not films:
        raise ValueError("; ".join(failures))
    if options.batch_size < 1:
        raise ValueError(f"--batch-size: expected at least 1, got {options.batch_size}")
    call = prepare(options, arguments, failures)
    if call.predictor.task.windows:
        films = [name for name in images if is_recording(name)] + films
        images = [name for name in images if name not in films]
    number = predict_all(call, images, films)
    for failure in failures:
        say(f"failed: {failure}", error=True)
    output = call.output
    if output.num_images:
        print_summary(call)
    if number:
        until = f"what was done until then is written, and --resume {output.folder} goes on from there"
        say(f"stopped before the end; {until if output.num_images else 'nothing was written'}", error=True)
        sys.exit(128 + number)
    if failures and not output.num_images:
        raise ValueError("nothing could be read, so nothing was written")
    if failures:
        sys.exit(1)


def build_parser(prog: str | None) -> Parser:
    """Return the parser of the verb."""
    parser = Parser(__doc__, prog, usage="%(prog)s RUN SOURCE ... [options]\n       %(prog)s --resume FOLDER")
    parser.add_argument("run", metavar="RUN", help="run folder, zoo:NAME, or a file by `hoyer-det export`")
    help = (
        "image, folder of images (not those below it), glob in quotes, film, recording of events, or number of a "
        "camera, which runs until Ctrl+C"
    )
    parser.add_argument("source", metavar="SOURCE", nargs="+", help=help)
    help = "new folder for all that is written, or one of a call like this that was stopped (default: see above)"
    parser.add_argument("--out", metavar="FOLDER", help=help)
    parser.add_argument("--resume", metavar="FOLDER", help="go on with the call that was stopped in this folder")
    parser.add_argument("--weights", choices=get_args(Weights), default="last", help="default: last")
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: the first GPU, if there is one)")
    help = f"detections must score higher, in [0, 1]; may be lower than the recipe's ({SCORE})"
    parser.add_argument("--score", type=float, help=help)
    parser.add_argument("--nms", type=float, help="IoU above which the weaker box goes, in [0, 1] (the recipe's)")
    parser.add_argument("--batch-size", type=int, default=8, help="images at a time; fewer where they are large (8)")
    parser.add_argument("--spikes", action="store_true", help="draw spike maps too")
    parser.add_argument("--no-images", action="store_true", help="draw no images and films, only write JSON")
    return parser


def prepare(options: argparse.Namespace, arguments: Sequence[str], failures: list[str]) -> Call:
    """Return the call that a command line asks for.

    Raises:
        FileExistsError: there is something in its folder already, and it is not what a call like this left.
        ValueError: an option that the run does not have, or out of range.
    """
    import detection
    from backbones import spike_layers, zoo
    from detection.models.inference import check_unit_interval
    from detection.runs import Run

    given = {name: getattr(options, name) for name in THRESHOLDS}
    for name, value in given.items():
        if value is not None:
            check_unit_interval(f"--{name}", value)
    path = locate(options.run)
    run = None if is_exported(path) else Run.open(options.run)
    name = (zoo.name_of(path.parent) or path.stem) if run is None else run.folder.resolve().name
    folder = free_folder(name) if options.out is None else Path(options.out)
    if not (folder / JOURNAL).is_file():
        Run.check_free(folder)
    predictor = detection.load(options.run, options.weights, options.device)
    config = predictor.task.config
    if options.spikes and not spike_layers(predictor.model):
        reason = "a file shows none" if run is None else f"activation {config.model.backbone.activation}"
        raise ValueError(f"--spikes: {options.run} has no spike layers ({reason})")
    for name, value in given.items():
        if value is not None and THRESHOLDS[name] not in predictor.options:
            raise ValueError(f"{options.run}: trained for {predictor.task.name}, which has no boxes for --{name}")
    given["score"] = SCORE if given["score"] is None else given["score"]
    thresholds = {THRESHOLDS[name]: value for name, value in given.items() if THRESHOLDS[name] in predictor.options}
    asked = {**thresholds, "batch_size": options.batch_size}
    labels = predictor.task.describe_labels(run)
    weights = "" if run is None else f", {options.weights} weights"
    info = {"description": f"predictions of {options.run}{weights}"}
    info |= {key: value for key, value in asked.items() if value is not None}
    info |= {key: value for key, value in labels.items() if isinstance(value, str)}
    head = {"info": info, **{key: value for key, value in labels.items() if not isinstance(value, str)}}
    checksum = (
        hashlib.sha256(path.read_bytes()).hexdigest()
        if run is None
        else run.checksums()[f"{options.weights}.safetensors"]
    )
    facts = {"weights": checksum, "thresholds": thresholds}
    facts |= {"--no-images": options.no_images, "--spikes": options.spikes}
    output = Output(folder, {**facts, "arguments": list(arguments)}, head)
    return Call(predictor, output, asked, failures, draw=not options.no_images, spikes=options.spikes)


def predict_all(call: Call, images: Sequence[str], films: Sequence[str]) -> int:
    """Predict on all images, then on all films, and write the files; return the signal that ended it before, or 0.

    Raises:
        OSError: something could not be written; what was done until then is.
    """
    from rich.console import Console

    from detection.cli.film import film
    from detection.tasks.predictions import in_batches
    from detection.training.display import progress_bar
    from detection.training.signals import StopSignals

    stop, output, complete = StopSignals(), call.output, False
    films = [name for name in films if name not in output.done]
    with stop.watch():
        try:
            with stop.interruptible(True), progress_bar(Console()) as progress:
                bar = progress.add_task("images", total=len(images), visible=bool(images))
                # In the batches of an uninterrupted call, on which the last digits depend.
                for names in in_batches(images, WINDOW * call.options["batch_size"], pixels_of_file):
                    if not output.done.issuperset(names):
                        call.add_images(names)
                    progress.advance(bar, len(names))
                bar = progress.add_task("frames", total=None, visible=bool(films))
                for source in films:
                    sentence = film(source, call, lambda bar=bar: progress.advance(bar))
                    if sentence is not None:
                        say(sentence)
                    if stop.received == signal.SIGTERM:  # Ctrl-C has ended a camera alone
                        raise KeyboardInterrupt
            complete = True
        except KeyboardInterrupt:
            return stop.received or signal.SIGINT
        except OSError as error:
            until = f"; what was done until then is written, and --resume {output.folder} goes on from there"
            raise OSError(f"{error}{until if output.num_images else ''}") from error
        finally:
            output.close(complete=complete)
    return 0


def pixels_of_file(name: str) -> int:
    """Return how many pixels an image has by its header; 0 where it has none."""
    from detection.data.image_files import stored_size

    size = stored_size(Path(name)) if kind_of(name) == "a file" else None
    return 0 if size is None else size[0] * size[1]


def print_summary(call: Call) -> None:
    """Print what was found, how fast, and where it lies."""
    from backbones import spike_activity

    output = call.output
    parts = [f"{output.num_images} images"]
    parts += [] if output.num_found is None else [f"{output.num_found} detections"]
    if call.number:
        parts.append(f"{call.number / call.seconds:.1f} images/s in the network")
    parts += [f"spike activity {100 * spike_activity(call.activity):.1f} %"] if call.activity else []
    print("  ".join(parts))
    say(f"written to {output.folder}")
    task, data = call.predictor.task, call.predictor.task.config.data
    if data.format == "coco" and getattr(task, "category_source", data) is None:
        print("category ids: 1..K, since the run's annotation file is not where it was in training", file=sys.stderr)


def free_folder(name: str) -> Path:
    """Return predictions/NAME, with a number behind it if there is such a folder already."""
    number = 1
    while (folder := Path("predictions") / f"{name}{'' if number == 1 else number}").exists():
        number += 1
    return folder
