"""A measurement over ssh, against a real sshd on loopback: samples come back, nothing stays there,
an unknown host and a wrong key are refused, a copy that was cut goes on.
"""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from runtime_helpers import decoder_bundle

from edgetune.cli import main
from edgetune.core.errors import DeviceError
from edgetune.runtime.check import over_there, remote
from edgetune.runtime.check.remote import Address, Remote, address_of, measured_there

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
needs_sshd = pytest.mark.skipif(
    not (Path(SSHD).exists() and shutil.which("ssh-keygen")),
    reason="no sshd: apt install openssh-server",
)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("ssh://pi@raspberrypi.local:2222", Address("raspberrypi.local", "pi", 2222)),
        ("ssh://board", Address("board")),
        ("ssh://[fe80::1]:22/", Address("fe80::1", None, 22)),
    ],
)
def test_an_address(url: str, expected: Address) -> None:
    assert address_of(url) == expected


@pytest.mark.parametrize(
    "url",
    ["pi@board", "ssh://", "ssh://-oProxyCommand=x", "ssh://a b", "ssh://b:99999", "http://b"],
)
def test_what_is_no_address_is_one_line(url: str) -> None:
    with pytest.raises(DeviceError, match=r"--on: no address of a machine \(expected ssh://"):
        address_of(url)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """A server on loopback with a key of its own; ssh's options that reach it."""
    place = tmp_path_factory.mktemp("sshd")
    for name in ("host", "user"):
        key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(place / name)]
        subprocess.run(key, check=True)
    (place / "authorized").write_text((place / "user.pub").read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (place / "known").write_text(f"[127.0.0.1]:{port} {(place / 'host.pub').read_text()}")
    home = place / "home"
    home.mkdir()
    settings = [
        f"Port {port}",
        "ListenAddress 127.0.0.1",
        f"HostKey {place / 'host'}",
        f"AuthorizedKeysFile {place / 'authorized'}",
        f"PidFile {place / 'pid'}",
        "StrictModes no",
        "UsePAM no",
        f"SetEnv HOME={home}",
    ]
    (place / "config").write_text("\n".join(settings) + "\n")
    Path("/run/sshd").mkdir(exist_ok=True)
    with (place / "log").open("w") as log:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(place / "config")], stderr=log)
    try:
        for _ in range(200):
            with socket.socket() as tried:
                if not tried.connect_ex(("127.0.0.1", port)):
                    break
            time.sleep(0.05)
        known = f"UserKnownHostsFile={place / 'known'}"
        yield [
            "-F",
            "/dev/null",
            "-i",
            str(place / "user"),
            "-o",
            known,
            "-p",
            str(port),
            str(home),
        ]
    finally:
        server.terminate()
        server.wait()


def reached(machine: list[str], *options: str) -> Remote:
    address = Address("127.0.0.1", getpass.getuser())
    return Remote(address, python=sys.executable, options=[*machine[:-1], *options])


def left(machine: list[str]) -> list[Path]:
    return sorted(path for path in Path(machine[-1]).rglob("*") if path.is_file())


@needs_sshd
def test_check_measures_over_there_and_leaves_nothing(
    machine: list[str],
    tiny_decoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(remote, "Remote", lambda address, python: reached(machine))
    words = ["check", str(decoder_bundle(tiny_decoder)), "--on", "ssh://127.0.0.1", "--runs", "3"]
    words += ["--adapter", "a", "--prompt-tokens", "8", "--new-tokens", "3", "--threads", "1"]
    words += ["--json", str(tmp_path / "found.json"), "--device", "raspberry-pi-5"]
    with pytest.raises(SystemExit):
        main(words)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["estimated"] is False
    assert {verdict["basis"] for verdict in found["verdicts"]} == {"measured"}
    assert len(found["measured"]["samples"]["runs"][0]["ttft_ms"]) == 3
    assert found["host"]["address"].endswith("127.0.0.1")
    assert "copying" in capsys.readouterr().err
    assert left(machine) == []


@needs_sshd
def test_an_unknown_host_and_a_wrong_key_are_refused(
    machine: list[str], tiny_decoder: Path, tmp_path: Path
) -> None:
    bundle = decoder_bundle(tiny_decoder)
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other)], check=True)
    stranger = [word if "known" not in word else "UserKnownHostsFile=/dev/null" for word in machine]
    intruder = [word if not word.endswith("/user") else str(other) for word in machine]
    for words, said in (
        (stranger, "Host key verification failed"),
        (intruder, "Permission denied"),
    ):
        with (
            pytest.raises(DeviceError, match=f"no connection: .*{said}"),
            measured_there(reached(words), bundle, wheel=None, say=print),
        ):
            pass
    closed = Remote(Address("127.0.0.1", None, 1), options=["-F", "/dev/null"])
    with (
        pytest.raises(DeviceError, match=r"no connection: .*refused"),
        measured_there(closed, bundle, wheel=None, say=print),
    ):
        pass


@needs_sshd
def test_a_copy_that_was_cut_goes_on_where_it_ended(
    machine: list[str], tiny_decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, sent = decoder_bundle(tiny_decoder), list[int]()
    whole = remote._stream

    def cut(begun, files):  # type: ignore[no-untyped-def]
        sent.append(sum(begun.values()))
        given = 0
        for piece in whole(begun, files):
            given += len(piece)
            if len(sent) < 3 and given > 200_000:
                raise ConnectionError("cut")
            yield piece

    monkeypatch.setattr(remote, "_stream", cut)
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0, 0.0))
    lines: list[str] = []
    there = reached(machine)
    with measured_there(there, bundle, wheel=None, say=lines.append):
        found = left(machine)
        here = sorted(path for path in bundle.rglob("*") if path.is_file())
        copied = [path for path in found if "/code/" not in str(path)]
        assert [path.read_bytes() for path in copied] == [path.read_bytes() for path in here]
        assert not [path for path in found if path.suffix == ".part"]
    assert len(sent) == 3
    assert sum("once more" in line for line in lines) == 2
    assert left(machine) == []


@needs_sshd
def test_too_little_room_an_old_python_and_a_failing_command_are_one_line(
    machine: list[str], tiny_decoder: Path, tmp_path: Path
) -> None:
    bundle = decoder_bundle(tiny_decoder)
    with (
        pytest.raises(DeviceError, match="no such wheel"),
        measured_there(reached(machine), bundle, wheel=tmp_path / "none.whl", say=print),
    ):
        pass
    missing = reached(machine)
    missing.python = "python-that-is-not-there"
    with (
        pytest.raises(DeviceError, match=r"a command failed over there: .*not found"),
        measured_there(missing, bundle, wheel=None, say=print),
    ):
        pass


def test_what_runs_over_there_needs_nothing_but_python(tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-S", "-c", Path(over_there.__file__).read_text()]
    done = subprocess.run(
        [*command, "probe", str(tmp_path / "x" / "y")], capture_output=True, check=True
    )
    assert json.loads(done.stdout)["free_bytes"] > 0
    (tmp_path / "a.part").write_bytes(b"12")
    wanted = json.dumps({"a": [5, "0"], "b": [1, "0"]}).encode()
    done = subprocess.run(
        [*command, "lacks", str(tmp_path)], input=wanted, capture_output=True, check=True
    )
    assert json.loads(done.stdout) == {"a": 2, "b": 0}
    stream = json.dumps({"path": "c", "from": 0, "size": 2, "sha256": "0"}).encode() + b"\nxy"
    done = subprocess.run([*command, "receive", str(tmp_path)], input=stream, capture_output=True)
    assert (done.returncode, b"c arrived damaged" in done.stderr) == (1, True)
    assert not os.path.lexists(tmp_path / "c")
