"""The power goes at any change of the disk: the device starts afterwards, answers, and goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rollout_helpers import Device, publish
from runtime_helpers import encoder_bundle
from signature_helpers import make_keys

from edgetune.runtime import Runtime
from edgetune.runtime.signature.keys import read_private_key, read_public_key


class Journal:
    """What a disk was told, and what of it a power cut may lose; `faults` are renames that publish
    what is not on the disk yet. `forget`: a kind of entry ("files" or "folders") whose fsync is not
    seen.
    """

    def __init__(self, disk: Path, forget: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.disk, self.forget, self.faults, self.published = disk, forget, list[str](), 0
        self._synced: dict[int, tuple[int, int]] = {}
        self.waiting: set[Path] = set()
        """whose entries in their folders are not on the disk"""
        for name in ("fsync", "replace", "rename", "mkdir", "link"):
            monkeypatch.setattr(os, name, partial(getattr(self, name), getattr(os, name)))

    def fsync(self, real: Any, descriptor: int) -> None:
        real(descriptor)
        found, folder = os.fstat(descriptor), Path(f"/proc/self/fd/{descriptor}").readlink()
        if not stat.S_ISDIR(found.st_mode):
            if self.forget != "files":
                self._synced[found.st_ino] = found.st_size, found.st_mtime_ns
        elif self.forget != "folders":
            self.waiting = {path for path in self.waiting if path.parent != folder}

    def mkdir(self, real: Any, path: Any, *more: Any, **options: Any) -> None:
        real(path, *more, **options)
        self.waiting.add(Path(path))

    def link(self, real: Any, source: Any, path: Any, **options: Any) -> None:
        real(source, path, **options)
        self.waiting.add(Path(path))

    def rename(self, real: Any, source: Any, path: Any) -> None:
        self.replace(real, source, path)

    def replace(self, real: Any, source: Any, path: Any) -> None:
        source, path = Path(source), Path(path)
        inside = list(source.rglob("*"))
        files, entries = [source, *inside], set(inside)
        if path.name == "state.json":
            self.published += 1
            state = json.loads(source.read_text())
            for version in filter(None, (state["current"], state["previous"], state["new"])):
                folder = path.parent / "versions" / version
                files += folder.rglob("*")
                entries |= {folder, *folder.rglob("*"), *folder.parents}
            entries |= {path, *path.parents}  # path: as it was published before
        if path.is_relative_to(self.disk):
            lost = [*(entries & self.waiting), *(one for one in files if not self._is_kept(one))]
            self.faults += [f"{one}, for {path}" for one in lost]
        real(source, path)
        moved = {one for one in self.waiting if one.is_relative_to(source)}
        self.waiting -= moved
        self.waiting |= {path / one.relative_to(source) for one in moved} | {path}

    def _is_kept(self, path: Path) -> bool:
        found = path.stat()
        kept = self._synced.get(found.st_ino) == (found.st_size, found.st_mtime_ns)
        return kept or path.is_dir()


@pytest.mark.parametrize("forget", ["", "files", "folders"])
def test_what_a_rename_publishes_is_on_the_disk_before_it(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget: str
) -> None:
    keys, bundle, place = make_keys(tmp_path), encoder_bundle(tiny_encoder), tmp_path / "source"
    key, adapter = read_private_key(keys.private), bundle / "adapters" / "mood"
    with Runtime.open(bundle, threads=1) as runtime, monkeypatch.context() as patch:
        publish(adapter, place, key=key, version=2)
        disk = tmp_path / "new" / "disk"
        journal = Journal(disk, forget, patch)
        device = Device(runtime, place, disk, signed_by=read_public_key(keys.public))
        device.rollout.step()
        device.serve_until("settled")
        publish(adapter, place, key=key, version=3)
        device.rollout.step()
        device.stop()
        device.start()
        device.serve(20, failing="mood@v3")
        assert device.steps.names[-1] == "rolled back" and journal.published > 6
    assert (disk / "state.json" in journal.waiting) == (forget == "folders")
    assert bool(journal.faults) == bool(forget), journal.faults


TESTS = Path(__file__).parents[2]
LIFE = (
    "import sys; sys.path.insert(0, sys.argv[1]); from rollout_helpers import live_until_cut as l"
)


def live(*arguments: object) -> int:
    code = f"{LIFE}; l(*sys.argv[2:6], int(sys.argv[6]))"
    words = [sys.executable, "-c", code, str(TESTS), *map(str, arguments)]
    return subprocess.run(words, capture_output=True).returncode


@pytest.mark.parametrize(
    "cuts",
    [
        pytest.param(range(3, 100, 24), id="some"),
        pytest.param(range(1, 100), id="all", marks=pytest.mark.slow),
    ],
)
def test_no_power_cut_leaves_a_device_that_does_not_answer(
    tiny_encoder: Path, tmp_path: Path, cuts: range
) -> None:
    keys, bundle, place = make_keys(tmp_path), encoder_bundle(tiny_encoder), tmp_path / "source"
    adapter = bundle / "adapters" / "mood"
    publish(adapter, place, key=read_private_key(keys.private), version=2)
    killed = 0
    with Runtime.open(bundle, threads=1) as runtime:
        for at in cuts:
            disk = tmp_path / "disk"
            code = live(bundle, place, disk, keys.public, at)
            assert code in (0, -signal.SIGKILL)
            killed += code != 0
            device = Device(runtime, place, disk, signed_by=read_public_key(keys.public))
            assert device.answer() in ("mood", "mood@v2")
            device.rollout.step()
            device.serve(60)
            assert (device.answer(), device.rollout.state.phase) == ("mood@v2", "settled")
            shutil.rmtree(disk)
            if code == 0:  # the life has fewer changes
                break
    assert killed >= len(cuts) // 2
