"""Learning from a trained network: losses that draw a student towards its teacher, such as the analogue twin."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from backbones import average_steps, time_steps
from detection.config import Recipe
from detection.training.trainer import Losses

if TYPE_CHECKING:
    from detection.tasks.base import Task


def require_same_input(ours: Recipe, theirs: Recipe, *sizes: str) -> None:
    """Raise ValueError unless a teacher's recipe has images of as many channels as ours, and of the sizes, by key.

    A teacher sees the images of its student; a detector takes those of any size.
    """
    if theirs.data.channels != ours.data.channels:
        raise ValueError(f"its images have {theirs.data.channels} channels, this recipe's {ours.data.channels}")
    for key in sizes:
        known, wanted = attrgetter(key)(theirs), attrgetter(key)(ours)
        if known != wanted:
            raise ValueError(f"{key} is {known}, this recipe's is {wanted}; a teacher sees the images of its student")


def learn_from(teacher: nn.Module, student: nn.Module, task: Task, accelerator: Accelerator) -> Losses:
    """Return the task's losses with "distillation" and, if wanted, "features" beside them, weighted.

    "distillation" compares the class predictions, "features" what the head sees: the last map of a classifier's
    backbone, the pyramid of a detector.

    Args:
        teacher: trained network, in evaluation mode; it is moved to the device of the training.
        student: watched by hooks; may be wrapped later.
        task: of the recipe, which says what is compared and how.
        accelerator: of the training.
    """
    settings = task.config.distillation
    teacher = teacher.to(accelerator.device).requires_grad_(False)
    ask = task.teacher_pass(student)
    seen, known = (watch(task, model) for model in (student, teacher))

    def compute(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        found = task.losses(model, batch)
        with torch.no_grad(), accelerator.autocast():
            ask(teacher, batch)
        if settings.logits:
            gap = task.distance(seen["logits"].float(), known["logits"].float(), settings.temperature)
            found["distillation"] = settings.logits * gap
        if settings.features:
            found["features"] = settings.features * feature_distance(seen["features"], known["features"])
        return found

    return compute


def watch(task: Task, model: nn.Module) -> dict[str, Any]:
    """Return a dict that always has what a network's head saw and said in its last pass: "features", maps; "logits".

    Of several time steps it has the means.
    """
    seen, steps = {}, time_steps(model)

    def keep_features(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        maps = [inputs[0]] if isinstance(inputs[0], Tensor) else inputs[0]
        seen["features"] = [average_steps(x, steps) for x in maps]

    def keep_logits(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        seen["logits"] = average_steps(output, steps)

    task.receiver_of(model).register_forward_pre_hook(keep_features)
    task.head_of(model).register_forward_hook(keep_logits)
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
    distances = []
    for index, (ours, theirs) in enumerate(zip(student, teacher, strict=True)):
        if ours.shape != theirs.shape:
            raise ValueError(
                f"distillation.features: map {index} of the student is {tuple(ours.shape)}, of the teacher "
                f"{tuple(theirs.shape)}; give both the same backbone and width, or set the weight to 0"
            )
        distances.append(1 - F.cosine_similarity(ours.float(), theirs.float(), dim=1).mean())
    return torch.stack(distances).mean()
