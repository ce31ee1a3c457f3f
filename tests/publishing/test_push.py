"""What is pushed to a real registry comes back as it was, and nothing goes there twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runtime_helpers import DIGEST
from source_helpers import content, docker_registry, small_adapter, small_bundle

from edgetune.cli import main
from edgetune.core.errors import EdgetuneError, SourceError
from edgetune.publishing import registry as publishing_registry
from edgetune.publishing.package import package
from edgetune.publishing.push import push
from edgetune.runtime.sources.pull import pull, resolve
from edgetune.runtime.sources.registry import Registry
from edgetune.runtime.sources.transport import StatusError


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with docker_registry(tmp_path_factory.mktemp("registry")) as url:
        yield url


def test_a_bundle_and_an_adapter_come_back_as_they_went(registry: str, tmp_path: Path) -> None:
    for kind, folder in (
        ("bundle", small_bundle(tmp_path / "bundle")),
        ("adapter", small_adapter(tmp_path / "adapter")),
    ):
        pushed = push(folder, f"{registry}/round/{kind}:v1")
        done = pull(pushed.url, tmp_path / f"here-{kind}", store=tmp_path / "store")
        assert (done.artifact.kind, done.artifact.base) == (kind, DIGEST)
        assert done.artifact.digest == pushed.artifact.digest == pushed.url.partition("@")[2]
        assert content(tmp_path / f"here-{kind}") == content(folder)


def test_only_what_the_registry_lacks_is_sent(registry: str, tmp_path: Path) -> None:
    first = small_bundle(tmp_path / "v1", seed=5, adapter_seed=1)
    second = small_bundle(tmp_path / "v2", seed=5, adapter_seed=2)
    url = f"{registry}/shop/home"
    sent = [
        push(folder, f"{url}:{tag}").sent_bytes
        for folder, tag in ((first, "v1"), (first, "v1"), (second, "v2"))
    ]
    old, new = content(first), content(second)
    own = sum(len(raw) for path, raw in new.items() if old[path] != raw)
    assert sent == [sum(map(len, old.values())), 0, own]


def test_a_tag_moves_and_a_digest_stays(registry: str, tmp_path: Path) -> None:
    one, two = (
        push(small_adapter(tmp_path / f"v{n}", seed=n), f"{registry}/tag:x") for n in (1, 2)
    )
    assert resolve(f"{registry}/tag:x").digest == two.artifact.digest
    assert resolve(one.url).digest == one.artifact.digest


def test_a_host_in_capitals_is_the_same_host(registry: str, tmp_path: Path) -> None:
    host = registry.replace("127.0.0.1", "LocalHost")
    url = push(small_adapter(tmp_path / "a"), f"{host}/team/a:v1").url
    assert url.startswith(registry.replace("127.0.0.1", "localhost"))
    assert pull(f"{host}/team/a:v1", tmp_path / "b", store=tmp_path / "store").fetched_bytes


@pytest.mark.parametrize("target", ["localhost/a", "r.example/team/a:v1", "box:5000/a"])
def test_a_registry_without_oci_is_not_taken_for_a_folder(target: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=f"Write oci://{target}"):
        push(small_adapter(tmp_path / "a"), target)


def test_a_run_publishes_its_adapter(registry: str, tmp_path: Path) -> None:
    adapter = small_adapter(tmp_path / "run" / "adapter")
    pushed = push(tmp_path / "run", f"{registry}/run:v1")
    assert {file.path for file in pushed.artifact.files} == set(content(adapter))


def test_the_manifest_is_that_of_modelpack(tmp_path: Path) -> None:
    packed = package(small_bundle(tmp_path / "bundle"))
    manifest, config = json.loads(packed.manifest), json.loads(packed.config)
    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert manifest["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    kinds = {
        layer["annotations"]["org.cncf.model.filepath"]: layer["mediaType"].rpartition("model.")[2]
        for layer in manifest["layers"]
    }
    assert kinds["model.onnx.data"] == "weight.v1.raw"
    assert kinds["edgetune.json"] == kinds["tokenizer.json"] == "weight.config.v1.raw"
    assert config["modelfs"] == {
        "type": "layers",
        "diffIds": [layer["digest"] for layer in manifest["layers"]],
    }
    assert package(tmp_path / "bundle").manifest == packed.manifest


def test_a_piece_that_did_not_arrive_is_sent_again(
    registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line breaks after a piece arrived, and before one: the registry is asked where it is."""
    monkeypatch.setattr(publishing_registry, "CHUNK_BYTES", 4000)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    request, patches = Registry.request, 0

    def flaky(self: Registry, method: str, path: str, **options: Any) -> Any:
        nonlocal patches
        patches += method == "PATCH"
        if method == "PATCH" and patches == 1:
            raise StatusError(path, 503, {}, "")
        answer = request(self, method, path, **options)
        if method == "PATCH" and patches == 3:
            answer.close()
            raise StatusError(path, 502, {}, "")
        return answer

    monkeypatch.setattr(Registry, "request", flaky)
    pushed = push(small_adapter(tmp_path / "home", seed=77), f"{registry}/pieces:v1")
    pull(pushed.url, tmp_path / "here", store=tmp_path / "store")
    assert content(tmp_path / "here") == content(tmp_path / "home")
    # 5 of the weights, one again; this registry forgets an upload whose reply was lost: 5 anew
    assert 6 <= patches <= 8


@pytest.mark.parametrize("damage", ["weights", "missing", "link", "nothing"])
def test_what_is_damaged_goes_nowhere(registry: str, tmp_path: Path, damage: str) -> None:
    bundle = small_bundle(tmp_path / "bundle")
    if damage == "weights":
        (bundle / "model.onnx.data").write_bytes(bytes(50_000))
    elif damage == "missing":
        (bundle / "tokenizer.json").unlink()
    elif damage == "link":
        (bundle / "more").symlink_to("/etc/hostname")
    else:
        bundle = tmp_path
    with pytest.raises(EdgetuneError):
        push(bundle, f"{registry}/damaged-{damage}:v1")
    with pytest.raises(EdgetuneError, match="no such artifact"):
        resolve(f"{registry}/damaged-{damage}:v1")


def test_an_adapter_that_was_changed_since_its_training_goes_nowhere(tmp_path: Path) -> None:
    adapter = small_adapter(tmp_path / "home")
    (adapter / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(EdgetuneError, match="not as it was trained"):
        push(adapter, str(tmp_path / "www"))
    assert not (tmp_path / "www").exists()


def test_a_push_replaces_only_what_was_pushed(tmp_path: Path) -> None:
    adapter = small_adapter(tmp_path / "home")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(EdgetuneError, match="something else"):
        push(adapter, str(tmp_path / "mine"))
    assert content(tmp_path / "mine") == {"letter.txt": b"dear"}


def test_the_commands_push_and_pull(
    registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("EDGETUNE_STORE", str(tmp_path / "store"))
    adapter, url = small_adapter(tmp_path / "home"), f"{registry}/cli:v1"
    for arguments in (["push", str(adapter), url], ["pull", url, str(tmp_path / "here")]):
        with pytest.raises(SystemExit) as done:
            main(arguments)
        assert done.value.code == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("adapter: 3 files, ") and said[1].startswith(f"{url}@sha256:")
    assert said[3] == said[1].partition("@")[2]
    with pytest.raises(SystemExit) as done:
        main(["pull", f"{registry}/cli:v9", str(tmp_path / "there")])
    assert done.value.code == 2
    assert "no such artifact" in capsys.readouterr().err
