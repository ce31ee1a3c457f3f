"""One row a method, and what each row needs elsewhere."""

from __future__ import annotations

from typing import get_args

from edgetune.adapters.folder import PEFT_TASKS
from edgetune.core.tasks import (
    DECODER_TASKS,
    ENCODER_TASKS,
    METHODS,
    PROBLEMS,
    MethodName,
    Task,
)
from edgetune.data.loaders import LOADERS
from edgetune.recipe.schema import Data, Stage
from edgetune.training.methods import TRAINING


def test_every_method_has_a_row_and_every_task_a_method() -> None:
    assert set(METHODS) == set(get_args(MethodName))
    assert {method.task for method in METHODS.values()} == set(get_args(Task)) == set(PEFT_TASKS)


def test_every_method_and_problem_has_a_loader_and_an_objective() -> None:
    named = {*METHODS, *PROBLEMS} - {"single-label"}
    assert set(LOADERS) == set(TRAINING) == named


def test_rows_name_keys_of_a_stage_and_of_its_data() -> None:
    for method in METHODS.values():
        assert set(method.columns) <= set(Data.__dataclass_fields__)
        assert set(method.settings) <= set(Stage.__dataclass_fields__)


def test_what_bundles_answer_is_told_by_the_rows() -> None:
    assert DECODER_TASKS == ("text-generation", "reward", "sequence-classification")
    assert ENCODER_TASKS == ("sequence-classification", "token-classification")
