"""Places that artifacts come from: a real registry, a file server that breaks on request, and small
bundles and adapters that no model is needed for.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runtime_helpers import DIGEST, decoder_manifest

from edgetune.core.files import sha256_file, write_json
from edgetune.runtime.bundle.manifest import AdapterEntry, FileInfo

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from local_registry import INSTALL, is_installed, local_registry

OTHER_DIGEST = "sha256:" + "b" * 64


@contextlib.contextmanager
def docker_registry(folder: Path, *, tls: tuple[Path, Path] | None = None) -> Iterator[str]:
    """A registry of its own; the test is skipped where none is installed."""
    if not is_installed():
        pytest.skip(INSTALL)
    with local_registry(folder, tls=tls) as url:
        yield url


class FileServer(http.server.SimpleHTTPRequestHandler):
    """Serves a folder with ranges, and notes what it was asked for."""

    def do_GET(self) -> None:
        server: Any = self.server
        server.asked.append((self.path, dict(self.headers)))
        if (to := server.redirects.get(self.path)) is not None:
            self.send_response(302)
            self.send_header("Location", to)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if server.refuse > 0:
            server.refuse -= 1
            self.send_error(503)
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        self._send(path.read_bytes())

    def _send(self, raw: bytes) -> None:
        server: Any = self.server
        start, asked = 0, self.headers.get("Range")
        if asked and server.ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if start > len(raw):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(raw) - start))
        self.end_headers()
        if server.breaks > 0 and len(raw) > 5000:  # the line breaks in the middle
            server.breaks -= 1
            part = raw[start : start + (len(raw) - start) // 2]
            server.sent += len(part)
            self.wfile.write(part)
            self.close_connection = True
            return
        server.sent += len(raw) - start
        self.wfile.write(raw[start:])

    def log_message(self, *args: Any) -> None:
        pass


@contextlib.contextmanager
def file_server(folder: Path) -> Iterator[Any]:
    """A server (`url`, `asked`, `sent` bytes; set `breaks`, `refuse`, `ranges`, `redirects`)."""
    handler = functools.partial(FileServer, directory=str(folder))
    with serving(handler) as server:
        yield server


@contextlib.contextmanager
def serving(handler: Any) -> Iterator[Any]:
    """Any handler on a free port of this machine."""
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.asked, server.redirects = [], {}
    server.sent = server.breaks = server.refuse = 0
    server.ranges = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def small_adapter(
    folder: Path, *, seed: int = 0, size: int = 20_000, base: str = DIGEST, **changes: Any
) -> Path:
    """An adapter's files as edgetune writes them; its weights are noise."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}\n')
    (folder / "adapter_model.safetensors").write_bytes(random.Random(seed).randbytes(size))
    names = ("adapter_config.json", "adapter_model.safetensors")
    metadata = {
        "schema": 1,
        "base": {"name": "builtin:minilm-l6", "digest": base},
        "task": "sequence-classification",
        "metrics": {"accuracy": 0.75},
        "files": {name: sha256_file(folder / name) for name in names},
        **changes,
    }
    write_json(folder / "edgetune_adapter.json", metadata)
    return folder


def small_bundle(folder: Path, *, seed: int = 0, adapter_seed: int = 1) -> Path:
    """A bundle's files; `seed` decides the base's bytes, `adapter_seed` those of its adapter."""
    noise = random.Random(seed)
    small_adapter(folder / "adapters" / "one", seed=adapter_seed)
    for name in ("engine.onnx", "model.onnx", "tokenizer.json"):
        (folder / name).write_bytes(noise.randbytes(500))
    (folder / "model.onnx.data").write_bytes(noise.randbytes(50_000))
    files = {
        path.relative_to(folder).as_posix(): FileInfo(sha256_file(path), path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    entry = AdapterEntry("one", "adapters/one", "text-generation", None, None, None, 4, None)
    write_json(folder / "edgetune.json", decoder_manifest(files=files, adapters=(entry,)).to_dict())
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
