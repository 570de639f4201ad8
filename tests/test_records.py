"""Typed records of run folders: every log and run.json of the repository comes back as it is, damage is named."""

import json
import math
from pathlib import Path

import pytest
from helpers import ROOT
from pydantic import ValidationError

from detection.records import EpochLog, Evaluation, Machine, RunInfo
from detection.runs import Run
from detection.tasks.recipes import ClassificationRecipe

PLACES = [ROOT / "results", ROOT / "backbones" / "zoo"]
LOGS = sorted(path for place in PLACES for path in place.rglob("metrics.jsonl"))
INFOS = sorted(path for place in PLACES for path in place.rglob("run.json"))
LINE = {
    "epoch": 2,
    "step": 12,
    "lr": 0.1,
    "loss": 1.75,
    "loss/classification": 1.5,
    "loss/hoyer": 0.25,
    "seconds": 1.0,
    "images_per_second": 40.0,
    "memory_mib": 512.5,
    "hoyer_per_layer": {"spike": 0.5},
    "v_th": {"spike": 1.0},
    "AP": 0.5,
    "AP50": 0.75,
    "per_class": {"cat": {"AP": 0.5, "num_boxes": 3}},
    "voc": {"AP50_area": 0.25},
    "activity": 0.125,
    "activity_per_layer": {"spike": 0.125},
    "potentials": {"spike": [0.0, 1.0]},
    "ema": {"AP": 0.625, "AP50": 0.875},
    "eval_seconds": 2.0,
    "silent": ["spike"],
}
INFO = {
    "command": "hoyer-det train demo",
    "versions": {"torch": "2.8.0"},
    "machine": {"system": "Linux x86_64", "cpu": "a CPU", "cores": 2, "threads": 1, "gpu": None},
    "category_ids": [1, 7],
    "resumed": ["hoyer-det train --resume runs/demo"],
    "sha256": {"last.safetensors": "0" * 64},
}


def name(path: Path) -> str:
    return str(path.parent.relative_to(ROOT))


@pytest.mark.parametrize("path", LOGS, ids=name)
def test_every_log_comes_back_byte_for_byte(path):
    for text in path.read_text().splitlines():
        line = EpochLog.parse(json.loads(text), str(path))
        assert json.dumps(line.to_json()) == text
        assert line.evaluation is None or line.evaluation.metrics
        spikes = set(line.evaluation.activity_per_layer) if line.evaluation else set()
        assert all(set(values) <= spikes for values in line.layers.values() if spikes)


@pytest.mark.parametrize("path", INFOS, ids=name)
def test_every_run_json_comes_back(path):
    values = json.loads(path.read_text())
    info = RunInfo.parse(values, str(path))
    assert info.to_json() == values
    assert info.versions["torch"] and info.machine.cores
    # The one list that may be anywhere: it is added when a run goes on.
    assert [key for key in info.to_json() if key != "resumed"] == [key for key in values if key != "resumed"]


def test_there_are_records_of_both_tasks():
    assert len(LOGS) == len(INFOS) > 20
    found = {"AP50" in path.read_text() for path in LOGS}
    assert found == {True, False}


def test_the_keys_of_a_line_go_to_their_fields():
    line = EpochLog.parse(LINE, "log")
    assert (line.epoch, line.step, line.lr, line.loss) == (2, 12, 0.1, 1.75)
    assert line.losses == {"classification": 1.5, "hoyer": 0.25}
    assert (line.seconds, line.images_per_second, line.memory_mib, line.eval_seconds) == (1.0, 40.0, 512.5, 2.0)
    assert line.layers == {"hoyer_per_layer": {"spike": 0.5}, "v_th": {"spike": 1.0}}
    assert line.evaluation == Evaluation(
        metrics={"AP": 0.5, "AP50": 0.75},
        tables={"per_class": {"cat": {"AP": 0.5, "num_boxes": 3}}, "voc": {"AP50_area": 0.25}},
        activity=0.125,
        activity_per_layer={"spike": 0.125},
        potentials={"spike": [0.0, 1.0]},
    )
    assert line.ema == Evaluation(metrics={"AP": 0.625, "AP50": 0.875})
    assert line.metrics == {"AP": 0.5, "AP50": 0.75, "activity": 0.125} and line.silent == ["spike"]
    assert json.dumps(line.to_json()) == json.dumps(LINE)


def test_a_line_without_evaluation_and_without_spikes():
    line = EpochLog(epoch=1, step=3, lr=0.5, loss=1.0, losses={"classification": 1.0})
    assert line.to_json() == {"epoch": 1, "step": 3, "lr": 0.5, "loss": 1.0, "loss/classification": 1.0}
    assert line.metrics == {} and EpochLog.parse(line.to_json(), "log") == line


def test_a_table_of_another_task_is_not_taken_for_one_of_the_layers():
    line = EpochLog(
        epoch=1,
        loss=1.0,
        layers={"v_th": {"spike": 1.0}},
        evaluation=Evaluation(metrics={"error": 0.5}, tables={"per_camera": {"left": 0.25, "right": 0.75}}),
    )
    found = EpochLog.parse(line.to_json(), "log")
    assert found == line and list(found.layers) == ["v_th"] and list(found.evaluation.tables) == ["per_camera"]


def test_numbers_stay_what_they_are():
    line = EpochLog.parse(json.loads(json.dumps(LINE | {"AP": 1, "loss": math.inf, "AP50": math.nan})), "log")
    assert line.loss == math.inf and line.metrics["AP"] == 1 and math.isnan(line.metrics["AP50"])
    assert json.dumps(line.to_json()).startswith('{"epoch": 2, "step": 12, "lr": 0.1, "loss": Infinity,')


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"epoch": "2"}, "epoch"),
        ({"epoch": 0}, "epoch"),
        ({"epoch": True}, "epoch"),
        ({"loss": None}, "loss"),
        ({"loss/hoyer": "0.25"}, "losses.hoyer"),
        ({"seconds": "fast"}, "seconds"),
        ({"v_th": {"spike": None}}, "layers.v_th.spike"),
        ({"AP": "0.5"}, "evaluation.metrics.AP"),
        ({"AP": [0.5]}, "evaluation.metrics.AP"),
        ({"activity": "much"}, "evaluation.activity"),
        ({"activity_per_layer": {"spike": "much"}}, "evaluation.activity_per_layer.spike"),
        ({"potentials": {"spike": 1.0}}, "evaluation.potentials.spike"),
        ({"ema": 0.5}, "ema"),
        ({"ema": {"AP": None}}, "ema.metrics.AP"),
        ({"silent": "spike"}, "silent"),
    ],
)
def test_a_damaged_line_is_named_with_file_line_and_key(tmp_path, change, key, attempt):
    run = Run.create(tmp_path / "run", ClassificationRecipe(data={"format": "synthetic"}), RunInfo())
    lines = [LINE | {"epoch": 1}, LINE | change, LINE | {"epoch": 3}]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with attempt("wrong values"), pytest.raises(ValueError) as error:
        run.history()
    assert str(error.value).startswith(f"{run.folder / 'metrics.jsonl'}, line 2: damaged, {key}: ")
    assert "\n" not in str(error.value)


def test_a_line_without_its_loss_or_that_is_no_object(attempt):
    with attempt("wrong values"), pytest.raises(ValueError, match=r"^log, line 3: damaged, loss: Field required$"):
        EpochLog.parse({key: value for key, value in LINE.items() if key != "loss"}, "log, line 3")
    with attempt("wrong values"), pytest.raises(ValueError, match=r"^log: damaged, the whole: "):
        EpochLog.parse([1, 2], "log")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"command": ["hoyer-det"]}, "command"),
        ({"versions": {"torch": 2.8}}, "versions.torch"),
        ({"machine": {"cores": "2"}}, "machine.cores"),
        ({"machine": "a laptop"}, "machine"),
        ({"category_ids": ["1"]}, "category_ids.0"),
        ({"resumed": "once"}, "resumed"),
        ({"sha256": {"last.safetensors": 3}}, "sha256.last.safetensors"),
    ],
)
def test_a_damaged_run_json_is_named_with_file_and_key(tmp_path, change, key, attempt):
    run = Run.create(tmp_path / "run", ClassificationRecipe(data={"format": "synthetic"}), RunInfo())
    (run.folder / "run.json").write_text(json.dumps(INFO | change))
    with attempt("wrong values"), pytest.raises(ValueError) as error:
        run.info()
    assert str(error.value).startswith(f"{run.folder / 'run.json'}: damaged, {key}: ")


def test_facts_of_another_task_are_kept():
    info = RunInfo.parse(INFO | {"cameras": ["left", "right"]}, "run.json")
    assert info.machine == Machine(system="Linux x86_64", cpu="a CPU", cores=2, threads=1)
    assert info.to_json() == INFO | {"cameras": ["left", "right"]}
    assert RunInfo().to_json() == {"command": "unknown", "machine": Machine().model_dump()}


def test_a_program_that_gives_a_wrong_type_fails_at_once():
    with pytest.raises(ValidationError):
        Evaluation(metrics={"AP": "0.5"})
    with pytest.raises(ValidationError):
        EpochLog(epoch=0, loss=1.0)
