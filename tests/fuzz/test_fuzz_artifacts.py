"""Hostile sources, drawn by a seed: what a pull leaves is one of the artifacts that were published,
to the byte, or the folder as it was; never anything in between, and nothing that was forged,
truncated, replayed or put together from two.

Who changes a file and every document that names its sha256 is not found by hashes; signatures are
for that.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fuzz.figures import ROUNDS, SEED, Figures
from source_helpers import OTHER_DIGEST, content, serving, small_adapter, small_bundle

from edgetune.core.errors import EdgetuneError
from edgetune.core.files import sha256_text
from edgetune.publishing.push import push
from edgetune.runtime.sources import pull as pull_module
from edgetune.runtime.sources import store as store_module
from edgetune.runtime.sources.pull import pull
from edgetune.runtime.sources.transport import Transport

INDEX, FILE_PATH = "artifact.json", "org.cncf.model.filepath"
CASES = 4 * ROUNDS
PATHS = (
    "../evil", "/tmp/evil", "a/../../evil", "..\\evil", "C:\\evil", ".hidden", "x\0y", "", "a//b",
    "adapter_config.json/x", "EDGETUNE.JSON", "n" * 600, "\ud800", "con.",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, 0, -1, True, 1.5, 10**18, 10**30, "", "sha256:", "sha256:" + "0" * 64, "x" * 5000, [],
    [[]], {}, {"a": {"b": []}}, OTHER_DIGEST, "bundle", "adapter",
)  # fmt: skip
Files = dict[str, bytes]


@dataclass
class Hostile:
    """What a server answers: files, and for some paths an answer that no server should give."""

    files: Files
    answers: dict[str, Callable[[Any], None]] = field(default_factory=dict)


class Server(http.server.BaseHTTPRequestHandler):
    """Answers as the case says."""

    def do_GET(self) -> None:
        server: Any = self.server
        case: Hostile = server.case
        path = self.path.lstrip("/")
        if (answer := case.answers.get(path)) is not None:
            answer(self)
            return
        raw = case.files.get(path)
        self.reply(404 if raw is None else 200, raw or b"")

    def reply(self, status: int, raw: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(raw)
        self.close_connection = True

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # who pulls hangs up
            super().handle()

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, *args: Any) -> None:
        pass


def any_file(case: Hostile, rng: random.Random) -> str:
    return rng.choice(sorted(case.files))


def forge(case: Hostile, other: Files, rng: random.Random) -> None:
    """A few bytes are others."""
    path = any_file(case, rng)
    raw = bytearray(case.files[path] or b"x")
    for _ in range(rng.randint(1, 3)):
        raw[rng.randrange(len(raw))] ^= rng.randint(1, 255)
    case.files[path] = bytes(raw)


def truncate(case: Hostile, other: Files, rng: random.Random) -> None:
    """A file that ends early or goes on."""
    path = any_file(case, rng)
    raw = case.files[path]
    case.files[path] = rng.choice([raw[: rng.randrange(len(raw) + 1)], raw + b"more", b""])


def replay(case: Hostile, other: Files, rng: random.Random) -> None:
    """Some files are those of the other version."""
    for path in rng.sample(sorted(case.files), rng.randint(1, 3)):
        case.files[path] = other.get(path, b"")


def replay_layers(case: Hostile, other: Files, rng: random.Random) -> None:
    """The manifest names files of the other version, and the server has them."""
    manifest, theirs = json.loads(case.files[INDEX]), json.loads(other[INDEX])
    layers = {layer["annotations"][FILE_PATH]: layer for layer in theirs["layers"]}
    for n, layer in enumerate(manifest["layers"]):
        path = layer["annotations"][FILE_PATH]
        if path in layers and rng.random() < 0.4:
            manifest["layers"][n], case.files[path] = layers[path], other[path]
    case.files[INDEX] = json.dumps(manifest).encode()


def change_manifest(case: Hostile, other: Files, rng: random.Random) -> None:
    """A value somewhere in the manifest is another one, or is gone."""
    manifest = json.loads(case.files[INDEX])
    places: list[Any] = [manifest, manifest["annotations"], *manifest["layers"]]
    places += [layer["annotations"] for layer in manifest["layers"]]
    place = rng.choice(places)
    key = rng.choice(sorted(place))
    if rng.random() < 0.2:
        del place[key]
    else:
        place[key] = rng.choice(PATHS if key == FILE_PATH else VALUES)
    case.files[INDEX] = json.dumps(manifest).encode()


def change_document(case: Hostile, other: Files, rng: random.Random) -> None:
    """A bundle's manifest or an adapter's metadata name other files or are cut short, and the
    artifact's manifest has their sha256.
    """
    names = ("edgetune.json", "edgetune_adapter.json")
    path = next(name for name in names if name in case.files)
    document = json.loads(case.files[path])
    name = rng.choice(sorted(document["files"]))
    document["files"][name] = {"sha256": "0" * 64, "bytes": 3} if "sites" in document else "0" * 64
    text = json.dumps(document)
    record(case, path, text[: rng.randrange(len(text))] if rng.random() < 0.5 else text)


def record(case: Hostile, path: str, text: str) -> None:
    """Serve this text, and name its sha256 in the manifest."""
    case.files[path] = text.encode()
    manifest = json.loads(case.files[INDEX])
    for layer in manifest["layers"]:
        if layer["annotations"][FILE_PATH] == path:
            layer |= {"size": len(text.encode()), "digest": f"sha256:{sha256_text(text)}"}
    case.files[INDEX] = json.dumps(manifest).encode()


def add_file(case: Hostile, other: Files, rng: random.Random) -> None:
    """One file more, somewhere it should not be."""
    manifest = json.loads(case.files[INDEX])
    layer = json.loads(json.dumps(rng.choice(manifest["layers"])))
    layer["annotations"][FILE_PATH] = rng.choice(PATHS)
    manifest["layers"].append(layer)
    case.files[INDEX] = json.dumps(manifest).encode()


def answer_badly(case: Hostile, other: Files, rng: random.Random) -> None:
    """Statuses, lengths and redirects of a broken or hostile server."""
    path = any_file(case, rng)
    raw = case.files[path]
    answers: list[Callable[[Any], None]] = [
        lambda to: to.reply(rng.choice([204, 301, 401, 403, 418, 500, 503]), b"no"),
        lambda to: to.reply(206, raw, Content_Range="bytes 5-9/10"),
        lambda to: to.reply(200, raw[: len(raw) // 2], length=len(raw)),
        lambda to: to.reply(200, raw, length=len(raw) // 2),
        lambda to: to.reply(302, b"", Location=f"/{path}"),
        lambda to: to.reply(302, b"", Location="file:///etc/hostname"),
        lambda to: to.reply(302, b"", Location="/nowhere"),
        lambda to: to.reply(200, raw, Content_Encoding="gzip"),
        lambda to: to.reply(200, bytes(5 << 20)),
        lambda to: to.wfile.write(b"\0\1\2 not HTTP\r\n\r\n"),
        lambda to: None,
    ]
    case.answers[path] = rng.choice(answers)


WAYS = (
    forge,
    truncate,
    replay,
    replay_layers,
    change_manifest,
    change_document,
    add_file,
    answer_badly,
)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Files]]:
    """Two versions of a bundle and of an adapter as a web server has them."""
    work = tmp_path_factory.mktemp("published")
    found: dict[str, list[Files]] = {"bundle": [], "adapter": []}
    for n in (1, 2):
        adapter = small_adapter(work / f"adapter{n}", seed=n, size=3000)
        bundle = small_bundle(work / f"bundle{n}", seed=n, adapter_seed=n)
        for kind, folder in (("adapter", adapter), ("bundle", bundle)):
            push(folder, str(work / f"{kind}-www{n}"))
            found[kind].append(content(work / f"{kind}-www{n}"))
    return found


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    with serving(Server) as opened:
        yield opened


@pytest.mark.parametrize("kind", ["adapter", "bundle"])
def test_a_hostile_source_leaves_what_was_published_or_nothing(
    kind: str,
    published: dict[str, list[Files]],
    server: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for room in (pull_module, store_module):  # power cuts are not what is tried here
        monkeypatch.setattr(room, "sync", lambda path: None)
    figures = Figures(f"artifacts, {kind}")
    versions = published[kind]
    good = [{path: raw for path, raw in files.items() if path != INDEX} for files in versions]
    before = tmp_path / "before"
    for path, raw in good[0].items():
        (before / path).parent.mkdir(parents=True, exist_ok=True)
        (before / path).write_bytes(raw)
    for seed in range(SEED, SEED + CASES // 2):
        rng = random.Random(f"{kind} {seed}")
        server.case = Hostile(dict(versions[1]))
        ways = rng.sample(WAYS, rng.choice([1, 1, 2]))
        here, store = tmp_path / "here", tmp_path / "store"
        if rng.random() < 0.5:
            shutil.rmtree(store, ignore_errors=True)  # else with what the last case left
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(before, here)
        with figures.case(seed):
            try:
                for way in ways:
                    way(server.case, versions[0], rng)
            except (ValueError, KeyError, StopIteration, TypeError, AttributeError):
                pass  # the first way left nothing for the second
            transport = Transport(timeout_s=2, attempts=2, sleep=lambda seconds: None)
            try:
                pull(server.url, here, store=store, transport=transport)
                figures.count("pulled")
            except EdgetuneError:
                if content(here) != good[0]:
                    figures.fault("wrong", f"seed {seed}: refused, and the folder changed")
                raise
            finally:
                left = {path.name for path in tmp_path.iterdir()} - {"before", "here", "store"}
                if left:
                    figures.fault("wrong", f"seed {seed}: left {left}")
            if content(here) not in good:
                figures.fault("wrong", f"seed {seed}: {[way.__name__ for way in ways]}")
    figures.check()
