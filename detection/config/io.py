"""Recipes as files and command lines: read, checked, overridden, written back, compared."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml
from pydantic import BaseModel, ValidationError

from detection.config.registry import default_task, import_plugins, recipe_kinds
from detection.config.schema import Recipe, Section
from detection.config.yaml_files import read_yaml
from detection.files import write_whole
from detection.text import nearest, shorten

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)

# What may differ when a run goes on, because no number depends on it.
FREE_KEYS = {
    "data.root",
    "data.workers",
    "evaluation.backend",
    "train.save_minutes",
    "train.save_steps",
    "train.tensorboard",
    "train.timeout_minutes",
}


def load_config(path: str | Path, overrides: Sequence[str] = (), *, prog: str | None = None) -> Recipe:
    """Return the recipe in a file with command-line overrides on top.

    Args:
        path: YAML file.
        overrides: `--section.key value` or `section.key=value`, as typed on a command line.
        prog: program name in help texts.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not YAML, or a key or value is not allowed; the message names file, key and remedy.
        SystemExit: an override is wrong (explained on standard error), or `--help` was among them.
    """
    return override(read_recipe(path), overrides, prog=prog)


def read_recipe(path: str | Path) -> Recipe:
    """Return the recipe in a file, of the kind that its `task` says; errors as in `load_config`."""
    return parse_recipe(_read_values(Path(path)), str(path))


def parse_recipe(values: Mapping[str, Any], source: str) -> Recipe:
    """Return the recipe of the values of a file; errors as in `load_config`."""
    values = upgrade(values)
    plugins = values.get("plugins")
    if isinstance(plugins, list) and all(isinstance(module, str) for module in plugins):
        try:
            import_plugins(plugins)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
    kinds = recipe_kinds()
    task = values.get("task", default_task())
    if not isinstance(task, str) or task not in kinds:
        raise ValueError(f"{source}: task: expected {' or '.join(kinds)}, got {task!r}")
    try:
        return kinds[task].model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{source}: " + "; ".join(_explain(error, kinds[task]))) from None


def upgrade(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a recipe as this version has them: until 0.1 a classifier's mean and std stood in `data`."""
    values = dict(values)
    data, model = values.get("data"), values.get("model", {})
    if isinstance(data, Mapping) and isinstance(model, Mapping) and "detector" not in model:
        moved = {key: data[key] for key in ("mean", "std") if key in data}
        if moved and not moved.keys() & model.keys():
            values["data"] = {key: value for key, value in data.items() if key not in moved}
            values["model"] = {**model, **moved}
    return values


def override(config: AnyRecipe, overrides: Sequence[str], *, prog: str | None = None) -> AnyRecipe:
    """Return `config` with `--section.key value` or `section.key=value` applied; errors as in `load_config`."""
    arguments = [f"--{text}" if "=" in text and not text.startswith("-") else text for text in overrides]
    return tyro.cli(
        type(config),
        default=config,
        args=arguments,
        prog=prog,
        config=(tyro.conf.FlagConversionOff,),
        use_underscores=True,
    )


def set_values(config: AnyRecipe, values: Mapping[str, Any]) -> AnyRecipe:
    """Return `config` with {"section.key": value} applied.

    Raises:
        ValueError: a key or value is not allowed.
    """
    tree = config.model_dump()
    for key, value in values.items():
        *sections, last = key.split(".")
        place: Any = tree
        for section in sections:
            place = place.setdefault(section, {}) if isinstance(place, dict) else {}
        place[last] = value
    try:
        return type(config).model_validate(tree)
    except ValidationError as error:
        raise ValueError("; ".join(_explain(error, type(config)))) from None


def recipes_folder() -> Path:
    """Return the folder of the recipes that come with the package."""
    installed = Path(__file__).parents[1] / "recipes"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "configs"


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package, sorted."""
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def find_recipe(source: str | Path) -> Path:
    """Return the file of a recipe: a path, or the name of one that comes with the package.

    Raises:
        FileNotFoundError: there is neither.
    """
    path = Path(source)
    if path.is_file():
        return path
    if path.name == str(source) and path.suffix not in (".yaml", ".yml"):
        packaged = recipes_folder() / f"{source}.yaml"
        if packaged.is_file():
            return packaged
        raise FileNotFoundError(f"{source}: no such recipe{nearest(str(source), recipe_names())}")
    raise FileNotFoundError(f"{path}: no such config file")


def save_config(config: Recipe, path: str | Path) -> None:
    """Write every value of `config`, defaults included, as YAML that `load_config` reads back equal."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_whole(Path(path), text.encode())


def flatten(config: BaseModel) -> dict[str, Any]:
    """Return {"train.epochs": 3, ...} of a recipe, plain values."""

    def walk(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(walk(config.model_dump(mode="json"), ""))


def require_same(found: Mapping[str, Any], wanted: Recipe, source: str, *, free: Collection[str] = FREE_KEYS) -> None:
    """Raise ValueError that names the first key in which a recipe differs from a `flatten`ed one.

    Args:
        found: of the run that is there.
        wanted: the recipe now.
        source: what `found` belongs to, for the message.
        free: keys that may differ.
    """
    now = flatten(wanted)
    for key in sorted((found.keys() | now.keys()) - set(free)):
        if key in found and found[key] != now.get(key):
            raise ValueError(
                f"{source}: trained with {key} {found[key]!r}, wanted is {now.get(key)!r}; name another folder"
            )


def _read_values(path: Path) -> dict[str, Any]:
    values = read_yaml(path)
    if not isinstance(values, dict):
        sections = ", ".join(Recipe.model_fields)
        raise ValueError(f"{path}: expected sections {sections}, got {type(values).__name__}")
    return values


def _explain(error: ValidationError, kind: type[Section]) -> Iterator[str]:
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = _known_keys(kind, item["loc"][:-1])
            yield f"unknown key {key!r}{nearest(str(item['loc'][-1]), known)}"
        elif item["type"] == "missing":
            yield f"{key} is missing"
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = item["input"]
            yield f"{key}: {message}" + ("" if isinstance(given, dict) else f" (got {shorten(given)})")


def _known_keys(kind: type[Section], location: Sequence[Any]) -> list[str]:
    section: Any = kind
    for part in location:
        section = section.model_fields[part].annotation
    return list(section.model_fields)
