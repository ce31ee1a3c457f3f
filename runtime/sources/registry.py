"""A container registry over HTTP (OCI distribution specification 1.1): names, tokens, manifests and
blobs; who publishes writes through it too.
"""

from __future__ import annotations

import json
import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgetune.core.errors import SourceError
from edgetune.core.files import MAX_JSON_BYTES
from edgetune.runtime.sources.artifact import (
    DIGEST,
    OCI_MANIFEST,
    Artifact,
    ArtifactFile,
    artifact_from_oci,
    digest_of_bytes,
)
from edgetune.runtime.sources.credentials import Login, registry_login
from edgetune.runtime.sources.transport import (
    AUTHORIZATION,
    StatusError,
    Transport,
    is_loopback,
    origin,
    read_at_most,
    shown_url,
)

OCI = "oci://"
NAME = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
REFERENCE = re.compile(
    rf"oci://(?P<host>[A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\])(?P<port>:\d+)?/(?P<repository>{NAME}(?:/{NAME})*)"
    r"(?::(?P<tag>\w[\w.-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?",
    re.ASCII,
)
MAX_TOKEN_BYTES = 1 << 20
CHALLENGE = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Reference:
    """`oci://HOST[:PORT]/REPOSITORY[:TAG][@sha256:DIGEST]`."""

    host: str
    repository: str
    tag: str = "latest"
    digest: str | None = None

    @classmethod
    def parse(cls, url: str) -> Reference:
        """SourceError where it is none."""
        found = REFERENCE.fullmatch(url)
        if found is None:
            raise SourceError(
                "not the name of an artifact in a registry",
                where=shown_url(url),
                expected="oci://HOST/REPOSITORY:TAG, the repository in small letters",
            )
        host, tag = found["host"].lower() + (found["port"] or ""), found["tag"] or "latest"
        return cls(host, found["repository"], tag, found["digest"])

    @property
    def url(self) -> str:
        """As it was given, the tag written out."""
        pinned = "" if self.digest is None else f"@{self.digest}"
        return f"{OCI}{self.host}/{self.repository}:{self.tag}{pinned}"


@dataclass
class Registry:
    """Requests to one repository. `actions` is what a token is asked for: pull, or pull and
    push.
    """

    reference: Reference
    transport: Transport
    actions: str = "pull"
    _authorization: str | None = field(default=None, repr=False)

    @property
    def root(self) -> str:
        """The address of the repository: https but for this machine and `plain_http`."""
        host = self.reference.host
        plain = self.transport.plain_http or is_loopback(
            urllib.parse.urlsplit(f"//{host}").hostname or ""
        )
        host = "registry-1.docker.io" if host in ("docker.io", "index.docker.io") else host
        return f"{'http' if plain else 'https'}://{host}/v2/{self.reference.repository}"

    def request(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        attempts: int | None = None,
    ) -> Any:
        """Send to a path of the repository, or to a whole URL that the registry gave. Only the
        registry itself is shown_url who asks.
        """
        url = path if "://" in path else f"{self.root}/{path}"
        self.transport.check(url, after=self.root)
        ours = origin(url) == origin(self.root)
        for again in (False, True):
            own = {AUTHORIZATION: self._authorization} if ours and self._authorization else {}
            try:
                return self.transport.open(
                    method, url, headers={**(headers or {}), **own}, body=body, attempts=attempts
                )
            except StatusError as error:
                # after a redirect it is another host that asks, and may name any realm
                asked_here = ours and origin(error.url) == origin(self.root)
                if error.status != 401 or not asked_here or again:
                    raise
                self._authorize(error)
        raise AssertionError("two tries")

    def manifest(self, reference: str) -> bytes:
        """The manifest of a tag or a digest. SourceError where there is none, or another one than
        the digest says.
        """

        def answer() -> bytes:
            path, headers = f"manifests/{reference}", {"Accept": OCI_MANIFEST}
            with self.request("GET", path, headers=headers) as response:
                return read_at_most(response, MAX_JSON_BYTES, self.root)

        raw = self.transport.patiently(answer, self.root)
        if DIGEST.fullmatch(reference) and digest_of_bytes(raw) != reference:
            raise SourceError(
                "the registry sent another manifest than the one that was asked for",
                where=self.reference.url,
                expected=reference,
                got=digest_of_bytes(raw),
            )
        return raw

    def refusal(self, error: StatusError) -> SourceError:
        """One line for a registry that says no."""
        reasons = {
            401: "the registry wants to know who asks",
            403: "the registry does not allow it",
            404: "the registry has no such artifact",
        }
        ways = {
            401: f"Log in: docker login {self.reference.host}, or podman login.",
            403: "Log in as somebody who may.",
            404: "Look at the name and the tag.",
        }
        return SourceError(
            reasons.get(error.status, f"the registry answered with HTTP {error.status}")
            + _said(error.text),
            where=self.reference.url,
            fix=ways.get(error.status, "Try again later."),
        )

    def _authorize(self, refused: StatusError) -> None:
        """Answer the challenge of a 401: a name and password, or a token bought with them."""
        headers = {name.lower(): value for name, value in refused.headers.items()}
        challenge = headers.get("www-authenticate", "")
        login = registry_login(self.reference.host, self.reference.repository)
        kind = challenge.partition(" ")[0].lower()
        if kind == "basic" and login is not None and login.basic is not None:
            self._authorization = login.basic
        elif kind == "bearer":
            self._authorization = f"Bearer {self._token(challenge, login)}"
        else:
            raise refused

    def _token(self, challenge: str, login: Login | None) -> str:
        facts = dict(CHALLENGE.findall(challenge))
        realm = facts.get("realm", "")
        self.transport.check(realm, after=self.root)
        scope = facts.get("scope") or f"repository:{self.reference.repository}:{self.actions}"
        asked = {"service": facts.get("service", ""), "scope": scope}
        if login is not None and login.identity:
            form = {
                **asked,
                "grant_type": "refresh_token",
                "refresh_token": login.identity,
                "client_id": "edgetune",
            }
            response = self.transport.open(
                "POST",
                realm,
                headers={"Content-Type": "application/x-www-form-urlencoded"},
                body=urllib.parse.urlencode(form).encode(),
            )
        else:
            basic = None if login is None else login.basic
            joint = "&" if "?" in realm else "?"
            response = self.transport.open(
                "GET",
                f"{realm}{joint}{urllib.parse.urlencode(asked)}",
                headers={} if basic is None else {AUTHORIZATION: basic},
            )
        with response:
            raw = read_at_most(response, MAX_TOKEN_BYTES, realm)
        try:
            answer = json.loads(raw)
            token = answer.get("token") or answer.get("access_token")
        except (ValueError, AttributeError, RecursionError):
            token = None
        if not isinstance(token, str) or not token or not token.isprintable():
            raise SourceError("no token came back", where=shown_url(realm))
        return token


@dataclass
class RegistrySource:
    """One artifact in a registry."""

    registry: Registry

    def artifact(self) -> Artifact:
        """What the tag or the digest names now."""
        reference = self.registry.reference
        try:
            raw = self.registry.manifest(reference.digest or reference.tag)
        except StatusError as error:
            raise self.registry.refusal(error) from error
        return artifact_from_oci(raw, url=reference.url)

    def open(self, file: ArtifactFile, offset: int) -> Any:
        """The response with a file's bytes from `offset` on (206) or from its start (200)."""
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        try:
            return self.registry.request("GET", f"blobs/sha256:{file.sha256}", headers=headers)
        except StatusError as error:
            if error.status == 416:
                raise
            raise self.registry.refusal(error) from error


def _said(text: str) -> str:
    """What a registry wrote about its refusal, cut to a line."""
    try:
        first = json.loads(text)["errors"][0]
        said = str(first.get("message") or first.get("code") or "")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return ""
    said = "".join(letter for letter in said if letter.isprintable())[:200]
    return f": {said}" if said else ""
