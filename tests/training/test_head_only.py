"""parameters.train = "head": features computed once, an adapter without low-rank weights, exported
and swapped like any.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_helpers import export
from peft import PeftModel
from safetensors.numpy import load_file
from training_helpers import intent_recipe, intent_rows, sft_recipe, silent

from edgetune.adapters.runs import load_adapted_model
from edgetune.core.errors import RecipeError
from edgetune.export.proof.proof import Outputs, prove_head
from edgetune.models.base import open_folder
from edgetune.models.heads import SequenceClassifier
from edgetune.models.load import load_body, load_tokenizer
from edgetune.recipe.read import recipe_from_dict
from edgetune.recipe.schema import Parameters
from edgetune.runtime import Runtime
from edgetune.training import run_recipe
from edgetune.training.probes import pooled_features

HEAD = {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}


def head_run(base: Path, folder: Path, name: str = "run", **stage: Any) -> Path:
    recipe = intent_recipe(base, folder, **{"epochs": 5, **stage, "parameters": {"train": "head"}})
    run_recipe(recipe, out=folder / name, progress=silent())
    return folder / name


def test_only_the_head_is_saved_and_the_rest_is_the_base(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    run = head_run(tiny_encoder, tmp_path)
    assert set(load_file(run / "adapter" / "adapter_model.safetensors")) == HEAD
    summary = json.loads((run / "summary.json").read_text())
    assert summary["trainable_parameters"] == 3 * 64 + 3 and summary["metrics"]["accuracy"] == 1.0
    assert summary["effect"]["mean_logit_change"] > 0


def test_the_body_runs_once_over_every_row_however_many_epochs(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 0
    pooled = SequenceClassifier.pooled

    def counted(
        self: SequenceClassifier, input_ids: torch.Tensor, *others: torch.Tensor | None
    ) -> torch.Tensor:
        nonlocal rows
        rows += len(input_ids)
        return pooled(self, input_ids, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(SequenceClassifier, "pooled", counted)
    head_run(tiny_encoder, tmp_path, epochs=7)
    assert rows == len(intent_rows()) + 4  # training and validation rows


def test_the_loss_on_features_is_the_loss_of_the_whole_model(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    from training_helpers import classifier_batch

    from edgetune.objectives.language import class_logits

    model, batch = classifier_batch(tiny_encoder, tmp_path)
    features = model.pooled(batch.input_ids, batch.attention_mask)
    torch.testing.assert_close(
        class_logits(model, replace(batch, features=features)), class_logits(model, batch)
    )


def test_the_folder_loads_in_peft_unchanged(tiny_encoder: Path, tmp_path: Path) -> None:
    run = head_run(tiny_encoder, tmp_path)
    fresh = SequenceClassifier(
        load_body(open_folder(tiny_encoder, name="tiny")), labels=3, pooling="mean"
    )
    fresh.body.pooler = None  # no layer stands before the head
    theirs = PeftModel.from_pretrained(fresh, str(run / "adapter")).eval()
    ours, tokenizer, _ = load_adapted_model(run)
    batch = tokenizer(["turn on the lights"], return_tensors="pt")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    assert torch.equal(ours(**inputs), theirs.base_model(**inputs))


@pytest.mark.parametrize("mode", ["separate", "merged"])
def test_it_exports_with_proof_and_answers_as_in_torch(
    tiny_encoder: Path, tmp_path: Path, mode: str
) -> None:
    run = head_run(tiny_encoder, tmp_path, "intents")
    manifest = export(tmp_path / "bundle", run, mode=mode)
    assert manifest.proof["adapters"]["intents"]["passed"]
    model, tokenizer, metadata = load_adapted_model(run)
    texts = [row["text"] for row in intent_rows()]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    expected = (
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        .softmax(-1)
        .detach()
        .numpy()
    )
    with Runtime.open(tmp_path / "bundle", threads=1) as runtime:
        scores = [
            list(answer.scores.values()) for answer in runtime.classify(texts, adapter="intents")
        ]
    assert np.abs(np.array(scores) - expected).max() < 1e-4
    assert metadata["labels"] == ["heat", "lights", "music"]


def test_it_ships_and_swaps_beside_a_lora_adapter(tiny_encoder: Path, tmp_path: Path) -> None:
    run_recipe(
        intent_recipe(tiny_encoder, tmp_path, epochs=4), out=tmp_path / "lora", progress=silent()
    )
    run, texts = head_run(tiny_encoder, tmp_path, "head"), [row["text"] for row in intent_rows()]
    export(tmp_path / "bundle", tmp_path / "lora", run)
    with Runtime.open(tmp_path / "bundle", threads=1) as runtime:
        alone = runtime.classify(texts, adapter="head")
        mixed = runtime.classify(texts, adapters=["head", "lora"] * 6)
        runtime.load_adapter("again", run / "adapter")
        assert [a.label for a in runtime.classify(texts, adapter="again")] == [
            a.label for a in alone
        ]
    assert [a.score for a in mixed[::2]] == pytest.approx([a.score for a in alone[::2]], abs=1e-5)


@pytest.mark.parametrize(
    ("shipped", "failure"), [(0.0, "effect arrives"), (1.0, None), (0.4, "strength")]
)
def test_the_proof_sees_a_head_that_arrives_weakly_or_not_at_all(
    shipped: float, failure: str | None
) -> None:
    logits = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    trained, sent = Outputs(logits, logits[:, :2]), Outputs(shipped * logits, logits[:, :2])
    proof = prove_head(trained=trained, shipped=sent, precision="int8")
    assert proof.passed == (failure is None) and (
        failure is None or failure in "; ".join(proof.failures)
    )


def test_a_head_that_was_never_trained_fails_the_proof() -> None:
    zero = Outputs(np.zeros((12, 3), np.float32), np.ones((12, 2), np.float32))
    assert "changes nothing" in prove_head(trained=zero, shipped=zero, precision="fp32").failures[0]


def test_features_are_those_of_the_frozen_body_in_the_order_of_the_rows(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    from edgetune.data.loaders import load_examples
    from edgetune.training.probes import keep_features

    base = open_folder(tiny_encoder, name="tiny")
    examples = load_examples(
        intent_recipe(tiny_encoder, tmp_path).stage[0], load_tokenizer(base), base
    )
    model = SequenceClassifier(load_body(base), labels=3, pooling="mean").eval()
    one_by_one = [pooled_features(model, [example], pad_id=0)[0] for example in examples.train]
    keep_features(model, examples, pad_id=0)
    for example, expected in zip(examples.train, one_by_one, strict=True):
        assert example.features is not None
        np.testing.assert_allclose(example.features.numpy(), expected, atol=1e-5)


def test_settings_of_an_adapter_have_no_meaning_for_a_head(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r'parameters.rank has no meaning with train = "head"'):
        intent_recipe(tiny_encoder, tmp_path, parameters={"train": "head", "rank": 4})


def test_a_method_without_a_task_head_is_refused(tiny_decoder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r'train = "head" does not fit stage\.0\.method = "sft"'):
        sft_recipe(tiny_decoder, tmp_path, parameters={"train": "head"})


def test_the_recorded_recipe_of_a_head_can_be_read_again(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    from edgetune.recipe.read import load_recipe

    assert load_recipe(head_run(tiny_encoder, tmp_path) / "recipe.toml").parameters == Parameters(
        train="head", rank=8, alpha=16.0
    )
    assert (
        recipe_from_dict(
            {"base": "b", "stage": [{"method": "sft", "data": {"train": "x.jsonl"}}]}
        ).parameters.train
        == "lora"
    )
