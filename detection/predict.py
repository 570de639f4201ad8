"""Predictions of a saved run on any image: boxes with scores and names, or class probabilities."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

from detection.checkpoint import Run, Weights
from detection.classification import in_memory
from detection.config import ClassificationConfig, Config
from detection.data import load_image
from detection.data.images import FolderImages, ImageFiles
from detection.data.records import rgb_pixels
from detection.models import load_model
from detection.plots import draw_classes, draw_detections
from detection.spikemaps import SpikeMap, spike_maps

ImageLike = str | Path | np.ndarray | Image.Image | Tensor
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a detector finds in one image, highest score first.

    Attributes:
        boxes: (N, 4) float32 x1 y1 x2 y2 in pixels of `image`.
        scores: (N,) float32 in [0, 1].
        labels: (N,) int64 in 1..K; label k is class_names[k - 1].
        image: (H, W, 3) uint8 RGB, upright.
        class_names: of the labels 1..K.
        category_ids: COCO's category of the labels 1..K.
        path: file that the image comes from; None: it was given as pixels.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    image: np.ndarray
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    path: Path | None = None

    @property
    def names(self) -> list[str]:
        """The class name of each box."""
        return [self.class_names[label - 1] for label in self.labels.tolist()]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the image in pixels, as PIL has it."""
        return self.image.shape[1], self.image.shape[0]

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """Rows of COCO's result format: image_id, category_id, bbox (x, y, width, height), score."""
        rows = zip(self.boxes.tolist(), self.scores.tolist(), self.labels.tolist(), strict=True)
        return [
            {
                "image_id": image_id,
                "category_id": self.category_ids[label - 1],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": score,
            }
            for (x1, y1, x2, y2), score, label in rows
        ]

    def draw(self) -> Image.Image:
        """The image with its boxes; a small one is enlarged and a huge one reduced, see `plots.draw_detections`."""
        found = {"boxes": self.boxes, "scores": self.scores, "labels": self.labels}
        return Image.fromarray(draw_detections(self.image, found, self.class_names))

    def __len__(self) -> int:
        return len(self.scores)

    def __str__(self) -> str:
        counts = ", ".join(f"{number} {name}" for name, number in Counter(self.names).most_common())
        return f"{len(self)} detection{'' if len(self) == 1 else 's'}" + (f" ({counts})" if counts else "")


@dataclass(frozen=True, eq=False)
class ClassPrediction:
    """What a classifier makes of one image.

    Attributes:
        probabilities: (K,) float32, they add up to 1; number k belongs to class_names[k].
        image: (H, W, 3) uint8 RGB, upright, whole: the network may have seen a part of it.
        class_names: of all classes.
        path: file that the image comes from; None: it was given as pixels.
    """

    probabilities: Tensor
    image: np.ndarray
    class_names: tuple[str, ...]
    path: Path | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the image in pixels, as PIL has it."""
        return self.image.shape[1], self.image.shape[0]

    def top(self, number: int = 5) -> list[tuple[str, float]]:
        """The likeliest classes with their probabilities, the likeliest first; all, if there are fewer."""
        values, labels = self.probabilities.topk(min(number, len(self.class_names)))
        return [(self.class_names[label], value) for label, value in zip(labels.tolist(), values.tolist(), strict=True)]

    def draw(self) -> Image.Image:
        """The image with its five likeliest classes in the corner, sized as a detector's."""
        return Image.fromarray(draw_classes(self.image, self.top()))

    def __str__(self) -> str:
        return ", ".join(f"{name} {probability:.3f}" for name, probability in self.top())


class Predictor:
    """A saved detector, ready to be asked.

    Args:
        run: the run folder.
        weights: "last", "best" or "ema".
        device: such as "cpu" or "cuda:0"; None: the first GPU, if there is one.

    Attributes:
        model: torchvision's detector, in evaluation mode.
        class_names: label k is class_names[k - 1].
        category_ids: COCO's category of each label, those that the evaluation of the run used.
        category_source: the file that `category_ids` were read from; None: they are 1..K.

    Raises:
        FileNotFoundError: no such run or weights.
        ValueError: the weights are damaged or do not fit, or there is no such device.
    """

    def __init__(self, run: Run, weights: Weights = "last", device: str | torch.device | None = None) -> None:
        self.run = run
        self.device = choose_device(device)
        self.model = load_model(run, weights).to(self.device)
        self.class_names = tuple(run.config.data.classes)
        if isinstance(run.config, Config):
            self.category_ids, self.category_source = read_category_ids(run)

    @torch.no_grad()
    def predict(
        self,
        images: ImageLike | Sequence[ImageLike],
        score_threshold: float = 0.3,
        nms_threshold: float | None = None,
        *,
        batch_size: int = 8,
    ) -> Prediction | list[Prediction]:
        """What the detector finds: a `Prediction` for an image, a list of them for a list.

        Images are batched only with those of equal padded size, so that an image's boxes do not depend on the others
        of its batch. See `read_image` for what is taken.

        Args:
            images: one image or several: path, array, PIL image or tensor.
            score_threshold: only detections with a higher score; it may be lower than the recipe's.
            nms_threshold: of two boxes of a class whose IoU is above it the weaker one is dropped; None: the recipe's.
            batch_size: images at a time.

        Raises:
            ValueError: an image that cannot be read, or a threshold out of range.
        """
        check_unit_interval("score_threshold", score_threshold)
        if nms_threshold is not None:
            check_unit_interval("nms_threshold", nms_threshold)
        pictures, paths = _read_all(images, batch_size)
        padded = [pad_for(self.model.transform, picture) for picture in pictures]
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, picture in enumerate(padded):
            groups[padded_size(self.model.transform, picture)].append(index)
        results: dict[int, Prediction] = {}
        with thresholds(self.model, score_threshold, nms_threshold):
            for members in groups.values():
                for start in range(0, len(members), batch_size):
                    chosen = members[start : start + batch_size]
                    with self._autocast():
                        found = self.model([_unit(padded[index]).to(self.device) for index in chosen])
                    for index, detections in zip(chosen, found, strict=True):
                        results[index] = self._result(detections, pictures[index], paths[index])
        ordered = [results[index] for index in range(len(pictures))]
        return ordered if _several(images) else ordered[0]

    def spike_maps(self, image: ImageLike) -> list[SpikeMap]:
        """Where the network fires on one image, see `detection.spikemaps`; empty for a network without spike layers."""
        with self._autocast():
            return spike_maps(self.model, _unit(pad_for(self.model.transform, read_image(image))))

    def _result(self, detections: dict[str, Tensor], picture: Tensor, path: Path | None) -> Prediction:
        found = {name: tensor.cpu() for name, tensor in detections.items()}
        height, width = picture.shape[1:]
        # What was padded to the image is no part of it.
        boxes = found["boxes"].float()
        boxes = torch.stack([boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)], dim=2).flatten(1)
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
        return Prediction(
            boxes[kept],
            found["scores"].float()[kept],
            found["labels"][kept],
            _pixels(picture),
            self.class_names,
            self.category_ids,
            path,
        )

    def _autocast(self) -> torch.autocast:
        """The precision of the run's training and evaluation."""
        dtype = PRECISIONS.get(self.run.config.train.precision)
        usable = dtype is not None and not (dtype == torch.float16 and self.device.type == "cpu")
        return torch.autocast(self.device.type, dtype if usable else None, enabled=usable)


class ClassPredictor(Predictor):
    """A saved classifier, ready to be asked; `model` is a `backbones.Classifier`, label k is class_names[k]."""

    @torch.no_grad()
    def predict(
        self, images: ImageLike | Sequence[ImageLike], *, batch_size: int = 8
    ) -> ClassPrediction | list[ClassPrediction]:
        """Class probabilities: a `ClassPrediction` for an image, a list of them for a list.

        Images are cut and resized as in the evaluation of the run. See `read_image` for what is taken.

        Args:
            images: one image or several: path, array, PIL image or tensor.
            batch_size: images at a time.

        Raises:
            ValueError: an image that cannot be read.
        """
        pictures, paths = _read_all(images, batch_size)
        results = []
        for start in range(0, len(pictures), batch_size):
            chosen = slice(start, start + batch_size)
            batch = torch.stack([self._prepare(picture) for picture in pictures[chosen]]).to(self.device)
            with self._autocast():
                logits = self.model(batch)
            for row, picture, path in zip(
                logits.float().softmax(1).cpu(), pictures[chosen], paths[chosen], strict=True
            ):
                results.append(ClassPrediction(row, _pixels(picture), self.class_names, path))
        return results if _several(images) else results[0]

    def spike_maps(self, image: ImageLike) -> list[SpikeMap]:
        """Where the network fires on the part of the image that it sees; empty without spike layers."""
        with self._autocast():
            return spike_maps(self.model, self._prepare(read_image(image)))

    def _prepare(self, picture: Tensor) -> Tensor:
        """(3, size, size) float32, normalised, cut as for the run's own evaluation."""
        data = self.run.config.data
        pixels = _pixels(picture)
        if not in_memory(self.run.config):
            return FolderImages(ImageFiles((), ()), data, train=False).transform(
                torch.from_numpy(pixels).permute(2, 0, 1)
            )
        image = ImageOps.fit(Image.fromarray(pixels), (data.size, data.size), Image.Resampling.BILINEAR)
        # Scaled as by MemoryBatches: near a threshold another rounding is another spike.
        mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
        return (torch.from_numpy(np.array(image)).permute(2, 0, 1) - mean) / std


def read_image(image: ImageLike) -> Tensor:
    """The image as (3, H, W): uint8 RGB, or float32 in [0, 1] if it came as floats.

    Files and PIL images are turned as their EXIF orientation says, as every viewer does. (Training does not: there,
    annotations count stored pixels.) Transparency is dropped, 16 bits are scaled to 8, grey becomes RGB.

    Args:
        image: a path; a PIL image of any mode; an array (H, W), (H, W, 3) or (H, W, 4), RGB, of uint8, uint16 or floats
            in [0, 1] (OpenCV's are BGR: turn them by `[..., ::-1]`); a tensor (3, H, W) or (1, H, W) of uint8 or of
            floats in [0, 1].

    Raises:
        ValueError: a file that is missing or does not decode, or another type, shape or range; says which.
    """
    match image:
        case str() | Path():
            return _from_array(_read_file(Path(image)))
        case Image.Image():
            try:
                return _from_array(rgb_pixels(ImageOps.exif_transpose(image)))
            except (OSError, SyntaxError, ValueError) as error:
                raise ValueError(f"image: the PIL image of mode {image.mode} does not decode: {error}") from error
        case np.ndarray():
            return _from_array(image)
        case Tensor():
            if image.dim() != 3 or image.shape[0] not in (1, 3):
                raise ValueError(f"image: expected a tensor (3, H, W) or (1, H, W), got {tuple(image.shape)}")
            return _check_values(image.detach().expand(3, -1, -1))
        case _:
            raise ValueError(
                f"image: expected a path, a NumPy array, a PIL image or a tensor, got {type(image).__name__}"
            )


@contextmanager
def thresholds(model: nn.Module, score: float | None = None, nms: float | None = None) -> Iterator[None]:
    """While open, the detector's own post-processing uses these thresholds; None keeps the recipe's."""
    head = model.roi_heads if isinstance(model, FasterRCNN) else model
    before = head.score_thresh, head.nms_thresh
    head.score_thresh = before[0] if score is None else score
    head.nms_thresh = before[1] if nms is None else nms
    try:
        yield
    finally:
        head.score_thresh, head.nms_thresh = before


def pad_for(transform: nn.Module, picture: Tensor) -> Tensor:
    """The image, widened on the right or below if it is so long and thin that resizing would leave nothing of it.

    Fitted into `max_size`, an image of 20,000 x 20 pixels would be less than a pixel high, which torchvision cannot
    resize. The mean colour is put beside it, as torchvision does behind the images of a batch.
    """
    height, width = picture.shape[1:]
    if transform.fixed_size is not None or max(height, width) <= transform.max_size * min(height, width):
        return picture
    least = math.ceil(max(height, width) / transform.max_size * (1 + 1e-6))
    mean = torch.tensor(transform.image_mean, device=picture.device).view(3, 1, 1)
    ground = mean if picture.is_floating_point() else (255 * mean).round()
    padded = ground.to(picture.dtype).repeat(1, max(height, least), max(width, least))
    padded[:, :height, :width] = picture
    return padded


def padded_size(transform: nn.Module, picture: Tensor) -> tuple[int, int]:
    """Height and width in pixels that the network sees of an image that is alone in its batch."""
    resized = transform.resize(torch.empty(picture.shape, device="meta"))[0]  # sizes alone, nothing is computed
    step = transform.size_divisible
    height, width = (math.ceil(length / step) * step for length in resized.shape[1:])
    return height, width


def read_category_ids(run: Run) -> tuple[tuple[int, ...], Path | None]:
    """COCO's category of label 1, 2, ..., K, and the file that says so.

    That is run.json. Runs of earlier versions have them there not yet, and other ones than 1..K only if they are on
    COCO files: then their annotation file says it. Where that is gone, or has other classes by now, it is 1..K and no
    file.
    """
    recorded, config = run.info().get("category_ids"), run.config
    if recorded is not None:
        return tuple(recorded), run.folder / "run.json"
    classes = config.data.classes
    numbers = tuple(range(1, len(classes) + 1))
    if config.data.format != "coco":
        return numbers, None
    path = config.data.root / config.data.val[0]
    try:
        id_of = {item["name"]: int(item["id"]) for item in json.loads(path.read_text("utf-8"))["categories"]}
        return tuple(id_of[name] for name in classes), path
    except (OSError, ValueError, KeyError, TypeError):
        return numbers, None


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device of that name; None: the first GPU, if there is one.

    Raises:
        ValueError: there is no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device).cpu()
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device {str(device)!r}: not usable here, {reason} (allowed: cpu, cuda, cuda:0, ...)"
        ) from None


def check_weights(weights: str) -> None:
    """Nothing; raises ValueError for a name that no weights have."""
    if weights not in get_args(Weights):
        raise ValueError(f"weights: expected one of {', '.join(get_args(Weights))}, got {weights!r}")


def check_unit_interval(name: str, value: float) -> None:
    """Nothing; raises ValueError for a number that is not in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value:g}")


def make_predictor(run: Run, weights: Weights, device: str | torch.device | None) -> Predictor:
    """A `ClassPredictor` for a run of classification, else a `Predictor`."""
    check_weights(weights)
    kind = ClassPredictor if isinstance(run.config, ClassificationConfig) else Predictor
    return kind(run, weights, device)


def _several(images: Any) -> bool:
    return isinstance(images, (list, tuple))


def _read_all(images: Any, batch_size: int) -> tuple[list[Tensor], list[Path | None]]:
    """The pixels of all images and the files that they come from."""
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    items = list(images) if _several(images) else [images]
    pictures = []
    for index, item in enumerate(items):
        try:
            pictures.append(read_image(item))
        except ValueError as error:
            raise ValueError(f"image at index {index}: {error}" if _several(images) else str(error)) from error
    return pictures, [Path(item) if isinstance(item, (str, Path)) else None for item in items]


def _read_file(path: Path) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"{path}: {'a folder, not an image' if path.is_dir() else 'no such file'}")
    try:
        return load_image(path, upright=True)
    except ValueError as error:
        raise ValueError(f"{path}: the image does not decode: {error.__cause__}") from error


def _from_array(pixels: np.ndarray) -> Tensor:
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[:, :, None], 3, axis=2)
    if pixels.ndim != 3 or pixels.shape[2] not in (3, 4):
        raise ValueError(f"image: expected an array (H, W), (H, W, 3) or (H, W, 4), got {pixels.shape}")
    if pixels.dtype == np.uint16:
        pixels = (pixels // 256).astype(np.uint8)
    if pixels.dtype != np.uint8 and not np.issubdtype(pixels.dtype, np.floating):
        raise ValueError(f"image: expected uint8, uint16 or floats in [0, 1], got {pixels.dtype}")
    return _check_values(torch.from_numpy(np.ascontiguousarray(pixels[:, :, :3].transpose(2, 0, 1))))


def _check_values(picture: Tensor) -> Tensor:
    if picture.numel() == 0:
        raise ValueError(f"image: it has no pixels, its shape is {tuple(picture.shape)}")
    if picture.dtype == torch.uint8:
        return picture
    if not picture.is_floating_point():
        raise ValueError(f"image: expected uint8 or floats in [0, 1], got {picture.dtype}")
    picture = picture.float()
    low, high = picture.aminmax()
    if not (low >= 0 and high <= 1):  # NaN too
        raise ValueError(f"image: expected floats in [0, 1], found {low.item():g} to {high.item():g}; divide by 255?")
    return picture


def _unit(picture: Tensor) -> Tensor:
    """float32 in [0, 1], divided as in training, so that the numbers are the same."""
    return picture if picture.is_floating_point() else picture.float() / 255


def _pixels(picture: Tensor) -> np.ndarray:
    """(H, W, 3) uint8, to look at."""
    whole = (255 * picture).round().byte() if picture.is_floating_point() else picture
    return whole.permute(1, 2, 0).cpu().numpy()
