"""Variants of a recipe side by side: every number is that of the log or of the analysis, and is made once."""

import csv
import json
import shutil
import statistics
from pathlib import Path

import pytest
import torch
import yaml

from backbones import SpikeLayer, time_steps
from detection import comparison
from detection.analysis import analyze_run
from detection.cli import compare
from detection.cli import train as train_verb
from detection.config import flatten, require_same
from detection.files import write_csv
from detection.runs import Run
from detection.tasks import task_of
from detection.tasks.run import read_evaluation_data

DATA = ["--data.format", "synthetic", "--data.size", "16", "--data.num_train", "8", "--data.num_val", "6"]
SMALL = [*DATA, "--model.backbone.width", "0.125", "--train.epochs", "2", "--train.batch_size", "4"]
DETECTOR = {
    "model": {
        "backbone": {"name": "resnet18", "width": 0.125},
        "neck": {"levels": ["c3", "c4"], "extra_levels": 0, "out_channels": 16},
        "head": {"num_convs": 1},
        "min_size": [48],
        "max_size": 64,
    },
    "data": {"format": "synthetic", "scenes": {"num_train": 4, "num_val": 3, "size": 48}, "workers": 0},
    "train": {"epochs": 1, "batch_size": 2},
}


@pytest.fixture(scope="module", autouse=True)
def here():
    """Trainings in this process."""

    def in_this_process(arguments) -> int:
        train_verb.main(arguments)
        return 0

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(compare, "run_child", in_this_process)
        yield


def arguments_of(out, *variants: str, images: int = 4) -> list[str]:
    return ["cifar10_vgg11", "--out", str(out), "--images", str(images), "--variants", *variants, *SMALL]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison of three variants, one of them with two seeds: its folder."""
    out = tmp_path_factory.mktemp("compared") / "runs"
    compare.main(arguments_of(out, "hoyer", "--seeds", "0", "1"))
    compare.main(arguments_of(out, "hoyer", "steps2", "binary"))
    return out


def cells_of(page: str, variant: str) -> list[list[str]]:
    """The variant's rows in the tables of a page."""
    lines = [line for line in page.splitlines() if line.startswith(f"| {variant} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_numbers_are_those_of_logs_and_analyses(compared):
    whole = json.loads((compared / "comparison.json").read_text())
    assert (whole["metric"], whole["images"]) == ("top1", 4) and "Horowitz" in whole["costs"]
    assert [row["variant"] for row in whole["variants"]] == ["hoyer", "steps2", "binary"]
    assert [len(row["runs"]) for row in whole["variants"]] == [2, 1, 1]
    own = {"hoyer": "spiking", "steps2": "spiking", "binary": "binary"}
    for row in whole["variants"]:
        for each in row["runs"]:
            run = Run.open(compared / f"{row['variant']}_seed{each['seed']}")
            history, found = run.history(), analyze_run(run.folder, num_images=4)
            network, layers = found.report.networks[own[row["variant"]]], found.measured.layers.values()
            assert each["top1"] == history[-1].metrics["top1"]
            assert each["activity"] == history[-1].metrics.get("activity")
            assert each["training_seconds"] == history[0].seconds + history[1].seconds
            assert each["memory_mib"] == max(line.memory_mib for line in history) > 100
            assert each["energy_uj"] == network.total_pj / 1e6
            assert each["energy_sram_uj"] == network.total_sram_pj / 1e6 > each["energy_uj"] > 0
            assert each["synaptic_operations"] == sum(layer.num_synops for layer in layers) / 4
            assert each["twin_macs"] == found.report.networks["twin"].macs
            model = task_of(run.config).build_model()
            assert each["parameters"] == sum(parameter.numel() for parameter in model.parameters())
            assert each["time_steps"] == time_steps(model) == (2 if row["variant"] == "steps2" else 1)
            if row["variant"] == "binary":
                assert each["energy_int8_uj"] is each["energy_int8_sram_uj"] is None
            else:
                eight = found.report.networks["spiking_int8"]
                assert each["energy_int8_uj"] == eight.total_pj / 1e6
                assert each["energy_int8_sram_uj"] == eight.total_sram_pj / 1e6


def test_tables_have_the_means(compared):
    whole = {row["variant"]: row for row in json.loads((compared / "comparison.json").read_text())["variants"]}
    (first, second), page = whole["hoyer"]["runs"], (compared / "README.md").read_text()
    mean, deviation = (
        statistics.mean([first["top1"], second["top1"]]),
        statistics.stdev([first["top1"], second["top1"]]),
    )
    assert (whole["hoyer"]["top1"], whole["hoyer"]["top1_std"]) == (mean, deviation)
    accuracy, costs = cells_of(page, "hoyer")
    energy = (first["energy_uj"] + second["energy_uj"]) / 2
    assert accuracy[1:5] == ["none", "2", f"{mean:.4f} ± {deviation:.4f}", ""] and accuracy[6] == f"{energy:.3f}"
    assert costs[1:3] == ["1", f"{(first['synaptic_operations'] + second['synaptic_operations']) / 2e6:.2f}"]
    accuracy, costs = cells_of(page, "binary")
    assert accuracy[1:3] == ["`--model.backbone.arithmetic binary`", "1"]
    assert accuracy[4] == f"{whole['binary']['top1'] - mean:+.4f}" and accuracy[5] == "none"
    assert accuracy[8:] == ["no 8-bit prices of a network with binary arithmetic", ""]
    assert costs[4] == f"{whole['binary']['parameters'] / 1e6:.3f}"
    assert cells_of(page, "steps2")[1][1] == "2"
    rows = {row["variant"]: row for row in csv.DictReader((compared / "comparison.csv").open())}
    assert list(rows) == list(whole)
    for name, row in rows.items():
        for key, text in row.items():
            value = whole[name][key]
            assert text == ("" if value is None else str(value))


def test_a_second_call_trains_and_measures_nothing(compared, monkeypatch):
    before = {path: path.read_bytes() for path in compared.rglob("*") if path.is_file()}

    def never(*arguments, **options):
        raise AssertionError(arguments)

    monkeypatch.setattr(compare, "run_child", never)
    monkeypatch.setattr(comparison, "analyze_run", never)
    compare.main(arguments_of(compared, "hoyer", "steps2", "binary"))
    assert {path: path.read_bytes() for path in compared.rglob("*") if path.is_file()} == before


def test_an_analysis_of_other_weights_or_prices_is_made_again(compared):
    run = Run.open(compared / "hoyer_seed0")
    path = run.folder / "analysis_4_spread" / "analysis.json"
    before = path.read_bytes()
    for change in ('{"sha256": "0"}', json.dumps(json.loads(before) | {"costs": {}}), "[]", "{"):
        path.write_text(change)
        comparison.analyse(run, 4, run.config.data.root)
        assert path.read_bytes() == before


def test_what_cannot_be_priced_says_why(compared, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    for name in ("hoyer_seed0", "binary_seed0"):
        folder = tmp_path / "runs" / name
        folder.mkdir()
        for file in ("config.yaml", "run.json", "metrics.jsonl"):
            folder.joinpath(file).write_bytes((compared / name / file).read_bytes())
    compare.main(arguments_of(tmp_path / "runs", "hoyer", "binary"))
    accuracy, costs = cells_of((tmp_path / "runs" / "README.md").read_text(), "binary")
    assert accuracy[6].startswith("not priced: ") and "last.safetensors" in accuracy[6] and accuracy[7:] == [""] * 3
    assert costs[1:5] == [""] * 4 and float(costs[5]) >= 0
    assert not (tmp_path / "runs" / "energy.png").exists() and (tmp_path / "runs" / "ablation.png").exists()
    (row, _) = json.loads((tmp_path / "runs" / "comparison.json").read_text())["variants"]
    assert row["energy_uj"] is None and "last.safetensors" in row["unpriced"]


def test_images_lie_in_equal_distances(compared, monkeypatch):
    run = Run.open(compared / "hoyer_seed0")
    dataset, chosen = read_evaluation_data(run), []
    choose = type(dataset).choose
    monkeypatch.setattr(type(dataset), "choose", lambda self, indices: chosen.append(indices) or choose(self, indices))
    for number in (4, 100):
        analyze_run(run.folder, num_images=number)
    assert chosen == [[0, 1, 3, 4], [0, 1, 2, 3, 4, 5]]  # of 6


def test_cells_of_a_table_keep_their_bars():
    assert comparison.markdown(["a", "b"], [["x|y", "1"]]) == "| a | b |\n|---|---|\n| x\\|y | 1 |"


def test_wrong_arguments_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"--variants steps3: unknown \(allowed: hoyer, .*steps2, steps4, binary, adder"
    ):
        compare.main(arguments_of(tmp_path / "x", "hoyer", "steps3"))
    with pytest.raises(ValueError, match=r"--images 0: at least one image is needed"):
        compare.main(arguments_of(tmp_path / "x", "hoyer", images=0))
    with pytest.raises(ValueError, match=r"--seeds -1: expected 0 or more"):
        compare.main([*arguments_of(tmp_path / "x", "hoyer"), "--seeds", "0", "-1"])
    for seeded in (["--train.seed=7"], ["--variants", "x=--train.seed 7"], ["--variants", "x=train.seed=7"]):
        with pytest.raises(ValueError, match=r"--variants \w+: --train\.seed: the seeds of all variants are those of"):
            compare.main([*arguments_of(tmp_path / "x", "hoyer"), *seeded])
    trained = ["--model.backbone.weights", "zoo:bccd_retinanet_resnet18"]
    with pytest.raises(ValueError, match=r"--variants \w+: model\.backbone\.weights .*: trained with .* new weights"):
        compare.main([*arguments_of(tmp_path / "x", "hoyer", "relu"), *trained])
    assert not (tmp_path / "x").exists()


def test_runs_of_another_recipe_are_not_mixed_in(compared, monkeypatch):
    """Also not those of seeds that are not asked for, since they stand in the tables too."""
    monkeypatch.setattr(compare, "run_child", lambda arguments: pytest.fail("trained"))
    with pytest.raises(ValueError, match=r"hoyer_seed0.*train\.batch_size"):
        compare.main([*arguments_of(compared, "hoyer"), "--train.batch_size", "2", "--seeds", "7"])


@pytest.mark.parametrize(
    ("split", "name"), [("val", "steps2_seed0"), ("train", "hoyer_seed1"), ("train", "steps2_seed0")]
)
def test_runs_of_other_data_are_not_mixed_in(compared, tmp_path, split, name):
    """Training data may be others in another variant."""
    out = shutil.copytree(compared, tmp_path / "runs")
    info = json.loads((out / name / "run.json").read_text())
    info["data"][split] = {"images": 3, "fingerprint": "other"}
    (out / name / "run.json").write_text(json.dumps(info))
    if (split, name) == ("train", "steps2_seed0"):
        compare.main(arguments_of(out, "hoyer", "steps2"))
        return
    (out / "README.md").unlink()
    with pytest.raises(
        ValueError, match=rf"{name}: its {split} data are not those of .*hoyer_seed0: 3 images, there \d"
    ):
        compare.main(arguments_of(out, "hoyer", "steps2"))
    assert not (out / "README.md").exists()


def test_a_run_that_was_killed_at_its_beginning_stops_nothing(compared, tmp_path):
    out = shutil.copytree(compared, tmp_path / "runs")
    (out / "steps2_seed0" / "run.json").unlink()
    (out / "hoyer_seed5").mkdir()
    (out / "hoyer_seed5" / ".lock").touch()
    (recipe,) = {run.config.model_dump_json(): run.config for run in comparison.runs_of(out, "steps2")}.values()
    assert len(comparison.runs_of(out, "hoyer")) == 2
    comparison.require_same_data(out, {"steps2": recipe})


@pytest.mark.parametrize("added", [{"backbone": 0.5, "head": 0.1}, {"head": 0.1}, {}])
def test_entries_that_a_recipe_has_more_or_less_are_seen(compared, added):
    config = Run.open(compared / "hoyer_seed0").config
    config.optimizer.lr_factors = {"backbone": 0.5}
    known, wanted = flatten(config), config.model_copy(deep=True)
    wanted.optimizer.lr_factors = added
    with pytest.raises(ValueError, match=r"here: trained with optimizer\.lr_factors"):
        require_same(known, wanted, "here")
    require_same({key: value for key, value in known.items() if "seed" not in key}, config, "here")  # an older run


def test_each_variant_is_measured_where_its_own_data_lie(compared, monkeypatch, tmp_path):
    for name in ("hoyer", "two"):
        shutil.copytree(compared / "hoyer_seed0", tmp_path / "runs" / f"{name}_seed0")
    roots = []

    def analyse(run, num_images, data_root):
        roots.append(data_root)
        raise FileNotFoundError(data_root)

    monkeypatch.setattr(comparison, "analyse", analyse)
    compare.main(arguments_of(tmp_path / "runs", "hoyer", "two=--data.root elsewhere"))
    assert roots == [Path("data/cifar10"), Path("elsewhere")]


@pytest.mark.parametrize("name", compare.VARIANTS)
def test_known_variants_are_recipes_that_build(name):
    from detection.config import find_recipe, override, read_recipe

    recipe = override(read_recipe(find_recipe("cifar10_vgg16_fast")), [*SMALL, *compare.VARIANTS[name]])
    recipe.data.classes = ["one", "two"]
    model = task_of(recipe).build_model()
    spikes = [layer for layer in model.modules() if isinstance(layer, SpikeLayer)]
    assert bool(spikes) == (name not in ("relu", "binary", "adder"))
    assert recipe.optimizer.name == ("sgd" if name == "adder" else "muon")
    assert {layer.levels for layer in spikes} <= {4 if name == "graded4" else 2}
    assert time_steps(model) == {"steps2": 2, "steps4": 4}.get(name, 1)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_detectors_go_the_same_road(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    values = DETECTOR | {"data": DETECTOR["data"] | {"root": str(tmp_path / "scenes")}}
    recipe.write_text(yaml.safe_dump(values))
    compare.main([str(recipe), "--out", str(tmp_path / "runs"), "--variants", "hoyer", "relu", "--images", "2"])
    whole = json.loads((tmp_path / "runs" / "comparison.json").read_text())
    assert (whole["metric"], whole["images"]) == ("AP50", 2)
    for row, network in zip(whole["variants"], ("spiking", "twin"), strict=True):
        found = analyze_run(tmp_path / "runs" / f"{row['variant']}_seed0", num_images=2)
        assert row["energy_uj"] == found.report.networks[network].total_pj / 1e6 > 0
        assert row["energy_int8_uj"] == found.report.networks[f"{network}_int8"].total_pj / 1e6
    assert (tmp_path / "runs" / "energy.png").is_file()


def test_a_table_keeps_names_that_are_no_utf8(tmp_path):
    write_csv(tmp_path / "table.csv", ["variant", "overrides"], [["a", "--data.root \udcff"], ["b", None]])
    assert (tmp_path / "table.csv").read_text() == "variant,overrides\na,--data.root \\udcff\nb,\n"
