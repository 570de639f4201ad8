"""A page about a run taken apart, for several test files."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import yaml
from helpers import ROOT

C1 = ROOT / "results" / "c1_bccd_retinanet_resnet18_hoyer"
C1_TWIN = ROOT / "results" / "c1_bccd_retinanet_resnet18_relu"
CIFAR = ROOT / "results" / "c2_cifar10_vgg11"
SECTIONS = {"recipe", "curves", "classes", "layers", "networks", "certificate", "dynamics", "origin"}
BOXES = {"precision", "images"}  # sections of detectors only
VOID = {"br", "img", "link", "meta", "wbr"}
BLOCKS = {"p", "div", "ul", "ol", "dl", "table", "figure", "section", "pre", "h1", "h2", "h3", "h4", "details"}


class Page(HTMLParser):
    """A page taken apart; collects what is wrong with its nesting."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.data: list[tuple[dict[str, str | None], str]] = []
        self.feed(self.text)
        self.close()
        self.wrong += [f"<{tag}> stays open" for tag in self.open]

    def handle_starttag(self, tag, attributes):
        if tag in BLOCKS and "p" in self.open:
            self.wrong.append(f"<{tag}> in <p>, line {self.getpos()[0]}")
        self.elements.append((tag, dict(attributes)))
        if tag == "data":
            self.data.append((dict(attributes), ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> closes another element, line {self.getpos()[0]}")

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)
        if self.open and self.open[-1] == "data":
            self.data[-1] = (self.data[-1][0], data)

    def find(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]

    @property
    def words_of(self) -> str:
        return " ".join(" ".join(self.words).split())

    def values(self, **wanted: str) -> dict[str, float]:
        """The numbers that stand as <data> on the page."""
        keys = {f"data-{name}": value for name, value in wanted.items()}
        return {
            attributes["data-key"]: float(attributes["value"])
            for attributes, _ in self.data
            if all(attributes.get(name) == value for name, value in keys.items())
        }


def copy_run(source: Path, target: Path, classes: list[str] | None = None, num_lines: int | None = None) -> Path:
    """A run's recipe and log elsewhere, with other class names or fewer epochs."""
    target.mkdir(parents=True)
    config = yaml.safe_load((source / "config.yaml").read_text())
    lines = [json.loads(line) for line in (source / "metrics.jsonl").read_text().splitlines()][:num_lines]
    info = json.loads((source / "run.json").read_text())
    if classes:
        names = dict(zip(config["data"]["classes"], classes, strict=True))
        config["data"]["classes"] = classes
        config["data"]["root"] = f"data/{classes[0]}"
        info["command"] += f' "{classes[0]}"'
        for line in lines:
            if "per_class" in line:
                line["per_class"] = {names[name]: values for name, values in line["per_class"].items()}
    (target / "config.yaml").write_text(yaml.safe_dump(config))
    (target / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (target / "run.json").write_text(json.dumps(info))
    return target


def last_line(folder: Path) -> dict:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
