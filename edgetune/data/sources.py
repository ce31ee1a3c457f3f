"""Where rows lie: a file, a folder of files, a glob pattern, or a data set of the hub."""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import Any

from edgetune.core.errors import DataError
from edgetune.data.readers import class_names, with_class_names
from edgetune.recipe.paths import HUB_ID, SUFFIXES, file_format

FORMATS = "one of " + " ".join(SUFFIXES) + ", also with .gz or .zst"
SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![a-z])", re.IGNORECASE)


def files_of(path: Path) -> list[Path]:
    """The files that a path names: itself, those of a folder, those that a pattern fits; sorted."""
    if path.is_dir():
        found = sorted(one for one in path.iterdir() if one.is_file() and file_format(one))
        if not found:
            raise DataError(
                "this is a folder without data files",
                where=str(path),
                expected="a data file, " + FORMATS,
            )
        splits = {said[1].lower() for one in found if (said := SPLIT.match(one.name))}
        if len(splits) > 1:
            raise DataError(
                "this folder holds several splits",
                where=str(path),
                got=", ".join(one.name for one in found[:6]),
                fix="Name the files, or give a pattern such as "
                + f"{path.name}/{min(splits, key=lambda one: one != 'train')}*.",
            )
        return found
    if not path.exists() and glob.has_magic(str(path)):
        found = sorted(
            Path(one)
            for one in glob.glob(str(path), recursive=True)  # noqa: PTH207 - the pattern is absolute
            if Path(one).is_file() and file_format(Path(one))
        )
        if not found:
            raise DataError(
                "no data file fits this pattern", where=str(path), expected="files, " + FORMATS
            )
        return found
    return [path]


def check_file(path: Path) -> None:
    """A missing, empty or unknown file raises."""
    if not path.exists():
        parent = path.parent
        near = sorted(p.name for p in parent.iterdir() if file_format(p)) if parent.is_dir() else []
        got = f"{parent} has " + ", ".join(near[:6]) if near else ""
        raise DataError(
            "there is no such data file", where=str(path), got=got, fix="Correct the path."
        )
    if file_format(path) is None:
        raise DataError("unknown kind of data file", where=str(path), expected=FORMATS)
    if path.stat().st_size == 0:
        raise DataError(
            "the file is empty", where=str(path), expected="at least one row", got="0 bytes"
        )


def hub_table(source: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a hub data set, `owner/name[@revision][:configuration][:split]` (default split:
    train), and what is said of it.
    """
    import datasets
    import huggingface_hub

    parts = HUB_ID.fullmatch(source)
    assert parts is not None
    name, revision = parts["name"], parts["revision"]
    try:
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            huggingface_hub.HfApi().dataset_info(
                name, revision=revision
            )  # fails at once where load_dataset would retry for half a minute
        table = datasets.load_dataset(
            name, parts["config"], split=parts["split"] or "train", revision=revision
        )
    except Exception as error:  # the hub's errors and the data set's own have no common class
        line = (str(error).splitlines() or [""])[0]
        raise DataError(
            "no such file, and it cannot be loaded as a hub data set",
            where=source,
            got=f"{type(error).__name__}: {line}"[:200],
            fix="Check the name and the connection, or give a local file ("
            + " ".join(SUFFIXES)
            + ", also .gz).",
        ) from error
    notes = [f"the hub's {name}"]
    names = class_names(table.features.to_dict(), notes)
    return [with_class_names(dict(values), names) for values in table], notes
