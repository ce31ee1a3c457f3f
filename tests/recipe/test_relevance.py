"""Settings that mean nothing to a run are left out of its page."""

from __future__ import annotations

from typing import Any

from edgetune.recipe.read import recipe_from_dict
from edgetune.recipe.relevance import relevant


def keys(method: str, data: dict[str, Any], parameters: dict[str, Any], **stage: Any) -> set[str]:
    made = recipe_from_dict(
        {
            "base": "builtin:minilm-l6",
            "parameters": parameters,
            "stage": [{"method": method, "data": {"train": "rows.jsonl", **data}, **stage}],
        }
    )
    return {key.removeprefix("stage.0.") for key, _ in relevant(made)}


def test_a_decoders_stage_shows_no_labels_and_no_columns_of_others() -> None:
    found = keys("sft", {"validation": "dev.jsonl"}, {})
    assert {"learning_rate", "keep", "data.template", "parameters.rank", "seed"} <= found
    assert not found & {"class_weights", "label_smoothing", "head_init", "problem"}
    assert not found & {"data.label_names", "data.normalise_labels", "parameters.shard"}
    assert not {key for key in found if key.startswith(("grpo", "dpo"))}


def test_without_validation_rows_nothing_of_validation_is_shown() -> None:
    found = keys("sequence-classification", {}, {}, validate_every=3, class_weights="balanced")
    assert not found & {"keep", "patience", "validate_every"}
    assert {"problem", "class_weights", "head_init", "data.control_tokens"} <= found
    assert not found & {"label_smoothing", "data.label_names", "parameters.dora"}  # off


def test_where_no_adapter_learns_its_settings_are_left_out() -> None:
    found = keys("sequence-classification", {}, {"train": "head"})
    assert {key for key in found if key.startswith("parameters.")} == {"parameters.train"}
