"""Accuracy of saved runs under noise: on the membrane potentials, on the thresholds, and on the images.

With a spike layer's effective threshold theta = |v_th| E and e drawn from the standard normal distribution:

    membrane          u + sd * theta * e         e anew for every neuron and image
    threshold         theta * (1 + sd * e)       e once for every neuron: mismatch of devices, each seed another device

Both are in units of the threshold, so that layers and networks compare. Image corruptions (`IMAGE_KINDS`) act on pixels
in [0, 1], before normalisation. Severity 0 is the clean network for all of them.

All draws come from generators on the CPU that are keyed by seed, layer and image (or neuron): they do not depend on the
batch size, and a larger severity scales the same draws. They are equal for any batch as long as the images of a batch
are of one size; a detector pads smaller images to the largest, and noise is drawn for what is padded too.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detection.checkpoint import Run, Weights, describe_environment
from detection.classification import evaluate_classifier, validation_batches
from detection.plots import plot_robustness
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision.transforms.v2 import functional as F

from backbones import HoyerSpike
from detection.config import ClassificationConfig, Recipe
from detection.data import DetectionDataset, build_datasets, loader_options
from detection.data.images import MemoryBatches
from detection.files import require_writable, write_whole
from detection.tasks import evaluate_detector, evaluation_loader, load_for_evaluation

SPIKE_KINDS = ("membrane", "threshold")
IMAGE_KINDS = ("gaussian_noise", "blur", "contrast", "brightness", "jpeg")
KINDS = (*SPIKE_KINDS, *IMAGE_KINDS)
RANDOM_KINDS = (*SPIKE_KINDS, "gaussian_noise")  # the others have no seed
SEVERITIES: Mapping[str, tuple[float, ...]] = {
    "membrane": (0.1, 0.2, 0.4, 0.8, 1.6),
    "threshold": (0.1, 0.2, 0.4, 0.8, 1.6),
    "gaussian_noise": (0.02, 0.04, 0.08, 0.12, 0.2),
    "blur": (0.5, 0.75, 1.0, 1.5, 2.5),
    "contrast": (0.2, 0.4, 0.6, 0.8, 0.9),
    "brightness": (0.2, 0.4, 0.6, 0.8, 0.9),
    "jpeg": (20.0, 50.0, 70.0, 85.0, 95.0),
}
UNITS: Mapping[str, str] = {
    "membrane": "standard deviation (thresholds of the layer)",
    "threshold": "standard deviation (thresholds of the layer)",
    "gaussian_noise": "standard deviation (1 = white minus black)",
    "blur": "standard deviation of the kernel (pixels)",
    "contrast": "share of the contrast taken away",
    "brightness": "share of the light taken away",
    "jpeg": "100 minus JPEG quality",
}
METRICS = {"classification": ("top1",), "detection": ("AP50", "AP")}
"""What is kept of an evaluation, by task; the first is drawn."""

NEAR = 0.1  # of the threshold, on either side: a potential there is called near
ALL_LAYERS = "all layers"
TRAINING_KEYS = {"train", "train_images", "num_train", "augment", "workers", "verify", "aspect_groups", "mean", "std"}
"""Keys of a recipe's `data` in which runs on the same evaluation images may differ."""


# Noise on potentials and thresholds


@contextmanager
def potential_noise(model: nn.Module, kind: str, sd: float, seed: int) -> Iterator[None]:
    """Noise in every `HoyerSpike` of `model` while the context is open; nothing of it stays.

    A threshold theta (1 + sd e) is reached by u where theta is reached by u - sd theta e, which is what is done: a
    threshold that falls below 0 is one too, and makes the neuron fire at rest.

    The first argument of `model` has one entry per image; images are counted from the opening of the context on, so it
    is opened anew for every evaluation.

    Args:
        model: in evaluation mode, where a layer's threshold does not depend on the batch.
        kind: "membrane" or "threshold".
        sd: standard deviation in units of each layer's (or channel's) effective threshold.
        seed: of the draws, from 0.

    Raises:
        ValueError: another kind, a negative sd or seed.
        RuntimeError: a pass in training mode, or a layer whose first dimension is not that of the images.
    """
    if kind not in SPIKE_KINDS:
        raise ValueError(f"kind {kind!r}: not a noise of spike layers (allowed: {', '.join(SPIKE_KINDS)})")
    if not 0 <= sd < math.inf or seed < 0:
        raise ValueError(f"sd {sd:g}, seed {seed}: neither may be negative, and sd must be finite")

    def disturb(position: int, layer: HoyerSpike, u: Tensor, images: range) -> Tensor:
        if kind == "membrane":
            return _shift(layer, u, sd, _membrane_draws(u, images, position, seed))
        return _shift(layer, u, -sd, _threshold_draws(u, position, seed))

    with _hook_potentials(model, disturb):
        yield


@dataclass
class LayerMargin:
    """How far the potentials of one layer lie from its threshold, counted over neurons and images.

    Attributes:
        num_neurons: all of them.
        num_spikes: that fire without noise.
        num_near: within 10 % of the threshold, on either side.
        sum, sum_squares: of u / theta.
        flips: (sd, seed) -> neurons that noise of this standard deviation makes fire, and those it keeps from firing.
    """

    num_neurons: int = 0
    num_spikes: int = 0
    num_near: int = 0
    sum: float = 0.0
    sum_squares: float = 0.0
    flips: dict[tuple[float, int], tuple[int, int]] = field(default_factory=dict)

    @property
    def firing_rate(self) -> float:
        """Share of the neurons that fire without noise, in [0, 1]."""
        return self.num_spikes / self.num_neurons

    @property
    def near_rate(self) -> float:
        """Share of the neurons within 10 % of the threshold, in [0, 1]."""
        return self.num_near / self.num_neurons

    @property
    def potential_sd(self) -> float:
        """Standard deviation of the potentials in units of the threshold: what the noise competes with."""
        mean = self.sum / self.num_neurons
        return math.sqrt(max(0.0, self.sum_squares / self.num_neurons - mean**2))

    def flip_rate(self, sd: float, seed: int) -> float:
        """Share of the neurons whose output changes, in [0, 1]."""
        return sum(self.flips[sd, seed]) / self.num_neurons

    def lost_rate(self, sd: float, seed: int) -> float:
        """Share of the spikes that vanish, in [0, 1]; 0 for a layer without spikes."""
        return self.flips[sd, seed][1] / self.num_spikes if self.num_spikes else 0.0


@contextmanager
def record_margins(model: nn.Module, sds: Sequence[float], seeds: Sequence[int]) -> Iterator[dict[str, LayerMargin]]:
    """Measures, while the context is open, each `HoyerSpike` of `model` on clean passes, by module name.

    A flip is an output of the layer that noise of kind "membrane" changes on the layer's clean input. Flips of earlier
    layers are thus not in it: it says how robust a layer is by itself, where the accuracy says how robust the network
    is. Noise of kind "threshold" has the same distribution over neurons, and on average flips as many.

    See `potential_noise` for what the passes have to be.
    """
    names = list(_spike_layers(model))
    margins = {name: LayerMargin() for name in names}

    def measure(position: int, layer: HoyerSpike, u: Tensor, images: range) -> None:
        margin, clean = margins[names[position]], layer.forward(u) > 0
        ratio = u.detach().double() / _threshold(layer, u).double()
        margin.num_neurons += u.numel()
        margin.num_spikes += int(clean.sum())
        margin.num_near += int(((ratio - 1).abs() <= NEAR).sum())
        margin.sum += float(ratio.sum())
        margin.sum_squares += float(ratio.square().sum())
        for seed in seeds:
            draws = _membrane_draws(u, images, position, seed)
            for sd in sds:
                # Not the module itself, which would call this hook again.
                noisy = layer.forward(_shift(layer, u, sd, draws)) > 0
                gained, lost = margin.flips.get((sd, seed), (0, 0))
                margin.flips[sd, seed] = (gained + int((noisy & ~clean).sum()), lost + int((clean & ~noisy).sum()))

    with _hook_potentials(model, measure):
        yield margins


def sum_margins(margins: Iterable[LayerMargin]) -> LayerMargin:
    """The neurons of several layers counted together."""
    total = LayerMargin()
    for margin in margins:
        for name in ("num_neurons", "num_spikes", "num_near", "sum", "sum_squares"):
            setattr(total, name, getattr(total, name) + getattr(margin, name))
        for key, (gained, lost) in margin.flips.items():
            before = total.flips.get(key, (0, 0))
            total.flips[key] = (before[0] + gained, before[1] + lost)
    return total


@contextmanager
def _hook_potentials(
    model: nn.Module, act: Callable[[int, HoyerSpike, Tensor, range], Tensor | None]
) -> Iterator[None]:
    """Calls act(number of the layer, layer, u, numbers of the images) in front of every spike layer.

    What it gives takes the place of u, unless it is None.
    """
    images = range(0)

    def count(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal images
        images = range(images.stop, images.stop + len(inputs[0]))

    def hook(position: int, name: str):  # one closure per layer
        def call(layer: HoyerSpike, inputs: tuple[Tensor, ...]) -> Tensor | None:
            if layer.training:
                raise RuntimeError(f"spike layer {name!r} is in training mode: call model.eval() first")
            if len(inputs[0]) != len(images):
                raise RuntimeError(
                    f"spike layer {name!r} got {len(inputs[0])} maps in a pass over {len(images)} images: "
                    "noise is drawn per image, so their numbers must agree"
                )
            return act(position, layer, inputs[0], images)

        return call

    with ExitStack() as handles:
        handles.callback(model.register_forward_pre_hook(count).remove)
        for position, (name, layer) in enumerate(_spike_layers(model).items()):
            handles.callback(layer.register_forward_pre_hook(hook(position, name)).remove)
        yield


def _spike_layers(model: nn.Module) -> dict[str, HoyerSpike]:
    return {name: module for name, module in model.named_modules() if isinstance(module, HoyerSpike)}


def _threshold(layer: HoyerSpike, u: Tensor) -> Tensor:
    """The effective threshold in a shape that broadcasts to u, float32 or wider."""
    threshold = layer.threshold.detach().clamp_min(1e-6)  # to divide by; the layer keeps |v_th| from 0 likewise
    return threshold.view(-1, *[1] * (u.dim() - 2)) if threshold.dim() else threshold


def _shift(layer: HoyerSpike, u: Tensor, sd: float, draws: Tensor) -> Tensor:
    """u + sd * theta * draws in u's dtype, added in float32 or wider."""
    wide = u.to(torch.promote_types(u.dtype, torch.float32))
    return (wide + sd * _threshold(layer, u) * draws).to(u.dtype)


def _membrane_draws(u: Tensor, images: range, position: int, seed: int) -> Tensor:
    """Standard normal numbers for each neuron of each image, in u's shape, float32."""
    draws = torch.empty_like(u, dtype=torch.float32, device="cpu")  # in u's order of memory
    for index, image in enumerate(images):
        generator = np.random.default_rng((seed, 0, position, image))
        draws[index] = torch.from_numpy(generator.standard_normal(u.shape[1:], dtype=np.float32))
    return draws.to(u.device)


def _threshold_draws(u: Tensor, position: int, seed: int) -> Tensor:
    """Standard normal numbers for each neuron, (C, *), float32.

    A neuron keeps its number in maps of other sizes: every row has a generator of its own and is drawn from left to
    right, all channels of a cell together.
    """
    channels, height = u.shape[1], u.shape[2] if u.dim() > 3 else 1
    width = u[0, 0].numel() // height
    rows = [
        np.random.default_rng((seed, 1, position, row)).standard_normal((width, channels), dtype=np.float32)
        for row in range(height)
    ]
    return torch.from_numpy(np.stack(rows)).permute(2, 0, 1).reshape(u.shape[1:]).to(u.device)


# Corruption of images


def corrupt(images: Tensor, kind: str, severity: float, *, seed: int = 0, first: int = 0) -> Tensor:
    """The images as a worse camera or connection would give them; severity 0 gives them as they are.

    - gaussian_noise: severity is the standard deviation, of each pixel and colour for itself.
    - blur: severity is the standard deviation of a Gaussian kernel in pixels.
    - contrast: severity in [0, 1] is how far every pixel goes to the mean grey of its image.
    - brightness: severity in [0, 1] is how far every pixel goes to black: a darker picture.
    - jpeg: compressed with quality 100 - severity, severity up to 99.

    Args:
        images: RGB, in [0, 1].
        kind: one of `IMAGE_KINDS`.
        severity: from 0.
        seed: of gaussian_noise.
        first: number of the first image: the noise of an image depends on its number and the seed alone.

    Shape: (N, 3, H, W) -> (N, 3, H, W) in [0, 1].

    Raises:
        ValueError: another kind, or a severity that it does not have.
    """
    if kind not in IMAGE_KINDS:
        raise ValueError(f"kind {kind!r}: not a corruption of images (allowed: {', '.join(IMAGE_KINDS)})")
    highest = {"contrast": 1.0, "brightness": 1.0, "jpeg": 99.0}.get(kind, math.inf)
    if not 0 <= severity <= highest or severity == math.inf:
        raise ValueError(f"severity {severity:g} of {kind}: allowed is 0 to {highest:g}, finite")
    if severity == 0:
        return images
    match kind:
        case "gaussian_noise":
            draws = [
                np.random.default_rng((seed, 2, first + index)).standard_normal(images.shape[1:], dtype=np.float32)
                for index in range(len(images))
            ]
            changed = images + severity * torch.from_numpy(np.stack(draws)).to(images.device)
        case "blur":
            radius = min(math.ceil(3 * severity), min(images.shape[-2:]) - 1)  # the border is mirrored, so no more
            changed = F.gaussian_blur(images, [2 * radius + 1] * 2, [severity] * 2)
        case "contrast":
            changed = F.adjust_contrast(images, 1 - severity)
        case "brightness":
            changed = F.adjust_brightness(images, 1 - severity)
        case _:
            changed = torch.stack([_compress(image, round(100 - severity)) for image in images])
    return changed.clamp(0, 1)


def _compress(image: Tensor, quality: int) -> Tensor:
    """(3, H, W) in [0, 1] -> the same, as a JPEG file gives it back."""
    pixels = (255 * image).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    file = io.BytesIO()  # by PIL: torchvision's own JPEG is going to be removed from it
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    with Image.open(file) as read:
        back = torch.from_numpy(np.array(read)).permute(2, 0, 1)
    return back.to(image.device, image.dtype) / 255


class CorruptedBatches:
    """The batches of a classifier or a detector with every image corrupted.

    Args:
        batches: (images, targets), images a tensor (N, 3, H, W) or a list of (3, H, W); always in the same order.
        kind, severity, seed: as in `corrupt`.
        mean, std: RGB, with which the images are normalised.
    """

    def __init__(
        self,
        batches: Iterable[tuple[Any, Any]],
        kind: str,
        severity: float,
        seed: int,
        *,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        self.batches, self.kind, self.severity, self.seed = batches, kind, severity, seed
        self.mean, self.std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        first = 0
        for images, targets in self.batches:
            if isinstance(images, Tensor):
                changed: Any = self._corrupt(images, first)
            else:  # images differ in size
                changed = [self._corrupt(image[None], first + index)[0] for index, image in enumerate(images)]
            first += len(images)
            yield changed, targets

    def _corrupt(self, images: Tensor, first: int) -> Tensor:
        mean, std = self.mean.to(images.device), self.std.to(images.device)
        pixels = (images * std + mean).clamp(0, 1)
        return (corrupt(pixels, self.kind, self.severity, seed=self.seed, first=first) - mean) / std


# Studies of saved runs


@dataclass
class Subject:
    """A run that is ready to be evaluated again and again.

    Attributes:
        name: of the run, in tables and plots.
        run: its folder and recipe.
        model: in evaluation mode.
        batches: the evaluation images, in order.
        evaluate: batches -> metrics.
        num_images: in `batches`.
    """

    name: str
    run: Run
    model: nn.Module
    batches: Iterable[Any]
    evaluate: Callable[[Iterable[Any]], dict[str, Any]]
    num_images: int

    def measure(self, kind: str, severity: float, seed: int) -> dict[str, float]:
        """The metrics of `METRICS`, and "activity" with spike layers, at one severity."""
        batches = self.batches
        if kind in IMAGE_KINDS and severity:
            config = self.run.config
            colours = (
                {"mean": config.data.mean, "std": config.data.std} if isinstance(config, ClassificationConfig) else {}
            )
            batches = CorruptedBatches(batches, kind, severity, seed, **colours)
        noise = potential_noise(self.model, kind, severity, seed) if kind in SPIKE_KINDS else nullcontext()
        with noise:
            metrics = self.evaluate(batches)
        return {key: metrics[key] for key in (*METRICS[self.run.config.task], "activity") if key in metrics}


def open_runs(folders: Sequence[str | Path], *, data_root: str | Path | None = None) -> list[Run]:
    """The runs, which must be of one task and have the same evaluation data and precision.

    Args:
        folders: of the runs, as `Run.open` takes them.
        data_root: where their data lie now; None: where their recipes say.

    Raises:
        FileNotFoundError: no such run.
        ValueError: a run given twice, or runs that do not compare.
    """
    runs = []
    for folder in folders:
        run = Run.open(folder, data_root)
        if any(run.folder.resolve() == other.folder.resolve() for other in runs):
            raise ValueError(f"{folder}: given twice")
        run.config.data.root = run.config.data.root.resolve()
        runs.append(run)
    first, *others = [(run, _comparable(run.config)) for run in runs]
    for run, values in others:
        for key, value in first[1].items():
            if values.get(key) != value:
                raise ValueError(
                    f"{run.folder}: {key} is {_shorten(values.get(key))}, that of {first[0].folder} is "
                    f"{_shorten(value)}; only runs of the same task, evaluation data and precision compare"
                )
    return runs


def _comparable(config: Recipe) -> dict[str, Any]:
    """What two runs must have in common, task first."""
    data = config.data.model_dump(mode="json", exclude=TRAINING_KEYS)
    return {
        "task": config.task,
        **{f"data.{key}": value for key, value in data.items()},
        "train.precision": config.train.precision,
    }


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def prepare(run: Run, name: str, *, which: Weights = "last", num_images: int | None = None) -> Subject:
    """A run with its network and its evaluation images.

    Args:
        run: of a classifier or a detector.
        name: how to call it.
        which: which of its weights.
        num_images: as many images, spread evenly over the evaluation images (those of a folder are sorted by class, so
            the first ones would be of one class); a detector is then asked for their boxes alone. None: all.

    Raises:
        FileNotFoundError: no such weights, or data.
        ValueError: there are not as many images, or the weights do not fit.
    """
    config = run.config
    model, accelerator = load_for_evaluation(run, which)
    if isinstance(config, ClassificationConfig):
        batches = validation_batches(config, accelerator)
        number = len(batches.labels if isinstance(batches, MemoryBatches) else batches.dataset)
        chosen = _spread(number, num_images)
        batches = _choose(batches, chosen, config.train.batch_size)
        return Subject(
            name, run, model, batches, lambda given: evaluate_classifier(model, given, accelerator), len(chosen)
        )
    _, dataset = build_datasets(config.data)
    records = dataset.annotations.records
    chosen = _spread(len(records), num_images)
    annotations = dataclasses.replace(dataset.annotations, records=tuple(records[index] for index in chosen))
    if not any((~record.ignore).any() for record in annotations.records):
        raise ValueError(f"--images {num_images}: none of these images has a box; take more")
    dataset = DetectionDataset(annotations)
    return Subject(
        name,
        run,
        model,
        evaluation_loader(dataset, config, accelerator),
        lambda given: evaluate_detector(model, given, dataset, config, accelerator),
        len(chosen),
    )


def _spread(number: int, wanted: int | None) -> list[int]:
    """Indices of `wanted` of `number` images in equal steps, from the first one on."""
    wanted = number if wanted is None else wanted
    if wanted > number:
        raise ValueError(f"--images {wanted}: there are only {number} evaluation images")
    return [index * number // wanted for index in range(wanted)]


def _choose(batches: Any, chosen: Sequence[int], batch_size: int) -> Any:
    """Evaluation batches of some of the images."""
    if isinstance(batches, MemoryBatches):
        batches.pixels, batches.labels = batches.pixels[chosen], batches.labels[chosen]
        return batches
    return DataLoader(Subset(batches.dataset, chosen), batch_size, **loader_options(batches.num_workers))


def study(
    folders: Sequence[str | Path],
    out: str | Path,
    command: Sequence[str],
    *,
    kinds: Sequence[str] = KINDS,
    seeds: Sequence[int] = (0, 1, 2),
    which: Weights = "last",
    data_root: str | Path | None = None,
    num_images: int | None = None,
) -> dict[str, Any]:
    """Accuracy of runs over the severities of several kinds of noise, as written to out/robustness.json.

    A network without spike layers has no threshold that could be a scale, so the kinds of `SPIKE_KINDS` are left out
    for it, under "left_out" and on standard error. Kinds without chance are evaluated once, with the seed None.
    After each run robustness.json, robustness.csv and robustness.png in `out` are written anew.

    Args:
        folders: of the runs.
        out: folder to write into; must not exist, or be empty.
        command: how the study was started, for its log.
        kinds: some of `KINDS`.
        seeds: of the noise.
        which: which of the runs' weights.
        data_root: where their data lie now; None: where their recipes say.
        num_images: see `prepare`.

    Returns:
        "results": a dict for each evaluation (run, kind, severity, seed, the metrics; kind "clean" has severity 0);
        "margins": for each run and spike layer, and for ALL_LAYERS, firing_rate, near_rate and potential_sd, see
        `LayerMargin`; "flips": for each of them, severity and seed flip_rate and lost_rate. Margins and flips are
        measured where a kind of `SPIKE_KINDS` is. Further "command", "versions", "machine", "runs", "num_images".

    Raises:
        FileExistsError: there is something in `out` already.
        FileNotFoundError: no such run, weights, or data.
        ValueError: an unknown kind, seeds or images that are not allowed, runs that do not compare or of which nothing
            is left.
    """
    out = Run.check_free(out)
    require_writable(out)
    _check_request(kinds, seeds, num_images)
    runs = open_runs(folders, data_root=data_root)
    names = [run.folder.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run in runs]
    kinds_of = {}
    left_out = []
    for run, name in zip(runs, names, strict=True):
        without = run.config.model.backbone.activation == "relu"
        kinds_of[name] = [kind for kind in kinds if not (without and kind in SPIKE_KINDS)]
        missing = [kind for kind in kinds if kind not in kinds_of[name]]
        if not kinds_of[name]:
            raise ValueError(
                f"{run.folder}: no spike layers, which --kinds {' '.join(kinds)} needs; leave the run out, or name one "
                f"of {', '.join(IMAGE_KINDS)} too"
            )
        if missing:
            left_out.append({"run": name, "kinds": missing, "reason": "no spike layers, so no threshold as a scale"})
            print(f"{name}: no spike layers; left out: {', '.join(missing)}", file=sys.stderr)
    found: dict[str, Any] = {
        "command": " ".join(command),
        **describe_environment(),
        "task": runs[0].config.task,
        "metrics": METRICS[runs[0].config.task],
        "weights": which,
        "runs": {},
        "left_out": left_out,
        "results": [],
        "margins": [],
        "flips": [],
    }
    for run, name in zip(runs, names, strict=True):
        subject = prepare(run, name, which=which, num_images=num_images)
        found["num_images"] = subject.num_images
        found["runs"][name] = {
            "folder": run.address,
            "activation": run.config.model.backbone.activation,
            "sha256": run.checksums()[f"{which}.safetensors"],
        }
        for row in _evaluate(subject, kinds_of[name], seeds):
            found["results"].append(row)
            shown = ", ".join(f"{key} {row[key]:.4f}" for key in found["metrics"])
            seed = "" if row["seed"] is None else f", seed {row['seed']}"
            print(f"{name}: {row['kind']} {row['severity']:g}{seed}: {shown}", file=sys.stderr)
        if any(kind in SPIKE_KINDS for kind in kinds_of[name]):
            _measure_margins(subject, seeds, found)
        out.mkdir(parents=True, exist_ok=True)
        _write(found, out)
    return found


def _check_request(kinds: Sequence[str], seeds: Sequence[int], num_images: int | None) -> None:
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"--kinds {kind}: unknown (allowed: {', '.join(KINDS)})")
    if min(seeds) < 0:
        raise ValueError(f"--seeds {min(seeds)}: expected 0 or more")
    for option, values in (("--kinds", kinds), ("--seeds", seeds)):
        if len(set(values)) < len(values):
            raise ValueError(f"{option} {' '.join(map(str, values))}: expected each one once")
    if num_images is not None and num_images < 1:
        raise ValueError(f"--images {num_images}: expected 1 or more")


def _evaluate(subject: Subject, kinds: Sequence[str], seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row for the clean network, then one for each kind, severity and seed."""
    clean = subject.measure("clean", 0.0, 0)
    yield {"run": subject.name, "kind": "clean", "severity": 0.0, "seed": None, **clean}
    for kind in kinds:
        for severity in SEVERITIES[kind]:
            for seed in seeds if kind in RANDOM_KINDS else [None]:
                metrics = subject.measure(kind, severity, seed or 0)
                yield {"run": subject.name, "kind": kind, "severity": severity, "seed": seed, **metrics}


def _measure_margins(subject: Subject, seeds: Sequence[int], found: dict[str, Any]) -> None:
    """Appends the rows of "margins" and "flips"."""
    sds = SEVERITIES["membrane"]
    with record_margins(subject.model, sds, seeds) as margins:
        subject.evaluate(subject.batches)
    for layer, margin in {ALL_LAYERS: sum_margins(margins.values()), **margins}.items():
        place = {"run": subject.name, "layer": layer}
        rates = {key: getattr(margin, key) for key in ("firing_rate", "near_rate", "potential_sd")}
        found["margins"].append({**place, "num_neurons": margin.num_neurons // subject.num_images, **rates})
        for sd in sds:
            for seed in seeds:
                flips = {"flip_rate": margin.flip_rate(sd, seed), "lost_rate": margin.lost_rate(sd, seed)}
                found["flips"].append({**place, "severity": sd, "seed": seed, **flips})


def _write(found: Mapping[str, Any], out: Path) -> None:
    """robustness.json, robustness.csv (a line per number) and robustness.png."""
    write_whole(out / "robustness.json", (json.dumps(found, indent=2) + "\n").encode())
    text = io.StringIO()
    keys = ("run", "kind", "severity", "seed", "layer", "metric", "value")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(keys)
    for part in ("results", "margins", "flips"):
        for row in found[part]:
            place = {"kind": {"margins": "clean", "flips": "membrane"}.get(part)} | row
            for metric in (key for key in row if key not in keys):
                writer.writerow([*(place.get(key) for key in keys[:-2]), metric, row[metric]])
    write_whole(out / "robustness.csv", text.getvalue().encode())
    metric = found["metrics"][0]
    curves = {kind: runs for kind in KINDS if (runs := curves_of(found, kind, metric))}
    plot_robustness(curves, UNITS, f"{metric}, in [0, 1]", out / "robustness.png")


def curves_of(found: Mapping[str, Any], kind: str, metric: str) -> dict[str, dict[float, list[float]]]:
    """Run -> severity -> the metric for each seed, the clean network at 0; runs without the kind are absent."""
    curves: dict[str, dict[float, list[float]]] = {}
    for name in found["runs"]:
        rows = [row for row in found["results"] if row["run"] == name]
        if any(row["kind"] == kind for row in rows):
            curve = curves.setdefault(name, {})
            for row in rows:
                if row["kind"] in ("clean", kind):
                    curve.setdefault(row["severity"], []).append(row[metric])
    return curves
