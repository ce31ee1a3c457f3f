"""What a run says at its end of figures that do not show by themselves what they are worth."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from training_helpers import TEXTS, packed_recipe, sft_recipe, write_rows

from edgetune.core.progress import Progress
from edgetune.recipe.schema import Recipe
from edgetune.report.run_page import write_report
from edgetune.training import run_recipe
from edgetune.training.summary import warnings_of

MEASURED = "validation rows stand in train too: what is measured on them says nothing of other rows"


def ended(recipe: Recipe, out: Path, stream: io.StringIO | None = None) -> tuple[list[str], str]:
    """The warnings in summary.json, and what the run says last; all of it in `stream`."""
    stream = stream or io.StringIO()
    summary = run_recipe(recipe, out=out, progress=Progress(stream), write_more=write_report)
    saved = json.loads((out / "summary.json").read_text())
    assert saved["warnings"] == summary.warnings
    page = (out / "report.html").read_text()
    assert all(escape(line) in page for line in summary.warnings)
    return summary.warnings, stream.getvalue().rpartition("tokens/s")[0][-900:]


def test_validation_rows_that_were_learned_are_said_at_the_end(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    stream = io.StringIO()
    recipe = sft_recipe(tiny_decoder, tmp_path)
    warnings, said = ended(recipe, tmp_path / "run", stream)
    assert warnings == [f"stage 0 (sft): all 4 {MEASURED}"] and warnings[0] in said
    assert f"\nwarning: all 4 {MEASURED}\n" in stream.getvalue().partition("step 1/")[0]
    data = json.loads((tmp_path / "run" / "summary.json").read_text())["data"]
    (found,) = data[0]["findings"]
    assert (found["kind"], found["rows"], found["of"]) == ("validation-in-train", 4, 4)
    assert found["lines"] == [1, 2, 3, 4] and data[0]["held_out"] == 0


def test_documents_of_packed_text_are_compared_one_by_one(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    recipe = packed_recipe(tiny_decoder, tmp_path, epochs=1)
    nearly = "4 of 4 validation rows are known, but for case, spaces, digits and punctuation"
    assert ended(recipe, tmp_path / "run")[0] == [f"stage 0 (causal-lm): {nearly}"]
    known = [{"text": f"{TEXTS[0]} 0"}, {"text": "something else"}]
    held_out = write_rows(tmp_path / "known.jsonl", known)
    stage = recipe.stage[0]
    stage = replace(stage, data=replace(stage.data, validation=str(held_out)))
    warnings, _ = ended(replace(recipe, stage=(stage,)), tmp_path / "again")
    assert warnings == [f"stage 0 (causal-lm): 1 of 2 {MEASURED}"]


def test_a_loss_that_ended_higher_than_it_began_is_said_at_the_end(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    wild = packed_recipe(tiny_decoder, tmp_path, learning_rate=3.0, epochs=3, warmup_ratio=0.0)
    (warning, _), said = ended(wild, tmp_path / "run")
    assert warning.startswith("the loss of stage 0 (causal-lm) ended higher than it began: ")
    assert warning in said


def test_single_steps_that_differ_by_their_rows_are_no_rising_loss() -> None:
    stage = SimpleNamespace(index=0, method="sft", examples=SimpleNamespace(findings=[]))
    falling = [2.0, 3.0, *[2.5 - 0.05 * step for step in range(17)], 2.2]
    records = [{"kind": "train", "stage": 0, "loss": loss} for loss in falling]
    assert falling[-1] > falling[0]
    run: Any = SimpleNamespace(stages=[stage])
    assert warnings_of(run, records) == []
    assert (
        warnings_of(run, [{**one, "loss": 1 + 0.001 * one["loss"]} for one in records[::-1]]) == []
    )
    (rising,) = warnings_of(run, records[::-1])
    assert "1.8833 to 2.5000, the means of its first and its last 3 steps" in rising
