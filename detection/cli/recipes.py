"""List the recipes that come with the package, show one, or copy one into a folder to change it there."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from detection.cli.common import Parser, show_table
from detection.config import find_recipe, read_recipe, recipe_names
from detection.text import printable, say


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """List, show or copy recipes, as a command line says."""
    parser = Parser(__doc__, prog)
    actions = parser.add_subparsers(dest="action", metavar="{list,show,copy}")
    actions.add_parser("list", help="a table of all recipes (also without any argument)")
    actions.add_parser("show", help="the text of a recipe").add_argument("name", metavar="NAME")
    copying = actions.add_parser("copy", help="a copy of a recipe")
    copying.add_argument("name", metavar="NAME")
    help = "folder, or new file NAME.yaml (default: this folder)"
    copying.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, default=Path(), help=help)
    options = parser.parse_args(arguments)
    if options.action == "show":
        print(printable(find_recipe(options.name).read_text(encoding="utf-8"), keep="\n\t"), end="")
    elif options.action == "copy":
        say(copy(options.name, options.folder))
    else:
        paths = [find_recipe(name) for name in recipe_names()]
        rows = [(path.stem, read_recipe(path).task, first_sentence(path.read_text(encoding="utf-8"))) for path in paths]
        show_table("hoyer-det train NAME", ("name", "task", "recipe"), rows)


def first_sentence(text: str) -> str:
    """Return the first sentence of the comment that a recipe begins with."""
    lines = itertools.takewhile(lambda line: line.startswith("# ") and line[2] != " ", text.splitlines())
    comment = " ".join(line[2:].strip() for line in lines)
    return comment.partition(". ")[0].removesuffix(".")


def copy(name: str, folder: Path) -> Path:
    """Copy a recipe into a folder, which is made if need be, or to a new .yaml file, and return this.

    Raises:
        FileExistsError: there is one of that name already.
        FileNotFoundError: there is no such recipe.
        NotADirectoryError: `folder` is a file of another kind.
    """
    source = find_recipe(name)
    target = folder if folder.suffix in (".yaml", ".yml") and not folder.is_dir() else folder / source.name
    if folder.is_file() and target != folder:
        raise NotADirectoryError(f"{folder}: a file, expected a folder or the name of a new .yaml file")
    if target.exists():
        raise FileExistsError(f"{target} exists already; name another one, or remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())
    return target
