"""A measurement on another machine, over ssh: what it needs is copied there, the same requests are
timed, the samples come back, and nothing is left behind.

The system's own `ssh` is used, with its configuration, keys and known hosts: a host key that is not
known is refused, and no password is asked for or kept. A copy that was cut goes on where it ended.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgetune import core
from edgetune.core.errors import DeviceError
from edgetune.core.files import sha256_file
from edgetune.core.progress import Say
from edgetune.runtime.check import over_there
from edgetune.runtime.check.latency import Workload

URL = re.compile(
    r"ssh://(?:(?P<user>[\w.+-]+)@)?(?P<host>[\w.-]+|\[[0-9A-Fa-f:.]+\])(?::(?P<port>\d{1,5}))?/?"
)
CACHE = ".cache/edgetune"
CODE, BUNDLE, ENVIRONMENT = "code", "bundle", "environment"
ROOMS = ("core", "devices", "runtime")
LEFT_OUT = re.compile(r"__pycache__|\.(cpp|h|pyc)$")
TRIES = 4
PAUSES = (0.5, 2.0, 8.0)
"""Seconds before a copy that was cut goes on."""
OLDEST_PYTHON = [3, 10]
SSH_FAILED = 255
LINE = re.compile(r"\S.*")


@dataclass(frozen=True)
class Address:
    """`ssh://[user@]host[:port]`."""

    host: str
    user: str | None = None
    port: int | None = None

    @property
    def name(self) -> str:
        """As ssh takes it."""
        return self.host if self.user is None else f"{self.user}@{self.host}"


def address_of(url: str) -> Address:
    """DeviceError for what is none."""
    found = URL.fullmatch(url)
    port = int(found["port"]) if found and found["port"] else None
    if (
        found is None
        or found["host"].startswith("-")
        or (port is not None and not 0 < port < 65536)
    ):
        raise DeviceError(
            "no address of a machine",
            where="--on",
            expected="ssh://[user@]host[:port]",
            got=url,
            fix="Hosts of ~/.ssh/config can be named, too.",
        )
    return Address(found["host"].strip("[]"), found["user"], port)


class Remote:
    """One machine over ssh. `options`: further ones of ssh, such as ["-i", FILE]."""

    def __init__(
        self, address: Address, *, python: str = "python3", options: Sequence[str] = ()
    ) -> None:
        if shutil.which("ssh") is None:
            raise DeviceError("there is no ssh here", where="--on", fix="Install OpenSSH's client.")
        self.address, self.python = address, python
        port = () if address.port is None else ("-p", str(address.port))
        safe = ("-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes", "-o", "ConnectTimeout=15")
        alive = ("-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3")
        self._ssh = ("ssh", *safe, *alive, *port, *options, address.name)

    def run(self, words: Sequence[str], *, given: bytes = b"") -> bytes:
        """Run a command there; what it prints. ConnectionError where ssh itself fails, DeviceError
        where the command does.
        """
        done = subprocess.run(
            [*self._ssh, shlex.join(words)], input=given, capture_output=True, check=False
        )
        self._judge(done.returncode, done.stderr)
        return done.stdout

    def send(self, words: Sequence[str], pieces: Iterator[bytes]) -> None:
        """Run a command there and write to it as it reads."""
        process = subprocess.Popen(
            [*self._ssh, shlex.join(words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert process.stdin is not None and process.stderr is not None
        try:
            for piece in pieces:
                process.stdin.write(piece)
            process.stdin.close()
        except BrokenPipeError:
            pass  # it ended: its status says why
        except BaseException:
            process.kill()
            process.communicate()
            raise
        said = process.stderr.read()
        self._judge(process.wait(), said)

    def _judge(self, status: int, said: bytes) -> None:
        lines = LINE.findall(said.decode(errors="replace"))
        if status in (SSH_FAILED, over_there.ONCE_MORE) or status < 0:
            raise ConnectionError(lines[-1] if lines else f"ssh ended with {status}")
        if status:
            own = next((line for line in lines if line.startswith("edgetune: ")), None)
            if own is not None:
                raise DeviceError(f"over there: {own.removeprefix('edgetune: ')}")
            raise DeviceError(
                f"a command failed over there: {lines[-1] if lines else 'no message'}",
                where=self.address.name,
                got=f"exit {status}",
            )

    def ask(self, work: str, folder: str, *, given: bytes = b"") -> Any:
        """What `over_there.py` answers."""
        return json.loads(self.run(self._there(work, folder), given=given))

    def receive(self, folder: str, pieces: Iterator[bytes]) -> None:
        """Send files to `over_there.py`."""
        self.send(self._there("receive", folder), pieces)

    def _there(self, work: str, folder: str) -> list[str]:
        source = Path(over_there.__file__).read_text(encoding="utf-8")
        return [self.python, "-c", source, work, folder]


File = tuple[Path, int, str]
"""(here, bytes, sha256)"""


@contextmanager
def measured_there(
    remote: Remote, bundle: Path, *, wheel: Path | None, say: Say
) -> Iterator[Callable[[Workload], dict[str, Any]]]:
    """Copy what a measurement needs; a function that measures a workload there. The copy is removed
    at the end; where that end is an error it stays, so that another try goes on from it.
    """
    files = _files(bundle, wheel)
    folder = f"~/{CACHE}/check-{_digest(files)}"
    found = _connected(lambda: remote.ask("probe", folder), remote)
    if found["python"] < OLDEST_PYTHON:
        raise DeviceError(
            "Python is too old over there",
            where=remote.address.name,
            expected="3.10 or newer",
            got=".".join(map(str, found["python"])),
            fix="Name another one with --remote-python.",
        )
    if not _same_machine(found):  # a library of this machine would not load there
        files = {path: file for path, file in files.items() if not path.endswith((".so", ".dylib"))}
    need = sum(size for _, size, _ in files.values())
    if found["free_bytes"] < 1.1 * need:
        raise DeviceError(
            "there is too little room over there",
            where=f"{remote.address.name}:{folder}",
            expected=f"{1.1 * need / 1e6:,.0f} MB",
            got=f"{found['free_bytes'] / 1e6:,.0f} MB free",
        )
    _copy(remote, folder, files, say)
    python = _environment(remote, folder, found, wheel, say)
    home = remote.run(["sh", "-c", 'printf %s "$HOME"']).decode()
    place = folder.replace("~", home, 1)

    def measure(workload: Workload) -> dict[str, Any]:
        own = replace(workload, bundle=f"{place}/{BUNDLE}")
        words = [python, "-m", "edgetune.runtime.check.latency", json.dumps(asdict(own))]
        code = [f"XDG_CACHE_HOME={place}/cache"]  # ONNX Runtime keeps a number of the device there
        code += [] if wheel else [f"PYTHONPATH={place}/{CODE}"]
        answer = _connected(lambda: remote.run(["env", *code, *words]), remote)
        result: dict[str, Any] = json.loads(answer)
        return result

    yield measure
    _connected(lambda: remote.ask("remove", folder), remote)


def host_there(remote: Remote) -> dict[str, Any]:
    """What `probe` says of the machine, for the document."""
    found: dict[str, Any] = remote.ask("probe", f"~/{CACHE}/none")
    return {
        "arch": found["machine"],
        "system": found["system"],
        "python": ".".join(map(str, found["python"])),
        "address": remote.address.name,
    }


def _connected(call: Callable[[], Any], remote: Remote) -> Any:
    try:
        return call()
    except ConnectionError as error:
        raise DeviceError(
            f"no connection: {error}",
            where=f"ssh {remote.address.name}",
            fix="What works with `ssh` in a terminal, without a password, works here.",
        ) from error


def _files(bundle: Path, wheel: Path | None) -> dict[str, File]:
    """What is copied, by its path over there: the bundle, and the wheel or this package's own
    rooms.
    """
    found = {
        f"{BUNDLE}/{path.relative_to(bundle).as_posix()}": path
        for path in sorted(bundle.rglob("*"))
        if path.is_file()
    }
    if wheel is not None:
        if not wheel.is_file():
            raise DeviceError("no such wheel", where=str(wheel))
        found[wheel.name] = wheel
    else:
        root = Path(core.__file__).parents[1]
        inside = [root / "__init__.py", root / "py.typed"]
        for room in ROOMS:
            inside += sorted(path for path in (root / room).rglob("*") if path.is_file())
        found |= {
            f"{CODE}/edgetune/{path.relative_to(root).as_posix()}": path
            for path in inside
            if path.is_file() and not LEFT_OUT.search(path.as_posix())
        }
    return {name: (path, path.stat().st_size, sha256_file(path)) for name, path in found.items()}


def _digest(files: Mapping[str, File]) -> str:
    return hashlib.sha256(
        json.dumps({name: digest for name, (_, _, digest) in files.items()}).encode()
    ).hexdigest()[:16]


def _same_machine(found: Mapping[str, Any]) -> bool:
    return (found["system"], found["machine"]) == (platform.system(), platform.machine())


def _copy(remote: Remote, folder: str, files: Mapping[str, File], say: Say) -> None:
    """Send what is not there yet; a connection that is cut is tried again, from where it ended."""
    wanted = json.dumps({name: [size, digest] for name, (_, size, digest) in files.items()})
    for attempt in range(TRIES):
        try:
            begun: dict[str, int] = remote.ask("lacks", folder, given=wanted.encode())
            if not begun:
                return
            left = sum(files[name][1] - at for name, at in begun.items())
            say(f"copying {len(begun)} files, {left / 1e6:,.1f} MB, to {remote.address.name} …")
            remote.receive(folder, _stream(begun, files))
        except ConnectionError as error:
            if attempt + 1 == TRIES:
                raise DeviceError(
                    f"the connection was cut {TRIES} times: {error}",
                    where=f"ssh {remote.address.name}",
                    fix="What was copied is kept there: the same command goes on from it.",
                ) from error
            say(f"the connection was cut ({error}); once more")
            time.sleep(PAUSES[attempt])


def _stream(begun: Mapping[str, int], files: Mapping[str, File]) -> Iterator[bytes]:
    for name, at in begun.items():
        path, size, digest = files[name]
        head = {"path": name, "from": at, "size": size, "sha256": digest}
        yield json.dumps(head).encode() + b"\n"
        with path.open("rb") as file:
            file.seek(at)
            while piece := file.read(1 << 20):
                yield piece


def _environment(
    remote: Remote, folder: str, found: Mapping[str, Any], wheel: Path | None, say: Say
) -> str:
    """The Python that measures: the machine's own where it has what is needed, else one of our own
    in the copy's folder, with what its package index gives.
    """
    if wheel is None and not found["missing"]:
        return str(found["executable"])
    python = f"{folder}/{ENVIRONMENT}/bin/python"
    wanted = [f"{folder}/{wheel.name}"] if wheel else list(found["missing"])
    say(f"installing {', '.join(Path(name).name for name in wanted)} over there …")
    script = " && ".join(
        (
            f"{shlex.quote(remote.python)} -m venv --system-site-packages {folder}/{ENVIRONMENT}",
            f"{python} -m pip install --quiet {' '.join(wanted)}",
            f"echo {python}",
        )
    )
    return _connected(lambda: remote.run(["sh", "-c", script]), remote).decode().split()[-1]
