"""A name → a base: built in, a local folder, a GGUF file, or a hub id."""

from __future__ import annotations

import re
from pathlib import Path

from edgetune.core.errors import BaseModelError
from edgetune.core.files import cache_folder, sha256_file
from edgetune.core.layout import BUILTIN, MODEL, MODEL_CONFIG
from edgetune.core.settings import did_you_mean
from edgetune.models.base import Base, open_folder
from edgetune.models.builtin import BUILTINS, resolve_builtin
from edgetune.models.cache import cached
from edgetune.models.gguf import convert_gguf

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
CHOICES = (
    f"{', '.join(BUILTINS)}, a local folder, a .gguf file, folder#file.gguf, or a hub id (needs a"
    " network once)"
)


def resolve_base(name: str) -> Base:
    """The base that `name` means, fetched or converted into the cache when needed. Raises
    BaseModelError.

    `builtin:NAME` | local folder | file.gguf | folder#file.gguf | hub id | hub id#file.gguf
    """
    if name.startswith(BUILTIN):
        if name not in BUILTINS:
            fix = did_you_mean(name, BUILTINS)
            raise BaseModelError(
                f'there is no built-in base "{name}"',
                expected="one of " + ", ".join(BUILTINS),
                fix=fix,
            )
        return resolve_builtin(BUILTINS[name])
    place, _, file = name.partition("#")
    path = Path(place).expanduser()
    if path.exists():
        path = path.absolute()  # not resolve(): the hub's cache links to files without endings
    if (
        path.is_dir()
        and not (path / MODEL_CONFIG).exists()
        and (path / MODEL / MODEL_CONFIG).exists()
    ):
        path = path / MODEL  # a run that trained all weights
    if path.is_dir() and not file:
        return open_folder(path, name=name)
    if path.is_dir() or path.is_file():
        return _resolve_gguf(path / file if file else path, name=name)
    if HUB_ID.fullmatch(place) and not place.endswith(".gguf"):
        return _resolve_hub(place, file, name=name)
    raise BaseModelError(
        f'there is no base model "{name}"', expected=CHOICES, fix="Correct the path."
    )


def _resolve_gguf(path: Path, *, name: str) -> Base:
    if not path.is_file():
        near = (
            ", ".join(sorted(p.name for p in path.parent.glob("*.gguf")))
            if path.parent.is_dir()
            else ""
        )
        raise BaseModelError(
            "there is no such GGUF file",
            where=str(path),
            got=f"the folder has {near}" if near else "",
        )
    if path.suffix.lower() != ".gguf":
        raise BaseModelError(
            "this file is not a base model", where=str(path), expected="a folder or a .gguf file"
        )
    digest = sha256_file(path)
    folder = cache_folder() / "bases" / f"gguf-{digest[:16]}"
    return cached(
        folder, name=name, source_sha256=digest, make=lambda partial: convert_gguf(path, partial)
    )


def _resolve_hub(repository: str, file: str, *, name: str) -> Base:
    """Fetched by huggingface_hub into its own cache; offline, what is already there is used."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        folder = Path(snapshot_download(repository, allow_patterns=[file] if file else HUB_FILES))
    except (OSError, ValueError, EntryNotFoundError, HfHubHTTPError) as error:
        raise BaseModelError(
            f'no local folder is called "{name}", and it cannot be fetched from the hub',
            expected=CHOICES,
            got=type(error).__name__,
            fix="Check the name and the connection, or use a built-in base.",
        ) from error
    return _resolve_gguf(folder / file, name=name) if file else open_folder(folder, name=name)
