"""Files that give boxes, files whose JSON says how boxes are made, OpenVINO, and the benchmark of a file."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run_tool
from test_export import CLASSIFIER, DETECTOR, agree, error_of, make_run, with_log

import detection
from detection.evaluation import METRICS
from detection.exporters import OnnxDetector, ParityError, benchmark_file, boxes, evaluate_file, export_run
from detection.exporters.benchmark import Benchmark
from detection.runs import Run
from detection.tasks.run import load_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

KINDS = ("retinanet", "fcos", "ssd")
SCENES = {"scenes": {"num_train": 8, "num_val": 4, "size": 64}}


def recipe_of(kind: str, **head) -> dict:
    recipe = json.loads(json.dumps(DETECTOR))
    recipe["data"] |= SCENES
    recipe["model"] |= {"detector": kind, "neck": {"out_channels": 16, "levels": ["c3", "c4"], "extra_levels": 1}}
    recipe["model"]["head"] |= head
    if kind == "ssd":
        recipe["model"]["min_size"] = [96]
    return recipe


def image_for(kind: str) -> torch.Tensor:
    """One that the detector does not resize; all but the SSD pad it to 64x96."""
    height, width = (96, 96) if kind == "ssd" else (64, 90)
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory) -> tuple[str, Path, torch.Tensor, float]:
    """A detector with random weights, its run, an image, and the score of its 30th box there."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    run = make_run(folder / "run", recipe_of(kind))
    image = image_for(kind)
    score = boxes_of(run, image)["scores"][29].item()
    return kind, run, image, score


@torch.no_grad()
def boxes_of(run: Path, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the detector itself finds."""
    return load_model(Run.open(run))([image])[0]


def run_file(path: Path, image: torch.Tensor) -> list[np.ndarray]:
    """All that a user of the file has to write."""
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": image[None].numpy()})


def expect_same(boxes, scores, labels, expected, number: int) -> None:
    """The same boxes as sets, to a thousandth of a pixel, and in the order of the scores.

    Of several that are equally good as the last one, as where the network sees the same, any may be left.
    """
    assert len(scores) == len(expected["scores"]) == number and (np.diff(scores) <= 0).all()
    np.testing.assert_allclose(scores, expected["scores"].numpy(), rtol=0, atol=1e-5)
    last = scores[-1] if np.isclose(scores, scores[-1], rtol=0, atol=1e-6).sum() > 1 else -1
    for box, score, label in zip(*(expected[key].numpy() for key in ("boxes", "scores", "labels")), strict=True):
        if abs(score - last) < 1e-6:
            continue
        near = (np.abs(boxes - box).max(1) < 1e-3) & (np.abs(scores - score) < 1e-5) & (labels == label)
        assert near.sum() == 1, (box, score, label)


def test_a_file_gives_the_boxes_of_its_detector(case, tmp_path):
    kind, run, image, score = case
    path, described = export_run(run, "onnx", tmp_path / "all.onnx", nms=True)
    assert described["nms"] and list(described["outputs"]) == ["boxes", "scores", "labels"]
    assert described["parity"]["equal_boxes"] == described["parity"]["boxes"] == 100
    sides = [96, 96] if kind == "ssd" else ["height", "width"]
    assert described["inputs"]["images"]["shape"] == [1, 3, *sides]
    expect_same(*run_file(path, image), boxes_of(run, image), 100)
    # With a threshold between two scores fewer boxes are left than an image may have, or just as many as it may.
    for most, number in ((100, 29), (7, 7)):
        other = make_run(tmp_path / f"run{most}", recipe_of(kind, score_threshold=score, max_detections=most))
        path, _ = export_run(other, "onnx", nms=True)
        assert path.name == "model_nms.onnx"
        expect_same(*run_file(path, image), boxes_of(other, image), number)
    nothing = make_run(tmp_path / "nothing", recipe_of(kind, score_threshold=0.999))
    found = run_file(export_run(nothing, "onnx", nms=True)[0], image)
    assert [each.shape for each in found] == [(0, 4), (0,), (0,)] and found[2].dtype == np.int64


@pytest.mark.parametrize("factor", [1e-6, 0])
def test_a_network_that_tells_no_box_from_another_is_exported(case, factor, tmp_path):
    run = Run.open(make_run(tmp_path / "run", recipe_of(case[0])))
    model = load_model(run)
    for name, weights in model.head.classification_head.named_parameters():
        if name.endswith("weight") and weights.dim() == 4:
            weights.data *= factor
    run.save(model, "last")
    _, described = export_run(run.folder, "onnx", nms=True)
    assert described["parity"]["equal_boxes"] == described["parity"]["boxes"] == 100


@pytest.mark.parametrize("factor", [1, 0])
@pytest.mark.parametrize("wrong", ["box", "score"])
def test_a_wrong_box_or_score_is_found_out(factor, wrong, tmp_path, monkeypatch):
    decode, best = boxes._decode, boxes._best_of_levels
    if wrong == "box":
        monkeypatch.setattr(boxes, "_decode", lambda g, *rest: g("Add", decode(g, *rest), 2.0))
    else:
        monkeypatch.setattr(boxes, "_best_of_levels", lambda g, scores, *rest: best(g, g("Mul", scores, 0.9), *rest))
    run = Run.open(make_run(tmp_path / "run", recipe_of("retinanet")))
    model = load_model(run)
    model.head.classification_head.cls_logits.weight.data *= factor
    run.save(model, "last")
    with pytest.raises(ParityError, match=r"of 100 boxes \d+ are among the file's 100"):
        export_run(run.folder, "onnx", tmp_path / "net.onnx", nms=True)
    assert not (tmp_path / "net.onnx").exists()


def decode(outputs: dict[str, np.ndarray], rules: dict, size: tuple[int, int], padded: tuple[int, int]) -> list:
    """Boxes, scores and labels by the "steps" of a file's JSON and nothing else."""
    anchors, level_of = [], []
    for number, level in enumerate(rules["levels"]):
        rows, columns = level.get("cells") or (-(-side // level["stride"]) for side in padded)
        steps = padded[0] / rows, padded[1] / columns
        if rules["anchor_step"] == "integer":
            steps = padded[0] // rows, padded[1] // columns
        for row in range(rows):
            for column in range(columns):
                y, x = ((at + rules["anchor_offset"]) * step for at, step in zip((row, column), steps, strict=True))
                anchors += [(x + x1, y + y1, x + x2, y + y2) for x1, y1, x2, y2 in level["anchors"]]
                level_of += [number] * len(level["anchors"])
    anchors, level_of = np.array(anchors), np.array(level_of)
    logits, offsets = outputs["cls_logits"][0].astype(float), outputs["bbox_regression"][0].astype(float)
    if rules["activation"] == "softmax":
        scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    else:
        scores = 1 / (1 + np.exp(-logits))
        if rules["activation"] == "sqrt(sigmoid * sigmoid(bbox_ctrness))":
            scores = np.sqrt(scores / (1 + np.exp(-outputs["bbox_ctrness"][0].astype(float))))
    scores = np.delete(scores, rules["background_column"], axis=1)
    centre, side = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    coder = rules["box_coder"]
    if coder["kind"] == "distances":
        boxes = np.concatenate([centre - side * offsets[:, :2], centre + side * offsets[:, 2:]], axis=1)
    else:
        offsets = offsets / coder["weights"]
        centre = centre + side * offsets[:, :2]
        half = side * np.exp(np.minimum(offsets[:, 2:], coder["max_log_scale"])) / 2
        boxes = np.concatenate([centre - half, centre + half], axis=1)
    boxes = boxes.clip(0, [size[1], size[0]] * 2)
    candidates = []
    groups = range(scores.shape[1]) if rules["candidates_per"] == "class" else range(len(rules["levels"]))
    for group in groups:
        pairs = [(scores[a, k], a, k) for a in range(len(boxes)) for k in range(scores.shape[1])]
        mine = [
            each for each in pairs if group == (each[2] if rules["candidates_per"] == "class" else level_of[each[1]])
        ]
        candidates += sorted((each for each in mine if each[0] > rules["score_threshold"]), reverse=True)[
            : rules["candidates"]
        ]
    kept = []
    for score, a, k in sorted(candidates, reverse=True):
        if len(kept) < rules["max_detections"] and all(
            k != other or iou(boxes[a], boxes[b]) <= rules["nms_threshold"] for _, b, other in kept
        ):
            kept.append((score, a, k))
    return [boxes[[a for _, a, _ in kept]], np.array([s for s, _, _ in kept]), np.array([k + 1 for _, _, k in kept])]


def iou(a: np.ndarray, b: np.ndarray) -> float:
    both = np.prod(np.maximum(0, np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])))
    union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - both
    return both / union if union else 0.0


def test_json_alone_says_how_boxes_are_made(case, tmp_path):
    kind, run, image, _ = case
    size, padded = image.shape[1:], torch.zeros(96, 96).shape if kind == "ssd" else (64, 96)
    for int8 in (False, True):
        dense, _ = export_run(run, "onnx", tmp_path / f"dense{int8}.onnx", int8=int8)
        described = json.loads(dense.with_name(f"{dense.name}.json").read_text())
        rules = described["decoding"]
        colour = torch.tensor(rules["pad_colour"]).view(3, 1, 1)
        entry = colour.repeat(1, *padded)
        entry[:, : size[0], : size[1]] = image
        found = decode(dict(zip(described["outputs"], run_file(dense, entry), strict=True)), rules, size, padded)
        if int8:  # its detector is the file itself
            whole, _ = export_run(run, "onnx", tmp_path / "whole.onnx", int8=True, nms=True)
            keys = ("boxes", "scores", "labels")
            expected = dict(zip(keys, map(torch.from_numpy, run_file(whole, image)), strict=True))
        else:
            expected = boxes_of(run, image)
        expect_same(*found, expected, 100)


OPENVINO = """
import sys

import numpy as np
import openvino

path, images, out = sys.argv[1:]
compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
results = compiled({"images": np.load(images)})
np.savez(out, *(results[output] for output in compiled.outputs))
"""


def run_openvino(path: Path, images: np.ndarray) -> list[np.ndarray]:
    """The outputs of a file, from a process of its own: beside OpenVINO, a film that is written and stopped ends it."""
    pytest.importorskip("openvino")
    files = [str(path.with_suffix(suffix)) for suffix in (".npy", ".npz")]
    np.save(files[0], images)
    subprocess.run([sys.executable, "-c", OPENVINO, str(path), *files], check=True)
    with np.load(files[1]) as found:
        return [found[f"arr_{number}"] for number in range(len(found.files))]


def test_openvino_runs_the_files(case, tmp_path):
    kind, run, image, _ = case
    for nms in (False, True):
        path, _ = export_run(run, "onnx", tmp_path / f"{nms}.onnx", nms=nms)
        entry = image if nms or kind == "ssd" else torch.nn.functional.pad(image, (0, 6))
        found = run_openvino(path, entry[None].numpy())
        if nms:
            expect_same(*found, boxes_of(run, image), 100)
        else:
            for ours, theirs in zip(run_file(path, entry), found, strict=True):
                np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_openvino_runs_a_spiking_vgg_in_integers(tmp_path):
    path, _ = export_run(make_run(tmp_path / "run", CLASSIFIER), "onnx", int8=True)
    images = np.random.default_rng(0).random((1, 3, 32, 32), np.float32)
    (found,) = run_openvino(path, images)
    np.testing.assert_allclose(found, run_file(path, torch.from_numpy(images[0]))[0], atol=1e-4)


def test_a_file_with_boxes_predicts_and_is_evaluated_as_its_run(tmp_path):
    least = boxes_of(make_run(tmp_path / "all", recipe_of("retinanet")), image_for("retinanet"))["scores"][80].item()
    run = make_run(tmp_path / "run", recipe_of("retinanet", score_threshold=least))
    path, _ = export_run(run, "onnx", nms=True)
    file, predictor = OnnxDetector(path, threads=1), detection.load(run, device="cpu")
    for shape in ((123, 201, 3), (10, 3000, 3), (40, 30, 3)):  # resized, padded before, enlarged
        pixels = np.random.default_rng(1).integers(0, 255, shape, dtype=np.uint8)
        ours, theirs = (each.predict(pixels, score_threshold=least) for each in (file, predictor))
        agree(ours, theirs)
        higher = ours.scores.median().item()
        assert len(file.predict(pixels, score_threshold=higher)) == (ours.scores > higher).sum() > 0
    for options in ({"score_threshold": least / 2}, {"nms_threshold": 0.4}):
        with pytest.raises(ValueError, match=r"this file has chosen its boxes with .* and 0\.5"):
            file.predict(pixels, **{"score_threshold": least} | options)
    metrics = evaluate_file(path, with_log(run, dict.fromkeys(METRICS, 0.0)))["file"]
    plain = evaluate_file(export_run(run, "onnx")[0], run)["file"]
    assert metrics == pytest.approx(plain, abs=1e-3) and metrics["AR100"] > 0.01
    assert benchmark_file(path, repeats=2, data_root=tmp_path / "data").metrics == metrics


def test_a_size_of_its_own(tmp_path):
    run = make_run(tmp_path / "run", recipe_of("fcos"))
    path, described = export_run(run, "onnx", nms=True, height=50, width=70)
    assert described["inputs"]["images"]["shape"] == [1, 3, 50, 70]
    image = torch.rand(3, 50, 70)
    boxes, scores, _ = run_file(path, image)
    assert len(scores) == 100 and (boxes >= 0).all() and (boxes <= [70, 50, 70, 50]).all()


def test_a_benchmark_on_the_command_line(monkeypatch, capsys, tmp_path):
    run = make_run(tmp_path / "run", CLASSIFIER)
    path, _ = export_run(run, "onnx")
    from detection.cli.benchmark import main

    main([str(path), "--data.root", str(tmp_path / "data"), "--repeats", "3", "--threads", "1"])
    out = capsys.readouterr().out
    metrics = evaluate_file(path, with_log(run, {"top1": 0.0, "top5": 0.0}))["file"]
    assert f"{metrics['top1']:.4f}" in out and "32x32 pixels" in out and "images per second" in out
    found = benchmark_file(path, repeats=4)
    assert len(found.seconds) == len(found.whole_seconds) == 4 and not found.metrics
    assert found.median == pytest.approx(np.median(found.seconds))
    known = Benchmark(path, (32, 48), 1, (0.004, 0.001, 0.002, 0.003, 0.1), (0.0,), {})
    assert str(known) == f"{path}: 3.00 ms (2.00 to 4.00) for an image of 48x32 pixels, 1 thread"


@pytest.mark.parametrize("recipe", [CLASSIFIER, recipe_of("retinanet", score_threshold=0.001)])
def test_a_torch_program_is_benchmarked_as_the_onnx_file_of_its_run(recipe, tmp_path):
    run = make_run(tmp_path / "run", recipe)
    path, _ = export_run(run, "torch")
    found = benchmark_file(path, repeats=2, data_root=tmp_path / "data")
    same = benchmark_file(export_run(run, "onnx")[0], repeats=2, data_root=tmp_path / "data")
    assert found.size == same.size and found.metrics == pytest.approx(same.metrics, abs=1e-3)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.pt2: damaged, or not the file that model\.pt2\.json tells of"):
        benchmark_file(path)
    path.with_name("model.pt2.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model\.pt2\.json: missing or damaged, and it says what model\.pt2 takes"):
        benchmark_file(path)
    with pytest.raises(ValueError, match=r"a NIR file is run by .* \(allowed: \.onnx, \.pt2, \.events\)"):
        benchmark_file(tmp_path / "model.nir")


def test_bad_input_is_one_sentence(monkeypatch, capsys, tmp_path):
    classifier = make_run(tmp_path / "classifier", CLASSIFIER)
    assert "a network of the task classification finds no boxes" in error_of(monkeypatch, capsys, classifier, "--nms")
    torch_format = ("--nms", "--format", "torch")
    assert "--nms: a file of the format torch" in error_of(monkeypatch, capsys, classifier, *torch_format)
    ssd = make_run(tmp_path / "ssd", recipe_of("ssd"))
    size = ("--nms", "--height", 64, "--width", 96)
    assert "this detector takes 96 and 96 alone" in error_of(monkeypatch, capsys, ssd, *size)
    regions = recipe_of("fasterrcnn")
    regions["model"] |= {"neck": {"out_channels": 16}, "head": {"representation_size": 16}}
    assert "it pools regions" in error_of(monkeypatch, capsys, make_run(tmp_path / "regions", regions), "--nms")
    with pytest.raises(FileNotFoundError, match=r"none\.onnx: no such file"):
        benchmark_file(tmp_path / "none.onnx")
    path, _ = export_run(classifier, "onnx")
    for name in ("threads", "repeats"):
        with pytest.raises(ValueError, match=f"--{name} 0: at least 1"):
            benchmark_file(path, **{name: 0})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        recipe = json.loads(json.dumps(CLASSIFIER))
        recipe["data"] = {"format": "cifar10", "classes": [str(k) for k in range(10)]}
        cifar, _ = export_run(make_run(tmp_path / "cifar", recipe), "onnx")
        benchmark_file(cifar, repeats=1, data_root=tmp_path / "nowhere")
    model = onnx.load(path)
    (entry,) = model.metadata_props[:1]
    described = json.loads(entry.value)
    entry.value = json.dumps(described | {"data": {"format": "synthetic", "size": 32}})
    onnx.save(model, tmp_path / "old.onnx")
    with pytest.raises(ValueError, match="does not say which images it is evaluated on; export it again"):
        benchmark_file(tmp_path / "old.onnx", repeats=1, data_root=tmp_path / "data")


def test_the_lines_of_the_readme_give_boxes(monkeypatch, tmp_path):
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (lines,) = [each for each in text.split("```python\n")[1:] if "InferenceSession" in each]
    lines = lines.partition("```")[0]
    run = make_run(tmp_path / "runs" / "demo", recipe_of("retinanet"))
    run_tool(monkeypatch, "export", run, "--nms")
    from PIL import Image

    Image.fromarray(np.full((70, 100, 3), 90, np.uint8)).save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(lines, names)
    assert names["boxes"].shape == (100, 4) and len(names["scores"]) == len(names["labels"]) == 100
