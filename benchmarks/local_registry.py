"""A container registry of its own on this machine, for benchmarks and tests: Debian's package
`docker-registry`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAM = "docker-registry"
INSTALL = f"needs a registry: apt-get install {PROGRAM}"


def is_installed() -> bool:
    """Whether the program is on the path."""
    return shutil.which(PROGRAM) is not None


@contextlib.contextmanager
def local_registry(folder: Path, *, tls: tuple[Path, Path] | None = None) -> Iterator[str]:
    """`oci://127.0.0.1:PORT`, on a free port, with its blobs in `folder`, for the time of the
    block. `tls`: the PEM files of its certificate and its key; without, plain HTTP.
    """
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = int(listening.getsockname()[1])
    settings: dict[str, Any] = {
        "version": "0.1",
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(folder / "blobs")}},
        "http": {"addr": f"127.0.0.1:{port}"},
    }
    if tls is not None:
        certificate, key = map(str, tls)
        settings["http"] |= {"tls": {"certificate": certificate, "key": key}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yml").write_text(json.dumps(settings))  # JSON is YAML
    command = [PROGRAM, "serve", str(folder / "config.yml")]
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        try:
            _wait_for(port, process)
            yield f"oci://127.0.0.1:{port}"
        finally:
            process.terminate()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.05)
    raise RuntimeError("the registry stopped")
