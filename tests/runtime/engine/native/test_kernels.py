"""The native engine's kernels against double precision, in C++: see tests/native."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[3] / "native"


def kernel_test(folder: Path, *flags: str) -> Path:
    """The test program, compiled into `folder`, else a skip that says what is missing."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler (c++) is installed")
    command = ["bash", str(NATIVE / "build.sh"), str(folder), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "kernel_test"


def run(program: Path, folder: Path) -> None:
    done = subprocess.run([program, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.startswith("scalar: ")


def test_every_instruction_set_gives_the_numbers_of_double_precision(tmp_path: Path) -> None:
    run(kernel_test(tmp_path, "-O1", "-DQUICK"), tmp_path)


@pytest.mark.slow
def test_the_kernels_keep_within_their_memory_and_the_language(tmp_path: Path) -> None:
    sanitizers = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    run(kernel_test(tmp_path, *sanitizers), tmp_path)
