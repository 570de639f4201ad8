"""What the command-line tools share: a recipe with overrides as arguments, and errors as one sentence."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from accelerate import PartialState
from rich.console import Console

from detection.checkpoint import Run, Weights, command_line
from detection.config import AnyConfig, Config, Recipe, load_config, override
from detection.resume import Interrupted


def recipe_parser(description: str) -> argparse.ArgumentParser:
    """A parser of `CONFIG [--section.key VALUE ...]` to which a tool adds options of its own."""
    parser = argparse.ArgumentParser(
        description=description,
        usage="%(prog)s CONFIG [options] [--section.key VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("config", nargs="?", help="recipe, a YAML file")
    return parser


def training_parser(description: str) -> argparse.ArgumentParser:
    """A `recipe_parser` for a tool that trains: `CONFIG [--out FOLDER] ...` or `--resume RUN ...`."""
    parser = recipe_parser(description)
    parser.usage = "%(prog)s CONFIG [options] [--section.key VALUE ...]\n       %(prog)s --resume RUN [options]"
    parser.add_argument("--out", help="folder of the new run (default: runs/NAME of the recipe)")
    parser.add_argument("--resume", metavar="RUN", help="go on with a run that was interrupted, as if it had not been")
    return parser


def saved_run_parser(description: str, *, several: bool = False) -> argparse.ArgumentParser:
    """A parser of `RUN [--weights WHICH] [--data.root FOLDER]`, to which a tool adds options of its own.

    They are `run` (with `several` the list `runs`), `weights` and `data_root` (None: as in training).
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if several:
        parser.add_argument(
            "runs", nargs="+", metavar="RUN", help="run folder or zoo:NAME; several are compared with the first"
        )
    else:
        parser.add_argument("run", help="run folder, or zoo:NAME, see tools/zoo.py")
    add_saved_run_options(parser)
    return parser


def add_saved_run_options(parser: argparse.ArgumentParser) -> None:
    """`--weights WHICH` and `--data.root FOLDER`, as `weights` and `data_root` (None: as in training)."""
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
    parser: argparse.ArgumentParser, arguments: Sequence[str], kind: type[AnyConfig] = Config
) -> tuple[AnyConfig, argparse.Namespace]:
    """The config of a command line, overrides applied, and the tool's own options.

    `--help` documents every key, with the values of CONFIG where it is given. With `--resume RUN` the config is that of
    the run.
    """
    run = _run_to_resume(arguments)
    if run is not None:
        if not arguments[0].startswith("-"):
            parser.error(f"--resume {run} has its own recipe: leave {arguments[0]} out")
        # In front, where a recipe stands: or else the value of an override would be taken for one.
        arguments = [str(Run.open(run).folder / "config.yaml"), *arguments]
    options, overrides = parser.parse_known_args(arguments)
    if run is not None and options.out is not None:
        parser.error(f"--resume {run} has its own folder: leave --out out")
    wants_help = any(argument in ("-h", "--help") for argument in overrides)
    if options.config is None and not wants_help:
        parser.error("which recipe? The first argument is a YAML file, see configs/")
    if wants_help:
        parser.print_help()
        print("\nkeys of the recipe:")
        synthetic = {"data": {"format": "synthetic"}}
        base = load_config(options.config, kind=kind) if options.config else kind.model_validate(synthetic)
        override(base, ["--help"], prog=f"{parser.prog} {options.config or 'CONFIG'}")
    return load_config(options.config, overrides, kind=kind, prog=parser.prog), options


def _run_to_resume(arguments: Sequence[str]) -> str | None:
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--resume")
    return parser.parse_known_args(arguments)[0].resume


def run_training(
    train: Callable[..., dict[str, Any]], config: Recipe, options: argparse.Namespace, keys: Sequence[str]
) -> None:
    """Trains as a command line says, prints the last epoch's metrics and what the run folder has.

    Args:
        train: (config, folder, command, *, download, resume) -> last line of the log.
        config: the recipe.
        options: of a `training_parser` with `--download`.
        keys: of the metrics.
    """
    folder = Path(options.resume or options.out or Path("runs") / Path(options.config).stem)
    if options.resume and Run.open(folder).finished:
        print(f"{folder}: finished already, nothing to go on with")
        return
    line = train(config, folder, command_line(), download=options.download, resume=bool(options.resume))
    if not PartialState().is_main_process:  # of several, one tells
        return
    numbers = [f"{key} {line[key]:.4f}" for key in keys if key in line]
    print(f"{'  '.join(numbers)}  run folder: {folder}")
    print(f"pictures: {', '.join(str(path) for path in sorted(folder.glob('*.png')))}")


def table_console() -> Console:
    """A console for tables: as wide as they are where the output is no terminal, such as a file."""
    return Console(width=None if sys.stdout.isatty() else 200, soft_wrap=False)


def run_tool(main: Callable[[], None]) -> None:
    """Calls `main`; bad input ends the process with one sentence and status 2, any other error with its traceback.

    A training that ends because its numbers are not finite has status 1, one that a signal ended 128 + its number.
    """
    try:
        main()
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
