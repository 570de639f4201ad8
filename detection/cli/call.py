"""Predictions of one call of `hoyer-det predict`, image by image, and what they cost."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from detection.cli.output import Output
from detection.text import say

if TYPE_CHECKING:
    from torch import Tensor

    from backbones import LayerActivity
    from detection.predict import Predictor
    from detection.tasks.predictions import AnyPrediction


class Call:
    """The predictions of one call, and what they cost.

    Args:
        predictor: makes them.
        output: where they go.
        options: of `Predictor.predict`.
        failures: a sentence for each thing that could not be read.
        draw: also the images themselves.
        spikes: also spike maps.

    Attributes:
        seconds: spent in the network.
        number: of predictions.
        activity: of all spike layers.
    """

    def __init__(
        self,
        predictor: Predictor,
        output: Output,
        options: Mapping[str, Any],
        failures: list[str],
        *,
        draw: bool,
        spikes: bool,
    ) -> None:
        self.predictor, self.output, self.options, self.failures = predictor, output, options, failures
        self.draw, self.spikes = draw, spikes
        self.seconds, self.number = 0.0, 0
        self.activity: dict[str, LayerActivity] = {}

    def predict(self, pictures: Sequence[Tensor], names: Sequence[str]) -> list[AnyPrediction | None]:
        """Return the predictions of some pictures (C, H, W); None for one that there is not enough memory for."""
        from accelerate.utils.memory import should_reduce_batch_size

        from backbones import record_activity, sum_activity

        started = time.perf_counter()
        try:
            with record_activity(self.predictor.model) as activity:
                found: list[AnyPrediction | None] = self.predictor.predict(list(pictures), **self.options)
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
                raise
            if len(pictures) > 1:
                return [self.predict([picture], [name])[0] for picture, name in zip(pictures, names, strict=True)]
            self.failures.append(f"{names[0]}: not enough memory for it in the network")
            return [None]
        self.activity = sum_activity([self.activity, activity] if self.activity else [activity])
        self.seconds += time.perf_counter() - started
        self.number += len(found)
        return found

    def add_images(self, names: Sequence[str]) -> None:
        """Read images, predict on them, draw and write what was asked for."""
        from detection.predict import read_picture

        read: dict[str, Tensor] = {}
        for name in names:
            try:
                read[name] = read_picture(self.predictor.task, name)
            except (ValueError, OSError, ModuleNotFoundError) as error:
                self.failures.append(str(error))
        for name, prediction in zip(read, self.predict(list(read.values()), list(read)) if read else [], strict=True):
            if prediction is not None and name not in self.output.done:
                self._add_image(prediction, name, read[name])

    def _add_image(self, prediction: AnyPrediction, name: str, picture: Tensor) -> None:
        from detection.figures import PNG_LEVEL

        path, files, more = Path(name), [], {}
        if self.draw:
            suffix = path.suffix if path.suffix.lower() in (".jpg", ".jpeg", ".png") else ".png"
            drawn = self.output.free_name(path.stem, suffix)
            try:
                prediction.draw().save(drawn, quality=95, compress_level=PNG_LEVEL)
            except BaseException:  # no half of an image stays
                drawn.unlink(missing_ok=True)
                raise
            files, more = [drawn.name], {"drawn": drawn.name}
        if self.spikes:
            files.append(self.save_spikes(prediction, picture, path.stem, path.name))
        self.output.add(prediction, name, **more)
        self.output.finish(name, files)
        say(f"{name}: {prediction}")

    def save_spikes(self, prediction: AnyPrediction, picture: Tensor, stem: str, title: str) -> str:
        """Write a panel of what was found and the spike maps, and return its file's name."""
        from detection.draw import draw_spike_maps
        from detection.figures import save_png

        maps = self.predictor.spike_maps(picture)
        path = self.output.free_name(stem, "_spikes.png")
        title += ", {}\N{MULTIPLICATION SIGN}{} pixels".format(*prediction.size)
        save_png(draw_spike_maps(np.asarray(prediction.draw()), maps, title=title), path)
        return path.name
