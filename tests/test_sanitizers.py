"""The C++ kernels under sanitizers: random layers, comparisons and pools against plain loops, by several threads."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT

from backbones.deploy.events import available

SOURCES = ROOT / "backbones" / "deploy" / "events"
OPTIONS = ["-std=c++17", "-O0", "-g1", "-fwrapv", "-ffp-contract=off", "-pthread", "-fno-sanitize-recover=all"]
OPTIONS += ["-fno-sanitize=null,object-size"]  # which take most of the time, and the address sanitizer finds them too
# To look for leaks needs ptrace, which a container may bar.
HALT = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}


def skip(reason: str) -> None:
    (pytest.fail if os.environ.get("REQUIRE_REAL_DATA") else pytest.skip)(reason)


def compile_with(sanitizers: str, sources: list[Path], program: Path) -> subprocess.CompletedProcess[str]:
    compiler = os.environ.get("CXX") or "c++"
    if shutil.which(compiler) is None:
        skip(f"no C++ compiler: {compiler}")
    command = [compiler, f"-fsanitize={sanitizers}", *OPTIONS, "-I", SOURCES, *sources, "-o", program]
    return subprocess.run(command, capture_output=True, text=True)


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program; where the thread sanitizer does not bear a random address space, without one."""
    command = [str(program), *arguments]
    done = subprocess.run(command, env=os.environ | HALT, capture_output=True, text=True, timeout=200)
    if "unexpected memory mapping" in done.stderr and shutil.which("setarch"):
        command = ["setarch", "-R", *command]
        done = subprocess.run(command, env=os.environ | HALT, capture_output=True, text=True, timeout=200)
    return done


@pytest.mark.parametrize(("sanitizers", "seconds"), [("address,undefined", 4), ("thread", 2)])
def test_the_kernels_are_clean(sanitizers, seconds, tmp_path):
    (tmp_path / "empty.cpp").write_text("int main() { return 0; }\n")
    empty = compile_with(sanitizers, [tmp_path / "empty.cpp"], tmp_path / "empty")
    if empty.returncode or run(tmp_path / "empty").returncode:
        skip(f"no sanitizer here: -fsanitize={sanitizers} {empty.stderr[-300:]}")
    sources = [SOURCES / "kernels.cpp", Path(__file__).parent / "native" / "fuzz.cpp"]
    done = compile_with(sanitizers, sources, tmp_path / "fuzz")
    assert done.returncode == 0, done.stderr
    done = run(tmp_path / "fuzz", str(seconds), "1")
    assert done.returncode == 0 and done.stderr == "", done.stderr[:4000]
    layers, levels = map(int, re.fullmatch(r"(\d+) layers, instruction sets (\d+)\n", done.stdout).groups())
    assert layers >= 6  # each round's, whose instruction sets take turns
    if len(available()) > 1:
        assert levels.bit_count() == len(available()) - 1
