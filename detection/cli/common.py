"""The parts of all verbs: parsers, a recipe with overrides as arguments, errors as one sentence."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

from rich.console import Console

from detection.config import Recipe, find_recipe, load_config, override, read_recipe, recipe_kinds
from detection.records import Weights
from detection.training.signals import Interrupted


def make_parser(description: str | None, prog: str | None = None, **options: Any) -> argparse.ArgumentParser:
    """Return a parser whose help has the description as it is written."""
    plain = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=plain, allow_abbrev=False, **options
    )


def recipe_parser(description: str | None, prog: str | None = None) -> argparse.ArgumentParser:
    """Return a parser of `RECIPE [--section.key VALUE ...]`, to which a verb adds options of its own."""
    usage = "%(prog)s RECIPE [options] [--section.key VALUE ...]"
    parser = make_parser(description, prog, usage=usage, add_help=False)  # `parse_recipe` helps
    parser.add_argument(
        "config", metavar="RECIPE", nargs="?", help="a YAML file, or the name of one that `hoyer-det recipes` lists"
    )
    return parser


def saved_run_parser(
    description: str | None, prog: str | None = None, *, several: bool = False
) -> argparse.ArgumentParser:
    """Return a parser of `RUN [--weights WHICH] [--data.root FOLDER]`, to which a verb adds options of its own.

    They are `run` (with `several` the list `runs`), `weights` and `data_root` (None: as in training).
    """
    parser = make_parser(description, prog)
    if several:
        parser.add_argument(
            "runs", nargs="+", metavar="RUN", help="run folder or zoo:NAME; several are compared with the first"
        )
    else:
        parser.add_argument("run", metavar="RUN", help="run folder, or zoo:NAME, see `hoyer-det zoo`")
    add_saved_run_options(parser)
    return parser


def add_saved_run_options(parser: argparse.ArgumentParser) -> None:
    """Add `--weights WHICH` and `--data.root FOLDER`, as `weights` and `data_root` (None: as in training)."""
    parser.add_argument(
        "--weights",
        choices=get_args(Weights),
        default="last",
        help="which weights; ema: their average (default: last)",
    )
    parser.add_argument(
        "--data.root",
        "--data",
        dest="data_root",
        type=Path,
        metavar="FOLDER",
        help="where the data lie now (default: where they lay when the run was trained)",
    )


def parse_recipe(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> tuple[Recipe, argparse.Namespace]:
    """Return the recipe of a command line, overrides applied, and the verb's own options.

    `--help` documents every key, with the values of RECIPE where it is given. `options.config` is the recipe's path.
    With an option `--resume RUN` the recipe is that of the run.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    run = _run_to_resume(arguments)
    if run is not None:
        if not arguments[0].startswith("-"):
            parser.error(f"--resume {run} has its own recipe: leave {arguments[0]} out")
        # In front, where a recipe stands: or else the value of an override would be taken for one.
        arguments = [str(check_run(run) / "config.yaml"), *arguments]
    options, overrides = parser.parse_known_args(arguments)
    if run is not None and options.out is not None:
        parser.error(f"--resume {run} has its own folder: leave --out out")
    wants_help = any(argument in ("-h", "--help") for argument in overrides)
    if options.config is None and not wants_help:
        parser.error("which recipe? The first argument is a YAML file or a name of `hoyer-det recipes`")
    options.config = find_recipe(options.config) if options.config else None
    if wants_help:
        _print_help(parser, options.config)
    return load_config(options.config, overrides, prog=parser.prog), options


def _run_to_resume(arguments: Sequence[str]) -> str | None:
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--resume")
    return parser.parse_known_args(arguments)[0].resume


def _print_help(parser: argparse.ArgumentParser, config: Path | None) -> None:
    """Document the verb's options and every key of a recipe, and end the process."""
    parser.print_help()
    if config is not None:
        recipes = [read_recipe(config)]
    else:
        synthetic = {"data": {"format": "synthetic"}}
        recipes = [kind.model_validate(synthetic) for kind in recipe_kinds().values()]
    for recipe in recipes:
        print(f"\nkeys of a recipe with task {recipe.task}:", flush=True)
        with contextlib.suppress(SystemExit):
            override(recipe, ["--help"], prog=f"{parser.prog} {config or 'RECIPE'}")
    sys.exit(0)


def check_run(source: str | Path) -> Path:
    """Return the folder of a run, which need not be whole; torch is not imported.

    Raises:
        FileNotFoundError: the folder is no run folder.
        ValueError: there is no such entry of the zoo.
    """
    folder = _zoo().locate(source)
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(f"{folder} is not a run folder: it has no config.yaml")
    return folder


def _zoo() -> ModuleType:
    """`backbones.zoo`, without the package around it where that is not imported yet: it would import torch."""
    name = "backbones.zoo"
    if name in sys.modules:
        return sys.modules[name]
    place = Path(importlib.util.find_spec("backbones").origin).parent / "zoo" / "__init__.py"
    spec = importlib.util.spec_from_file_location("zoo_alone", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table_console() -> Console:
    """Return a console for tables: as wide as they are where the output is no terminal, such as a file."""
    return Console(width=None if sys.stdout.isatty() else 200, soft_wrap=False)


def run_verb(main: Callable[..., None], arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Call a verb; bad input ends the process with one sentence and status 2, any other error with its traceback.

    A training that ends because its numbers are not finite has status 1, one that a signal ended 128 + its number.

    Args:
        main: (arguments, prog) -> None.
        arguments: of the command line, without the verb; None: those of the process.
        prog: the command in help texts; None: the name of the script.
    """
    try:
        main(arguments, prog)
    except (ValueError, OSError, ImportError) as error:
        # A loader process sends its whole traceback as the message: the sentence stands in its last line.
        sentence = str(error).strip().splitlines()[-1] if "Original Traceback" in str(error) else str(error)
        print(f"error: {re.sub(r'^[A-Za-z]+Error: ', '', sentence)}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except Interrupted as stop:
        if str(stop):
            print(stop, file=sys.stderr)
        sys.exit(128 + stop.number)
    except KeyboardInterrupt:
        sys.exit(130)
