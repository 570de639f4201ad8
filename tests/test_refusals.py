"""Slips of a user that once went on without a word, or were answered in other words than their siblings."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image

import backbones
import detection
import hubconf
from detection.__main__ import main
from detection.api import EvaluatedRun
from detection.config import read_recipe, set_values
from detection.data.layouts import recognise
from detection.evaluation import CocoEvaluator, Detections, precision_recall
from detection.records import EpochLog, Evaluation
from detection.report import write_report
from detection.runs import Run
from detection.tasks.classification import ClassificationTask
from detection.tasks.predictions import ClassPrediction

COCO = {"images": [{"id": 1, "file_name": "a.jpg", "width": 8, "height": 8}], "annotations": [], "categories": []}


def call(*arguments: str | Path) -> None:
    main([str(argument) for argument in arguments])


def write_coco(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text)
    return folder


@pytest.mark.parametrize("broken", ["train", "val"])
def test_a_damaged_coco_file_is_no_reason_to_split_the_other(tmp_path, broken):
    texts = dict.fromkeys(("train", "val"), json.dumps(COCO)) | {broken: '{"images": ['}
    root = write_coco(tmp_path / "coco", **texts)
    with pytest.raises(ValueError, match=f"{broken}.json: no JSON with images, annotations and categories, or cut off"):
        recognise(root)
    (root / f"{broken}.json").unlink()
    (layout,) = recognise(root)
    assert layout.values["val_fraction"] == 0.2


def test_other_json_files_beside_a_set_are_left_alone(tmp_path):
    good = json.dumps(COCO)
    others = {"captions_train": "{}", "image_info_test": '{"images": [], "categories": []}', "notes": "[]"}
    for number, splits in enumerate((("train", "val"), ("train",))):
        files = {f"instances_{split}": good for split in splits}
        (layout,) = recognise(write_coco(tmp_path / str(number), **files, **others))
        assert layout.values["train"] == ["instances_train.json"]
        assert layout.values.get("val") == (["instances_val.json"] if "val" in splits else None)


def test_a_table_with_another_header_is_named(tmp_path):
    (tmp_path / "val.csv").write_text("image,xmin,ymin,xmax,ymax,label\na.jpg,1,1,5,5,cat\n")
    (tmp_path / "train.csv").write_text("what,ever\n1,2\n")
    with pytest.raises(ValueError, match=r"train\.csv.*; mend it, or remove it"):
        recognise(tmp_path)
    (tmp_path / "train.csv").write_bytes(b"\xff\xfe\x00broken\x00")
    with pytest.raises(ValueError, match=r"train\.csv.*; mend it, or remove it"):
        recognise(tmp_path)


def test_a_table_of_test_images_without_boxes_is_left_alone(tmp_path):
    (tmp_path / "train.csv").write_text("image,xmin,ymin,xmax,ymax,label\na.jpg,1,1,5,5,cat\n")
    (tmp_path / "test.csv").write_text("image\nb.jpg\n")
    (layout,) = recognise(tmp_path)
    assert layout.values["train"] == ["train.csv"] and layout.values["val_fraction"] == 0.2


@pytest.mark.parametrize("name", ["train", "trainval"])
@pytest.mark.parametrize("text", ["", "000009\n"], ids=["empty", "without an annotation"])
def test_a_list_of_voc_that_names_nothing_is_no_reason_to_split_the_other(tmp_path, text, name):
    for folder in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "Annotations" / "000001.xml").write_text("<annotation></annotation>")
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_text("000001\n")
    (tmp_path / "ImageSets" / "Main" / "test.txt").write_text("000007\n")
    (train := tmp_path / "ImageSets" / "Main" / f"{name}.txt").write_text(text)
    with pytest.raises(
        ValueError, match=rf"{name}\.txt: its first image, '\d*', has no annotation; mend it, or remove"
    ):
        recognise(tmp_path)
    train.unlink()
    (layout,) = recognise(tmp_path)
    assert layout.values["train"] == ["val"] and layout.values["val_fraction"] == 0.2


def test_a_recipe_is_copied_to_the_name_that_is_given(tmp_path, capsys):
    call("recipes", "copy", "cifar10_vgg11", tmp_path / "mine.yaml")
    assert read_recipe(tmp_path / "mine.yaml") == read_recipe(ROOT / "configs" / "cifar10_vgg11.yaml")
    call("recipes", "copy", "cifar10_vgg11", tmp_path / "folder")
    assert (tmp_path / "folder" / "cifar10_vgg11.yaml").is_file()
    (tmp_path / "notes.txt").write_text("")
    for target, why in {"notes.txt": "a file, expected a folder or", "mine.yaml": "exists already"}.items():
        with pytest.raises(SystemExit):
            call("recipes", "copy", "cifar10_vgg11", tmp_path / target)
        assert f"{target}" in (said := capsys.readouterr().err) and why in said


def test_a_folder_is_no_recipe_and_says_what_to_do_with_it(tmp_path):
    (tmp_path / "two words").mkdir()
    with pytest.raises(FileNotFoundError, match=r"a folder, no recipe; hoyer-det init '.*two words'"):
        detection.load_config(tmp_path / "two words")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(FileNotFoundError, match="hoyer-det train --resume"):
        detection.load_config(tmp_path / "run")


def test_recipes_that_come_with_the_package_are_read_by_name():
    assert detection.load_config("cifar10_vgg11") == read_recipe(ROOT / "configs" / "cifar10_vgg11.yaml")


def test_one_number_is_a_list_of_one_in_every_way_to_say_it(tmp_path):
    path = tmp_path / "recipe.yaml"
    text = (ROOT / "configs" / "scenes_retinanet_resnet18.yaml").read_text()
    path.write_text(re.sub(r"min_size: \[\d+\]", "min_size: 96", text))
    assert "min_size: 96" in path.read_text() and read_recipe(path).model.min_size == [96]
    assert detection.load_config(path, ["--model.min_size", "64"]).model.min_size == [64]
    assert set_values(read_recipe(path), {"model.min_size": 32}).model.min_size == [32]


def test_weights_of_another_name_are_refused_alike_everywhere(tmp_path):
    run = "zoo:cifar10_vgg11"
    ways = [
        lambda: detection.load(run, "foo"),
        lambda: detection.evaluate(run, "foo"),
        lambda: Run.open(run).read("foo"),
        lambda: detection.export(run, tmp_path / "a.onnx", weights="foo"),
    ]
    for way in ways:
        with pytest.raises(ValueError, match="weights: expected one of best, last, ema, got 'foo'"):
            way()


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (("--extend", "0"), "--extend 0: expected a number above 0"),
        (("--extend", "-1"), "--extend -1: expected a number above 0"),
        (("--extend-lr", "0.1"), "--extend-lr 0.1: of the cycle of"),
    ],
)
def test_options_of_a_further_cycle_are_not_swallowed(capsys, given, why):
    with pytest.raises(SystemExit):
        call("train", "--resume", ROOT / "backbones" / "zoo" / "cifar10_vgg11", *given)
    assert why in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("summary", "which recipe? The first argument is a YAML file"),
        ("summary --resume zoo:cifar10_vgg11", "--resume: no such key of a recipe"),
        ("check-data --resume cifar10_vgg11", "--resume: no such key of a recipe"),
        ("train --resume", "argument --resume: expected one argument (hoyer-det train --help documents the command)"),
        ("predict --resume", "argument --resume: expected one argument (hoyer-det predict --help documents"),
        ("web zoo:cifar10_vgg11 --port 70000", "--port 70000: expected 0 to 65535"),
        ("web zoo:cifar10_vgg11 --port -5", "--port -5: expected 0 to 65535"),
        ("web zoo:cifar10_vgg11 --max-mb inf", "--max-mb inf: expected 1 or more, finite"),
        ("web zoo:cifar10_vgg11 --max-megapixels inf", "--max-megapixels inf: expected 1 or more, finite"),
    ],
)
def test_options_out_of_place_or_range_are_a_sentence_that_names_the_command(capsys, given, why):
    with pytest.raises(SystemExit) as end:
        call(*given.split())
    assert end.value.code == 2 and capsys.readouterr().err.startswith(f"error: {why}")


def test_options_may_stand_in_front_of_a_run_or_folder(tmp_path, capsys):
    call("summary", "--classes", "3", "zoo:cifar10_vgg11")
    assert capsys.readouterr().out.strip().startswith("zoo:cifar10_vgg11: vgg11 x0.25")
    lines = ["image,xmin,ymin,xmax,ymax,label"]
    for number in range(4):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,1,1,50,50,cat")
    (tmp_path / "all.csv").write_text("\n".join(lines) + "\n")
    call("check-data", "--format", "csv", tmp_path)
    assert "training can go on" in capsys.readouterr().out


def test_a_network_that_does_not_fit_into_the_memory_is_a_sentence_of_the_summary_too(monkeypatch, capsys):
    def build(task: ClassificationTask) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2415919104 bytes")

    monkeypatch.setattr(ClassificationTask, "build_model", build)
    with pytest.raises(SystemExit) as end:
        call("summary", "cifar10_vgg11")
    assert end.value.code == 2 and "does not fit into the memory" in capsys.readouterr().err


def test_an_exported_file_is_not_called_like_one_of_another_format(tmp_path):
    with pytest.raises(ValueError, match=r"a\.events: a file of the format onnx is not called \.events"):
        detection.export("zoo:cifar10_vgg11", tmp_path / "a.events")
    with pytest.raises(ValueError, match="--calibration belongs to --int8"):
        detection.export("zoo:cifar10_vgg11", tmp_path / "a.onnx", num_calibration=3)


def test_a_folder_that_takes_no_files_is_named_before_the_work(tmp_path, monkeypatch):
    run = "zoo:cifar10_vgg11"
    for module, work in (("detection.exporters.run", "load_model"), ("detection.report.page", "complete")):
        monkeypatch.setattr(f"{module}.{work}", lambda *arguments, **options: pytest.fail("work was done"))
    for way in (lambda: detection.export(run, "/proc/a.onnx"), lambda: write_report([run], "/proc/a.html")):
        with pytest.raises(OSError, match="/proc: no files can be written there"):
            way()


@pytest.mark.parametrize("key", ["weights", "backbone.weights"])
def test_weights_that_are_missing_are_named_before_the_data_are_read(tmp_path, monkeypatch, capsys, key):
    monkeypatch.setattr(ClassificationTask, "read", lambda *arguments: pytest.fail("data were read"))
    with pytest.raises(SystemExit):
        call("train", "cifar10_vgg11", f"--model.{key}", tmp_path / "gone", "--out", tmp_path / "run")
    assert capsys.readouterr().err == f"error: {tmp_path / 'gone'}: no such weights file\n"


def test_a_teacher_that_cannot_teach_is_named_before_the_data_are_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ClassificationTask, "read", lambda *arguments: pytest.fail("data were read"))
    for teacher, sentence in (
        (tmp_path / "gone", f"{tmp_path / 'gone'} is not a run folder"),
        ("zoo:scenes_retinanet_resnet18", "trained for detection, not for classification"),
    ):
        with pytest.raises(SystemExit):
            call("train", "cifar10_vgg11", "--distillation.teacher", teacher, "--out", tmp_path / "run")
        assert sentence in capsys.readouterr().err


def test_an_image_whose_classes_are_equal_is_compared_with_the_class_that_is_named():
    names = tuple(f"class {number}" for number in range(40))
    noisy, clean = (
        ClassPrediction(np.zeros((1, 1, 3), np.uint8), names, None, each)
        for each in (torch.arange(40) / 780, torch.full((40,), 1 / 40))
    )
    (name, before), share = clean.top(1)[0], noisy.probabilities[names.index(clean.top(1)[0][0])]
    assert noisy.since(clean).endswith(f" {name}, probability {share:.3f} instead of {before:.3f}")


def test_a_number_of_a_table_that_differs_from_the_log_is_named(monkeypatch, capsys):
    now, then = (Evaluation(metrics={"AP": 0.5}, tables={"voc": {"AP50_area": value}}) for value in (0.6, 0.7))
    found = EvaluatedRun("zoo", now, EpochLog(epoch=40, loss=1.0, evaluation=then))
    monkeypatch.setattr("detection.api.evaluate", lambda *arguments, **options: found)
    call("evaluate", "zoo:bccd_retinanet_resnet18")
    assert "not equal to the log: VOC AP50 (area)\n" in capsys.readouterr().out


def test_a_comparison_does_not_write_into_a_run(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(SystemExit):
        call("compare", "cifar10_vgg11", "--out", tmp_path)
    assert "a run folder; name another for the comparison" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_hub_entries_take_false_for_no_weights():
    torch.manual_seed(0)
    found = hubconf.vgg11(pretrained=False, width=0.125).state_dict()
    torch.manual_seed(0)
    wanted = backbones.create("vgg11", width=0.125).state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    with pytest.raises(ValueError, match=r"pretrained=True: which network of the zoo \(allowed: .*cifar10_vgg11"):
        hubconf.vgg11(pretrained=True)


def test_targets_that_do_not_fit_are_refused_in_training():
    recipe = read_recipe(ROOT / "configs" / "scenes_retinanet_resnet18.yaml")
    values = {"model.backbone.width": 0.125, "data.classes": ["a", "b"], "model.min_size": [64], "model.max_size": 64}
    model = detection.build_detector(set_values(recipe, values)).train()
    images, boxes = [torch.rand(3, 64, 64)], torch.tensor([[4.0, 4, 30, 30]])
    assert model(images, [{"boxes": boxes, "labels": torch.tensor([2])}])
    for label in (0, 3):
        with pytest.raises(ValueError, match=rf"found label {label}; labels are in 1\.\.K, K = 2"):
            model(images, [{"boxes": boxes, "labels": torch.tensor([label])}])
    with pytest.raises(ValueError, match="expected one for each of 1 images, got 0"):
        model(images, [])


def test_one_class_to_tell_apart_is_warned_of(tmp_path, capsys):
    for split in ("train", "val"):
        (tmp_path / split / "only").mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (32, 32)).save(tmp_path / split / "only" / f"{index}.png")
    given = ["--data.root", tmp_path, "--data.format", "folder", "--data.train", "train", "--data.val", "val"]
    call("check-data", "cifar10_vgg11", *given)
    said = " ".join(capsys.readouterr().out.split())
    assert "3 images of 1 class" in said and "one class alone, only: any network is right" in said


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_a_ground_truth_without_a_part_is_named(key):
    parts = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    del parts[key]
    for ask in (lambda: CocoEvaluator(parts, [1]), lambda: precision_recall(parts, Detections.join([]), [1])):
        with pytest.raises(ValueError, match=f"ground truth without '{key}'"):
            ask()


@pytest.mark.parametrize(
    ("part", "key", "which"),
    [
        ("images", "id", "at index 0"),
        *(("annotations", key, "with id 7") for key in ("image_id", "category_id", "bbox", "area")),
        ("categories", "name", "with id 1"),
    ],
)
def test_an_entry_of_a_ground_truth_without_a_key_is_named(part, key, which):
    box = {"id": 7, "image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 4], "area": 16}
    parts = {"images": [{"id": 1}], "annotations": [box], "categories": [{"id": 1, "name": "a"}]}
    del parts[part][0][key]
    with pytest.raises(ValueError, match=f"ground truth, {part}: the entry {which} has no '{key}'"):
        CocoEvaluator(parts, [1])
    if key == "area":  # which VOC does not ask for
        assert precision_recall(parts, Detections.join([]), [1])["a"].num_boxes == 1
    else:
        with pytest.raises(ValueError, match=f"the entry {which} has no '{key}'"):
            precision_recall(parts, Detections.join([]), [1])


def test_a_row_of_results_without_a_key_is_named():
    with pytest.raises(ValueError, match="results: the entry at index 0 has no 'score'"):
        Detections.from_rows([{"image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 4]}], COCO, [1])
    fine = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 4], "score": 0.5}
    assert len(Detections.from_rows([fine], COCO, [1])) == 1
    for wrong in ({"bbox": [0, 0, 4, 4] * 2}, {"bbox": [0, 0, 4, float("nan")]}, {"score": float("nan")}):
        with pytest.raises(ValueError, match="results: expected a bbox x y w h and a score, all finite, got"):
            Detections.from_rows([fine, fine | wrong], COCO, [1])
