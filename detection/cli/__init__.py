"""The command `hoyer-det`: one verb per file; nothing is imported before it is needed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import detection
from detection.text import nearest

VERBS = {
    "train": "train by a recipe, or go on with a run that was interrupted",
    "evaluate": "evaluate a saved run again, beside its log",
    "predict": "predict on images, films or a camera",
    "analyze": "count energy and certify that the network is binary",
    "robustness": "measure accuracy under noise",
    "report": "write one HTML page about a run or several",
    "export": "write an ONNX, torch.export or NIR file, checked",
    "check-data": "read the whole data set of a recipe and say what is wrong with it",
    "compare": "train variants of a recipe with several seeds and compare them",
    "zoo": "list the trained networks that come with the package, or add one",
    "recipes": "list, show or copy the recipes that come with the package",
    "summary": "show layers, parameters and operations of a network before it is trained",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the verb of a command line; bad input ends the process with one sentence and status 2.

    Args:
        arguments: the verb and what follows it; None: those of the process.
    """
    verb, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
    if verb in ("-h", "--help"):
        print(help_text())
    elif verb == "--version":
        print(f"hoyer-det {detection.__version__}")
    elif verb not in VERBS:
        sentence = f"{verb}: no such command{nearest(verb, VERBS)}" if verb else f"which command?{nearest('', VERBS)}"
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)
    else:
        from detection.cli.common import run_verb

        module = importlib.import_module(f"detection.cli.{verb.replace('-', '_')}")
        run_verb(module.main, rest, f"hoyer-det {verb}")


def help_text() -> str:
    """Return the text of `hoyer-det --help`."""
    verbs = "\n".join(f"  {verb:<12}{words}" for verb, words in VERBS.items())
    return (
        f"usage: hoyer-det COMMAND ...\n\n{detection.__doc__}\n\n{verbs}\n\n"
        "hoyer-det COMMAND --help documents a command, hoyer-det train RECIPE --help every key of a recipe."
    )
