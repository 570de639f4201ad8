"""The kinds of recipes by the task that they are for; how all registries take what comes from elsewhere."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from detection.config.schema import Recipe
from detection.text import nearest

BUILT_IN = "detection.tasks.recipes"  # imported before the first lookup, as the plugins of a recipe are
Registered = TypeVar("Registered", bound=Callable[..., Any])
_RECIPES: dict[str, type[Recipe]] = {}


def add_to(registry: dict[str, Registered], name: str, what: Registered, kind: str) -> Registered:
    """Return a class or function after adding it to a registry; one whose module is imported again replaces itself.

    Raises:
        ValueError: the name is taken by another one; says by which module.
    """
    taken = registry.get(name, what)
    if (taken.__module__, taken.__qualname__) != (what.__module__, what.__qualname__):
        raise ValueError(f"{kind} {name!r} is registered already, by {taken.__module__}")
    registry[name] = what
    return what


def find_reader(readers: dict[str, Registered], data: Any) -> Registered:
    """Return what reads the format of a recipe's section `data`.

    Raises:
        ValueError: no such format, or it is one of this package, and has no `data.options`.
    """
    if data.format not in readers:
        raise ValueError(f"data.format: unknown {data.format!r}{nearest(data.format, readers)}")
    reader = readers[data.format]
    if data.options and reader.__module__.startswith("detection."):
        raise ValueError(f"data.options: {', '.join(data.options)}: data.format {data.format!r} has none")
    return reader


def register_recipe(kind: type[Recipe]) -> type[Recipe]:
    """Decorate a subclass of `Recipe` whose `task` has a default: recipe files with this task are read as it.

    Raises:
        ValueError: another class is registered for the task.
    """
    return add_to(_RECIPES, kind.model_fields["task"].default, kind, "task")


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
