"""The files of a bundle against the sizes and digests in its manifest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from edgetune.core.errors import BundleError, listed
from edgetune.core.files import is_regular, sha256_file
from edgetune.core.layout import ADAPTER_FILES
from edgetune.runtime.bundle.manifest import FileInfo, Manifest


def verify_files(folder: str | Path, manifest: Manifest) -> list[str]:
    """Compare size and sha256 of every file the manifest lists; one line for each that differs, and
    for each file of a shipped adapter that is there without being listed.
    """
    differing = [
        line
        for path, info in manifest.files.items()
        if (line := verify_file(Path(folder), path, info))
    ]
    read = [
        f"{entry.path}/{name}"
        for entry in manifest.adapters
        if entry.path is not None
        for name in ADAPTER_FILES
    ]
    return differing + [
        f"{path}: not in the manifest"
        for path in read
        if path not in manifest.files and is_regular(Path(folder) / path)
    ]


@contextlib.contextmanager
def as_exported(folder: Path, manifest: Manifest) -> Iterator[None]:
    """Run the block on a bundle whose files are those of the manifest; BundleError lists the ones
    that are not.

    What is parsed (graphs, tokenizer, adapters) is compared before the block, and so is every size;
    the weights, which are only copied, are read for their sha256 while the block runs, on a second
    core where there is one.
    """
    weights = {path: info for path, info in manifest.files.items() if path == manifest.graph.data}
    others = replace(
        manifest, files={path: info for path, info in manifest.files.items() if path not in weights}
    )
    _demand(
        [
            *verify_files(folder, others),
            *(
                line
                for path, info in weights.items()
                if (line := _misfit(folder / path, path, info))
            ),
        ],
        folder,
    )
    with ThreadPoolExecutor(1, "edgetune-verify") as pool:
        found = [pool.submit(verify_file, folder, path, info) for path, info in weights.items()]
        try:
            yield
        finally:
            _demand([line for one in found if (line := one.result())], folder)


def _demand(differing: Sequence[str], folder: Path) -> None:
    if differing:
        problems, fix = (
            listed(differing, "files differ"),
            "Copy the bundle again, or export it again.",
        )
        raise BundleError(f"the bundle is not as exported: {problems}", where=str(folder), fix=fix)


def verify_file(folder: Path, path: str, info: FileInfo) -> str | None:
    """One file of a bundle against its entry; None when it is as written."""
    file = folder / path
    if (misfit := _misfit(file, path, info)) is not None:
        return misfit
    digest = sha256_file(file)
    if digest != info.sha256:
        return f"{path}: expected sha256 {info.sha256[:16]}…, got {digest[:16]}…"
    return None


def _misfit(file: Path, path: str, info: FileInfo) -> str | None:
    if not is_regular(file):
        return f"{path}: missing"
    size = file.stat().st_size
    return None if size == info.bytes else f"{path}: expected {info.bytes} bytes, got {size}"
