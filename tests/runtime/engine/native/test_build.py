"""Installing where the native engine cannot be built: without it and in one line, or not at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that an install is made of, so that nothing is built in the repository."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    unwanted = shutil.ignore_patterns("__pycache__", "libedgetune_native.*")
    shutil.copytree(ROOT / "edgetune", folder / "edgetune", ignore=unwanted)
    return folder


def build(tree: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", *command],
        cwd=tree,
        env={**os.environ, "EDGETUNE_NATIVE": "auto", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_wheel_without_a_compiler_is_for_every_platform_and_says_so(tree: Path) -> None:
    done = build(tree, "bdist_wheel", PATH="", CXX="")
    assert done.returncode == 0, done.stderr
    assert [wheel.name for wheel in (tree / "dist").iterdir()] == [
        "edgetune-0.1.0-py3-none-any.whl"
    ]
    lines = [line for line in done.stderr.splitlines() if "native engine" in line]
    assert lines == [
        "edgetune's native engine is not built, ONNX Runtime will answer: no C++ compiler is"
        " installed (c++, g++ or clang++; CXX names another)"
    ]


def test_a_compiler_that_fails_ends_the_build_where_the_engine_is_required(tree: Path) -> None:
    done = build(tree, "build_ext", CXX=f"{sys.executable} -c 1/0", EDGETUNE_NATIVE="required")
    assert done.returncode != 0
    assert "edgetune's native engine is not built: " in done.stderr
    done = build(tree, "build_ext", CXX=f"{sys.executable} -c 1/0")
    assert done.returncode == 0, done.stderr
    assert "ONNX Runtime will answer" in done.stderr


def test_an_unknown_mode_is_refused(tree: Path) -> None:
    done = build(tree, "build_ext", EDGETUNE_NATIVE="maybe")
    assert done.returncode != 0
    assert "EDGETUNE_NATIVE is 'maybe'; expected one of auto, required, none" in done.stderr
