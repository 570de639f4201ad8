"""Several time steps one by one: operations, energy, spike maps, metrics of a network stopped early, graded spikes."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from report_pages import Page
from test_energy import make_config, make_detector, make_images
from test_multistep import RECIPE, TwoLayers

import backbones
from backbones import (
    HoyerSpike,
    MultiStepSpike,
    average_so_far,
    energy,
    energy_after_steps,
    hook_layers,
    hoyer_penalty,
    measure_activity,
    spike_layers,
    stop_after,
)
from backbones.activations import MultiStepGraded
from detection.analysis import analyze_run
from detection.curves import draw_anytime
from detection.draw import draw_spike_maps
from detection.predict import Predictor
from detection.records import Evaluation
from detection.report import write_report
from detection.robustness.studies import study
from detection.runs import Run
from detection.spikemaps import SpikeMap, rows_of
from detection.tasks import task_of
from detection.tasks.classification import ClassificationTask
from detection.tasks.detection_page import maps_of
from detection.tasks.evaluate import with_early_metrics
from detection.tasks.recipes import ClassificationRecipe
from detection.tasks.run import load_model, train_run
from detection.training.distillation import detection_distance, learn_from, softened_distance

SMALL = RECIPE | {"train": {"epochs": 1, "batch_size": 8}}
IMAGES = torch.tensor([1.0, 0.5, 0.25, 0.0]).view(1, 1, 2, 2)


def recipe(steps: int, **sections) -> ClassificationRecipe:
    values = {**SMALL, **sections, "model": {"backbone": SMALL["model"]["backbone"] | {"time_steps": steps}}}
    values["model"]["backbone"] |= sections.get("backbone", {})
    values.pop("backbone", None)
    return ClassificationRecipe.model_validate(values)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[int, Path]:
    """Trained classifiers by their number of steps; that of two has begun with the weights of the one of one step."""
    folder = tmp_path_factory.mktemp("steps")
    train_run(recipe(1), folder / "one", ["test"])
    train_run(recipe(2, backbone={"weights": str(folder / "one")}), folder / "two", ["test"])
    return {1: folder / "one", 2: folder / "two"}


def test_a_network_of_two_steps_begins_with_the_weights_of_one_step(runs):
    state, start = Run.open(runs[1]).read("last"), task_of(Run.open(runs[2]).config).build_model().backbone.state_dict()
    new = {name for name in start if f"backbone.{name}" not in state}
    assert new and all(name.endswith(".leak") and start[name] == 1 for name in new)
    assert all(torch.equal(value, state[f"backbone.{name}"]) for name, value in start.items() if name not in new)
    leaks = Run.open(runs[2]).history()[-1].layers["leak"]
    assert any(value != 1 for value in leaks.values())  # and learns on


# Operations and energy


def test_what_each_of_two_steps_costs_by_hand():
    # v_th, E and leak are 1. Step 1 fires for the first pixel; in step 2 it is at 0 + 1, the second at 1: both fire.
    measured = measure_activity(TwoLayers(2).eval(), [IMAGES, IMAGES])
    linear, spikes = measured.layers["4"], measured.spikes["2"]
    assert (spikes.spikes_in_steps, linear.active_in_steps, linear.synops_in_steps) == ([2, 4], [2, 4], [4, 8])
    assert (measured.layers["0"].synops_in_steps, measured.time_steps) == ([6], 2)
    first, both = energy_after_steps(measured)
    # After the first step it is the network of one step, which knows nothing of a second.
    assert first.networks == energy(measure_activity(TwoLayers(1).eval(), [IMAGES])).networks
    assert both == energy(measured)
    one, two = first.networks["spiking"], both.networks["spiking"]
    alone = {key: value - asdict(one)[key] for key, value in asdict(two).items()}
    # 4 neurons multiply what they carry by the leak, 2 spikes reach 2 outputs each.
    assert (alone["macs"], alone["acs"], alone["comparisons"], alone["weight_bits"]) == (4, 4, 4, 0)
    # Read: 4 spikes, 4 potentials of 32 bits; written: 4 spikes, 4 potentials, 2 outputs of 32 bits.
    assert (alone["read_bits"], alone["write_bits"]) == (4 + 128, 4 + 128 + 64)
    assert alone["total_pj"] == pytest.approx(4 * 4.6 + 4 * 0.9 + 4 * 0.9)
    for steps in (0, 3):
        with pytest.raises(ValueError, match=f"steps {steps}: expected 1 to the 2 time steps of the network"):
            measured.stopped(steps)


@pytest.mark.parametrize("detector", [False, True])
def test_counts_of_the_first_steps_are_those_of_a_network_that_stops_there(detector):
    torch.manual_seed(0)
    if detector:
        head = {"num_convs": 1, "spiking": True}
        model = make_detector(make_config("retinanet", backbone={"time_steps": 3}, head=head))
        images = make_images()
    else:
        model = backbones.Classifier(backbones.create("resnet18", width=0.25, stem="cifar", time_steps=3), 4)
        images = torch.rand(3, 3, 32, 32)
        model(images)
    measured = measure_activity(model.eval(), [images])
    assert all(len(set(layer.spikes_in_steps)) > 1 for layer in list(measured.spikes.values())[:3])
    for steps in (1, 2, 3):
        with stop_after(model, steps):
            again = measure_activity(model, [images])
        assert again == measured.stopped(steps)
        assert energy(again) == energy_after_steps(measured)[steps - 1]
    with pytest.raises(ValueError, match="steps 4: expected 1 to the 3"), stop_after(model, 4):
        pass


def test_the_analysis_of_a_run_has_a_row_for_each_step(runs, tmp_path):
    found = analyze_run(runs[2], num_images=8)
    found.save(tmp_path)
    stored = json.loads((tmp_path / "analysis.json").read_text())
    first, second = stored["steps"]
    total = stored["networks"]["spiking"]
    for key in ("macs", "acs", "comparisons", "activation_bits", "total_pj", "total_sram_pj"):
        alone = [row["networks"]["spiking"][key] for row in (first, second)]
        assert alone[0] == first["so_far"]["spiking"][key] and min(alone) >= 0
        assert sum(alone) == pytest.approx(total[key]) and second["so_far"]["spiking"][key] == total[key]
    assert first["metrics"] == {"top1": stored["metrics"]["anytime"]["top1 after 1 of 2 steps"]}
    assert second["metrics"] == {"top1": stored["metrics"]["top1"]}
    assert stored["metrics"]["activity"] == pytest.approx((first["activity"] + second["activity"]) / 2)
    for layer in stored["layers"]:
        assert sum(layer["synops_in_steps"].values()) == layer["num_synops"]
    assert stored["layers"][0]["synops_in_steps"]["2"] == 0  # the stem's are the first step's
    assert first["num_synops"] == sum(layer["synops_in_steps"]["1"] for layer in stored["layers"])
    assert "synops_in_steps.2" in (tmp_path / "layers.csv").read_text().splitlines()[0]
    text = (tmp_path / "analysis.md").read_text()
    assert "## Time steps, per image" in text and "time steps 2" in text
    one = analyze_run(runs[1], num_images=8)
    assert [row["step"] for row in one.to_dict()["steps"]] == [1]
    assert not any(table.title.startswith("Time steps") for table in one.tables())


# Stopped early


def test_a_classifier_that_stops_early_gives_the_means_so_far():
    torch.manual_seed(0)
    model = backbones.Classifier(backbones.create("resnet18", width=0.25, stem="cifar", time_steps=3), 4)
    images, kept = torch.rand(4, 3, 32, 32), []
    model(images)
    with hook_layers({"": model.eval().head}, after=lambda name, head, x, y: kept.append(average_so_far(y, 3))):
        model(images)
    for steps in (1, 2, 3):
        with stop_after(model, steps):
            torch.testing.assert_close(model(images), kept[0][steps - 1])
    assert not torch.equal(kept[0][0], kept[0][2]) and model.backbone.time_steps == 3


@pytest.mark.parametrize("detector", ["retinanet", "fasterrcnn"])
def test_a_detector_that_stops_after_one_step_is_one_of_one_step(detector):
    head = {"num_convs": 1, "representation_size": 16, "score_threshold": 0.0}
    config = make_config(detector, backbone={"time_steps": 2}, head=head)
    model, images = make_detector(config), make_images()
    config.model.backbone.time_steps = 1
    one = make_detector(config)
    one.load_state_dict({name: value for name, value in model.state_dict().items() if not name.endswith("leak")})
    with torch.no_grad(), stop_after(model, 1):
        stopped, plain = model(images), one(images)
    for ours, theirs in zip(stopped, plain, strict=True):
        assert len(ours["boxes"]) and torch.equal(ours["boxes"], theirs["boxes"])
        assert torch.equal(ours["scores"], theirs["scores"])
    assert not torch.equal(model(images)[0]["scores"][:5], stopped[0]["scores"][:5])


def test_a_task_without_early_metrics_of_its_own_gets_those_of_a_network_stopped_early(monkeypatch):
    config = make_config(backbone={"time_steps": 3})
    task, model = task_of(config), make_detector(config)
    evaluations = iter((0.1, 0.2))

    def evaluate(network, *rest, **options):
        seen.append(network.backbone.body.time_steps)
        return Evaluation(metrics=dict.fromkeys(task.headline, next(evaluations)))

    seen: list[int] = []
    monkeypatch.setattr(task, "evaluate", evaluate)
    monkeypatch.setattr(task, "evaluation_batches", lambda *rest: [])
    whole = Evaluation(metrics=dict.fromkeys(task.headline, 0.3), tables={"voc": {}})
    found = with_early_metrics(whole, task, model, None, None)
    assert seen == [1, 2] and found.after_steps("AP50") == [0.1, 0.2, 0.3] and whole.after_steps("AP50") == [0.3]
    assert found.tables["anytime"]["AP50 after 2 of 3 steps"] == 0.2 and "voc" in found.tables
    assert with_early_metrics(found, task, model, None, None) is found


def test_the_curve_of_a_network_stopped_early():
    (panel,) = draw_anytime({"top1": [0.5, 0.75, 0.7], "top5": [0.9], "AP": [-1, 0.25]})
    lines = [line.get_xydata().tolist() for line in panel.axes[0].get_lines()]
    assert lines == [[[1, 0.5], [2, 0.75], [3, 0.7]], [[2, 0.25]]]
    assert draw_anytime({"top1": [0.5]}) == [] and draw_anytime({}) == []


def test_the_page_of_a_run_has_its_steps(runs, tmp_path):
    write_report([runs[2]], tmp_path / "two.html")
    page = Page(tmp_path / "two.html")
    words = " ".join(page.words)
    assert "Time steps" in words and "Stopped early" in words and "synaptic operations" in words
    assert not page.wrong
    early = Run.open(runs[2]).history()[-1].evaluation.after_steps("top1")
    assert all(f"{value:.3f}" in page.text for value in early) and len(early) == 2
    write_report([runs[1]], tmp_path / "one.html")
    assert "Stopped early" not in (tmp_path / "one.html").read_text()


# Spike maps


def test_spike_maps_of_each_step(runs):
    predictor, image = Predictor(Run.open(runs[2]), device="cpu"), torch.rand(3, 32, 32)
    layer = list(spike_layers(predictor.model.backbone.stages[-1]).values())[-1]
    found = {}
    with hook_layers({"c5": layer}, after=lambda name, module, u, spikes: found.update({name: spikes})):
        maps = predictor.spike_maps(image)
    for step, spikes in enumerate(found["c5"]):
        assert np.array_equal(maps[-1].steps[step].rate, spikes.mean(0).numpy())
    for entry in maps:
        assert len(entry.steps) == 2 and entry.activity == pytest.approx(np.mean([s.activity for s in entry.steps]))
        np.testing.assert_allclose(entry.rate, np.mean([step.rate for step in entry.steps], axis=0), atol=1e-6)
    figure = draw_spike_maps(image, maps)
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    titles = [title for axes in figure.axes if (title := axes.get_title())]
    assert texts == ["step 1", "step 2"] and len(titles) == 1 + 3 * len(maps)
    assert titles[1].startswith(f"{maps[0].name}, mean\n") and f"{100 * maps[0].activity:.1f} % active" in titles[1]
    one = titles[1 + len(maps)]
    assert one.startswith(f"{maps[0].name}\n") and f"{100 * maps[0].steps[0].activity:.1f} % active" in one
    names = [each.caption[0] for each in maps_of(maps, "image")]
    assert names[: len(maps)] == [entry.name for entry in maps] and names[-1] == f"{maps[-1].name} step 2"
    assert Predictor(Run.open(runs[1]), device="cpu").spike_maps(image)[0].steps == ()


def test_of_many_steps_eight_are_shown():
    still = SpikeMap("c2", np.zeros((2, 2), dtype=np.float32), 0.0)
    steps = tuple(SpikeMap("c2", still.rate + step, float(step)) for step in range(1, 21))
    rows = rows_of([SpikeMap("c2", still.rate, 0.0, steps)])
    assert list(rows) == [1, 4, 6, 9, 12, 15, 17, 20] and [row[0].activity for row in rows.values()] == list(rows)
    assert rows_of([still]) == {} == rows_of([])
    assert len(draw_spike_maps(np.zeros((4, 4, 3)), [SpikeMap("c2", still.rate, 0.0, steps)]).axes) == 2 * 9 + 1


# Graded spikes


@pytest.mark.parametrize(
    ("reset", "second"),
    # v_th 2, E 1/2, leak 1/2: levels at u = 0.5, 1, 1.5. u = 1.2 reaches the second, s = 2/3.
    # subtract: 0.5 (1.2 - 1) + 1 = 1.1; zero: 0.5 * 1.2 / 3 + 1 = 1.2.
    [("subtract", 1.1), ("zero", 1.2)],
)
def test_graded_spikes_of_two_steps_by_hand(reset, second):
    layer = MultiStepGraded(1, levels=4, time_steps=2, reset=reset).eval()
    layer.v_th.data.fill_(2.0)
    layer.leak.data.fill_(0.5)
    layer.extremum.fill_(0.5)
    u = torch.tensor([[1.2], [0.4], [1.0], [0.2]])  # the second neuron carries 0.2 over, and stays silent at 0.4
    assert layer.membrane(u).flatten().tolist() == pytest.approx([1.2, 0.4, second, 0.4])
    assert (3 * layer(u)).flatten().tolist() == pytest.approx([2, 0, 2, 0])
    with pytest.raises(ValueError, match="2 time steps: fold, integers"):
        layer.fold_threshold()


@pytest.mark.parametrize("reset", ["subtract", "zero"])
def test_graded_spikes_of_two_levels_are_the_methods_in_several_steps(reset):
    found = []
    u = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    for make in (MultiStepSpike, lambda *a, **options: MultiStepGraded(*a, levels=2, **options)):
        layer, x = make(3, time_steps=3, reset=reset), u.clone().requires_grad_()
        layer.leak.data.fill_(0.7)
        spikes = layer(x)
        ((spikes * u.cos()).sum() + 0.1 * hoyer_penalty(layer)).backward()
        found.append([spikes, x.grad, layer.leak.grad, layer.v_th.grad, layer.extremum, layer.eval()(u)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and 0 < found[0][0].mean() < 1


def test_a_graded_network_of_two_steps_begins_as_one_of_one_step():
    options = {"width": 0.125, "stem": "cifar", "activation": "graded", "levels": 4}
    one = backbones.create("vgg11", **options)
    two = backbones.create("vgg11", **options, time_steps=2)
    backbones.load_weights(two, one.state_dict())
    measured = measure_activity(backbones.Classifier(two, 3), [torch.rand(2, 3, 32, 32)])
    certificate = backbones.certify(measured)
    assert (certificate.time_steps, certificate.levels, certificate.is_binary) == (2, 4, False)
    assert {type(layer) for layer in spike_layers(two).values()} == {MultiStepGraded}
    assert {type(layer).__mro__[1] for layer in spike_layers(one).values()} == {HoyerSpike}


# Noise


def test_noise_on_images_is_measured_in_several_steps(runs, tmp_path):
    found = study([runs[2]], tmp_path / "noise", ["test"], kinds=["gaussian_noise"], seeds=[0], num_images=24)
    clean, *noisy = found["results"]
    assert clean["top1"] == pytest.approx(Run.open(runs[2]).history()[-1].metrics["top1"])
    assert [row["severity"] for row in noisy] == [0.02, 0.04, 0.08, 0.12, 0.2]
    assert len({row["activity"] for row in found["results"]}) > 1 and not found["left_out"]


@pytest.mark.parametrize("kind", ["membrane", "threshold"])
def test_noise_on_potentials_and_thresholds_is_refused_by_name(runs, tmp_path, kind):
    with pytest.raises(
        ValueError, match=f"two: no single time step: --kinds {kind} cannot be asked of it; .* gaussian_noise"
    ):
        study([runs[2]], tmp_path / "noise", ["test"], kinds=[kind])
    assert not (tmp_path / "noise").exists()


# Teachers


@pytest.mark.parametrize(("teacher", "student"), [(1, 2), (2, 1)])
def test_teacher_and_student_may_have_other_numbers_of_steps(runs, tmp_path, monkeypatch, teacher, student):
    compared, seen = [], []

    def note(ours, theirs, temperature):
        compared.append((ours.detach(), theirs))
        return softened_distance(ours, theirs, temperature)

    losses = ClassificationTask.losses
    monkeypatch.setattr("detection.tasks.classification.softened_distance", note)
    monkeypatch.setattr(ClassificationTask, "losses", lambda self, *a: seen.append(a[1][0]) or losses(self, *a))
    distillation = {"teacher": str(runs[teacher]), "logits": 1.0, "features": 1.0}
    line = train_run(recipe(student, distillation=distillation), tmp_path / "student", ["test"])
    assert line.losses["distillation"] > 0 and line.losses["features"] > 0
    model = load_model(Run.open(runs[teacher]))
    for images, (ours, known) in zip(seen, compared, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(model(images), known)
        assert ours.shape == known.shape == (8, 4)


def test_a_detector_learns_from_one_of_other_steps(monkeypatch):
    distillation = {"logits": 1.0, "features": 1.0, "teacher": "runs/two"}
    two = make_config(backbone={"time_steps": 2})
    config = make_config().model_copy(update={"distillation": two.distillation.model_copy(update=distillation)})
    shapes = []

    def note(ours, theirs, temperature):
        shapes.append((ours.shape, theirs.shape))
        return detection_distance(ours, theirs, temperature)

    monkeypatch.setattr("detection.tasks.detection.detection_distance", note)
    student = make_detector(config).train()
    compute = learn_from(make_detector(two), student, task_of(config), Accelerator(cpu=True))
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 30.0, 30.0]]), "labels": torch.ones(1, dtype=torch.int64)}] * 2
    losses = compute(student, (make_images(), targets))
    assert losses["distillation"] > 0 and losses["features"] > 0
    assert shapes[0][0] == shapes[0][1] and len(shapes) == 1 and shapes[0][0][0] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "synthetic_events"}, r"one: its images have 2 channels, this recipe's 3$"),
        ({"size": 64}, r"one: data\.size is 64, this recipe's is 32; a teacher sees the images of its student$"),
    ],
)
def test_a_teacher_of_other_images_is_refused_before_the_training(runs, tmp_path, changes, message):
    shutil.copytree(runs[1], tmp_path / "one")
    values = yaml.safe_load((tmp_path / "one" / "config.yaml").read_text())
    values["data"] |= changes
    (tmp_path / "one" / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=message):
        train_run(recipe(1, distillation={"teacher": str(tmp_path / "one")}), tmp_path / "student", ["test"])
    assert not (tmp_path / "student").exists()


def test_a_detector_refuses_a_teacher_of_other_images():
    ours = task_of(make_config())
    events = make_config()
    events.data.format = "synthetic_events"
    with pytest.raises(ValueError, match=f"its images have {events.data.channels} channels, this recipe's 3"):
        ours.learn_from(task_of(events))
    ours.learn_from(task_of(make_config(backbone={"time_steps": 4})))
    ours.learn_from(task_of(make_config(min_size=[32], max_size=96)))
