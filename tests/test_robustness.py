"""Noise on potentials, thresholds and images: what is drawn, what stays, what it does to a trained network."""

import copy
import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.utils import set_seed
from helpers import run_tool
from PIL import Image
from torch import nn

import backbones
from backbones import HoyerSpike
from detection.config import parse_recipe
from detection.curves import draw_robustness
from detection.data.synthetic import CATEGORIES
from detection.figures import save_png
from detection.records import Evaluation, RunInfo
from detection.robustness import ALL_LAYERS, IMAGE_KINDS, RANDOM_KINDS, SEVERITIES, SPIKE_KINDS
from detection.robustness.corruptions import corrupt, corrupt_batches
from detection.robustness.noise import potential_noise, record_margins, sum_margins
from detection.robustness.studies import Subject, curves_of, open_runs, prepare, study
from detection.runs import Run
from detection.tasks import task_of
from detection.tasks.run import make_accelerator

COLOURS = {"blue": (90, 90, 140), "green": (90, 140, 90), "grey": (110, 110, 110), "red": (140, 90, 90)}
CLASSIFIER = {
    "task": "classification",
    "model": {"backbone": {"name": "vgg11", "width": 0.125, "stem": "cifar", "activation": "relu"}},
    "data": {"format": "folder", "size": 32, "augment": {"padding": 0, "hflip": 0.0}},
    "train": {"batch_size": 16},
}
DETECTOR = {
    "task": "detection",
    "model": {
        "backbone": {"name": "resnet18", "width": 0.125},
        "neck": {"levels": ["c3", "c4"], "extra_levels": 0, "out_channels": 16},
        "head": {"num_convs": 1, "norm": "group"},
        "min_size": [64],
        "max_size": 96,
    },
    "data": {"format": "synthetic", "scenes": {"num_train": 8, "num_val": 4, "size": 64}, "workers": 0},
    "train": {"batch_size": 3},
}


def layer_of(theta: float = 0.5, channels: int = 3, **options) -> HoyerSpike:
    """A spike layer in evaluation mode with v_th = -1 (used as 1) and the extremum theta."""
    layer = HoyerSpike(channels, **options).eval()
    layer.v_th.data.fill_(-1.0)
    layer.extremum.fill_(theta)
    return layer


def phi(x: float) -> float:
    """The standard normal distribution function."""
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def write_images(root: Path) -> None:
    """A folder data set: noise around a colour that is the class; 40 images to train on, 40 to evaluate."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(10):
                pixels = rng.normal(colour, 40, (32, 32, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")


def make_run(folder: Path, values: dict, activation: str) -> tuple[Run, nn.Module]:
    """A run folder without a training, its weights drawn at random but for the network's running averages."""
    values = copy.deepcopy(values)
    values["model"]["backbone"]["activation"] = activation
    root, classes = ("colours", COLOURS) if values["data"]["format"] == "folder" else ("scenes", CATEGORIES)
    values["data"] |= {"root": str(folder.parent / root), "classes": list(classes)}
    config = parse_recipe(values, "test")
    set_seed(0)
    model = task_of(config).build_model()
    run = Run.create(folder, config, RunInfo(command="test"))
    run.save(model, "last")
    return run, model


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Run folders: a small spiking classifier that has learnt something, a twin and a detector that have not."""
    folder = tmp_path_factory.mktemp("robustness")
    write_images(folder / "colours")
    make_run(folder / "relu", CLASSIFIER, "relu")
    make_run(folder / "detector", DETECTOR, "hoyer")
    run, model = make_run(folder / "hoyer", CLASSIFIER, "hoyer")
    task = task_of(run.config)
    batches = task.training_batches(task.read("train"), make_accelerator(run.config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.002)
    for _ in range(12):
        for images, labels in batches:
            loss = nn.functional.cross_entropy(model(images), labels)
            (loss + 0.01 * backbones.hoyer_penalty(model, "mean")).backward()
            optimizer.step()
            optimizer.zero_grad()
    run.save(model, "last")
    return {name: folder / name for name in ("hoyer", "relu", "detector")}


def small_network() -> nn.Module:
    """A spiking network with thresholds of all sorts, in evaluation mode."""
    set_seed(0)
    model = backbones.Classifier(backbones.create("vgg11", width=0.125, stem="cifar", extremum="channel"), 4).eval()
    for module in model.modules():
        if isinstance(module, HoyerSpike):
            module.extremum.uniform_(0.3, 1)
    return model


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


# Noise on potentials and thresholds


@pytest.mark.parametrize("kind", SPIKE_KINDS)
def test_noise_of_zero_is_no_noise_and_nothing_stays(kind):
    model, images = small_network(), torch.randn(4, 3, 32, 32)
    state = copy.deepcopy(model.state_dict())
    clean = model(images)
    with potential_noise(model, kind, 0.0, seed=3):
        assert torch.equal(model(images), clean)
    with potential_noise(model, kind, 0.5, seed=3):
        assert hooks_of(model) > 0
        assert not torch.equal(model(images), clean)
    with pytest.raises(KeyError), potential_noise(model, kind, 0.5, seed=3):
        raise KeyError
    with record_margins(model, (0.5,), (0,)):
        assert torch.equal(model(images), clean)
    assert hooks_of(model) == 0
    assert torch.equal(model(images), clean)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def spikes_of(layer: nn.Module, u: torch.Tensor, kind: str, sd: float, seed: int, batch: int) -> torch.Tensor:
    with torch.no_grad(), potential_noise(layer, kind, sd, seed):
        return torch.cat([layer(part) for part in u.split(batch)])


@pytest.mark.parametrize("kind", SPIKE_KINDS)
def test_same_seed_same_noise_for_any_batch(kind):
    layer, u = layer_of(), torch.full((6, 3, 8, 8), 0.5)
    spikes = spikes_of(layer, u, kind, 0.3, 1, batch=6)
    for batch in (1, 4):
        assert torch.equal(spikes_of(layer, u, kind, 0.3, 1, batch), spikes)
    strided = u.to(memory_format=torch.channels_last)
    assert torch.equal(spikes_of(layer, strided, kind, 0.3, 1, batch=4), spikes)
    assert not torch.equal(spikes_of(layer, u, kind, 0.3, 2, batch=6), spikes)
    # At the threshold the sign of a draw decides, however large it is.
    assert torch.equal(spikes_of(layer, u, kind, 3.0, 1, batch=6), spikes)


def test_membrane_noise_is_new_for_each_image_and_layer():
    spikes = spikes_of(nn.Sequential(layer_of()), torch.full((2, 3, 16, 16), 0.5), "membrane", 0.3, 0, batch=2)
    assert 0.4 < (spikes[0] == spikes[1]).float().mean() < 0.6
    second = layer_of()
    # The second layer sees what only it decides.
    model = nn.Sequential(layer_of(), nn.Threshold(2.0, 0.5), second)
    other = spikes_of(model, torch.full((2, 3, 16, 16), 0.5), "membrane", 0.3, 0, batch=2)
    assert 0.4 < (spikes == other).float().mean() < 0.6


def test_mismatch_belongs_to_the_neuron():
    layer, u = layer_of(), torch.full((3, 3, 9, 7), 0.5)
    spikes = spikes_of(layer, u, "threshold", 0.3, 0, batch=2)
    assert torch.equal(spikes[0], spikes[1]) and torch.equal(spikes[0], spikes[2])
    assert 0.4 < spikes[0].mean() < 0.6
    # A neuron is the same one in a smaller map.
    assert torch.equal(spikes_of(layer, u[:, :, :4, :5], "threshold", 0.3, 0, batch=3), spikes[:, :, :4, :5])
    flat = spikes_of(layer_of(channels=400), torch.full((2, 400), 0.5), "threshold", 0.3, 0, batch=2)
    assert torch.equal(flat[0], flat[1]) and 0.4 < flat.mean() < 0.6


@pytest.mark.parametrize("kind", SPIKE_KINDS)
@pytest.mark.parametrize(("theta", "ratio", "sd"), [(0.5, 0.8, 0.2), (0.25, 1.5, 0.4), (1.0, -0.5, 1.0)])
def test_share_of_noisy_spikes_is_the_normal_distribution(kind, theta, ratio, sd):
    """u = ratio * theta fires with the probability phi((ratio - 1) / sd), whatever theta is."""
    u = torch.full((1, 3, 100, 100), ratio * theta)
    spikes = spikes_of(layer_of(theta), u, kind, sd, 0, batch=1)
    expected = phi((ratio - 1) / sd)
    error = math.sqrt(expected * (1 - expected) / u.numel())
    assert float(spikes.mean()) == pytest.approx(expected, abs=4 * error)


def test_noise_follows_the_threshold_of_each_channel_and_keeps_the_type():
    layer = layer_of(channels=2, per_channel=True)
    layer.extremum.copy_(torch.tensor([0.1, 1.0]))
    u = layer.extremum.view(1, 2, 1, 1) * torch.full((1, 2, 100, 100), 0.5)
    rates = spikes_of(layer, u, "membrane", 0.5, 0, batch=1).mean((0, 2, 3))
    assert rates.tolist() == pytest.approx([phi(-1)] * 2, abs=0.015)
    half = spikes_of(layer, u.bfloat16(), "membrane", 0.5, 0, batch=1)
    assert half.dtype == torch.bfloat16
    assert half.float().mean((0, 2, 3)).tolist() == pytest.approx([phi(-1)] * 2, abs=0.015)


def test_wrong_use_is_refused():
    layer = layer_of()
    with pytest.raises(ValueError, match=r"'blur'.*membrane, threshold"), potential_noise(layer, "blur", 0.1, 0):
        pass
    for sd, seed in ((-0.1, 0), (math.inf, 0), (0.1, -1)):
        with pytest.raises(ValueError, match="negative"), potential_noise(layer, "membrane", sd, seed):
            pass
    model = nn.Sequential(nn.Flatten(0, 1), layer_of())
    with pytest.raises(RuntimeError, match=r"'1' got 6 maps in a pass over 2 images"):
        spikes_of(model, torch.zeros(2, 3, 3, 4), "membrane", 0.1, 0, batch=2)
    with pytest.raises(RuntimeError, match="training mode"):
        spikes_of(layer.train(), torch.zeros(2, 3), "membrane", 0.1, 0, batch=2)


# Margins


def test_flips_of_a_hand_made_layer_are_those_of_the_calculation():
    """A third of the neurons rests at -0.2 theta, a third near the threshold at 0.95, a third fires at 1.3."""
    layer, sds, seeds = layer_of(0.4), (0.1, 0.5), (0, 1)
    ratios = (-0.2, 0.95, 1.3)
    u = 0.4 * torch.tensor(ratios).view(1, 3, 1, 1).expand(4, 3, 50, 50)
    with record_margins(layer, sds, seeds) as margins:
        for part in u.split(3):
            layer(part)
    (margin,) = margins.values()
    assert (margin.num_neurons, margin.num_spikes, margin.num_near) == (30_000, 10_000, 10_000)
    assert (margin.firing_rate, margin.near_rate) == (1 / 3, 1 / 3)
    assert margin.potential_sd == pytest.approx(torch.tensor(ratios).std(correction=0).item(), rel=1e-5)
    for sd in sds:
        flips = [1 - phi(abs(ratio - 1) / sd) for ratio in ratios]
        for seed in seeds:
            assert margin.flip_rate(sd, seed) == pytest.approx(sum(flips) / 3, abs=0.012)
            assert margin.lost_rate(sd, seed) == pytest.approx(flips[2], abs=0.02)
    assert margin.flips[0.1, 0] != margin.flips[0.1, 1]
    twice = sum_margins([margin, margin, type(margin)()])  # the last of a layer that had no turn
    unused = type(margin)()
    assert (unused.firing_rate, unused.near_rate, unused.potential_sd, unused.flip_rate(0.5, 1)) == (0, 0, 0, 0)
    assert twice.num_neurons == 60_000
    assert twice.flip_rate(0.5, 1) == pytest.approx(margin.flip_rate(0.5, 1))
    assert twice.potential_sd == pytest.approx(margin.potential_sd)


def test_flips_are_counted_on_clean_input():
    """The second layer's potentials are far from its threshold: noise in front of the first does not reach it."""
    model = nn.Sequential(layer_of(), nn.Threshold(2.0, -100.0), layer_of())
    with record_margins(model, (0.5,), (0,)) as margins:
        model(torch.full((2, 3, 8, 8), 0.5))
    assert margins["0"].flip_rate(0.5, 0) > 0.3
    assert margins["2"].flip_rate(0.5, 0) == 0
    assert margins["2"].lost_rate(0.5, 0) == 0  # no spike to lose


# Corruption of images


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_corruptions_keep_shape_and_range(kind):
    images = torch.rand(3, 3, 20, 24, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    assert corrupt(images, kind, 0.0) is images
    errors = []
    for severity in SEVERITIES[kind]:
        changed = corrupt(images, kind, severity, seed=1)
        assert changed.shape == images.shape and changed.dtype == images.dtype
        assert changed.min() >= 0 and changed.max() <= 1
        errors.append(float((changed - images).square().mean()))
        # Each image for itself
        alone = torch.cat([corrupt(images[i : i + 1], kind, severity, seed=1, first=i) for i in range(3)])
        torch.testing.assert_close(alone, changed)
        other = corrupt(images, kind, severity, seed=2)
        assert torch.equal(changed, other) == (kind not in RANDOM_KINDS)
    assert errors == sorted(errors) and errors[0] > 0
    assert torch.equal(images, before)
    with pytest.raises(ValueError, match=kind):
        corrupt(images, kind, -1.0)


def test_corruptions_are_what_they_say():
    grey = torch.full((2, 3, 64, 64), 0.5)
    noise = corrupt(grey, "gaussian_noise", 0.1) - grey
    assert float(noise.std()) == pytest.approx(0.1, rel=0.03)
    assert float(noise.mean()) == pytest.approx(0, abs=0.004)
    point = torch.zeros(1, 3, 31, 31)
    point[:, :, 15, 15] = 1
    blurred = corrupt(point, "blur", 1.5)
    variance = float((blurred[0, 0].sum(0) * (torch.arange(31) - 15) ** 2).sum())
    assert variance == pytest.approx(1.5**2, rel=0.06)  # the kernel ends at three standard deviations
    ramp = torch.linspace(0, 1, 16).expand(1, 3, 16, 16)
    torch.testing.assert_close(corrupt(ramp, "brightness", 0.4), 0.6 * ramp)
    torch.testing.assert_close(corrupt(ramp, "contrast", 0.4), 0.6 * ramp + 0.4 * 0.5, atol=1e-3, rtol=0)
    tiny = torch.rand(1, 3, 2, 1)
    assert corrupt(tiny, "blur", 2.5).shape == tiny.shape
    with pytest.raises(ValueError, match=r"'fog'.*gaussian_noise, blur"):
        corrupt(grey, "fog", 0.1)
    with pytest.raises(ValueError, match="100 of jpeg: allowed is 0 to 99"):
        corrupt(grey, "jpeg", 100)


def test_batches_are_corrupted_image_by_image():
    pixels = torch.rand(5, 3, 16, 16)
    found = list(corrupt_batches([(pixels[:3], "a"), (pixels[3:], "b")], "gaussian_noise", 0.1, 4))
    assert [target for _, target in found] == ["a", "b"]
    expected = corrupt(pixels, "gaussian_noise", 0.1, seed=4)
    assert torch.equal(torch.cat([images for images, _ in found]), expected)
    lists = [([pixels[0], pixels[1, :, :9]], "a"), ([pixels[2]], "b")]
    first, second = (images for images, _ in corrupt_batches(lists, "gaussian_noise", 0.1, 4))
    torch.testing.assert_close(first[0], expected[0])
    assert first[1].shape == (3, 9, 16)
    torch.testing.assert_close(second[0], expected[2])


# Whole studies


def evaluation_of(subject: Subject) -> Evaluation:
    """The network without noise on all evaluation images."""
    dataset = subject.task.read("val")
    batches = subject.task.evaluation_batches(dataset, subject.accelerator)
    return subject.task.evaluate(subject.model, batches, dataset, subject.accelerator)


def test_noise_destroys_what_a_classifier_has_learnt(runs):
    (run,) = open_runs([runs["hoyer"]])
    subject = prepare(run, "hoyer")
    state = copy.deepcopy(subject.model.state_dict())
    clean = subject.measure("clean", 0.0, 0)
    expected = evaluation_of(subject)
    assert clean == {key: expected.metrics[key] for key in ("top1", "top5")} | {"activity": expected.activity}
    assert clean["top1"] >= 0.9  # four classes
    for kind in (*SPIKE_KINDS, *IMAGE_KINDS):
        assert subject.measure(kind, 0.0, 7) == clean
    assert subject.measure("membrane", 100.0, 0)["top1"] < 0.45
    assert subject.measure("membrane", 100.0, 0)["activity"] == pytest.approx(0.5, abs=0.02)
    first = subject.measure("membrane", 1.0, 0)
    assert subject.measure("membrane", 1.0, 0) == first != subject.measure("membrane", 1.0, 1)
    assert subject.measure("brightness", 1.0, 0)["top1"] < 0.45
    assert hooks_of(subject.model) == 0
    assert all(torch.equal(value, state[key]) for key, value in subject.model.state_dict().items())


@pytest.mark.parametrize("in_memory", [True, False])
def test_chosen_images_are_spread_over_the_classes(runs, in_memory):
    run = Run.open(runs["hoyer"])
    run.config.data.in_memory, run.config.data.workers = in_memory, 0
    subject = prepare(run, "hoyer", num_images=8)
    assert torch.cat([labels for _, labels in subject.batches]).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    right = 8 * subject.measure("gaussian_noise", 0.02, 0)["top1"]
    assert right == round(right)


def test_study_of_a_network_and_its_twin(runs, monkeypatch, capsys, tmp_path):
    out = tmp_path / "out"
    kinds = ("membrane", "gaussian_noise", "jpeg")
    run_tool(
        monkeypatch,
        "robustness",
        *(runs["hoyer"], runs["relu"], "--out", out, "--seeds", 0, 1, "--images", 12, "--kinds", *kinds),
    )
    printed = capsys.readouterr()
    assert "relu: no spike layers; left out: membrane" in printed.err
    assert "left out" in printed.out and ALL_LAYERS in printed.out
    found = json.loads((out / "robustness.json").read_text())
    assert "tools/robustness.py" in found["command"] and "--images 12" in found["command"]
    assert found["versions"]["torch"] and found["num_images"] == 12
    assert found["left_out"] == [{"run": "relu", "kinds": ["membrane"], "reason": found["left_out"][0]["reason"]}]
    assert found["runs"]["hoyer"]["sha256"] == Run.open(runs["hoyer"]).checksums()["last.safetensors"]
    counts = {(name, kind): 0 for name in ("hoyer", "relu") for kind in ("clean", *kinds)}
    for row in found["results"]:
        counts[row["run"], row["kind"]] += 1
        assert row["top1"] * 12 == pytest.approx(round(row["top1"] * 12))
        assert (row["seed"] is None) == (row["kind"] in ("clean", "jpeg"))
    assert list(counts.values()) == [1, 10, 10, 5, 1, 0, 10, 5]
    curves = curves_of(found, "gaussian_noise", "top1")
    assert list(curves) == ["hoyer", "relu"]
    assert [len(values) for values in curves["hoyer"].values()] == [1, 2, 2, 2, 2, 2]
    layers = [row for row in found["margins"] if row["layer"] != ALL_LAYERS]
    (total,) = [row for row in found["margins"] if row["layer"] == ALL_LAYERS]
    assert total["num_neurons"] == sum(row["num_neurons"] for row in layers)
    (clean,) = [row for row in found["results"] if row["kind"] == "clean" and row["run"] == "hoyer"]
    assert total["firing_rate"] == pytest.approx(clean["activity"])
    flips = [row["flip_rate"] for row in found["flips"] if row["layer"] == ALL_LAYERS and row["seed"] == 1]
    assert flips == sorted(flips) and 0 < flips[0] < flips[-1] < 0.5
    with (out / "robustness.csv").open() as file:
        lines = list(csv.DictReader(file))
    values = [float(line["value"]) for line in lines if line["kind"] == "jpeg" and line["metric"] == "top1"]
    assert values == [row["top1"] for row in found["results"] if row["kind"] == "jpeg"]
    with Image.open(out / "robustness.png") as picture:
        assert picture.size[0] == 1800  # three panels side by side


def test_study_of_a_detector_counts_the_boxes_of_the_chosen_images(runs, tmp_path):
    (run,) = open_runs([runs["detector"]])
    subject = prepare(run, "detector", num_images=2)
    images = [target["image_id"] for _, targets in subject.batches for target in targets]
    assert images == [1, 3] and subject.num_images == 2
    found = study([runs["detector"]], tmp_path / "out", ["test"], kinds=["contrast", "threshold"], seeds=[5])
    rows = {kind: [row for row in found["results"] if row["kind"] == kind] for kind in ("clean", "threshold")}
    expected = evaluation_of(subject)
    assert all(rows["clean"][0][key] == expected.metrics[key] for key in ("AP", "AP50"))
    assert rows["clean"][0]["activity"] == expected.activity
    assert [row["seed"] for row in rows["threshold"]] == [5] * 5
    assert len(found["margins"]) > 10


def error_of(monkeypatch, capsys, *arguments) -> str:
    """The one sentence with which the tool refuses."""
    with pytest.raises(SystemExit) as stop:
        run_tool(monkeypatch, "robustness", *arguments)
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_bad_input_is_one_sentence_and_nothing_is_written(runs, monkeypatch, capsys, tmp_path):
    hoyer, out = runs["hoyer"], ("--out", tmp_path / "out")
    cases = [
        ((hoyer, "--kinds", "fog"), "--kinds fog: unknown (allowed: membrane, threshold"),
        ((hoyer, "--kinds", "blur", "blur"), "--kinds blur blur: expected each one once"),
        ((hoyer, "--seeds", "0", "-1"), "--seeds -1"),
        ((hoyer, "--images", "0"), "--images 0: expected 1 or more"),
        ((hoyer, "--images", "41"), "--images 41: there are only 40"),
        ((hoyer, runs["detector"]), "task is 'detection'"),
        ((hoyer, hoyer), "given twice"),
        ((hoyer, tmp_path / "none"), "is not a run folder"),
        ((runs["relu"], "--kinds", "membrane"), "no spike layers"),
        ((hoyer, "--weights", "ema"), "no such weights"),
        ((runs["detector"], "--data.root", hoyer), "holds something else than drawn scenes"),
    ]
    for arguments, message in cases:
        assert message in error_of(monkeypatch, capsys, *arguments, *out)
    for none in ("kinds", "seeds"):
        with pytest.raises(ValueError, match=f"--{none}: expected at least one"):
            study([hoyer], tmp_path / "out", ["test"], **{none: []})
    other = tmp_path / "other"
    other.mkdir()
    config = yaml.safe_load((hoyer / "config.yaml").read_text())
    config["data"]["val"] = "train"
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    assert "other: data.val is 'train', that of" in error_of(monkeypatch, capsys, hoyer, other, *out)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert "exists already" in error_of(monkeypatch, capsys, hoyer, *out)


def test_all_runs_are_read_before_the_first_is_evaluated(runs, monkeypatch, capsys, tmp_path):
    other = shutil.copytree(runs["hoyer"], tmp_path / "other")
    (other / "last.safetensors").write_bytes(b"")
    monkeypatch.setattr(Subject, "measure", lambda *arguments: pytest.fail("evaluated"))
    arguments = (runs["hoyer"], other, "--kinds", "blur", "--out", tmp_path / "out")
    assert "other/last.safetensors: damaged weights file" in error_of(monkeypatch, capsys, *arguments)


def test_a_run_is_called_by_its_folder_wherever_one_stands(runs, monkeypatch, tmp_path):
    monkeypatch.chdir(shutil.copytree(runs["hoyer"], tmp_path / "mine"))
    run_tool(monkeypatch, "robustness", ".", "--data.root", runs["hoyer"].parent / "colours", "--kinds", "jpeg")
    assert list(json.loads((tmp_path / "mine_robustness" / "robustness.json").read_text())["runs"]) == ["mine"]


def test_training_images_matter_where_the_evaluation_images_are_a_part_of_them(runs, tmp_path):
    folders = []
    for name, train, share in (("a", "x", 0.5), ("b", "y", 0.5), ("c", "y", 0.0)):
        folders.append(shutil.copytree(runs["detector"], tmp_path / name))
        config = yaml.safe_load((folders[-1] / "config.yaml").read_text())
        config["data"] |= {"format": "coco", "train": [train], "val": [] if share else ["v"], "val_fraction": share}
        (folders[-1] / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=r"b: data\.train is \['y'\], that of .*a is \['x'\]"):
        open_runs(folders[:2])
    with pytest.raises(ValueError, match=r"c: data\.val is "):
        open_runs([folders[0], folders[2]])


def test_chart_needs_a_run_and_has_a_panel_for_each_kind(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_robustness({"blur": {}}, {"blur": "pixels"}, "top1")
    curve = {0.0: [0.9], 0.5: [0.8, 0.7], 1.0: [0.5, 0.1]}
    kinds = ("a", "b", "c", "d")
    curves = {kind: {"one": curve, "two": {0.0: [0.0], 1.0: [0.0]}} for kind in kinds}
    panels = draw_robustness(curves, dict.fromkeys(kinds, "pixels"), "top1")
    assert len(panels) == 4
    save_png(panels, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.size[0] == 1200  # two panels side by side
