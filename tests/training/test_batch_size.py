"""`batch_size = "auto"`: measured once, written down, and the same after a stop."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import tomllib
import torch
from resume_helpers import stopped_at
from training_helpers import intent_recipe, replayed, silent, write_rows

from edgetune.core.errors import RecipeError
from edgetune.core.progress import Progress
from edgetune.training import run_recipe
from edgetune.training.batch_size import MOST, largest, sizes
from edgetune.training.search import find_settings


def test_it_grows_while_a_row_becomes_cheaper() -> None:
    def flat_from(size: int, rows: int) -> float:
        return 1.0 + max(rows, size) / 16  # a pass costs something, and from `size` on every row

    assert largest(lambda n: 1.0, iter([4, 8, 16]), memory=lambda: 0.0) == 16
    assert largest(lambda n: float(n), iter([4, 8, 16]), memory=lambda: 0.0) == 4
    assert largest(lambda n: flat_from(32, n), iter([4, 8, 16, 32, 64]), memory=lambda: 0.0) == 64


def test_it_stops_before_the_memory_does() -> None:
    shares = iter([0.1, 0.2, 0.2, 0.4, 0.4, 0.6])
    assert largest(lambda n: 1.0, iter([4, 8, 16, 32]), memory=lambda: next(shares)) == 16

    def seconds(rows: int) -> float:
        if rows > 8:
            raise torch.OutOfMemoryError
        return 1.0

    assert largest(seconds, iter([4, 8, 16, 32]), memory=lambda: 0.0) == 8


def test_an_epoch_keeps_its_steps() -> None:
    assert list(sizes(12)) == [4]
    assert list(sizes(400)) == [4, 8, 16]
    assert list(sizes(1_000_000))[-1] == MOST


def test_a_run_writes_the_number_down_and_a_resumed_one_has_it(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    made = replace(intent_recipe(tiny_encoder, tmp_path, batch_size="auto"), checkpoint_every=2)
    rows = [{"text": f"message {i}", "label": "ab"[i % 2]} for i in range(200)]
    write_rows(tmp_path / "intents.jsonl", rows)
    write_rows(tmp_path / "intents-dev.jsonl", rows[:4])
    stopped_at(3, made, tmp_path / "run")
    (path,) = (tmp_path / "run" / "checkpoints").glob("*.pt")
    content = torch.load(path, weights_only=True)
    content["batch_sizes"] = [16]  # as if this machine had been another one then
    torch.save(content, path)
    said = io.StringIO()
    summary = run_recipe(made, out=tmp_path / "run", progress=Progress(said), resume=True)
    written = tomllib.loads((tmp_path / "run" / "recipe.toml").read_text())
    assert written["stage"][0]["batch_size"] == summary.chosen["stage.0.batch_size"] == 16
    assert summary.stages[0]["steps"] == 26 and "batch_size" not in said.getvalue()
    again = run_recipe(made, out=tmp_path / "run", progress=silent(), resume=True)
    assert again.chosen == summary.chosen


def test_where_a_step_is_more_than_a_pass_it_is_one_line(
    tiny_decoder: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    made = replayed(tiny_decoder, tmp_path, share=0.2, batch_size="auto")
    with pytest.raises(RecipeError, match=r'stage\.0\.batch_size = "auto" has no meaning with rep'):
        run_recipe(made, out=tmp_path / "run", progress=silent())
    open_rate = intent_recipe(tiny_encoder, tmp_path, batch_size="auto", learning_rate="auto")
    with pytest.raises(RecipeError, match="a search needs batch_size as a number"):
        find_settings(open_rate, seconds=1.0, out=tmp_path / "run", progress=silent())
