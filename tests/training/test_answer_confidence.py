"""An adapter that writes text learns from its held-out rows how sure it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from training_helpers import action_rows, recipe, sft_recipe, silent, write_rows

from edgetune.core.errors import RecipeError
from edgetune.evaluation.torch_answers import TorchAnswers
from edgetune.recipe.confidence import ConfidenceSettings
from edgetune.recipe.read import recipe_from_dict
from edgetune.recipe.schema import Generation
from edgetune.training import run_recipe


def test_answers_of_a_form_are_calibrated_on_the_held_out_rows(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    train = write_rows(tmp_path / "train.jsonl", action_rows())
    dev = write_rows(tmp_path / "dev.jsonl", action_rows() * 3)
    made = recipe(tiny_decoder, "sft", train, dev, epochs=12)
    made = replace(made, generation=Generation(schema="auto"))
    summary = run_recipe(made, out=tmp_path / "run", progress=silent())
    metadata = json.loads((tmp_path / "run" / "adapter" / "edgetune_adapter.json").read_text())
    assert set(metadata["confidence"]) == {"kind", "slope", "intercept", "rows", "fitted_on"}
    assert metadata["confidence"]["rows"] == 36 and metadata["confidence"]["slope"] >= 0
    assert summary.confidence is not None
    assert summary.confidence["expected_calibration_error"] <= 0.2
    answers = TorchAnswers.open(tmp_path / "run")
    assert len(answers.generate([row["prompt"] for row in action_rows()][:2])) == 2


def test_free_text_is_calibrated_only_where_a_recipe_asks_for_it(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    made = sft_recipe(tiny_decoder, tmp_path, epochs=1)
    assert run_recipe(made, out=tmp_path / "run", progress=silent()).confidence is None
    asked = replace(made, confidence=ConfidenceSettings())
    summary = run_recipe(asked, out=tmp_path / "asked", progress=silent())
    assert summary.confidence is None, "four rows are too few"
    first, second = (
        tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("run", "asked")
    )
    assert first.read_bytes() == second.read_bytes()


def test_a_threshold_has_no_meaning_for_text(tmp_path: Path) -> None:
    stage = [{"method": "sft", "data": {"train": "rows.jsonl"}}]
    with pytest.raises(RecipeError, match=r"\[confidence\] has no meaning for sft"):
        recipe_from_dict(
            {"base": "b", "stage": stage, "confidence": {"target": 0.9}}, folder=tmp_path
        )
