"""What opens with `--require-signature`: bundles, adapters from elsewhere, over HTTP too."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import CommandLine
from runtime_helpers import ENCODER_ADAPTERS, decoder_bundle, encoder_bundle
from server_helpers import Running, serve
from signature_helpers import Keys, make_keys

from edgetune.core.errors import EdgetuneError, SignatureError
from edgetune.runtime import Runtime
from edgetune.runtime.adapters import sources
from edgetune.runtime.adapters.sources import AdapterSources
from edgetune.runtime.bundle.manifest import read_manifest
from edgetune.runtime.signature.envelope import SIGNATURE, Signed
from edgetune.runtime.signature.folder import check_signature, digests_of, sign_folder
from edgetune.runtime.signature.keys import PublicKey, read_private_key
from edgetune.runtime.tasks.open_bundle import OpenBundle


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def bundle(tiny_encoder: Path, keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Signed."""
    copy = tmp_path_factory.mktemp("signed") / "bundle"
    shutil.copytree(encoder_bundle(tiny_encoder), copy)
    sign_folder(copy, read_private_key(keys.private))
    return copy


@pytest.fixture
def adapter(bundle: Path, tmp_path: Path) -> Path:
    """A folder that is not signed yet."""
    folder = tmp_path / "incoming" / "mood"
    shutil.copytree(bundle / "adapters" / "mood", folder)
    return folder


def test_a_signed_bundle_opens_and_takes_signed_adapters_only(
    bundle: Path, adapter: Path, keys: Keys
) -> None:
    with Runtime.open(bundle, threads=1, signed_by=keys.public) as runtime:
        with pytest.raises(SignatureError, match="no signature"):
            runtime.load_adapter("hot", adapter)
        sign_folder(adapter, read_private_key(keys.private))
        runtime.load_adapter("hot", adapter)
        assert runtime.classify(["hello"], "hot")[0].label in ENCODER_ADAPTERS["mood"]


def test_a_manifest_changed_together_with_its_hashes_does_not_open(
    bundle: Path, keys: Keys, tmp_path: Path
) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    manifest = copy / "edgetune.json"
    manifest.write_text(manifest.read_text().replace('"calm"', '"glad"'))
    Runtime.open(copy, threads=1).close()  # hashes alone do not notice
    with pytest.raises(SignatureError, match=r"edgetune\.json: changed"):
        Runtime.open(copy, threads=1, signed_by=keys.public)


def test_another_key_opens_nothing(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(SignatureError, match="not this key"):
        Runtime.open(bundle, threads=1, signed_by=make_keys(tmp_path).public)


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "edgetune_adapter.json")


def other_content(path: Path) -> None:
    """The same adapter in other bytes; JSON still says the same."""
    raw = bytearray(path.read_bytes())
    if path.suffix == ".json":
        raw += b"\n"
    else:
        raw[-1] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("name", ADAPTER_FILES)
@pytest.mark.parametrize("change", [other_content, Path.unlink])
def test_an_adapter_changed_between_check_and_use_is_not_used(
    bundle: Path, adapter: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch,
    name: str, change: Callable[[Path], None],
) -> None:  # fmt: skip
    sign_folder(adapter, read_private_key(keys.private))

    def check_then_change(folder: Path, key: PublicKey) -> Signed:
        signed = check_signature(folder, key)
        change(adapter / name)
        return signed

    with Runtime.open(bundle, threads=1, signed_by=keys.public) as runtime:
        monkeypatch.setattr(sources, "check_signature", check_then_change)
        with pytest.raises(EdgetuneError):
            runtime.load_adapter("hot", adapter)
        assert "hot" not in runtime.adapters


@pytest.mark.parametrize("name", ADAPTER_FILES)
def test_a_shipped_adapter_changed_after_the_opening_is_not_used(
    bundle: Path, keys: Keys, tmp_path: Path, name: str
) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    with Runtime.open(tmp_path / "bundle", threads=1, signed_by=keys.public) as runtime:
        runtime.classify(["hello"], "intent")
        other_content(tmp_path / "bundle" / "adapters" / "mood" / name)
        with pytest.raises(EdgetuneError):
            runtime.classify(["hello"], "mood")


def test_a_merged_adapters_head_changed_after_the_opening_is_not_used(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(decoder_bundle(tiny_decoder), tmp_path / "bundle")
    signed = digests_of(copy)
    manifest = replace(read_manifest(copy), mode="merged")
    entry = replace(manifest.adapters[0], path=None, task="sequence-classification")
    found = AdapterSources(copy, manifest, None, signed=signed)
    for name in ADAPTER_FILES:
        other_content(copy / "adapters" / entry.name / name)
        with pytest.raises(SignatureError, match=f"{name}: changed while it was read"):
            found.read(entry.name, entry)
        shutil.copytree(decoder_bundle(tiny_decoder), copy, dirs_exist_ok=True)


@pytest.mark.parametrize("name", ["edgetune.json", "tokenizer.json", "adapters/mood/new.txt"])
def test_a_bundle_changed_while_it_is_opened_is_refused(
    bundle: Path, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    file = shutil.copytree(bundle, tmp_path / "bundle") / name

    def opened(*arguments: Any, **options: Any) -> OpenBundle:
        before = file.stat() if file.exists() else None
        file.write_bytes(file.read_bytes() if before else b"new")
        if before:  # its writer hides it
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        return OpenBundle(*arguments, **options)

    monkeypatch.setattr("edgetune.runtime.tasks.runtime.OpenBundle", opened)
    with pytest.raises(SignatureError, match=f"changed while it was opened: {name}"):
        Runtime.open(tmp_path / "bundle", threads=1, signed_by=keys.public)


@pytest.mark.parametrize("shares", [True, False])
def test_a_bundle_that_another_pull_takes_links_to_opens_all_the_same(
    bundle: Path, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shares: bool
) -> None:
    file = shutil.copytree(bundle, tmp_path / "bundle") / "tokenizer.json"
    link = tmp_path / "link"
    if not shares:
        os.link(file, link)

    def opened(*arguments: Any, **options: Any) -> OpenBundle:
        if shares and not link.exists():
            os.link(file, link)
        elif not shares:
            link.unlink(missing_ok=True)
        return OpenBundle(*arguments, **options)

    monkeypatch.setattr("edgetune.runtime.tasks.runtime.OpenBundle", opened)
    with Runtime.open(tmp_path / "bundle", threads=1, signed_by=keys.public) as runtime:
        assert "mood" in runtime.adapters


def test_what_cannot_be_read_is_explained_by_who_wrote_there(
    bundle: Path, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = shutil.copytree(bundle, tmp_path / "bundle") / "tokenizer.json"

    def opened(*arguments: Any, **options: Any) -> OpenBundle:
        file.write_bytes(b"{")
        return OpenBundle(*arguments, **options)

    monkeypatch.setattr("edgetune.runtime.tasks.runtime.OpenBundle", opened)
    with pytest.raises(SignatureError, match=r"changed while it was opened: tokenizer\.json"):
        Runtime.open(tmp_path / "bundle", threads=1, signed_by=keys.public)


def test_a_manifest_is_parsed_from_the_bytes_that_were_signed(
    bundle: Path, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    manifest = tmp_path / "bundle" / "edgetune.json"

    def check_then_change(folder: Path, key: PublicKey) -> Signed:
        signed = check_signature(folder, key)
        manifest.write_text(manifest.read_text().replace('"calm"', '"glad"'))
        return signed

    monkeypatch.setattr("edgetune.runtime.signature.folder.check_signature", check_then_change)
    monkeypatch.setattr("edgetune.runtime.tasks.runtime.as_exported", pytest.fail)  # not so far
    with pytest.raises(SignatureError, match=r"edgetune\.json: changed"):
        Runtime.open(tmp_path / "bundle", threads=1, signed_by=keys.public)


@pytest.fixture
def running(bundle: Path, adapter: Path, keys: Keys) -> Iterator[Running]:
    with serve(
        bundle, adapter_folders=(adapter.parent.resolve(),), opened={"signed_by": keys.public}
    ) as found:
        yield found


def test_over_http_an_unsigned_adapter_is_refused(
    running: Running, adapter: Path, keys: Keys
) -> None:
    body = {"lora_name": "new", "lora_path": str(adapter)}
    answer = running.post("/v1/load_lora_adapter", body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "signature_error")
    sign_folder(adapter, read_private_key(keys.private))
    assert running.post("/v1/load_lora_adapter", body).status_code == 200
    (adapter / "README.md").write_text("added")
    answer = running.post("/v1/load_lora_adapter", {**body, "load_inplace": True})
    assert answer.json()["error"]["code"] == "signature_error"
    assert running.post("/classify", {"model": "new", "input": "hello"}).status_code == 200


def test_the_commands_sign_verify_and_require(
    bundle: Path, adapter: Path, keys: Keys, command_line: CommandLine
) -> None:
    assert command_line("verify", adapter, "--key", keys.public)[0] == 1
    assert command_line("sign", adapter, "--key", keys.private, "--version", 3)[0] == 0
    code, out, _ = command_line("verify", adapter, "--key", keys.public)
    assert (code, out.rstrip().endswith(f"as signed by {keys.public}, version 3")) == (0, True)
    assert command_line("verify", bundle, "--key", keys.public)[0] == 0
    ask = ("predict", bundle, "hello", "--adapter", "mood", "--require-signature", keys.public)
    assert command_line(*ask)[0] == 0
    signature = (bundle / SIGNATURE).read_text()
    (bundle / SIGNATURE).unlink()
    try:
        code, _, err = command_line(*ask)
        assert (code, err.count("\n")) == (2, 1) and "there is no signature" in err
    finally:
        (bundle / SIGNATURE).write_text(signature)


def test_what_is_not_as_exported_is_not_signed(
    bundle: Path, keys: Keys, command_line: CommandLine, tmp_path: Path
) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    (copy / SIGNATURE).unlink()
    (copy / "tokenizer.json").write_text("{}")
    code, _, err = command_line("sign", copy, "--key", keys.private)
    assert (code, "tokenizer.json" in err, (copy / SIGNATURE).exists()) == (1, True, False)
