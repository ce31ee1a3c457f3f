"""Runs on tiny models: folder, reproducibility, gradients, refusals, interruption."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from training_helpers import decoder_batch, intent_recipe, resolved, sft_recipe, silent, write_rows
from transformers import AutoModelForCausalLM

from edgetune.adapters.folder import read_metadata
from edgetune.adapters.lora import adapt
from edgetune.adapters.runs import load_adapted_model
from edgetune.core.errors import OutputError, TrainingError
from edgetune.core.files import sha256_file
from edgetune.models.torch_device import choose_precision, hold_frozen_linears_in_bf16
from edgetune.objectives.language import completion_logits
from edgetune.recipe.read import load_recipe
from edgetune.recipe.schema import Parameters
from edgetune.training import RunResult, run_recipe
from edgetune.training.journal import Journal, StageLog
from edgetune.training.learner import Learner
from edgetune.training.loop import build_optimizer, train_stage, warmup_cosine
from edgetune.training.resolve import total_steps

WEIGHTS = "adapter/adapter_model.safetensors"


def test_a_run_folder_holds_everything_and_nothing_else(tiny_decoder: Path, tmp_path: Path) -> None:
    run_recipe(sft_recipe(tiny_decoder, tmp_path), out=tmp_path / "out" / "run", progress=silent())
    files = {
        str(path.relative_to(tmp_path / "out"))
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    files = {
        name for name in files if not name.startswith("run/tensorboard/")
    }  # where it is installed
    adapter = {"adapter_config.json", "adapter_model.safetensors", "edgetune_adapter.json"}
    expected = {"recipe.toml", "metrics.jsonl", "summary.json"} | {
        f"adapter/{name}" for name in adapter
    }
    assert files == {f"run/{name}" for name in expected}


def test_what_a_caller_writes_besides_is_part_of_the_whole(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    recipe, out = sft_recipe(tiny_decoder, tmp_path, max_steps=1), tmp_path / "out" / "run"

    def note(folder: Path, result: RunResult) -> None:
        assert folder != out and (folder / WEIGHTS).exists()
        (folder / "note.txt").write_text(f"{len(result.records)} {result.recipe.device}")
        if result.recipe.seed == 1:
            raise RuntimeError("no more room for notes")

    run_recipe(recipe, out=out, progress=silent(), write_more=note)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert before[out / "note.txt"] == b"2 cpu"
    (out / "note.txt").unlink()  # else the folder holds a foreign file
    with pytest.raises(RuntimeError, match="no more room"):
        run_recipe(replace(recipe, seed=1), out=out, progress=silent(), write_more=note)
    assert list((tmp_path / "out").iterdir()) == [out]
    del before[out / "note.txt"]
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_sft_learns_and_the_adapter_has_an_effect(tiny_decoder: Path, tmp_path: Path) -> None:
    summary = run_recipe(
        sft_recipe(tiny_decoder, tmp_path, epochs=10), out=tmp_path / "run", progress=silent()
    )
    assert summary.base_metrics is not None
    assert summary.metrics["loss"] < 0.5 * summary.base_metrics["loss"]
    assert summary.metrics["perplexity"] == pytest.approx(
        math.exp(summary.metrics["loss"]), rel=1e-5
    )
    assert summary.effect["mean_kl"] > 0.1
    assert summary.effect_rows == "validation"


def test_classification_learns_every_intent(tiny_encoder: Path, tmp_path: Path) -> None:
    recipe = intent_recipe(tiny_encoder, tmp_path, epochs=10, head_init="random")
    summary = run_recipe(recipe, out=tmp_path / "run", progress=silent())
    assert summary.metrics["accuracy"] == 1.0
    assert summary.base_metrics is None  # a random head has no answer worth comparing with


def test_the_probe_is_the_head_before_training(tiny_encoder: Path, tmp_path: Path) -> None:
    summary = run_recipe(
        intent_recipe(tiny_encoder, tmp_path), out=tmp_path / "run", progress=silent()
    )
    assert summary.base_metrics is not None and summary.base_metrics["accuracy"] == 1.0


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_the_same_seed_gives_the_same_adapter_bit_for_bit(
    kind: str, tiny_decoder: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    parameters = {"rank": 2, "dropout": 0.1}
    recipe = (
        sft_recipe(tiny_decoder, tmp_path, parameters=parameters)
        if kind == "decoder"
        else intent_recipe(tiny_encoder, tmp_path, parameters=parameters)
    )
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        torch.manual_seed(len(name))  # what was drawn before does not matter
        run_recipe(replace(recipe, seed=seed), out=tmp_path / name, progress=silent())
    digests = {name: sha256_file(tmp_path / name / WEIGHTS) for name in ("one", "two", "other")}
    assert digests["one"] == digests["two"] != digests["other"]


def test_the_recorded_recipe_repeats_the_run(tiny_decoder: Path, tmp_path: Path) -> None:
    run_recipe(
        sft_recipe(tiny_decoder, tmp_path, precision="auto"),
        out=tmp_path / "one",
        progress=silent(),
    )
    recorded = load_recipe(tmp_path / "one" / "recipe.toml")
    assert recorded.stage[0].precision in ("fp32", "bf16") and recorded.threads == 1
    run_recipe(recorded, out=tmp_path / "two", progress=silent())
    assert sha256_file(tmp_path / "one" / WEIGHTS) == sha256_file(tmp_path / "two" / WEIGHTS)


def test_the_trained_adapter_gives_the_same_logits_in_peft(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    run_recipe(sft_recipe(tiny_decoder, tmp_path), out=tmp_path / "run", progress=silent())
    fresh = AutoModelForCausalLM.from_pretrained(tiny_decoder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(fresh, str(tmp_path / "run" / "adapter")).eval()
    ours, _, metadata = load_adapted_model(tmp_path / "run")
    _, batch = decoder_batch(tiny_decoder, tmp_path)
    torch.testing.assert_close(
        completion_logits(ours, batch)[0], completion_logits(theirs, batch)[0]
    )
    assert metadata["generation"]["max_new_tokens"] > 16


def test_rank_one_and_dora_train_in_bf16(tiny_decoder: Path, tmp_path: Path) -> None:
    recipe = sft_recipe(
        tiny_decoder, tmp_path, precision="bf16", parameters={"rank": 1, "dora": True}
    )
    summary = run_recipe(recipe, out=tmp_path / "run", progress=silent())
    assert summary.effect["mean_kl"] > 0


def test_stages_run_in_succession_on_the_same_weights(tiny_decoder: Path, tmp_path: Path) -> None:
    recipe = sft_recipe(tiny_decoder, tmp_path)
    two = replace(recipe, stage=(*recipe.stage, replace(recipe.stage[0], epochs=1.0)))
    summary = run_recipe(two, out=tmp_path / "run", progress=silent())
    assert [stage["steps"] for stage in summary.stages] == [6, 3]
    records = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert {record["stage"] for record in records} == {0, 1}


def test_the_summary_and_the_journal_say_what_happened(tiny_decoder: Path, tmp_path: Path) -> None:
    run_recipe(sft_recipe(tiny_decoder, tmp_path), out=tmp_path / "run", progress=silent())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["base"]["digest"].startswith("sha256:")
    assert set(summary["data"][0]["digests"]) == {"train", "validation"}
    assert (
        summary["peak_rss_mb"] > 0
        and summary["tokens_per_second"] > 0
        and summary["trainable_parameters"] > 0
    )
    records = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if r["kind"] == "validation"] == [2, 4, 6]


def test_a_run_can_be_read_back(tiny_encoder: Path, tmp_path: Path) -> None:
    run_recipe(intent_recipe(tiny_encoder, tmp_path), out=tmp_path / "run", progress=silent())
    recipe = load_recipe(tmp_path / "run" / "recipe.toml")
    _, _, metadata = load_adapted_model(tmp_path / "run")
    assert recipe.parameters.rank == 8
    assert metadata["labels"] == ["heat", "lights", "music"] and metadata["pooling"] == "mean"
    assert read_metadata(tmp_path / "run" / "adapter") == metadata


def test_a_loss_that_is_no_number_names_step_and_rows(tiny_decoder: Path, tmp_path: Path) -> None:
    recipe = sft_recipe(tiny_decoder, tmp_path, learning_rate=1e30, max_grad_norm=1e30)
    with pytest.raises(TrainingError, match=r"at step \d+, on rows \d+, "):
        run_recipe(recipe, out=tmp_path / "out" / "run", progress=silent())
    assert list((tmp_path / "out").iterdir()) == []


def test_an_interrupted_run_leaves_the_older_one_untouched(
    tiny_decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = sft_recipe(tiny_decoder, tmp_path)
    run_recipe(recipe, out=tmp_path / "out" / "run", progress=silent())
    before = sha256_file(tmp_path / "out" / "run" / WEIGHTS)
    progress = silent()

    def interrupt(step: int, *args: Any, **kwargs: Any) -> None:
        if step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(progress, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(replace(recipe, seed=5), out=tmp_path / "out" / "run", progress=progress)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run"]
    assert sha256_file(tmp_path / "out" / "run" / WEIGHTS) == before


def test_a_folder_with_other_files_is_never_replaced(tiny_decoder: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"thesis\.txt"):
        run_recipe(sft_recipe(tiny_decoder, tmp_path), out=tmp_path / "home", progress=silent())
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"


def test_accumulated_parts_give_the_same_adapter_as_one_pass(
    tiny_decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = sft_recipe(tiny_decoder, tmp_path, max_steps=1)
    run_recipe(recipe, out=tmp_path / "whole", progress=silent())
    monkeypatch.setattr("edgetune.training.batches.MAX_TOKENS_AT_ONCE", 64)
    run_recipe(recipe, out=tmp_path / "parts", progress=silent())
    whole, parts = (
        json.loads((tmp_path / n / "metrics.jsonl").open().readline()) for n in ("whole", "parts")
    )
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


def test_frozen_weights_stay_as_they_were(tiny_decoder: Path, tmp_path: Path) -> None:
    model = adapt(decoder_batch(tiny_decoder, tmp_path)[0], Parameters(), task="text-generation")
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    train_stage(
        Learner(model, "fp32"),
        resolved(sft_recipe(tiny_decoder, tmp_path)).stages[0],
        log=StageLog(Journal(tmp_path / "journal.jsonl"), silent(), 0),
    )
    assert frozen and all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert all(
        torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen
    )


def test_the_schedule_rises_then_falls_as_a_cosine() -> None:
    factors = [warmup_cosine(step, 100, warmup_ratio=0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1.0 and factors[55] == pytest.approx(0.5) and 0 < factors[99] < 0.001


def test_decay_spares_vectors_and_the_head(tiny_encoder: Path, tmp_path: Path) -> None:
    from training_helpers import classifier_batch

    model = adapt(
        classifier_batch(tiny_encoder, tmp_path)[0],
        Parameters(dora=True),
        task="sequence-classification",
    )
    optimizer = build_optimizer(
        model, learning_rate=1e-3, head_learning_rate=5e-3, weight_decay=0.1
    )
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            in_head = "classifier" in names[id(parameter)]
            assert group["lr"] == (5e-3 if in_head else 1e-3)
            assert group["weight_decay"] == (
                0.1 if "lora_A" in names[id(parameter)] or "lora_B" in names[id(parameter)] else 0.0
            )


def test_steps_follow_from_epochs_and_their_limit(tiny_decoder: Path, tmp_path: Path) -> None:
    stage = sft_recipe(tiny_decoder, tmp_path, epochs=1.5, batch_size=8).stage[0]
    assert total_steps(stage, 20) == 5
    assert total_steps(replace(stage, max_steps=2), 20) == 2
    assert total_steps(replace(stage, epochs=0.01), 20) == 1


def test_a_named_precision_is_taken() -> None:
    assert choose_precision("fp32", hidden=64) == "fp32"
    assert choose_precision("bf16", hidden=64) == "bf16"


@pytest.mark.parametrize(
    ("has_bf16", "speedup", "chosen"),
    [(True, 10.0, "bf16"), (True, 1.0, "fp32"), (False, 10.0, "fp32")],
)
def test_auto_takes_bf16_where_it_was_measured_faster(
    has_bf16: bool, speedup: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgetune.models.torch_device.has_bf16", lambda _: has_bf16)
    monkeypatch.setattr("edgetune.models.torch_device._bf16_speedup", lambda *_: speedup)
    assert choose_precision("auto", hidden=256) == chosen


def test_measuring_does_not_move_the_seed() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    choose_precision("auto", hidden=64)
    assert torch.equal(torch.rand(3), expected)


def test_only_frozen_linears_are_held_in_bf16(tiny_decoder: Path, tmp_path: Path) -> None:
    model = adapt(decoder_batch(tiny_decoder, tmp_path)[0], Parameters(), task="text-generation")
    hold_frozen_linears_in_bf16(model)
    halved = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert halved == {
        name for name, p in model.named_parameters() if name.endswith("base_layer.weight")
    }


def test_training_without_validation_rows_measures_its_effect_on_training_rows(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    recipe = sft_recipe(tiny_decoder, tmp_path)
    data = replace(recipe.stage[0].data, validation=None)
    alone = replace(recipe, stage=(replace(recipe.stage[0], data=data),))
    summary = run_recipe(alone, out=tmp_path / "run", progress=silent())
    assert (summary.metrics, summary.base_metrics, summary.effect_rows) == ({}, None, "train")


def test_a_bad_row_stops_before_anything_is_written(tiny_encoder: Path, tmp_path: Path) -> None:
    from edgetune.core.errors import DataError

    recipe = intent_recipe(tiny_encoder, tmp_path)
    write_rows(tmp_path / "intents-dev.jsonl", [{"text": "hello", "label": "unseen"}])
    with pytest.raises(DataError, match=r"intents-dev\.jsonl, line 1.*unseen"):
        run_recipe(recipe, out=tmp_path / "out" / "run", progress=silent())
    assert not (tmp_path / "out" / "run").exists()
