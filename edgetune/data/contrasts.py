"""Rows of texts that are alike (`contrastive`): pairs, triplets, texts with a label, or pairs with
a number; several token sequences an example.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgetune.core.errors import DataError, RecipeError
from edgetune.core.tasks import EMBEDDING
from edgetune.data.columns import number_in
from edgetune.data.examples import ExampleSet, Loading, load
from edgetune.data.labels import NO_LINE, encode_texts, readable
from edgetune.data.prompts import (
    PromptFormat,
    first_column,
    prompt_format,
    render,
    row_template,
)
from edgetune.data.row import Row
from edgetune.data.rows import Rows, convert_rows
from edgetune.recipe.own_settings import Contrastive
from edgetune.recipe.schema import Data, Stage

ANCHORS = ("anchor", "text", "sentence1", "query", "question")
POSITIVES = ("positive", "text_pair", "sentence2", "passage", "answer")
SCORES = ("score",)


@dataclass(frozen=True)
class ContrastRow:
    """A row as texts: the anchor, then what is like it, then what is not; or the anchor alone and
    its label. `score`: how much alike two texts are.
    """

    line: int
    texts: tuple[str, ...]
    label: str | None = None
    score: float | None = None


@dataclass(slots=True)
class ContrastExample:
    """The token ids of the anchor and of the other texts."""

    input_ids: list[int]
    others: tuple[list[int], ...]
    row: int
    target: str | float | None = None  # a label, which both texts have, or a score

    @property
    def padded_length(self) -> int:
        """Tokens of the example as rows of one batch, the shorter ones padded."""
        return (1 + len(self.others)) * max(map(len, (self.input_ids, *self.others)))


def stage_format(
    stage: Stage, *, chat_template: str | None, columns: Mapping[str, Any]
) -> PromptFormat:
    """How a stage's rows are read, of any method; see `prompt_format`."""
    if stage.task == EMBEDDING:
        return contrast_format(stage.data, columns)
    return prompt_format(
        stage.data, method=stage.method, chat_template=chat_template, columns=columns
    )


def contrast_format(data: Data, columns: Mapping[str, Any]) -> PromptFormat:
    """Which columns hold the anchor, its positive, its negative, its label or score; as the recipe
    says, else by the columns of widespread sets.
    """

    def template(key: str, name: str) -> str:
        return row_template(getattr(data, key) or name, key, key=f"data.{key}", columns=columns)

    text = template("text", first_column(ANCHORS, columns))
    with_label = data.label is not None and data.text_pair is None
    positive = first_column(POSITIVES, columns)
    if with_label or (data.text_pair is None and positive not in columns):
        return PromptFormat(text=text, label=template("label", "label"))
    form = PromptFormat(text=text, positive=template("text_pair", positive))
    scored = data.label is not None or SCORES[0] in columns
    if data.negative is not None or "negative" in columns:
        return replace(form, negative=template("negative", "negative"))
    return replace(form, label=template("label", SCORES[0])) if scored else form


def contrast_rows(
    source: Rows, form: PromptFormat, *, skip_invalid: bool = False
) -> tuple[list[ContrastRow], int]:
    """Texts, labels and scores of every row, and how many rows were left out. A positive that is
    its anchor, or a negative that is its positive, is a DataError.
    """
    named = {"text": form.text or "", "text_pair": form.positive, "negative": form.negative}

    def convert(row: Row, where: str) -> ContrastRow:
        texts = tuple(
            render(template, row.values, where=where, field=field)
            for field, template in named.items()
            if template is not None
        )
        if form.positive is None:
            label = render(form.label or "", row.values, where=where, field="label").strip()
            return ContrastRow(row.line, texts, label=label)
        if form.label is not None:
            score = number_in(row, form.label, where=where)
            return ContrastRow(row.line, texts, score=score)
        for first, second in itertools.pairwise(texts):
            if first.strip() == second.strip():
                raise DataError(
                    "two of the row's texts are the same, and nothing can be learned from that",
                    where=where,
                    got=repr(first if len(first) <= 40 else first[:39] + "…"),
                    fix="Correct the row, or leave such rows out with data.skip_invalid = true.",
                )
        return ContrastRow(row.line, texts)

    return convert_rows(source, convert, skip_invalid=skip_invalid)


def contrasted(row: Row, form: PromptFormat, where: str) -> tuple[str, str, tuple[str, ...]]:
    """A row's anchor, what is said of it (the texts like and unlike it, its label, or a number),
    and its label's name.
    """
    (one,), _ = contrast_rows(Rows(where.rpartition(", line")[0], [row], 0, ""), form)
    said = [*one.texts[1:], *([] if one.score is None else [f"{one.score:g}"])]
    return one.texts[0], " ".join(said) or one.label or "", (one.label,) if one.label else ()


def load_contrasts(loading: Loading) -> ExampleSet:
    """Pairs and triplets as they are; of rows with labels, each beside some others of its label.
    Longer texts are cut to `max_length` tokens.
    """
    if loading.stage.batch_size == 1:
        raise RecipeError(
            "contrastive learns from the other rows of a step",
            where="batch_size",
            expected="at least 2, better 32 or more",
            got="1",
        )
    truncated: dict[str, int] = {}
    labelled = loading.form.positive is None

    def encode(name: str, rows: list[ContrastRow]) -> list[ContrastExample]:
        if labelled and name == "train":
            if loading.stage.data.label_names:
                names = sorted({row.label for row in rows if row.label is not None})
                rows = [*rows, *(ContrastRow(NO_LINE, (readable(one),), one) for one in names)]
            pairs = loading.stage.own(Contrastive).pairs
            rows = beside_their_like(
                rows, pairs, seed=loading.seed, source=loading.sources[name].source
            )
        flat = [text for row in rows for text in row.texts]
        ids, truncated[name] = encode_texts(flat, loading.tokenizer, limit=loading.limit)
        left = iter(ids)
        return [
            ContrastExample(
                next(left),
                tuple(next(left) for _ in row.texts[1:]),
                row.line,
                row.label if row.score is None else row.score,
            )
            for row in rows
        ]

    return replace(load(loading, contrast_rows, encode), truncated=truncated)


def beside_their_like(
    rows: Sequence[ContrastRow], pairs: int, *, seed: int, source: str
) -> list[ContrastRow]:
    """Each row as the anchor of at most `pairs` others of its label, drawn with the seed. DataError
    where no label has two different texts, or there is only one label.
    """
    draw = random.Random(seed)
    by_label: dict[str | None, list[ContrastRow]] = {}
    for row in rows:
        by_label.setdefault(row.label, []).append(row)
    found = []
    for row in rows:
        alike = [one for one in by_label[row.label] if one.texts != row.texts]
        for one in draw.sample(alike, min(pairs, len(alike))):
            found.append(replace(row, texts=row.texts + one.texts))
    if not found or len(by_label) < 2:
        raise DataError(
            "these labels say of no two texts that they are alike and others not",
            where=source,
            expected="at least two labels, and one with two different texts",
            got=f"{len(by_label)} labels of {len(rows)} rows",
        )
    return found
