"""Trainings over several processes as users start them: the README's line, two nodes, a wrong WORLD_SIZE."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from helpers import ROOT, free_port, log_lines, run_together, run_tool, tool
from test_processes import MODEL
from test_resume import CLASSIFICATION, expect_equal, refusal, write_recipe

from detection.runs import Run

BIN = Path(sys.executable).parent
KEPT = ("HOME", "LANG", "TMPDIR", "MPLCONFIGDIR", "LD_LIBRARY_PATH")
SYNCED = ("--hoyer.sync", "True", "--train.sync_batchnorm", "True")
ALONE = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two processes need two GPUs, or none")


def environment(**others: str) -> dict[str, str]:
    """A shell's, with the environment of these tests activated: no variable that says how many processes there are."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return (
        {name: os.environ[name] for name in KEPT if name in os.environ}
        | {"PATH": path, "OMP_NUM_THREADS": "1"}
        | others
    )


@ALONE
def test_the_line_of_the_readme_is_one_training_of_twice_the_batch(attempt, monkeypatch, tmp_path):
    (line,) = re.findall(r"^torchrun .*$", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    with attempt("two processes"):
        done = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert [path.name for path in (tmp_path / "runs").iterdir()] == ["two"]
        assert Run.open(tmp_path / "runs" / "two").finished
        assert done.stdout.count("run folder: runs/two") == 1
        options = line.partition("scenes_retinanet_resnet18")[2].split()
        options[options.index("--out") + 1] = str(tmp_path / "one")
        one_process = ("--train.batch_size", "32", "--data.root", tmp_path / "data" / "scenes", "--data.workers", "0")
        run_tool(monkeypatch, "train_det", "scenes_retinanet_resnet18", *options, *one_process)
        two, one = log_lines(tmp_path / "runs" / "two"), log_lines(tmp_path / "one")
        assert [line["epoch"] for line in two] == [1, 2] == [line["epoch"] for line in one]
        assert [(line["step"], line["lr"]) for line in two] == [(line["step"], line["lr"]) for line in one]
        for key in ("loss", "loss/classification", "loss/bbox_regression", "loss/hoyer", "hoyer_per_layer", "v_th"):
            assert two[0][key] == pytest.approx(one[0][key], rel=1e-4), key
        # In float32 the order of a sum decides now and then about a spike, so that the weights are not quite the same.
        for key in ("loss", "loss/hoyer", "activity"):
            assert two[1][key] == pytest.approx(one[1][key], rel=1e-2), key


@contextmanager
def two_nodes() -> Iterator[list[tuple[list[str], str, dict[str, str]]]]:
    """Two nodes: how a command is run on each, its address, and variables that it needs.

    Two network namespaces with a cable between them where the rights allow, else both are this machine.
    """
    names = [f"node{number}-{os.getpid()}" for number in range(2)]
    ends = [("net0", f"198.18.0.{number + 1}", name) for number, name in enumerate(names)]
    steps = [["netns", "add", name] for name in names]
    cable = ["link", "add", "net0", "netns", names[0], "type", "veth", "peer", "name", "net0", "netns", names[1]]
    steps.append(cable)
    for device, address, name in ends:
        steps.append(["-n", name, "address", "add", f"{address}/30", "dev", device])
        steps += [["-n", name, "link", "set", each, "up"] for each in (device, "lo")]
    ip = shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    try:
        if ip and all(subprocess.run([ip, *step], capture_output=True).returncode == 0 for step in steps):
            yield [([ip, "netns", "exec", name], at, {"GLOO_SOCKET_IFNAME": device}) for device, at, name in ends]
        else:
            yield [([], "127.0.0.1", {}), ([], "127.0.0.1", {})]
    finally:
        for name in names if ip else ():
            subprocess.run([ip, "netns", "delete", name], capture_output=True)


@ALONE
def test_two_nodes_are_two_processes_of_one(attempt, tmp_path):
    recipe = write_recipe(tmp_path, CLASSIFICATION | {"model": MODEL})
    options = [recipe, "--data.num_train", "40", *SYNCED]
    run_together(2, tool, "train_cls", *options, "--out", tmp_path / "one", log=tmp_path / "log.txt")
    log, started = tmp_path / "nodes.txt", []
    with attempt("two processes"), two_nodes() as nodes:
        where = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", nodes[0][1], "--master_port", free_port()]
        command = ["-m", "detection", "train", *options, "--out", tmp_path / "two"]
        with log.open("ab") as file:
            for rank, (prefix, address, variables) in enumerate(nodes):
                agent = ["torchrun", *where, "--node_rank", rank, "--local_addr", address, *command]
                env = environment(**variables)
                words = [*prefix, *map(str, agent)]
                started.append(subprocess.Popen(words, cwd=tmp_path, env=env, stdout=file, stderr=file))
        try:
            end = time.monotonic() + 200
            assert [each.wait(max(1, end - time.monotonic())) for each in started] == [0, 0], log.read_text()
        finally:
            for each in started:
                each.kill()
        assert log.read_text().count("run folder: ") == 1
        expect_equal(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but no process has a RANK and a MASTER_ADDR: start all of them with "),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE is many, but no process has a RANK and a MASTER_ADDR: start all of them "),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"},
            "WORLD_SIZE is 2, but 1 process would train together: start all of them with torchrun",
        ),
    ],
)
def test_a_world_size_without_its_processes_is_refused(attempt, monkeypatch, capsys, tmp_path, variables, sentence):
    recipe = write_recipe(tmp_path, CLASSIFICATION)
    PartialState()  # one process, whatever is said from here on
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with attempt("two processes"):
        assert sentence in refusal(monkeypatch, capsys, "train_cls", str(recipe), "--out", tmp_path / "run")
        assert not (tmp_path / "run").exists()
