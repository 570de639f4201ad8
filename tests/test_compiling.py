"""The compiled kernels in the package: what a build takes along, and one where there is no compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT

KERNELS = "backbones/deploy/events/_kernels"
USE = """
import torch, warnings
from backbones.deploy.events import Bits, EventLayer, Window, available
import backbones
layer = EventLayer(torch.full((2, 3, 1, 1), 5, dtype=torch.int8), Window((1, 1)), scale=torch.ones(2),
                   bias=torch.ones(2), keeps_real=True)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    results = [layer(Bits.pack(torch.ones(1, 3, 1, 1)))[0].flatten().tolist() for _ in range(2)]
print(backbones.__file__, available(), results, len(told), told[0].message, sep="\\n")
"""


@pytest.fixture
def sources(tmp_path) -> Path:
    """A copy of the sources without what was compiled from them, and without the weights of the zoo."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    ignored = shutil.ignore_patterns("__pycache__", "_kernels*", "*.safetensors", "*.jsonl")
    for name in ("backbones", "detection", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


def test_without_a_compiler_it_installs_and_says_so_once(sources, tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    broken = {key: value for key, value in os.environ.items() if key != "HOYER_DET_KERNELS"}
    broken |= {"CC": "/bin/false", "CXX": "/bin/false"}
    done = subprocess.run(
        [*command, "--wheel-dir", str(tmp_path), str(sources)], env=broken, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.startswith(KERNELS)]
        archive.extractall(tmp_path / "installed")
    environment = broken | {"PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", USE], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    place, kernels, results, told, message = done.stdout.splitlines()
    assert place.startswith(str(tmp_path / "installed")) and kernels == "['torch']"
    assert results == "[[16.0, 16.0], [16.0, 16.0]]" and told == "1"  # three weights of 5, and 1
    assert "has no compiled kernels here: torch gives the same results, slower" in message
    assert "install a C++ compiler, then the package again" in message


def test_the_source_archive_has_what_is_compiled(sources, tmp_path):
    code = "import sys; from setuptools.build_meta import build_sdist; print(build_sdist(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    subprocess.run(command, cwd=sources, capture_output=True, text=True, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    folder = ROOT / "backbones" / "deploy" / "events"
    needed = {
        path.relative_to(ROOT).as_posix() for path in folder.iterdir() if path.suffix in (".cpp", ".h", ".inc", ".py")
    }
    assert len(needed) >= 8 and needed | {"setup.py", "pyproject.toml"} <= names
    assert not [name for name in names if name.startswith(KERNELS)]
