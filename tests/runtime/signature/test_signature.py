"""Signatures of folders: what is refused, whoever changed it; the format is the OpenSSF's."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from process_helpers import python
from signature_helpers import NEEDED, Keys, make_keys

from edgetune.core.errors import InputError, SignatureError
from edgetune.runtime.signature.envelope import SIGNATURE
from edgetune.runtime.signature.folder import check_signature, sign_folder
from edgetune.runtime.signature.keys import read_private_key, read_public_key

pytest.importorskip("cryptography", reason=NEEDED)
HERE = Path(__file__).parent
FILES = {"edgetune.json": b'{"files": {}}', "adapters/a/adapter_model.safetensors": b"\0" * 300}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def signed(tmp_path: Path, keys: Keys) -> Path:
    folder = tmp_path / "bundle"
    for path, content in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    sign_folder(folder, read_private_key(keys.private), version=7)
    return folder


def refused(folder: Path, keys: Keys) -> str:
    with pytest.raises(SignatureError) as error:
        check_signature(folder, read_public_key(keys.public))
    assert "\n" not in str(error.value) or "files differ" in str(error.value)
    return str(error.value)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((folder / SIGNATURE).read_text())
    (folder / SIGNATURE).write_text(json.dumps(change(document) or document))


def restate(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    """Change the statement inside the envelope."""

    def inside(document: dict[str, Any]) -> None:
        envelope = document["dsseEnvelope"]
        statement = json.loads(base64.b64decode(envelope["payload"]))
        change(statement)
        envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()

    return inside


def test_a_signed_folder_says_what_was_signed(signed: Path, keys: Keys) -> None:
    found = check_signature(signed, read_public_key(keys.public))
    assert (found.name, set(found.files), found.version) == ("bundle", set(FILES), 7)


@pytest.mark.parametrize("curve", ["secp256r1", "secp384r1", "secp521r1"])
def test_every_curve_of_the_format_signs(curve: str, tmp_path: Path) -> None:
    keys = make_keys(tmp_path, "own", curve)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("content")
    sign_folder(tmp_path / "folder", read_private_key(keys.private))
    assert check_signature(tmp_path / "folder", read_public_key(keys.public)).version is None


def test_a_changed_file_is_refused(signed: Path, keys: Keys) -> None:
    (signed / "edgetune.json").write_bytes(b'{"files": 0}')
    assert "edgetune.json: changed since it was signed" in refused(signed, keys)


def test_an_added_a_missing_and_a_changed_file_are_all_named(signed: Path, keys: Keys) -> None:
    (signed / "edgetune.json").unlink()
    (signed / "adapters" / "a" / "more.txt").write_text("x")
    (signed / "adapters" / "a" / "adapter_model.safetensors").write_bytes(b"\1" * 300)
    line = refused(signed, keys)
    assert "edgetune.json: missing" in line
    assert "adapters/a/more.txt: not signed" in line
    assert "adapter_model.safetensors: changed" in line


def test_a_statement_changed_with_its_files_is_refused(signed: Path, keys: Keys) -> None:
    content = b"other weights"
    (signed / "edgetune.json").write_bytes(content)

    def follow(statement: dict[str, Any]) -> None:
        import hashlib

        statement["predicate"]["resources"][1]["digest"] = hashlib.sha256(content).hexdigest()

    rewrite(signed, restate(follow))
    assert "not this key's" in refused(signed, keys)


def test_another_version_number_is_refused(signed: Path, keys: Keys) -> None:
    rewrite(signed, restate(lambda s: s["predicate"].update({"edgetune_version_number": 8})))
    assert "not this key's" in refused(signed, keys)


def test_another_publishers_signature_is_refused(signed: Path, keys: Keys, tmp_path: Path) -> None:
    other = make_keys(tmp_path, "other")
    sign_folder(signed, read_private_key(other.private))
    assert "not this key's" in refused(signed, keys)
    hint = read_public_key(keys.public).hint
    rewrite(signed, lambda d: d["verificationMaterial"]["publicKey"].update(hint=hint))
    assert "not this key's" in refused(signed, keys)


def test_an_unsigned_folder_is_refused(signed: Path, keys: Keys) -> None:
    (signed / SIGNATURE).unlink()
    assert "there is no signature" in refused(signed, keys)


def test_links_are_refused(signed: Path, keys: Keys, tmp_path: Path) -> None:
    file = signed / "edgetune.json"
    (tmp_path / "same").write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(tmp_path / "same")
    assert "edgetune.json: a link" in refused(signed, keys)
    file.unlink()
    shutil.move(tmp_path / "same", file)
    shutil.move(signed / "adapters", tmp_path / "adapters")
    (signed / "adapters").symlink_to(tmp_path / "adapters")
    assert "adapters: a link" in refused(signed, keys)


def test_a_pipe_is_refused_and_not_waited_for(signed: Path, keys: Keys) -> None:
    os.mkfifo(signed / "pipe")
    assert "pipe: no file" in refused(signed, keys)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"mediaType": 1}',
        b'{"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json", "verificationMaterial": []'
        b', "dsseEnvelope": {}}',
        b"[" * 100_000,
        b'{"a": ' * 70 + b"1" + b"}" * 70,
        b" " * (5 << 20),
    ],
)
def test_a_hostile_signature_file_is_one_line(signed: Path, keys: Keys, raw: bytes) -> None:
    (signed / SIGNATURE).write_bytes(raw)
    assert SIGNATURE in refused(signed, keys)


def test_a_truncated_signature_is_refused_wherever_it_ends(signed: Path, keys: Keys) -> None:
    raw = (signed / SIGNATURE).read_bytes()
    for end in range(0, len(raw) - 2, 97):
        (signed / SIGNATURE).write_bytes(raw[:end])
        refused(signed, keys)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["dsseEnvelope"].update(payload="é"),
        lambda d: d["dsseEnvelope"].update(payload=7),
        lambda d: d["dsseEnvelope"].update(payloadType="text/plain"),
        lambda d: d["dsseEnvelope"].update(signatures=[]),
        lambda d: d["dsseEnvelope"]["signatures"].append(d["dsseEnvelope"]["signatures"][0]),
        lambda d: d["dsseEnvelope"]["signatures"][0].update(sig="AAAA"),
        lambda d: d["dsseEnvelope"]["signatures"][0].update(sig=None),
        lambda d: d.update(mediaType="application/json"),
    ],
)
def test_an_envelope_of_another_form_is_refused(
    signed: Path, keys: Keys, change: Callable[[dict[str, Any]], Any]
) -> None:
    rewrite(signed, change)
    refused(signed, keys)


@pytest.mark.parametrize(
    "resource",
    [
        {"name": "../outside", "algorithm": "sha256", "digest": "0" * 64},
        {"name": "/outside", "algorithm": "sha256", "digest": "0" * 64},
        {"name": "a/./b", "algorithm": "sha256", "digest": "0" * 64},
        {"name": "edgetune.json", "algorithm": "sha256", "digest": "0" * 64},
        {"name": "short", "algorithm": "sha256", "digest": "00"},
        {"name": 7, "algorithm": "sha256", "digest": "0" * 64},
        {},
        None,
    ],
)
def test_an_odd_statement_is_refused_though_the_key_signed_it(
    signed: Path, keys: Keys, resource: Any
) -> None:
    from edgetune.runtime.signature import envelope

    private = read_private_key(keys.private)

    def sign_anew(document: dict[str, Any]) -> None:
        restate(lambda s: s["predicate"]["resources"].append(resource))(document)
        payload = base64.b64decode(document["dsseEnvelope"]["payload"])
        sig = base64.b64encode(private.sign(envelope._signed_bytes(payload))).decode()
        document["dsseEnvelope"]["signatures"][0]["sig"] = sig

    rewrite(signed, sign_anew)
    assert "not a signature that can be read" in refused(signed, keys)


def test_keys_of_other_kinds_are_one_line(tmp_path: Path, keys: Keys) -> None:
    (tmp_path / "no.pem").write_text("no key")
    for path in (tmp_path / "no.pem", tmp_path / "not there", tmp_path):
        for read in (read_public_key, read_private_key):
            with pytest.raises(SignatureError, match="key"):
                read(path)
    with pytest.raises(SignatureError, match="a private key, which belongs on no device"):
        read_public_key(keys.private)
    with pytest.raises(SignatureError, match="P-256, P-384 or P-521"):
        read_public_key(make_keys(tmp_path, "rsa", "rsa").public)


def test_a_locked_key_needs_its_passphrase(tmp_path: Path) -> None:
    locked = make_keys(tmp_path, "locked", passphrase="open sesame")
    assert read_private_key(locked.private, "open sesame").public == read_public_key(locked.public)
    for wrong in (None, "wrong"):
        with pytest.raises(SignatureError):
            read_private_key(locked.private, wrong)


def test_without_the_package_it_is_one_line(keys: Keys) -> None:
    code = (
        "import sys; sys.modules['cryptography'] = None\n"
        "from edgetune.runtime.signature.keys import read_public_key\n"
        f"read_public_key({str(keys.public)!r})"
    )
    assert f"{InputError.__name__}: signatures need the package cryptography" in python(code).stderr


def test_what_model_signing_signed_is_accepted() -> None:
    folder, key = HERE / "by_model_signing", read_public_key(HERE / "by_model_signing.pem")
    assert set(check_signature(folder, key).files) == {"a.txt", "b/c.txt"}


def test_model_signing_accepts_what_is_signed_here(signed: Path, keys: Keys) -> None:
    verifying = pytest.importorskip(
        "model_signing.verifying", reason="pip install model-signing runs it"
    )
    verifier = verifying.Config().use_elliptic_key_verifier(public_key=keys.public)
    verifier.verify(signed, signed / SIGNATURE)
    (signed / "edgetune.json").write_bytes(b"changed")
    with pytest.raises(ValueError, match="mismatch"):
        verifier.verify(signed, signed / SIGNATURE)
