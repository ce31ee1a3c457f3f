"""A frozen dataclass tree read strictly from a dict (a recipe, a bundle's manifest, a device's
profile), and written back as TOML with every default.

The dataclass is the only declaration: types come from its annotations; help and limits from
`option`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

from edgetune.core.errors import EdgetuneError, RecipeError

T = TypeVar("T")
WORDS = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
PLURALS = {int: "integers", float: "numbers", str: "strings", bool: "booleans"}


def option(
    default: Any = dataclasses.MISSING, *, factory: Any = dataclasses.MISSING, **facts: Any
) -> Any:
    """A dataclass field with what is said `about` it."""
    return dataclasses.field(default=default, default_factory=factory, metadata=about(**facts))


def about(
    *,
    help: str = "",  # noqa: A002 - the word every command line uses
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
    planned: Sequence[str] = (),
    key: str | None = None,
    written_where_set: bool = False,
) -> dict[str, Any]:
    """Metadata of a dataclass field: help, limits, the choices of a text.

    `planned`: values that are named in the design but not built yet. `key`: its name in the file,
    where that is another. `written_where_set`: left out of a file while it is the default.
    """
    limits = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    texts = {"help": help, "key": key, "choices": tuple(choices), "planned": tuple(planned)}
    return {**texts, "written_where_set": written_where_set, **limits}


def from_dict(
    cls: type[T],
    values: Mapping[str, Any],
    *,
    where: str,
    error: type[EdgetuneError] = RecipeError,
    required: Sequence[str] = (),
    table: str = "a table",
    fix: str = "",
) -> T:
    """Build `cls` strictly; every missing key is named at once.

    Raises `error` for an unknown key, missing keys, a wrong type or a value out of range. Keys of
    `required` must be there although they have a default. `table` is what the file's language calls
    a mapping; `fix` is the way out of unknown and missing keys, where the user did not write them.
    """
    built: T = _Reader(where, error, table, fix).build(cls, values, "", required=required)
    return built


def settled(value: T | Literal["auto"]) -> T:
    """A setting that was "auto" once. ValueError where it still is."""
    if isinstance(value, str):
        raise ValueError('"auto" is not settled yet')
    return value


def key_of(field: dataclasses.Field[Any]) -> str:
    """The name of a field in the file."""
    return field.metadata.get("key") or field.name


def did_you_mean(word: str, choices: typing.Iterable[str]) -> str:
    """`Did you mean "x"?` for the nearest choice, or nothing when none is near."""
    near = difflib.get_close_matches(word, list(choices), n=1)
    return f'Did you mean "{near[0]}"?' if near else ""


def nearest(word: str, names: typing.Collection[str], *, none: str = "") -> dict[str, str]:
    """`expected` and `fix` of the error for a name that is not among these: the nearest one, else
    the first dozen of them, else `none`.
    """
    near = did_you_mean(word, names)
    return {"expected": "" if near else _first(names) or none, "fix": near}


def describe(hint: Any, *, table: str = "a table") -> str:
    """A type in a reader's words: `an integer`, `a list of strings`, `one of "a", "b"`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    plurals = {**PLURALS, Any: "values"}
    tables = table.split()[-1] + "s"
    if origin is Literal:
        return _one_of(arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(describe(part, table=table) for part in _alternatives(hint))
    if origin is tuple:
        return f"a list of {plurals.get(arguments[0], tables)}"
    if origin is dict:
        return f"{table} of {plurals.get(arguments[1], tables)}"
    return WORDS.get(hint, table)


def some_of(keys: typing.Collection[str]) -> str:
    """`one of a, b, c`: the first dozen."""
    return f"one of {_first(keys)}"


def _first(keys: typing.Collection[str]) -> str:
    """The first dozen of them, and how many more there are."""
    more = f" and {len(keys) - 12} more" if len(keys) > 12 else ""
    return ", ".join(list(keys)[:12]) + more


def _one_of(choices: typing.Iterable[str]) -> str:
    quoted = [f'"{choice}"' for choice in choices]
    return quoted[0] if len(quoted) == 1 else "one of " + ", ".join(quoted)


@functools.cache
def _fields(cls: type) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """Key → field and type. Kept: Python compiles every annotation anew each time it is asked."""
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    return {key_of(field): (field, hints[field.name]) for field in fields}


@dataclasses.dataclass(frozen=True)
class _Reader:
    """What is the same for all values of one file: see `from_dict`."""

    where: str
    error: type[EdgetuneError]
    table: str
    fix: str

    def build(
        self, cls: type, values: Mapping[str, Any], path: str, *, required: Sequence[str] = ()
    ) -> Any:
        """The dataclass from the table at `path`."""
        fields = _fields(cls)
        for key in values:
            if key not in fields:
                near = did_you_mean(key, fields)
                raise self.error(
                    f'unknown key "{shortened(_join(path, key))}"',
                    where=self.where,
                    expected="" if near else some_of(fields),
                    fix=self.fix or near,
                )
        if missing := [
            key
            for key, (field, _) in fields.items()
            if key not in values and (key in required or not _has_default(field))
        ]:
            raise self._missing({_join(path, key): fields[key] for key in missing})
        return cls(
            **{
                field.name: self._convert(hint, values[key], field=field, path=_join(path, key))
                for key, (field, hint) in fields.items()
                if key in values
            }
        )

    def _missing(self, keys: Mapping[str, tuple[dataclasses.Field[Any], Any]]) -> EdgetuneError:
        """`keys`: full name → field and type."""
        names = ", ".join(f'"{name}"' for name in keys)
        what, it = ("key {} is", "it") if len(keys) == 1 else ("keys {} are", "them")
        lines = [
            _example(name, hint) + (f" ({text})" if (text := field.metadata.get("help")) else "")
            for name, (field, hint) in keys.items()
        ]
        return self.error(
            f"the {what.format(names)} missing",
            where=self.where,
            fix=self.fix or f"Add {it}: {'; '.join(lines)}.",
        )

    def _convert(self, hint: Any, value: Any, *, field: dataclasses.Field[Any], path: str) -> Any:
        """The value as `hint` wants it (int → float, list → tuple, dict → dataclass)."""
        if value is None and type(None) in typing.get_args(hint):
            return None
        for candidate in _alternatives(hint):
            matched, converted = self._match(candidate, value, path=path)
            if matched:
                self._check_limits(converted, field=field, path=path)
                return converted
        if value in field.metadata.get("planned", ()):
            raise self.error(
                f'{path} = "{value}" is planned but not in this version',
                where=self.where,
                expected=describe(hint, table=self.table),
            )
        choices = [
            choice
            for part in _alternatives(hint)
            for choice in typing.get_args(part)
            if isinstance(choice, str)
        ]
        raise self._wrong(value, path=path, expected=describe(hint, table=self.table), near=choices)

    def _match(self, hint: Any, value: Any, *, path: str) -> tuple[bool, Any]:
        """Whether `value` is of the type `hint`, strictly (true is no integer), and the value
        converted.
        """
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if hint is Any:
            return True, value
        if dataclasses.is_dataclass(hint):
            is_table = isinstance(value, Mapping)
            return is_table, self.build(typing.cast(type, hint), value, path) if is_table else value
        if origin is Literal:
            return isinstance(value, str) and value in arguments, value
        if origin is tuple:
            if not isinstance(value, (list, tuple)):
                return False, value
            items = [
                self._match(arguments[0], item, path=f"{path}.{index}")
                for index, item in enumerate(value)
            ]
            return all(matched for matched, _ in items), tuple(item for _, item in items)
        if origin is dict:
            if not isinstance(value, Mapping):
                return False, value
            pairs = {
                str(key): self._match(arguments[1], item, path=_join(path, key))
                for key, item in value.items()
            }
            return all(matched for matched, _ in pairs.values()), {
                key: item for key, (_, item) in pairs.items()
            }
        if hint is float:
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            matches = is_number and abs(value) <= sys.float_info.max  # no NaN, no infinity
            return matches, float(value) if matches else value
        if hint is int:
            return type(value) is int and -(2**63) <= value < 2**63, value  # as TOML has them
        return type(value) is hint, value

    def _check_limits(self, value: Any, *, field: dataclasses.Field[Any], path: str) -> None:
        choices = field.metadata.get("choices", ())
        if choices and value not in choices:
            raise self._wrong(value, path=path, expected=_one_of(choices), near=choices)
        tests: dict[str, tuple[str, Callable[[float, float], bool]]] = {
            "at_least": ("at least", lambda number, limit: number >= limit),
            "above": ("more than", lambda number, limit: number > limit),
            "at_most": ("at most", lambda number, limit: number <= limit),
            "below": ("less than", lambda number, limit: number < limit),
        }
        limits = {
            name: field.metadata[name] for name in tests if field.metadata.get(name) is not None
        }
        for number in list(value.values()) if isinstance(value, dict) else [value]:
            if (
                limits
                and not isinstance(number, str)
                and not all(tests[n][1](number, limits[n]) for n in limits)
            ):
                expected = " and ".join(
                    f"{tests[name][0]} {limit:g}" for name, limit in limits.items()
                )
                raise self.error(
                    f"{path} is out of range", where=self.where, expected=expected, got=shown(value)
                )

    def _wrong(self, value: Any, *, path: str, expected: str, near: Sequence[str]) -> EdgetuneError:
        return self.error(
            f"{path} has a wrong value",
            where=self.where,
            expected=expected,
            got=shown(value),
            fix=did_you_mean(value, near) if isinstance(value, str) else "",
        )


def _example(key: str, hint: Any) -> str:
    """How a key is written in TOML."""
    if dataclasses.is_dataclass(hint):
        return f"[{key}]"
    element = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None
    return f"[[{key}]]" if dataclasses.is_dataclass(element) else f"{key} = …"


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return (
        field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    )


def _alternatives(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return (
        tuple(part for part in typing.get_args(hint) if part is not type(None))
        if is_union
        else (hint,)
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
            tables.append((key_of(field), value))
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
    """A value as the user wrote it, cut to 60 characters; halves of surrogate pairs are escaped."""
    if isinstance(value, int) and not -(10**60) < value < 10**60:
        return "an integer of more than 60 digits"
    try:
        written = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):  # a longer integer inside, or nested beyond all use
        return "a value that cannot be shown"
    text = written.encode(errors="backslashreplace").decode()
    return text if len(text) <= 60 else text[:57] + "…"


def shortened(text: str, limit: int = 100) -> str:
    """A user's text for one line of a message: line breaks and the like escaped, cut to `limit`."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: limit + 1])
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
