"""A push to the hub: files, manifest and card in one commit; against a server that answers as the
hub's API does, because the hub itself is not reachable from a test.
"""

from __future__ import annotations

import base64
import http.server
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runtime_helpers import DIGEST
from source_helpers import content, serving, small_adapter, small_bundle

from edgetune.core.errors import SourceError
from edgetune.core.files import write_json
from edgetune.publishing.card import model_card
from edgetune.publishing.package import package
from edgetune.publishing.push import push
from edgetune.runtime.sources.pull import pull

COMMIT = "c" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """The calls of a commit with small files, and files by commit."""

    def do_POST(self) -> None:
        server: Any = self.server
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server.asked.append((self.path, self.headers.get("Authorization")))
        if self.path == "/api/repos/create":
            return self._json({"url": f"{server.url}/ann/home", "id": "ann/home"})
        if self.path.startswith("/api/models/ann/home/preupload/"):
            files = [file["path"] for file in json.loads(raw)["files"]]
            modes = [
                {"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files
            ]
            return self._json({"files": modes})
        if self.path.startswith("/api/models/ann/home/commit/"):
            for line in map(json.loads, raw.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    server.files[value["path"]] = base64.b64decode(value["content"])
            return self._json(
                {
                    "commitUrl": f"{server.url}/ann/home/commit/{COMMIT}",
                    "commitOid": COMMIT,
                    "success": True,
                }
            )
        if self.path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        return self._json({"error": "Repository not found"}, 404)

    def do_GET(self) -> None:
        server: Any = self.server
        server.asked.append((self.path, self.headers.get("Authorization")))
        name = self.path.removeprefix("/ann/home/resolve/").partition("/")[2]
        raw = server.files.get(name)
        self._send(404 if raw is None else 200, raw or b"")

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode())

    def _send(self, status: int, raw: bytes) -> None:
        self.send_response(status)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with serving(Hub) as server:
        server.files = {}
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield server


def test_what_is_pushed_to_the_hub_is_pulled_from_one_commit(hub: Any, tmp_path: Path) -> None:
    adapter = small_adapter(tmp_path / "home")
    pushed = push(adapter, "hf://ann/home")
    assert pushed.url == f"hf://ann/home@{COMMIT}"
    assert set(hub.files) == {*content(adapter), "artifact.json", "README.md"}
    hub.asked.clear()
    pull("hf://ann/home", tmp_path / "here", store=tmp_path / "store")
    assert content(tmp_path / "here") == content(adapter)
    paths = [path for path, _ in hub.asked]
    assert paths[0] == "/ann/home/resolve/main/artifact.json"
    assert all(path.startswith(f"/ann/home/resolve/{COMMIT}/") for path in paths[1:])
    assert {secret for _, secret in hub.asked} == {"Bearer hf_secret"}


def test_a_refusal_of_the_hub_is_one_line_without_the_token(hub: Any, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="the hub did not take it") as refused:
        push(small_adapter(tmp_path / "home"), "hf://bob/other")
    assert "\n" not in str(refused.value) and "hf_secret" not in str(refused.value)


def test_a_hub_that_does_not_answer_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(SourceError, match=r"the hub did not take it: .*refused"):
        push(small_adapter(tmp_path / "home"), "hf://ann/home")


def test_the_card_says_what_was_measured_and_what_was_not(tmp_path: Path) -> None:
    run = tmp_path / "run"
    small_adapter(run / "adapter")
    general = {"task": "arc", "metric": "accuracy", "before": 0.5, "after": 0.48}
    summary = {
        "metrics": {"accuracy": 0.91},
        "base_metrics": {"accuracy": 0.25},
        "data": [{"digests": {"train": DIGEST}, "rows": {"train": 300}}],
        "forgetting": [{**general, "low": -0.03, "high": -0.01}],
    }
    write_json(run / "summary.json", summary)
    card = model_card(package(run), "ann/home", licence="Apache-2.0")
    for line in (
        'license: "apache-2.0"',
        'pipeline_tag: "text-classification"',
        f"- `train`: 300 rows, `{DIGEST}`",
        "| `accuracy` | 0.25 | 0.91 |",
        "| `arc` | `accuracy` | 0.5 | 0.48 | -0.03 to -0.01 |",
        "The base, `builtin:minilm-l6`, is under Apache-2.0.",
        "An adapter alone has none: it is proven when it is exported.",
    ):
        assert line in card.splitlines(), line
    bare = model_card(package(small_bundle(tmp_path / "bundle")), "ann/b", licence=None)
    assert bare.count("Not measured.") == 2 and "Not said by the publisher" in bare


def test_nothing_from_elsewhere_leaves_its_place_in_the_card(tmp_path: Path) -> None:
    evil = "x`\n---\nlicense: mit | [click](http://evil)"
    adapter = small_adapter(tmp_path / "home", task=evil, metrics={evil: 1.0})
    lines = model_card(package(adapter), "ann/home", licence=None).splitlines()
    assert lines.count("---") == 2 and "license: mit" not in "\n".join(lines[:8])
    assert not any(line.startswith("license: mit") for line in lines)
