"""Visitors of the page: what each has given, and what the networks have made of it."""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from detection.draw import brightest_rate, draw_spike_maps
from detection.web.answers import Answer, Network
from detection.web.sources import Source

ALL_STAGES = "all stages"
MOST_VISITS = 32  # whose answers are kept; the one that was away for longest goes first
KEPT = 60  # files of a visitor
NO_PIXELS = np.zeros((0, 0, 3), np.uint8)
Tell = Callable[[int, int], None]
Run = Callable[[Callable[[], Any]], Any]


class Visit:
    """All that one visitor sees.

    Args:
        folder: for the files that are drawn, of this visitor alone.
        work: calls a function; all of networks and drawing goes through it, in one thread for all visitors.

    Attributes:
        source: what was given; None before that.
        index: number of the picture that is shown, of a film or recording.
        answers: to each picture, by network; without their pixels, where there are many.
        noise: severities by kind.
        lock: to be held by what changes or shows any of it.
        stopped: set by who wants no more pictures of a film; nobody waits for the lock with that.
    """

    def __init__(self, folder: Path, work: Run) -> None:
        self.folder, self.work = folder, work
        self.source: Source | None = None
        self.index = 0
        self.noise: dict[str, float] = {}
        self.answers: dict[str, list[Answer]] = {}
        self.lock, self.stopped = threading.Lock(), threading.Event()
        self._written = 0

    def give(self, source: Source | None) -> None:
        """Begin with another file, or with none."""
        self.source, self.index, self.answers = source, 0, {}

    def ask(self, networks: Sequence[Network], noise: Mapping[str, float], tell: Tell) -> bool:
        """Ask networks about every picture of the source, those that have answered already left out.

        Args:
            networks: that are shown.
            noise: severities by kind.
            tell: called with the number of pictures that are done, and of all, 0 where that is not known.

        Returns:
            Whether it was stopped before the end; what was done until then is kept.
        """
        self.stopped.clear()
        answers = dict(self.answers) if self.noise == noise else {}
        for network in networks:
            if network.name not in answers:
                answers[network.name] = self._answers(network, noise, tell)
            if not answers[network.name]:
                raise ValueError("not one picture could be read")
        self.noise, self.answers = dict(noise), answers
        self.index = min(self.index, self.length(networks) - 1)
        return self.stopped.is_set()

    def _answers(self, network: Network, noise: Mapping[str, float], tell: Tell) -> list[Answer]:
        task, source, found = network.predictor.task, self.source, []
        long = source.is_long(task)
        total = self.work(lambda: source.length(task)) if long else 1
        pictures = source.pictures(task)
        while (answer := self.work(lambda: _next(network, pictures, noise))) is not None:
            found.append(_without_pixels(answer) if long else answer)
            if long:
                tell(len(found), total)
            if self.stopped.is_set():  # behind one picture at least, also of a network whose turn had not come
                break
        return found

    def end(self) -> None:
        """Stop what is under way, and remove the files."""
        self.stopped.set()
        shutil.rmtree(self.folder, ignore_errors=True)

    def has_answers(self, networks: Sequence[Network]) -> bool:
        """Return whether something was given, and all these networks have answered to it."""
        return self.source is not None and all(network.name in self.answers for network in networks)

    def length(self, networks: Sequence[Network]) -> int:
        """Return the number of pictures that all these networks have answered to."""
        return min(len(self.answers[network.name]) for network in networks)

    def picture(self, network: Network) -> Tensor:
        """Return the picture that is shown, as the network takes it.

        Raises:
            ValueError: it cannot be read again.
        """
        picture = next(self.source.pictures(network.predictor.task, self.index), None)
        if picture is None:
            raise ValueError(f"picture {self.index + 1} cannot be read again")
        return picture

    def answer(self, network: Network) -> Answer:
        """Return the network's answer to the picture that is shown, with its pixels."""
        found = self.answers[network.name]
        if not found[self.index].prediction.image.size:
            # Asked again: the pixels are not kept, and noise changes them.
            whole, noise = found[self.index].whole_seconds, found[self.index].noise
            found[:] = map(_without_pixels, found)
            found[self.index] = network.predict(self.picture(network), noise)
            found[self.index].whole_seconds = whole
        return found[self.index]

    def draw(self, network: Network, score: float) -> Path:
        """Write the picture with what the network finds in it, and return the file."""
        started = time.perf_counter()
        answer, path = self.answer(network), self._file(f"{self._stem}.jpg")
        answer.prediction.above(score).draw().save(path, quality=95)
        if answer.drawing_seconds is None:
            answer.drawing_seconds = time.perf_counter() - started
        return path

    def explain(self, network: Network) -> Answer:
        """Return the network's answer to the picture that is shown, spike maps and energy with it."""
        answer = self.answer(network)
        if answer.analysis is None:
            network.explain(answer, self.picture(network))
        return answer

    def draw_maps(self, network: Network, stage: str) -> Path | None:
        """Write the spike maps of a stage, or of `ALL_STAGES`, beside the picture; None where there are none."""
        answer = self.answer(network)
        maps = [each for each in answer.maps if stage in (ALL_STAGES, each.name)]
        if not maps:
            return None
        columns = 3 if stage == ALL_STAGES else 2
        figure = draw_spike_maps(answer.prediction.image, maps, columns=columns, vmax=brightest_rate(answer.maps))
        path = self._file("spikes.png")
        figure.savefig(path)
        return path

    def write_json(self, network: Network, score: float) -> Path:
        """Write a COCO file with the boxes of every picture as annotations, or class probabilities in their place."""
        images, rows = [], []
        task, run = network.predictor.task, network.predictor.run
        for number, answer in enumerate(self.answers[network.name], start=1):
            prediction = answer.prediction.above(score)
            width, height = answer.size
            images.append({"id": number, "file_name": self.source.name, "width": width, "height": height})
            if self.source.is_long(task):
                images[-1]["frame"] = number - 1  # as `hoyer-det predict` counts them
            for row in prediction.to_results(number):
                area = {"area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0} if "bbox" in row else {}
                rows.append({"id": len(rows) + 1, **row, **area})
        info: dict[str, Any] = {"description": f"predictions of {network.name}, {network.weights} weights"}
        info |= {"score_threshold": score} if network.has_boxes else {}
        labels = task.describe_labels(run)
        labels.pop("category_ids", None)  # where their numbers come from: a path of the server
        path = self._file(f"{self._stem}.json")
        path.write_text(json.dumps({"info": info, "images": images, **labels, "annotations": rows}, indent=1) + "\n")
        return path

    @property
    def _stem(self) -> str:
        return Path(self.source.name).stem[:80] or "picture"

    def _file(self, name: str) -> Path:
        """Return a path that nothing was written to before, since a browser may still be reading what was."""
        folder = self.folder / str(self._written)
        self._written += 1
        shutil.rmtree(self.folder / str(self._written - KEPT), ignore_errors=True)
        folder.mkdir()  # in that of a visit that has not ended
        return folder / name


def _next(network: Network, pictures: Iterator[Tensor], noise: Mapping[str, float]) -> Answer | None:
    started = time.perf_counter()
    picture = next(pictures, None)
    if picture is None:
        return None
    answer = network.predict(picture, noise)
    answer.whole_seconds = time.perf_counter() - started
    return answer


def _without_pixels(answer: Answer) -> Answer:
    clean = answer.clean and replace(answer.clean, image=NO_PIXELS)
    return replace(answer, prediction=replace(answer.prediction, image=NO_PIXELS), clean=clean, maps=[], analysis=None)


class Visits:
    """All visits, by the name that a browser gives to each.

    Args:
        folder: for their files.
        work: of `Visit`.
    """

    def __init__(self, folder: Path, work: Run) -> None:
        self.folder, self.work = folder, work
        self._found: OrderedDict[str, Visit] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, name: str) -> Visit:
        """Return a visit, a new one where there is none or where it was too long ago."""
        with self._lock:
            if name not in self._found:
                self._found[name] = Visit(Path(tempfile.mkdtemp(dir=self.folder)), self.work)
            self._found.move_to_end(name)
            gone = [self._found.popitem(last=False)[1] for _ in range(len(self._found) - MOST_VISITS)]
            visit = self._found[name]
        for each in gone:
            each.end()
        return visit

    def end(self, name: str) -> None:
        """Forget a visit."""
        with self._lock:
            visit = self._found.pop(name, None)
        if visit is not None:
            visit.end()
