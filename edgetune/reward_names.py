"""What a recipe's `reward` names: a trained reward run, or a Python function as `module:function`. No torch here."""

from __future__ import annotations

import os
from pathlib import Path


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
