"""The training loop: numbers that go wrong, accumulation, precisions, and what a checkpoint holds."""

import json
import mmap
import os
import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers import log_lines, run_tool
from test_resume import CLASSIFICATION, DETECTION, write_recipe
from torch import nn

import detection
from backbones import HoyerSpike, tensors_to_bytes
from backbones.arithmetic import BinaryConv2d
from detection.records import Evaluation, RunInfo
from detection.runs import Run
from detection.tasks.recipes import ClassificationRecipe
from detection.training.checkpoint import FILE, Checkpoint
from detection.training.memory import forget_peak_memory, peak_memory
from detection.training.precision import widen_narrow_maps
from detection.training.signals import Interrupted
from detection.training.trainer import Trainer

# Numbers that went wrong


class Batches:
    """Four batches of two images, by the loop's contract."""

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        self.first = first

    def __len__(self) -> int:
        return 4

    def __iter__(self):
        for index in range(self.first, 4):
            yield torch.full((2, 1, 4, 4), 1.0 + index), [{"image_id": 10 * index}, {"image_id": 10 * index + 1}]


class Goal:
    """What the trainer asks of a task, of one whose evaluations find nothing."""

    best_by, headline, prediction_layers, parts = "none", ("none",), (), {}

    def is_at_chance(self, metrics) -> bool:
        return False

    def describe_batch(self, batch) -> str:
        return f"image ids {', '.join(str(target['image_id']) for target in batch[1])}"


def fit_by(config: ClassificationRecipe, model: torch.nn.Module, batches, losses, folder: Path) -> Run:
    """Train by the loop itself."""
    run = Run.create(folder, config, RunInfo(command="test"))
    trainer = Trainer(
        model,
        batches,
        losses=losses,
        evaluate=lambda model: Evaluation(metrics={}),
        goal=Goal(),
        config=config,
        run=run,
        accelerator=Accelerator(),
    )
    assert trainer.fit().to_json() == log_lines(folder)[-1]
    return run


def fit(model: torch.nn.Module, compute_losses, folder: Path, **train) -> Run:
    values = CLASSIFICATION | {"train": {"epochs": 2, "save_steps": 2} | train, "hoyer": {"weight": 0.01}}
    config = ClassificationRecipe.model_validate(values)
    return fit_by(config, model, Batches(), compute_losses, folder)


def test_a_gradient_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path):
    model = torch.nn.Conv2d(1, 1, 1)

    def losses(model, batch):
        images, _ = batch
        out = model(images).mean()
        # The root of 0 has no finite slope, though the loss is 0.
        return {"task": out, "root": (0 * out.square()).sqrt() if images[0, 0, 0, 0] == 4 else out * 0}

    with pytest.raises(FloatingPointError, match=r"gradient is not finite in epoch 1, step 4: task .*, root 0; image"):
        fit(model, losses, tmp_path / "run")
    state = Checkpoint.load(tmp_path / "run")
    assert state.progress["step"] == 2
    assert all(value.isfinite().all() for value in state.network.values())


def test_a_loss_that_is_not_finite_names_its_images(tmp_path):
    def losses(model, batch):
        out = model(batch[0]).mean()
        return {"task": out * float("nan") if batch[0][0, 0, 0, 0] == 2 else out}

    with pytest.raises(FloatingPointError, match="loss is not finite in epoch 1, step 2: task nan; image ids 10, 11"):
        fit(torch.nn.Conv2d(1, 1, 1), losses, tmp_path / "run")


def test_what_fails_behind_a_signal_is_a_stop(tmp_path):
    """As torch's compiler does whose own process got the signal, too; without one it stays an error."""

    def fail(model, batch):
        raise RuntimeError("compile error")

    def fail_behind_a_signal(model, batch):
        os.kill(os.getpid(), signal.SIGTERM)
        fail(model, batch)

    with pytest.raises(RuntimeError, match="compile error"):
        fit(torch.nn.Conv2d(1, 1, 1), fail, tmp_path / "failed")
    with pytest.raises(Interrupted, match=r"^stopped together with processes of its own; go on with: ") as stop:
        fit(torch.nn.Conv2d(1, 1, 1), fail_behind_a_signal, tmp_path / "stopped")
    assert stop.value.number == signal.SIGTERM


def test_a_silent_layer_is_named(tmp_path, capsys):
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), HoyerSpike(1), torch.nn.Conv2d(1, 1, 1), HoyerSpike(1))
    with torch.no_grad():
        for layer, bias in ((model[0], 2.0), (model[2], -50.0)):
            layer.weight.fill_(1)
            layer.bias.fill_(bias)
    run = fit(model, lambda model, batch: {"task": model(batch[0]).mean()}, tmp_path / "run", epochs=1)
    assert [line.silent for line in run.history()] == [["3"]]
    assert "warning: spike layers silent in epoch 1: 3\n" in capsys.readouterr().err


def test_accumulated_batches_have_the_hoyer_term_of_one_batch(tmp_path):
    """Equal batches: two of them, accumulated, are one of twice the size, in both reductions, to the last digits."""

    class Same(Batches):
        def __init__(self, repeat: int, number: int) -> None:
            self.repeat, self.number = repeat, number

        def __len__(self) -> int:
            return self.number

        def __iter__(self):
            for _ in range(self.number):
                yield torch.linspace(-1, 3, 16).view(1, 1, 4, 4).repeat(self.repeat, 1, 1, 1), []

    for reduction in ("sum", "mean"):
        lines = []
        for repeat, number, accumulate in ((4, 1, 1), (2, 2, 2), (1, 4, 4)):
            values = CLASSIFICATION | {
                "train": {"epochs": 2, "accumulate": accumulate},
                "hoyer": {"weight": 0.5, "reduction": reduction},
            }
            config = ClassificationRecipe.model_validate(values)
            torch.manual_seed(0)
            run = fit_by(
                config,
                torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), HoyerSpike(2), torch.nn.Conv2d(2, 1, 1)),
                Same(repeat, number),
                lambda model, batch: {"task": model(batch[0]).square().mean()},
                tmp_path / f"{reduction}{repeat}",
            )
            lines.append(log_lines(run.folder))
        for epoch in range(2):
            for other in lines[1:]:
                for key in ("loss", "loss/task", "loss/hoyer"):
                    assert other[epoch][key] == pytest.approx(lines[0][epoch][key], rel=1e-5)
                assert other[epoch]["v_th"] == pytest.approx(lines[0][epoch]["v_th"], rel=1e-5)
                assert other[epoch]["hoyer_per_layer"] == pytest.approx(lines[0][epoch]["hoyer_per_layer"], rel=1e-5)


class Refusal(detection.Callback):
    """Makes passes of a training fail as a BatchNorm does that has a single value per channel."""

    def __init__(self, *numbers: int) -> None:
        self.numbers, self.passes = numbers, 0

    def on_train_begin(self, run: Run, network: torch.nn.Module) -> None:
        network.register_forward_pre_hook(self.count)

    def count(self, network: torch.nn.Module, inputs) -> None:
        self.passes += network.training
        if network.training and self.passes in self.numbers:
            raise ValueError("Expected more than 1 value per channel when training, got an odd size")


@pytest.mark.parametrize("reduction", ["mean", "sum", "network"])
def test_the_layers_of_a_step_add_up_where_a_batch_was_left_out(tmp_path, reduction):
    values = {key: CLASSIFICATION[key] for key in ("task", "model", "optimizer")}
    values["data"] = {"format": "synthetic", "size": 32, "num_train": 16, "num_val": 4, "root": str(tmp_path / "data")}
    values |= {"hoyer": {"weight": 0.01, "reduction": reduction}}
    values |= {"train": {"epochs": 1, "batch_size": 4, "accumulate": 2, "precision": "no"}}
    detection.train(values, tmp_path / "run", callbacks=Refusal(4))
    (line,) = log_lines(tmp_path / "run")
    assert line["loss/hoyer"] == pytest.approx(0.01 * sum(line["hoyer_per_layer"].values()), rel=1e-5)


def test_precisions_agree(monkeypatch, tmp_path):
    """The same small recipe in three precisions: it learns, and the losses are within 10 % of float32's throughout.

    That is no rounding error: a potential that rounds to the other side of its threshold is another spike.
    """
    curves = {}
    for precision in ("no", "bf16", "fp16"):
        train = {"precision": precision, "epochs": 5, "batch_size": 4, "eval_every": 5, "ema_decay": 0}
        recipe = write_recipe(tmp_path, DETECTION, train=train)
        overrides = ["data.workers=0", "data.scenes.num_train=32", "--model.min_size", "64"]
        run_tool(monkeypatch, "train_det", recipe, *overrides, "--out", tmp_path / precision)
        curves[precision] = [line.loss for line in Run.open(tmp_path / precision).history()]
    assert curves["no"][-1] < 0.8 * curves["no"][0]
    assert curves["fp16"] != curves["no"] != curves["bf16"]  # they do compute otherwise
    for precision in ("bf16", "fp16"):
        assert curves[precision] == pytest.approx(curves["no"], rel=0.1)


@pytest.mark.parametrize(
    ("kind", "kernel", "stride", "groups"),
    [
        (nn.Conv2d, 1, 2, 1),
        (nn.Conv2d, 3, 2, 1),
        (nn.Conv2d, 7, 2, 1),
        (nn.Conv2d, 3, 3, 1),
        (nn.Conv2d, 3, 4, 1),
        (nn.Conv2d, 3, 2, 4),
        (BinaryConv2d, 3, 2, 1),
    ],
)
def test_weights_of_strided_convolutions_get_whole_gradients_from_narrow_maps(kind, kernel, stride, groups):
    generator = torch.Generator().manual_seed(0)
    convolution = kind(16, 16, kernel, stride=stride, padding=kernel // 2, groups=groups)
    widen_narrow_maps(nn.Sequential(convolution))
    assert isinstance(convolution, kind) and set(convolution.state_dict()) == {"weight", "bias"}
    for shape in ((4, 16, 1, 1), (4, 16, 3, 1), (4, 16, 3, 2), (4, 16, 3, 4)):
        x = torch.randn(shape, generator=generator).bfloat16().float()
        with torch.no_grad():
            convolution.weight.copy_(convolution.weight.bfloat16())
            convolution.bias.zero_()
        gradients = []
        for enabled in (True, False):
            waste = [torch.full((size,), torch.nan) for size in (16 * 16 * kernel**2, 4096, 65536) for _ in range(9)]
            del waste  # whose memory is used next
            convolution.weight.grad = None
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                y = convolution(x)
            assert y.shape[2:] == ((shape[2] - 1) // stride + 1, (shape[3] - 1) // stride + 1)
            y.float().sum().backward()
            gradients.append(convolution.weight.grad.float())
        torch.testing.assert_close(gradients[0], gradients[1], rtol=0.02, atol=0.05)


def test_no_overflow_where_sums_exceed_fp16():
    layer = HoyerSpike(8)
    u = torch.full((4, 8, 64, 64), 0.9, dtype=torch.float16, requires_grad=True)  # sum c = 118,000 > 65,504
    out = layer(u)
    assert layer.extremum.item() == pytest.approx(0.9, rel=1e-3) and out.dtype == torch.float16
    layer._penalty.backward()
    assert layer._penalty.item() == pytest.approx(u.numel(), rel=1e-3)
    assert u.grad.isfinite().all() and layer.v_th.grad.isfinite()


# The checkpoint


def checkpoint(**changes) -> Checkpoint:
    """One whose parts hold whatever `changes` say."""
    empty = {key: {} for key in ("recipe", "progress", "network", "optimizer", "schedule")}
    return Checkpoint(**empty | {"processes": [], "average": None, "scaler": None} | changes)


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    progress = {"numbers": [1, -2.5, 0.1 + 0.2, float("-inf"), True, None, "text"], "pair": (1, ("a", 2))}
    optimizer = {3: {"tensor": torch.arange(3), "scalar": torch.tensor(0.5), "empty": torch.zeros(0, 4)}}
    network = {"bf16": torch.tensor([1.0, 3.0], dtype=torch.bfloat16)}
    assert Checkpoint.load(tmp_path) is None
    checkpoint(progress=progress, optimizer=optimizer, network=network).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE] == ["state.safetensors"]
    found = Checkpoint.load(tmp_path)
    assert found.progress == progress and found.optimizer.keys() == {3}
    assert (found.average, found.scaler, found.processes, found.recipe) == (None, None, [], {})
    for name, value in optimizer[3].items():
        assert torch.equal(found.optimizer[3][name], value) and found.optimizer[3][name].dtype == value.dtype
    assert torch.equal(found.network["bf16"], network["bf16"])
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(TypeError, match="not set"):
        checkpoint(progress={"a": {1, 2}}).save(tmp_path)
    assert (tmp_path / FILE).read_bytes() == before


def write_tree(folder: Path, tree: object) -> None:
    """A file of state with a tree of one's own, as the format has it, and one tensor."""
    (folder / FILE).write_bytes(tensors_to_bytes({"0": torch.ones(2)}, json.dumps(tree)))


def test_a_checkpoint_of_an_earlier_version_is_refused_by_name(tmp_path, attempt):
    """0.1 had no version in it, and other keys: it must not be taken for this one's."""
    keys = {"recipe": {"items": [["train.seed", 0]]}, "progress": {"items": [["epoch", 2], ["step", 1]]}}
    keys |= {"network": {"items": [["weight", {"tensor": "0"}]]}, "processes": []}
    keys |= {"average": None, "optimizer": {"items": []}, "schedule": {"items": []}, "scaler": None}
    old = {"items": [[key, value] for key, value in keys.items()]}
    write_tree(tmp_path, old)
    with attempt("damaged files"), pytest.raises(ValueError) as error:
        Checkpoint.load(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / FILE}: a checkpoint of version 1, this program reads version 2; ")
    assert "finish that training with the version that began it" in str(error.value)
    write_tree(tmp_path, {"items": [*old["items"], ["version", 3]]})
    with (
        attempt("damaged files"),
        pytest.raises(ValueError, match="a checkpoint of version 3, this program reads version 2"),
    ):
        Checkpoint.load(tmp_path)
    write_tree(tmp_path, {"items": [*old["items"], ["version", 2]]})
    assert torch.equal(Checkpoint.load(tmp_path).network["weight"], torch.ones(2))


def test_a_file_that_is_no_checkpoint_is_refused_by_name(tmp_path, attempt):
    (tmp_path / FILE).write_bytes(tensors_to_bytes({"weight": torch.ones(2)}))
    with (
        attempt("damaged files"),
        pytest.raises(ValueError, match=r"state\.safetensors: not the checkpoint of a training"),
    ):
        Checkpoint.load(tmp_path)
    for tree in ([1, 2], "text", {"other": 1}, {"tensor": "9"}, {"items": [["version", 2], ["network", 3]]}):
        write_tree(tmp_path, tree)
        with (
            attempt("damaged files"),
            pytest.raises(ValueError, match=r"state\.safetensors: not the checkpoint of a training"),
        ):
            Checkpoint.load(tmp_path)


# Memory


def test_peak_memory_is_that_since_it_was_forgotten():
    cpu = torch.device("cpu")
    forget_peak_memory()
    before = peak_memory(cpu)
    block = mmap.mmap(-1, 64 * 2**20)  # of the system: the allocator might have as much at hand
    block[:: mmap.PAGESIZE] = b"1" * (len(block) // mmap.PAGESIZE)
    high = peak_memory(cpu)
    assert 60 < high - before < 80
    block.close()
    assert peak_memory(cpu) == pytest.approx(high, abs=2)  # the most there was, as exactly as Linux counts
    forget_peak_memory()
    assert peak_memory(cpu) < high - 50
