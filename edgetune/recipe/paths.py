"""Where a recipe's files are, and what its `reward` names."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from edgetune.core.errors import RecipeError
from edgetune.core.layout import BUILTIN
from edgetune.core.settings import shown


def data_path(value: str, *, folder: Path, path: str, where: str) -> str:
    """An absolute path; what looks like a hub id and is no file stays as it is."""

    if not value.strip():
        raise RecipeError(
            f"{path} is empty", where=where, expected="a data file or a hub data set id"
        )
    if re.match(r"(?!hf:)[A-Za-z][A-Za-z0-9+.-]+://", value):
        raise RecipeError(
            f"{path} is a URL, and those are not fetched",
            where=where,
            expected="a data file or a hub data set id",
            got=f'"{value}"',
            fix="Download the file and give its path.",
        )
    resolved = absolute(folder, expand(value, path=path, where=where))
    return value if is_hub_id(value) and not Path(resolved).exists() else resolved


def base_path(value: str, folder: Path, *, where: str) -> str:
    """An absolute path where such a folder or file is; names of built-in and hub bases stay as they
    are.
    """
    if not value.strip():
        raise RecipeError(
            "base is empty",
            where=where,
            expected="builtin:NAME, a folder, a .gguf file or a hub id",
        )
    if value.startswith(BUILTIN):
        return value
    value = expand(value, path="base", where=where)
    location = folder / value.partition("#")[0]
    return absolute(folder, value) if location.exists() else value


def absolute(folder: Path, value: str) -> str:
    """`value` seen from `folder`, without .. and ."""
    return os.path.normpath(folder.absolute() / value)


PATHS = re.compile(
    r"base|parameters\.start|forgetting\.general|generation\.(schema|grammar)"
    r"|stage\.\d+\.(data\.(train|validation)|replay\.data|grpo\.reward)"
)


def from_here(key: str, value: Any) -> Any:
    """A `--set` value that names what lies in the current folder, as a shell completes it, by its
    absolute path; everything else as it is.
    """
    if not (PATHS.fullmatch(key) and isinstance(value, str) and value.strip()):
        return value
    try:
        return absolute(Path(), value) if Path(value).exists() else value
    except (OSError, ValueError):  # no name that a file could have
        return value


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
    if "\0" in value or any(len(os.fsencode(part)) > 255 for part in Path(value).parts):
        raise RecipeError(
            f"{path} can be no path: a name in it is longer than 255 bytes, or has a NUL",
            where=where,
            got=shown(value),
        )
    try:
        return str(Path(value).expanduser()) if value.startswith("~") else value
    except RuntimeError as error:
        raise RecipeError(f"{path}: {error}", where=where, got=f'"{value}"') from error


def split_function(value: str) -> tuple[str, str] | None:
    """(module or .py file, function) of `module:function`; None for a run folder."""
    place, colon, name = value.rpartition(":")
    return (place, name) if colon and place and name.isidentifier() else None


def locate_reward(value: str, folder: Path) -> str:
    """The absolute path of what lies beside the recipe (in `folder`) or in the current folder.

    An importable module that is no such file stays as it is written.
    """
    function = split_function(value)
    if function is None:
        return _absolute(folder if (folder / value).exists() else Path(), value)
    place, name = function
    as_file = place if place.endswith(".py") else place.replace(".", "/") + ".py"
    found = next((at for at in (folder, Path()) if (at / as_file).is_file()), None)
    return f"{_absolute(found, as_file)}:{name}" if found is not None else value


def _absolute(folder: Path, value: str) -> str:
    return os.path.normpath(folder.absolute() / value)


HUB_ID = re.compile(
    r"(?:hf://(?:datasets/)?)?(?!\.{1,2}/)(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)"
    r"(?:@(?P<revision>[\w./-]+?))?(?::(?P<config>[\w.-]+)(?=:))?(?::(?P<split>[\w.-]+))?"
)
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".xlsx", ".txt")
ALSO = {".ndjson": ".jsonl"} | dict.fromkeys((".conll", ".bio", ".iob", ".iob2"), ".txt")
PACKED = (".gz", ".zst", ".bz2", ".xz")


def is_hub_id(source: str) -> bool:
    """`owner/name`, `owner/name:split` or `owner/name:configuration:split`, each also with
    `@revision` and after `hf://`, that carries none of the data files' endings.
    """
    return HUB_ID.fullmatch(source) is not None and file_format(Path(source)) is None


def file_format(path: Path) -> str | None:
    """The format by the ending: `.jsonl` for `rows.jsonl.gz`."""
    name = path.name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    endings = {**dict.fromkeys(SUFFIXES, None), **ALSO}
    return next((kind or suffix for suffix, kind in endings.items() if name.endswith(suffix)), None)
