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
import urllib.request
from collections.abc import Iterator
from pathlib import Path

PROGRAM = "docker-registry"
INSTALL = f"needs a registry: apt-get install {PROGRAM}"


def is_installed() -> bool:
    """Whether the program is on the path."""
    return shutil.which(PROGRAM) is not None


@contextlib.contextmanager
def local_registry(folder: Path) -> Iterator[str]:
    """`oci://127.0.0.1:PORT`, on a free port, with its blobs in `folder`, for the time of the
    block.
    """
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = int(listening.getsockname()[1])
    settings = {
        "version": "0.1",
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(folder / "blobs")}},
        "http": {"addr": f"127.0.0.1:{port}"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yml").write_text(json.dumps(settings))  # JSON is YAML
    command = [PROGRAM, "serve", str(folder / "config.yml")]
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        try:
            _wait_for(f"http://127.0.0.1:{port}/v2/", process)
            yield f"oci://127.0.0.1:{port}"
        finally:
            process.terminate()


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url):
            return
        time.sleep(0.05)
    raise RuntimeError("the registry stopped")
