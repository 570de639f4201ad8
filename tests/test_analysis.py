"""Energy and binarity of saved runs: numbers, files, and what the command line says."""

import csv
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from helpers import run_tool

from backbones import HOROWITZ_45NM, spike_layers
from detection.analysis import analyze_run
from detection.config import Recipe
from detection.records import RunInfo
from detection.runs import Run
from detection.tasks import task_of
from detection.tasks.evaluate import evaluate_run
from detection.tasks.recipes import ClassificationRecipe, DetectionRecipe

BACKBONE = {"name": "vgg11", "width": 0.125}
NETWORKS = {"spiking", "spiking_int8", "twin", "twin_int8", "binary"}


def make_run(folder: Path, config: Recipe) -> Path:
    """A run folder with weights as an untrained network has them, thresholds low enough for neurons to fire."""
    torch.manual_seed(0)
    model = task_of(config).build_model()
    for layer in spike_layers(model).values():
        layer.extremum.fill_(0.05)
    run = Run.create(folder, config, RunInfo(command="made by hand"))
    run.save(model, "last")
    return folder


def detector_config(data: dict, **model) -> DetectionRecipe:
    settings = {
        "backbone": BACKBONE,
        "neck": {"levels": ["c3", "c4"], "extra_levels": 0, "out_channels": 16},
        "head": {"num_convs": 1},
        "min_size": [64],
        "max_size": 96,
    }
    values = {"model": settings | model, "data": data | {"workers": 0}, "train": {"batch_size": 2}}
    return DetectionRecipe.model_validate(values)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A detector with analogue neck and head, trained on drawn scenes for an epoch."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = {
        "model": detector_config({"format": "synthetic"}).model.model_dump(mode="json"),
        "data": {
            "format": "synthetic",
            "root": str(folder / "scenes"),
            "scenes": {"num_train": 4, "num_val": 5, "size": 64},
            "workers": 0,
        },
        "train": {"epochs": 1, "batch_size": 2},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_tool(monkeypatch, "train_det", folder / "tiny.yaml", "--out", folder / "run")
    return folder / "run"


def error_of(monkeypatch, capsys, *arguments) -> str:
    """The one sentence with which the tool refuses."""
    with pytest.raises(SystemExit) as stop:
        run_tool(monkeypatch, "analyze", *arguments)
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


# --- detectors ------------------------------------------------------------------------------------------------------


def test_analysis_of_a_trained_detector(trained):
    analysis = analyze_run(trained)
    metrics = evaluate_run(trained)[0].to_json()
    assert metrics["potentials"] and "potentials" not in analysis.metrics
    assert analysis.metrics == {key: value for key, value in metrics.items() if key != "potentials"}
    result = json.loads(json.dumps(analysis.to_dict(), allow_nan=False))
    assert (result["num_images"], result["time_steps"], result["levels"]) == (5, 1, 2)
    assert (result["run"], result["weights"]) == (str(trained), "last")
    assert result["costs"]["mac_pj"] == 4.6
    # Counts are per image: those of the networks are the sums of those of the layers.
    layers, networks = result["layers"], result["networks"]
    assert set(networks) == NETWORKS
    assert layers[0]["name"] == "backbone.body.stages.0.0"
    assert layers[0]["num_inputs"] == 3 * 64 * 64
    binary = [layer for layer in layers if layer["input"] == "spikes"]
    assert 0 < len(binary) < len(layers)
    for layer in layers:
        assert layer["num_synops"] <= layer["exact_macs"] <= layer["num_macs"]
        assert layer["rate_times_macs"] == pytest.approx(layer["input_activity"] * layer["num_macs"])
        assert set(layer["energy_pj"]) == NETWORKS
    assert networks["twin"]["macs"] == pytest.approx(sum(layer["exact_macs"] for layer in layers))
    assert networks["spiking"]["acs"] == pytest.approx(sum(layer["num_synops"] for layer in binary))
    assert networks["binary"]["acs"] == pytest.approx(sum(layer["exact_macs"] for layer in binary))
    for name, network in networks.items():
        assert network["total_pj"] == pytest.approx(sum(layer["energy_pj"][name] for layer in layers))
        assert network["memory_sram_pj"] == pytest.approx(sum(layer["memory_sram_pj"][name] for layer in layers))
    # The activity is that of the evaluation, neuron by neuron.
    neurons = sum(layer["comparisons"] for layer in layers)
    assert networks["spiking"]["comparisons"] == pytest.approx(neurons)
    spikes = sum(layer.num_spikes for layer in analysis.measured.spikes.values())
    assert spikes / (5 * neurons) == pytest.approx(metrics["activity"])
    certificate = result["certificate"]
    assert certificate["binary"] is True
    assert certificate["violations"] == []
    assert {finding["reason"] for finding in certificate["exceptions"]} == {
        "stem: sees pixels",
        "analogue head",
        "analogue neck",
    }


def test_files_and_tables(trained, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    run_tool(monkeypatch, "analyze", trained, "--images", 3)
    out = capsys.readouterr().out
    assert not (trained / "analysis").exists()  # which is for the whole of it
    folder = trained / "analysis_3_images"
    assert {path.name for path in folder.iterdir()} == {"analysis.json", "layers.csv", "analysis.md"}
    result = json.loads((folder / "analysis.json").read_text())
    assert result["num_images"] == 3
    with (folder / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [layer["name"] for layer in result["layers"]]
    for row, layer in zip(rows, result["layers"], strict=True):
        assert float(row["energy_pj.spiking"]) == layer["energy_pj"]["spiking"]
        assert float(row["num_synops"]) == layer["num_synops"]
    text = (folder / "analysis.md").read_text()
    for content in (out, text):
        assert "spiking/twin_int8" in content
        assert "time steps 1, levels 2 (0 and 1)" in " ".join(re.sub(r"[│┃]", " ", content).split())
        assert all(layer["name"] in content for layer in result["layers"])
        assert f"{result['ratios']['spiking/twin']['operations']:.3f}" in content
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| backbone")}
    assert len(widths) == 1  # every row of the layers has all columns


def test_strict_ends_with_status_1_and_names_the_layer(trained, monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run_tool(monkeypatch, "analyze", trained, "--strict", "--images", 1, "--out", tmp_path / "strict")
    assert stop.value.code == 1
    said = capsys.readouterr()
    assert re.search(r"^1 images, AP [-\d.]+, AP50 [-\d.]+, activity [\d.]+$", said.out, re.MULTILINE)
    assert "not binary, 6 violations; the first: backbone.neck.fpn.layer_blocks.0.0: " in said.err
    with pytest.raises(SystemExit):
        run_tool(monkeypatch, "analyze", trained, "--strict", "--images", 1)
    assert (trained / "analysis_1_images_strict").is_dir() and not (trained / "analysis_1_images").exists()
    certificate = json.loads((tmp_path / "strict" / "analysis.json").read_text())["certificate"]
    assert (certificate["binary"], certificate["strict"], len(certificate["violations"])) == (False, True, 6)
    assert [finding["layer"] for finding in certificate["exceptions"]] == ["backbone.body.stages.0.0"]


def test_own_costs(trained, tmp_path, monkeypatch):
    costs = {"mac_pj": 0, "ac_pj": 1, "comparison_pj": 0, "int8_mac_pj": 0, "int8_ac_pj": 0, "int8_comparison_pj": 0}
    (tmp_path / "mine.json").write_text(json.dumps(costs | {"sram_pj": 0, "dram_pj": 0, "name": "only AC"}))
    run_tool(
        monkeypatch, "analyze", trained, "--images", 1, "--costs", tmp_path / "mine.json", "--out", tmp_path / "out"
    )
    result = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert result["costs"]["name"] == "only AC"
    spiking = result["networks"]["spiking"]
    assert spiking["total_dram_pj"] == spiking["acs"] > 0
    assert result["ratios"]["spiking/twin"]["operations"] is None


def test_an_analysis_of_other_prices_or_weights_has_a_folder_of_its_own(trained, tmp_path, monkeypatch):
    run = shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("analysis*"))
    (tmp_path / "mine.json").write_text(json.dumps(asdict(HOROWITZ_45NM) | {"name": "mine"}))
    run_tool(monkeypatch, "analyze", run, "--images", 1, "--costs", tmp_path / "mine.json")
    run_tool(monkeypatch, "analyze", run, "--images", 1, "--weights", "best")
    assert {path.name for path in run.glob("analysis*1*")} == {"analysis_1_images_mine", "analysis_1_images_best"}


def test_the_twin_itself_has_twin_columns_and_fails(tmp_path, monkeypatch, capsys):
    data = {"format": "synthetic", "root": tmp_path / "scenes", "scenes": {"num_train": 1, "num_val": 2, "size": 64}}
    config = detector_config(
        data | {"classes": ["circle", "square", "triangle", "star"]}, backbone=BACKBONE | {"activation": "relu"}
    )
    make_run(tmp_path / "run", config)
    with pytest.raises(SystemExit) as stop:
        run_tool(monkeypatch, "analyze", tmp_path / "run")
    assert stop.value.code == 1
    assert "network: it has no spike layer" in capsys.readouterr().err
    result = json.loads((tmp_path / "run" / "analysis" / "analysis.json").read_text())
    assert set(result["networks"]) == {"twin", "twin_int8"}
    assert (result["ratios"], result["first_layer"]) == ({}, None)
    assert set(result["layers"][1]["energy_pj"]) == {"twin", "twin_int8"}
    assert {layer["input"] for layer in result["layers"]} == {"real"}
    assert result["certificate"]["binary"] is False


def test_a_spiking_detector_on_real_images_that_have_moved(tmp_path, real_data, monkeypatch, capsys):
    folder = real_data("coco128") / "coco128"
    data = {
        "format": "coco",
        "root": tmp_path / "gone",
        "train": ["annotations/instances_train2017.json"],
        "val": ["annotations/instances_train2017.json"],
        "train_images": "train2017",
        "val_images": "train2017",
    }
    names = [
        category["name"]
        for category in json.loads((folder / "annotations" / "instances_train2017.json").read_text())["categories"]
    ]
    config = detector_config(
        data | {"classes": names},
        neck={"levels": ["c3", "c4"], "extra_levels": 1, "out_channels": 16, "spiking": True},
        head={"num_convs": 1, "spiking": True},
    )
    make_run(tmp_path / "run", config)
    assert re.search(r"gone.*: no such .*--data\.root FOLDER", error_of(monkeypatch, capsys, tmp_path / "run"))
    run_tool(monkeypatch, "analyze", tmp_path / "run", "--data.root", folder, "--images", 3, "--strict")
    text = (tmp_path / "run" / "analysis_3_images_strict" / "analysis.json").read_text()
    result = json.loads(text, parse_constant=pytest.fail)  # no NaN, which browsers refuse
    assert result["num_images"] == 3
    assert result["certificate"]["binary"] is True
    assert 0 < result["ratios"]["spiking/twin"]["operations"] < 1
    assert 0 < result["metrics"]["activity"] < 1
    first = result["first_layer"]
    assert first["spikes_suffice"] is True
    assert 0 < first["entropy_bits"] <= first["spike_bits"]
    # A VGG's first layer has 8 spiking neurons per pixel, the pixel itself 24 bits; c1 is pooled by 2 on the way.
    assert first["image_bits"] / first["spike_bits"] == pytest.approx(24 / (8 / 4))


# --- classifiers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    config = ClassificationRecipe.model_validate(
        {
            "model": {"backbone": BACKBONE | {"stem": "cifar"}, "dropout": 0.3},
            "data": {
                "format": "synthetic",
                "size": 32,
                "num_train": 4,
                "num_val": 10,
                "classes": ["circle", "square", "triangle", "star"],
            },
            "train": {"batch_size": 4},
        }
    )
    return make_run(tmp_path_factory.mktemp("classifier") / "run", config)


@pytest.mark.parametrize(("num_images", "expected"), [(None, 10), (6, 6), (99, 10)])
def test_a_classifier_is_binary_to_its_last_layer(classifier, num_images, expected):
    analysis = analyze_run(classifier, num_images=num_images, strict=True)
    assert analysis.certificate.is_binary
    assert analysis.measured.num_images == expected
    assert (analysis.metrics["top1"] * expected) == pytest.approx(round(analysis.metrics["top1"] * expected))
    linear = [layer for layer in analysis.to_dict()["layers"] if layer["kind"] == "linear"]
    assert len(linear) == 3
    assert {layer["input"] for layer in linear} == {"spikes"}
    assert linear[0]["output_activity"] is not None  # a spike layer follows, dropout between them is inactive
    assert linear[2]["output_activity"] is None


# --- refusals -------------------------------------------------------------------------------------------------------


def test_what_is_wrong_on_the_command_line_is_said_in_a_sentence(trained, tmp_path, monkeypatch, capsys):
    assert f"{tmp_path / 'none'} is not a run folder" in error_of(monkeypatch, capsys, tmp_path / "none")
    assert "--images 0: at least one image" in error_of(monkeypatch, capsys, trained, "--images", 0)
    assert "ema.safetensors: no such weights" in error_of(monkeypatch, capsys, trained, "--weights", "ema")
    (tmp_path / "costs.yaml").write_text("mac_pj: 4.6\n")
    costs = error_of(monkeypatch, capsys, trained, "--costs", tmp_path / "costs.yaml")
    assert "costs.yaml: missing ac_pj, comparison_pj" in costs
    (tmp_path / "file").touch()
    assert "a folder is needed" in error_of(monkeypatch, capsys, trained, "--out", tmp_path / "file")
    damaged = tmp_path / "damaged"
    shutil.copytree(trained, damaged)
    weights = damaged / "last.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "last.safetensors: " in error_of(monkeypatch, capsys, damaged)
    assert not (damaged / "analysis").is_dir() or not list((damaged / "analysis").glob("*.part"))
