"""Start from a whole trained network, whose classes may be others, or from the end of a finished run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from backbones import read_tensors, zoo
from backbones.net2net import add_thresholds
from backbones.weights import LEAK, require_finite
from detection.config import Recipe, flatten
from detection.records import Extension, Start
from detection.runs import Run, check_weights
from detection.tasks.base import Task
from detection.text import plural

# Of a recipe's `model`: what has to be the same for weights to mean the same; all else may differ.
KEYS = (
    "detector",
    *(f"backbone.{key}" for key in zoo.KEYS),
    *(f"neck.{key}" for key in ("source", "levels", "extra_levels", "out_channels", "spiking")),
    *(f"head.{key}" for key in ("spiking", "num_convs", "norm")),
    "mean",
    "std",
)


def without_weights(task: Task) -> Task:
    """Return the task of a network that brings its own weights, so that no pretrained ones are read."""
    config = task.config.model_copy(deep=True)
    config.model.backbone.weights = None
    return type(task)(config)


def find_extension(run: Run, extend: int, lr_factor: float) -> Extension | None:
    """Return the cycle of the schedule that a run is in, or is to begin with `extend` epochs; None: its first.

    Raises:
        ValueError: it is to begin one, but has not finished, or is an entry of the zoo.
    """
    if not extend:
        return next(reversed(run.info().extended), None) if (run.folder / "run.json").is_file() else None
    if zoo.name_of(run.folder) is not None:
        raise ValueError(f"{run.address}: part of the package; --model.weights {run.address} begins a run with it")
    if not run.finished:
        raise ValueError(f"{run.folder}: not finished; only a run that has come to its end is extended")
    return Extension(after=run.history()[-1].epoch, epochs=extend, lr_factor=lr_factor)


def extended(config: Recipe, extension: Extension) -> Recipe:
    """Return the recipe with the epochs of an extension."""
    train = config.train.model_copy(update={"epochs": extension.after + extension.epochs})
    return config.model_copy(update={"train": train})


def start_from(task: Task, model: nn.Module) -> Start | None:
    """Load the network of the recipe's model.weights into a new one, and return what was taken; None without any.

    Outputs of a class go to those of the class of the same name. Where no recipe lies beside a file, its classes are
    not known, and none is taken over.

    Raises:
        FileNotFoundError: there are no such weights.
        ValueError: they are damaged, or something beside the classes differs; names the key, or the tensor.
    """
    source = getattr(task.config.model, "weights", None)
    if source is None:
        return None
    path = zoo.locate(source)
    if path.is_dir():
        path = Run.open(path).folder / "last.safetensors"
    state, _ = read_tensors(path)
    check_weights(path)
    require_finite(state, str(path))
    known: list[str] = []
    if (path.parent / "config.yaml").is_file():
        theirs = Run.open(path.parent).config
        require_same_network(f"model.weights {source}", theirs, task.config)
        known = list(theirs.data.classes)
    return take_over(model, state, task.class_outputs(model), (known, task.config.data.classes), source)


def require_same_network(place: str, theirs: Recipe, ours: Recipe) -> None:
    """Raise ValueError that names the first key in which the network of a recipe is not that of another."""
    if theirs.task != ours.task:
        raise ValueError(
            f"{place}: trained for {theirs.task}, not for {ours.task}; model.backbone.weights takes the backbone alone"
        )
    then, now = flatten(theirs.model), flatten(ours.model)
    key = zoo.first_difference(then, now, KEYS)
    if key is not None:
        raise ValueError(f"{place}: trained with model.{key} {then[key]!r}, this recipe's is {now[key]!r}")
    require_same_anchors(place, theirs, ours)


def require_same_anchors(place: str, theirs: Recipe, ours: Recipe) -> None:
    """Raise ValueError where outputs belong to anchors of another size, which no shape tells."""
    then, now = (getattr(recipe.model, "anchor_scale", None) for recipe in (theirs, ours))
    if then != now:
        raise ValueError(f"{place}: trained with model.head.anchor_scale {then:g}, this recipe's is {now:g}")


def describe(start: Start) -> str:
    """Return what was taken over, in numbers."""
    names = f" (classes {', '.join(start.classes)})" if start.partly else ""
    taken = plural(len(start.taken), "tensor")
    rest = f"{len(start.partly)} in part{names}, {len(start.new)} new, {len(start.left_out)} left out"
    return f"model.weights {start.source}: {taken} taken, {rest}"


def take_over(
    model: nn.Module,
    state: Mapping[str, Tensor],
    layers: Mapping[str, tuple[int, int]],
    classes: tuple[Sequence[str], Sequence[str]],
    source: str,
) -> Start:
    """Load what fits of a state dict into a network, and return what that was.

    Args:
        model: changed only if all fits but the classes.
        state: of the other network; one threshold fits several, see `add_thresholds`.
        layers: those with outputs per class, see `Task.class_outputs`.
        classes: names of the other network's and of this one's.
        source: of the state dict, for messages.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape.
    """
    own = {key: value.clone() for key, value in model.state_dict().items()}
    known, wanted = map(list, classes)
    state = add_thresholds(state, model)
    both = [name for name in wanted if name in known]
    start = Start(source=source, classes=both, left_out=[key for key in state if key not in own])
    problems = [f"{key!r} is unknown here" for key in start.left_out]
    for key, value in own.items():
        layer, theirs = layers.get(key.rpartition(".")[0]), state.get(key)
        old, new = theirs, value
        if theirs is not None and layer is not None and known != wanted:
            if not both:
                start.new.append(key)
                start.left_out.append(key)
                continue
            old, new = _rows(theirs, layer, known, both), _rows(value, layer, wanted, both)
        if old is None:
            start.new.append(key)
            if not key.endswith(LEAK):  # a network of one time step has none; 1 is where it starts
                problems.append(f"{key!r} is missing")
        elif old.shape != new.shape:
            problems.append(f"{key!r} has the shape {tuple(theirs.shape)}, wanted is {tuple(value.shape)}")
        elif new is value:
            start.taken.append(key)
            value.copy_(old)
        else:
            start.partly.append(key)
            rows = _rows(torch.arange(len(value)), layer, wanted, both)
            value[rows.flatten()] = old.flatten(0, 2).to(value.dtype)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(
            f"model.weights {source} does not fit this recipe's network: {problems[0]}{more}; only the classes may be "
            "others (model.backbone.weights takes a backbone alone)"
        )
    model.load_state_dict(own)
    return start


def _rows(tensor: Tensor, layer: tuple[int, int], names: Sequence[str], chosen: Sequence[str]) -> Tensor:
    """The outputs of some classes and of what stands in front of all: (R, ...) -> (anchors, classes, each, ...).

    A tensor of other outputs than the names say is returned as it is, so that its shape fits none.
    """
    front, each = layer
    if len(tensor) % ((front + len(names)) * each):
        return tensor
    places = [*range(front), *(front + names.index(name) for name in chosen)]
    return tensor.unflatten(0, (-1, front + len(names), each))[:, places]
