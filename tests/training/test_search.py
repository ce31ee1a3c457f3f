"""A search tries settings, goes on after a kill, and its best trial trains the run."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from training_helpers import sft_recipe, silent

from edgetune.cli import main
from edgetune.cli.train import seconds_of
from edgetune.core.errors import RecipeError
from edgetune.core.progress import Progress
from edgetune.recipe.read import recipe_to_toml
from edgetune.recipe.schema import Data, Recipe
from edgetune.report.run_page import write_report
from edgetune.training import run_recipe, trial_watch
from edgetune.training.search import find_settings
from edgetune.training.trial_watch import TrialProgress

RATE, RANK, ALPHA = "stage.0.learning_rate", "parameters.rank", "parameters.alpha"
LONG = 3600.0


def open_recipe(base: Path, folder: Path, **stage: Any) -> Recipe:
    return sft_recipe(base, folder, **{"learning_rate": "auto", "max_steps": 4, **stage})


def trials(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["kind"] == "trial"]


@pytest.fixture(scope="module")
def searched(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A recipe, its run after five trials, what the search found and said."""
    folder, said = tmp_path_factory.mktemp("searched"), io.StringIO()
    made, out = open_recipe(tiny_decoder, folder), folder / "run"
    found = find_settings(made, seconds=LONG, most=5, out=out, progress=Progress(said))
    summary = run_recipe(
        found.recipe,
        out=out,
        progress=silent(),
        write_more=lambda partial, result: write_report(partial, result, trials=found.trials),
        searched=found.facts,
    )
    return made, out, found, summary, said.getvalue()


def test_the_best_trials_numbers_train_the_run(searched: Any) -> None:
    _, out, found, summary, said = searched
    tried = trials(out / "search.jsonl")
    whole = [trial for trial in tried if trial["state"] == "complete"]
    best = min(whole, key=lambda trial: trial["value"])
    assert len(tried) == 5 and found.facts["settings"] == best["settings"]
    assert tried[0]["settings"] == {RATE: 5e-4, RANK: 8, ALPHA: 16.0}  # the rule's
    assert all(trial["settings"][ALPHA] == 2 * trial["settings"][RANK] for trial in tried)
    assert len({trial["settings"][RATE] for trial in tried}) == 5
    assert found.recipe.stage[0].learning_rate == best["settings"][RATE]
    assert found.recipe.stage[0].epochs == 2.0  # a number in the recipe is not searched
    assert summary.search == found.facts and found.facts["metric"] == "loss"
    assert summary.metrics["loss"] == pytest.approx(best["value"], rel=1e-6)
    assert "search: 5 trials in " in said and f"(loss {best['value']:.4f})" in said


def test_the_run_is_measured_where_its_trial_was(searched: Any) -> None:
    _, out, found, *_ = searched
    curve = next(
        t["curve"] for t in trials(out / "search.jsonl") if t["settings"] == found.facts["settings"]
    )
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seen = {r["step"]: r["loss"] for r in records if r["kind"] == "validation"}
    assert seen == pytest.approx(dict(curve), rel=1e-6) and len(seen) == 4


def test_the_page_draws_the_trials(searched: Any) -> None:
    page = (searched[1] / "report.html").read_text()
    assert "<h2>Search</h2>" in page and ">chosen</span>" in page
    assert all(f"<td>{number}" in page for number in range(5)) and ", chosen</td>" in page


def test_a_killed_search_goes_on_with_the_proposals_it_would_have_had(
    searched: Any, tmp_path: Path
) -> None:
    made, out, *_ = searched
    lines = (out / "search.jsonl").read_text().splitlines()
    half = tmp_path / "run" / "checkpoints" / "search.jsonl"
    half.parent.mkdir(parents=True)
    half.write_text("\n".join([*lines[:4], lines[4][:20]]))
    found = find_settings(
        made, seconds=LONG, most=5, out=tmp_path / "run", resume=True, progress=silent()
    )
    again, before = trials(half), trials(out / "search.jsonl")
    assert [t["settings"] for t in again] == [t["settings"] for t in before]
    assert [t["curve"] for t in again] == [t["curve"] for t in before]
    assert again[:3] == before[:3] and found.facts["settings"] == searched[2].facts["settings"]


def test_a_finished_search_is_not_made_again_and_another_recipes_is_refused(searched: Any) -> None:
    made, out, found, *_ = searched
    again = find_settings(made, seconds=LONG, out=out, resume=True, progress=silent())
    assert again.recipe == found.recipe and len(trials(out / "search.jsonl")) == 5
    with pytest.raises(RecipeError, match=r"--resume needs the recipe .*seed = 0"):
        find_settings(replace(made, seed=1), seconds=LONG, out=out, resume=True, progress=silent())


def test_it_stops_within_a_trial_when_the_time_is_over(tiny_decoder: Path, tmp_path: Path) -> None:
    made = open_recipe(tiny_decoder, tmp_path, max_steps=None, epochs=100_000)
    found = find_settings(made, seconds=0.01, out=tmp_path / "run", progress=silent())
    assert [t["state"] for t in trials(found.trials)] == ["out of time"]
    assert found.facts["settings"] == {RATE: 5e-4, RANK: 8, ALPHA: 16.0}


def test_a_trial_ends_before_a_step_or_a_validation_that_would_pass_the_deadline(
    tiny_decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of 1 s, validations of 10 s, by a clock of the test's own: a second trial has no 12 s
    to come to its first validation.
    """
    clock = [0.0]
    monkeypatch.setattr(trial_watch.time, "monotonic", lambda: clock[0])
    original, validated = TrialProgress.step, TrialProgress.validated

    def step(self: Any, *given: Any, **facts: Any) -> None:
        clock[0] += 1.0
        original(self, *given, **facts)

    def validation(self: Any) -> None:
        clock[0] += 10.0
        validated(self)

    monkeypatch.setattr(TrialProgress, "step", step)
    monkeypatch.setattr(TrialProgress, "validated", validation)
    made = open_recipe(tiny_decoder, tmp_path, epochs=99, max_steps=16)
    # 16 steps, a validation after every second: 8 · (2 + 10) s
    found = find_settings(made, seconds=100.0, out=tmp_path / "whole", progress=silent())
    (whole,) = trials(found.trials)
    assert (whole["state"], clock[0]) == ("complete", 96.0)
    clock[0] = 0.0
    found = find_settings(made, seconds=45.0, out=tmp_path / "cut", progress=silent())
    (cut,) = trials(found.trials)
    assert (cut["state"], len(cut["curve"]), clock[0]) == ("out of time", 3, 38.0)


def test_a_trial_that_cannot_go_on_is_no_end(tiny_decoder: Path, tmp_path: Path) -> None:
    made = open_recipe(tiny_decoder, tmp_path, learning_rate=1e30, max_grad_norm=1e30)
    made = replace(made, stage=(replace(made.stage[0], warmup_ratio=0.0),))
    found = find_settings(made, seconds=LONG, most=2, out=tmp_path / "run", progress=silent())
    assert all(t["state"].startswith("failed: the ") for t in trials(found.trials))
    assert found.facts["best"] is None


def test_what_cannot_be_searched_is_one_line(
    tiny_decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(made: Recipe) -> str:
        with pytest.raises(RecipeError) as error:
            find_settings(made, seconds=LONG, out=tmp_path / "run", progress=silent())
        assert not (tmp_path / "run").exists()
        return str(error.value)

    given = open_recipe(tiny_decoder, tmp_path, learning_rate=1e-3, parameters={"rank": 2})
    assert "the recipe gives every number" in refused(given)
    made = open_recipe(tiny_decoder, tmp_path)
    bare = Data(train=made.stage[0].data.train)
    line = refused(replace(made, stage=(replace(made.stage[0], data=bare),)))
    assert "stage.0.data: a search needs validation rows" in line
    assert [seconds_of(text) for text in ("10m", "90s", "1.5h", "45")] == [600, 90, 5400, 45]
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_to_toml(made))
    for text in ("soon", "0m", "-3s", "nan"):
        with pytest.raises(SystemExit) as done:
            main(["train", str(path), f"--search={text}"])
        assert done.value.code == 2 and "is no time, such as 10m" in capsys.readouterr().err
