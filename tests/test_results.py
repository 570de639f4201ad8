"""The tables of measured numbers are what the logs say, and the planned experiments are commands that work."""

import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from helpers import ROOT, run_tool
from test_resume import CLASSIFICATION, write_recipe

from detection.cli import compare
from detection.config import find_recipe, flatten, override, read_recipe
from detection.runs import Run
from detection.tasks import task_of

RESULTS = ROOT / "results"


def error_of(monkeypatch, capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        run_tool(monkeypatch, "results/tables", *arguments)
    assert stop.value.code
    return capsys.readouterr().err


@pytest.fixture
def copy(tmp_path) -> Path:
    """A repository of two runs of one recipe, spiking and not, and a page with marks."""
    for name in ("c1_bccd_retinanet_resnet18_hoyer", "c1_bccd_retinanet_resnet18_relu"):
        pictures = shutil.ignore_patterns("*.png")
        shutil.copytree(RESULTS / name, tmp_path / "results" / name, ignore=pictures)
    shutil.copytree(RESULTS / "benchmarks", tmp_path / "results" / "benchmarks")
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def edit_log(run: Path, **values) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[-1] |= values
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_pages_say_what_the_logs_say(monkeypatch, capsys):
    run_tool(monkeypatch, "results/tables", RESULTS, "--check")
    assert "says something else" not in capsys.readouterr().err


def test_a_row_is_trained_again_and_compared_in_every_digit(monkeypatch, capsys, tmp_path):
    row, out = tmp_path / "row", tmp_path / "again"
    run_tool(monkeypatch, "train_cls", write_recipe(tmp_path, CLASSIFICATION), "--out", row)
    weights = (row / "last.safetensors").read_bytes()
    (row / "last.safetensors").unlink()
    for change, status, words in (
        ({}, 0, "equal in every digit"),
        ({"loss": 1.0}, 1, "epoch 2: loss and 0 more differ"),
    ):
        if change:
            edit_log(row, **change)
            (row / "last.safetensors").unlink()
        with pytest.raises(SystemExit) as stop:
            run_tool(monkeypatch, "results/again", row, "--out", out, "--keep")
        assert stop.value.code == status and f"{row}: {words}" in capsys.readouterr().out
        assert (row / "last.safetensors").is_file() == (status == 0)
        assert status or (row / "last.safetensors").read_bytes() == weights


def test_a_row_has_what_it_begins_with_trained_before_it(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    again = load_again()
    values = {**CLASSIFICATION, "train": CLASSIFICATION["train"] | {"epochs": 1}}
    run_tool(monkeypatch, "train_cls", write_recipe(tmp_path, values), "--out", "runs/first")
    weights = ["--model.backbone.weights", "runs/first/last.safetensors"]
    run_tool(monkeypatch, "train_cls", tmp_path / "recipe.yaml", *weights, "--out", "runs/second")
    Path("runs").rename("results")
    monkeypatch.setattr(again, "HERE", tmp_path / "results")
    monkeypatch.setattr(again, "STARTS", {"runs/first": "first"})
    with pytest.raises(SystemExit) as stop:
        again.main(["results/second", "--out", "again"])
    assert stop.value.code == 0 and "results/second: equal in every digit" in capsys.readouterr().out
    assert sorted(path.name for path in Path("again").iterdir()) == ["first", "second"]
    assert Run.open("again/second").config.model.backbone.weights == "again/first/last.safetensors"


def test_what_a_row_begins_with_is_a_row_a_file_or_of_the_zoo():
    again, keys = load_again(), ("model.weights", "model.backbone.weights", "distillation.teacher")
    rows = {
        path.parent.relative_to(RESULTS).as_posix(): Run.open(path.parent).config
        for path in RESULTS.glob("**/config.yaml")
    }
    for name, config in rows.items():
        starts = again.starts_of(config)
        for key in keys:
            value = flatten(config).get(key)
            known = value is None or str(value).startswith("zoo:") or (ROOT / str(value)).exists()
            assert known or key in starts, f"{name}: {key} {value}"
        behind = [source for source, _ in starts.values()]
        while behind:  # to its end, or for ever
            source = behind.pop()
            assert source != name
            behind += [source for source, _ in again.starts_of(rows[source]).values()]


def load_again():
    """results/again.py as a module."""
    spec = importlib.util.spec_from_file_location("again", RESULTS / "again.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_controlled_runs_says_what_their_logs_say(monkeypatch, capsys, tmp_path):
    run_tool(monkeypatch, "results/controlled_runs", RESULTS, "--check")
    page = (RESULTS / "controlled_cifar10" / "README.md").read_text()
    assert len(re.findall(r"^\| .*\]\(\w+/\) \|$", page, re.MULTILINE)) >= 14
    shutil.copytree(RESULTS / "controlled_cifar10", tmp_path / "controlled_cifar10")
    edit_log(tmp_path / "controlled_cifar10" / "vgg_base_s0", top1=0.5)
    with pytest.raises(SystemExit) as stop:
        run_tool(monkeypatch, "results/controlled_runs", tmp_path, "--check")
    assert stop.value.code == 1 and "says something else than the logs" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_says_where_it_was_measured_or_that_it_was_not(path):
    first, *rest = [line for line in path.read_text().splitlines() if line.startswith("#")]
    places = re.findall(r"results/([\w*]+)", " ".join(rest))
    if "Not run at its own size." in first:
        return
    runs = [Run.open(config.parent) for place in places for config in RESULTS.glob(f"{place}/**/config.yaml")]
    recipe = read_recipe(path)
    assert any(each.config.train.epochs == recipe.train.epochs and each.finished for each in runs), places


def test_tables_follow_the_logs(copy, monkeypatch, capsys):
    results, readme = copy / "results", copy / "README.md"
    edit_log(results / "c1_bccd_retinanet_resnet18_hoyer", AP50=0.8111, activity=0.25)
    edit_log(results / "c1_bccd_retinanet_resnet18_relu", AP50=0.8333)
    errors = error_of(monkeypatch, capsys, results, "--check")
    assert f"{results / 'README.md'}: says something else" in errors and f"{readme}: says" in errors
    assert not (results / "README.md").exists()
    before = readme.read_text()
    run_tool(monkeypatch, "results/tables", results)
    rows = [line for line in (results / "README.md").read_text().splitlines() if line.startswith("| [c1_")]
    row = rows[0]  # the spiking network's; below stand its twin and its exported files
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[0] == "[c1_bccd_retinanet_resnet18_hoyer](c1_bccd_retinanet_resnet18_hoyer/)"
    assert cells[1:6] == ["BCCD", "RetinaNet, ResNet18 \N{MULTIPLICATION SIGN}0.5, spiking", "40", "0.8111", cells[5]]
    assert cells[6].startswith("[0.8333](") and cells[7:9] == ["2.2", "0.2500"]
    energy = json.loads((results / "c1_bccd_retinanet_resnet18_hoyer" / "analysis" / "analysis.json").read_text())
    assert cells[9] == f"{energy['ratios']['spiking/twin']['operations']:.3f}"
    assert "`python tools/train_det.py configs/bccd_retinanet_resnet18.yaml`" in cells
    after = readme.read_text()
    assert after != before and "| 0.811 | 0.833 | 25.0 % |" in after
    assert after.split("## The method")[0].split("## Train")[0] == before.split("## Train")[0]
    run_tool(monkeypatch, "results/tables", results, "--check")


def test_a_run_of_another_recipe_is_no_twin(copy, monkeypatch):
    config = copy / "results" / "c1_bccd_retinanet_resnet18_relu" / "config.yaml"
    config.write_text(config.read_text().replace("epochs: 40", "epochs: 41"))
    run_tool(monkeypatch, "results/tables", copy / "results")
    assert "0.8977](" not in (copy / "results" / "README.md").read_text()


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("run.json", "{", "run.json: damaged"),
        ("run.json", '{"sha256": {"ema.safetensors": "0"}}', "run.json: has no SHA-256 of last.safetensors"),
        ("run.json", '{"sha256": 1}', "run.json: damaged, sha256"),
        ("metrics.jsonl", "", "metrics.jsonl: no such log"),
        ("metrics.jsonl", '{"epoch": 1, "loss": 1.0}\n', "metrics.jsonl: its last line has no AP50"),
        ("metrics.jsonl", "{}\n", "metrics.jsonl, line 1: damaged, epoch"),
        ("analysis/analysis.json", "[]", "analysis.json: damaged, or no analysis"),
    ],
)
def test_damaged_logs_are_named(copy, monkeypatch, capsys, file, content, sentence):
    run = copy / "results" / "c1_bccd_retinanet_resnet18_hoyer"
    (run / file).write_text(content)
    before = (copy / "README.md").read_text()
    line = error_of(monkeypatch, capsys, copy / "results").splitlines()[-1]
    assert str(run) in line and sentence in line
    assert (copy / "README.md").read_text() == before


def test_missing_marks_and_an_empty_folder(copy, monkeypatch, capsys, tmp_path):
    readme = copy / "README.md"
    readme.write_text(readme.read_text().replace("<!-- end of speed -->\n", ""))
    assert "needs the lines" in error_of(monkeypatch, capsys, copy / "results")
    (tmp_path / "none").mkdir()
    assert "no finished run in it" in error_of(monkeypatch, capsys, tmp_path / "none")


def planned_commands() -> list[str]:
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "docs" / "experiments.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_there_are_planned_experiments():
    assert len(planned_commands()) >= 9


@pytest.mark.parametrize("command", planned_commands())
def test_planned_experiments_have_valid_recipes(command):
    program, script, *arguments = shlex.split(command)
    if program == "python":
        assert (ROOT / script).is_file()
        return
    assert (program, script) == ("hoyer-det", "compare")
    options, common = compare.build_parser(None).parse_known_args(arguments)
    recipe = read_recipe(find_recipe(options.config))
    for _, overrides in map(compare.parse_variant, options.variants):
        task_of(override(recipe, [*common, *overrides])).check_names()
