"""What the command-line tools share: a recipe with overrides as arguments, and errors as one sentence."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence

from detection.config import AnyConfig, Config, load_config, override


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


def parse_recipe(
    parser: argparse.ArgumentParser, arguments: Sequence[str], kind: type[AnyConfig] = Config
) -> tuple[AnyConfig, argparse.Namespace]:
    """The config of a command line, overrides applied, and the tool's own options.

    `--help` documents every key, with the values of CONFIG where it is given.
    """
    options, overrides = parser.parse_known_args(arguments)
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


def run_tool(main: Callable[[], None]) -> None:
    """Calls `main`; bad input ends the process with one sentence and status 2, any other error with its traceback."""
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
    except KeyboardInterrupt:
        sys.exit(130)
