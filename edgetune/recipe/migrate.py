"""Recipes of version 0.1, where the settings of dpo and grpo lay among those of every stage.

Such a recipe is refused with the new place of its keys and rewritten on demand; in a run folder it
is read as it is.
"""

from __future__ import annotations

import copy
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from edgetune.core.errors import RecipeError
from edgetune.recipe.own_settings import Dpo, Grpo, stages_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Key of a stage in version 0.1 → the table that holds it now, and its default.
MOVED = {
    field.name: (table, None if field.default is MISSING else field.default)
    for table, settings in (("dpo", Dpo), ("grpo", Grpo))
    for field in fields(settings)
}


@dataclass(frozen=True)
class Move:
    """A key of a stage that goes into a table; or is left out, where the stage is of another method
    and the value is the default, as version 0.1 wrote it into every run's recipe.
    """

    stage: int
    key: str
    table: str
    left_out: bool

    def __str__(self) -> str:
        new = "left out" if self.left_out else f"stage.{self.stage}.{self.table}.{self.key}"
        return f"stage.{self.stage}.{self.key} → {new}"


def moves(values: Mapping[str, Any]) -> list[Move]:
    """What a recipe of version 0.1 needs; nothing where every key lies in its place."""
    return [
        Move(number, key, table, left_out=stage.get("method") != table)
        for number, stage in stages_of(values)
        for key, (table, default) in MOVED.items()
        if key in stage and (stage.get("method") == table or stage[key] == default)
    ]


def migrated(values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """The recipe with every key in its place. RecipeError where a key is there twice."""
    found = dict(values)
    for move in moves(values):
        found = _moved(found, move, where=where)
    return found


def migrate_text(text: str, *, where: str) -> tuple[str, list[Move]]:
    """A recipe file's text with every key in its place, all else to the letter, and what was moved.

    A key stays on its line and becomes `grpo.kl`, unless its table has a header of its own; then
    the line goes below that. Each rewriting is read again, and taken only if it says the same.
    RecipeError where none does. The text must be valid TOML.
    """
    values = tomllib.loads(text)
    found = moves(values)
    for move in found:
        values = _moved(values, move, where=where)
        rewritten = next((new for new in _rewritings(text, move) if _reads(new, values)), None)
        if rewritten is None:
            old, _, new = str(move).partition(" → ")
            raise RecipeError(
                f"{old} stands where it cannot be moved by itself",
                where=where,
                fix=f"Write it as {new}." if not move.left_out else f"Remove {move.key}.",
            )
        text = rewritten
    return text, found


def check_places(values: Mapping[str, Any], *, where: str) -> None:
    """RecipeError that names the new place of a stage's keys of version 0.1."""
    for number, stage in stages_of(values):
        path, old = f"stage.{number}", [key for key in stage if key in MOVED]
        for key in old:
            table, default = MOVED[key]
            if stage.get("method") != table and stage[key] != default:
                raise RecipeError(
                    f"{path}.{key} has no meaning for {stage.get('method')}",
                    where=where,
                    expected=f"only with {table}",
                    fix=f"Remove {key}.",
                )
        if old:
            table = MOVED[old[0]][0]
            keys = [key for key in old if MOVED[key][0] == table]
            raise RecipeError(
                f"{path}: {', '.join(keys)} "
                f"{'lives' if len(keys) == 1 else 'live'} in the table [stage.{table}] now",
                where=where,
                fix=f"`edgetune train {shlex.quote(where)} --migrate` rewrites the recipe.",
            )


def new_place(path: str) -> str | None:
    """`stage.0.grpo.kl` for `stage.0.kl`; None for a key that lies where it always lay."""
    match = re.fullmatch(r"(stage\.\d+)\.(\w+)", path)
    if match is None or match[2] not in MOVED:
        return None
    return f"{match[1]}.{MOVED[match[2]][0]}.{match[2]}"


def _moved(values: Mapping[str, Any], move: Move, *, where: str) -> dict[str, Any]:
    """The values after one move."""
    new = copy.deepcopy(dict(values))
    stage = new["stage"][move.stage]
    value = stage.pop(move.key)
    if not move.left_out:
        table = stage.setdefault(move.table, {})
        if not isinstance(table, dict) or move.key in table:
            raise RecipeError(
                f"stage.{move.stage} has {move.key} and {move.table}.{move.key}",
                where=where,
                fix=f"Remove {move.key}.",
            )
        table[move.key] = value
    return new


def _rewritings(text: str, move: Move) -> Iterator[str]:
    """Texts that may be what `text` says after a move, the likeliest first."""
    header = rf"^[ \t]*\[[ \t]*stage[ \t]*\.[ \t]*{move.table}[ \t]*\][^\n]*\n"
    for key in re.finditer(rf"""(?<![\w.'"-])(["']?){move.key}\1(?=[ \t]*=)""", text):
        if not move.left_out:
            yield f"{text[: key.start()]}{move.table}.{text[key.start() :]}"
        line = text.rfind("\n", 0, key.start()) + 1
        for end in re.finditer(r"\n|\Z", text):
            if end.start() < key.end():
                continue
            rest = text[:line] + text[end.end() :]
            if move.left_out:
                yield rest
                continue
            statement = text[line : end.start()] + "\n"
            for below in re.finditer(header, rest, re.MULTILINE):
                yield rest[: below.end()] + statement + rest[below.end() :]


def _reads(text: str, values: Mapping[str, Any]) -> bool:
    try:
        return tomllib.loads(text) == values
    except tomllib.TOMLDecodeError:
        return False
