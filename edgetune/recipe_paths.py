"""Where a recipe's files are: variables expanded, relative names taken from the recipe's folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

from edgetune.errors import RecipeError


def data_path(value: str, *, folder: Path, path: str, where: str) -> str:
    """An absolute path; what looks like a hub id and is no file stays as it is."""
    from edgetune.data import is_hub_id

    if not value.strip():
        raise RecipeError(f"{path} is empty", where=where, expected="a data file or a hub data set id")
    resolved = absolute(folder, expand(value, path=path, where=where))
    return value if is_hub_id(value) and not Path(resolved).exists() else resolved


def base_path(value: str, folder: Path, *, where: str) -> str:
    """An absolute path where such a folder or file is; names of built-in and hub bases stay as they are."""
    if not value.strip():
        raise RecipeError("base is empty", where=where, expected="builtin:NAME, a folder, a .gguf file or a hub id")
    if value.startswith("builtin:"):
        return value
    value = expand(value, path="base", where=where)
    location = folder / value.partition("#")[0]
    return absolute(folder, value) if location.exists() else value


def absolute(folder: Path, value: str) -> str:
    """`value` seen from `folder`, without .. and ."""
    return os.path.normpath(folder.absolute() / value)


def expand(value: str, *, path: str, where: str) -> str:
    """`$NAME`, `${NAME}` and `~` replaced; an unset variable is an error, not an empty string."""

    def variable(match: re.Match[str]) -> str:
        name = match.group(1) or match.group(2)
        if name not in os.environ:
            raise RecipeError(
                f"{path} uses ${name}, which is not set",
                where=where,
                got=f'"{value}"',
                fix=f"Set it to a folder: export {name}=/path/to/data",
            )
        return os.environ[name]

    value = re.sub(r"\$(?:\{(\w+)\}|(\w+))", variable, value)
    try:
        return str(Path(value).expanduser()) if value.startswith("~") else value
    except RuntimeError as error:
        raise RecipeError(f"{path}: {error}", where=where, got=f'"{value}"') from error
