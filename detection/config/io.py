"""Recipes as files and command lines: read, checked, overridden, written back, compared."""

from __future__ import annotations

import contextlib
import difflib
import functools
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from detection.config.registry import default_task, import_plugins, recipe_kinds
from detection.config.schema import Recipe, Section
from detection.config.yaml_files import dump_yaml, read_yaml
from detection.files import require_path, write_whole
from detection.text import nearest, shorten

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)

# What may differ when a run goes on, because no number depends on it.
FREE_KEYS = {
    "data.root",
    "data.workers",
    "evaluation.backend",
    "train.loggers",
    "train.save_minutes",
    "train.save_steps",
    "train.tensorboard",
    "train.timeout_minutes",
}


def load_config(path: str | Path, overrides: str | Sequence[str] = ()) -> Recipe:
    """Return the recipe in a file with command-line overrides on top.

    Args:
        path: YAML file, or the name of a recipe that comes with the package.
        overrides: `--section.key value` or `section.key=value`, as typed on a command line; a list, or one text.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not YAML, or a key or value is not allowed; the message names file, key and remedy.
    """
    return override(read_recipe(find_recipe(path)), overrides)


def read_recipe(path: str | Path) -> Recipe:
    """Return the recipe in a file, of the kind that its `task` says; errors as in `load_config`."""
    values = read_yaml(Path(path))
    if not isinstance(values, dict):
        sections = ", ".join(Recipe.model_fields)
        raise ValueError(f"{path}: expected sections {sections}, got {type(values).__name__}")
    return parse_recipe(values, str(path))


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
        raise ValueError(f"{source}: {_explain_all(error, kinds[task])}") from None


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


def override(config: AnyRecipe, arguments: str | Sequence[str]) -> AnyRecipe:
    """Return `config` with `--section.key value` or `section.key=value` applied; errors as in `load_config`."""
    return set_values(config, read_overrides(type(config), arguments))


def read_overrides(kind: type[Recipe], arguments: str | Sequence[str]) -> dict[str, Any]:
    """Return {"section.key": value} of `--section.key value ...` and `section.key=value`; values are not checked yet.

    A key takes the argument behind it, whatever that is; one of a list takes all up to the next key.

    Raises:
        ValueError: no such key, or no value.
    """
    arguments = shlex.split(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, Sequence) or not all(isinstance(each, str) for each in arguments):
        raise ValueError(f"overrides: expected a list of texts such as train.epochs=3, got {arguments!r}")
    kinds, found, waiting = key_kinds(kind), {}, list(arguments)

    def begins(argument: str) -> bool:
        key, equals, _ = argument.partition("=")
        return argument.startswith("--") or bool(equals and key in kinds)

    while waiting:
        argument = waiting.pop(0)
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") and not equals:
            raise ValueError(f"{argument!r}: no option and no key of a recipe; expected --section.key VALUE")
        if key not in kinds:
            raise _unknown_key(key, kind, "--")
        several = _origin(kinds[key]) in (list, tuple, dict)
        values = [value] if equals else []
        if several and not equals:
            while waiting and not begins(waiting[0]):
                values.append(waiting.pop(0))
        elif not equals and waiting and not waiting[0].startswith("--"):
            values.append(waiting.pop(0))
        if not values and not several:
            raise ValueError(f"--{key}: its value is missing (one that begins with -- is given by {key}=VALUE)")
        found[key] = _value_of(values, kinds[key])
    return found


def spread_values(kind: type[Recipe], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"section.key": value} of values as Python code has them.

    Sections are dicts, `train={"epochs": 1}`, or in the keys, by dots or "__": "train.epochs", `train__epochs=1`.

    Raises:
        ValueError: no such key, or a key twice.
    """
    kinds, found = key_kinds(kind), {}

    def walk(values: Mapping[str, Any], prefix: str) -> None:
        for name, value in values.items():
            key = prefix + str(name).replace("__", ".")
            if isinstance(value, Mapping) and any(known.startswith(f"{key}.") for known in kinds):
                walk(value, f"{key}.")
            elif key not in kinds:
                raise _unknown_key(key, kind)
            elif key in found:
                raise ValueError(f"{key}: given twice, {found[key]!r} and {value!r}")
            else:
                found[key] = value

    walk(values, "")
    return found


def _unknown_key(key: str, kind: type[Recipe], dashes: str = "") -> ValueError:
    known, command, what = key_kinds(kind), "" if dashes else "hoyer-det train ", "no such key of a recipe"
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {dashes}{close[0]}?" if close else "expected one of " + ", ".join(kind.model_fields)
    if within := [each for each in known if each.startswith(f"{key}.")]:
        what = "a section of a recipe"
        hint = f"expected {'a key' if dashes else 'a mapping, or a key'} of it, such as {dashes}{within[0]}"
    return ValueError(f"{dashes}{key}: {what}; {hint} ({command}RECIPE --help lists all)")


def key_kinds(kind: type[Section], prefix: str = "") -> dict[str, Any]:
    """Return {"section.key": type} of a kind of recipe."""
    kinds = {}
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            kinds |= key_kinds(field.annotation, f"{prefix}{name}.")
        else:
            kinds[prefix + name] = field.annotation
    return kinds


def _origin(kind: Any) -> Any:
    """The type without its parameters; of what may be None, that of the rest."""
    return next((get_origin(part) for part in get_args(kind) if get_origin(part) in (list, tuple)), get_origin(kind))


def _value_of(texts: Sequence[str], kind: Any) -> Any:
    """The value that some arguments stand for, as far as pydantic would not take the texts for it."""
    if texts == ["None"] and NoneType in get_args(kind):
        return None
    if _origin(kind) is dict:
        if len(texts) % 2:
            raise ValueError(f"{' '.join(texts)}: expected names and values in turn")
        return {name: _number_of(text) for name, text in zip(texts[::2], texts[1::2], strict=True)}
    return list(texts) if _origin(kind) in (list, tuple) else texts[0]


def _number_of(text: str) -> bool | int | float | str:
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    return {"true": True, "false": False}.get(text.lower(), text)


def print_keys(config: Recipe, prog: str | None = None) -> None:
    """Print every key of a recipe: its type, meaning and value."""
    with contextlib.suppress(SystemExit):  # which ends a help
        import tyro

        tyro.cli(
            type(config),
            default=config,
            args=["--help"],
            prog=prog,
            config=(tyro.conf.FlagConversionOff,),
            use_underscores=True,
        )


def set_values(config: AnyRecipe, values: Mapping[str, Any]) -> AnyRecipe:
    """Return `config` with {"section.key": value} applied.

    Raises:
        ValueError: a key or value is not allowed, or a plugin cannot be imported.
    """
    tree = config.model_dump()
    for key in config.hoyer.open_keys():  # they follow from the new values
        del tree["hoyer"][key]
    arithmetic = config.model.backbone.arithmetic
    if values.get("model.backbone.arithmetic", arithmetic) != arithmetic:  # it brings its activation
        del tree["model"]["backbone"]["activation"]
    for key, value in values.items():
        *sections, last = key.split(".")
        place: Any = tree
        for section in sections:
            place = place.setdefault(section, {}) if isinstance(place, dict) else {}
        place[last] = value
    try:
        new = type(config).model_validate(tree)
    except ValidationError as error:
        raise ValueError(_explain_all(error, type(config))) from None
    import_plugins(new.plugins)
    return new


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
    require_path("recipe", source, "a file, or the name of a recipe that comes with the package")
    path = Path(source)
    if path.is_file():
        return path
    named = path.name == str(source) and path.suffix not in (".yaml", ".yml")
    if named and (packaged := recipes_folder() / f"{source}.yaml").is_file():  # also beside a run folder of its name
        return packaged
    if path.is_dir():
        verb = "train --resume" if (path / "config.yaml").is_file() else "init"
        raise FileNotFoundError(f"{path}: a folder, no recipe; hoyer-det {verb} {shlex.quote(str(path))}")
    if named:
        near = nearest(str(source), recipe_names())
        raise FileNotFoundError(f"{source}: no such recipe, file or folder (keys stand behind it){near}")
    raise FileNotFoundError(f"{path}: no such config file")


def save_config(config: Recipe, path: str | Path) -> None:
    """Write every value of `config`, defaults included, as YAML that `load_config` reads back equal."""
    write_whole(Path(path), dump_yaml(config.model_dump(mode="json")).encode())


def flatten(config: BaseModel) -> dict[str, Any]:
    """Return {"train.epochs": 3, ...} of a recipe, plain values."""

    def walk(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict) and value:
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
    now, declared = flatten(wanted), key_kinds(type(wanted))
    for key in sorted((found.keys() | now.keys()) - set(free)):
        if (key in found or key not in declared) and found.get(key) != now.get(key):  # older runs lack newer keys
            raise ValueError(
                f"{source}: trained with {key} {found.get(key)!r}, wanted is {now.get(key)!r}; name another folder"
                + (", or --resume it with --extend for epochs behind its end" if key == "train.epochs" else "")
            )


def _explain_all(error: ValidationError, kind: type[Section], most: int = 10) -> str:
    faults = list(_explain(error, kind))
    return "; ".join(faults[:most]) + (f"; and {len(faults) - most} more" if len(faults) > most else "")


def _explain(error: ValidationError, kind: type[Section]) -> Iterator[str]:
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            *sections, last = item["loc"]
            section = functools.reduce(lambda section, part: section.model_fields[part].annotation, sections, kind)
            yield f"unknown key {key!r}{nearest(str(last), section.model_fields)}"
        elif item["type"] == "missing":
            yield f"{key} is missing"
        else:
            given, message = item["input"], item["msg"].removeprefix("Value error, ")
            message = f"{key}: {message}" if key else message  # of the whole recipe
            yield message + ("" if isinstance(given, dict) else f" (got {shorten(given)})")
