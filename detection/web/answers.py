"""The answers of networks to a picture: what they find, where they fire, what it costs, and what noise does to it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from backbones import hook_layers, record_activity, record_layers, spike_activity
from detection.analysis import analysis_of
from detection.data.pictures import pixels_of
from detection.predict import Predictor
from detection.robustness import SPIKE_KINDS
from detection.robustness.corruptions import corrupted_input
from detection.robustness.noise import potential_noise, record_margins, sum_margins
from detection.robustness.studies import REASONS, why_not
from detection.runs import Run, Weights
from detection.spikemaps import SpikeMap, record_spike_maps
from detection.tasks import task_of
from detection.tasks.predictions import AnyPrediction

LOWEST = 0.05
NOISES = {
    "membrane": "noise on the potentials",
    "threshold": "noise on the thresholds",
    "blur": "blur",
    "jpeg": "JPEG compression",
}
SEED = 0


@dataclass
class Answer:
    """The answer of a network to one picture.

    Attributes:
        prediction: with boxes from `LOWEST` on, in the picture as the noise left it.
        seconds: spent in the network.
        size: width and height of the picture.
        noise: severities by kind.
        whole_seconds: from the file to the answer.
        drawing_seconds: what it took to draw it; None before that.
        clean: the prediction without noise; None where there is none.
        left_out: kinds of noise that were chosen and that the network cannot have, and why.
        maps: where it fires; empty before `explain`.
        analysis: of this picture, as `Analysis.to_dict` has it; None before `explain`.
        activity: share of the neurons that fire, with and without the noise; None without spike layers.
        flips: shares of the outputs that noise on the potentials changes, and of the spikes that it takes away.
    """

    prediction: AnyPrediction
    seconds: float
    size: tuple[int, int]
    noise: Mapping[str, float]
    whole_seconds: float = 0.0
    drawing_seconds: float | None = None
    clean: AnyPrediction | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    maps: list[SpikeMap] = field(default_factory=list)
    analysis: dict[str, Any] | None = None
    activity: tuple[float, float | None] | None = None
    flips: tuple[float, float] | None = None


class Network:
    """A trained network of the page.

    Args:
        run: of any task.
        name: how the page calls it.
        weights: which of its weights.
        device: such as "cpu"; None: the first GPU, if there is one.

    Attributes:
        predictor: makes the predictions.
        has_boxes: whether it finds boxes, and not classes of whole images.
        takes_events: whether it takes recordings of events, and not images.
        window: seconds of a recording that are a picture of its own; None: there is none.
    """

    def __init__(self, run: Run, name: str, weights: Weights = "last", device: str | None = None) -> None:
        self.predictor = Predictor(run, weights, device)
        self.name, self.weights = name, weights
        self.has_boxes = "score_threshold" in self.predictor.options
        data = self.predictor.run.config.data
        self.takes_events = bool(getattr(data, "are_events", False))
        self.window = data.events.window if self.takes_events and task_of(self.predictor.run.config).windows else None
        self.options = {"score_threshold": LOWEST} if self.has_boxes else {}

    def predict(self, picture: Tensor, noise: Mapping[str, float]) -> Answer:
        """Return the prediction for a picture under noise, and without it, and the time of the network.

        Args:
            picture: (C, H, W), uint8 or float in [0, 1].
            noise: severities by kind, of `NOISES`; see `detection.robustness`.
        """
        allowed, left_out = self._split(noise)
        clean = self.predictor.predict(picture, **self.options) if allowed else None
        with self._disturbed(allowed) as images, clock(self.predictor.model) as seconds:
            prediction = self.predictor.predict(picture, **self.options)
        size = prediction.size
        if images:
            prediction = replace(prediction, image=pixels_of(images[0].cpu()))
        return Answer(prediction, sum(seconds), size, noise, clean=clean, left_out=left_out)

    def explain(self, answer: Answer, picture: Tensor) -> None:
        """Add to an answer what takes longer: spike maps, operations and energy, and how many spikes flip."""
        model, (allowed, _) = self.predictor.model, self._split(answer.noise)
        with self._disturbed(allowed), record_layers(model) as measured, record_spike_maps(model) as maps:
            self.predictor.predict(picture, **self.options)
        answer.maps = maps()
        answer.analysis = analysis_of(self.predictor.run, self.weights, model, measured, {}).to_dict()
        if not measured.spikes:
            return
        answer.activity = (spike_activity(measured.spikes), None)
        if allowed:
            potentials = {allowed[kind] for kind in SPIKE_KINDS if kind in allowed}
            with record_activity(model) as activity, record_margins(model, potentials, [SEED]) as margins:
                self.predictor.predict(picture, **self.options)
            answer.activity = (answer.activity[0], spike_activity(activity))
            if potentials:
                total, most = sum_margins(margins.values()), max(potentials)
                answer.flips = (total.flip_rate(most, SEED), total.lost_rate(most, SEED))

    def _split(self, noise: Mapping[str, float]) -> tuple[dict[str, float], dict[str, str]]:
        """Return the kinds that are not 0 and that the network can have, and of the others why not."""
        chosen = {kind: severity for kind, severity in noise.items() if severity > 0}
        reasons = {kind: why_not(self.predictor.run, kind) for kind in chosen}
        left_out = {kind: REASONS[reason] for kind, reason in reasons.items() if reason is not None}
        return {kind: severity for kind, severity in chosen.items() if kind not in left_out}, left_out

    @contextmanager
    def _disturbed(self, noise: Mapping[str, float]) -> Iterator[list[Tensor]]:
        """Put noise into what the network sees and into its spike layers, as `robustness` does, while it is open."""
        model = self.predictor.model
        with ExitStack() as stack:
            on_images = {kind: severity for kind, severity in noise.items() if kind not in SPIKE_KINDS}
            images = stack.enter_context(corrupted_input(model, on_images, seed=SEED))
            for kind, severity in noise.items():
                if kind in SPIKE_KINDS:
                    stack.enter_context(potential_noise(model, kind, severity, SEED))
            yield images


@contextmanager
def clock(model: nn.Module) -> Iterator[list[float]]:
    """Measure the seconds of each pass of a network while the context is open."""
    seconds: list[float] = []

    def start(name: str, module: nn.Module, images: Any) -> None:
        seconds.append(-time.perf_counter())

    def stop(name: str, module: nn.Module, images: Any, output: Any) -> None:
        first = next(iter(module.parameters()))
        if first.is_cuda:
            first.sum().item()  # waits for the device
        seconds[-1] += time.perf_counter()

    with hook_layers({"": model}, before=start, after=stop):
        yield seconds
