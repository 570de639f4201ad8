"""The kinds of recipes by the task that they are for."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from detection.config.schema import Recipe

BUILT_IN = "detection.tasks.recipes"  # imported before the first lookup, as the plugins of a recipe are
_RECIPES: dict[str, type[Recipe]] = {}


def register_recipe(kind: type[Recipe]) -> type[Recipe]:
    """Decorate a subclass of `Recipe` whose `task` has a default: recipe files with this task are read as it.

    Raises:
        ValueError: another class is registered for the task.
    """
    name = kind.model_fields["task"].default
    taken = _RECIPES.get(name, kind)
    if (taken.__module__, taken.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ValueError(f"task {name!r} is registered already, by {taken.__module__}")
    _RECIPES[name] = kind
    return kind


def recipe_kinds() -> dict[str, type[Recipe]]:
    """Return the registered kinds of recipes by task."""
    importlib.import_module(BUILT_IN)
    return dict(_RECIPES)


def default_task() -> str:
    """Return the task of a recipe that names none."""
    return importlib.import_module(BUILT_IN).DEFAULT_TASK


def import_plugins(modules: Iterable[str]) -> None:
    """Import Python modules that register what they bring.

    Raises:
        ValueError: a module cannot be imported; the message has the reason.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # a module may fail in any way
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"plugins: {module}: cannot be imported ({reason}); is it installed, or on PYTHONPATH?"
            ) from None
