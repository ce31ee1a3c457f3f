"""The recipe's reference page, derived from its dataclasses: `python -m
edgetune.recipe.reference_page > docs/reference/recipe.md`.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

from edgetune.core.settings import describe, toml_value
from edgetune.recipe.confidence import ConfidenceSettings
from edgetune.recipe.own_settings import Dpo, Grpo
from edgetune.recipe.schema import Data, Forgetting, Generation, Parameters, Recipe, Replay, Stage

SECTIONS = (
    (Recipe, "top of the file"),
    (Parameters, "[parameters]"),
    (Forgetting, "[forgetting]"),
    (Generation, "[generation]"),
    (ConfidenceSettings, "[confidence]"),
    (Stage, "[[stage]]"),
    (Data, "data of a stage"),
    (Replay, "replay of a stage"),
    (Dpo, "[stage.dpo]"),
    (Grpo, "[stage.grpo]"),
)
OPENING = """# The recipe, key by key

Made from the code by `python -m edgetune.recipe.reference_page`; a test keeps it true. Unknown
keys and wrong types are refused by name. Any key can be set from the command line:
`edgetune train recipe.toml --set stage.0.epochs=2`. A recipe of version 0.1 has the keys of
`[stage.dpo]` and `[stage.grpo]` right in its stage; `edgetune train recipe.toml --migrate` moves
them.
"""


def reference_page() -> str:
    """The whole page as Markdown."""
    return OPENING + "".join(
        "\n" + "\n".join(_section(cls, title)) + "\n" for cls, title in SECTIONS
    )


def _section(cls: type, title: str) -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    yield f"## {title}\n"
    opening, _, _ = (cls.__doc__ or "").partition("\n\n")
    yield " ".join(opening.split()) + "\n"
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    for field in dataclasses.fields(cls):
        if not dataclasses.is_dataclass(hints[field.name]) and field.name != "stage":
            yield (
                f"| `{field.name}` | {_cell(describe(hints[field.name]))} | {_default(field)} |"
                f" {_cell(field.metadata['help'])} |"
            )


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "required" if field.default_factory is dataclasses.MISSING else "`{}`"
    return "not set" if field.default is None else f"`{_cell(toml_value(field.default))}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(reference_page(), end="")
