"""Learning from a teacher: the distances by hand, and trainings of both tasks."""

import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from helpers import log_lines, run_tool
from safetensors.torch import load_file

from detection.runs import Run
from detection.tasks import task_of
from detection.tasks.classification import ClassificationTask
from detection.tasks.recipes import DetectionRecipe
from detection.tasks.run import load_model
from detection.training.distillation import detection_distance, feature_distance, softened_distance, watch

SMALL = {"hoyer": {"weight": 0.01}, "optimizer": {"lr": 0.003, "warmup_steps": 1, "clip_norm": 1.0}}
CLASSIFIER = SMALL | {
    "task": "classification",
    "model": {"backbone": {"name": "resnet18", "width": 0.125, "stem": "imagenet"}},
    "data": {"format": "synthetic", "size": 32, "num_train": 48, "num_val": 16},
    "train": {"epochs": 2, "batch_size": 16},
}
DETECTOR = SMALL | {
    "model": {
        "backbone": {"name": "resnet18", "width": 0.125},
        "neck": {"levels": ["c3", "c4"], "extra_levels": 0, "out_channels": 16},
        "head": {"num_convs": 1},
        "min_size": [64],
        "max_size": 96,
    },
    "data": {"format": "synthetic", "scenes": {"num_train": 12, "num_val": 4, "size": 64}, "workers": 0},
    "train": {"epochs": 1, "batch_size": 4},
}


def train(monkeypatch, folder: Path, recipe: dict, name: str, *arguments) -> Run:
    """A run of `recipe` in folder/name."""
    if "task" not in recipe:
        recipe = recipe | {"data": recipe["data"] | {"root": str(folder / "scenes")}}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    run_tool(monkeypatch, "train_cls" if "task" in recipe else "train_det", path, "--out", folder / name, *arguments)
    return Run.open(folder / name)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Analogue twins of both tasks: (folder, classifier, detector)."""
    folder = tmp_path_factory.mktemp("teachers")
    with pytest.MonkeyPatch.context() as monkeypatch:
        twin = ("--model.backbone.activation", "relu")
        return (
            folder,
            train(monkeypatch, folder, CLASSIFIER, "classifier", *twin),
            train(monkeypatch, folder, DETECTOR, "detector", *twin),
        )


def test_softened_distance_by_hand():
    teacher, student = torch.tensor([[4.0, 0.0], [0.0, 0.0]]), torch.zeros(2, 2)
    p = 1 / (1 + math.exp(-2))  # softmax of (4, 0) / 2
    divergence = p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5)
    assert softened_distance(student, teacher, 2.0).item() == pytest.approx(4 * divergence / 2, rel=1e-5)
    assert softened_distance(teacher, teacher, 2.0).item() == pytest.approx(0, abs=1e-6)


def test_softened_distance_draws_towards_the_teacher():
    student = torch.zeros(1, 3, requires_grad=True)
    softened_distance(student, torch.tensor([[3.0, 0.0, -3.0]]), 4.0).backward()
    assert student.grad[0, 0] < 0 < student.grad[0, 2]


def test_detection_distance_by_hand():
    teacher, student = torch.logit(torch.tensor([[[0.8, 0.9]]])), torch.logit(torch.tensor([[[0.5, 0.9]]]))
    expected = 0.3**2 * -(0.8 * math.log(0.5) + 0.2 * math.log(0.5)) / 1.7
    assert detection_distance(student, teacher, 1.0).item() == pytest.approx(expected, rel=1e-4)
    # With next to nothing in the picture the sum of the scores, which divides, counts as 1.
    nothing = torch.full((1, 5, 2), -20.0)
    assert detection_distance(torch.zeros(1, 5, 2), nothing, 1.0).item() == pytest.approx(
        10 * 0.25 * math.log(2), rel=1e-4
    )


def test_feature_distance_by_hand():
    one = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(2, 2, 3, 4)
    other = torch.tensor([0.0, 2.0]).view(1, 2, 1, 1).expand(2, 2, 3, 4)
    assert feature_distance([one], [3 * one]).item() == pytest.approx(0)
    assert feature_distance([one], [-one]).item() == pytest.approx(2)
    assert feature_distance([one, one], [one, other]).item() == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"map 1 of the student is \(2, 2, 3, 4\), of the teacher \(2, 1, 3, 4\)"):
        feature_distance([one, one], [one, one[:, :1]])


def test_distances_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="predicts 6 places, the teacher 9"):
        detection_distance(torch.zeros(1, 6, 2), torch.zeros(1, 9, 2), 1.0)
    with pytest.raises(ValueError, match="sees 1 maps, the teacher's 2"):
        feature_distance([torch.zeros(1, 2, 3, 3)], [torch.zeros(1, 2, 3, 3)] * 2)


@pytest.mark.parametrize("task", ["classifier", "detector"])
def test_a_student_learns_from_its_twin(teachers, monkeypatch, tmp_path, task):
    recipe, teacher = (CLASSIFIER, teachers[1]) if task == "classifier" else (DETECTOR, teachers[2])
    before = load_file(teacher.folder / "last.safetensors")
    distillation = {"teacher": str(teacher.folder), "logits": 0.5, "features": 2.0}
    run = train(monkeypatch, tmp_path, recipe | {"distillation": distillation}, "student")
    for line in log_lines(run.folder):
        terms = [value for key, value in line.items() if key.startswith("loss/")]
        assert line["loss"] == pytest.approx(sum(terms), rel=1e-5)
        assert line["loss/distillation"] > 0 and 0 < line["loss/features"] < 4
    after = load_file(teacher.folder / "last.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)
    plain = train(monkeypatch, tmp_path, recipe, "plain")
    state = load_file(run.folder / "last.safetensors")
    assert state.keys() == load_file(plain.folder / "last.safetensors").keys()


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
@pytest.mark.parametrize("change", [{}, {"thresholds": 2}, {"time_steps": 2}])
def test_a_teacher_with_a_spiking_head_teaches_what_it_says(kind, change):
    """Not what its last layer says of the pyramid."""
    model = DETECTOR["model"] | {"detector": kind, "backbone": DETECTOR["model"]["backbone"] | change}
    model |= {"neck": model["neck"] | {"spiking": True}, "head": model["head"] | {"spiking": True}}
    data = {"format": "synthetic", "classes": ["a", "b"]}
    task = task_of(DetectionRecipe.model_validate({"model": model, "data": data}))
    student, teacher, images = task.build_model().eval(), task.build_model().eval(), [torch.rand(3, 64, 64)]
    known, said, pyramid = watch(task, teacher), [], []
    ask = task.teacher_pass(student)
    with torch.no_grad():
        student(images)
        ask(teacher, images)
        logits, features = known["logits"], known["features"]
        teacher.head.register_forward_hook(lambda module, inputs, output: said.append(output["cls_logits"]))
        teacher.backbone.register_forward_hook(lambda module, inputs, output: pyramid.extend(output.values()))
        teacher(images)
    torch.testing.assert_close(logits, said[0])
    steps = change.get("time_steps", 1)
    assert [each.shape for each in features] == [each[: len(each) // steps].shape for each in pyramid]
    torch.testing.assert_close(features, [each.unflatten(0, (steps, -1)).mean(0) for each in pyramid])


def test_a_student_comes_closer_to_its_teacher(teachers, monkeypatch, tmp_path):
    """Taught by nothing but the teacher: the distances fall."""
    distillation = {"teacher": str(teachers[1].folder), "logits": 1.0, "features": 1.0}
    recipe = CLASSIFIER | {"distillation": distillation, "train": {"epochs": 40, "batch_size": 16}}
    history = log_lines(train(monkeypatch, tmp_path, recipe, "student").folder)
    for term in ("loss/distillation", "loss/features"):
        assert history[-1][term] < 0.8 * history[0][term]


def test_weights_of_zero_leave_a_term_out(teachers, monkeypatch, tmp_path):
    distillation = {"teacher": str(teachers[1].folder), "logits": 0.0, "features": 1.0}
    run = train(monkeypatch, tmp_path, CLASSIFIER | {"distillation": distillation}, "student")
    for line in run.history():
        assert set(line.losses) == {"classification", "features", "hoyer"}


def refusal(monkeypatch, capsys, tmp_path, recipe: dict) -> str:
    with pytest.raises(SystemExit) as stop:
        train(monkeypatch, tmp_path, recipe, "student")
    assert stop.value.code == 2
    assert not (tmp_path / "student").exists()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_teachers_that_cannot_teach_are_refused(teachers, monkeypatch, capsys, tmp_path):
    folder, classifier, detector = teachers

    def teacher(run: Run | Path) -> dict:
        return {"distillation": {"teacher": str(run.folder if isinstance(run, Run) else run)}}

    message = refusal(monkeypatch, capsys, tmp_path, CLASSIFIER | teacher(folder))
    assert "is not a run folder" in message
    message = refusal(monkeypatch, capsys, tmp_path, CLASSIFIER | teacher(detector))
    assert "trained for detection, not for classification" in message
    fcos = DETECTOR | {"model": DETECTOR["model"] | {"detector": "fcos"}}
    assert "is a retinanet, this recipe a fcos" in refusal(monkeypatch, capsys, tmp_path, fcos | teacher(detector))
    few = DETECTOR | {"data": DETECTOR["data"] | {"classes": ["circle", "star"]}}
    message = refusal(monkeypatch, capsys, tmp_path, few | teacher(detector))
    assert "knows the classes circle, square, triangle, star (4 in all)" in message and "circle, star" in message
    other = DETECTOR | {"model": DETECTOR["model"] | {"mean": [0.5, 0.5, 0.5]}}
    message = refusal(monkeypatch, capsys, tmp_path, other | teacher(detector))
    assert "normalised with mean (0.485, 0.456, 0.406), this recipe's are with (0.5, 0.5, 0.5)" in message
    larger = DETECTOR | {"model": DETECTOR["model"] | {"head": DETECTOR["model"]["head"] | {"anchor_scale": 2.0}}}
    message = refusal(monkeypatch, capsys, tmp_path, larger | teacher(detector))
    assert re.search(r"trained with model\.head\.anchor_scale \d, this recipe's is 2$", message)
    neck = {"levels": ["c3"], "extra_levels": 0, "out_channels": 16}
    flatter = DETECTOR | {"model": DETECTOR["model"] | {"neck": neck}}
    message = refusal(monkeypatch, capsys, tmp_path, flatter | teacher(detector))
    assert "the student predicts" in message and "places, the teacher" in message
    wide = CLASSIFIER | {"model": {"backbone": {"name": "resnet18", "width": 0.25, "stem": "imagenet"}}}
    wide |= {"distillation": {"teacher": str(classifier.folder), "features": 1.0}}
    assert "map 0 of the student is" in refusal(monkeypatch, capsys, tmp_path, wide)


@pytest.mark.parametrize("detector", ["fasterrcnn", "ssd"])
def test_detectors_that_cannot_learn_from_a_teacher(detector, tmp_path):
    model = {"detector": detector} | ({"min_size": [96], "max_size": 96} if detector == "ssd" else {})
    with pytest.raises(ValueError, match=rf"distillation\.teacher: retinanet and fcos .* {detector}"):
        DetectionRecipe.model_validate(
            {"model": model, "data": {"format": "synthetic"}, "distillation": {"teacher": str(tmp_path)}}
        )


def test_a_classifier_learns_from_one_that_normalises_otherwise(teachers, monkeypatch, tmp_path):
    """Each normalises the images, which lie in [0, 1], by itself: the teacher says what it said when it was trained."""
    teacher = teachers[1]
    values = CLASSIFIER | {"model": CLASSIFIER["model"] | {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}}
    said = []

    def note(student, known, temperature):
        said.append(known)
        return softened_distance(student, known, temperature)

    monkeypatch.setattr("detection.tasks.classification.softened_distance", note)
    seen = []
    losses = ClassificationTask.losses
    monkeypatch.setattr(ClassificationTask, "losses", lambda self, *a: seen.append(a[1][0]) or losses(self, *a))
    train(monkeypatch, tmp_path, values | {"distillation": {"teacher": str(teacher.folder)}}, "student")
    model = load_model(teacher)
    assert len(said) == len(seen) == 6 and 0 <= seen[0].min() < 0.2 < seen[0].max() <= 1
    for images, known in zip(seen, said, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(model(images), known)
