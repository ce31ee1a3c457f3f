"""Rows whose label a trained classifier doubts: confident learning (Northcutt et al. 2021), done by
cleanlab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgetune.core.errors import EdgetuneError, InputError
from edgetune.core.layout import RECIPE
from edgetune.core.tasks import CLASSIFICATION
from edgetune.core.text import Text
from edgetune.data.labels import LabelledRow, labelled_rows
from edgetune.data.splits import as_run, stage_rows
from edgetune.recipe.read import load_run_recipe
from edgetune.recipe.schema import Stage

if TYPE_CHECKING:
    from edgetune.evaluation.torch_answers import TorchAnswers

AT_ONCE = 64  # texts
SHOWN = 90  # characters of a text on the screen


@dataclass(frozen=True)
class Doubt:
    """A row, its label, the one that the classifier holds for likelier, and how much it believes
    in the given one (0 to 1).
    """

    line: int
    text: str
    given: str
    likely: str
    score: float
    learned: bool  # the classifier was trained on this row

    @property
    def shown(self) -> str:
        """The text on one line, cut."""
        text = " ".join(self.text.split())
        return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


@dataclass(frozen=True)
class Doubts:
    """Doubtful rows, the most doubtful first; `line` says how far they can be trusted."""

    rows: Sequence[Doubt]
    line: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON and the page."""
        return {
            "line": self.line,
            "rows": [asdict(one) | {"line": str(one.line)} for one in self.rows],
        }


def doubted_rows(run: Path, stage: Stage, *, seed: int) -> Doubts:
    """The rows of a stage, those for validation too, that the run's classifier doubts.

    InputError for a run that is no classifier of one label.
    """
    from edgetune.evaluation.torch_answers import TorchAnswers

    answers = TorchAnswers.open(run)
    if answers.task != CLASSIFICATION or answers.problem != "single-label":
        raise InputError(
            "only a classifier with one label a row can doubt labels",
            where=str(run),
            got=f"a run of {answers.task}, {answers.problem}",
            fix="Give a run of sequence-classification.",
        )
    names = answers.labels or ()
    all_rows = list[LabelledRow]()
    for source in stage_rows(stage, seed=seed).values():
        all_rows += labelled_rows(source, answers.prompt_format, skip_invalid=True)[0]
    rows = [row for row in all_rows if row.label in names]
    if not rows:
        raise InputError(
            "none of these rows has a label that the run knows",
            where=str(run),
            expected=", ".join(names[:8]),
            got=", ".join(sorted({row.label for row in all_rows})[:8]),
        )
    known = _learned_texts(run, answers)
    learned = [row.text in known for row in rows]
    shares = _probabilities(answers, [row.text for row in rows])
    doubts = _doubted(rows, shares, names, learned)
    line = f"{len(doubts)} of {len(rows)} labels are doubtful"
    if len(rows) < len(all_rows):
        line += f" ({len(all_rows) - len(rows)} rows have labels that the run does not know)"
    if any(learned):
        line += (
            f". The run was trained on {sum(learned)} of these rows: it believes their labels more"
            " than it should, so there are likely more"
        )
    return Doubts(doubts, line)


def _doubted(
    rows: Sequence[LabelledRow], shares: Any, names: Sequence[str], learned: Sequence[bool]
) -> list[Doubt]:
    """What cleanlab holds for an issue, least believed first."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    given = np.array([names.index(row.label) for row in rows])
    issues = find_label_issues(given, shares, return_indices_ranked_by="self_confidence", n_jobs=1)
    scores = get_label_quality_scores(given, shares)
    return [
        Doubt(
            rows[at].line,
            text if isinstance(text := rows[at].text, str) else " | ".join(text),
            rows[at].label,
            names[int(shares[at].argmax())],
            float(scores[at]),
            learned[at],
        )
        for at in issues.tolist()
    ]


def _learned_texts(run: Path, answers: TorchAnswers) -> set[Text]:
    """The texts that the run was trained on; none where its data cannot be read any more."""
    try:
        recipe = load_run_recipe(run / RECIPE)
        stage = recipe.stage[-1]
        source = stage_rows(as_run(stage), seed=recipe.seed)["train"]
        rows, _ = labelled_rows(source, answers.prompt_format, skip_invalid=True)
    except EdgetuneError:
        return set()
    return {row.text for row in rows}


def _probabilities(answers: TorchAnswers, texts: Sequence[Text]) -> Any:
    """(texts, labels) probabilities."""
    order = sorted(range(len(texts)), key=lambda at: len(str(texts[at])))
    found = np.zeros((len(texts), len(answers.labels or ())))
    with torch.no_grad():
        for start in range(0, len(order), AT_ONCE):
            part = order[start : start + AT_ONCE]
            logits = answers.class_logits([texts[at] for at in part])
            found[part] = logits.double().softmax(-1).numpy()
    return found
