"""The parts of the report page: settings and numbers in words, right and wrong boxes, and what tasks bring."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from report_pages import C1, CIFAR, SECTIONS, Page

from backbones import HOROWITZ_45NM
from detection.curves import short_names
from detection.data import Record
from detection.evaluation import PrecisionRecall
from detection.evaluation.matching import match
from detection.records import Evaluation
from detection.report import views, words
from detection.report.page import render
from detection.report.source import read_analysis, read_source
from detection.runs import Run
from detection.sections import Charts, Examination, Section, Table, Words, score
from detection.tasks.base import Task
from detection.tasks.classification import confusion_parts
from detection.tasks.detection_page import class_sections, precision_parts
from detection.tasks.recipes import ClassificationRecipe, DetectionRecipe


def test_recipe_shows_what_differs_from_the_defaults():
    config = Run.open(C1).config
    rows = {key: rest for key, *rest in views.changed_settings(config)}
    assert rows["train.epochs"] == ["40", "12", "passes over the training data"]
    assert {"model.head.anchor_scale", "hoyer.weight", "data.format"} < rows.keys()
    assert not {"model.detector", "train.batch_size", "optimizer.lr", "data.classes"} & rows.keys()
    assert not views.changed_settings(
        DetectionRecipe.model_validate({"data": {"format": "coco", "train": ["a"], "val": ["b"]}})
    )[2:]
    assert views.changed_settings(ClassificationRecipe.model_validate({"data": {}})) == []


def test_names_of_runs_are_as_long_as_it_takes():
    assert words.run_names([Path("/a/b/x")]) == ["x"]
    assert words.run_names([Path("/a/b/x"), Path("/a/b/y")]) == ["x", "y"]
    assert words.run_names([Path("/a/b/x"), Path("/a/c/x")]) == ["b/x", "c/x"]
    assert short_names(["net.a.0", "net.a.1", "net.b.0"]) == {
        "net.a.0": "a.0",
        "net.a.1": "a.1",
        "net.b.0": "b.0",
    }
    assert short_names(["net.a.0"]) == {"net.a.0": "0"}


def test_settings_are_shown_with_all_their_digits():
    assert [words.show_value(each) for each in (1e-3, 0.0010000004, 0.1, 3.0, (1e-5, 2.0))] == [
        "0.001", "0.0010000004", "0.1", "3", "1e-05, 2",
    ]  # fmt: skip


def test_an_analysis_of_other_prices_is_not_the_page_s(tmp_path):
    prices = asdict(HOROWITZ_45NM)
    stored = {"networks": {}, "ratios": {}, "layers": [], "certificate": {}, "num_images": 1, "weights": "last"}
    run = SimpleNamespace(products=tmp_path, folder=tmp_path)
    (tmp_path / "analysis").mkdir()
    for costs, found in ((prices, True), (prices | {"mac_pj": 1.0}, False)):
        (tmp_path / "analysis" / "analysis.json").write_text(json.dumps(stored | {"costs": costs}))
        assert (read_analysis(run, "last") is not None) is found


# Matching and drawing


def record(boxes: list[list[float]], labels: list[int], ignore: list[bool] | None = None) -> Record:
    return Record(
        path=Path("image.png"),
        image_id=1,
        width=100,
        height=100,
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        labels=np.array(labels, dtype=np.int64),
        ignore=np.array(ignore or [False] * len(labels), dtype=bool),
        area=np.zeros(len(labels)),
    )


def test_match_counts_by_voc_s_rule():
    box, other, difficult = [0, 0, 10, 10], [50, 50, 60, 60], [20, 20, 30, 30]
    found = match(
        record([box, other, difficult], [1, 2, 1], [False, False, True]),
        [
            [0, 0, 10, 9, 0.5, 1],  # on the first box, which the surer one has taken
            [0, 0, 10, 10, 0.9, 1],
            [50, 50, 60, 60, 0.8, 1],  # another class
            [20, 20, 30, 30, 0.7, 1],  # difficult
            [0, 0, 10, 4, 0.6, 1],  # overlaps too little
        ],
    )
    assert [row[4] for row in found.detections] == [0.9, 0.8, 0.7, 0.6, 0.5]
    assert found.right == [True, False, None, False, False]
    assert found.found == [True, False, False]
    assert (found.num_right, found.num_wrong, found.num_missed) == (1, 3, 1)
    assert found.f1 == 2 / (2 + 3 + 1)
    assert match(record([], []), []).f1 == 1
    assert match(record([], []), [[0, 0, 5, 5, 0.9, 1]]).f1 == 0
    assert match(record([box], [1]), []).f1 == 0


# What tasks bring


def test_sections_of_a_detector_say_why_they_are_empty():
    bare = class_sections(None, None)
    assert [(section.key, section.parts) for section in bare] == [("classes", []), ("precision", []), ("images", [])]
    assert [section.why for section in bare] == ["The log has no average precision per class.", "", ""]
    logged = {"a": {"AP": 0.2, "AP50": 0.5, "num_boxes": 3}, "b": {"AP": -1, "AP50": -1, "num_boxes": 0}}
    logged |= {"c": {"AP": 0.4, "AP50": 0.6, "num_boxes": 1}}
    found = class_sections(Evaluation(metrics={}, tables={"per_class": logged}), {"precision": [], "images": ["x"]})
    rows = found[0].parts[0].rows
    assert [row[0] for row in rows] == ["c", "a", "b"]  # without boxes at the end
    assert rows[0][1:] == (("0.400", 0.4, 0.4), ("0.600", 0.6, 0.6), ("1", 1, None))
    assert rows[2][1] == ("undefined", -1, 0.0)
    assert found[1].why == "No class has boxes to find." and found[2].parts == ["x"]


def test_precision_over_recall_of_many_classes_says_which_are_grey():
    right = {name: np.cumsum([index % 3 == 0, True]) for index, name in enumerate("abcdefghij")}
    curves = {name: PrecisionRecall(np.array([0.9, 0.5]), hits, 2) for name, hits in right.items()}
    curves["no boxes"] = PrecisionRecall(np.array([0.9]), np.array([0]), 0)
    text, charts, table = precision_parts(curves)
    assert text.endswith("the other 2 are grey.") and isinstance(charts, Charts)
    assert len(table.rows) == 10 and table.numeric == [False, True, True, True, True]
    assert table.rows[0] == ("a", ("1.000", 1.0, None), ("1.000", 1.0, None), ("2", 2, None), ("2", 2, None))
    assert precision_parts({"no boxes": curves["no boxes"]}) == []


def test_confusion_gives_accuracy_and_mistakes():
    accuracy, heading, mistakes = confusion_parts(torch.tensor([[3, 1, 0], [0, 2, 0], [0, 4, 1]]), ["a", "b", "c"])
    assert [(row[0], row[1].shown, row[2].value) for row in accuracy.rows] == [
        ("c", "20.0 %", 5),
        ("a", "75.0 %", 4),
        ("b", "100.0 %", 2),
    ]
    assert heading == Words("Most frequent mistakes", "heading")
    assert [(*row[:2], row[2].value, row[3].value) for row in mistakes.rows] == [
        ("c", "b", 4, 0.8),
        ("a", "b", 1, 0.25),
    ]
    assert len(confusion_parts(torch.diag(torch.tensor([2, 0])), ["a", "b"])) == 1  # no mistakes, a class unseen


def test_a_task_from_elsewhere_brings_its_own_sections(tmp_path):
    source = read_source(CIFAR / "hoyer_seed0", "last")

    class Plain(type(source.task)):
        words = {"top1": "share of the right"}  # noqa: RUF012
        describe = Task.describe
        sections = Task.sections

    class Own(Plain):
        def sections(self, logged, found):
            table = Table("Things", ("thing", "size"), [("x", score(0.5, bar=True))])
            parts = [] if found is None else found.parts["own"]
            return [Section("own", "Mine", "My things", [table, *parts]), Section("none", "None", "Empty", [])]

    config = source.run.config
    (tmp_path / "page.html").write_text(render([replace(source, task=Plain(config))]))
    page = Page(tmp_path / "page.html")
    keys = {each.removeprefix("run1-") for each in page.ids if each.startswith("run1-")}
    assert keys == SECTIONS - {"classes"} and "share of the right" in page.words_of
    found = Examination(source.line.evaluation, {"own": ["A sentence of its own.", Words("More", "heading")]})
    (tmp_path / "page.html").write_text(render([replace(source, task=Own(config), found=found)]))
    page = Page(tmp_path / "page.html")
    assert page.wrong == [] and {"run1-own", "run1-none"} < set(page.ids)
    assert "My things thing size x 0.500 A sentence of its own. More" in page.words_of
    assert "Empty Left out. This page was made from the log alone." in page.words_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (words.format_energy(12.3), "12.3 pJ"),
        (words.format_energy(4.56e6), "4.56 \N{MICRO SIGN}J"),
        (words.format_energy(0.0), "0 pJ"),
        (words.format_count(29_900_000), "29.9 M"),
        (words.format_count(0), "0"),
        (words.format_count(999_600), "1 M"),
        (words.format_count(999.4), "999"),
        (words.format_energy(999.6), "1 nJ"),
        (words.format_energy(999_600_000), "1 mJ"),
        (words.format_number(-1), "undefined"),
        (words.format_number(0.87293), "0.873"),
        (words.format_time(89), "89 s"),
        (words.format_time(3 * 3600 + 240), "3 h 4 min"),
        (score(-1).shown, "undefined"),
    ],
)
def test_numbers_as_text(text, expected):
    assert text == expected
