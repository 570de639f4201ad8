"""Learning from a trained network: losses that draw a student towards its teacher, such as the analogue twin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from detection.checkpoint import Run
from detection.config import Distillation, Recipe
from detection.engine import ComputeLosses
from detection.models import load_model


def learn_from(
    settings: Distillation,
    compute_losses: ComputeLosses,
    student: nn.Module,
    config: Recipe,
    accelerator: Accelerator,
) -> ComputeLosses:
    """`compute_losses` with "distillation" and, if wanted, "features" beside the task's losses, weighted.

    "distillation" compares the class predictions, "features" what the classification head sees: the last map of a
    classifier's backbone, the pyramid of a detector. The teacher sees the pixels that the student sees.

    Args:
        settings: which teacher, and the weights.
        compute_losses: the task's.
        student: watched by hooks; may be wrapped later.
        config: the student's recipe, class names filled in.
        accelerator: of the training.

    Raises:
        FileNotFoundError: the teacher is no run folder.
        ValueError: it was trained for another task or other classes.
    """
    teacher = load_teacher(settings, config).to(accelerator.device).requires_grad_(False)
    seen, known = watch_head(student), watch_head(teacher)
    pixels: dict[str, Tensor] = {}
    detecting = hasattr(student, "transform")
    if detecting:
        student.transform.register_forward_hook(lambda module, inputs, output: pixels.update(images=output[0].tensors))

    def compute(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        losses = compute_losses(model, batch)
        with torch.no_grad(), accelerator.autocast():
            if detecting:
                teacher.head.classification_head(list(teacher.backbone(pixels["images"]).values()))
            else:
                teacher(batch[0])
        if settings.logits:
            distance = detection_distance if detecting else softened_distance
            losses["distillation"] = settings.logits * distance(
                seen["logits"].float(), known["logits"].float(), settings.temperature
            )
        if settings.features:
            losses["features"] = settings.features * feature_distance(seen["features"], known["features"])
        return losses

    return compute


def load_teacher(settings: Distillation, config: Recipe) -> nn.Module:
    """The teacher with its last weights, in evaluation mode; errors as in `learn_from`."""
    run = Run.open(settings.teacher)
    if run.config.task != config.task:
        raise ValueError(f"distillation.teacher {run.folder}: trained for {run.config.task}, not for {config.task}")
    theirs, ours = list(run.config.data.classes), list(config.data.classes)
    if theirs != ours:
        raise ValueError(
            f"distillation.teacher {run.folder}: knows the classes {', '.join(theirs[:5])} ({len(theirs)} in all), "
            f"this recipe has {', '.join(ours[:5])} ({len(ours)} in all)"
        )
    if config.task == "detection" and run.config.model.detector != config.model.detector:
        kinds = f"is a {run.config.model.detector}, this recipe a {config.model.detector}"
        raise ValueError(f"distillation.teacher {run.folder}: {kinds}")
    # The teacher is given the pixels as the student's recipe has normalised them.
    theirs, ours = (each.model if each.task == "detection" else each.data for each in (run.config, config))
    for key in ("mean", "std"):
        if getattr(theirs, key) != getattr(ours, key):
            raise ValueError(
                f"distillation.teacher {run.folder}: its images were normalised with {key} {getattr(theirs, key)}, "
                f"this recipe's are with {getattr(ours, key)}"
            )
    return load_model(run)


def watch_head(model: nn.Module) -> dict[str, Any]:
    """What the classification head of `model` saw and said in its last pass: "features", maps; "logits"."""
    seen: dict[str, Any] = {}

    def keep(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        maps = inputs[0]
        seen.update(features=[maps] if isinstance(maps, Tensor) else list(maps), logits=output)

    getattr(model.head, "classification_head", model.head).register_forward_hook(keep)
    return seen


def softened_distance(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over the batch (Hinton et al., arXiv:1503.02531).

    Shape: two (N, K) -> ().
    """
    student, teacher = (F.log_softmax(logits / temperature, dim=1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def detection_distance(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Quality focal loss (Li et al., arXiv:2006.04388) with the teacher's scores p as targets, divided by their sum.

    sum |p - q|^2 BCE(q, p) / sum p, at least 1, with q the student's scores: only where the two disagree, and not
    drowned by the many places that hold nothing. `temperature` is not used: the scores are sigmoids.

    Shape: two (N, anchors, K) -> ().

    Raises:
        ValueError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"distillation.logits: the student predicts {student.shape[1]} places, the teacher {teacher.shape[1]}; "
            "give both the same pyramid and anchors, or set the weight to 0"
        )
    target = teacher.sigmoid()
    gap = (target - student.sigmoid()).detach().square()
    distance = F.binary_cross_entropy_with_logits(student, target, reduction="none")
    return (gap * distance).sum() / target.sum().clamp_min(1)


def feature_distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """1 - cosine similarity over the channels, in [0, 2], mean over places and maps.

    Shape: lists of (N, C, H, W) -> ().

    Raises:
        ValueError: a map differs in shape, or there are more of one than of the other.
    """
    if len(student) != len(teacher):
        raise ValueError(
            f"distillation.features: the student's head sees {len(student)} maps, the teacher's {len(teacher)}; give "
            "both the same pyramid, or set the weight to 0"
        )
    for index, (ours, theirs) in enumerate(zip(student, teacher, strict=True)):
        if ours.shape != theirs.shape:
            raise ValueError(
                f"distillation.features: map {index} of the student is {tuple(ours.shape)}, of the teacher "
                f"{tuple(theirs.shape)}; give both the same backbone and width, or set the weight to 0"
            )
    distances = [
        1 - F.cosine_similarity(ours.float(), theirs.float(), dim=1).mean()
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack(distances).mean()
