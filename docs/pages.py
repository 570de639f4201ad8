"""Pages of the site that are made from the source: the API reference, the commands, and all error messages.

Run by mkdocs. A public class or function without a docstring ends the build.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import mkdocs_gen_files

from detection.cli import VERBS, main

ROOT = Path(__file__).parents[1]
PACKAGES = ("backbones", "detection")
HIDDEN = {"detection.cli", "detection.recipes", "backbones.zoo"}  # commands have a page; the others are data


def modules() -> Iterator[tuple[str, str, ast.Module]]:
    """Yield (package, module, source) of all modules, in the order of their names."""
    for top in PACKAGES:
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            package = ".".join(parts[:-1])
            name = package if parts[-1] == "__init__" else ".".join(parts)
            yield package, name, ast.parse(path.read_text(encoding="utf-8"))


def public(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Yield what is public of a module or class."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node


def write_reference() -> None:
    """Write a page for each package, and refuse what is public without a docstring."""
    pages: dict[str, list[str]] = defaultdict(list)
    bare = []
    for package, module, tree in modules():
        if package in HIDDEN or module.rpartition(".")[2].startswith("_"):
            continue
        found = list(public(tree.body))
        bare += [f"{module}.{each.name}" for each in found if not ast.get_docstring(each)]
        if found:
            pages[package].append(module)
    if bare:
        raise ValueError(f"without a docstring: {', '.join(bare)}")
    for package, names in pages.items():
        with mkdocs_gen_files.open(f"reference/{package}.md", "w") as page:
            page.write(f"# `{package}`\n\n")
            for name in names:
                inherited = "" if name != package else "    options: {members_order: source}\n"
                page.write(f"::: {name}\n{inherited}\n")


def write_commands() -> None:
    """Write the page of the verbs: what `hoyer-det VERB --help` prints."""
    with mkdocs_gen_files.open("reference/commands.md", "w") as page:
        page.write("# Commands\n\nThe output of `hoyer-det COMMAND --help`.\n")
        for verb in VERBS:
            page.write(f"\n## {verb}\n\n```text\n{help_of([verb, '--help'])}\n```\n")


def help_of(arguments: list[str]) -> str:
    """Return what a command prints."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main(arguments)
    return re.sub(r"\x1b\[[0-9;]*m", "", text.getvalue()).strip()


def message(node: ast.expr) -> str | None:
    """Return an error's text, what is filled in as {...}; None where it is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = (each.value if isinstance(each, ast.Constant) else "{" + filled(each) + "}" for each in node.values)
        return "".join(str(part) for part in parts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = message(node.left), message(node.right)
        return None if left is None or right is None else left + right
    return None


def filled(node: ast.expr) -> str:
    """Return the name of what is filled into a message."""
    value = node.value if isinstance(node, ast.FormattedValue) else node
    names = [each.id for each in ast.walk(value) if isinstance(each, ast.Name)]
    names += [each.attr for each in ast.walk(value) if isinstance(each, ast.Attribute)]
    return names[-1] if names else "..."


def write_messages() -> None:
    """Add the list of all error messages to the page that says what to do."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for _, module, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                sentence = message(node.exc.args[0])
                kind = ast.unparse(node.exc.func).rpartition(".")[2]
                if sentence and len(sentence) > 8:
                    rows[module].append((kind, sentence))
    with mkdocs_gen_files.open("troubleshooting.md", "w") as page:
        page.write(text)
        for module, found in rows.items():
            page.write(f"\n### `{module}`\n\n| error | message |\n|---|---|\n")
            for kind, sentence in dict.fromkeys(found):
                clean = " ".join(sentence.split()).replace("`", "'").replace("|", "\\|")
                page.write(f"| {kind} | `{clean}` |\n")


write_reference()
write_commands()
write_messages()
