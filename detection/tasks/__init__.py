"""Tasks: all that differs between kinds of training stands behind one object, `task_of(recipe)`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from detection.config.registry import add_to

if TYPE_CHECKING:
    from detection.config import Recipe
    from detection.tasks.base import Task

BUILT_IN = ("detection.tasks.detection", "detection.tasks.classification")
_TASKS: dict[str, type[Task]] = {}


def register_task(task: type[Task]) -> type[Task]:
    """Decorate a subclass of `Task`: recipes of its kind are then trained, evaluated, ... by it.

    Raises:
        ValueError: another class is registered for the task of its recipe.
    """
    return add_to(_TASKS, task.recipe.model_fields["task"].default, task, "task")


def task_of(config: Recipe) -> Task:
    """Return the task of a recipe.

    Raises:
        ValueError: no task is registered for it.
    """
    for module in BUILT_IN:
        importlib.import_module(module)
    if config.task not in _TASKS:
        raise ValueError(f"task {config.task!r}: none is registered (allowed: {', '.join(_TASKS)})")
    return _TASKS[config.task](config)
