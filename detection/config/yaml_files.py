"""YAML that says one thing: no key twice, no aliases, no more than a recipe needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from detection.files import read_text, require_size

MAX_BYTES = 2**20
MAX_DEPTH = 32  # of nested sections
TEXT = "tag:yaml.org,2002:str"


class _Dumper(yaml.SafeDumper):
    """A SafeDumper that writes what is not printable as escapes; line breaks of Unicode would be read as spaces."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar(TEXT, data, style=None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


# In C, as the wheels of PyYAML have it: with the pass before, it reads a recipe in a quarter of the time.
_Parser: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Parser):
    """A SafeLoader that refuses keys which would be lost unnoticed."""

    keys: tuple[type, ...] = (str,)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, self.keys):
                raise ConstructorError(None, None, f"expected a name for a key, got {key!r}", key_node.start_mark)
            line = key_node.start_mark.line + 1
            if key in lines:
                what = f"the key {key!r} stands in line {lines[key]} and again in line {line}"
                raise ConstructorError(None, None, what, key_node.start_mark)
            lines[key] = line
        return super().construct_mapping(node, deep)


class _NamesLoader(_Loader):
    """A loader whose keys may be whole numbers; what a list or section `names` holds is text, such as no or 010."""

    keys = (str, int)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, value in node.value:
            if key.value == "names" and isinstance(value, yaml.CollectionNode):
                for each in value.value:  # of a section it is a key with its value
                    for inner in each if isinstance(each, tuple) else (each,):
                        inner.tag = TEXT if isinstance(inner, yaml.ScalarNode) else inner.tag
        return super().construct_mapping(node, deep)


def _require_small(text: str) -> None:
    """Refuse what would grow without end: aliases, and sections in sections."""
    depth = 0
    for event in yaml.parse(text, _Parser):
        if isinstance(event, yaml.AliasEvent):
            raise ConstructorError(None, None, "aliases (*) are not allowed", event.start_mark)
        if isinstance(event, yaml.NodeEvent) and depth >= MAX_DEPTH:
            raise ConstructorError(None, None, f"nested deeper than {MAX_DEPTH}", event.start_mark)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def read_yaml(path: Path, *, names: bool = False, what: str = "a recipe") -> Any:
    """Return what a YAML file holds.

    Args:
        path: the file.
        names: its keys may be whole numbers, too, and what is in its list or section `names` is text as it is written.
        what: it should hold, for messages.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no such file, or more than a recipe could be; names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config file")
    require_size(path, MAX_BYTES)
    text = read_text(path)
    try:
        _require_small(text)
        return yaml.load(text, _NamesLoader if names else _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{path}: not a YAML file of {what}: {line}{error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: of dates and numbers
        raise ValueError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None


def flow_yaml(value: Any) -> str:
    """Return a value as YAML in one line, as it may stand behind a key."""
    options = {"default_flow_style": True, "width": 10**9, "sort_keys": False, "allow_unicode": True}
    return yaml.dump([value], Dumper=_Dumper, **options).strip()[1:-1]


def dump_yaml(values: dict[str, Any]) -> str:
    """Return YAML that `read_yaml` reads back equal."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
