"""Files of predictions: JSON, drawn images, spike maps."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from backbones import LayerActivity, record_activity, spike_activity, sum_activity
from detection.draw import draw_spike_maps
from detection.files import write_whole
from detection.predict import Predictor
from detection.tasks.predictions import AnyPrediction

Item = TypeVar("Item")


class Output:
    """The files of one call; the folder is made when the first of them is written.

    Args:
        folder: where they go.
        predictor: says what the labels mean.
        draw: also the images themselves.
        spikes: also spike maps.

    Attributes:
        images: the rows of images.json.
        results: the rows of predictions.json.
        num_found: detections; None where predictions are no lists of them.
    """

    def __init__(self, folder: Path, predictor: Predictor, *, draw: bool, spikes: bool) -> None:
        self.folder, self.predictor, self.draw, self.spikes = folder, predictor, draw, spikes
        self.images: list[dict[str, Any]] = []
        self.results: list[dict[str, Any]] = []
        self.num_found: int | None = None
        self._taken: set[str] = set()

    def add(self, prediction: AnyPrediction, source: str, **more: Any) -> None:
        """Take the prediction into the JSON files under the next image id."""
        width, height = prediction.size
        entry = {"id": len(self.images) + 1, "file_name": source, "width": width, "height": height} | more
        self.images.append(entry)
        self.results += prediction.to_results(entry["id"])
        if isinstance(prediction, Sized):
            self.num_found = (self.num_found or 0) + len(prediction)

    def add_image(self, prediction: AnyPrediction, source: str) -> None:
        """Take one image in, and draw what was asked for."""
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

    def save_spikes(self, prediction: AnyPrediction, stem: str, title: str) -> None:
        """Write a panel of spike maps."""
        maps = self.predictor.spike_maps(torch.from_numpy(prediction.image).permute(2, 0, 1))
        figure = draw_spike_maps(prediction.image, maps, title=title)
        figure.savefig(self.free_name(f"{stem}_spikes", ".png"))

    def free_name(self, stem: str, suffix: str) -> Path:
        """Return a path that no other file of this call has: images of one name may come from many folders."""
        number = 1
        while (name := f"{stem}{'' if number == 1 else f'_{number}'}{suffix}").lower() in self._taken:
            number += 1
        self._taken.add(name.lower())
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / name

    def write(self, info: Mapping[str, Any]) -> None:
        """Write predictions.json and images.json."""
        self.folder.mkdir(parents=True, exist_ok=True)
        labels = self.predictor.task.describe_labels(self.predictor.run)
        sentences = {key: value for key, value in labels.items() if isinstance(value, str)}
        content = {"info": {**info, **sentences}, "images": self.images}
        content |= {key: value for key, value in labels.items() if key not in sentences}
        write_whole(self.folder / "predictions.json", json.dumps(self.results).encode())
        write_whole(self.folder / "images.json", (json.dumps(content, indent=1) + "\n").encode())


class Session:
    """The predictions of one call, and what they cost.

    Args:
        output: where they go; its predictor makes them.
        asked: the options of `Predictor.predict`.
        failures: a sentence for each thing that could not be read.

    Attributes:
        seconds: spent in the network.
    """

    def __init__(self, output: Output, asked: Mapping[str, Any], failures: list[str]) -> None:
        self.output, self.asked, self.failures = output, asked, failures
        self.seconds = 0.0
        self._spikes: dict[str, LayerActivity] = {}

    def predict(self, pictures: Sequence[Tensor]) -> list[AnyPrediction]:
        """Return the predictions of some pictures (3, H, W), and count their time and spikes."""
        predictor, started = self.output.predictor, time.perf_counter()
        with record_activity(predictor.model) as activity:
            predictions = predictor.predict(list(pictures), **self.asked)
        self._spikes = sum_activity([self._spikes, activity] if self._spikes else [activity])
        self.seconds += time.perf_counter() - started
        return predictions

    def activity(self) -> float | None:
        """Return the share of neurons that fired, in [0, 1]; None without spike layers."""
        return spike_activity(self._spikes) if self._spikes else None


def in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield the items in lists of `size`, the last one perhaps shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
