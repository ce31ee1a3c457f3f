"""The cache of converted bases: whole or not at all, whatever happens to who converts."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgetune.models.cache import cached, read_record

SOURCE = "a" * 64
CONVERT = """
import os, shutil, signal, sys, time
from pathlib import Path
from edgetune.models.cache import cached
base, folder, moment = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def make(partial):
    (partial / "config.json").write_bytes((base / "config.json").read_bytes())
    weights = (base / "model.safetensors").read_bytes()
    (partial / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    if moment == "half of the weights":
        die()
    if moment == "slowly":
        (folder.parent / "begun").touch()
        time.sleep(1.5)
    shutil.copytree(base, partial, dirs_exist_ok=True)

replace = Path.replace
def dying(self, target):
    if moment == "the first rename" or self.name.startswith(".partial"):
        die()
    return replace(self, target)
if moment in ("the first rename", "between the renames"):
    Path.replace = dying
cached(folder, name="tiny", source_sha256="a" * 64, make=make)
"""


def converting(base: Path, folder: Path, moment: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", CONVERT, str(base), str(folder), moment]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


@pytest.mark.parametrize(
    "moment", ["half of the weights", "the first rename", "between the renames"]
)
@pytest.mark.parametrize("older", [False, True])
def test_a_killed_conversion_is_never_taken_for_a_whole_one(
    moment: str, older: bool, tiny_encoder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bases" / "tiny"
    if older:  # of another source, which the new one replaces
        cached(folder, name="tiny", source_sha256="b" * 64, make=lambda to: copy(tiny_encoder, to))
    killed = converting(tiny_encoder, folder, moment)
    assert killed.wait(120) == -signal.SIGKILL
    assert read_record(folder, source_sha256=SOURCE) is None
    found = cached(
        folder, name="tiny", source_sha256=SOURCE, make=lambda to: copy(tiny_encoder, to)
    )
    assert found.folder == folder and read_record(folder, source_sha256=SOURCE) is not None
    whole = (folder / "model.safetensors").read_bytes()
    assert whole == (tiny_encoder / "model.safetensors").read_bytes()
    assert sorted(path.name for path in folder.parent.iterdir()) == ["tiny"]


def copy(base: Path, folder: Path) -> None:
    shutil.copytree(base, folder, dirs_exist_ok=True)


def test_who_comes_while_another_converts_waits_and_converts_nothing(
    tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bases" / "tiny"
    other = converting(tiny_encoder, folder, "slowly")
    while not (folder.parent / "begun").exists():
        assert other.poll() is None
        time.sleep(0.05)
    cached(folder, name="tiny", source_sha256=SOURCE, make=lambda partial: os.abort())
    assert other.wait(120) == 0
    assert "another process is converting tiny; waiting for it" in capsys.readouterr().err
