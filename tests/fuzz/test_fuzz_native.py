"""Damaged plans and weights through the native engine, with AddressSanitizer: refused or run, never
a crash.

`EDGETUNE_FUZZ` of them (default 2000), from `EDGETUNE_FUZZ_SEED` (default 0) on.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from fuzz.figures import SEED

NATIVE = Path(__file__).parents[1] / "native"
ROUNDS = int(os.environ.get("EDGETUNE_FUZZ", "2000"))
SANITIZERS = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.mark.slow
def test_a_damaged_plan_or_data_file_is_refused_or_runs(tmp_path: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler (c++) is installed")
    command = ["bash", str(NATIVE / "build.sh"), str(tmp_path), *SANITIZERS]
    environment = {**os.environ, "PROGRAM": "fuzz"}
    built = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert built.returncode == 0, built.stderr
    program = [str(tmp_path / "fuzz"), str(tmp_path), str(SEED), str(ROUNDS)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    print(done.stdout, end="")
