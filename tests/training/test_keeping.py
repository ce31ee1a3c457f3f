"""The best validation point ships, and a stage stops when it has learned enough."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_helpers import WEIGHTS, journal, stopped_at
from torch import nn
from training_helpers import (
    action_rows,
    intent_rows,
    recipe,
    resolved,
    sft_recipe,
    silent,
    write_rows,
)

from edgetune.core.files import sha256_file
from edgetune.core.progress import Progress
from edgetune.core.tasks import best_by
from edgetune.recipe.schema import Recipe
from edgetune.training import RunSummary, run_recipe
from edgetune.training.context import ResolvedStage
from edgetune.training.keeping import Keeping, said_of, steps_between_validations
from edgetune.training.parallel.distributed import Group


def overfitting(base: Path, folder: Path, method: str, **stage: Any) -> Recipe:
    """Five validations of 10 steps, the best of which is not the last: what the rows to measure
    ask for is unlearned.
    """
    rows, answer = (
        (action_rows(), {"completion": "the lazy dog"})
        if method == "sft"
        else (intent_rows(), {"label": "music"})
    )
    train = write_rows(folder / "train.jsonl", rows)
    held_out = write_rows(folder / "dev.jsonl", [{**row, **answer} for row in rows[:6]])
    made = recipe(base, method, train, held_out, max_steps=10, epochs=9, validate_every=2, **stage)
    return replace(made, checkpoint_every=2)


@pytest.fixture(scope="module")
def kept(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of `overfitting`: recipe, folder, summary, what it said."""
    folder, said = tmp_path_factory.mktemp("kept"), io.StringIO()
    made = overfitting(tiny_decoder, folder, "sft", parameters={"rank": 2, "dropout": 0.2})
    summary = run_recipe(made, out=folder / "run", progress=Progress(said))
    return made, folder / "run", summary, said.getvalue()


def validations(run: Path, metric: str) -> dict[int, float]:
    return {r["step"]: r[metric] for r in journal(run) if r["kind"] == "validation"}


def facts(summary: RunSummary) -> dict[str, Any]:
    kept: dict[str, Any] = summary.stages[0]["kept"]
    return kept


def test_the_weights_of_the_best_validation_ship(kept: Any, tmp_path: Path) -> None:
    made, run, summary, said = kept
    losses = validations(run, "loss")
    best = min(losses, key=lambda step: losses[step])
    assert best < max(losses) == 10 and len(losses) == 5
    assert facts(summary) == {
        "step": best,
        "metric": "loss",
        "best_step": best,
        "best": pytest.approx(losses[best]),
        "last_step": 10,
        "last": pytest.approx(losses[10]),
    }
    assert summary.metrics["loss"] == losses[best]
    assert f"kept step {best}, loss {losses[best]:.4f} (the last, step 10: " in said
    last = replace(made, stage=(replace(made.stage[0], keep="last"),))
    again = run_recipe(last, out=tmp_path / "last", progress=silent())
    assert facts(again)["step"] == 10 and again.metrics["loss"] == losses[10]
    assert validations(tmp_path / "last", "loss") == losses


@pytest.mark.parametrize("kind", ["head", "full"])
def test_what_is_kept_measures_as_it_was_told(
    kind: str, tiny_decoder: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    made = (
        overfitting(tiny_decoder, tmp_path, "sft", parameters={"train": "full"})
        if kind == "full"
        else overfitting(
            tiny_encoder, tmp_path, "sequence-classification", parameters={"train": "head"}
        )
    )
    summary = run_recipe(made, out=tmp_path / "run", progress=silent())
    told, losses = facts(summary), validations(tmp_path / "run", "loss")
    assert told["step"] < 10 and summary.metrics["loss"] == losses[told["step"]] < losses[10]
    if kind == "head":
        assert told["metric"] == "accuracy"
    else:
        after = replace(made.stage[0], learning_rate=1e-6, max_steps=1)
        after = replace(made, base=str(tmp_path / "run"), stage=(after,))
        again = run_recipe(after, out=tmp_path / "again", progress=silent())
        assert again.metrics["loss"] == pytest.approx(summary.metrics["loss"], abs=2e-3)


@pytest.mark.parametrize("step", [5, 8, 10])
def test_stopped_and_resumed_it_keeps_the_same_weights(
    step: int, kept: Any, tmp_path: Path
) -> None:
    made, run, whole, _ = kept
    stopped_at(step, made, tmp_path / "run")
    resumed = run_recipe(made, out=tmp_path / "run", progress=silent(), resume=True)
    assert facts(resumed) == facts(whole) and resumed.metrics == whole.metrics
    assert sha256_file(tmp_path / "run" / WEIGHTS) == sha256_file(run / WEIGHTS)
    assert journal(tmp_path / "run") == journal(run)


def test_the_next_stage_goes_on_from_what_the_first_one_kept(kept: Any, tmp_path: Path) -> None:
    made, _, whole, _ = kept
    after = replace(made.stage[0], learning_rate=1e-12, max_steps=1)
    both = replace(made, stage=(*made.stage, after))
    summary = run_recipe(both, out=tmp_path / "two", progress=silent())
    assert summary.stages[0]["kept"] == facts(whole)
    assert summary.metrics["loss"] == pytest.approx(facts(whole)["best"], abs=1e-5)


def test_patience_ends_a_stage_and_the_summary_says_so(kept: Any, tmp_path: Path) -> None:
    made = replace(kept[0], stage=(replace(kept[0].stage[0], patience=2),))
    said, best = io.StringIO(), facts(kept[2])["step"]
    summary = run_recipe(made, out=tmp_path / "run", progress=Progress(said))
    stage = summary.stages[0]
    assert stage["steps"] == best + 4 < stage["planned_steps"] == 10
    assert stage["kept"]["step"] == best and math.isfinite(summary.train_loss)
    assert f"stopped after step {best + 4} of 10: no validation since step {best} was" in (
        said.getvalue()
    )
    assert sha256_file(tmp_path / "run" / WEIGHTS) == sha256_file(kept[1] / WEIGHTS)


def test_without_validation_rows_the_last_step_is_kept(tiny_decoder: Path, tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", action_rows())
    made = recipe(tiny_decoder, "sft", train, None, patience=1)
    summary = run_recipe(made, out=tmp_path / "run", progress=silent())
    assert summary.stages[0]["kept"] is None and summary.stages[0]["steps"] == 6


def stage_of(base: Path, folder: Path, **changes: Any) -> ResolvedStage:
    return replace(resolved(sft_recipe(base, folder)).stages[0], **changes)


def test_the_best_is_by_the_metric_then_by_the_loss_then_the_earlier(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    model, stage = nn.Linear(1, 1), stage_of(tiny_decoder, tmp_path, learned="dpo")
    keeping = Keeping(stage, Group())
    seen = [(0.5, 0.9), (0.7, 0.9), (0.7, 0.8), (0.7, 0.8), (0.6, 0.1), (0.7, float("nan"))]
    for step, (accuracy, loss) in enumerate(seen, start=1):
        with torch.no_grad():
            model.weight.fill_(step)
        keeping.see(step, {"preference_accuracy": accuracy, "loss": loss}, model)
    kept = keeping.settle(model)
    assert kept is not None and (kept["step"], kept["best"], kept["last"]) == (3, 0.7, 0.7)
    assert model.weight.item() == 3.0
    assert said_of(kept, planned=6, steps=6) == [
        "kept step 3, preference_accuracy 0.7000 as at the last, step 6, with less loss"
    ]


def test_a_checkpoints_state_is_all_that_it_needs(tiny_decoder: Path, tmp_path: Path) -> None:
    model, stage = nn.Linear(1, 1), stage_of(tiny_decoder, tmp_path, patience=2)
    keeping = Keeping(stage, Group())
    for step, loss in enumerate((1.0, 2.0), start=1):
        keeping.see(step, {"loss": loss}, model)
    again = Keeping(stage, Group(), keeping.state)
    assert not again.spent
    again.see(3, {"loss": 3.0}, model)
    assert again.spent and not keeping.spent


def test_each_method_is_judged_by_its_own_metric() -> None:
    classes = ("loss", "accuracy", "macro_f1")
    assert best_by("sequence-classification", classes) == "accuracy"
    assert best_by("sequence-classification", classes, weighted=True) == "macro_f1"
    tags = ("loss", "entity_f1", "macro_entity_f1", "token_accuracy")
    assert best_by("token-classification", tags) == "entity_f1"
    assert best_by("token-classification", tags[::3]) == "token_accuracy"
    assert best_by("multi-label", ("loss", "micro_f1", "macro_f1")) == "micro_f1"
    assert best_by("grpo", ("reward", "completion_length")) == "reward"
    assert best_by("sft", ("loss", "perplexity", "token_accuracy")) == "loss"
    assert best_by("regression", ("loss", "pearson", "spearman")) == "loss"


def test_a_short_stage_is_measured_a_few_times_where_that_costs_little() -> None:
    def between(total: int, per_epoch: int, measured: float) -> int:
        return steps_between_validations(
            total, per_epoch, measured=measured, learned_in_a_step=100.0
        )

    assert between(100, 100, 1000.0) == 20
    assert between(100, 100, 3000.0) == 50  # a fifth of 100 · 100 · 3 is two validations
    assert between(100, 100, 30_000.0) == 100  # once per epoch, whatever it costs
    assert between(1000, 100, 1.0) == 100
    assert between(10, 100, 1.0) == 2  # a tenth of an epoch
    assert between(3, 1, 0.0) == 1
