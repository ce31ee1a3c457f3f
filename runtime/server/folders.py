"""Which folder a client may name: only one inside those the operator allowed, reached without links or `..`."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path, PurePath

from edgetune.runtime.server.errors import ApiError, bad_request, not_found


def allowed_folder(given: str, roots: Sequence[Path]) -> Path:
    """The adapter folder of a request's `lora_path`: absolute inside a root, or relative to one.

    ApiError: 403 outside every root (also by a link or `..`), 404 not there, 400 no folder. What lies outside is not
    looked at, so the answer says nothing about it.
    """
    outside = ApiError(403, "'lora_path' is outside the folders the operator allowed.", code="forbidden_path")
    path = PurePath(given)
    if "\0" in given or ".." in path.parts:
        raise outside
    places = [(root, _below(path, root)) for root in roots]
    inside = [(root, parts) for root, parts in places if parts is not None]
    if not inside:
        raise outside
    for root, parts in inside:
        if (folder := _walk(root, parts, outside)) is not None:
            return folder
    message = f"No adapter found at '{path.name}' inside the allowed folders."
    raise not_found(message, code="adapter_not_found", param="lora_path")


def _below(path: PurePath, root: Path) -> tuple[str, ...] | None:
    """The path's parts under a root; None when it is not under it, or is the root itself."""
    if path.is_absolute():
        return path.relative_to(root).parts or None if path.is_relative_to(root) else None
    return path.parts or None


def _walk(root: Path, parts: Sequence[str], outside: ApiError) -> Path | None:
    """Follow the parts one by one; a link, of a folder or of a file in the last one, is refused."""
    folder = root
    for part in parts:
        folder = folder / part
        mode = _mode(folder)
        if mode is None:
            return None
        if stat.S_ISLNK(mode):
            raise outside
        if not stat.S_ISDIR(mode):
            raise bad_request("'lora_path' is no folder.", param="lora_path", code="invalid_value")
    for entry in folder.iterdir():
        mode = _mode(entry)
        if mode is None or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise outside
    return folder


def _mode(path: Path) -> int | None:
    try:
        return path.lstat().st_mode
    except (OSError, ValueError):
        return None
