"""A saved run as a file: `export_run`."""

from __future__ import annotations

import copy
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from backbones import Backbone, fold, spike_layers, to_integers
from backbones.deploy.events import Engine, from_bytes, to_bytes, to_program
from backbones.deploy.fold import require_float
from backbones.deploy.integer import fix_size
from detection.exporters.boxes import OUTPUTS, add_boxes, check_boxes
from detection.exporters.common import ParityError, difference_of, import_extra
from detection.exporters.inference import METADATA_KEY, evaluate_file
from detection.exporters.nir import to_nir
from detection.exporters.onnx import OPSET, to_onnx
from detection.exporters.parity import check_nir, check_onnx
from detection.files import require_path, require_writable, write_whole
from detection.runs import Run, Weights
from detection.tasks import task_of
from detection.tasks.base import Task
from detection.tasks.run import load_model
from detection.text import require_whole

Format = Literal["onnx", "torch", "nir", "events"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2", "nir": ".nir", "events": ".events"}
PACKAGES: dict[Format, tuple[str, ...]] = {"onnx": ("onnx", "onnxruntime"), "torch": (), "nir": ("nir",), "events": ()}


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        file_format: "onnx", "torch" (torch.export, .pt2), "nir" or "events", for the event-driven engine.
        weights: which of the run's weights.
        int8: int8 weights and integer thresholds where layers see spikes; not for NIR, always for events.
        analogue: with `int8`: 8 bits for analogue convolutions, too, but the first and those of prediction.
        nms: a detector's ONNX file that gives boxes: padding, decoding and non-maximum suppression inside.
        num_calibration: training images for the thresholds; None: 256 for a classifier, 64 for a detector.
        height: of the images, which are then of this size only. None: free where the network permits.
        width: likewise; both or none.
        evaluate: measure how accurate an ONNX or events file is on the run's evaluation images, beside the run's log.

    Raises:
        ImportError: a package of the format is missing.
        ValueError: a value, or two of them together, are not allowed.
    """

    file_format: Format = "onnx"
    weights: Weights = "last"
    int8: bool = False
    analogue: bool = False
    nms: bool = False
    num_calibration: int | None = None
    height: int | None = None
    width: int | None = None
    evaluate: bool = False

    def __post_init__(self) -> None:
        form = self.file_format
        if form not in tuple(SUFFIXES):
            raise ValueError(f"format {form!r} (allowed: {', '.join(SUFFIXES)})")
        for name in PACKAGES[form]:
            import_extra(name)
        if (self.height is None) != (self.width is None):
            raise ValueError("height and width of the images: both or none")
        numbers = {"--calibration": self.num_calibration, "--height": self.height, "--width": self.width}
        for name, value in numbers.items():
            if value is not None:
                require_whole(name, value)
        if form == "events":
            object.__setattr__(self, "int8", True)
        if self.num_calibration is not None and not self.int8:
            raise ValueError("--calibration belongs to --int8, which sets its thresholds on images")
        if self.analogue and (not self.int8 or form == "events"):
            raise ValueError("--analogue-int8 goes with --int8, and with onnx and torch")
        if self.evaluate and form not in ("onnx", "events"):
            why = "hoyer-det benchmark FILE --data.root FOLDER measures it" if form == "torch" else "it is not run"
            raise ValueError(f"--evaluate: not with the format {form} (allowed: onnx, events); {why}")
        if self.nms and form != "onnx":
            raise ValueError(f"--nms: a file of the format {form} gives what the head says (allowed with onnx)")
        if self.int8 and form == "nir":
            raise ValueError("--int8: NIR has no integers (allowed with onnx and torch)")

    def choose_size(
        self, default: tuple[int, int], backbone: Backbone, multiple: int = 1
    ) -> tuple[tuple[int, int], bool]:
        """Return the size of the images, and whether others are possible as far as the options go.

        Args:
            default: without options.
            backbone: whose last stride is the least.
            multiple: of which height and width are where images are padded before they enter.
        """
        if self.height is None or self.width is None:
            return default, True
        stride = backbone.feature_info[-1].stride
        if min(self.height, self.width) < stride:
            raise ValueError(
                f"--height {self.height} --width {self.width}: at least {stride}, the network's last stride"
            )
        if self.height % multiple or self.width % multiple:
            raise ValueError(
                f"--height {self.height} --width {self.width}: images enter padded to multiples of {multiple} pixels "
                "(--nms takes any size, and pads inside)"
            )
        return (int(self.height), int(self.width)), False


def export_run(
    folder: str | Path,
    file_format: Format = "onnx",
    out: str | Path | None = None,
    *,
    data_root: str | Path | None = None,
    **options: Any,
) -> tuple[Path, dict[str, Any]]:
    """Write a saved run's network as a file and, beside it, NAME.json that says what it takes and gives.

    The file is checked against PyTorch before it is written. A classifier, or the dense part of a RetinaNet, FCOS or
    SSD; as NIR what of a classifier, or of a detector's backbone up to the spikes that enter the pyramid, NIR can say:
    a ResNet from behind its stem, whose max-pool of real values NIR does not know.

    Args:
        folder: the run, as `Run.open` takes it.
        file_format: "onnx", "torch", "nir" or "events".
        out: the file; None: model.onnx, model_int8_nms.onnx, ..., model.pt2, model.nir or model.events among the run's
            products.
        data_root: where the data lie now, from which `int8` takes training images; None: where they lay in training.
        options: the other attributes of `ExportOptions`.

    Returns:
        The file, and what NAME.json holds.

    Raises:
        FileExistsError: the file, or the .json beside it, exists already.
        FileNotFoundError: no such run, weights, or data.
        ImportError: a package is missing.
        ParityError: the file does not do what the network does; it is not written.
        ValueError: the run cannot be exported so.
    """
    chosen, run = ExportOptions(file_format, **options), Run.open(folder, data_root)
    path, sidecar = _new_files(run, out, chosen)
    model = load_model(run, chosen.weights).float().to(memory_format=torch.contiguous_format)
    try:
        require_float(model)
    except ValueError as error:
        raise ValueError(f"{run.folder}: cannot be exported, {error}") from None
    if chosen.int8 and not spike_layers(model):
        option = "--format events" if file_format == "events" else "--int8"
        raise ValueError(f"{option}: {folder} has no spike layers; integers add up spikes")
    for name, layer in spike_layers(model).items():
        try:
            layer.fold_threshold()
        except ValueError as error:
            raise ValueError(f"{run.folder}: cannot be exported, spike layer {name}: {error}") from None
    make = _as_nir if file_format == "nir" else _as_graph
    content, description = make(task_of(run.config), model, chosen, _describe(run, chosen))
    description |= {"file": path.name, "sha256": hashlib.sha256(content).hexdigest()}
    write_whole(path, content)
    try:
        if chosen.evaluate:
            where = {"data_root": data_root, "suffix": SUFFIXES[chosen.file_format]}  # --out may have another one
            description["evaluation"] = evaluate_file(path, folder, chosen.weights, **where)
        write_whole(sidecar, (json.dumps(description, indent=2) + "\n").encode())
    except BaseException:
        path.unlink()  # there with its .json or not at all
        raise
    return path, description


def _new_files(run: Run, out: str | Path | None, options: ExportOptions) -> tuple[Path, Path]:
    """Return the file to write and the .json beside it, their folder being there."""
    int8 = options.int8 and options.file_format != "events"  # there it goes without saying
    name = f"model{'_int8' * int8}{'_nms' * options.nms}{SUFFIXES[options.file_format]}"
    if out:
        require_path("out", out)
    path = Path(out) if out else run.products / name
    if path.suffix in SUFFIXES.values() and path.suffix != SUFFIXES[options.file_format]:
        raise ValueError(f"--out {path}: a file of the format {options.file_format} is not called {path.suffix}")
    sidecar = path.with_name(f"{path.name}.json")
    for file in (path, sidecar):
        if file.exists():
            raise FileExistsError(f"{file} exists already; name another file with --out, or remove it first")
    if not out:
        path.parent.mkdir(parents=True, exist_ok=True)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--out {path}: there is no folder {path.parent}")
    require_writable(path.parent)
    return path, sidecar


def _describe(run: Run, options: ExportOptions) -> dict[str, Any]:
    """Return what is known of a file before it is made."""
    config, task = run.config, task_of(run.config)
    task.attach(run)
    packages = ("torch", "torchvision", *PACKAGES[options.file_format])
    return {
        "format": options.file_format,
        "task": config.task,
        **({"plugins": config.plugins} if config.plugins else {}),
        "run": run.folder.name,
        "weights": options.weights,
        "weights_sha256": run.checksums()[f"{options.weights}.safetensors"],
        "classes": list(config.data.classes),
        "categories": task.describe_labels(run).get("categories"),
        "data": config.data.model_dump(mode="json", exclude={"root", "classes"}),
        "batch_size": config.train.batch_size,  # of evaluation, which pads the images of a batch to one size
        "int8": options.int8,
        "analogue_int8": options.analogue,
        "nms": options.nms,
        "model": config.model.model_dump(mode="json"),
        "versions": {name: version(name) for name in packages},
    }


def _as_graph(
    task: Task, model: nn.Module, options: ExportOptions, description: dict[str, Any]
) -> tuple[bytes, dict[str, Any]]:
    """Return the content of an ONNX file or of a program of torch.export, and its description."""
    part = task.deployable(model)
    if options.nms and not part.decoding:
        raise ValueError(f"--nms: a network of the task {task.name} finds no boxes")
    multiple = 1 if options.nms else part.decoding.get("pad_to", 1)
    asked, free = options.choose_size(task.input_size, task.backbone_of(model), multiple)
    size = asked
    if options.nms:
        only = part.decoding["resize"].get("height_and_width")
        if only not in (None, list(asked)):
            raise ValueError(
                f"--height {asked[0]} --width {asked[1]}: this detector takes {only[0]} and {only[1]} alone"
            )
        free, step = free and only is None, part.decoding["pad_to"]
        size = tuple(-(-side // step) * step for side in asked)
    network = fold(part.network)
    free = free and not any(
        isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size not in (1, (1, 1)) for layer in network.modules()
    )
    channels = task.config.data.channels
    other = (size[0] // 2 + 33, size[1] // 2 + 65) if free else size
    batches = [noise(1, size, channels), noise(3, other, channels)]
    if options.int8:
        exact = options.file_format == "events"
        images = task.calibration_images(model, options.num_calibration or task.num_calibration)
        if not free and tuple(images.shape[2:]) != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        network = to_integers(network, images, keep=() if exact else part.keep, analogue=options.analogue, exact=exact)
        description["calibration_images"] = len(images)
        batches.append(images[:2])
    elif not free:
        network = fix_size(network, batches[0])
    sides = ("height", "width") if free else asked
    meaning = f"{part.meaning.partition(';')[0]}; resized as `decoding` says" if options.nms else part.meaning
    shape = [1 if options.nms else "N", channels, *sides]
    description["inputs"] = {"images": {"shape": shape, "type": "float32", "meaning": meaning}}
    description["outputs"] = dict(OUTPUTS if options.nms else part.outputs)
    if part.decoding:
        description["decoding"] = dict(part.decoding)
    if options.file_format == "torch":
        content, parity = program_bytes(network, batches, free)
        return content, description | {"parity": parity}
    if options.file_format == "events":
        content, parity = events_bytes(network, batches, description)
        return content, description | {"parity": parity}
    description["opset"] = OPSET
    metadata = {METADATA_KEY: json.dumps(description), "description": meaning}
    outputs = list(part.outputs)
    file = to_onnx(network, dynamic_size=free, example=batches[0], outputs=outputs, metadata=metadata)
    parity = check_onnx(file, network, batches)
    if options.nms:
        extend = partial(add_boxes, file, num_classes=len(description["classes"]), size=sides)
        all_boxes = extend(decoding=part.decoding | {"score_threshold": 0.0, "noise": True})
        parity |= check_boxes(all_boxes, outputs, task.model_around, noise(1, asked, channels))
        file = extend(decoding=part.decoding)
    return file.SerializeToString(), description | {"parity": parity}


def noise(number: int, size: tuple[int, int], channels: int) -> Tensor:
    """Return images (N, C, H, W) in [0, 1] of coarse and fine noise, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(number, channels, 5, 5, generator=generator)
    fine = torch.rand(number, channels, *size, generator=generator)
    return 0.7 * F.interpolate(coarse, size, mode="bilinear") + 0.3 * fine


def program_bytes(network: fx.GraphModule, batches: Sequence[Tensor], free: bool) -> tuple[bytes, dict[str, Any]]:
    """Return a program of torch.export, and how well it agrees with the network once read back."""
    automatic = torch.export.Dim.AUTO
    dynamic = {0: automatic, 2: automatic, 3: automatic} if free else {0: automatic}
    several = batches[1]  # a batch of one would be taken for the only size
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(network, (several,), dynamic_shapes=(dynamic,)), buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    largest = 0.0
    with torch.no_grad():
        for images in batches:
            try:
                found = tree_leaves(loaded(images))
            except AssertionError as error:  # one cell on some map, which torch took for impossible
                reason = f"{images.shape[2]}x{images.shape[3]} pixels and other sizes ({error})"
                raise ValueError(f"torch.export makes no program for {reason}: give height and width") from None
            for number, (ours, theirs) in enumerate(zip(tree_leaves(network(images)), found, strict=True)):
                difference = difference_of(ours, theirs, f"output {number}")
                if difference > 1e-3:
                    raise ParityError(f"the program's output {number} differs from the network's by {difference:.2g}")
                largest = max(largest, difference)
    return buffer.getvalue(), {"largest_difference": largest}


def events_bytes(
    network: fx.GraphModule, batches: Sequence[Tensor], description: dict[str, Any]
) -> tuple[bytes, dict[str, Any]]:
    """Return a file for the event-driven engine, once it gave what the network of integers gives, bit for bit.

    Raises:
        ParityError: it does not.
        ValueError: the network does something that the engine does not know.
    """
    content = to_bytes(to_program(network), description)
    engine = Engine(from_bytes(content, "the file")[0])
    network = network.to(memory_format=torch.channels_last)
    numbers = 0
    for images in batches:
        with torch.no_grad():
            expected = tree_leaves(network(images.contiguous(memory_format=torch.channels_last)))
        for number, (ours, theirs) in enumerate(zip(expected, engine(images), strict=True)):
            if not torch.equal(ours, theirs):
                difference = difference_of(ours, theirs, f"output {number}")
                raise ParityError(f"the engine's output {number} differs from the network's by {difference:.2g}")
            numbers += ours.numel()
    return content, {"equal_numbers": numbers, "largest_difference": 0.0}


def _as_nir(
    task: Task, model: nn.Module, options: ExportOptions, description: dict[str, Any]
) -> tuple[bytes, dict[str, Any]]:
    """Return the content of a NIR file of what of a network NIR can say, and its description."""
    part = task.spiking_part(copy.deepcopy(model))
    size, _ = options.choose_size(task.input_size, part.backbone)
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (part.mean, part.std))
    example = (noise(1, size, len(mean)) - mean) / std
    meaning = f"{task.config.data.colours} in [0, 1], less {list(part.mean)}, divided by {list(part.std)}"
    stem = part.backbone.parts().get("stem")
    if stem is not None and any(isinstance(layer, nn.MaxPool2d) for layer in stem.modules()):
        with torch.no_grad():
            example = stem(example)
        part.backbone.stem = nn.Identity()
        meaning = f"what the stem gives: membrane potentials, of {meaning}"
    network, nir, buffer = fold(part.network), import_extra("nir"), io.BytesIO()
    graph = to_nir(network, example)
    nir.write(buffer, graph)
    parity = check_nir(nir.read(io.BytesIO(buffer.getvalue())), graph, fix_size(network, example), example)
    outputs = "an Output node for each map, or for the logits"
    return buffer.getvalue(), description | {"inputs": {"input": meaning}, "outputs": outputs, "parity": parity}
