"""A falling loss is a gain and a falling accuracy is none, wherever two values are compared."""

from __future__ import annotations

import numpy as np
import pytest

from edgetune.core.tasks import LOWER_IS_BETTER, lower_is_better
from edgetune.data.rows import Rows
from edgetune.evaluation.forgetting.measure import _general
from edgetune.evaluation.forgetting.tasks import MeasuredSet
from edgetune.evaluation.measures import Evaluation
from edgetune.export.proof.task_metric import METRICS, compare_on_task
from edgetune.export.proof.task_rows import TaskRows
from edgetune.metrics.statistics import mean
from edgetune.report.comparison import _best
from edgetune.report.forgetting import general_changes, task_changes
from edgetune.report.gain_against_loss import unit_of

HIGHER = ("accuracy", "entity_f1", "rouge_l", "spearman")


@pytest.mark.parametrize("metric", LOWER_IS_BETTER)
def test_a_metric_that_falls_to_half_gains_half(metric: str) -> None:
    (gain,) = task_changes({metric: 0.5}, {metric: 1.0})
    assert gain.value == pytest.approx(50)
    assert unit_of(metric) == "%"
    assert _best(metric, [1.0, 0.5]) == 0.5


@pytest.mark.parametrize("metric", HIGHER)
def test_an_accuracy_that_falls_to_half_loses_points(metric: str) -> None:
    (loss,) = task_changes({metric: 0.5}, {metric: 1.0})
    assert loss.value == pytest.approx(-50)
    assert unit_of(metric) == "points"
    assert _best(metric, [1.0, 0.5]) == 1.0


@pytest.mark.parametrize("metric", [*LOWER_IS_BETTER, *HIGHER])
def test_general_ability_and_its_picture_agree_on_the_direction(metric: str) -> None:
    before, after = (
        MeasuredSet(metric, np.full((4, 1), value, np.float64), mean) for value in (1.0, 0.5)
    )
    general = _general("set", before, after)
    (change,) = general_changes([vars(general)])
    assert general.higher_is_better == (change.value < 0)


@pytest.mark.parametrize("metric", METRICS)
def test_the_proof_of_a_bundle_counts_the_same_direction(metric: str) -> None:
    rows = TaskRows(Rows("rows.jsonl", [], 0, ""), found=0, skip_invalid=False, limit=0)
    before, after = (
        Evaluation("", None, "", "", "", 0, 0, {metric: value}, 0.0, []) for value in (1.0, 0.5)
    )
    assert (compare_on_task(before, after, rows).loss < 0) == lower_is_better(metric)
