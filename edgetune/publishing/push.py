"""`push`: where a target leads to, and what went there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgetune.core.errors import OutputError, SourceError
from edgetune.core.exclusive import exclusive
from edgetune.core.files import whole_folder
from edgetune.publishing.package import Package, package
from edgetune.publishing.registry import push_to_registry
from edgetune.runtime.sources.artifact import INDEX, Artifact
from edgetune.runtime.sources.registry import OCI
from edgetune.runtime.sources.transport import Transport, shown_url
from edgetune.runtime.sources.web import HUB

LIKE_A_REGISTRY = re.compile(r"(?:localhost|[\w-]+(?:\.[\w-]+)+|[\w.-]+:\d+)(?::\d+)?/", re.ASCII)
"""HOST/REPOSITORY, as docker has it without a scheme."""


@dataclass(frozen=True)
class Pushed:
    """What a push did: the artifact, its place (of a registry with the digest), and the bytes of
    files that had to go.
    """

    artifact: Artifact
    url: str
    sent_bytes: int


def push(
    source: Path,
    target: str,
    *,
    plain_http: bool = False,
    licence: str | None = None,
    private: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Pushed:
    """Publish a bundle, a run's adapter or an adapter to `oci://…`, `hf://…` or a folder.

    `licence` and `private` are for the hub: the base's licence (SPDX) for the model card, and a
    repository that only its owner sees. SourceError or OutputError in one line.
    """
    packed, count = package(source), 0

    def sent(size: int) -> None:
        nonlocal count
        count += size
        if progress is not None:
            progress(count)

    if target.startswith(OCI):
        url = push_to_registry(packed, target, Transport(plain_http=plain_http), sent=sent)
    elif target.startswith(HUB):
        from edgetune.publishing.hub import push_to_hub

        licence = licence or _builtin_licence(packed)
        url = push_to_hub(packed, target, licence=licence, private=private)
        sent(packed.artifact.size)
    elif re.match(r"\w+://", target) and not target.startswith("file://"):
        raise SourceError(
            "nothing can be pushed there",
            where=shown_url(target),
            expected="oci://HOST/REPOSITORY:TAG, hf://OWNER/NAME or a folder",
            fix="For a web server push into the folder that it serves.",
        )
    elif LIKE_A_REGISTRY.match(target) and not Path(target).parent.exists():
        raise SourceError(
            "this may be a folder or a registry's",
            where=target,
            fix=f"Write oci://{target}, or ./{target} for the folder.",
        )
    else:
        url = _push_to_folder(packed, Path(target.removeprefix("file://")))
        sent(packed.artifact.size)
    return Pushed(packed.artifact, url, count)


def _push_to_folder(packed: Package, folder: Path) -> str:
    """The files as they are and `artifact.json`; any web server can serve the folder."""
    if folder.exists() and not (folder / INDEX).is_file() and any(folder.iterdir()):
        raise OutputError(
            "it holds something else, which a push would replace",
            where=str(folder),
            expected=f"a new folder, or one with {INDEX}",
        )
    with exclusive(folder), whole_folder(folder) as partial:
        for file in packed.artifact.files:
            (partial / file.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(packed.folder / file.path, partial / file.path)
        (partial / INDEX).write_bytes(packed.manifest)
    return str(folder)


def _builtin_licence(packed: Package) -> str | None:
    """Of a built-in base; None of another, whose publisher must say it."""
    from edgetune.models.builtin import BUILTINS

    found = BUILTINS.get(str((packed.metadata.get("base") or {}).get("name")))
    return None if found is None else found.licence
