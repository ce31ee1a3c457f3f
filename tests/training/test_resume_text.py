"""Stages on raw text, replay and PiSSA resume bit for bit too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from training_helpers import (
    intent_recipe,
    masked_recipe,
    packed_recipe,
    replayed,
    silent,
    write_rows,
)

from edgetune.core.errors import DataError
from edgetune.core.files import sha256_file
from edgetune.recipe.schema import Recipe
from edgetune.training import run_recipe

WEIGHTS = "adapter/adapter_model.safetensors"


def recipe_of(kind: str, decoder: Path, encoder: Path, folder: Path) -> Recipe:
    """Six steps of text, then six of a task; a checkpoint at every second step."""
    parameters: dict[str, Any] = {"rank": 2, "dropout": 0.2}
    if kind == "masked-lm, then labels":
        task = intent_recipe(encoder, folder, parameters=parameters)
        text = masked_recipe(encoder, folder).stage
    else:
        task = replayed(decoder, folder, share=0.3, parameters={**parameters, "init": "pissa"})
        text = packed_recipe(decoder, folder, batch_size=1).stage
    return replace(task, stage=(*text, *task.stage), checkpoint_every=2)


@pytest.mark.parametrize(
    "kind", ["masked-lm, then labels", "causal-lm, then sft with replay and pissa"]
)
@pytest.mark.parametrize("stop", [3, 7, 11], ids=lambda step: f"stopped at step {step}")
def test_a_stopped_run_resumes_to_the_same_adapter(
    kind: str,
    stop: int,
    tiny_decoder: Path,
    tiny_encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = recipe_of(kind, tiny_decoder, tiny_encoder, tmp_path)
    run_recipe(recipe, out=tmp_path / "whole", progress=silent())
    progress, done = silent(), 0

    def interrupt(*args: Any, **kwargs: Any) -> None:
        nonlocal done
        done += 1
        if done == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(progress, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, out=tmp_path / "run", progress=progress)
    run_recipe(recipe, out=tmp_path / "run", progress=silent(), resume=True)
    assert sha256_file(tmp_path / "run" / WEIGHTS) == sha256_file(tmp_path / "whole" / WEIGHTS)


def test_other_general_text_is_other_data(
    tiny_decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(replayed(tiny_decoder, tmp_path, share=0.3), checkpoint_every=1)
    progress = silent()

    def interrupt(step: int, *args: Any, **kwargs: Any) -> None:
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(progress, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, out=tmp_path / "run", progress=progress)
    write_rows(tmp_path / "general.jsonl", [{"text": f"another text {n}"} for n in range(40)])
    with pytest.raises(DataError, match=r"stage\.0\.data\.replay"):
        run_recipe(recipe, out=tmp_path / "run", progress=silent(), resume=True)
