"""The command `hoyer-det`: one verb per file; nothing is imported before it is needed."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import detection
from detection.text import nearest, say

VERBS = {
    "train": "train by a recipe, or go on with a run that was interrupted",
    "evaluate": "evaluate a saved run again, beside its log",
    "predict": "predict on images, films or a camera",
    "analyze": "count energy and certify that the network is binary",
    "robustness": "measure accuracy under noise",
    "report": "write one HTML page about a run or several",
    "web": "serve a page on which one sees networks at work",
    "export": "write an ONNX, torch.export or NIR file, checked",
    "init": "write a recipe for a folder of images and boxes, with the reasons",
    "benchmark": "measure how fast an exported file is, and how accurate",
    "check-data": "read the whole data set of a recipe or a folder and say what is wrong with it",
    "compare": "train variants of a recipe with several seeds and compare them",
    "zoo": "list the trained networks that come with the package, or add one",
    "recipes": "list, show or copy the recipes that come with the package",
    "summary": "show layers, parameters and operations of a network before it is trained",
}
STATUSES = """exit status: 0 all went well, 1 the result is not good (a network that is not binary, data that cannot be
trained on, images that could not be read, a loss that is not finite), 2 the command line or a file is wrong, 3 an error
that nobody thought of, with a log file, 128 + N ended by signal N, such as 130 by Ctrl-C"""


def main(arguments: Sequence[str] | None = None, verb: str | None = None) -> None:
    """Run the verb of a command line; bad input ends the process with one sentence, see `common.run_verb`.

    Args:
        arguments: the verb and what follows it; None: those of the process.
        verb: the verb, where the arguments are what follows it alone.
    """
    given = [*([verb] if verb else []), *(sys.argv[1:] if arguments is None else arguments)]
    debug = ["--debug"] if "--debug" in given else []
    verb, *rest = [argument for argument in given if argument != "--debug"] or [""]
    if verb in ("-h", "--help", "--version"):
        try:
            print(f"hoyer-det {detection.__version__}" if verb == "--version" else help_text(), flush=True)
        except BrokenPipeError:
            end_unread()
    elif verb not in VERBS:
        sentence = f"{verb}: no such command{nearest(verb, VERBS)}" if verb else f"which command?{nearest('', VERBS)}"
        say(f"error: {sentence}", error=True)
        sys.exit(2)
    else:
        from detection.cli.common import run_verb

        def call(arguments: Sequence[str], prog: str) -> None:
            importlib.import_module(f"detection.cli.{verb.replace('-', '_')}").main(arguments, prog)

        run_verb(call, rest + debug, f"hoyer-det {verb}")


def end_unread() -> NoReturn:
    """End the process as SIGPIPE would: who read what it prints has ended, such as `head`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())  # for what is not written yet
    sys.exit(141)


def help_text() -> str:
    """Return the text of `hoyer-det --help`."""
    verbs = "\n".join(f"  {verb:<12}{words}" for verb, words in VERBS.items())
    return (
        f"usage: hoyer-det COMMAND ...\n\n{detection.__doc__}\n\n{verbs}\n\n"
        "hoyer-det COMMAND --help documents a command, hoyer-det train RECIPE --help every key of a recipe; --debug, "
        f"anywhere,\nshows where an error comes from\n\n{STATUSES}"
    )
