"""Recipes, logs and run.json with values of the right syntax and the wrong type, size or depth: equal, or refused."""

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from detection.config import flatten, read_recipe, save_config, set_values
from detection.config.schema import Hoyer
from detection.config.yaml_files import MAX_BYTES, MAX_DEPTH
from detection.records import RunInfo
from detection.runs import Run
from detection.tasks.recipes import ClassificationRecipe, DetectionRecipe

EVIL = [
    *(
        None,
        True,
        False,
        "",
        " ",
        "text",
        "0.1",
        "1e9",
        "nan",
        "yes",
        "a\0b",
        "\x1b[2J",
        "[/red]",
        "\ud800",
        "~",
        "9" * 99,
    ),
    *(-1, 0, 1, 0.5, -0.0, 3.0, 1e9, 1e308, 10**18, 2**63, 10**40, 10**400, -(10**400), math.inf, -math.inf, math.nan),
    *([], {}, [[]], [None], [1, "a"], {"a": 1}, {"": None}, {"a": {"a": {"a": []}}}, list(range(300)), {"epoch": [1]}),
]
DEEP = {f"depth {depth}": "[" * depth + "]" * depth for depth in (MAX_DEPTH, 200, 900, 100_000)}
RUN = ROOT / "results" / "c1_bccd_retinanet_resnet18_hoyer"


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of everything in nested lists and dicts."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield (*path, key)
        yield from places(entry, (*path, key))


def spoil(values: dict, rng: random.Random) -> tuple[dict, tuple]:
    """A copy in which one value is another, or wrapped up; and its path."""
    changed = json.loads(json.dumps(values))
    path = rng.choice(list(places(changed)))
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    old = holder[path[-1]]
    wrapped = [[old], {"a": old}, {str(path[-1]): old}, str(old), *DEEP]
    holder[path[-1]] = rng.choice(EVIL if rng.random() < 0.8 else wrapped)
    return changed, path


def to_json(values: dict) -> str:
    """Their text, in which a name of DEEP is what it stands for: too deep for Python to write."""
    text = json.dumps(values)
    for name, nested in DEEP.items():
        text = text.replace(f'"{name}"', nested)
    return text


def at(values: Any, path: tuple) -> Any:
    for key in path:
        values = values[key]
    return values


def means(text: str) -> Any:
    """A number or truth that a text stands for, else the text itself."""
    words = {"yes": True, "no": False, "true": True, "false": False, "on": True, "off": False}
    try:
        return words[text.lower()] if text.lower() in words else float(text)
    except ValueError:
        return text


def equal(found: Any, given: Any) -> bool:
    """Whether a value is what was written, and nothing that was written is lost.

    Keys that are not written have their defaults; a text may stand for a number or a truth, and float64 holds as much
    of a whole number as it can.
    """
    if isinstance(given, dict):
        return isinstance(found, dict) and all(key in found and equal(found[key], given[key]) for key in given)
    if isinstance(given, list):
        return isinstance(found, list) and len(found) == len(given) and all(map(equal, found, given))
    if isinstance(given, str):
        deep = given in DEEP and to_json({"": found}) == to_json({"": given})
        return deep or found == (given if isinstance(found, str) else means(given))
    if isinstance(found, str) and isinstance(given, float):
        return means(found) == given
    if isinstance(found, float) and isinstance(given, (int, float)):
        return found == float(given) or (math.isnan(found) and math.isnan(given))
    return found == given


def test_a_recipe_with_a_wrong_value_is_read_as_it_is_or_refused_by_its_key(tmp_path, attempt):
    rng, path, read = random.Random(0), tmp_path / "config.yaml", 0
    recipes = [RUN / "config.yaml", ROOT / "configs" / "cifar10_vgg16_fast.yaml"]
    trees = [read_recipe(each).model_dump(mode="json") for each in recipes]
    for _ in range(400):
        values, place = spoil(rng.choice(trees), rng)
        text = to_json(values).replace("NaN", ".nan").replace("Infinity", ".inf")
        path.write_text(text)  # JSON is YAML but for these, and for 1e+308, which is a text
        with attempt("wrong values"):
            try:
                found = read_recipe(path).model_dump(mode="json")
            except ValueError as error:
                message = str(error)
                named = [str(key) for key in place if isinstance(key, str)]
                assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 3000
                assert any(key in message for key in named) or " line " in message, (place, message)
            else:
                read += 1
                wanted = at(values, place)
                if wanted is None and place[0] == "hoyer":  # left open, so filled in
                    wanted = getattr(Hoyer(**values["hoyer"]), place[1])
                assert equal(at(found, place), wanted), (place, at(found, place), wanted)
    assert 40 < read < 300  # both happen


def records() -> list[dict]:
    return [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "run", ClassificationRecipe(data={"format": "synthetic"}), RunInfo())


def test_a_log_with_a_wrong_value_is_read_as_it_is_or_refused_by_its_line_and_key(run, attempt):
    rng, path, read = random.Random(1), run.folder / "metrics.jsonl", 0
    first, *_, last = records()
    last |= {"warnings": {"low": "a sentence"}, "silent": ["spike"], "ema": {"AP": 0.5}, "hoyer_share_of_threshold": {}}
    for _ in range(400):
        line, place = spoil(rng.choice([first, last]), rng)
        path.write_text(json.dumps(first) + "\n" + to_json(line) + "\n")
        with attempt("wrong values"):
            try:
                found = run.history()[1].to_json()
            except ValueError as error:
                message, key = str(error), str(place[0]).removeprefix("loss/")
                assert message.startswith(f"{path}, line 2: damaged, ") and "\n" not in message
                assert key in message or "no JSON" in message, (place, message)
            else:
                read += 1
                left_out = at(line, place[:1]) in (None, [], {}) and place[0] not in found
                assert left_out or equal(found[place[0]], line[place[0]]), (place, found[place[0]], line[place[0]])
    assert 40 < read < 300


def test_a_run_json_with_a_wrong_value_is_read_as_it_is_or_refused_by_its_key(run, attempt):
    rng, path, read = random.Random(2), run.folder / "run.json", 0
    good = json.loads((RUN / "run.json").read_text())
    good |= {"precision": "bf16", "data": {"train": {"images": 3, "fingerprint": "0"}}, "cameras": [{"left": 1}]}
    for _ in range(400):
        values, place = spoil(good, rng)
        path.write_text(to_json(values))
        with attempt("wrong values"):
            try:
                found = run.info().to_json()
            except ValueError as error:
                message = str(error)
                assert message.startswith(f"{path}: damaged, ") and "\n" not in message
                assert str(place[0]) in message or "no JSON" in message, (place, message)
            else:
                read += 1
                left_out = at(values, place[:1]) in (None, [], {}) and place[0] not in found
                assert left_out or equal(found[place[0]], values[place[0]]), (place, values[place[0]])
    assert 40 < read < 300


# Things that a recipe never has


def test_a_section_or_key_twice_is_an_error_with_both_lines(tmp_path, attempt):
    path = tmp_path / "a.yaml"
    cases = [
        ("data: {format: synthetic}\ntrain:\n  epochs: 3\nhoyer: {}\ntrain:\n  seed: 1\n", "train", 2, 5),
        ("data: {format: synthetic}\ntrain:\n  epochs: 3\n  seed: 1\n  epochs: 4\n", "epochs", 3, 5),
        ("data: {format: synthetic}\ntrain: {seed: 1,\n seed: 1}\n", "seed", 2, 3),
        ('data: {format: synthetic}\n"data":\n  format: coco\n', "data", 1, 2),
    ]
    for text, key, first, second in cases:
        with attempt("wrong values"):
            path.write_text(text)
            with pytest.raises(ValueError) as error:
                read_recipe(path)
            assert str(error.value).endswith(f"the key {key!r} stands in line {first} and again in line {second}")
            assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("data: &a {format: synthetic}\ntrain: *a\n", r"line 2: aliases \(\*\) are not allowed"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", r"line 2: aliases"),
        ("data: {format: synthetic}\n<<: {train: {epochs: 3}}\n", r"line 2: "),
        ("data: " + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), rf"line 1: nested deeper than {MAX_DEPTH}"),
        ("data: " + "{a: " * 20000, r"line 1: nested deeper than"),
        ("data: {format: synthetic}\n1: {}\n", r"line 2: expected a name for a key, got 1"),
        ("data: {format: synthetic}\n[1, 2]: {}\n", r"line 2: expected a name for a key, got \[1, 2\]"),
        ("data: {format: synthetic}\n? {a: 1}\n: {}\n", r"line 2: expected a name for a key"),
        ("data: !!python/object/apply:os.getcwd []\n", r"line 1: could not determine a constructor"),
        ("data: 2024-13-45\n", r"not a YAML file: month must be in 1..12"),
        ("data: !!int x\n", r"not a YAML file: invalid literal"),
        ("--- {}\n--- {}\n", r"line 2: but found another document"),
        ("data: \x07\n", r"not a YAML file"),
    ],
)
def test_what_no_recipe_needs_is_refused_with_its_line(tmp_path, attempt, text, sentence):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with attempt("wrong values"), pytest.raises(ValueError, match=rf"a\.yaml: .*{sentence}"):
        read_recipe(path)


def test_a_number_that_is_none_or_out_of_bounds_is_refused_by_its_key(tmp_path, attempt):
    keys = ["train.epochs", "train.batch_size", "optimizer.lr", "hoyer.weight", "model.backbone.width", "data.workers"]
    keys += ["train.save_steps", "optimizer.muon_interval", "optimizer.muon_lr", "optimizer.clip_norm"]
    path = tmp_path / "a.yaml"
    for key in keys:
        for number in (".inf", "-.inf", ".nan", "-1", "1e400", "[1]", "{}"):
            with attempt("wrong values"):
                sections, tail = key.split("."), ""
                for depth, section in enumerate(sections):
                    tail += "  " * depth + section + (":\n" if depth + 1 < len(sections) else f": {number}\n")
                path.write_text(tail if key.startswith("data") else "data: {format: synthetic}\n" + tail)
                with pytest.raises(ValueError, match=rf"^{path}: {key}: "):
                    read_recipe(path)


@pytest.mark.parametrize("kind", [DetectionRecipe, ClassificationRecipe])
def test_every_whole_number_has_bounds(attempt, kind):
    config, refused = kind(data={"format": "synthetic"}), 0
    for key, value in flatten(config).items():
        if type(value) is int:
            for number in (-(2**63), 2**63):
                with (
                    attempt("wrong values"),
                    pytest.raises(ValueError, match=rf"^{key}: Input should be (greater|less)"),
                ):
                    set_values(config, {key: number})
            refused += 1
    assert refused > 15


# Sizes


def test_files_larger_than_they_could_be_are_not_read(run, attempt):
    for name, read in (
        ("run.json", run.info),
        ("metrics.jsonl", run.history),
        ("config.yaml", lambda: read_recipe(run.folder / "config.yaml")),
    ):
        with attempt("wrong values"):
            with (run.folder / name).open("ab") as file:
                file.truncate(2**40)  # which takes no room on the disk
            with pytest.raises(ValueError, match=rf"{name}: .*larger than"):
                read()


def test_a_recipe_of_the_greatest_size_is_read(tmp_path):
    path = tmp_path / "a.yaml"
    save_config(ClassificationRecipe(data={"format": "synthetic", "classes": ["a"]}), path)
    expected = flatten(read_recipe(path))
    path.write_text(path.read_text() + "#" * (MAX_BYTES - path.stat().st_size - 1) + "\n")
    assert path.stat().st_size == MAX_BYTES and flatten(read_recipe(path)) == expected
