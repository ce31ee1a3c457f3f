"""A frozen dataclass tree read strictly from a dict, and written back as TOML with every default.

The dataclass is the only declaration: types come from its annotations; help and limits from
`option`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

from edgetune.core.errors import RecipeError

T = TypeVar("T")
WORDS = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
PLURALS = {int: "integers", float: "numbers", str: "strings", bool: "booleans"}


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,  # noqa: A002 - the word every command line uses
    factory: Any = dataclasses.MISSING,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    planned: Sequence[str] = (),
) -> Any:
    """A dataclass field with help, limits and `planned` values that are named in the design but not
    built yet.
    """
    limits = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata = {"help": help, "planned": tuple(planned), **limits}
    return dataclasses.field(default=default, default_factory=factory, metadata=metadata)


def from_dict(cls: type[T], values: Mapping[str, Any], *, where: str, path: str = "") -> T:
    """Build `cls`; an unknown key, a missing key, a wrong type or a value out of range is a
    `RecipeError`.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise RecipeError(
                f'unknown key "{_join(path, key)}"',
                where=where,
                expected="one of " + ", ".join(fields),
                fix=did_you_mean(key, fields),
            )
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _convert(
                hints[name], values[name], field=field, where=where, path=_join(path, name)
            )
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            example = f"Add it: {_join(path, name)} = … ({field.metadata['help']})"
            raise RecipeError(
                f'the key "{_join(path, name)}" is missing', where=where, fix=example + "."
            )
    return cls(**arguments)


def did_you_mean(word: str, choices: typing.Iterable[str]) -> str:
    """`Did you mean "x"?` for the nearest choice, or nothing when none is near."""
    near = difflib.get_close_matches(word, list(choices), n=1)
    return f'Did you mean "{near[0]}"?' if near else ""


def describe(hint: Any) -> str:
    """A type in a reader's words: `an integer`, `a list of strings`, `one of "a", "b"`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(f'"{choice}"' for choice in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(
            describe(argument) for argument in arguments if argument is not type(None)
        )
    if origin is tuple:
        return f"a list of {PLURALS.get(arguments[0], 'tables')}"
    if origin is dict:
        return f"a table of {PLURALS[arguments[1]]}"
    return WORDS.get(hint, "a table")


def _convert(hint: Any, value: Any, *, field: dataclasses.Field[Any], where: str, path: str) -> Any:
    """The value as `hint` wants it (int → float, list → tuple, dict → dataclass)."""
    if isinstance(value, Mapping):
        hint = next((part for part in _alternatives(hint) if dataclasses.is_dataclass(part)), hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_dict(typing.cast(type, hint), value, where=where, path=path)
    element = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None
    if dataclasses.is_dataclass(element) and isinstance(value, list):
        if not all(isinstance(item, Mapping) for item in value):
            raise RecipeError(
                "wrong type", where=f"{where}: {path}", expected=describe(hint), got=shown(value)
            )
        return tuple(
            from_dict(typing.cast(type, element), item, where=where, path=f"{path}.{index}")
            for index, item in enumerate(value)
        )
    for candidate in _alternatives(hint):
        matched, converted = _match(candidate, value)
        if matched:
            _check_limits(converted, field=field, where=where, path=path)
            return converted
    if value in field.metadata.get("planned", ()):
        raise RecipeError(
            f'{path} = "{value}" is planned but not in this version',
            where=where,
            expected=describe(hint),
        )
    choices = [
        choice
        for part in _alternatives(hint)
        for choice in typing.get_args(part)
        if isinstance(choice, str)
    ]
    fix = did_you_mean(value, choices) if isinstance(value, str) else ""
    raise RecipeError(
        f"{path} has a wrong value", where=where, expected=describe(hint), got=shown(value), fix=fix
    )


def _alternatives(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return (
        tuple(part for part in typing.get_args(hint) if part is not type(None))
        if is_union
        else (hint,)
    )


def _match(hint: Any, value: Any) -> tuple[bool, Any]:
    """Whether `value` is of the type `hint`, strictly (true is no integer), and the value
    converted.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return isinstance(value, str) and value in arguments, value
    if origin is tuple:
        matches = isinstance(value, list) and all(_match(arguments[0], item)[0] for item in value)
        return matches, tuple(value) if matches else value
    if origin is dict:
        if not isinstance(value, Mapping):
            return False, value
        pairs = {key: _match(arguments[1], item) for key, item in value.items()}
        return all(matched for matched, _ in pairs.values()), {
            key: item for key, (_, item) in pairs.items()
        }
    if hint is float:
        matches = (
            isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        )
        return matches, float(value) if matches else value
    return type(value) is hint, value


def _check_limits(value: Any, *, field: dataclasses.Field[Any], where: str, path: str) -> None:
    numbers = list(value.values()) if isinstance(value, dict) else [value]
    tests: dict[str, tuple[str, Callable[[float, float], bool]]] = {
        "at_least": ("at least", lambda number, limit: number >= limit),
        "above": ("more than", lambda number, limit: number > limit),
        "at_most": ("at most", lambda number, limit: number <= limit),
        "below": ("less than", lambda number, limit: number < limit),
    }
    limits = {name: field.metadata[name] for name in tests if field.metadata.get(name) is not None}
    for number in numbers:
        if (
            limits
            and not isinstance(number, str)
            and not all(tests[n][1](number, limits[n]) for n in limits)
        ):
            expected = " and ".join(f"{tests[name][0]} {limit:g}" for name, limit in limits.items())
            raise RecipeError(
                f"{path} is out of range", where=where, expected=expected, got=shown(value)
            )


def to_toml(tree: Any) -> str:
    """Every field of the tree, defaults too; a field without a value becomes a comment, for TOML
    has no null.
    """
    return "\n".join(_lines(tree, path="")).strip() + "\n"


def _lines(tree: Any, *, path: str) -> Iterator[str]:
    tables = []
    for field in dataclasses.fields(tree):
        value = getattr(tree, field.name)
        is_list_of_tables = (
            isinstance(value, tuple) and bool(value) and dataclasses.is_dataclass(value[0])
        )
        if is_list_of_tables or dataclasses.is_dataclass(value):
            tables.append((field.name, value))
        elif value is None:
            yield f"# {field.name} is not set: {field.metadata['help']}"
        else:
            yield f"{field.name} = {toml_value(value)}"
    for name, value in tables:
        brackets = "[[{}]]" if isinstance(value, tuple) else "[{}]"
        for item in value if isinstance(value, tuple) else (value,):
            yield ""
            yield brackets.format(_join(path, name))
            yield from _lines(item, path=_join(path, name))


def flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting in a dataclass tree."""
    for field in dataclasses.fields(tree):
        value, name = getattr(tree, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from flat(value, f"{name}.")
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for index, item in enumerate(value):
                yield from flat(item, f"{name}.{index}.")
        else:
            yield name, value


def toml_value(value: Any) -> str:
    """One value as TOML. JSON's escapes are TOML's, except that DEL must be escaped too."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return (
            "{"
            + ", ".join(
                f"{toml_value(str(key))} = {toml_value(item)}" for key, item in value.items()
            )
            + "}"
        )
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def shown(value: Any) -> str:
    """A value as the user wrote it, cut to 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
