"""A web server or a repository of the hub as a source: the files as they are, beside
`artifact.json` or a bundle's own manifest. Any file server will do.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from dataclasses import dataclass, replace
from typing import Any

from edgetune.core.errors import SourceError
from edgetune.core.files import MAX_JSON_BYTES
from edgetune.core.layout import MANIFEST
from edgetune.runtime.sources.artifact import (
    INDEX,
    PUSH_IT,
    Artifact,
    ArtifactFile,
    artifact_from_bundle,
    artifact_from_oci,
    digest_of_bytes,
)
from edgetune.runtime.sources.credentials import hub_token, server_login
from edgetune.runtime.sources.folder import SIGNATURE_FILES
from edgetune.runtime.sources.transport import (
    AUTHORIZATION,
    StatusError,
    Transport,
    read_at_most,
    shown_url,
)

HUB, HUB_ADDRESS = "hf://", "https://huggingface.co"
HUB_NAME = re.compile(r"hf://([\w.-]{1,96}/[\w.-]{1,96})(?:@([\w./-]{1,128}))?", re.ASCII)
COMMIT = "X-Repo-Commit"
"""The hub's header: the commit that a branch stands for now."""
REFUSALS = {401: "it wants to know who asks", 403: "it does not allow it"}
LOG_IN = "Log in: ~/.netrc for a web server, HF_TOKEN or `hf auth login` for the hub."


@dataclass
class WebSource:
    """One artifact below an address. `url`: as its user wrote it."""

    url: str
    root: str
    transport: Transport
    authorization: str | None = None

    def artifact(self) -> Artifact:
        """What is there now."""
        if (raw := self._small(INDEX)) is not None:
            return artifact_from_oci(raw, url=self.url)
        if (raw := self._small(MANIFEST)) is not None:
            signatures = [(name, self._small(name)) for name in SIGNATURE_FILES]
            more = [
                ArtifactFile(name, len(signed), digest_of_bytes(signed).removeprefix("sha256:"))
                for name, signed in signatures
                if signed is not None
            ]
            return artifact_from_bundle(raw, url=self.url, more=more)
        raise SourceError(
            f"the server has neither {INDEX} nor {MANIFEST} there",
            where=shown_url(self.url),
            fix=PUSH_IT,
        )

    def open(self, file: ArtifactFile, offset: int) -> Any:
        """A file's bytes, from `offset` on where the server can."""
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        try:
            return self._get(file.path, headers)
        except StatusError as error:
            if error.status == 416:
                raise
            raise self._refusal(file.path, error) from error

    def _small(self, path: str) -> bytes | None:
        """A small file; None where there is none."""

        def answer() -> bytes:
            with self._get(path, {}) as response:
                return read_at_most(response, MAX_JSON_BYTES, self.root)

        try:
            return self.transport.patiently(answer, self.root)
        except StatusError as error:
            if error.status in (404, 410):
                return None
            raise self._refusal(path, error) from error

    def _get(self, path: str, headers: dict[str, str]) -> Any:
        own = {} if self.authorization is None else {AUTHORIZATION: self.authorization}
        url = f"{self.root.rstrip('/')}/{urllib.parse.quote(path)}"
        return self.transport.open("GET", url, headers={**headers, **own})

    def _refusal(self, path: str, error: StatusError) -> SourceError:
        said = REFUSALS.get(error.status, f"it answered with HTTP {error.status}")
        fix = LOG_IN if error.status in REFUSALS else "Publish it again, or try again later."
        return SourceError(f"{path}: {said}", where=shown_url(self.url), fix=fix)


def web_source(url: str, transport: Transport) -> WebSource:
    """A folder of a web server, with the name and password of ~/.netrc where it has them."""
    transport.check(url)
    if "?" in url or "#" in url:
        raise SourceError("the address of a folder has no ? and no #", where=shown_url(url))
    login = server_login(urllib.parse.urlsplit(url).hostname or "")
    return WebSource(url, url, transport, None if login is None else login.basic)


def hub_source(url: str, transport: Transport) -> WebSource:
    """`hf://OWNER/NAME[@REVISION]` at huggingface.co, or where `$HF_ENDPOINT` says. A branch is
    read as the commit that it is now, so that files of two versions never meet.
    """
    (repository, revision), token = hub_name(url), hub_token()
    address = os.environ.get("HF_ENDPOINT") or HUB_ADDRESS
    name = f"{address.rstrip('/')}/{repository}/resolve"
    asked = urllib.parse.quote(revision or "main", safe="")
    source = WebSource(
        url, f"{name}/{asked}", transport, None if token is None else f"Bearer {token}"
    )
    for path in (INDEX, MANIFEST):
        try:
            with source._get(path, {}) as response:
                commit = response.headers.get(COMMIT) or ""
        except StatusError:
            continue
        if re.fullmatch("[0-9a-f]{40}", commit):
            return replace(source, root=f"{name}/{commit}")
    return source


def hub_name(url: str) -> tuple[str, str | None]:
    """(OWNER/NAME, revision) of `hf://OWNER/NAME[@REVISION]`. SourceError where it is none."""
    found = HUB_NAME.fullmatch(url)
    if found is None or ".." in url:
        raise SourceError(
            "not the name of a repository of the hub",
            where=shown_url(url),
            expected="hf://OWNER/NAME or hf://OWNER/NAME@REVISION",
        )
    return found[1], found[2]
