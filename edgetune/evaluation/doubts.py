"""Rows whose label a trained classifier doubts: confident learning (Northcutt et al. 2021), done by
cleanlab.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgetune.adapters.lora import adapter_off
from edgetune.core.errors import EdgetuneError, InputError
from edgetune.core.layout import RECIPE
from edgetune.core.tasks import CLASSIFICATION
from edgetune.core.text import Text
from edgetune.data.labels import LabelledRow, labelled_rows
from edgetune.data.splits import as_run, stage_rows
from edgetune.models.heads import unwrapped
from edgetune.recipe.read import load_run_recipe
from edgetune.recipe.schema import Stage

if TYPE_CHECKING:
    from edgetune.evaluation.torch_answers import TorchAnswers

AT_ONCE = 64  # texts
FOLDS, C = 5, 30.0  # of the regressions; their strength is that of a head's first weights
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
    texts = [row.text for row in rows]
    learned = np.array([text in known for text in texts])
    given = np.array([names.index(row.label) for row in rows])
    shares = _probabilities(answers, texts)
    if learned.any():
        shares[learned] = held_out_shares(
            _base_features(answers, [texts[at] for at in np.flatnonzero(learned)]),
            given[learned],
            len(names),
        )
    found = [
        (float(scores), int(at))
        for part in (np.flatnonzero(learned), np.flatnonzero(~learned))
        for at, scores in doubtful(given[part], shares[part], part)
    ]
    doubts = [
        Doubt(
            rows[at].line,
            text if isinstance(text := texts[at], str) else " | ".join(text),
            rows[at].label,
            names[int(shares[at].argmax())],
            score,
            bool(learned[at]),
        )
        for score, at in sorted(found)
    ]
    line = f"{len(doubts)} of {len(rows)} labels are doubtful"
    if len(rows) < len(all_rows):
        line += f" ({len(all_rows) - len(rows)} rows have labels that the run does not know)"
    if learned.any():
        line += (
            f". The run was trained on {learned.sum()} of these rows and believes their labels, so"
            f" they are judged by its base without the adapter, each row by one of {FOLDS}"
            " regressions that has not seen it"
        )
    return Doubts(doubts, line)


def doubtful(given: Any, shares: Any, places: Any) -> list[tuple[int, float]]:
    """(place, how much the given label is believed) of what cleanlab holds for a wrong label.

    `given` (rows,) classes, `shares` (rows, labels) probabilities of rows that were not learned.
    """
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    if len(given) < 2 or len(set(given.tolist())) < 2:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of labels with few rows
        issues = find_label_issues(
            given, shares, return_indices_ranked_by="self_confidence", n_jobs=1
        )
    scores = get_label_quality_scores(given, shares)
    return [(int(places[at]), float(scores[at])) for at in issues.tolist()]


def held_out_shares(features: Any, given: Any, labels: int) -> Any:
    """(rows, labels) probabilities, each row's by a logistic regression on the features (rows,
    hidden) of other rows.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    unit = features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-9)
    found = np.full((len(given), labels), 1.0 / labels)
    if len(given) < FOLDS:
        return found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of labels with fewer rows than there are parts
        parts = list(StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(unit, given))
    for seen, unseen in parts:
        if len(set(given[seen].tolist())) > 1:
            fitted = LogisticRegression(C=C, max_iter=1000).fit(unit[seen], given[seen])
            found[unseen] = 0.0
            found[np.ix_(unseen, fitted.classes_)] = fitted.predict_proba(unit[unseen])
    return found


def _base_features(answers: TorchAnswers, texts: Sequence[Text]) -> Any:
    """(texts, hidden): what the head's last layer reads, the adapter off."""
    seen = list[Any]()
    output = unwrapped(answers.model).output
    hook = output.register_forward_pre_hook(lambda _, read: seen.append(read[0].float().numpy()))
    try:
        with torch.no_grad(), _without_adapter(answers.model):
            for start in range(0, len(texts), AT_ONCE):
                answers.class_logits(texts[start : start + AT_ONCE])
    finally:
        hook.remove()
    return np.concatenate(seen)


@contextlib.contextmanager
def _without_adapter(model: Any) -> Iterator[None]:
    """The base under the adapter; a run of all weights has none to take off."""
    with adapter_off(model) if hasattr(model, "disable_adapter") else contextlib.nullcontext():
        yield


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
