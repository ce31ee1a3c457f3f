"""Several processes at the same global batch compute what one does."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_helpers import pair_recipe, prompt_recipe
from process_helpers import command_line_of_rank, free_port, in_processes
from safetensors.torch import load_file
from training_helpers import intent_recipe, sft_recipe, silent, write_rows

from edgetune.core.errors import RecipeError
from edgetune.core.files import sha256_file
from edgetune.recipe.read import recipe_from_dict, recipe_to_toml
from edgetune.recipe.schema import Recipe
from edgetune.training import run_recipe
from edgetune.training.parallel.distributed import Group, launched

WEIGHTS = "adapter/adapter_model.safetensors"
LENGTH = "def score(prompt, completion, row):\n    return len(completion) / 8\n"


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


def assert_same_training(together: Path, alone: Path) -> None:
    """The same loss at every step, and the same adapter."""
    assert losses(together) == pytest.approx(losses(alone), abs=2e-6)
    ours, theirs = load_file(together / WEIGHTS), load_file(alone / WEIGHTS)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=0)


def train_together(recipe: Recipe, folder: Path, *options: str, size: int = 2) -> list[str]:
    """Train in `size` processes; what each of them printed."""
    (folder / "recipe.toml").write_text(recipe_to_toml(recipe))
    arguments, port = ["train", str(folder / "recipe.toml"), *options], free_port()
    logs = [folder / f"rank{rank}.log" for rank in range(size)]
    codes = in_processes(
        command_line_of_rank, [(r, size, port, arguments, logs[r]) for r in range(size)]
    )
    texts = [log.read_text() for log in logs]
    assert codes == [0] * size, texts
    return texts


@pytest.fixture
def calm_encoder(tiny_encoder: Path, tmp_path: Path) -> Path:
    """The tiny encoder without dropout: each process draws its own."""
    config = json.loads(
        (shutil.copytree(tiny_encoder, tmp_path / "base") / "config.json").read_text()
    )
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    return tmp_path / "base"


@pytest.mark.parametrize("kind", ["sft", "sequence-classification", "reward", "dpo"])
def test_two_processes_train_as_one_does(
    kind: str, tiny_decoder: Path, calm_encoder: Path, tmp_path: Path
) -> None:
    """Batches of 5 of 12 rows: shares of 3 and 2, and of 1 and 1 at the end of an epoch."""
    settings: dict[str, Any] = {"batch_size": 5, "learning_rate": 1e-3}
    if kind == "sft":
        recipe = sft_recipe(tiny_decoder, tmp_path, **settings)
    elif kind == "sequence-classification":
        recipe = intent_recipe(calm_encoder, tmp_path, **settings)
    else:
        recipe = pair_recipe(tiny_decoder, tmp_path, kind, **settings)
    recipe = replace(recipe, out=str(tmp_path / "two"))
    first, second = train_together(recipe, tmp_path)
    assert "written to" in first and second == ""
    summary = run_recipe(recipe, out=tmp_path / "one", progress=silent())
    assert_same_training(tmp_path / "two", tmp_path / "one")
    theirs = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert (theirs["processes"], theirs["stages"][0]["tokens"]) == (2, summary.stages[0]["tokens"])
    assert theirs["metrics"] == pytest.approx(summary.metrics, rel=1e-4)


def test_a_process_without_rows_waits_for_the_others(tiny_decoder: Path, tmp_path: Path) -> None:
    recipe = replace(
        sft_recipe(tiny_decoder, tmp_path, batch_size=1, max_steps=3), out=str(tmp_path / "two")
    )
    train_together(recipe, tmp_path)
    run_recipe(recipe, out=tmp_path / "one", progress=silent())
    assert_same_training(tmp_path / "two", tmp_path / "one")


def test_two_processes_resume_with_the_dropout_of_each(tiny_decoder: Path, tmp_path: Path) -> None:
    recipe = sft_recipe(tiny_decoder, tmp_path, parameters={"dropout": 0.2})
    recipe = replace(recipe, checkpoint_every=4, out=str(tmp_path / "two"))
    train_together(replace(recipe, out=str(tmp_path / "whole")), tmp_path)
    (tmp_path / "recipe.toml").write_text(recipe_to_toml(recipe))
    stop_after_checkpoint(tmp_path)
    first, _ = train_together(recipe, tmp_path, "--resume")
    assert "resumed at stage 0, step 4" in first
    assert sha256_file(tmp_path / "two" / WEIGHTS) == sha256_file(tmp_path / "whole" / WEIGHTS)


def test_two_processes_resume_grpo_with_the_samples_of_each(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    """Two prompts and one in turn: in every other rollout the second process has none. Step 5
    learns from samples of 4.
    """
    settings: dict[str, Any] = {
        "copies": 1,
        "batch_size": 3,
        "epochs": 2,
        "iterations": 3,
        "group_size": 2,
        "kl": 0.0,
    }
    recipe = replace(prompt_recipe(tiny_decoder, tmp_path, LENGTH, **settings), checkpoint_every=4)
    train_together(replace(recipe, out=str(tmp_path / "whole")), tmp_path)
    (tmp_path / "recipe.toml").write_text(
        recipe_to_toml(replace(recipe, out=str(tmp_path / "two")))
    )
    stop_after_checkpoint(tmp_path)
    first, _ = train_together(replace(recipe, out=str(tmp_path / "two")), tmp_path, "--resume")
    assert "resumed at stage 0, step 4" in first
    assert sha256_file(tmp_path / "two" / WEIGHTS) == sha256_file(tmp_path / "whole" / WEIGHTS)
    steps = [
        json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    ]
    assert all(math.isfinite(step["reward"]) for step in steps if step["kind"] == "train")


def stop_after_checkpoint(folder: Path) -> None:
    """Both processes die at their fifth step."""
    port, arguments = free_port(), ["train", str(folder / "recipe.toml")]
    logs = [folder / f"stopped{rank}.log" for rank in range(2)]
    codes = in_processes(dying_rank, [(rank, 2, port, arguments, logs[rank]) for rank in range(2)])
    assert codes == [-9, -9]


def dying_rank(rank: int, size: int, port: int, arguments: list[str], log: Path) -> None:
    import signal

    from edgetune.core.progress import Progress

    def step(self: Progress, step: int, *args: Any, **kwargs: Any) -> None:
        if step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    Progress.step = step  # type: ignore[method-assign]
    command_line_of_rank(rank, size, port, arguments, log)


def test_a_loss_that_is_no_number_stops_every_process(tiny_decoder: Path, tmp_path: Path) -> None:
    recipe = sft_recipe(tiny_decoder, tmp_path, learning_rate=1e30, max_grad_norm=1e30)
    (tmp_path / "recipe.toml").write_text(
        recipe_to_toml(replace(recipe, out=str(tmp_path / "run")))
    )
    port, logs = free_port(), [tmp_path / f"{rank}.log" for rank in range(2)]
    arguments = ["train", str(tmp_path / "recipe.toml")]
    assert in_processes(
        command_line_of_rank, [(r, 2, port, arguments, logs[r]) for r in range(2)]
    ) == [2, 2]
    assert all("at step 2, on rows" in log.read_text() for log in logs)
    assert not (tmp_path / "run").exists()


def test_shares_are_the_whole_and_alike() -> None:
    rows = list(range(11))
    shares = [Group(rank, 3).share(rows) for rank in range(3)]
    assert sorted(row for share in shares for row in share) == rows
    assert [len(share) for share in shares] == [4, 4, 3]
    assert Group().share(rows) is rows


@pytest.mark.parametrize(
    "names",
    [
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ],
)
def test_launchers_say_who_a_process_is(
    names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert launched() == Group()
    for name, value in zip(names, ("3", "4", "1"), strict=True):
        monkeypatch.setenv(name, value)
    assert launched() == Group(3, 4, 1) and not launched().leads


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_the_launchers_start_it(launcher: str, tiny_decoder: Path, tmp_path: Path) -> None:
    recipe = replace(
        sft_recipe(tiny_decoder, tmp_path, learning_rate=1e-3), out=str(tmp_path / "two")
    )
    (tmp_path / "recipe.toml").write_text(recipe_to_toml(recipe))
    program, port = shutil.which(launcher, path=str(Path(sys.executable).parent)), str(free_port())
    assert program is not None
    options = {
        "torchrun": ["--nproc_per_node", "2", "--master_port", port],
        "accelerate": [
            "launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--main_process_port",
            port,
        ],
    }
    command = [
        program,
        *options[launcher],
        "-m",
        "edgetune",
        "train",
        str(tmp_path / "recipe.toml"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loss ") == 1
    run_recipe(recipe, out=tmp_path / "one", progress=silent())
    assert_same_training(tmp_path / "two", tmp_path / "one")


MODEL = "model/model.safetensors"


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / MODEL)


@pytest.mark.parametrize("kind", ["sft", "sequence-classification"])
def test_two_processes_that_share_the_weights_train_as_one_does(
    kind: str, tiny_decoder: Path, calm_encoder: Path, tmp_path: Path
) -> None:
    """All weights, each process with a share of them; batches of 5 of 12 rows, and with replay
    beside sft.
    """
    settings: dict[str, Any] = {
        "batch_size": 5,
        "learning_rate": 1e-3,
        "parameters": {"train": "full", "shard": True},
    }
    if kind == "sft":
        text = write_rows(
            tmp_path / "text.jsonl", [{"text": "The quick brown fox jumps over the lazy dog. " * 6}]
        )
        recipe = sft_recipe(
            tiny_decoder, tmp_path, replay={"data": str(text), "share": 0.3}, **settings
        )
    else:
        recipe = intent_recipe(calm_encoder, tmp_path, **settings)
    recipe = replace(recipe, checkpoint_every=4, out=str(tmp_path / "two"))
    first, second = train_together(recipe, tmp_path)
    assert "written to" in first and second == ""
    summary = run_recipe(recipe, out=tmp_path / "one", progress=silent())
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=5e-6)
    ours, theirs = weights_of(tmp_path / "two"), weights_of(tmp_path / "one")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if not name.endswith(
            "key.bias"
        ):  # softmax does not see it: AdamW makes steps of the noise in its gradient
            torch.testing.assert_close(tensor, theirs[name], atol=5e-5, rtol=0)
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["metrics"] == pytest.approx(
        summary.metrics, rel=1e-4
    )


def test_processes_that_share_the_weights_resume_to_the_same_bits(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    recipe = sft_recipe(
        tiny_decoder,
        tmp_path,
        batch_size=1,
        max_steps=6,
        parameters={"train": "full", "shard": True},
    )
    recipe = replace(recipe, checkpoint_every=4, out=str(tmp_path / "two"))
    train_together(replace(recipe, out=str(tmp_path / "whole")), tmp_path)
    (tmp_path / "recipe.toml").write_text(recipe_to_toml(recipe))
    stop_after_checkpoint(tmp_path)
    first, _ = train_together(recipe, tmp_path, "--resume")
    assert "resumed at stage 0, step 4" in first
    assert sha256_file(tmp_path / "two" / MODEL) == sha256_file(tmp_path / "whole" / MODEL)


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("sft", {"shard": True}, 'shard has no meaning with train = "lora"'),
        ("grpo", {"train": "full", "shard": True}, "shard does not fit"),
    ],
)
def test_only_all_weights_are_shared(
    method: str, parameters: dict[str, Any], message: str, tiny_decoder: Path, tmp_path: Path
) -> None:
    stage = {
        "method": method,
        "data": {"train": "rows.jsonl"},
        **({"grpo": {"reward": "a:b", "kl": 0.0}} if method == "grpo" else {}),
    }
    with pytest.raises(RecipeError, match=message):
        recipe_from_dict({"base": str(tiny_decoder), "parameters": parameters, "stage": [stage]})


def test_all_processes_leave_the_weights_of_the_best_validation(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    """Shared weights, and a second stage that goes on from what the first one kept."""
    recipe = sft_recipe(
        tiny_decoder,
        tmp_path,
        batch_size=5,
        max_steps=6,
        validate_every=2,
        patience=1,
        parameters={"train": "full", "shard": True},
    )
    write_rows(
        tmp_path / "actions-dev.jsonl",
        [{"prompt": "turn on the lights", "completion": "the lazy dog"}],
    )
    (first,) = recipe.stage
    stages = (first, replace(first, max_steps=1, validate_every=1, patience=None))
    recipe = replace(recipe, stage=stages, out=str(tmp_path / "two"))
    train_together(recipe, tmp_path)
    summary = run_recipe(recipe, out=tmp_path / "one", progress=silent())
    assert summary.stages[0]["steps"] == 4 and summary.stages[0]["kept"]["step"] == 2
    theirs = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert [stage["steps"] for stage in theirs["stages"]] == [4, 1]
    assert theirs["metrics"] == pytest.approx(summary.metrics, rel=1e-4)
