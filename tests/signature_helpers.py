"""Keys of publishers, made for a test."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

NEEDED = "pip install 'edgetune[sign]' runs it"


@dataclass(frozen=True)
class Keys:
    """The PEM files of a pair."""

    private: Path
    public: Path


def make_keys(
    folder: Path, name: str = "key", curve: str = "secp256r1", passphrase: str = ""
) -> Keys:
    pytest.importorskip("cryptography", reason=NEEDED)
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    key = (
        rsa.generate_private_key(65537, 2048)
        if curve == "rsa"
        else ec.generate_private_key(getattr(ec, curve.upper())())
    )
    lock = form.BestAvailableEncryption(passphrase.encode()) if passphrase else form.NoEncryption()
    keys = Keys(folder / f"{name}.pem", folder / f"{name}.pub.pem")
    keys.private.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, lock))
    keys.public.write_bytes(
        key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    )
    return keys
