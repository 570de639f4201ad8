"""Write docs/reliability.md: how often the tests tried to make the toolbox fail, and how often it held.

    make reliability

runs all tests with a report in runs/tests.xml and this script on it. A test counts its attempts by the fixture or the
mark `attempt` of tests/conftest.py; an attempt holds where every value that the test expects is there.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

KINDS = {
    "kills": "A training is killed (SIGKILL, SIGTERM, Ctrl-C, one rank of several) and resumed: the log and the "
    "weights are those of an uninterrupted run, bit for bit.",
    "damaged files": "Weights, states, JSON, YAML, archives and recordings with wrong bits, cut off, or of another "
    "program: refused by name, or read to the same values.",
    "full disks": "No space left, or a folder that cannot be written: a sentence, and what was there stays.",
    "mutated annotations": "VOC and COCO files changed in type, nesting, ids and encoding: every object is used or "
    "named.",
    "mutated images": "Images with unusual modes, ranges, shapes and orientations, damaged ones, and files that are no "
    "images: the right pixels, or refused by name.",
    "wrong values": "Values of the right syntax and the wrong type, size or depth in recipes, logs and overrides: one "
    "sentence that names the key.",
    "names": "Names of classes, files and runs in any script, with markup, mathematics or escape sequences: written as "
    "they are, and no command to a terminal.",
    "two processes": "Two processes that want the same folder, and several that train together: one writes, the "
    "other says who holds it; all give the numbers of one.",
    "foreign requests": "What the page of `hoyer-det web` does not ask for: files of the server, other addresses, "
    "other pages and names, uploads that are too large: refused.",
    "batch jobs": "Predictions over files of which some cannot be read, stopped or out of memory: all others are "
    "there.",
}
HEAD = """# Reliability

Made by `make reliability` from a run of all tests; not edited by hand. Each row counts attempts of one kind to make the
toolbox fail. An attempt held where all the values that its test expects were there: the right boxes, ids, pixels, log
lines or sentence, not only the absence of a crash.

"""


def count(report: Path) -> tuple[Counter[str], Counter[str], dict[str, set[str]]]:
    """Return how many attempts of each kind were made and held, and the test modules that made them.

    Args:
        report: a JUnit file as `pytest --junitxml` writes it.

    Raises:
        ValueError: a kind that is not in KINDS.
    """
    tried: Counter[str] = Counter()
    held: Counter[str] = Counter()
    modules: dict[str, set[str]] = defaultdict(set)
    for case in ElementTree.parse(report).iter("testcase"):
        for entry in case.iter("property"):
            what, _, kind = entry.attrib["name"].partition(" ")
            if what not in ("tried", "held"):
                continue
            if kind not in KINDS:
                raise ValueError(f"{case.attrib['name']} counts {kind!r} (allowed: {', '.join(KINDS)})")
            (tried if what == "tried" else held)[kind] += int(entry.attrib["value"])
            modules[kind].add(case.attrib["classname"].rpartition(".")[2])
    return tried, held, modules


def page(report: Path) -> str:
    """Return the page of a report.

    Raises:
        ValueError: a kind of which nothing was tried.
    """
    tried, held, modules = count(report)
    if missing := [kind for kind in KINDS if not tried[kind]]:
        raise ValueError(f"{report}: nothing was tried of {', '.join(missing)}: were all tests run?")
    suite = next(ElementTree.parse(report).iter("testsuite")).attrib
    number, failed = int(suite["tests"]), int(suite["failures"]) + int(suite["errors"])
    lines = ["| attempts | tried | held | | tests |", "|---|---|---|---|---|"]
    for kind, text in KINDS.items():
        names = ", ".join(f"`{name}`" for name in sorted(modules[kind]))
        lines.append(f"| {kind} | {tried[kind]:,} | {held[kind]:,} | {text} | {names} |")
    lines += [
        "",
        f"{sum(tried.values()):,} attempts, {sum(held.values()):,} held; {number:,} tests, of which {failed} failed "
        f"and {suite['skipped']} were skipped.",
    ]
    return HEAD + "\n".join(lines) + "\n"


def main(arguments: Iterable[str]) -> None:
    """Write the page of the report that is named."""
    (report,) = arguments
    Path(__file__).with_suffix(".md").write_text(page(Path(report)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
