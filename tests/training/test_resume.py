"""A run that is killed and resumed ends with the same adapter, bit for bit, as one that never
was.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from preference_helpers import pair_recipe
from process_helpers import KILLED, STARTS, SWAPS, WRITES, in_process, train_until_killed
from resume_helpers import WEIGHTS, journal, stopped_at
from training_helpers import intent_recipe, sft_recipe, silent, write_rows

from edgetune.cli import main
from edgetune.core.errors import DataError, OutputError, RecipeError, TrainingError
from edgetune.core.files import clear_interrupted, output_errors, sha256_file
from edgetune.core.progress import Progress
from edgetune.models.torch_device import CPU_DEVICE, rng_state, set_rng_state
from edgetune.recipe.read import recipe_to_toml
from edgetune.recipe.schema import Recipe
from edgetune.training import checkpoint, run_recipe
from edgetune.training.resolve import steps_between

OWN_TABLES = ("stage.0.dpo", "stage.0.grpo")


def two_stages(one: Recipe) -> Recipe:
    """Six steps and then three, a checkpoint at every second step."""
    stages = (*one.stage, replace(one.stage[0], epochs=1.0, learning_rate=3e-3))
    return replace(one, stage=stages, checkpoint_every=2)


@dataclass(frozen=True)
class Whole:
    """A recipe, and its run that nobody killed."""

    recipe: Recipe
    run: Path

    @property
    def digest(self) -> str:
        return sha256_file(self.run / WEIGHTS)


@pytest.fixture(scope="module")
def generation(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("generation")
    recipe = two_stages(sft_recipe(tiny_decoder, folder, parameters={"rank": 2, "dropout": 0.2}))
    run_recipe(recipe, out=folder / "run", progress=silent())
    return Whole(recipe, folder / "run")


@pytest.fixture(scope="module")
def classification(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("classification")
    recipe = two_stages(intent_recipe(tiny_encoder, folder, parameters={"rank": 2, "dropout": 0.2}))
    run_recipe(recipe, out=folder / "run", progress=silent())
    return Whole(recipe, folder / "run")


@pytest.mark.parametrize("task", ["generation", "classification"])
def test_killed_at_random_steps_and_resumed_it_ends_with_the_same_adapter(
    task: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    whole, out = request.getfixturevalue(task), tmp_path / "out" / "run"
    steps = random.Random(task).sample(
        range(1, 5), 2
    )  # of each life; the second begins at the newest checkpoint
    for life, step in enumerate(steps):
        assert in_process(train_until_killed, whole.recipe, out, STARTS, step, bool(life)) == KILLED
        assert not (out / "adapter").exists() and not (out / "summary.json").exists()
    run_recipe(whole.recipe, out=out, progress=silent(), resume=True)
    assert sha256_file(out / WEIGHTS) == whole.digest
    assert journal(out) == journal(whole.run)
    assert [path.name for path in out.parent.iterdir()] == ["run"] and not (
        out / "checkpoints"
    ).exists()


@pytest.mark.parametrize(
    ("task", "moment", "count"),
    [
        ("generation", WRITES, 1),
        ("generation", WRITES, 4),  # between the stages
        ("generation", SWAPS, 1),
        ("classification", WRITES, 3),
        ("classification", SWAPS, 1),
    ],
)
def test_killed_while_it_writes_it_ends_with_the_same_adapter(
    task: str, moment: str, count: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    whole, out = request.getfixturevalue(task), tmp_path / "out" / "run"
    assert in_process(train_until_killed, whole.recipe, out, moment, count, False) == KILLED
    run_recipe(whole.recipe, out=out, progress=silent(), resume=True)
    assert sha256_file(out / WEIGHTS) == whole.digest
    assert [path.name for path in out.parent.iterdir()] == ["run"]


@pytest.mark.parametrize("step", [1, 3, 6, 7, 9])
def test_stopped_at_any_step_of_either_stage_it_goes_on_bit_for_bit(
    step: int, generation: Whole, tmp_path: Path
) -> None:
    said = stopped_at(step, generation.recipe, tmp_path / "run")
    assert ("train --resume continues from it" in said) == (step > 2)
    torch.manual_seed(step)  # what was drawn in between does not matter
    summary = run_recipe(generation.recipe, out=tmp_path / "run", progress=silent(), resume=True)
    assert sha256_file(tmp_path / "run" / WEIGHTS) == generation.digest
    before = json.loads((generation.run / "summary.json").read_text())["stages"]
    assert [(s["steps"], s["tokens"]) for s in summary.stages] == [
        (s["steps"], s["tokens"]) for s in before
    ]


def test_at_most_n_checkpoints_are_kept_and_the_older_run_stays_whole(
    generation: Whole, tmp_path: Path
) -> None:
    shutil.copytree(generation.run, tmp_path / "run")
    stopped_at(
        6,
        replace(generation.recipe, seed=1, checkpoint_every=1, keep_checkpoints=3),
        tmp_path / "run",
    )
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} - {"tensorboard"}
    assert names == {"metrics.jsonl", *(f"stage-0-step-0000000{step}.pt" for step in (3, 4, 5))}
    assert sha256_file(tmp_path / "run" / WEIGHTS) == generation.digest


def test_a_new_run_beside_an_unfinished_one_says_so_and_replaces_its_checkpoints(
    generation: Whole, tmp_path: Path
) -> None:
    stopped_at(8, generation.recipe, tmp_path / "run")
    said = stopped_at(
        2, replace(generation.recipe, seed=1), tmp_path / "run"
    )  # before its first checkpoint
    assert (
        "checkpoints of an unfinished run" in said and "--resume would continue the old one" in said
    )
    stopped_at(3, replace(generation.recipe, seed=1), tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob("*.pt")] == [
        "stage-0-step-00000002.pt"
    ]


def test_with_nothing_to_resume_it_says_so_and_begins(generation: Whole, tmp_path: Path) -> None:
    said = io.StringIO()
    run_recipe(generation.recipe, out=tmp_path / "run", progress=Progress(said), resume=True)
    assert "nothing to resume: no checkpoint in " in said.getvalue()
    assert sha256_file(tmp_path / "run" / WEIGHTS) == generation.digest


def test_a_finished_run_is_not_trained_again(generation: Whole) -> None:
    before, said = (generation.run / WEIGHTS).stat().st_mtime_ns, io.StringIO()
    stages = tuple(
        replace(stage, precision="auto") for stage in generation.recipe.stage
    )  # it chose then
    open_recipe = replace(generation.recipe, threads=None, stage=stages)
    summary = run_recipe(open_recipe, out=generation.run, progress=Progress(said), resume=True)
    assert (
        f"nothing to resume: {generation.run} is finished\n" in said.getvalue() and summary.metrics
    )
    assert "begins" not in said.getvalue()
    assert (generation.run / WEIGHTS).stat().st_mtime_ns == before
    with pytest.raises(RecipeError, match=r"seed = 0\b.*seed = 1\b"):
        run_recipe(
            replace(generation.recipe, seed=1), out=generation.run, progress=silent(), resume=True
        )


def test_another_recipe_or_other_data_is_refused_by_name(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    recipe = two_stages(sft_recipe(tiny_decoder, tmp_path))
    stopped_at(8, recipe, tmp_path / "run")
    faster = replace(recipe, stage=(recipe.stage[0], replace(recipe.stage[1], learning_rate=0.5)))
    with pytest.raises(
        RecipeError,
        match=r"\(expected stage\.1\.learning_rate = 0\.003, got stage\.1\.learning_rate = 0\.5\)",
    ):
        run_recipe(faster, out=tmp_path / "run", progress=silent(), resume=True)
    rows = (tmp_path / "actions.jsonl").read_text()
    write_rows(tmp_path / "actions.jsonl", [json.loads(line) for line in rows.splitlines()][1:])
    with pytest.raises(
        DataError,
        match=r"the data that the run began with \(expected stage\.0\.data\.train = sha256:",
    ):
        run_recipe(recipe, out=tmp_path / "run", progress=silent(), resume=True)
    (tmp_path / "moved.jsonl").write_text(rows)  # the same rows in another place are the same data
    moved = tuple(
        replace(s, data=replace(s.data, train=str(tmp_path / "moved.jsonl"))) for s in recipe.stage
    )
    run_recipe(
        replace(recipe, stage=moved, keep_checkpoints=1),
        out=tmp_path / "run",
        progress=silent(),
        resume=True,
    )


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    generation: Whole, tmp_path: Path
) -> None:
    stopped_at(6, generation.recipe, tmp_path / "run")
    newest, said = tmp_path / "run" / "checkpoints" / "stage-0-step-00000004.pt", io.StringIO()
    newest.write_bytes(newest.read_bytes()[:-2000])
    run_recipe(generation.recipe, out=tmp_path / "run", progress=Progress(said), resume=True)
    assert (
        f"{newest} is damaged" in said.getvalue()
        and "resumed at stage 0, step 2" in said.getvalue()
    )
    assert sha256_file(tmp_path / "run" / WEIGHTS) == generation.digest


def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    recipe = sft_recipe(
        tiny_decoder, tmp_path, epochs=10, warmup_ratio=0.2, learning_rate=1e30, max_grad_norm=1e30
    )
    with pytest.raises(TrainingError) as stopped:
        run_recipe(replace(recipe, checkpoint_every=1), out=tmp_path / "run", progress=silent())
    checkpoints = sorted((tmp_path / "run" / "checkpoints").glob("*.pt"))
    step = int(checkpoints[-1].stem.rsplit("-", 1)[1])
    assert f"at step {step + 1}, on rows " in str(stopped.value)
    assert f"The checkpoint of stage 0, step {step} is kept in {checkpoints[-1].parent}" in str(
        stopped.value
    )
    weights = torch.load(checkpoints[-1], weights_only=True)["weights"]
    assert all(torch.isfinite(weight).all() for weight in weights.values())


def test_every_generator_goes_on_where_it_was() -> None:
    import numpy as np

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.gauss(0, 1), np.random.randn()  # leaves half a pair behind
    state = rng_state(CPU_DEVICE)
    expected = [draw(), random.gauss(0, 1), np.random.randn()]
    set_rng_state(state, CPU_DEVICE)
    assert [draw(), random.gauss(0, 1), np.random.randn()] == expected


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_checkpoint_of_version_0_1_is_continued(
    tiny_decoder: Path, tmp_path: Path, method: str
) -> None:
    made = (
        sft_recipe(tiny_decoder, tmp_path)
        if method == "sft"
        else pair_recipe(tiny_decoder, tmp_path, "dpo", dpo={"beta": 0.3})
    )
    recipe = replace(made, checkpoint_every=2)
    run_recipe(recipe, out=tmp_path / "whole", progress=silent())
    stopped_at(3, recipe, tmp_path / "run")
    (path,) = (tmp_path / "run" / "checkpoints").glob("*.pt")
    content = torch.load(path, weights_only=True)
    old = {k: v for k, v in content["origin"].items() if not k.startswith(OWN_TABLES)}
    old |= {f"stage.0.{key}": "not set" for key in ("reward", "reward_weights")}
    old |= {"stage.0.beta": "0.3" if method == "dpo" else "0.1", "stage.0.kl": "0.04"}
    torch.save({**content, "origin": old}, path)
    run_recipe(recipe, out=tmp_path / "run", progress=silent(), resume=True)
    assert sha256_file(tmp_path / "run" / WEIGHTS) == sha256_file(tmp_path / "whole" / WEIGHTS)
    (other := tmp_path / "other" / "checkpoints").mkdir(parents=True)
    torch.save({**content, "origin": old | {"stage.0.learning_rate": "1.0"}}, other / path.name)
    with pytest.raises(RecipeError, match=r"expected stage\.0\.learning_rate = 1\.0, got"):
        run_recipe(recipe, out=tmp_path / "other", progress=silent(), resume=True)


def test_without_a_word_in_the_recipe_a_stage_has_about_ten_checkpoints() -> None:
    assert [steps_between(total) for total in (6, 500, 5000)] == [50, 50, 500]


def test_a_folder_that_lost_its_place_to_a_kill_gets_it_back(tmp_path: Path) -> None:
    for name in (".replaced-0123abcd-run", ".partial-0123abcd-run", ".partial-0123abcd-run-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    clear_interrupted(tmp_path / "run")
    assert (tmp_path / "run" / "file").read_text() == ".replaced-0123abcd-run"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".partial-0123abcd-run-2", "run"]


def test_the_command_line_killed_from_outside_resumes(
    generation: Whole, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = replace(generation.recipe.stage[0], epochs=10.0, validate_every=30)
    recipe = replace(
        generation.recipe, out=str(tmp_path / "run"), stage=(longer,), checkpoint_every=5
    )
    (tmp_path / "recipe.toml").write_text(recipe_to_toml(recipe))
    command = [sys.executable, "-m", "edgetune", "train", str(tmp_path / "recipe.toml")]
    process = subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
    )
    while (
        not list((tmp_path / "run" / "checkpoints").glob("stage-*.pt")) and process.poll() is None
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == KILLED
    with pytest.raises(SystemExit) as done:
        main(["train", str(tmp_path / "recipe.toml"), "--resume"])
    assert not done.value.code and "resumed at stage 0, step " in capsys.readouterr().err
    run_recipe(recipe, out=tmp_path / "whole", progress=silent())
    assert sha256_file(tmp_path / "run" / WEIGHTS) == sha256_file(tmp_path / "whole" / WEIGHTS)


def test_a_disk_that_fills_during_a_checkpoint_is_one_line_with_the_older_one(
    generation: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    whole_file, written = checkpoint.whole_file, []

    @contextlib.contextmanager
    def filling(path: Path) -> Iterator[Path]:
        with output_errors(path), whole_file(path) as partial:
            yield partial if not written else full
            written.append(path)

    monkeypatch.setattr(checkpoint, "whole_file", filling)
    with pytest.raises(OutputError) as stopped:
        run_recipe(generation.recipe, out=tmp_path / "run", progress=silent())
    assert "the disk is full. The checkpoint of stage 0, step 2 is kept" in str(stopped.value)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("*.pt")] == [
        written[0].name
    ]
