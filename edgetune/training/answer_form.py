"""The form that `[generation]` binds answers to, against the answers that are learned: derived from
them (`schema = "auto"`), or checked with them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgetune.core.errors import DataError, RecipeError
from edgetune.data.answer_schema import derive_schema, outline
from edgetune.data.examples import ExampleSet
from edgetune.data.loaders import answers_of
from edgetune.models.base import Base
from edgetune.recipe.generation import AUTO_SCHEMA, forms_of
from edgetune.recipe.schema import Recipe, Stage
from edgetune.runtime.generation.structured import FormCheck

Answer = tuple[str, str]  # ("file, line n", text)
STYLES = ((", ", ": "), (",", ":"))  # of json.dumps, and of what saves tokens
SHOWN = 40  # characters
MAX_DEPTH = 32  # of what an answer nests


@dataclass(frozen=True)
class AnswerForm:
    """The schema that `schema = "auto"` came to, None without; and what to say of it."""

    schema: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()

    def noted(self, sets: Sequence[ExampleSet]) -> list[ExampleSet]:
        """The examples of all stages, with what is said among the notes of the last."""
        *others, last = sets
        notes = last.notes | ({"answers": list(self.notes)} if self.notes else {})
        return [*others, replace(last, notes=notes)]


def answer_form(recipe: Recipe, tokenizer: Any, base: Base) -> AnswerForm:
    """DataError for a training answer that is not of the form; RecipeError where there is none to
    derive it from.
    """
    generation = recipe.generation
    forms = {} if generation is None else forms_of(generation, where="recipe")
    if not forms:
        return AnswerForm()
    ((kind, form),) = forms.items()
    stage = next((stage for stage in reversed(recipe.stage) if stage.learned == "sft"), None)
    if form == AUTO_SCHEMA and kind == "schema":
        return _derived(_sft_stage(stage, base), tokenizer, base, seed=recipe.seed)
    if stage is not None and base.kind == "decoder":
        text = form if isinstance(form, str) else json.dumps(form)
        answers = answers_of(stage, tokenizer, base, seed=recipe.seed)
        misfits = _misfits(FormCheck(kind, text), answers["train"])
        if misfits:
            raise _misfit(misfits, f"generation.{kind}", len(answers["train"]))
    return AnswerForm()


def _sft_stage(stage: Stage | None, base: Base) -> Stage:
    if base.kind != "decoder":
        raise RecipeError(
            'generation.schema = "auto" does not fit an encoder-decoder',
            got=base.name,
            fix="Remove it: answers of this tokenizer cannot be held to a form.",
        )
    if stage is None:
        raise RecipeError(
            'generation.schema = "auto" derives its schema from the answers of an sft stage',
            expected='a stage with method = "sft"',
            fix="Give generation.schema a file, or remove it.",
        )
    return stage


def _derived(stage: Stage, tokenizer: Any, base: Base, *, seed: int) -> AnswerForm:
    answers = answers_of(stage, tokenizer, base, seed=seed)
    train = answers["train"]
    values = [_value(where, text) for where, text in train]
    schema = derive_schema(values)
    notes = [f"held to a JSON schema of their own: {outline(schema)}"]
    style = _style([text for _, text in train], values)
    if style is not None:
        schema["x-guidance"] = style
    form = FormCheck("schema", json.dumps(schema))
    misfits = _misfits(form, train)
    turned = [one for one in misfits if form.departure(_spelt(one.text, style)) is not None]
    if len(turned) < len(misfits):
        raise _misfit([one for one in misfits if one not in turned], "the JSON", len(train))
    if turned:
        notes.append(
            f"{len(turned)} of {len(train)} have their keys in another order than most (the first:"
            f" {turned[0].where}); the schema keeps the order of most"
        )
    padded = sum(text != text.strip() for _, text in train)
    if padded:
        notes.append(
            f"{padded} of {len(train)} have white space around the JSON, which is left out"
        )
    if lost := _misfits(form, answers.get("validation", ())):
        notes.append(
            f"{len(lost)} of {len(answers['validation'])} validation answers do not fit it (the"
            f" first: {lost[0].where}, at {lost[0].got})"
        )
    return AnswerForm(schema, tuple(notes))


@dataclass(frozen=True)
class _Misfit:
    where: str
    text: str
    expected: str
    got: str


def _misfits(form: FormCheck, answers: Sequence[Answer]) -> list[_Misfit]:
    """The answers that leave the form, white space around them aside."""
    found = []
    known = {text: form.departure(text.strip()) for text in {text for _, text in answers}}
    for where, text in answers:
        if (departure := known[text]) is not None:
            rest = text.strip()[len(departure.fits) :]
            after = f" after {departure.fits[-SHOWN:]}" if departure.fits else ""
            found.append(
                _Misfit(
                    where,
                    text,
                    f"{departure.expected}{after}",
                    rest[:SHOWN] + "…" * (len(rest) > SHOWN) or "the end of the answer",
                )
            )
    return found


def _misfit(misfits: Sequence[_Misfit], form: str, total: int) -> DataError:
    first = misfits[0]
    many = "no training answer fits it" if len(misfits) == total else f"{len(misfits)} of {total}"
    spelt = "\\u" in first.got or first.expected.endswith(("\\", "\\u00"))
    return DataError(
        f"the answer is not of the form of {form} ({many})",
        where=first.where,
        expected=first.expected,
        got=first.got,
        fix=(
            "Write characters as they are: json.dumps(…, ensure_ascii=False)."
            if spelt
            else "Correct the row, or the form in [generation]."
        ),
    )


def _value(where: str, text: str) -> Any:
    """The JSON value that an answer is."""
    try:
        if _depth(text) > MAX_DEPTH:
            raise ValueError(f"it has more than {MAX_DEPTH} levels")
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except ValueError as error:
        reason = str(error)
        shown = " ".join(text.split())
        raise DataError(
            f'the answer is no JSON ({reason}), and generation.schema = "auto" derives its schema'
            " from JSON answers",
            where=where,
            expected="a JSON value and nothing else",
            got=shown[:SHOWN] + "…" * (len(shown) > SHOWN),
            fix="Correct the row, or remove generation.schema.",
        ) from error


def _depth(text: str) -> int:
    """Brackets that are open at once; those inside of texts count too."""
    level = (1 if c in "[{" else -1 if c in "]}" else 0 for c in text)
    return max(itertools.accumulate(level), default=0)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has the key {twice!r} twice")
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _style(texts: Sequence[str], values: Sequence[Any]) -> dict[str, Any] | None:
    """llguidance's words for the white space that all answers have; None where they differ."""
    for item, key in STYLES:
        if all(
            text.strip() == json.dumps(value, ensure_ascii=False, separators=(item, key))
            for text, value in zip(texts, values, strict=True)
        ):
            return {"whitespace_pattern": "", "item_separator": item, "key_separator": key}
    return None


def _spelt(text: str, style: Mapping[str, Any] | None) -> str:
    """The same value as the schema spells it, keys in the answer's own order."""
    separators = (style["item_separator"], style["key_separator"]) if style else STYLES[0]
    return json.dumps(json.loads(text), ensure_ascii=False, separators=separators)
