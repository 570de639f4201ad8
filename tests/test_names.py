"""Foreign names: any script, markup, mathematics and escape sequences, as names of classes, files and runs."""

from __future__ import annotations

import html
import io
import json
import os
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
import torch
import yaml
from fake_data import write_image
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, fontManager
from test_training import TINY_MODEL

from detection import fonts
from detection.cli import main
from detection.cli.common import show_table
from detection.config import load_config, save_config
from detection.draw import draw_classes, draw_detections
from detection.figures import Line, draw_panel, to_svg
from detection.runs import Run
from detection.tasks.recipes import DetectionRecipe
from detection.text import printable

HOSTILE = [
    "US$$",
    r"$\frac{1$",
    "[/b]",
    "[red]",
    "<b>&amp;</b>",
    "\x1b[31mred\x1b]0;title\x07\x9b2J",
    "\u732b",
    "\u0642\u0637\u0629",
    "\N{CAT}\u200d\N{BLACK LARGE SQUARE}",
    "",
    " ",
    "\u200b",
    "x" * 200,
    "a\nb\tc\rd",
    "\u202egnp.exe",
    "%s{0}{{ 7 * 7 }}",
    "null",
    "\x85\u2028\ufeff\ue000",
    "'\"`#- : |",
    ' id="x" x="1.2345" "data:image/png;base64,AAAA',
    "'DejaVu Sans'",
]
PIECES = ["$", "$$", r"\frac{", "_{", "[/", "[red]", "]", "<b>", "&lt;", "</script>", "\x1b[2J", "\x9b31m", "\u202e"]
PIECES += [
    "\r",
    "\n",
    "%d",
    "{{",
    "\u732b",
    "\u0642",
    "\N{CAT}",
    "\u0301",
    "e",
    " ",
    "'",
    '"',
    ":",
    "-",
    "~",
    "..",
    "=",
]
NAME = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)
NAMES = st.lists(
    NAME | st.lists(st.sampled_from(PIECES), max_size=8).map("".join), min_size=12, max_size=12, unique=True
)
FIXED = {"derandomize": True, "deadline": None, "database": None, "phases": (Phase.explicit, Phase.generate)}
FIXED |= {"suppress_health_check": list(HealthCheck)}


def commands(text: str) -> set[str]:
    """What a terminal would not show but obey: control characters, directions of writing, bytes that are no text."""
    found = {letter for letter in text if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")}
    return found - {"\n"} | set(text) & set("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")


def file_names(names: Sequence[str]) -> list[str]:
    """Names that files can have, no two alike for a file system that knows no capitals."""
    cut = [name.replace("/", "").encode()[:200].decode(errors="ignore") for name in names]
    return [f"{name}{index}.png" for index, name in enumerate(cut)]


class Heads(HTMLParser):
    """The heads of a page's rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.inside = tag == "th" and ("scope", "row") in attributes
        self.found += [""] if self.inside else []

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "th"

    def handle_data(self, data):
        if self.inside:
            self.found[-1] += data


def write_data(root: Path, names: Sequence[str]) -> list[str]:
    """A COCO data set with an image and an object of each class; returns the names of the files."""
    files = file_names(names)
    for index, name in enumerate(files):
        write_image(root / "images" / name, 32, 32, seed=index)
    numbers = range(1, len(names) + 1)
    content = {
        "images": [{"id": n, "file_name": files[n - 1], "width": 32, "height": 32} for n in numbers],
        "annotations": [{"id": n, "image_id": n, "category_id": n, "bbox": [4, 4, 20, 20]} for n in numbers],
        "categories": [{"id": n, "name": names[n - 1]} for n in numbers],
    }
    (root / "all.json").write_text(json.dumps(content), encoding="utf-8")
    return files


def write_recipe(path: Path, root: Path) -> Path:
    head = TINY_MODEL["head"] | {"score_threshold": 0.0, "max_detections": 1}
    data = {"format": "coco", "root": str(root), "train": ["all.json"], "val": ["all.json"], "workers": 0}
    recipe = {
        "model": TINY_MODEL | {"min_size": [32], "max_size": 32, "head": head},
        "data": data | {"train_images": "images", "val_images": "images"},
        "hoyer": {"weight": 0.01},
        "train": {"epochs": 1, "batch_size": 8},
    }
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def call(*arguments: str | Path) -> str:
    """All that a command prints, which ends well and commands no terminal."""
    printed, status = io.StringIO(), 0
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code or 0
    assert (status, commands(printed.getvalue())) == (0, set()), printed.getvalue()
    return printed.getvalue()


@settings(max_examples=1, **FIXED)
@example(HOSTILE)
@given(NAMES)
def test_names_of_classes_files_and_runs_go_through_every_command(attempt, names):
    with tempfile.TemporaryDirectory() as place, attempt("names", 2 * len(names) + 1):
        folder = Path(place)
        root = folder / file_names(names)[1].removesuffix(".png")
        files = write_data(root, names)
        recipe, run = write_recipe(folder / "recipe.yaml", root), folder / file_names(names)[5]
        shown = {printable(name) for name in names}
        out = call("check-data", recipe)
        assert out.count("left out or mended: 0\n") == 2
        table = "".join(out.partition("images without objects")[0].split())
        assert [name for name in shown if "".join(name.split()) not in table] == []

        out = call("train", recipe, "--out", run)
        assert f"run folder: {printable(run)}\n" in out
        assert Run.open(run).config.data.classes == names and Run.open(run).config.data.root == root
        assert {path.suffix for path in run.glob("*.png")} == {".png"}
        assert set(Run.open(run).history()[0].evaluation.tables["per_class"]) == set(names)
        assert "equal to the log in every digit" in call("evaluate", run)

        undecodable = os.fsdecode(b"\xff[red]$.png")  # a name that is no UTF-8
        (root / "images" / files[0]).rename(root / "images" / undecodable)
        sources = {str(root / "images" / name) for name in [undecodable, *files[1:]]}
        call("predict", run, root / "images", "--out", folder / "out", "--score", "0")
        images = json.loads((folder / "out" / "images.json").read_text())
        assert {image["file_name"] for image in images["images"]} == sources
        assert [(each["id"], each["name"]) for each in images["categories"]] == list(enumerate(names, start=1))
        drawn = {image["drawn"] for image in images["images"]}
        assert drawn == {Path(source).name for source in sources} == pictures_in(folder / "out")
        few = sorted(sources)[:5]
        call("predict", run, *few, "--out", folder / "spikes", "--no-images", "--spikes")
        assert pictures_in(folder / "spikes") == {f"{Path(source).stem}_spikes.png" for source in few}
        (root / "images" / undecodable).rename(root / "images" / files[0])

        call("report", run, "--images", "1")
        text = (run / "report.html").read_text(encoding="utf-8")
        assert commands(text) <= {"\t"}
        heads = Heads(text).found
        assert sorted(name for name in heads if name in map(on_page, names)) == sorted([*map(on_page, names)] * 2)


def pictures_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix == ".png"}


def svg_text(name: str) -> str:
    """A name in an SVG, which holds no control characters."""
    return "".join(
        letter
        if letter in "\u200c\u200d" or (unicodedata.category(letter)[0] not in "C" and letter not in "\u2028\u2029")
        else "\ufffd"
        for letter in name
    )


def on_page(name: str) -> str:
    return printable(name, keep="\n\t")


@settings(max_examples=25, **FIXED)
@example(HOSTILE)
@given(NAMES)
def test_names_in_tables_recipes_charts_and_pictures(attempt, names):
    with tempfile.TemporaryDirectory() as place, attempt("names", len(names)):
        printed = io.StringIO()
        with redirect_stdout(printed), redirect_stderr(printed):
            show_table(names[0], ["class", names[1]], [[name, name] for name in names], caption=None)
            picture = draw_classes(np.zeros((32, 32, 3), np.uint8), [(name, 0.5) for name in names[:3]])
        assert picture.shape == (640, 640, 3) and commands(printed.getvalue()) == set()
        config = DetectionRecipe.model_validate({"data": {"format": "synthetic", "classes": names}})
        save_config(config, Path(place, "a.yaml"))
        assert load_config(Path(place, "a.yaml")).data.classes == names
        lines = [Line(name, [(1, 0.5), (2, 1)], {}) for name in names]
        root = ElementTree.fromstring(to_svg(draw_panel(names[0], lines, names[1])))
        titles = [element.text for element in root.iter() if element.tag.endswith("title")]
        assert titles == [f"{svg_text(name)}: 0.5 \N{RIGHTWARDS ARROW} 1" for name in names]


def test_classes_that_are_folders_and_films(attempt, tmp_path):
    """A classifier's classes are named by folders: they stand in its tables, its pictures and on its page."""
    names = sorted(["US$$", "[red]", "<b>&amp;", "\x1b[31m", "\u732b"])
    for split in ("train", "val"):
        for index, name in enumerate(names):
            write_image(tmp_path / split / name / f"{name}.png", 32, 32, seed=index)
    backbone = {"name": "vgg11", "width": 0.125}
    recipe = {"task": "classification", "model": {"backbone": backbone}, "train": {"epochs": 1, "batch_size": 5}}
    recipe["data"] = {"format": "folder", "root": str(tmp_path), "workers": 0}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run, film = tmp_path / os.fsdecode(b"lr=0.1 $\\frac{1$ [b] \xfe"), tmp_path / "%d $_{ [b] <i>\x1b[31m:.mp4"
    write_film(film)
    with attempt("names", len(names) + 2):
        call("train", tmp_path / "recipe.yaml", "--out", run)
        assert Run.open(run).config.data.classes == names
        pictures = [str(tmp_path / "val" / name / f"{name}.png") for name in names]
        out = call("predict", run, *pictures, film, "--out", tmp_path / "out", "--spikes")
        assert [line for line in map(printable, [*pictures, film]) if f"{line}: " not in out] == []
        entries = json.loads((tmp_path / "out" / "images.json").read_text())["images"]
        assert [entry["file_name"] for entry in entries] == [*pictures, str(film), str(film)]
        assert {entries[-1]["drawn"], f"{film.stem}_spikes.png"} <= {path.name for path in (tmp_path / "out").iterdir()}
        assert entries[-1]["drawn"] == film.name
        for arguments in (["analyze"], ["robustness", "--kinds", "blur", "--seeds", "0"], ["report", "--images", "1"]):
            call(*arguments[:1], run, *arguments[1:])
        page = (run / "report.html").read_text(encoding="utf-8")
        assert commands(page) == set() and Heads(page).found.count(on_page("<b>&amp;")) >= 1
        assert [name for name in names if html.escape(on_page(name), quote=False) not in page] == []


def write_film(path: Path) -> None:
    """Two frames; OpenCV would take the name for a pattern of several."""
    writer = cv2.VideoWriter(str(path.with_name("plain.mp4")), cv2.VideoWriter_fourcc(*"mp4v"), 5, (32, 32))
    for shade in (50, 200):
        writer.write(np.full((32, 32, 3), shade, np.uint8))
    writer.release()
    path.with_name("plain.mp4").rename(path)


# Letters in pictures


@pytest.fixture
def cats(tmp_path, monkeypatch) -> Iterator[Path]:
    """A font of one letter, the cat, which is a square; not installed."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 1000), (1000, 1000), (1000, 0)):
        pen.lineTo(corner)
    pen.closePath()
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", "cat"])
    font.setupCharacterMap({ord("\u732b"): "cat"})
    font.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "cat": pen.glyph()})
    font.setupHorizontalMetrics(dict.fromkeys((".notdef", "cat"), (1000, 0)))
    font.setupHorizontalHeader(ascent=1000, descent=0)
    font.setupNameTable({"familyName": "Cats Sans", "styleName": "Regular"})
    font.setupOS2(sTypoAscender=1000, usWinAscent=1000, usWinDescent=0)
    font.setupPost()
    font.save(tmp_path / "cats.ttf")
    monkeypatch.setattr(fontManager, "ttflist", list(fontManager.ttflist))
    monkeypatch.setattr(fonts, "_FOUND", {})  # no letter has been looked for, nothing has been said
    fonts._say_once.cache_clear()
    yield tmp_path / "cats.ttf"
    fonts._say_once.cache_clear()


def test_letters_are_drawn_with_a_font_that_has_them(attempt, cats, capsys):
    fontManager.addfont(cats)
    image = np.zeros((640, 640, 3), np.uint8)
    with attempt("names"):
        assert fonts.drawable("a \u732b") == "a \u732b"
        text = fonts.take_literally(Figure().text(0, 0, "a \u732b $"))
        assert text.get_fontfamily()[-1] == "Cats Sans" and not text.get_parse_math()
        bright = [(draw_classes(image, [("\u732b" * number, 0.5)]) > 200).all(axis=2).sum() for number in (0, 1, 21)]
        assert (bright[2] - bright[1]) / 20 == pytest.approx((11 / 72 * 100) ** 2, rel=0.1)  # squares of 11 points
    assert capsys.readouterr().err == ""


def test_letters_that_no_font_has_are_spelt_and_that_is_said_once(attempt, cats, capsys):
    with attempt("names"):
        assert fonts.drawable("\u732b 1") == "Mao 1"
        assert (
            fonts.drawable("\u0441\u043e\u0431\u0430\u043a\u0430") == "\u0441\u043e\u0431\u0430\u043a\u0430"
        )  # the usual font has it
        assert fonts.drawable("\x1b[31m\n\ud83d") == "\N{REPLACEMENT CHARACTER}[31m" + 2 * "\N{REPLACEMENT CHARACTER}"
        draw_classes(np.zeros((64, 64, 3), np.uint8), [("\u732b", 0.5)])
        box = {"boxes": torch.tensor([[1.0, 1, 9, 9]]), "scores": torch.ones(1), "labels": torch.ones(1).long()}
        draw_detections(np.zeros((64, 64, 3), np.uint8), box, ["\u72ac"])
    said = capsys.readouterr().err
    assert said.count("spelt in Latin letters") == 1 and said.count("\n") == 1


def test_fonts_that_are_gone_or_damaged_are_passed_over(attempt, cats, monkeypatch):
    """matplotlib keeps its list of fonts on the disk: some of them may have been removed since."""
    (cats.parent / "damaged.ttf").write_bytes(cats.read_bytes()[:40])
    with attempt("names", 2):
        for name in ("gone.ttf", "damaged.ttf"):
            entry = FontEntry(fname=str(cats.parent / name), name="A Sans", style="normal", weight=400)
            fontManager.ttflist.append(entry)
        fontManager.addfont(cats)
        assert fonts.drawable("\u732b\u72ac") == "\u732bQuan"
