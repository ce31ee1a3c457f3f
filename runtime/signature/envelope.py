"""The file of a signature, in the format of the OpenSSF's model signing 1.0: a sigstore bundle
(JSON) around a DSSE envelope around an in-toto statement, which lists every file's sha256.

What is read here comes from anywhere: nothing of the statement is looked at before the key has
signed it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from edgetune.core.errors import SignatureError
from edgetune.core.files import parse_json, read_json
from edgetune.runtime.signature.keys import PrivateKey, PublicKey

SIGNATURE = "model.sig"
"""The file beside what it signs, as `model_signing` names it."""
MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://model_signing/signature/v1.0"
VERSION = "edgetune_version_number"
"""ours in the predicate, where the format lets verifiers skip what they do not know"""
SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_VERSION = 2**53
SIGN_AGAIN = "Get the folder again from its publisher."


@dataclass(frozen=True)
class Signed:
    """What a publisher signed: a name, each file's sha256 (hex) by its path, and a version number
    where they gave one.
    """

    name: str
    files: Mapping[str, str]
    version: int | None = None

    @property
    def digest(self) -> str:
        """sha256 (hex) over the files' digests in the order of their names."""
        return root_digest(self.files)


def root_digest(files: Mapping[str, str]) -> str:
    """One sha256 (hex) for all files: over their digests' bytes in the order of their names."""
    return _digest_of(files[path] for path in sorted(files))


def _digest_of(digests: Iterable[str]) -> str:
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def seal(signed: Signed, key: PrivateKey) -> dict[str, Any]:
    """The JSON object of a signature file."""
    predicate: dict[str, Any] = {
        "serialization": {
            "method": "files",
            "hash_type": "sha256",
            "allow_symlinks": False,
            "ignore_paths": [SIGNATURE],
        },
        "resources": [
            {"name": path, "algorithm": "sha256", "digest": signed.files[path]}
            for path in sorted(signed.files)
        ],
    }
    if signed.version is not None:
        predicate[VERSION] = signed.version
    statement = {
        "_type": STATEMENT,
        "subject": [{"name": signed.name, "digest": {"sha256": signed.digest}}],
        "predicateType": PREDICATE,
        "predicate": predicate,
    }
    payload = json.dumps(statement, separators=(",", ":")).encode()
    return {
        "mediaType": MEDIA_TYPE,
        "verificationMaterial": {"publicKey": {"hint": key.public.hint}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [
                {"sig": base64.b64encode(key.sign(_signed_bytes(payload))).decode(), "keyid": ""}
            ],
        },
    }


def unseal(path: Path, key: PublicKey) -> Signed:
    """What the signature file at `path` says, when `key` signed it; SignatureError else."""
    where = str(path)
    document = read_json(path, error=SignatureError, fix=SIGN_AGAIN)
    try:
        if document["mediaType"] != MEDIA_TYPE:
            raise _malformed(where, f"another media type than {MEDIA_TYPE}")
        hint = document["verificationMaterial"].get("publicKey", {}).get("hint")
        envelope = document["dsseEnvelope"]
        (one,) = envelope["signatures"]
        payload = _base64(envelope["payload"])
        signature = _base64(one["sig"])
        payload_type = envelope["payloadType"]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise _malformed(where, "not a sigstore bundle with one signature by a key") from error
    if payload_type != PAYLOAD_TYPE or not key.check(signature, _signed_bytes(payload)):
        other = (
            f"key {str(hint)[:16]}…" if hint and hint != key.hint else "another or a changed one"
        )
        raise SignatureError(
            "the signature is not this key's over this statement",
            where=where,
            expected=f"key {key.hint[:16]}…",
            got=other,
            fix="Do not use the folder; or give the public key of who published it.",
        )
    return _statement(payload, where)


def _statement(payload: bytes, where: str) -> Signed:
    """A statement that the key has signed; another tool may have written it."""
    try:
        value = parse_json(payload)
        if value["_type"] != STATEMENT or value["predicateType"] != PREDICATE:
            raise _malformed(where, f"another statement than {PREDICATE}")
        ((name, root),) = [(one["name"], one["digest"]["sha256"]) for one in value["subject"]]
        predicate = value["predicate"]
        how = predicate["serialization"]
        if how["method"] != "files" or how["hash_type"] != "sha256":
            raise _malformed(where, "other digests than one sha256 a file")
        files: dict[str, str] = {}
        for resource in predicate["resources"]:
            path, digest = resource["name"], resource["digest"]
            if not _is_inside(path) or path in files or not SHA256.fullmatch(digest):
                raise _malformed(where, f"an odd file {str(path)[:60]!r}")
            files[path] = digest
        version = predicate.get(VERSION)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise _malformed(where, "not a statement about files") from error
    if version is not None and not is_version(version):
        raise _malformed(where, f"an odd version number {version!r:.60}")
    if _digest_of(files.values()) != root:
        raise _malformed(where, "digests that do not add up to the subject's")
    return Signed(str(name), files, version)


def is_version(value: Any) -> bool:
    """Whether a value is a version number: a whole one from 0."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_VERSION


def _signed_bytes(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding, which is what is signed."""
    head = f"DSSEv1 {len(PAYLOAD_TYPE)} {PAYLOAD_TYPE} {len(payload)} "
    return head.encode() + payload


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError("not base64") from error


def _is_inside(path: Any) -> bool:
    """Whether a path names a file inside a folder, in its only spelling, and not the signature."""
    if not isinstance(path, str) or "\0" in path or path in ("", ".", SIGNATURE):
        return False
    parts = PurePosixPath(path)
    return not parts.is_absolute() and ".." not in parts.parts and str(parts) == path


def _malformed(where: str, got: str) -> SignatureError:
    return SignatureError(
        "not a signature that can be read",
        where=where,
        expected="the format of OpenSSF model signing 1.0, signed with a key",
        got=got,
        fix=SIGN_AGAIN,
    )
