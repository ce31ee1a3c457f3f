"""Names and passwords of registries and servers from where their owner keeps them already: the
container configuration that `docker login` and `podman login` write, and ~/.netrc.

What is read here is never logged and stands in no error.
"""

from __future__ import annotations

import base64
import binascii
import json
import netrc
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgetune.core.errors import SourceError
from edgetune.core.files import is_regular, read_json

HELPER_TIMEOUT_S = 30
DOCKER_HUB = ("docker.io", "registry-1.docker.io", "index.docker.io")
TOKEN_USER = "<token>"  # a helper says so where the secret is a token


@dataclass(frozen=True)
class Login:
    """A name with its password, or a token that buys others (`identity`)."""

    name: str = ""
    password: str = field(default="", repr=False)
    identity: str = field(default="", repr=False)

    @property
    def basic(self) -> str | None:
        """The value of the header Authorization; None without a name."""
        if not self.name:
            return None
        return "Basic " + base64.b64encode(f"{self.name}:{self.password}".encode()).decode()


def registry_login(host: str, repository: str) -> Login | None:
    """What the container configuration has for `host/repository`, the longest match first; None
    where it has nothing. SourceError for a configuration or a helper that does not work.
    """
    for path in _configurations():
        if is_regular(path):
            config = read_json(path, error=SourceError)
            if isinstance(config, dict) and (found := _find(config, host, repository)):
                return found
    return None


def server_login(host: str) -> Login | None:
    """What ~/.netrc (or `$NETRC`) has for a web server; None where it has nothing."""
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    if not is_regular(path):
        return None
    try:
        found = netrc.netrc(str(path)).authenticators(host)
    except (netrc.NetrcParseError, OSError) as error:
        raise SourceError(f"cannot be read: {error}", where=str(path)) from error
    return None if found is None else Login(found[0], found[2] or "")


def hub_token() -> str | None:
    """The token of huggingface.co: `$HF_TOKEN`, else what `hf auth login` left."""
    if token := os.environ.get("HF_TOKEN"):
        return token.strip()
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    path = Path(os.environ.get("HF_TOKEN_PATH") or f"{home}/token").expanduser()
    return path.read_text(encoding="utf-8").strip() or None if is_regular(path) else None


def _configurations() -> Iterator[Path]:
    """In the order that podman and oras have them."""
    if chosen := os.environ.get("REGISTRY_AUTH_FILE"):
        yield Path(chosen)
        return
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        yield Path(runtime, "containers", "auth.json")
    config = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    yield Path(config, "containers", "auth.json").expanduser()
    yield Path(os.environ.get("DOCKER_CONFIG") or "~/.docker", "config.json").expanduser()


def _find(config: Mapping[str, Any], host: str, repository: str) -> Login | None:
    places = _places(host, repository)
    helpers, logins = _object(config.get("credHelpers")), _object(config.get("auths"))
    helped = {_place_of(key): key for key in helpers}
    for place in places:
        key = helped.get(place, place)
        if isinstance(helper := helpers.get(key), str):
            return _ask(helper, key)
        for key, entry in logins.items():
            if _place_of(key) == place and (found := _entry(_object(entry))):
                return found
    if isinstance(store := config.get("credsStore"), str):
        asked = "https://index.docker.io/v1/" if host in DOCKER_HUB else host
        return _ask(store, asked)
    return None


def _places(host: str, repository: str) -> list[str]:
    """`host/a/b`, `host/a`, `host`: a configuration may have any of them."""
    hosts = DOCKER_HUB if host in DOCKER_HUB else (host,)
    parts = repository.split("/")
    return ["/".join([one, *parts[:n]]) for n in range(len(parts), -1, -1) for one in hosts]


def _place_of(key: str) -> str:
    """A key of `auths` without what docker once put around the host, which is in small letters."""
    place = re.sub(r"^https?://|/v[12]/?$|/$", "", re.sub(r"/$", "", key))
    host, slash, path = place.partition("/")
    return f"{host.lower()}{slash}{path}"


def _entry(entry: Mapping[str, Any]) -> Login | None:
    identity = entry.get("identitytoken")
    name, password = entry.get("username"), entry.get("password")
    if isinstance(packed := entry.get("auth"), str) and packed:
        try:
            text = base64.b64decode(packed, validate=True).decode()
        except (binascii.Error, ValueError):
            text = ""
        name, _, password = text.partition(":")
    if isinstance(identity, str) and identity:
        return Login(identity=identity)
    if isinstance(name, str) and isinstance(password, str) and name:
        return Login(name, password.rstrip("\0"))
    return None


def _ask(helper: str, place: str) -> Login | None:
    """`docker-credential-HELPER get`; None where it knows nothing of the place."""
    program = f"docker-credential-{helper}"
    if not re.fullmatch(r"[\w.-]+", helper):
        raise SourceError("the container configuration names no program", got=repr(helper[:80]))
    try:
        done = subprocess.run(
            [program, "get"],
            input=place,
            capture_output=True,
            text=True,
            timeout=HELPER_TIMEOUT_S,
            check=False,
        )
        answer = json.loads(done.stdout) if done.returncode == 0 else {}
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        raise SourceError(
            f"the credential helper {program} gave no answer: {type(error).__name__}",
            fix="Install it, or log in again without it.",
        ) from None
    name, secret = (_object(answer).get(key) for key in ("Username", "Secret"))
    if not isinstance(name, str) or not isinstance(secret, str) or not secret:
        return None
    return Login(identity=secret) if name == TOKEN_USER else Login(name, secret)


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
