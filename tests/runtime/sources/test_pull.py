"""What a source has becomes a folder here: whole or not at all, and nothing is fetched twice."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from runtime_helpers import DIGEST
from source_helpers import OTHER_DIGEST, content, file_server, small_adapter, small_bundle

from edgetune.core.errors import OutputError, SourceError
from edgetune.publishing.push import push
from edgetune.runtime.sources.pull import pull, resolve
from edgetune.runtime.sources.transport import Transport


@pytest.fixture
def served(tmp_path: Path) -> Any:
    """A file server with an adapter that was pushed into its folder."""
    push(small_adapter(tmp_path / "home"), str(tmp_path / "www"))
    with file_server(tmp_path / "www") as server:
        yield server


def patient(attempts: int = 4) -> Transport:
    return Transport(attempts=attempts, sleep=lambda seconds: None)


def test_what_was_pushed_into_a_folder_is_pulled_from_a_web_server(
    served: Any, tmp_path: Path
) -> None:
    artifact = resolve(served.url)
    done = pull(artifact, tmp_path / "here", store=tmp_path / "store")
    assert (artifact.kind, artifact.base, done.fetched_bytes) == ("adapter", DIGEST, artifact.size)
    assert content(tmp_path / "here") == content(tmp_path / "home")


def test_a_bundle_as_exported_is_pulled_from_any_file_server(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "bundle")
    (bundle / "model.sig").write_text("{}")
    with file_server(bundle) as server:
        done = pull(server.url, tmp_path / "here", store=tmp_path / "store")
    assert (done.artifact.kind, done.artifact.base) == ("bundle", DIGEST)
    assert content(tmp_path / "here") == content(bundle)


def test_a_new_adapter_moves_its_own_bytes_only(tmp_path: Path) -> None:
    for n in (1, 2):
        small_bundle(tmp_path / f"v{n}", adapter_seed=n)
    first, second = (
        pull(tmp_path / f"v{n}", tmp_path / f"here{n}", store=tmp_path / "store") for n in (1, 2)
    )
    changed = {
        file.path: file.size for file in second.artifact.files if file not in first.artifact.files
    }
    assert second.fetched_bytes == sum(changed.values())
    assert set(changed) == {
        "edgetune.json",
        "adapters/one/adapter_model.safetensors",
        "adapters/one/edgetune_adapter.json",
    }
    data = [tmp_path / f"here{n}" / "model.onnx.data" for n in (1, 2)]
    assert data[0].samefile(data[1])


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_line_is_taken_up_where_it_broke(
    served: Any, tmp_path: Path, ranges: bool
) -> None:
    served.breaks, served.ranges = 2, ranges
    done = pull(served.url, tmp_path / "here", store=tmp_path / "store", transport=patient())
    assert content(tmp_path / "here") == content(tmp_path / "home")
    assert (done.fetched_bytes == done.artifact.size) == ranges


def test_the_next_command_goes_on_with_what_came(served: Any, tmp_path: Path) -> None:
    served.breaks = 1
    arguments: dict[str, Any] = {"store": tmp_path / "store", "transport": patient(1)}
    with pytest.raises(SourceError, match="no answer"):
        pull(served.url, tmp_path / "here", **arguments)
    assert not (tmp_path / "here").exists()
    done = pull(served.url, tmp_path / "here", **arguments)
    assert done.fetched_bytes == 10_000
    assert content(tmp_path / "here") == content(tmp_path / "home")


def test_a_half_that_was_damaged_is_fetched_anew(served: Any, tmp_path: Path) -> None:
    weights = max(resolve(served.url).files, key=lambda file: file.size)
    half = tmp_path / "store" / "partial" / weights.sha256
    half.parent.mkdir(parents=True)
    half.write_bytes(bytes(5000))
    pull(served.url, tmp_path / "here", store=tmp_path / "store")
    assert content(tmp_path / "here") == content(tmp_path / "home")


def test_a_busy_server_is_asked_again(served: Any, tmp_path: Path) -> None:
    served.refuse = 3
    pull(served.url, tmp_path / "here", store=tmp_path / "store", transport=patient())
    served.refuse = 5
    with pytest.raises(SourceError, match="HTTP 503"):
        pull(served.url, tmp_path / "here", store=tmp_path / "store", transport=patient())


@pytest.mark.parametrize("change", [b"x", b""], ids=["longer", "other"])
def test_other_bytes_than_the_manifest_names_leave_the_folder_as_it_was(
    served: Any, tmp_path: Path, change: bytes
) -> None:
    pull(served.url, tmp_path / "here", store=tmp_path / "store")
    before = content(tmp_path / "here")
    push(small_adapter(tmp_path / "v2", seed=2), str(tmp_path / "www"))
    weights = tmp_path / "www" / "adapter_model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw + change if change else bytes(len(raw)))
    with pytest.raises(SourceError, match=r"bytes than|more than its manifest"):
        pull(served.url, tmp_path / "here", store=tmp_path / "store", transport=patient())
    assert content(tmp_path / "here") == before
    assert {path.name for path in tmp_path.iterdir()} == {"here", "home", "store", "v2", "www"}


def test_a_damaged_file_of_the_store_is_fetched_again(served: Any, tmp_path: Path) -> None:
    pull(served.url, tmp_path / "here", store=tmp_path / "store")
    weights = max((tmp_path / "store" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    weights.chmod(0o644)
    weights.write_bytes(bytes(weights.stat().st_size))
    done = pull(served.url, tmp_path / "again", store=tmp_path / "store")
    assert done.fetched_bytes == 20_000
    assert content(tmp_path / "again") == content(tmp_path / "home")


def test_several_pulls_at_once_fetch_each_file_once(served: Any, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        done = list(
            pool.map(
                lambda n: pull(served.url, tmp_path / f"here{n}", store=tmp_path / "store"),
                range(4),
            )
        )
    assert sum(one.fetched_bytes for one in done) == done[0].artifact.size


def test_another_base_or_kind_is_refused_before_a_byte_comes(served: Any, tmp_path: Path) -> None:
    for wanted in ({"base": OTHER_DIGEST}, {"kind": "bundle"}):
        with pytest.raises(SourceError, match="another"):
            pull(served.url, tmp_path / "here", store=tmp_path / "store", **wanted)
    assert {path for path, _ in served.asked} == {"/artifact.json"}


def test_a_folder_with_anything_else_in_it_is_not_replaced(served: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="something else"):
        pull(served.url, tmp_path / "mine", store=tmp_path / "store")
    assert content(tmp_path / "mine") == {"letter.txt": b"dear"}


PATHS = [
    "../x",
    "/etc/x",
    "a/../../x",
    "a\\..\\x",
    "C:x",
    ".ssh/x",
    "a//x",
    "x\0",
    "x ",
    "CON.",
    "",
]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_leaves_the_folder_is_refused(served: Any, tmp_path: Path, path: str) -> None:
    index = tmp_path / "www" / "artifact.json"
    manifest = json.loads(index.read_text())
    manifest["layers"].append({**manifest["layers"][0], "annotations": {}})
    manifest["layers"][-1]["annotations"]["org.cncf.model.filepath"] = path
    index.write_text(json.dumps(manifest))
    with pytest.raises(SourceError, match="not an artifact of edgetune"):
        pull(served.url, tmp_path / "here", store=tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_bundle_whose_manifests_disagree_is_refused(tmp_path: Path) -> None:
    push(small_bundle(tmp_path / "one"), str(tmp_path / "www"))
    other = small_bundle(tmp_path / "two", adapter_seed=2)
    push(other, str(tmp_path / "www2"))
    manifests = [json.loads((tmp_path / w / "artifact.json").read_text()) for w in ("www", "www2")]
    path = "org.cncf.model.filepath"
    layers = [
        two if two["annotations"][path] == "edgetune.json" else one
        for one, two in zip(*(m["layers"] for m in manifests), strict=True)
    ]
    (tmp_path / "www" / "artifact.json").write_text(json.dumps({**manifests[0], "layers": layers}))
    (tmp_path / "www" / "edgetune.json").write_bytes((other / "edgetune.json").read_bytes())
    with pytest.raises(SourceError, match="names another adapters/one"):
        pull(tmp_path / "www", tmp_path / "here", store=tmp_path / "store")
    assert not (tmp_path / "here").exists()


def test_what_no_folder_uses_is_pruned(served: Any, tmp_path: Path) -> None:
    from edgetune.runtime.sources.store import Store

    pull(served.url, tmp_path / "here", store=tmp_path / "store")
    push(small_adapter(tmp_path / "v2", seed=2), str(tmp_path / "www"))
    pull(served.url, tmp_path / "here", store=tmp_path / "store")
    old = content(tmp_path / "home")
    same = content(tmp_path / "here")
    freed = sum(len(raw) for path, raw in old.items() if same[path] != raw)
    assert (Store(tmp_path / "store").prune(), Store(tmp_path / "store").prune()) == (freed, 0)
    assert pull(served.url, tmp_path / "x", store=tmp_path / "store").fetched_bytes == 0
