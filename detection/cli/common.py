"""The parts of all verbs: parsers, tables, a recipe with overrides as arguments, errors as one sentence."""

from __future__ import annotations

import argparse
import importlib.util
import io
import platform
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, get_args

from rich.table import Table

from detection.cli import end_unread
from detection.config import Recipe, find_recipe, load_config, print_keys, read_recipe, recipe_kinds
from detection.records import Weights
from detection.text import printable
from detection.training.signals import CallbackError, Interrupted, Screen


class Parser(argparse.ArgumentParser):
    """A parser whose help has the description as it is written, and whose errors are those of `run_verb`."""

    def __init__(self, description: str | None = None, prog: str | None = None, **options: Any) -> None:
        plain = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, formatter_class=plain, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise ValueError."""
        raise ValueError(f"{message} ({self.prog} --help documents the command)")


def recipe_parser(description: str | None, prog: str | None = None, what: str = "RECIPE") -> Parser:
    """Return a parser of `RECIPE [--section.key VALUE ...]`, to which a verb adds options of its own."""
    usage = f"%(prog)s {what} [options] [--section.key VALUE ...]"
    parser = Parser(description, prog, usage=usage, add_help=False)  # `parse_recipe` helps
    parser.add_argument(
        "config", metavar="RECIPE", nargs="?", help="a YAML file, or the name of one that `hoyer-det recipes` lists"
    )
    return parser


def saved_run_parser(description: str | None, prog: str | None = None, *, several: bool = False) -> Parser:
    """Return a parser of `RUN [--weights WHICH] [--data.root FOLDER]`, to which a verb adds options of its own.

    They are `run` (with `several` the list `runs`), `weights` and `data_root` (None: as in training).
    """
    parser = Parser(description, prog)
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
    help = "which weights; ema: their average (default: last)"
    parser.add_argument("--weights", choices=get_args(Weights), default="last", help=help)
    help = "where the data lie now (default: where they lay when the run was trained)"
    parser.add_argument("--data.root", "--data", dest="data_root", type=Path, metavar="FOLDER", help=help)


def parse_recipe(parser: Parser, arguments: Sequence[str] | None = None) -> tuple[Recipe, argparse.Namespace]:
    """Return the recipe of a command line, overrides applied, and the verb's own options.

    `--help` documents every key, with the values of RECIPE where it is given. `options.config` is the recipe's path.
    With an option `--resume RUN`, of a verb that has it, the recipe is that of the run.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options, overrides = parser.parse_known_args(arguments)
    run = getattr(options, "resume", None)
    if run is not None:
        if not arguments[0].startswith("-"):
            parser.error(f"--resume {run} has its own recipe: leave {arguments[0]} out")
        if options.out is not None:
            parser.error(f"--resume {run} has its own folder: leave --out out")
        # In front, where a recipe stands: or else the value of an override would be taken for one.
        options, overrides = parser.parse_known_args([str(check_run(run) / "config.yaml"), *arguments])
    wants_help = any(argument in ("-h", "--help") for argument in overrides)
    if options.config is None and not wants_help:
        parser.error("which recipe? The first argument is a YAML file or a name of `hoyer-det recipes`")
    options.config = find_recipe(options.config) if options.config else None
    if wants_help:
        _print_help(parser, options.config)
    return load_config(options.config, overrides), options


def _print_help(parser: Parser, config: Path | None) -> NoReturn:
    """Document the verb's options and every key of a recipe, and end the process."""
    parser.print_help()
    if config is not None:
        recipes = [read_recipe(config)]
    else:
        synthetic = {"data": {"format": "synthetic"}}
        recipes = [kind.model_validate(synthetic) for kind in recipe_kinds().values()]
    for recipe in recipes:
        print(f"\nkeys of a recipe with task {recipe.task}:", flush=True)
        print_keys(recipe, f"{parser.prog} {config or 'RECIPE'}")
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


def locate(source: str | Path) -> Path:
    """Return `backbones.zoo.locate` of a path; torch is not imported."""
    return _zoo().locate(source)


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


def show_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numeric: Collection[str] = (),
    caption: str | None = None,
) -> None:
    """Print a table, all text in it as it is; in a file it is as wide as it needs to be.

    Args:
        title: above it.
        columns: their names.
        rows: as many texts as columns each; an empty row is a line.
        numeric: columns of numbers.
        caption: below it.
    """
    table = Table(title=printable(title), caption=caption, caption_justify="left")
    for column in columns:
        justify = "right" if column in numeric else "left"
        table.add_column(printable(column), justify=justify, no_wrap=column in numeric, overflow="fold")
    for row in rows:
        if row:
            table.add_row(*map(printable, row))
        else:
            table.add_section()
    width = None if sys.stdout.isatty() else 10_000
    Screen(width=width, markup=False, emoji=False, highlight=False).print(table)


def run_verb(main: Callable[..., None], arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Call a verb; an error ends the process with one sentence, with `--debug` among the arguments in a traceback.

    The status is 2 for bad input, 1 for a training whose numbers are not finite, 128 + its number for a signal, and 3
    for an error that nobody thought of: then a log file has the traceback.

    Args:
        main: (arguments, prog) -> None.
        arguments: of the command line, without the verb; None: those of the process.
        prog: the command in help texts; None: the name of the script.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may not have every letter
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            main([argument for argument in given if argument != "--debug"], prog)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        end_unread()
    except Exception as error:
        status, sentence = explain(error)
        if "--debug" in given:
            traceback.print_exception(error)
        elif sentence:
            print(printable(sentence, keep="\n"), file=sys.stderr)
        sys.exit(status)


def explain(error: Exception, write: Callable[[Exception], str] | None = None) -> tuple[int, str]:
    """Return the exit status of an error, and what to say of it; `write` says where its details are."""
    if isinstance(error, Interrupted):
        return 128 + error.number, str(error)
    expected = isinstance(error, (ValueError, OSError, ImportError, FloatingPointError, CallbackError))
    if expected and not isinstance(error, UnicodeError):
        # A loader process sends its whole traceback as the message: the sentence stands in its last line.
        sentence = str(error).strip().splitlines()[-1] if "Original Traceback" in str(error) else str(error)
        status = 1 if isinstance(error, FloatingPointError) else 2
        return status, f"error: {re.sub(r'^[A-Za-z]+Error: ', '', sentence)}"
    try:
        place = f"its details are in {(write or _write_log)(error)}"
    except OSError:
        place = "--debug shows where it comes from"
    first = (str(error).strip().splitlines() or [""])[0]
    return 3, f"error: {type(error).__name__}: {first}; nobody thought of this error, {place}"


def _write_log(error: Exception) -> str:
    """Write the traceback of an error, with command and versions, into a new file, and return its path."""
    file = tempfile.NamedTemporaryFile(  # noqa: SIM115, it stays
        "w", prefix="hoyer-det-", suffix=".log", delete=False, encoding="utf-8", errors="backslashreplace"
    )
    with file:
        found = {name: vars(module).get("__version__") for name, module in sorted(sys.modules.items())}
        versions = [f"{name} {version}" for name, version in found.items() if version and "." not in name]
        file.write(f"{sys.argv}\npython {sys.version}\n{platform.platform()}\n{', '.join(versions)}\n\n")
        traceback.print_exception(error, file=file)
    return file.name
