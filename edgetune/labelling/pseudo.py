"""A bundle's voices about texts without labels: its classifiers, and neighbours in its
embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.core.errors import DataError, InputError
from edgetune.core.progress import Say
from edgetune.core.tasks import CLASSIFICATION, EMBEDDING
from edgetune.data.labels import LabelledRow, labelled_rows, readable, two_or_more
from edgetune.data.plain_text import text_rows
from edgetune.data.prompts import PromptFormat
from edgetune.data.rows import read_rows
from edgetune.labelling.neighbours import spread_labels, surest, together
from edgetune.metrics.retrieval import Floats
from edgetune.runtime import Runtime

HEADS_WEIGHT = 0.3
"""Of the classifiers' mean beside the neighbours', in the geometric mean: chosen on 1,432 training
rows of Banking77 that stand in no few-shot file."""
TEXTS_AT_ONCE = 64


@dataclass(frozen=True)
class Labelling:
    """How texts are labelled; see `edgetune label --help`."""

    share: float = 0.85
    copies: int = 3
    heads_weight: float = HEADS_WEIGHT


@dataclass(frozen=True)
class Labelled:
    """Rows for a new adapter, and what was found on the way."""

    rows: list[dict[str, Any]]  # {"text", "label"}, those with a label of their own first
    given: int  # rows that had one
    joined: int  # texts that got one
    texts: int  # of all that had none
    right: dict[str, float] | None  # on the measured rows: of each voice, of all, of the surest


def label_texts(
    bundle: Path,
    labelled: Path,
    texts: Path,
    *,
    form: PromptFormat,
    how: Labelling | None = None,
    measure: Path | None = None,
    say: Say = lambda line: None,
) -> Labelled:
    """Label the surest of `texts` by the bundle's adapters and by the rows of `labelled`.

    A text that stands among the labelled rows, whatever its case and spaces, is left out. Of
    `measure`, rows with labels, only the share that the voices label rightly is told; they are
    never joined.
    """
    how = how or Labelling()
    given, _ = labelled_rows(read_rows(labelled), form)
    names = two_or_more({row.label for row in given}, "labels", str(labelled))
    known = {_plain(str(row.text)) for row in given}
    found, _ = text_rows(read_rows(texts), form)
    new = [row.text for row in found if _plain(row.text) not in known]
    held, _ = labelled_rows(read_rows(measure), form) if measure is not None else ([], 0)
    _check_held(held, names, measure)
    shown = [*((str(row.text), row.label) for row in given), *((readable(n), n) for n in names)]
    hidden = {_plain(str(row.text)) for row in held}
    new = [text for text in new if _plain(text) not in hidden]
    asked = [*new, *(str(row.text) for row in held)]
    if not new:
        raise DataError(
            "there is no text to label",
            where=str(texts),
            expected="texts that are not among the labelled rows",
            got=f"{len(found)} rows, all of them known",
        )
    with Runtime.open(bundle) as runtime:
        voices = _voices(runtime, shown, asked, names, how, say)
    joint = together([(table, weight) for _, table, weight in voices])
    kept = surest(joint[: len(new)], how.share)
    made = [{"text": new[at], "label": names[int(joint[at].argmax())]} for at in kept]
    own = [{"text": row.text, "label": row.label} for row in given]
    right = None
    if held:
        answers = np.array([names.index(row.label) for row in held])
        tables = {name: table[len(new) :] for name, table, _ in voices} | {"all": joint[len(new) :]}
        right = {name: float((t.argmax(1) == answers).mean()) for name, t in tables.items()}
        sure = surest(tables["all"], how.share)
        right["surest"] = float((tables["all"].argmax(1) == answers)[sure].mean())
    return Labelled(own * how.copies + made, len(own), len(made), len(new), right)


def _voices(
    runtime: Runtime,
    shown: Sequence[tuple[str, str]],
    asked: Sequence[str],
    names: Sequence[str],
    how: Labelling,
    say: Say,
) -> list[tuple[str, Floats, float]]:
    """(name, probabilities (asked, labels), weight) of each voice that counts."""
    heads = [name for name in runtime.adapters if runtime.task(name) == CLASSIFICATION]
    encoders = [name for name in runtime.adapters if runtime.task(name) == EMBEDDING]
    for name in heads:
        theirs = runtime.adapter(name).labels or ()
        if set(theirs) != set(names):
            raise InputError(
                f"the adapter {name!r} knows other labels than the labelled rows",
                where=str(runtime.folder),
                expected=", ".join(names[:8]),
                got=", ".join(theirs[:8]),
            )
    voices = []
    if heads and how.heads_weight > 0:
        say(f"asking {len(heads)} classifiers about {len(asked)} texts")
        tables = [_scores(runtime, asked, name, names) for name in heads]
        voices.append(("classifiers", np.mean(tables, axis=0), how.heads_weight))
    if not heads or how.heads_weight < 1:
        where = ", ".join(encoders) or "the base"
        say(f"spreading {len(shown)} labels among neighbours in the embedding of {where}")
        points = [
            np.concatenate([_embedded(runtime, part, name) for name in encoders or (None,)], axis=1)
            for part in ([text for text, _ in shown], asked)
        ]
        points = [part / np.float32(np.sqrt(max(1, len(encoders)))) for part in points]
        classes = np.array([names.index(label) for _, label in shown])
        table = spread_labels(points[0], classes, points[1], labels=len(names))
        voices.append(("neighbours", table, 1 - how.heads_weight if heads else 1.0))
    return voices


def _scores(runtime: Runtime, texts: Sequence[str], adapter: str, names: Sequence[str]) -> Floats:
    def scores(part: Sequence[str]) -> list[list[float]]:
        answers = runtime.classify(part, adapter, truncate=True)
        return [[answer.scores[name] for name in names] for answer in answers]

    return _in_parts(scores, texts)


def _embedded(runtime: Runtime, texts: Sequence[str], adapter: str | None) -> Floats:
    return _in_parts(
        lambda part: runtime.embed(part, adapters=None, adapter=adapter, truncate=True), texts
    )


def _in_parts(answer: Callable[[Sequence[str]], Any], texts: Sequence[str]) -> Floats:
    """A row of numbers for each text (texts, n), those of like length asked together, so that
    little is padded.
    """
    order = sorted(range(len(texts)), key=lambda at: len(texts[at]))
    parts = [order[at : at + TEXTS_AT_ONCE] for at in range(0, len(order), TEXTS_AT_ONCE)]
    rows = np.concatenate(
        [np.asarray(answer([texts[at] for at in part]), np.float32) for part in parts]
    )
    found = np.empty_like(rows)
    found[order] = rows
    return found


def _check_held(held: Sequence[LabelledRow], names: Sequence[str], source: Path | None) -> None:
    for row in held:
        if row.label not in names:
            raise DataError(
                f'the label "{row.label}" does not occur in the labelled rows',
                where=f"{source}, line {row.line}",
                expected=", ".join(names[:8]),
            )


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
