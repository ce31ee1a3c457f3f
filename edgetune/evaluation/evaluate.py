"""Task metrics of a run (in torch) or of a bundle (in the runtime) on a data file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from edgetune.core.errors import InputError
from edgetune.core.layout import MANIFEST, SUMMARY
from edgetune.core.tasks import TAGGING
from edgetune.data.prompts import PromptFormat
from edgetune.data.rows import read_rows
from edgetune.evaluation.answers import (
    Advance,
    Answers,
    BundleAnswers,
    HeadAnswers,
    Prompting,
)
from edgetune.evaluation.forgetting.subjects import is_base
from edgetune.evaluation.measures import Evaluation, check_answers, measure_rows, measure_text

H = TypeVar("H", bound=HeadAnswers)


def evaluate(
    folder: Path,
    data: Path,
    *,
    adapter: str | None = None,
    skip_invalid: bool = False,
    advance: Advance | None = None,
    how: Prompting | None = None,
    providers: Sequence[str] = (),
    engine: str = "auto",
    out_of_scope: str | None = None,
) -> Evaluation:
    """Measure a run or adapter folder in torch, a bundle in the runtime, or a bare base, on the
    rows of `data`.

    The rows are read by the prompt format that was recorded with the adapter; a base is asked as
    `how` says. What learned from text is measured on text: perplexity and bits per byte.
    `providers` and `engine`: what runs a bundle. `out_of_scope`: the label of rows that are none
    of the adapter's labels; None: what its recipe named.
    """
    if (folder / MANIFEST).is_file():
        if how is not None:
            raise _asks_a_base(folder)
        from edgetune.runtime import Runtime

        with Runtime.open(folder, providers=providers, engine=engine) as runtime:
            return measure(
                _with_scope(BundleAnswers(runtime, adapter), out_of_scope),
                folder,
                data,
                skip_invalid=skip_invalid,
                advance=advance,
            )
    if providers:
        raise InputError(
            "--provider chooses what runs a bundle",
            where=str(folder),
            got="a run or a base, which torch runs",
        )
    if is_base(folder):
        return _evaluate_base(folder, data, how, skip_invalid=skip_invalid, advance=advance)
    if how is not None:
        raise _asks_a_base(folder)
    if adapter is not None:
        raise InputError(
            "--adapter chooses among a bundle's adapters",
            where=str(folder),
            got="a run, which has one",
        )
    from edgetune.evaluation.torch_answers import TorchAnswers

    found = measure(
        _with_scope(TorchAnswers.open(folder), out_of_scope),
        folder,
        data,
        skip_invalid=skip_invalid,
        advance=advance,
    )
    return replace(found, notes=(*found.notes, *_learned(folder, found.data_digest)))


def _learned(folder: Path, digest: str) -> list[str]:
    """What to know of figures on a file that the run was trained on."""
    if not (folder / SUMMARY).is_file():
        return []
    stages = json.loads((folder / SUMMARY).read_text(encoding="utf-8")).get("data", [])
    rows = [one["rows"]["train"] for one in stages if one["digests"].get("train") == digest]
    return [
        f"{max(rows)} rows of this file were learned: what is measured on them says nothing of"
        " other rows"
        for _ in rows[:1]
    ]


def _with_scope(answers: H, out_of_scope: str | None) -> H:
    """The answers, with another label for rows that are none of theirs."""
    if out_of_scope is not None:
        if answers.labels is None or answers.task == TAGGING or answers.problem != "single-label":
            raise InputError(
                "--out-of-scope names the label of rows that are none of an adapter's labels",
                got=f"an adapter for {answers.task}",
                expected="one that gives each row one label",
            )
        answers.confidence = replace(answers.confidence, out_of_scope=out_of_scope)
    return answers


def _asks_a_base(folder: Path) -> InputError:
    return InputError(
        "--prompt, --completion, --shots, --train, --choose and --plain ask a bare base",
        where=str(folder),
        got="a run or a bundle",
    )


def _evaluate_base(
    folder: Path, data: Path, how: Prompting | None, *, skip_invalid: bool, advance: Advance | None
) -> Evaluation:
    """By its prompts, or, where rows are nothing but text and no prompt is given, by their
    perplexity.
    """
    from edgetune.evaluation.base_answers import BaseAnswers
    from edgetune.evaluation.forgetting.torch_subject import base_subject
    from edgetune.models.resolve import resolve_base

    columns = read_rows(data, skip_invalid).rows[0].values
    if how in (None, Prompting()) and "text" in columns and "prompt" not in columns:
        base = resolve_base(str(folder))
        if base.kind == "decoder":
            return measure_text(
                base_subject(base),
                folder,
                read_rows(data, skip_invalid),
                PromptFormat(),
                skip_invalid=skip_invalid,
            )
    return measure(
        BaseAnswers(str(folder), data, how or Prompting()),
        folder,
        data,
        skip_invalid=skip_invalid,
        advance=advance,
    )


def measure(
    answers: Answers,
    folder: Path,
    data: Path,
    *,
    skip_invalid: bool = False,
    advance: Advance | None = None,
) -> Evaluation:
    """Let `answers` answer every row of a data file, and compare."""
    check_answers(answers, folder)
    return measure_rows(
        answers, folder, read_rows(data, skip_invalid), skip_invalid=skip_invalid, advance=advance
    )
