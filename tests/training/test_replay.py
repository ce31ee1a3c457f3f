"""Replay: general text in every step, in the weight and amount that its share says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import (
    GENERAL,
    action_rows,
    decoder_batch,
    intent_recipe,
    replayed,
    resolved,
    silent,
    write_rows,
)

from edgetune.adapters.lora import adapt
from edgetune.core.errors import DataError, RecipeError
from edgetune.core.files import sha256_file
from edgetune.data.batching import Example
from edgetune.data.loaders import load_examples
from edgetune.models.base import open_folder
from edgetune.models.load import load_tokenizer
from edgetune.objectives.language import sft
from edgetune.recipe.read import recipe_from_dict
from edgetune.recipe.schema import Parameters
from edgetune.training import run_recipe
from edgetune.training.inputs import step_tokens
from edgetune.training.journal import Journal, StageLog
from edgetune.training.learner import Learner
from edgetune.training.loop import train_stage
from edgetune.training.replay import ReplayText, load_replay


def text_of(
    base_folder: Path, folder: Path, share: float, *, seed: int = 0, limit: int = 64
) -> tuple[ReplayText, list[Example]]:
    base = open_folder(base_folder, name="tiny")
    tokenizer, stage = load_tokenizer(base), replayed(base_folder, folder, share=share).stage[0]
    examples: list[Example] = [*load_examples(stage, tokenizer, base).train]
    assert stage.replay is not None
    tokens = step_tokens(stage, examples, kind=base.kind)
    found = load_replay(
        stage.replay, tokenizer, step_tokens=tokens, limit=limit, pad_id=0, seed=seed
    )
    return found, examples


@pytest.mark.parametrize("share", [0.2, 0.5, 0.7])
def test_the_text_is_its_share_of_a_steps_tokens(
    tiny_decoder: Path, tmp_path: Path, share: float
) -> None:
    text, examples = text_of(tiny_decoder, tmp_path, share)
    per_step = sum(len(example.input_ids) for example in examples) / 3
    batch = text.batch(1)
    assert batch.tokens / (batch.tokens + per_step) == pytest.approx(share, abs=0.05)
    assert batch.input_ids.shape[1] <= 64


def test_what_a_step_sees_follows_from_seed_and_step(tiny_decoder: Path, tmp_path: Path) -> None:
    (one, _), (two, _), (other, _) = (
        text_of(tiny_decoder, tmp_path, 0.3, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(one.batch(5).input_ids, two.batch(5).input_ids)
    assert not torch.equal(one.batch(5).input_ids, one.batch(6).input_ids)
    assert any(not torch.equal(one.batch(n).input_ids, other.batch(n).input_ids) for n in (1, 2, 3))
    assert torch.equal(
        one.batch(1).input_ids, one.batch(1 + len(one.examples)).input_ids
    )  # and again from the start


def test_a_step_follows_the_weighted_sum_of_both_losses(
    tiny_decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share, (text, examples) = 0.3, text_of(tiny_decoder, tmp_path, 0.3)
    recipe = replayed(
        tiny_decoder, tmp_path, share=share, max_steps=1, batch_size=12, warmup_ratio=0.0
    )
    stage = replace(resolved(recipe).stages[0], replay=text)

    def fresh() -> Any:
        torch.manual_seed(0)
        return adapt(decoder_batch(tiny_decoder, tmp_path)[0], Parameters(), task="text-generation")

    from edgetune.data.collation import collate

    model = fresh()
    loss = (1 - share) * sft(model, collate(examples, 0))[0] + share * sft(model, text.batch(1))[0]
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    seen: list[torch.Tensor] = []

    def clip(parameters: Any, limit: float) -> torch.Tensor:
        seen.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        return torch.tensor(1.0)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    train_stage(
        Learner(fresh(), "fp32"),
        stage,
        log=StageLog(Journal(tmp_path / "journal.jsonl"), silent(), 0),
    )
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=1e-4)
    record = json.loads((tmp_path / "journal.jsonl").read_text().splitlines()[0])
    assert record["replay_loss"] == pytest.approx(sft(fresh(), text.batch(1))[0].item(), rel=1e-5)


def test_a_run_with_replay_repeats_bit_for_bit_and_keeps_the_text_better(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    recipe = replayed(tiny_decoder, tmp_path, share=0.5, epochs=6)
    for name in ("one", "two"):
        run_recipe(recipe, out=tmp_path / name, progress=silent())
    run_recipe(
        replace(recipe, stage=(replace(recipe.stage[0], replay=None),)),
        out=tmp_path / "without",
        progress=silent(),
    )
    digests = {
        name: sha256_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for name in ("one", "two", "without")
    }
    assert digests["one"] == digests["two"] != digests["without"]
    from edgetune.evaluation.forgetting.tasks import text_measures
    from edgetune.evaluation.forgetting.torch_subject import run_subject

    perplexities = []
    for name in ("one", "without"):
        subject = run_subject(tmp_path / name)
        assert subject.texts is not None
        found = text_measures(
            [row["text"] for row in GENERAL[:8]],
            subject.texts,
            lambda items, s=subject: s.score(items, adapted=True),
        )
        perplexities.append(found[0].statistic(found[0].values))
    assert perplexities[0] < 0.5 * perplexities[1]
    facts = json.loads((tmp_path / "one" / "summary.json").read_text())["data"][0]
    assert facts["digests"]["replay"].startswith("sha256:") and facts["rows"]["replay"] > 0


def test_replay_is_refused_for_encoders_and_for_a_share_of_everything(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        RecipeError, match=r"stage\.0\.replay has no meaning for sequence-classification"
    ):
        intent_recipe(tiny_encoder, tmp_path, replay={"data": "x.jsonl"})
    stage = {
        "method": "sft",
        "data": {"train": "x.jsonl"},
        "replay": {"data": "y.jsonl", "share": 1.0},
    }
    with pytest.raises(RecipeError, match=r"stage\.0\.replay\.share is out of range"):
        recipe_from_dict({"base": "b", "stage": [stage]})


def test_a_bad_row_of_general_text_is_named(tiny_decoder: Path, tmp_path: Path) -> None:
    recipe = replayed(tiny_decoder, tmp_path, share=0.5)
    write_rows(tmp_path / "general.jsonl", [{"text": "fine"}, {"words": "none"}])
    with pytest.raises(DataError, match=r"general\.jsonl, line 2"):
        run_recipe(recipe, out=tmp_path / "run", progress=silent())
    assert action_rows() and not (tmp_path / "run").exists()


def test_the_table_can_be_written_and_read_again(tiny_decoder: Path, tmp_path: Path) -> None:
    from edgetune.recipe.read import load_recipe, recipe_to_toml

    recipe = replayed(tiny_decoder, tmp_path, share=0.25)
    (tmp_path / "recipe.toml").write_text(recipe_to_toml(recipe))
    assert load_recipe(tmp_path / "recipe.toml").stage[0].replay == recipe.stage[0].replay
