"""`--set key.path=value`: one setting changed in a recipe's plain values."""

from __future__ import annotations

import sys
from typing import Any

from edgetune.errors import RecipeError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def override(values: dict[str, Any], setting: str) -> None:
    """Put one `key.path=value` into the plain values; the value is TOML, or else a string."""
    key, equals, text = setting.partition("=")
    where = f"--set {setting}"
    if not equals or not key.strip():
        raise RecipeError("not a setting", where=where, expected="KEY=VALUE such as stage.0.epochs=2")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.strip().split(".")
    place: Any = values
    for part in parents:
        place = _step(place, part, where=where)
    if isinstance(place, list):
        raise RecipeError(f'"{last}" is not a setting', where=where, expected="a key inside it, e.g. stage.0.epochs")
    if not isinstance(place, dict):
        raise RecipeError(f'"{parents[-1]}" has no settings inside', where=where)
    place[last] = value


def _step(place: Any, part: str, *, where: str) -> Any:
    if isinstance(place, list):
        if not part.isdecimal() or int(part) >= len(place):
            raise RecipeError(f'no stage "{part}"', where=where, expected=f"a number from 0 to {len(place) - 1}")
        return place[int(part)]
    if not isinstance(place, dict):
        raise RecipeError(f'"{part}" has no settings inside', where=where)
    return place.setdefault(part, {})
