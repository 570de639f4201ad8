"""A saved run as a file: `export_run`, which `tools/export.py` calls."""

from __future__ import annotations

import copy
import hashlib
import io
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import backbones
from backbones.deploy.fold import fold
from backbones.deploy.integer import fix_size, to_integers
from detection.checkpoint import Run, Weights
from detection.classification import in_memory
from detection.config import ClassificationConfig, Config, Recipe
from detection.data import DetectionDataset, build_datasets
from detection.data.images import FolderImages, read_folder, read_images
from detection.export.common import ParityError, difference_of, import_extra, leaves
from detection.export.inference import METADATA_KEY, evaluate_file
from detection.export.networks import DensePredictions, EnteringSpikes, Normalised, resize_and_pad
from detection.export.nir import to_nir
from detection.export.onnx import OPSET, to_onnx
from detection.export.parity import check_nir, check_onnx
from detection.files import write_whole
from detection.models import load_model

Format = Literal["onnx", "torch", "nir"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2", "nir": ".nir"}
PACKAGES: dict[Format, tuple[str, ...]] = {"onnx": ("onnx", "onnxruntime"), "torch": (), "nir": ("nir",)}
NUM_CALIBRATION = {"classification": 256, "detection": 64}
PADDED = 32  # torchvision pads images to multiples of so many pixels
# Their outputs are scores and boxes, where 8 bits would show: they stay in floating point, over spikes too.
PREDICTIONS = ("cls_logits", "bbox_reg", "bbox_ctrness", "module_list")


def export_run(
    folder: str | Path,
    file_format: Format,
    out: str | Path | None = None,
    *,
    which: Weights = "last",
    int8: bool = False,
    analogue: bool = False,
    data_root: str | Path | None = None,
    num_calibration: int | None = None,
    height: int | None = None,
    width: int | None = None,
    evaluate: bool = False,
) -> tuple[Path, dict[str, Any]]:
    """Writes a saved run's network as a file and, beside it, NAME.json that says what it takes and gives.

    The file is checked against PyTorch before it is written. A classifier, or the dense part of a RetinaNet, FCOS or
    SSD; as NIR what of a classifier, or of a detector's backbone up to the spikes that enter the pyramid, NIR can say:
    a ResNet from behind its stem, whose max-pool of real values NIR does not know.

    Args:
        folder: the run, as `Run.open` takes it.
        file_format: "onnx", "torch" (torch.export, .pt2) or "nir".
        out: the file; None: model.onnx, model_int8.onnx, model.pt2 or model.nir among the run's products.
        which: which of its weights.
        int8: int8 weights and integer thresholds where layers see spikes; not for NIR.
        analogue: with `int8`: 8 bits for analogue convolutions, too, but the first and those of prediction.
        data_root: where the data lie now, from which `int8` takes training images; None: where they lay in training.
        num_calibration: training images for the thresholds; None: 256 for a classifier, 64 for a detector.
        height: of the images, which are then of this size only. None: free where the network permits.
        width: likewise; both or none.
        evaluate: measure how accurate an ONNX file is on the run's evaluation images, beside the run's log.

    Returns:
        The file, and what NAME.json holds.

    Raises:
        FileExistsError: the file, or the .json beside it, exists already.
        FileNotFoundError: no such run, weights, or data.
        ImportError: a package is missing.
        ParityError: the file does not do what the network does; it is not written.
        ValueError: the run cannot be exported so.
    """
    run = Run.open(folder, data_root)
    if file_format not in SUFFIXES:
        raise ValueError(f"format {file_format!r} (allowed: {', '.join(SUFFIXES)})")
    for name in PACKAGES[file_format]:
        import_extra(name)
    path = Path(out) if out else run.products / f"model{'_int8' if int8 else ''}{SUFFIXES[file_format]}"
    sidecar = path.with_name(f"{path.name}.json")
    for file in (path, sidecar):
        if file.exists():
            raise FileExistsError(f"{file} exists already; name another file with --out, or remove it first")
    if not out:
        path.parent.mkdir(parents=True, exist_ok=True)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--out {path}: there is no folder {path.parent}")
    if (height is None) != (width is None):
        raise ValueError("height and width of the images: both or none")
    if num_calibration is not None and num_calibration < 1:
        raise ValueError(f"--calibration {num_calibration}: at least one image is needed")
    if analogue and not int8:
        raise ValueError("--analogue-int8 goes with --int8")
    if evaluate and file_format != "onnx":
        raise ValueError(f"--evaluate: the format {file_format} is not run by this project (allowed: onnx)")
    if int8 and file_format == "nir":
        raise ValueError("--int8: NIR has no integers (allowed with onnx and torch)")
    model = load_model(run, which).float().to(memory_format=torch.contiguous_format)
    if int8 and not any(isinstance(module, backbones.HoyerSpike) for module in model.modules()):
        raise ValueError(f"--int8: {folder} has no spike layers; integers add up spikes")
    config = run.config
    size, free = _sizes(config, model, height, width)
    example = _noise(1, size)
    description: dict[str, Any] = {
        "format": file_format,
        "task": config.task,
        "run": run.folder.name,
        "weights": which,
        "weights_sha256": run.checksums()[f"{which}.safetensors"],
        "classes": list(config.data.classes),
        "int8": int8,
        "analogue_int8": analogue,
        "model": config.model.model_dump(mode="json"),
        "versions": _versions("torch", "torchvision", *PACKAGES[file_format]),
    }
    if file_format == "nir":
        network, example, entry = nir_network(model, config, example)
        description |= {"inputs": {"input": entry}, "outputs": "an Output node for each map, or for the logits"}
        content, parity = nir_bytes(network, example)
    else:
        network, outputs, meaning = _network(model, config)
        free = free and not any(
            isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size not in (1, (1, 1))
            for layer in network.modules()
        )
        calibration = None
        if int8:
            number = num_calibration or NUM_CALIBRATION[config.task]
            calibration = calibration_images(config, model, number, None if free else size)
            network = to_integers(
                network, calibration, keep=PREDICTIONS if config.task == "detection" else (), analogue=analogue
            )
            description["calibration_images"] = len(calibration)
        elif not free:
            network = fix_size(network, example)
        description |= {
            "inputs": {"images": _describe_input(config, size, free)},
            "outputs": {name: meaning[name] for name in outputs},
        }
        batches = [example, _noise(3, (size[0] // 2 + 33, size[1] // 2 + 65) if free else size)]
        if calibration is not None:
            batches.append(calibration[:2])
        if file_format == "onnx":
            description["opset"] = OPSET
            metadata = {
                METADATA_KEY: json.dumps(description),
                "description": _describe_input(config, size, free)["meaning"],
            }
            file = to_onnx(network, dynamic_size=free, example=example, outputs=outputs, metadata=metadata)
            parity = check_onnx(file, network, batches)
            content = file.SerializeToString()
        else:
            content, parity = torch_bytes(network, batches, free)
    description |= {"parity": parity, "file": path.name, "sha256": hashlib.sha256(content).hexdigest()}
    write_whole(path, content)
    if evaluate:
        try:
            description["evaluation"] = evaluate_file(path, folder, which, data_root=data_root)
        except BaseException:
            path.unlink()  # there with its .json or not at all
            raise
    write_whole(sidecar, (json.dumps(description, indent=2) + "\n").encode())
    return path, description


def _sizes(config: Recipe, model: nn.Module, height: int | None, width: int | None) -> tuple[tuple[int, int], bool]:
    """Size of the images, and whether others are possible as far as the options go."""
    if height is not None and width is not None:
        body = model.backbone if isinstance(config, ClassificationConfig) else model.backbone.body
        stride = body.feature_info[-1].stride
        if min(height, width) < stride:
            raise ValueError(f"--height {height} --width {width}: at least {stride}, the network's last stride")
        return (height, width), False
    if isinstance(config, ClassificationConfig):
        return (config.data.size, config.data.size), True
    if config.model.detector == "ssd":
        return (config.model.max_size, config.model.max_size), True
    short, long = (-(-side // PADDED) * PADDED for side in (max(config.model.min_size), config.model.max_size))
    return (short, long), True


def _noise(number: int, size: tuple[int, int]) -> Tensor:
    """Images (N, 3, H, W) in [0, 1] of coarse and fine noise, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(number, 3, 5, 5, generator=generator)
    fine = torch.rand(number, 3, *size, generator=generator)
    return 0.7 * F.interpolate(coarse, size, mode="bilinear") + 0.3 * fine


def _network(model: nn.Module, config: Recipe) -> tuple[fx.GraphModule, list[str], dict[str, str]]:
    """The folded network over images in [0, 1], the names of its outputs, and what they mean."""
    if isinstance(config, ClassificationConfig):
        network = fold(Normalised(model, config.data.mean, config.data.std))
        return network, ["logits"], {"logits": "(N, K) float32, in the order of classes"}
    dense = DensePredictions(model)
    meaning = {
        "cls_logits": "(N, A, K + 1) float32: for each anchor, finest level first, background and classes",
        "bbox_regression": "(N, A, 4) float32: offsets from the anchors as torchvision encodes them",
        "bbox_ctrness": "(N, A, 1) float32: centredness logits",
    }
    return fold(Normalised(dense, config.model.mean, config.model.std)), dense.outputs, meaning


def _describe_input(config: Recipe, size: tuple[int, int], free: bool) -> dict[str, Any]:
    meaning = "RGB in [0, 1], normalised inside"
    if isinstance(config, Config):
        meaning += (
            f"; resized (shorter side {list(config.model.min_size)}, longer at most {config.model.max_size}) and "
            f"padded at the right and below with the mean colour {list(config.model.mean)} to multiples of {PADDED}, "
            "which detection.export.OnnxDetector does"
        )
    sides: list[str | int] = ["height", "width"] if free else list(size)
    return {"shape": ["N", 3, *sides], "type": "float32", "meaning": meaning}


def _versions(*packages: str) -> dict[str, str]:
    return {name: version(name) for name in packages}


def nir_network(model: nn.Module, config: Recipe, example: Tensor) -> tuple[fx.GraphModule, Tensor, str]:
    """What of a network NIR can say, an input of it, and what that input is."""
    model = copy.deepcopy(model)
    if isinstance(config, ClassificationConfig):
        body, network, colours = model.backbone, model, config.data
    else:
        body, network, colours = model.backbone.body, EnteringSpikes(model.backbone), config.model
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (colours.mean, colours.std))
    x = (example - mean) / std
    meaning = f"RGB in [0, 1], less {list(colours.mean)}, divided by {list(colours.std)}"
    stem = getattr(body, "stem", None)
    if isinstance(stem, nn.Sequential) and any(isinstance(layer, nn.MaxPool2d) for layer in stem):
        with torch.no_grad():
            x = stem(x)
        body.stem = nn.Identity()
        meaning = f"what the stem gives: membrane potentials, of {meaning}"
    return fold(network), x, meaning


def nir_bytes(network: fx.GraphModule, example: Tensor) -> tuple[bytes, dict[str, Any]]:
    nir = import_extra("nir")
    graph = to_nir(network, example)
    buffer = io.BytesIO()
    nir.write(buffer, graph)
    parity = check_nir(nir.read(io.BytesIO(buffer.getvalue())), graph, fix_size(network, example), example)
    return buffer.getvalue(), parity


def torch_bytes(network: fx.GraphModule, batches: Sequence[Tensor], free: bool) -> tuple[bytes, dict[str, Any]]:
    """A program of torch.export, and how well it agrees with the network once read back."""
    automatic = torch.export.Dim.AUTO
    dynamic = {0: automatic, 2: automatic, 3: automatic} if free else {0: automatic}
    several = batches[1]  # a batch of one would be taken for the only size
    program = torch.export.export(network, (several,), dynamic_shapes=(dynamic,))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    largest = 0.0
    with torch.no_grad():
        for images in batches:
            for number, (ours, theirs) in enumerate(zip(leaves(network(images)), leaves(loaded(images)), strict=True)):
                difference = difference_of(ours, theirs, f"output {number}")
                if difference > 1e-3:
                    raise ParityError(f"the program's output {number} differs from the network's by {difference:.2g}")
                largest = max(largest, difference)
    return buffer.getvalue(), {"largest_difference": largest}


def calibration_images(config: Recipe, model: nn.Module, number: int, size: tuple[int, int] | None = None) -> Tensor:
    """Training images (N, 3, H, W) without augmentation, RGB in [0, 1], as the exported network takes them.

    Args:
        config: of the run; its data are read.
        model: of the run, whose transform resizes a detector's images.
        number: how many, drawn at random, always the same; all there are, if that is less.
        size: (H, W); None: that of the recipe.
    """
    generator = torch.Generator().manual_seed(0)
    if isinstance(config, ClassificationConfig):
        data = config.data
        if in_memory(config):
            pixels = read_images(data, "train").pixels
            images = pixels[torch.randperm(len(pixels), generator=generator)[:number]].float() / 255
        else:
            files = read_folder(data.root / data.train, data.classes)
            dataset = FolderImages(files, data, train=False)
            chosen = torch.randperm(len(files.files), generator=generator)[:number].tolist()
            mean, std = torch.tensor(data.mean).view(3, 1, 1), torch.tensor(data.std).view(3, 1, 1)
            images = torch.stack([dataset[index][0] for index in chosen]) * std + mean
    else:
        train, _ = build_datasets(config.data)
        plain = DetectionDataset(train.annotations)
        chosen = torch.randperm(len(plain), generator=generator)[:number].tolist()
        images = resize_and_pad(model.transform, [plain[index][0] for index in chosen])
    if size is not None and tuple(images.shape[2:]) != size:
        images = F.interpolate(images, size, mode="bilinear", antialias=True)
    return images
