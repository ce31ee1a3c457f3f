"""Keys of signatures: ECDSA on the curves P-256, P-384 and P-521, in PEM files as openssl writes
them. The package `cryptography` does the arithmetic, and is imported here only.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.core.errors import InputError, SignatureError
from edgetune.core.files import is_regular

MAX_KEY_BYTES = 1 << 16
HASHES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}
MAKE_ONE = (
    "Make one: openssl ecparam -genkey -name prime256v1 -noout -out key.pem; openssl ec -in"
    " key.pem -pubout -out pub.pem."
)


@dataclass(frozen=True)
class PublicKey:
    """What checks signatures. `hint`: sha256 of its PEM form, by which a signature names it."""

    key: Any
    hint: str

    def check(self, signature: bytes, message: bytes) -> bool:
        """Whether `signature` (DER) is this key's over `message`."""
        from cryptography.exceptions import InvalidSignature

        try:
            self.key.verify(signature, message, _ecdsa(self.key))
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True)
class PrivateKey:
    """What makes signatures, with the public half that they name."""

    key: Any
    public: PublicKey

    def sign(self, message: bytes) -> bytes:
        """The signature (DER) over `message`."""
        signature: bytes = self.key.sign(message, _ecdsa(self.key))
        return signature


def read_public_key(path: str | Path) -> PublicKey:
    """The public key of a PEM file. SignatureError for any other file, InputError without the
    package `cryptography`.
    """
    serialization = _serialization()
    raw = _read(Path(path))
    if b"PRIVATE KEY" in raw:
        raise SignatureError(
            "this is a private key, which belongs on no device",
            where=str(path),
            expected="the public key",
            fix=f"Take it out: openssl ec -in {path} -pubout -out pub.pem.",
        )
    try:
        key = serialization.load_pem_public_key(raw)
    except Exception as error:  # the package has its own, and they differ by version
        raise _no_key(path, "public") from error
    return _public(key, path)


def read_private_key(path: str | Path, passphrase: str | None = None) -> PrivateKey:
    """The private key of a PEM file. SignatureError for any other file or a passphrase that does
    not open it, InputError without the package `cryptography`.
    """
    serialization = _serialization()
    raw = _read(Path(path))
    try:
        key = serialization.load_pem_private_key(raw, passphrase.encode() if passphrase else None)
    except TypeError as error:  # it is locked and nothing was given, or the other way round
        raise SignatureError(
            "the passphrase and the key do not belong together",
            where=str(path),
            expected="a passphrase for a locked key, and none for an open one",
            fix="`edgetune sign` reads it from EDGETUNE_KEY_PASSPHRASE.",
        ) from error
    except Exception as error:
        raise _no_key(path, "private") from error
    return PrivateKey(key, _public(key.public_key(), path))


def _public(key: Any, path: str | Path) -> PublicKey:
    serialization = _serialization()
    if getattr(getattr(key, "curve", None), "name", None) not in HASHES:
        raise SignatureError(
            "not a key of a kind that signs here",
            where=str(path),
            expected="an elliptic curve key on P-256, P-384 or P-521",
            fix=MAKE_ONE,
        )
    pem = key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return PublicKey(key, hashlib.sha256(pem).hexdigest())


def _read(path: Path) -> bytes:
    if not is_regular(path):
        raise SignatureError("there is no key file", where=str(path), fix=MAKE_ONE)
    with path.open("rb") as file:
        raw = file.read(MAX_KEY_BYTES + 1)
    if len(raw) > MAX_KEY_BYTES:
        raise SignatureError("too large for a key", where=str(path))
    return raw


def _no_key(path: str | Path, half: str) -> SignatureError:
    return SignatureError(
        f"not a {half} key that can be read", where=str(path), expected="PEM", fix=MAKE_ONE
    )


def _ecdsa(key: Any) -> Any:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.ECDSA(getattr(hashes, HASHES[key.curve.name])())


def _serialization() -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError as error:
        raise InputError(
            "signatures need the package cryptography",
            fix="Install edgetune[sign] (pip install cryptography).",
        ) from error
    return serialization
