"""The JSON schema that the answers of training rows have in common: `derive_schema`.

Whatever the answers show is asked for, and nothing that they show by chance:

- A key is required where every object has it. No other key may stand there, unless the keys are
  data themselves (more than `FREE_KEYS` of them, none in half of the objects).
- Keys stand in the order in which most answers have them.
- A text is one of a list where it repeats few values: `MOST_VALUES` at most, each `REPEATED` times
  on average, and of a hundred texts at most one that stands there once. That is Good and Turing's
  estimate of how often a text comes up that was never seen (Good 1953). Else it is free text.
- Numbers are never a list: whole ones stay whole, and take any value.
- Where the first text of an object says which of the other keys follow (an action, an intent), each
  of its values gets the keys and the kinds of value that it always has, as far as this would be
  less than `CHANCE` likely by luck.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

JsonSchema = dict[str, Any]
Shares = defaultdict[str, defaultdict[str, float]]
MOST_VALUES = 256
REPEATED = 3
ONCE = 0.01  # of all texts, those whose value stands there once
FREE_KEYS = 50
CHANCE = 0.001
MOST_VARIANTS = 64
SUPPORT = 20  # objects of a kind whose inner objects are described apart
KINDS = ("object", "array", "string", "integer", "number", "boolean", "null")


def derive_schema(values: Sequence[Any]) -> JsonSchema:
    """The schema of some JSON values, one at least; each of them fits it."""
    by_kind = {kind: [v for v in values if json_kind(v) == kind] for kind in KINDS}
    if by_kind["number"]:
        by_kind["number"] += by_kind.pop("integer")
    options = [_of_kind(kind, found) for kind, found in by_kind.items() if found]
    return options[0] if len(options) == 1 else {"anyOf": options}


def json_kind(value: Any) -> str:
    """JSON schema's name of a value's type."""
    if isinstance(value, bool):
        return "boolean"
    python = {dict: "object", list: "array", str: "string", int: "integer", float: "number"}
    return python.get(type(value), "null")


def enumerated(texts: Sequence[str]) -> list[str] | None:
    """The values of a list that these texts are of, the most frequent first; None for free text."""
    counts = Counter(texts)
    once = sum(count == 1 for count in counts.values())
    few = len(counts) <= MOST_VALUES and len(texts) >= REPEATED * len(counts)
    return (
        [value for value, _ in counts.most_common()] if few and once <= ONCE * len(texts) else None
    )


def key_order(objects: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every key once, so that as many pairs as can be stand in the order of most objects."""
    shapes = Counter(tuple(value) for value in objects)
    before: Counter[tuple[str, str]] = Counter()
    for shape, count in shapes.items():
        for pair in combinations(shape, 2):
            before[pair] += count
    left = list(dict.fromkeys(key for shape in shapes for key in shape))
    order = []
    while left:
        first = next(
            (
                key
                for key in left
                if not any(before[other, key] > before[key, other] for other in left)
            ),
            left[0],  # in a circle
        )
        left.remove(first)
        order.append(first)
    return order


def _of_kind(kind: str, values: list[Any]) -> JsonSchema:
    if kind == "object":
        return _objects(values)
    if kind == "array":
        items = [item for value in values for item in value]
        return {"type": "array"} | ({"items": derive_schema(items)} if items else {"maxItems": 0})
    if kind == "string" and (names := enumerated(values)) is not None:
        return {"enum": names}
    return {"type": kind}


def _objects(objects: list[dict[str, Any]]) -> JsonSchema:
    counts = Counter(key for value in objects for key in value)
    if len(counts) > FREE_KEYS and 2 * max(counts.values()) < len(objects):
        inner = derive_schema([item for value in objects for item in value.values()])
        return {"type": "object", "additionalProperties": inner}
    order = key_order(objects)
    properties = {
        key: derive_schema([value[key] for value in objects if key in value]) for key in order
    }
    whole = _object(properties, [key for key in order if counts[key] == len(objects)])
    for leading in whole["required"]:
        if 1 < len(properties[leading].get("enum", ())) <= MOST_VARIANTS:
            variants = _variants(leading, objects, whole)
            if len(variants) > 1:
                return {"anyOf": variants}
    return whole


def _object(properties: Mapping[str, JsonSchema], required: Sequence[str]) -> JsonSchema:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(required),
        "additionalProperties": False,
    }


def _variants(leading: str, objects: list[dict[str, Any]], whole: JsonSchema) -> list[JsonSchema]:
    """The whole, parted by what the leading key's values ask of the others."""
    shares = _shares(objects)
    variants: list[tuple[list[str], JsonSchema]] = []
    for name in whole["properties"][leading]["enum"]:
        group = [value for value in objects if value[leading] == name]
        shape = _variant(leading, group, whole, shares)
        alike = next((names for names, other in variants if other == shape), None)
        if alike is None:
            variants.append(([name], shape))
        else:
            alike.append(name)
    return [
        {**shape, "properties": {**shape["properties"], leading: {"enum": names}}}
        for names, shape in variants
    ]


def _variant(
    leading: str, group: list[dict[str, Any]], whole: JsonSchema, shares: Shares
) -> JsonSchema:
    """What the objects of one leading value ask for beyond the whole."""
    properties: dict[str, JsonSchema] = {}
    required = []
    for key, schema in whole["properties"].items():
        found = [value[key] for value in group if key in value]
        present = sum(shares[key].values())
        if not found and _sure(1 - present, len(group)):
            continue
        if key == leading:
            schema = {}
        elif len(group) >= SUPPORT and any(isinstance(value, (dict, list)) for value in found):
            schema = derive_schema(found)
        elif found:
            schema = _without_others(schema, found, shares[key])
        properties[key] = schema
        if key in whole["required"] or (len(found) == len(group) and _sure(present, len(group))):
            required.append(key)
    return _object(properties, required)


def _without_others(
    schema: JsonSchema, found: Sequence[Any], shares: Mapping[str, float]
) -> JsonSchema:
    """The schema without the kinds of value that these surely are not."""
    kinds = {json_kind(value) for value in found}
    options = []
    for option in schema.get("anyOf", ()):
        own = _kinds_of(option)
        share = sum(shares[kind] for kind in own) / sum(shares.values())
        if own & kinds or not _sure(1 - share, len(found)):
            options.append(option)
    return schema if not options else options[0] if len(options) == 1 else {"anyOf": options}


def _kinds_of(option: JsonSchema) -> set[str]:
    """The kinds of value that an option without variants of its own takes."""
    if "anyOf" in option:
        return {"object"}
    kind = option.get("type", "string")
    return {"integer", "number"} if kind == "number" else {kind}


def _shares(objects: Sequence[Mapping[str, Any]]) -> Shares:
    """Key → kind → share of the objects that have the key with a value of the kind."""
    found: Shares = defaultdict(lambda: defaultdict(float))
    for value in objects:
        for key, inner in value.items():
            found[key][json_kind(inner)] += 1
    for kinds in found.values():
        for kind in kinds:
            kinds[kind] /= len(objects)
    return found


def _sure(share: float, times: int) -> bool:
    """Whether what has this share is no accident where it happens every time."""
    return bool(share**times < CHANCE)


def outline(schema: JsonSchema) -> str:
    """A schema's first level in a line for a person: keys, what they take, ? where they may be
    missing.
    """
    objects = [option for option in schema.get("anyOf", [schema]) if "properties" in option]
    if not objects:
        return _words(schema)
    keys = list(dict.fromkeys(key for option in objects for key in option["properties"]))
    parts = []
    for key in keys:
        found = [option["properties"][key] for option in objects if key in option["properties"]]
        needed = all(key in option["required"] for option in objects)
        kinds = list(dict.fromkeys(_words(one) for one in _united(found)))
        parts.append(f"{key}{'' if needed else '?'} ({' or '.join(kinds)})")
    return ", ".join(parts)


def _united(schemas: Sequence[JsonSchema]) -> list[JsonSchema]:
    """The options of several schemas, lists of texts joined."""
    options = [option for schema in schemas for option in schema.get("anyOf", [schema])]
    names = list(dict.fromkeys(name for option in options for name in option.get("enum", ())))
    return [option for option in options if "enum" not in option] + (
        [{"enum": names}] if names else []
    )


def _words(schema: JsonSchema) -> str:
    if "enum" in schema:
        names = schema["enum"]
        return "|".join(names) if len(names) <= 3 else f"{len(names)} texts"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_words(option) for option in schema["anyOf"]))
    return {"string": "text"}.get(schema["type"], str(schema["type"]))
