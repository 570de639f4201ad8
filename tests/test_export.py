"""Exported files: what they hold, whether they give what PyTorch gives, and what is refused."""

import builtins
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import run_tool
from PIL import Image
from test_fold import classifier, detector, scramble
from torch import fx, nn

import backbones
import detection
from backbones.deploy.fold import ChannelThreshold, fold
from backbones.deploy.integer import IntegerSpikes, fix_size, to_integers
from detection.config import parse_recipe
from detection.evaluation import METRICS
from detection.exporters import (
    OnnxClassifier,
    OnnxDetector,
    OnnxFile,
    ParityError,
    check_nir,
    check_onnx,
    evaluate_file,
    export_run,
    run_nir,
    to_nir,
    to_onnx,
)
from detection.exporters import run as export
from detection.exporters.inference import METADATA_KEY
from detection.exporters.onnx import OPSET, _OnnxWriter
from detection.files import write_whole
from detection.models.dense import DensePredictions, DetectorOf, resize_and_pad
from detection.records import EpochLog, RunInfo
from detection.runs import Run
from detection.tasks import task_of
from detection.tasks.evaluate import evaluate_run
from detection.tasks.predictions import Prediction
from detection.tasks.run import load_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
nir = pytest.importorskip("nir")

DETECTOR = {
    "task": "detection",
    "model": {
        "detector": "retinanet",
        "backbone": {"name": "resnet18", "width": 0.125},
        "neck": {"out_channels": 16, "levels": ["c3", "c4"], "extra_levels": 0},
        "head": {"num_convs": 1, "norm": "group", "score_threshold": 0.0},
        "min_size": [64],
        "max_size": 96,
    },
    "data": {"format": "synthetic", "classes": ["circle", "square", "star"], "workers": 0},
}
CLASSIFIER = {
    "task": "classification",
    "model": {"backbone": {"name": "vgg11", "width": 0.125, "stem": "cifar"}},
    "data": {
        "format": "synthetic",
        "num_train": 40,
        "num_val": 10,
        "size": 32,
        "classes": ["circle", "square", "triangle", "star"],
    },
}


def make_run(folder: Path, recipe: dict, **backbone) -> Path:
    """A run folder with random weights, statistics and thresholds."""
    recipe = json.loads(json.dumps(recipe))
    recipe["model"]["backbone"] |= backbone
    recipe["data"]["root"] = str(folder.parent / "data")
    config = parse_recipe(recipe, "recipe")
    torch.manual_seed(0)
    model = scramble(task_of(config).build_model())
    run = Run.create(folder, config, RunInfo(command="made by hand"))
    run.save(model, "last")
    return folder


def session(model) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def error_of(monkeypatch, capsys, *arguments) -> str:
    """The one sentence with which the tool refuses."""
    with pytest.raises(SystemExit) as stop:
        run_tool(monkeypatch, "export", *arguments)
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    return line


# --- graphs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vgg11", {}),
        ("vgg11", {"pool_first": False}),
        ("resnet18", {}),
        ("resnet18", {"shortcut": "real", "thresholds": 2}),
        ("resnet50", {"pool_first": False}),
        ("mobilenetv1", {}),
        ("mobilenetv2", {}),
    ],
)
def test_onnx_gives_what_pytorch_gives(name, options):
    model = classifier(name, **options)
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    dynamic = name != "vgg11"
    folded = fold(model) if dynamic else fix_size(fold(model), images[:1])
    integers = to_integers(folded, images)
    batches = [images[:1], torch.randn(3, 3, 45, 37) if dynamic else images[:5]]
    for network in (folded, integers):
        file = to_onnx(network, dynamic_size=dynamic, example=images[:1], outputs=["logits"])
        report = check_onnx(file, network, batches)
        assert report["spikes"] > 1000 and report["flipped_by_rounding"] <= 2
        assert report["largest_difference"] < 1e-5
    operations = {node.op_type for node in file.graph.node}
    assert "QLinearConv" in operations and "ConvInteger" not in operations
    assert [node.op_type for node in file.graph.node].count("Conv") == 1  # the stem's first


def test_integers_are_those_of_onnx_runtime_bit_by_bit():
    """Fed with spikes there is no floating point left that could round otherwise."""
    torch.manual_seed(0)
    model = scramble(
        nn.Sequential(
            backbones.HoyerSpike(8),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.BatchNorm2d(16),
            backbones.HoyerSpike(16),
            nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=16, bias=False),
            nn.BatchNorm2d(16),
            backbones.HoyerSpike(16),
            nn.Conv2d(16, 12, 1),
        )
    )
    images = torch.randn(8, 8, 17, 23)
    integers = to_integers(fold(model), images)
    assert any(m.inverted.any() for m in integers.modules() if isinstance(m, IntegerSpikes))
    file = to_onnx(integers, example=images, outputs=["y"])
    for x in (images, torch.randn(1, 8, 9, 5), torch.randn(3, 8, 64, 31)):
        (theirs,) = session(file).run(None, {"images": x.numpy()})
        assert np.array_equal(theirs, integers(x).numpy())
        assert len(np.unique(theirs)) > 20


def test_extreme_weights_do_not_saturate():
    """All of a channel's inputs active, all weights at the limit: sums far beyond 8 and 16 bits."""
    conv = nn.Conv2d(512, 4, 3, padding=1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([1.0, -1, 1, -1]).view(4, 1, 1, 1).expand_as(conv.weight))
        conv.weight[2:, :256] *= -1
    model = nn.Sequential(backbones.HoyerSpike(512), conv, backbones.HoyerSpike(4)).eval()
    integers = to_integers(fold(model), torch.randn(2, 512, 5, 5))
    (layer,) = [m for m in integers.modules() if isinstance(m, IntegerSpikes)]
    x = torch.full((1, 512, 5, 5), 9.0)
    for level in (127 * 512 * 9, 127 * 512 * 9 + 1, -127 * 512 * 9, 1, 0):
        layer.threshold.fill_(level)
        file = to_onnx(integers, example=x, outputs=["y"])
        (theirs,) = session(file).run(None, {"images": x.numpy()})
        assert np.array_equal(theirs, integers(x).numpy()), level
    assert theirs[0, :, 2, 2].tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize(
    ("kind", "body"),
    [("retinanet", "resnet18"), ("fcos", "vgg11"), ("ssd", "mobilenetv1"), ("retinanet", "mobilenetv2")],
)
def test_dense_detectors_in_every_form(kind, body):
    model = detector(kind, backbone={"name": body, "width": 0.125})
    dense = DensePredictions(model)
    x = torch.randn(2, 3, 64, 96)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.transform.image_mean, model.transform.image_std))
    with torch.no_grad():
        expected = model.head(list(model.backbone((x - mean) / std).values()))
        assert all(torch.equal(a, expected[name]) for name, a in zip(dense.outputs, dense(x), strict=True))
    folded = fold(dense)
    assert isinstance(folded, fx.GraphModule)
    batches = [torch.randn(1, 3, 96, 64), torch.randn(2, 3, 71, 97)]
    for network in (folded, to_integers(folded, torch.randn(4, 3, 64, 64), analogue=True)):
        file = to_onnx(network, example=x, outputs=dense.outputs)
        assert check_onnx(file, network, batches)["spikes"] > 10_000
    images = [torch.rand(3, 60, 90), torch.rand(3, 80, 64)]
    with torch.no_grad():
        boxes = model(images)
    rest = DetectorOf(
        detector(kind, backbone={"name": body, "width": 0.125}),
        lambda x: dict(zip(dense.outputs, dense(x), strict=True)),
    )
    for ours, theirs in zip(rest(images), boxes, strict=True):
        torch.testing.assert_close(ours["boxes"], theirs["boxes"], rtol=1e-3, atol=1e-2)
        assert torch.equal(ours["labels"], theirs["labels"])


def test_a_wrong_file_is_found_out():
    model = classifier("resnet18")
    network = fold(model)
    images = torch.randn(2, 3, 32, 32)
    file = to_onnx(network, example=images, outputs=["logits"])
    (layer,) = [m for name, m in network.named_modules() if name.endswith("stages.1.0.branch.0_threshold")]
    layer.threshold += 0.05
    with pytest.raises(ParityError, match=r"stages\.1\.0\.branch\.0_threshold: \d+ of \d+ spikes differ"):
        check_onnx(file, network, [images])
    layer.threshold -= 0.05
    network.get_submodule("head.4").bias.data += 0.1
    with pytest.raises(ParityError, match="output 'logits' differs"):
        check_onnx(file, network, [images])


# --- NIR --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pool_first"),
    [
        ("vgg11", True),
        ("vgg11", False),
        ("mobilenetv1", True),
        ("mobilenetv2", True),
        ("resnet18", True),
        ("resnet50", True),
        ("resnet18 of three thresholds", True),
        ("vgg11 of three thresholds", True),
        ("vgg11 of three thresholds", False),
    ],
)
def test_nir_gives_what_pytorch_gives(name, pool_first, tmp_path):
    name, _, several = name.partition(" of three ")
    options = {"head": "pooled"} if name == "vgg11" else {"shortcut": "real", "norm_first": True}
    model = classifier(name, pool_first=pool_first, **({"thresholds": 3} | options if several else {}))
    x = torch.randn(2, 3, 32, 32)
    if several and name == "vgg11":
        assert isinstance(model.head[0], nn.AdaptiveAvgPool2d)  # NIR has no average of maxima
        model.head[0], x = nn.Identity(), x[..., :16, :16]
    if name.startswith("resnet"):
        with torch.no_grad():
            x = model.backbone.stem(x)
        model.backbone.stem = nn.Identity()
    network = fold(model)
    graph = to_nir(network, x)
    nir.write(tmp_path / "graph.nir", graph)
    back = nir.read(tmp_path / "graph.nir")
    assert check_nir(back, graph, network, x)["largest_difference"] < 1e-9
    kinds = {type(node).__name__ for node in back.nodes.values()}
    assert "Threshold" in kinds and not kinds & {"LIF", "IF", "CubaLIF"}
    for node in back.nodes.values():
        if isinstance(node, nir.Affine):
            node.bias = node.bias + 1
    with pytest.raises(ParityError, match="read back is not what was written"):
        check_nir(back, graph, network, x)


def test_nir_says_what_it_lacks():
    with pytest.raises(ValueError, match=r"NIR has no maximum of real values, which backbone\.stem"):
        to_nir(fold(classifier("resnet18")), torch.randn(1, 3, 32, 32))
    model = classifier("resnet18")
    model.backbone.stem = nn.Identity()
    with pytest.raises(ValueError, match="multiples of the network's last stride"):
        to_nir(fold(model), torch.randn(1, 8, 33, 32))
    model = classifier("resnet18", shortcut="real")
    model.backbone.stem = nn.Identity()
    with pytest.raises(ValueError, match=r"whole windows only, and backbone\.stages\.2\.0\.shortcut\.pool has .* 9x8 "):
        to_nir(fold(model), torch.randn(1, 8, 18, 16))
    with pytest.raises(ValueError, match="a node of the kind LI"):
        one = np.ones((1, 2, 2))
        nodes = {"input": nir.Input({"input": np.array([1, 2, 2])}), "a": nir.LI(one, one, one), "output": None}
        nodes["output"] = nir.Output({"output": np.array([1, 2, 2])})
        run_nir(nir.NIRGraph(nodes, [("input", "a"), ("a", "output")]), torch.ones(1, 1, 2, 2))


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detector_run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "detector", DETECTOR)


@pytest.fixture(scope="module")
def classifier_run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "classifier", CLASSIFIER)


def test_a_detector_as_onnx_finds_the_same_boxes(detector_run, monkeypatch, capsys, tmp_path):
    run_tool(monkeypatch, "export", detector_run, "--out", tmp_path / "net.onnx")
    assert "agrees with PyTorch: spikes" in capsys.readouterr().out
    described = json.loads((tmp_path / "net.onnx.json").read_text())
    assert described["classes"] == ["circle", "square", "star"] and described["opset"] == OPSET
    assert described["inputs"]["images"]["shape"] == ["N", 3, "height", "width"]
    onnx.checker.check_model(onnx.load(tmp_path / "net.onnx"))
    exported = OnnxDetector(tmp_path / "net.onnx", threads=1)
    assert exported.class_names == ("circle", "square", "star")
    model = load_model(Run.open(detector_run))
    images = [torch.rand(3, 70, 101), torch.rand(3, 96, 64), torch.rand(3, 33, 31)]
    with torch.no_grad():
        expected = model(images)
    found = exported(images)
    scores = [torch.cat([each["scores"] for each in result]) for result in (found, expected)]
    torch.testing.assert_close(*scores, rtol=1e-2, atol=1e-3)
    share = torch.cat([(a["labels"] == b["labels"]).float() for a, b in zip(found, expected, strict=True)]).mean()
    assert share > 0.98 and len(scores[0]) > 100


def test_a_file_predicts_on_what_its_run_predicts_on(detector_run, classifier_run, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (70, 101, 3), dtype=np.uint8)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    kinds = [path, str(path), Image.open(path), pixels, pixels / 255, tensor, tensor / 255]
    thresholds = {"score_threshold": 0.0, "nms_threshold": 0.3}
    for run, cls, options in ((detector_run, OnnxDetector, thresholds), (classifier_run, OnnxClassifier, {})):
        predictor = detection.load(run, device="cpu")
        file = cls(export_run(run, "onnx", tmp_path / f"{run.name}.onnx")[0], threads=1)
        several, expected = (each.predict(kinds, batch_size=3, **options) for each in (file, predictor))
        assert [type(each) for each in several] == [type(each) for each in expected]
        for kind, ours, theirs in zip(kinds, several, expected, strict=True):
            agree(file.predict(kind, **options), theirs)
            agree(ours, theirs)
        for wrong in (iter(kinds), tmp_path / "none.png", 3.5):
            sentences = []
            for each in (file, predictor):
                with pytest.raises(ValueError, match=r"expected a path|no such file") as error:
                    each.predict(wrong)
                sentences.append(str(error.value))
            assert sentences[0] == sentences[1]
        with pytest.raises(ValueError, match=rf"colour: no option of {predictor.task.name} \(allowed: "):
            file.predict(path, colour="red")


def agree(ours, theirs) -> None:
    """Two predictions that differ by rounding at most."""
    assert (type(ours), ours.path, ours.class_names) == (type(theirs), theirs.path, theirs.class_names)
    assert np.array_equal(ours.image, theirs.image)
    if not isinstance(ours, Prediction):
        torch.testing.assert_close(ours.probabilities, theirs.probabilities, rtol=1e-2, atol=1e-3)
        return
    assert len(ours) == len(theirs) > 10 and ours.category_ids == theirs.category_ids
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-2, atol=1e-3)
    same = (ours.boxes - theirs.boxes).abs().amax(1) < 0.1
    assert same.float().mean() > 0.9 and (ours.labels == theirs.labels)[same].all()


def test_thin_images_in_a_file(detector_run, tmp_path, attempt):
    """Of 3000x10 pixels resizing to 96 would leave a third of one."""
    predictor = detection.load(detector_run, device="cpu")
    file = OnnxDetector(export_run(detector_run, "onnx", tmp_path / "net.onnx")[0], threads=1)
    for height, width in ((10, 3000), (3000, 10), (1, 500), (1, 1)):
        with attempt("mutated images"):
            pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
            ours, theirs = (each.predict(pixels, score_threshold=0) for each in (file, predictor))
            agree(ours, theirs)
            assert (ours.boxes >= 0).all() and (ours.boxes <= torch.tensor([width, height] * 2)).all()
            (called,) = file([torch.from_numpy(pixels).permute(2, 0, 1).float() / 255])
            assert torch.equal(called["boxes"], ours.boxes)
    thin = [torch.rand(3, 10, 3000), torch.rand(3, 64, 64)]
    assert resize_and_pad(predictor.model.transform, thin).shape == (2, 3, 64, 96)


def test_a_detector_in_integers_for_one_size(detector_run, monkeypatch, tmp_path):
    recipe = yaml.safe_load((detector_run / "config.yaml").read_text())
    scenes = {"num_train": 6, "num_val": 2, "size": 64}
    recipe["data"] |= {"scenes": scenes, "root": str(tmp_path / "scenes")}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "run" / "last.safetensors").write_bytes((detector_run / "last.safetensors").read_bytes())
    size = ("--height", "64", "--width", "96")
    run_tool(monkeypatch, "export", tmp_path / "run", "--int8", "--analogue-int8", "--calibration", "5", *size)
    file = tmp_path / "run" / "model_int8.onnx"
    described = json.loads(file.with_name("model_int8.onnx.json").read_text())
    assert described["calibration_images"] == 5 and described["analogue_int8"]
    exported = OnnxDetector(file, threads=1)
    assert len(exported([torch.rand(3, 64, 96)])[0]["boxes"]) > 0
    with pytest.raises(ValueError, match="for batches of 64x96 pixels"):
        exported([torch.rand(3, 64, 64)])


def with_log(run: Path, metrics: dict[str, float]) -> Path:
    """A run whose log has one line, with these metrics."""
    (run / "metrics.jsonl").unlink(missing_ok=True)
    Run.open(run).log(EpochLog(epoch=1, loss=1.0, evaluation={"metrics": metrics}))
    return run


def test_accuracy_of_a_file_beside_its_run(monkeypatch, capsys, tmp_path):
    recipe = json.loads(json.dumps(DETECTOR))
    recipe["data"] |= {"scenes": {"num_train": 6, "num_val": 5, "size": 64}}
    run = make_run(tmp_path / "detector", recipe)
    metrics = evaluate_run(with_log(run, dict.fromkeys(METRICS, 0.0)))[0].metrics
    run_tool(monkeypatch, "export", with_log(run, metrics), "--evaluate")
    assert "logged by the run" in capsys.readouterr().out
    measured = json.loads((run / "model.onnx.json").read_text())["evaluation"]
    assert measured["run"] == {key: metrics[key] for key in METRICS} and metrics["AR100"] > 0.02
    assert measured["file"] == pytest.approx(measured["run"], abs=1e-3)

    run = make_run(tmp_path / "classifier", CLASSIFIER)
    metrics = evaluate_run(with_log(run, {"top1": 0.0, "top5": 0.0}))[0].metrics
    run_tool(monkeypatch, "export", run, "--evaluate")  # beside a log without val_loss
    assert "val_loss" in capsys.readouterr().out
    with_log(run, metrics)
    _, described = export_run(run, "onnx", int8=True, evaluate=True)
    measured = described["evaluation"]
    assert measured["run"] == {key: metrics[key] for key in ("top1", "top5", "val_loss")}
    assert measured["file"]["top5"] == 1 and abs(measured["file"]["top1"] - metrics["top1"]) <= 0.3
    classifier = OnnxClassifier(run / "model_int8.onnx")
    images = torch.rand(3, 3, 32, 32)
    assert classifier(images).shape == (3, 4) and classifier.class_names == ("circle", "square", "triangle", "star")


def test_a_file_that_cannot_be_evaluated_is_not_left(classifier_run, monkeypatch, capsys, tmp_path):
    file = tmp_path / "net.onnx"
    assert "no such log" in error_of(monkeypatch, capsys, classifier_run, "--evaluate", "--out", file)
    assert not file.exists()
    formats = ("--format", "torch", "--evaluate")
    assert "hoyer-det benchmark FILE --data.root" in error_of(monkeypatch, capsys, classifier_run, *formats)

    def fill_the_disk(path: Path, content: bytes) -> None:
        if path.suffix == ".json":
            raise OSError(28, "No space left on device")
        write_whole(path, content)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(export, "write_whole", fill_the_disk)
        export_run(classifier_run, "onnx", file)
    export_run(classifier_run, "onnx", file)  # nothing is in the way
    with pytest.raises(ValueError, match=r"from a run of the task classification, .*other is of detection"):
        evaluate_file(file, with_log(make_run(tmp_path / "other", DETECTOR), dict.fromkeys(METRICS, 0.0)))


@pytest.mark.parametrize(("file_format", "suffix"), [("onnx", ".onnx"), ("torch", ".pt2")])
def test_a_classifier_in_integers(classifier_run, file_format, suffix, tmp_path):
    path, described = export_run(classifier_run, file_format, tmp_path / f"net{suffix}", int8=True)
    assert described["int8"] and described["calibration_images"] == 40  # all that there are
    assert described["inputs"]["images"]["shape"] == ["N", 3, 32, 32]
    images = torch.rand(6, 3, 32, 32)
    if file_format == "onnx":
        logits = torch.from_numpy(session(onnx.load(path)).run(None, {"images": images.numpy()})[0])
    else:
        logits = torch.export.load(path).module()(images)
    assert logits.shape == (6, 4) and logits.isfinite().all()


def test_torch_export_takes_other_sizes(tmp_path):
    run = make_run(tmp_path / "run", DETECTOR, name="vgg11")
    path, described = export_run(run, "torch", tmp_path / "net.pt2")
    assert described["parity"]["largest_difference"] < 1e-5
    program = torch.export.load(path).module()
    model = load_model(Run.open(run))
    images = torch.rand(2, 3, 96, 160)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.transform.image_mean, model.transform.image_std))
    with torch.no_grad():
        expected = model.head(list(model.backbone((images - mean) / std).values()))
        for ours, theirs in zip(program(images), expected.values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_torch_export_that_refuses_a_size_says_what_helps(tmp_path):
    recipe = json.loads(json.dumps(DETECTOR))
    recipe["model"] |= {"neck": {"out_channels": 16}, "max_size": 64}  # the last map has one cell
    run, file = make_run(tmp_path / "run", recipe), tmp_path / "net.pt2"
    with pytest.raises(ValueError, match=r"64x64 pixels and other sizes \(Guard failed: .*\): give height and width$"):
        export_run(run, "torch", file)
    assert not file.exists()
    export_run(run, "torch", file, height=np.int64(64), width=np.int64(64))


def test_images_are_padded_with_the_mean_colour():
    transform = detector("retinanet").transform
    images = [torch.rand(3, 64, 96), torch.rand(3, 64, 64)]
    padded = resize_and_pad(transform, images)
    assert padded.shape == (2, 3, 64, 96)
    torch.testing.assert_close(padded[0], images[0])
    mean = torch.tensor(transform.image_mean).view(3, 1, 1)
    torch.testing.assert_close(padded[1, :, :, 64:], mean.expand(3, 64, 32))
    assert transform.image_std != [1.0, 1.0, 1.0]


def test_runs_as_nir(detector_run, classifier_run, tmp_path):
    for run, outputs in ((detector_run, {"output_c3", "output_c4"}), (classifier_run, {"output"})):
        path, described = export_run(run, "nir", tmp_path / f"{run.name}.nir")
        graph = nir.read(path)
        assert {name for name, node in graph.nodes.items() if isinstance(node, nir.Output)} == outputs
        assert described["parity"]["numbers_read_back"] > 10_000
        assert "stem" in described["inputs"]["input"] or run == classifier_run


def test_a_file_that_differs_is_not_left(detector_run, monkeypatch, tmp_path):
    def wrong(self, node, layer, out):  # comparisons that are off by a little
        layer = ChannelThreshold(layer.threshold + 0.1, layer.sign)
        right(self, node, layer, out)

    right = _OnnxWriter._threshold
    monkeypatch.setattr(_OnnxWriter, "_threshold", wrong)
    with pytest.raises(ParityError, match="spikes differ between file and PyTorch"):
        export_run(detector_run, "onnx", tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_one_sentence(detector_run, classifier_run, monkeypatch, capsys, tmp_path, attempt):
    assert "invalid choice: 'tflite'" in error_of(monkeypatch, capsys, detector_run, "--format", "tflite")
    with pytest.raises(ValueError, match=r"format 'tflite' \(allowed: onnx, torch, nir, events\)"):
        export_run(detector_run, "tflite")
    for side in ("64", 64.5, True):
        with pytest.raises(ValueError, match=f"--width: expected a whole number of at least 1, got {side!r}"):
            export_run(detector_run, out=tmp_path / "sized.onnx", height=64, width=side)
    (tmp_path / "net.onnx").touch()
    assert "exists already" in error_of(monkeypatch, capsys, detector_run, "--out", tmp_path / "net.onnx")
    assert "is not a run folder" in error_of(monkeypatch, capsys, tmp_path)
    assert "no folder" in error_of(monkeypatch, capsys, detector_run, "--out", tmp_path / "no" / "net.onnx")
    odd = ("--height", 48, "--width", 64)
    assert "padded to multiples of 32 pixels (--nms" in error_of(monkeypatch, capsys, detector_run, *odd)
    assert "both or none" in error_of(monkeypatch, capsys, detector_run, "--height", 64)
    small = ("--height", 8, "--width", 64)
    assert "at least 16, the network's last stride" in error_of(monkeypatch, capsys, classifier_run, *small)
    large = ("--height", 48, "--width", 48)
    assert "does not divide into the 2x2 cells" in error_of(monkeypatch, capsys, classifier_run, *large)
    assert "belongs to --int8" in error_of(monkeypatch, capsys, classifier_run, "--calibration", 3)
    none = ("--int8", "--calibration", 0)
    assert "--calibration: expected a whole number" in error_of(monkeypatch, capsys, classifier_run, *none)
    assert "NIR has no integers" in error_of(monkeypatch, capsys, classifier_run, "--int8", "--format", "nir")
    assert "goes with --int8" in error_of(monkeypatch, capsys, classifier_run, "--analogue-int8")
    twin = make_run(tmp_path / "twin", CLASSIFIER, activation="relu")
    assert "has no spike layers" in error_of(monkeypatch, capsys, twin, "--int8")
    regions = json.loads(json.dumps(DETECTOR)) | {"task": "detection"}
    regions["model"] |= {"detector": "fasterrcnn", "neck": {"out_channels": 16}, "head": {"representation_size": 16}}
    assert "it pools regions" in error_of(monkeypatch, capsys, make_run(tmp_path / "regions", regions))
    (tmp_path / "net.onnx").write_bytes(b"nothing")
    with attempt("damaged files"), pytest.raises(ValueError, match="damaged, or no ONNX file"):
        OnnxDetector(tmp_path / "net.onnx")


@pytest.mark.parametrize(("package", "file_format"), [("onnx", "onnx"), ("onnxruntime", "onnx"), ("nir", "nir")])
def test_a_missing_package_is_named(classifier_run, package, file_format, monkeypatch, capsys):
    plain = builtins.__import__

    def without(name, *arguments, **options):
        if name == package:
            raise ImportError(name)
        return plain(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    line = error_of(monkeypatch, capsys, classifier_run, "--format", file_format)
    assert line.endswith(f"this needs {package}: pip install hoyer-det[export]")


def test_a_twin_and_a_missing_file(tmp_path):
    twin = make_run(tmp_path / "twin", CLASSIFIER, activation="relu")
    path, described = export_run(twin, "onnx")
    assert path == twin / "model.onnx" and described["parity"]["spikes"] == 0
    with pytest.raises(ValueError, match="not a detector exported by this project"):
        OnnxDetector(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        OnnxDetector(tmp_path / "none.onnx")


@pytest.mark.parametrize("kind", ["detector", "classifier"])
def test_a_file_of_an_earlier_version_opens(kind, detector_run, classifier_run, tmp_path):
    run = detector_run if kind == "detector" else classifier_run
    path, _ = export_run(run, "onnx", tmp_path / "net.onnx")
    model = onnx.load(path)
    (entry,) = [entry for entry in model.metadata_props if entry.key == METADATA_KEY]
    description = json.loads(entry.value)
    for key in ("levels", "options"):  # which its recipes did not have yet
        del description["model"]["backbone"][key]
    if kind == "classifier":
        del description["model"]["mean"], description["model"]["std"]
    entry.value = json.dumps(description | {"plugins": []})
    onnx.save(model, tmp_path / "old.onnx")
    images = [torch.rand(3, 64, 96)] if kind == "detector" else torch.rand(2, 3, 32, 32)
    ours, theirs = (OnnxFile(tmp_path / name, threads=1)(images) for name in ("net.onnx", "old.onnx"))
    if kind == "detector":
        assert all(torch.equal(ours[0][key], theirs[0][key]) for key in ("boxes", "scores", "labels"))
        assert len(ours[0]["scores"]) > 0
    else:
        assert torch.equal(ours, theirs) and ours.shape == (2, 4)
    entry.value = json.dumps(description | {"task": "segmentation"})
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(ValueError, match=r"other\.onnx: task: expected detection or classification"):
        OnnxFile(tmp_path / "other.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(ValueError, match="not a network exported by this project"):
        OnnxFile(tmp_path / "foreign.onnx")
