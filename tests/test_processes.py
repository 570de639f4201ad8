"""Several processes train and evaluate as one, and end together when one of them dies."""

import json
import signal
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import set_seed
from helpers import log_lines, run_together, run_tool, start_together, tool, wait_until
from test_resume import CLASSIFICATION, DETECTION, expect_equal, write_recipe

from backbones import HoyerSpike
from backbones.weights import read_tensors
from detection.data.batches import TrainingBatches, evaluation_batches, take_share
from detection.files import require_writable
from detection.runs import Run
from detection.training.distributed import SyncBatchNorm, SyncBatchNorm1d, synchronise

MODEL = {"backbone": {"name": "resnet18", "width": 0.125}}


# One training over two processes


def tool_in_float64(name: str, *arguments) -> None:
    """In float32 the order of a sum decides now and then on which side of its threshold a potential lies."""
    torch.set_default_dtype(torch.float64)
    tool(name, *arguments)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_two_processes_are_one_with_twice_the_batch(attempt, tmp_path, reduction):
    values = CLASSIFICATION | {"model": MODEL, "hoyer": {"weight": 1e-4 if reduction == "sum" else 0.1}}
    recipe = write_recipe(tmp_path, values, train={"epochs": 2, "ema_decay": 0.5})
    options = [recipe, f"hoyer.reduction={reduction}", "data.num_train=40"]
    synced = ["--train.sync_batchnorm", "True", "--hoyer.sync", "True"]
    with attempt("two processes"):
        for name, number, extra in (("one", 1, []), ("two", 2, synced), ("apart", 2, [])):
            arguments = [*options, f"train.batch_size={16 // number}", *extra, "--out", tmp_path / name]
            run_together(number, tool_in_float64, "train_cls", *arguments, log=tmp_path / "log.txt")
        one, two, apart = (log_lines(tmp_path / name) for name in ("one", "two", "apart"))
        for epoch in range(2):
            for key in ("step", "lr", "loss", "loss/hoyer", "hoyer_per_layer", "v_th", "extremum", "val_loss"):
                assert two[epoch][key] == pytest.approx(one[epoch][key], rel=1e-9), key
            assert apart[epoch]["loss/hoyer"] != pytest.approx(one[epoch]["loss/hoyer"], rel=1e-3)
        for which in ("last", "ema"):
            weights, expected = (read_tensors(tmp_path / name / f"{which}.safetensors")[0] for name in ("two", "one"))
            for name, value in expected.items():
                torch.testing.assert_close(weights[name], value, rtol=1e-7, atol=1e-9)
        other, _ = read_tensors(tmp_path / "apart" / "last.safetensors")
        assert any((other[name].float() - value.float()).abs().max() > 1e-2 for name, value in expected.items())


def layers_over_two_processes(folder: Path) -> None:
    """Gradients of a BatchNorm and a spike layer over halves of a batch, summed, beside those of the whole batch."""
    dist.init_process_group("gloo", init_method="env://")
    rank = dist.get_rank()
    set_seed(0)
    torch.set_default_dtype(torch.float64)
    inputs = torch.randn(6, 3, 5, 4)
    shares = [inputs[:4], inputs[4:]]  # of different size

    def run(x: torch.Tensor, *, sync: bool, per_channel: bool) -> list[torch.Tensor]:
        set_seed(1)
        layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
        layers.append(HoyerSpike(4, per_channel=per_channel))
        layers.extend([torch.nn.Flatten(), torch.nn.BatchNorm1d(80)])
        layers = synchronise(layers, spikes=sync, batch_norm=sync).train()
        assert isinstance(layers[1], SyncBatchNorm) == isinstance(layers[4], SyncBatchNorm1d) == sync
        out = layers(x)
        # Scaled as the mean over two processes that DistributedDataParallel takes.
        (out.sin().sum() * (2 if sync else 1) + layers[2]._penalty).backward()
        gradients = [parameter.grad for parameter in layers.parameters()]
        if sync:
            for gradient in gradients:
                dist.all_reduce(gradient)
                gradient /= 2
        return [*gradients, *(buffer.double() for buffer in layers.buffers()), layers[2]._penalty.detach()]

    for per_channel in (False, True):
        found = run(shares[rank], sync=True, per_channel=per_channel)
        expected = run(inputs, sync=False, per_channel=per_channel)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    (folder / f"{rank}.done").touch()


def test_layers_over_processes_have_the_gradients_of_the_whole_batch(tmp_path):
    run_together(2, layers_over_two_processes, tmp_path, log=tmp_path / "log.txt")
    assert len(list(tmp_path.glob("*.done"))) == 2


@pytest.mark.parametrize("there", [False, True])
def test_all_processes_may_ask_for_the_same_folder_at_once(attempt, tmp_path, there):
    folder = tmp_path / "runs" / "run"
    if there:
        folder.mkdir(parents=True)

    def ask(_: int) -> None:
        require_writable(Run.check_free(folder))

    with attempt("two processes"):
        with ThreadPool(8) as pool:
            pool.map(ask, range(2000))
        assert folder.exists() == there and not list(tmp_path.rglob("*.*"))


# Evaluation over several processes


def test_any_number_of_processes_evaluates_alike(attempt, monkeypatch, tmp_path):
    scenes = DETECTION["data"]["scenes"] | {"num_val": 7}
    for name, values in (("det", DETECTION), ("cls", CLASSIFICATION | {"model": MODEL})):
        data = {"scenes": scenes, "workers": 0} if name == "det" else {"num_val": 23}
        recipe = write_recipe(tmp_path, values, train={"epochs": 1, "batch_size": 2}, data=data)
        low = ["--model.head.score_threshold", "0.001"] if name == "det" else []  # detections on every image
        run_tool(monkeypatch, f"train_{name}", recipe, *low, "--out", tmp_path / name)
    logged = log_lines(tmp_path / "det")[-1]
    for number in (1, 2, 3):
        with attempt("two processes"):
            saved, log = tmp_path / f"saved{number}", tmp_path / f"log{number}.txt"
            run_together(number, tool, "evaluate", tmp_path / "det", "--save", saved, log=log)
            assert log.read_text().count("equal to the log in every digit") == 1
            metrics = json.loads((saved / "metrics.json").read_text())
            assert {key: value for key, value in metrics.items() if key != "potentials"} == {
                key: logged[key] for key in metrics if key != "potentials"
            }
            rows = json.loads((saved / "predictions.json").read_text())
            assert {row["image_id"] for row in rows} == set(range(1, 8))
            log.unlink()
            run_together(number, tool, "evaluate", tmp_path / "cls", log=log)
            assert log.read_text().count("equal to the log in every digit") == 1


@pytest.mark.parametrize("number", [1, 5, 8, 23])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_each_image_is_evaluated_once_and_batches_stay_whole(number, processes):
    shares = [evaluation_batches(number, 4, (index, processes)) for index in range(processes)]
    together = sorted(batch for share in shares for batch in share)
    assert together == evaluation_batches(number, 4, (0, 1))
    assert [index for batch in together for index in batch] == list(range(number))


@pytest.mark.parametrize("number", [1, 3, 16, 21])
@pytest.mark.parametrize("grouped", [False, True])
def test_training_batches_of_all_processes_are_those_of_one(number, grouped):
    ratios = [1 + index % 3 for index in range(number)] if grouped else None
    options = {"seed": 3, "ratios": ratios, "num_groups": 2}
    one = TrainingBatches(number, 4, **options)
    two = [TrainingBatches(number, 2, share=(index, 2), **options) for index in range(2)]
    for _ in range(2):
        shares = [list(batches) for batches in two]
        joined = [first + second for first, second in zip(*shares, strict=True)]
        whole = list(one)
        assert len(joined) == len(whole) == len(one) == len(two[0])
        # A single image left over goes to both, so that neither waits for the other in vain.
        assert [batch if len(batch) > 1 else batch * 2 for batch in whole] == joined
    one.set_epoch(2, first=len(one) - 1)
    assert list(one) == whole[-1:]


def test_shares_are_even():
    assert [take_share(range(10), (index, 3)) for index in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]
    assert [take_share([5], (index, 3)) for index in range(3)] == [[5]] * 3


# A process that dies


def test_a_process_that_dies_takes_the_others_along_and_the_run_goes_on(attempt, tmp_path):
    recipe = write_recipe(tmp_path, DETECTION, train={"epochs": 4}, data={"workers": 0})
    log, run = tmp_path / "log.txt", tmp_path / "run"
    run_together(2, tool, "train_det", recipe, "--out", tmp_path / "whole", log=log)
    processes = start_together(2, tool, "train_det", recipe, "--out", run, log=log)
    wait_until((run / "state.safetensors").exists, processes, log)
    with attempt("kills"):
        processes[1].kill()
        died = time.monotonic()
        processes[0].join(60)
        assert time.monotonic() - died < 30
        assert processes[0].exitcode == 2
        (sentence,) = [line for line in log.read_text().splitlines() if "another process of this training" in line]
        assert f"--resume {run}" in sentence
        assert not Run.open(run).finished
        run_together(2, tool, "train_det", "--resume", run, log=log)
        expect_equal(run, tmp_path / "whole")


def test_all_processes_stop_at_the_same_step(attempt, tmp_path):
    recipe = write_recipe(tmp_path, DETECTION, train={"epochs": 4}, data={"workers": 0})
    log, run = tmp_path / "log.txt", tmp_path / "run"
    processes = start_together(2, tool, "train_det", recipe, "--out", run, log=log)
    wait_until((run / "state.safetensors").exists, processes, log)
    with attempt("two processes"):
        processes[1].terminate()  # only one of them is told
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [128 + signal.SIGTERM] * 2, log.read_text()
        assert log.read_text().count("go on with: hoyer-det train --resume") == 1
