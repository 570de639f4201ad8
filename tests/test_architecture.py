"""The sources themselves: layers, sizes, where a task or a neuron may be named, and how things are documented."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from helpers import ROOT

from detection.cli import VERBS

# From the top down: a module may import its own layer and those below it.
LAYERS = (
    ("detection.cli", "detection.__main__", "detection.web"),
    (
        "detection.report",
        "detection.exporters",
        "detection.analysis",
        "detection.comparison",
        "detection.robustness",
        "detection.predict",
        "detection.api",
    ),
    ("detection.tasks",),
    ("detection.training",),
    (
        "detection.models",
        "detection.data",
        "detection.evaluation",
        "detection.draw",
        "detection.curves",
        "detection.figures",
        "detection.fonts",
        "detection.sections",
        "detection.sources",
        "detection.spikemaps",
    ),
    ("detection.runs", "detection.records", "detection.config", "detection.files", "detection.text"),
    ("detection",),  # the face of the package, which imports what is asked of it only then
    ("backbones",),
)
# By string, when it is asked for: what recipes name, the tasks that come with the package, and the faces of packages.
DYNAMIC = {
    "detection.config.registry",
    "detection.tasks",
    "detection",
    "detection.cli",
    "detection.robustness",
}
MOST_LINES = {"backbones": 400, "detection": 400, "tools": 400, "tests": 600}
MOST_LINES_OF_A_FUNCTION = 60
MOST_LINES_IN_ALL = 30_204  # what is there: more is a sign that something should become simpler first
LONG_FUNCTIONS: dict[str, str] = {}  # "module.function": why
LONG_FILES: dict[str, str] = {}  # "folder/file.py": why
# Who knows the neuron of the paper and what a spike layer is, beside `backbones.spike_layers`.
NEURON_FILES = {
    f"backbones/{name}.py" for name in ("__init__", "hoyer", "spiking", "activations", "multistep", "deploy/fold")
}
# First words of docstrings. Functions begin with an imperative, or with a noun that ends in "s".
BANNED = {"What", "Where", "Nothing", "Says", "When", "How", "Why", "Who", "Which"}
NOUNS = {"Arguments", "Images", "Indices", "Names", "Operations", "Paths", "Processes", "Scalars", "Spikes", "Sums"}
NOUNS |= {"Tensors", "This", "Values", "Weights"}


def files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def place(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def module_names() -> frozenset[str]:
    return frozenset(map(module_name, files("backbones", "detection")))


def nodes_that_run(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        typing_alone = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        waiting += node.orelse if typing_alone else list(ast.iter_child_nodes(node))


def imports_of(path: Path, nodes: Iterator[ast.AST]) -> set[str]:
    """Full names of the modules that these nodes import."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                found.add(inner if inner in module_names() else source)
    return found


def layer_of(module: str) -> int:
    """Index of the layer whose name is the longest beginning of the module's."""
    beginnings = {name: index for index, layer in enumerate(LAYERS) for name in layer}
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if (name := ".".join(parts[:length])) in beginnings:
            known = length > 1 or length == len(parts) or name == "backbones"
            assert known, f"{module} belongs to no layer: add it to LAYERS"
            return beginnings[name]
    raise AssertionError(f"{module} belongs to no layer")


# Layers


@pytest.mark.parametrize("path", files("backbones", "detection"), ids=place)
def test_imports_go_downwards(path):
    own = layer_of(module_name(path))
    imported = imports_of(path, nodes_that_run(tree_of(path)))
    ours = {name for name in imported if name.partition(".")[0] in ("backbones", "detection", "tools", "tests")}
    upwards = sorted(name for name in ours if layer_of(name) < own)
    assert not upwards, f"{place(path)} is below {', '.join(upwards)}"
    dynamic = [
        node
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and re.fullmatch(r"(importlib\.)?import_module", ast.unparse(node.func))
    ]
    assert not dynamic or module_name(path) in DYNAMIC


def test_no_module_imports_itself_in_a_circle():
    """At module level: what a function imports when it is called closes no circle."""
    graph = {}
    for path in files("backbones", "detection"):
        body = (node for statement in tree_of(path).body for node in top_level(statement))
        graph[module_name(path)] = imports_of(path, body) & module_names()
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for other in graph[module]:
                # A package that re-exports its parts is no part of a circle with them.
                if not module.startswith(f"{other}.") and other != module:
                    visit(other, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def top_level(statement: ast.AST) -> Iterator[ast.AST]:
    """The statement and what is in it, but for bodies of functions and what is for type checking alone."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return
    if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
        return
    yield statement
    for child in ast.iter_child_nodes(statement):
        yield from top_level(child)


@pytest.mark.parametrize("path", files("backbones"), ids=place)
def test_backbones_need_torch_alone(path):
    at_once = imports_of(path, (node for statement in tree_of(path).body for node in top_level(statement)))
    assert {name.partition(".")[0] for name in at_once} <= sys.stdlib_module_names | {"torch", "backbones"}
    later = {name.partition(".")[0] for name in imports_of(path, ast.walk(tree_of(path)))}
    more = {  # to read files
        "backbones/deploy/events/engine.py": {"safetensors"},
        "backbones/measure/energy.py": {"yaml"},
        "backbones/weights.py": {"safetensors"},
    }
    assert later - sys.stdlib_module_names - {"torch", "backbones"} == more.get(place(path), set())


@pytest.mark.parametrize("path", files("tools"), ids=place)
def test_a_tool_calls_one_verb(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 10
    assert imports_of(path, ast.walk(tree_of(path))) == {"detection.cli"}
    (verb,) = re.findall(r'detection\.cli\.main\(verb="([a-z-]+)"\)', text)
    assert verb in VERBS and f"`hoyer-det {verb}`" in text


# Sizes


@pytest.mark.parametrize("path", files(*MOST_LINES), ids=place)
def test_files_and_functions_are_short(path):
    most = MOST_LINES[place(path).partition("/")[0]]
    number = len(path.read_text(encoding="utf-8").splitlines())
    assert number <= most or place(path) in LONG_FILES, f"{number} lines, at most {most}"
    long = {}
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if (number := node.end_lineno - first + 1) > MOST_LINES_OF_A_FUNCTION:
                long[f"{module_name(path)}.{node.name}"] = number
    assert not long.keys() - LONG_FUNCTIONS.keys(), f"at most {MOST_LINES_OF_A_FUNCTION} lines: {long}"


def test_exceptions_are_still_needed():
    for path, why in LONG_FILES.items():
        assert why and len((ROOT / path).read_text().splitlines()) > MOST_LINES[path.partition("/")[0]], path
    assert all(LONG_FUNCTIONS.values())


def test_the_whole_stays_small():
    number = sum(
        len(path.read_text(encoding="utf-8").splitlines()) for path in files("backbones", "detection", "tools")
    )
    assert number < MOST_LINES_IN_ALL


# One place for each thing


def outside_tasks() -> list[Path]:
    return [path for path in files("backbones", "detection", "tools") if "detection/tasks/" not in place(path)]


def decides_by(node: ast.AST) -> list[ast.AST]:
    """What a comparison, a dict, a case or an index goes by."""
    match node:
        case ast.Compare():
            return [node.left, *node.comparators]
        case ast.Dict():
            return [key for key in node.keys if key is not None]
        case ast.MatchValue():
            return [node.value]
        case ast.Subscript():
            return [node.slice]
        case _:
            return []


@pytest.mark.parametrize("path", outside_tasks(), ids=place)
def test_tasks_are_told_apart_in_their_own_folder_alone(path):
    for node in ast.walk(tree_of(path)):
        for part in decides_by(node):
            values = {each.value for each in ast.walk(part) if isinstance(each, ast.Constant)}
            assert not values & {"detection", "classification"}, f"line {node.lineno}: a task is named"
        named = isinstance(node, ast.Constant) and node.value == "classification"  # the other one is our package, too
        assert not named, f"line {node.lineno}: a task is named"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
            kinds = re.findall(r"\w+", ast.unparse(node.args[1]))
            told = [kind for kind in kinds if kind.endswith(("Recipe", "Config", "Task")) and kind != "Recipe"]
            assert not told, f"line {node.lineno}: isinstance(..., {told[0]})"


def test_spike_layers_are_told_apart_in_one_place():
    found = []
    for path in files("backbones", "detection", "tools"):
        if place(path) in NEURON_FILES:
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node).endswith("HoyerSpike"):
                found.append(f"{place(path)}, line {node.lineno}")
            asks = isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance"
            if asks and "SpikeLayer" in ast.unparse(node.args[1]):
                found.append(f"{place(path)}, line {node.lineno}")
    assert len(found) <= 1, found


def test_spike_layers_are_looked_for_in_one_place():
    """A walk over a network's modules that asks for spike layers is `spike_layers`; fold has its own, over a graph."""
    found = []
    for path in files("backbones", "detection", "tools"):
        for node in ast.walk(tree_of(path)):
            walks = ast.comprehension | ast.For
            if not isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp | ast.For):
                continue
            over = [part.iter for part in ast.walk(node) if isinstance(part, walks)]
            if not any(".named_modules(" in ast.unparse(part) or ".modules(" in ast.unparse(part) for part in over):
                continue
            if re.search(r"isinstance\([^)]*(SpikeLayer|HoyerSpike)", ast.unparse(node)):
                found.append(f"{place(path)}: {ast.unparse(node)[:60]}")
    assert [entry.partition(":")[0] for entry in found if "named_modules" in entry] == ["backbones/spiking.py"], found
    assert {entry.partition(":")[0] for entry in found} <= {"backbones/spiking.py", "backbones/deploy/fold.py"}


def test_hooks_are_set_in_one_place():
    """But for those that stay: a teacher watches its student, and heads of torchvision's average over time steps."""
    allowed = {"backbones/measure/record.py", "detection/tasks/detection.py", "detection/training/distillation.py"}
    allowed.add("detection/models/detectors.py")
    found = {
        place(path)
        for path in files("backbones", "detection", "tools")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and re.match(r"register_(full_)?(forward|backward)", node.attr)
    }
    assert found == allowed


# Words


def documented(path: Path) -> Iterator[tuple[str, str, ast.AST]]:
    """(kind, name, node) of the module and of every public class and function in it; methods of private classes not."""
    tree = tree_of(path)
    yield "module", module_name(path), tree

    def walk(body: list[ast.stmt], prefix: str, bases: bool) -> Iterator[tuple[str, str, ast.AST]]:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield "class", prefix + node.name, node
                yield from walk(node.body, f"{prefix}{node.name}.", bool(node.bases))
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
                yield "method" if bases else "function", prefix + node.name, node

    yield from walk(tree.body, "", False)


def is_stub(node: ast.AST) -> bool:
    """A method of a protocol, `...` alone."""
    last = node.body[-1]
    return isinstance(last, ast.Expr) and isinstance(last.value, ast.Constant) and last.value.value is ...


def first_word_fault(kind: str, node: ast.AST, text: str) -> str | None:
    """Say what is wrong with how a docstring begins; None: nothing."""
    match = re.match(r"[`\"'(]*([A-Za-z][\w'-]*)", text)
    word = match.group(1) if match else ""
    if word in BANNED or word.removesuffix("'s") in BANNED:
        return f"begins with {word!r}"
    decorators = {ast.unparse(each) for each in getattr(node, "decorator_list", [])}
    describes_a_value = any(each.endswith(("property", "cached_property")) for each in decorators)
    verb = word.endswith("s") and not word.endswith(("ss", "us", "'s")) and word[:1].isupper()
    if kind in ("function", "method") and not describes_a_value and verb and word not in NOUNS:
        return f"begins with {word!r}: the imperative is wanted, or a noun phrase (add a noun to NOUNS)"
    return None


@pytest.mark.parametrize("path", files("backbones", "detection", "tools"), ids=place)
def test_what_is_public_is_documented_in_the_imperative(path):
    faults = []
    for kind, name, node in documented(path):
        text = ast.get_docstring(node)
        if text is None:
            # A method of a class with bases may do what the base's docstring says, as `forward` does.
            if not (kind == "method" or is_stub(node)):
                faults.append(f"{kind} {name}: no docstring")
        elif fault := first_word_fault(kind, node, text):
            faults.append(f"{kind} {name} {fault}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("Return the mean.", True),
        ("Pass it on.", True),
        ("This process's share.", True),
        ("Weights and buffers of a network.", True),
        ("(x - mean) / std per channel.", True),
        ("Returns the mean.", False),
        ("Trains a network.", False),
        ("What a network says.", False),
        ("Nothing; raises if it is empty.", False),
    ],
)
def test_the_rule_of_docstrings(text, good):
    node = ast.parse("def f():\n    pass").body[0]
    assert (first_word_fault("function", node, text) is None) == good


def test_the_rule_of_layers():
    assert layer_of("detection.cli.train") < layer_of("detection.report.page") < layer_of("detection.tasks.run")
    assert layer_of("detection.tasks") < layer_of("detection.training.trainer") < layer_of("detection.models")
    assert layer_of("detection.data.voc") == layer_of("detection.evaluation") < layer_of("detection.runs")
    assert layer_of("detection.config.io") < layer_of("backbones.zoo")
    with pytest.raises(AssertionError, match="belongs to no layer"):
        layer_of("detection.something_new")


def test_no_words_of_how_it_was_made():
    """What a reader of the package cannot know does not stand in it."""
    pattern = re.compile(r"(?i)\b(as (asked|requested)|issue #?\d+|TODO|FIXME|XXX)\b")
    for path in files("backbones", "detection", "tools"):
        assert not pattern.search(path.read_text(encoding="utf-8")), path
