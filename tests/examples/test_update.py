"""`edgetune-update` and the Mender module: a new bundle is pulled, verified, served, or not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runtime_helpers import encoder_bundle
from signature_helpers import Keys, make_keys

from edgetune.runtime.signature.folder import sign_folder
from edgetune.runtime.signature.keys import read_private_key

DEPLOY = Path(__file__).parents[2] / "examples" / "deploy"


class Machine:
    """A device's folders, with stand-ins for systemctl (it notes the restart) and curl (the server
    gets ready unless there is a file `broken-` and the slot).
    """

    def __init__(self, folder: Path, keys: Keys) -> None:
        self.root, self.tools, self.keys = folder / "srv", folder / "bin", keys
        self.root.mkdir()
        self.tools.mkdir()
        edgetune = "import sys; from edgetune.cli import main; main(sys.argv[1:])"
        self._tool("edgetune", f'exec "{sys.executable}" -c "{edgetune}" "$@"')
        self._tool("systemctl", f'readlink "{self.root}/current" >> "{self.root}/restarts"')
        self._tool("curl", f'test ! -e "{self.root}/broken-$(readlink {self.root}/current)"')

    def _tool(self, name: str, line: str) -> None:
        (self.tools / name).write_text(f"#!/bin/sh\n{line}\n")
        (self.tools / name).chmod(0o755)

    def run(self, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        own = {
            "PATH": f"{self.tools}:{os.environ['PATH']}",
            "EDGETUNE": str(self.tools / "edgetune"),
            "EDGETUNE_ROOT": str(self.root),
            "EDGETUNE_KEY": str(self.keys.public),
            "EDGETUNE_UPDATE": str(DEPLOY / "edgetune-update"),
        }
        words = ["sh", str(DEPLOY / script), *map(str, arguments)]
        return subprocess.run(words, env=os.environ | own, capture_output=True, text=True)

    @property
    def restarts(self) -> list[str]:
        path = self.root / "restarts"
        return path.read_text().split() if path.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path, make_keys(tmp_path))


def bundle(machine: Machine, tiny_encoder: Path, name: str, version: int | None = None) -> Path:
    copy = machine.root.parent / name
    shutil.copytree(encoder_bundle(tiny_encoder), copy)
    sign_folder(copy, read_private_key(machine.keys.private), version=version)
    return copy


def test_a_new_bundle_is_served_and_a_changed_one_is_not(
    machine: Machine, tiny_encoder: Path
) -> None:
    first = bundle(machine, tiny_encoder, "one")
    done = machine.run("edgetune-update", first)
    assert (done.returncode, machine.restarts) == (0, ["a"]), done.stderr
    assert machine.run("edgetune-update", first).returncode == 0
    assert machine.restarts == ["a"]  # it is served already
    adapter = first.parent / "adapter"
    shutil.copytree(first / "adapters" / "mood", adapter)
    sign_folder(adapter, read_private_key(machine.keys.private))
    done = machine.run("edgetune-update", adapter)
    assert done.returncode == 1 and "is no bundle" in done.stderr
    manifest = first / "edgetune.json"
    manifest.write_text(manifest.read_text().replace('"calm"', '"glad"'))
    assert machine.run("edgetune-update", first).returncode == 1
    assert (machine.root / "current").readlink() == Path("a")


def test_a_bundle_that_does_not_get_ready_gives_way_to_the_one_before(
    machine: Machine, tiny_encoder: Path
) -> None:
    machine.run("edgetune-update", bundle(machine, tiny_encoder, "one"))
    (machine.root / "broken-b").touch()
    done = machine.run("edgetune-update", bundle(machine, tiny_encoder, "two"))
    assert (done.returncode, machine.restarts) == (1, ["a", "b", "a"])
    assert "back to the one before" in done.stderr
    (machine.root / "broken-b").unlink()
    again = machine.run("edgetune-update", machine.root.parent / "two")
    assert (again.returncode, machine.restarts) == (0, ["a", "b", "a"])  # not tried again


def test_a_bundle_taken_back_by_hand_stays_back(machine: Machine, tiny_encoder: Path) -> None:
    first, second = (bundle(machine, tiny_encoder, name) for name in ("one", "two"))
    for step in (first, second, "--back", second):
        assert machine.run("edgetune-update", step).returncode == 0
    assert machine.restarts == ["a", "b", "a"]


def test_a_power_cut_while_a_bundle_is_tried_goes_back_where_it_is_not_ready(
    machine: Machine, tiny_encoder: Path
) -> None:
    for name in ("one", "two"):
        machine.run("edgetune-update", bundle(machine, tiny_encoder, name))
    shutil.copy(machine.root / "b" / "model.sig", machine.root / "trying.sig")
    (machine.root / "before").write_text("a\n")
    (machine.root / "broken-b").touch()
    done = machine.run("edgetune-update", machine.root.parent / "two")
    assert (done.returncode, machine.restarts) == (1, ["a", "b", "a"])


def test_an_older_bundle_comes_only_when_it_is_asked_for_and_the_store_does_not_grow(
    machine: Machine, tiny_encoder: Path
) -> None:
    one, two, three, also_three, none = (
        bundle(machine, tiny_encoder, name, number)
        for name, number in (("1", 1), ("2", 2), ("3", 3), ("also 3", 3), ("none", None))
    )
    for source in (one, three):
        assert machine.run("edgetune-update", source).returncode == 0
    for source in (two, also_three, none):
        done = machine.run("edgetune-update", source)
        assert done.returncode == 1 and "is not above 3" in done.stderr
    assert machine.run("edgetune-update", "--older", one).returncode == 0
    assert machine.run("edgetune-update", one).returncode == 0  # the timer's
    assert machine.restarts == ["a", "b", "a"]
    assert not (machine.root / "next").exists()
    stored = {path.stat().st_ino for path in (machine.root / "store" / "sha256").iterdir()}
    used = {path.stat().st_ino for slot in "ab" for path in (machine.root / slot).rglob("*")}
    assert stored <= used
    assert machine.run("edgetune-update", "--back").returncode == 0
    served = machine.root / "current" / "model.sig"
    assert served.read_bytes() == (three / "model.sig").read_bytes()


def test_a_version_that_did_not_get_ready_is_not_followed_by_an_older_one(
    machine: Machine, tiny_encoder: Path
) -> None:
    (machine.root / "broken-b").touch()
    sources = [bundle(machine, tiny_encoder, str(at), at) for at in (1, 3, 2)]
    codes = [machine.run("edgetune-update", source).returncode for source in sources]
    assert (codes, machine.restarts) == ([0, 1, 1], ["a", "b", "a"])


@pytest.mark.parametrize("cut", [False, True])
def test_an_older_one_that_does_not_get_ready_opens_the_way_for_none_between(
    machine: Machine, tiny_encoder: Path, cut: bool
) -> None:
    one, two, three = (bundle(machine, tiny_encoder, str(at), at) for at in (1, 2, 3))
    assert machine.run("edgetune-update", three).returncode == 0
    (machine.root / "broken-b").touch()
    if cut:  # the power, while it is tried
        shutil.copytree(one, machine.root / "b")
        shutil.copy(one / "model.sig", machine.root / "trying.sig")
        (machine.root / "before").write_text("a\n")
        (machine.root / "current").unlink()
        (machine.root / "current").symlink_to("b")
    assert machine.run("edgetune-update", "--older", one).returncode == 1
    done = machine.run("edgetune-update", two)
    assert done.returncode == 1 and "is not above 3" in done.stderr
    assert (machine.root / "current").readlink() == Path("a")


def test_what_an_earlier_script_put_there_is_followed_by_nothing_older(
    machine: Machine, tiny_encoder: Path
) -> None:
    two, one = (bundle(machine, tiny_encoder, str(at), at) for at in (2, 1))
    assert machine.run("edgetune-update", two).returncode == 0
    (machine.root / "newest").unlink()
    done = machine.run("edgetune-update", one)
    assert done.returncode == 1 and "is not above 2" in done.stderr


@pytest.mark.parametrize("arguments", [[], [""], ["--older"]])
def test_no_source_is_a_line(machine: Machine, arguments: list[str]) -> None:
    done = machine.run("edgetune-update", *arguments)
    assert done.returncode == 2 and "no source" in done.stderr and done.stderr.count("\n") == 1


def test_mender_installs_a_bundle_and_goes_back(
    machine: Machine, tiny_encoder: Path, tmp_path: Path
) -> None:
    for state, answer in (("SupportsRollback", "Yes"), ("NeedsArtifactReboot", "No")):
        assert machine.run("mender-edgetune", state, tmp_path).stdout.strip() == answer
    machine.run("edgetune-update", bundle(machine, tiny_encoder, "one"))
    payload = tmp_path / "payload"
    (payload / "files").mkdir(parents=True)
    (payload / "tmp").mkdir()
    second = bundle(machine, tiny_encoder, "two")
    subprocess.run(["tar", "-C", second, "-cf", payload / "files" / "bundle.tar", "."], check=True)
    done = machine.run("mender-edgetune", "ArtifactInstall", payload)
    assert (done.returncode, machine.restarts) == (0, ["a", "b"]), done.stderr
    assert machine.run("mender-edgetune", "ArtifactRollback", payload).returncode == 0
    assert machine.restarts == ["a", "b", "a"]
