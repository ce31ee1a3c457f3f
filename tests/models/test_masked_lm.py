"""masked-lm: the masking, the loss, the heads, and classification after it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import intent_recipe, intent_rows, masked_recipe, recipe, silent
from transformers import AutoModelForMaskedLM, BertForMaskedLM, DataCollatorForLanguageModeling

from edgetune.adapters.runs import load_adapted_model
from edgetune.core.errors import BaseModelError, RecipeError
from edgetune.data.batching import IGNORE, Batch
from edgetune.data.collation import collate
from edgetune.data.loaders import load_examples
from edgetune.data.masking import MEASURING, Masking
from edgetune.models.base import open_folder
from edgetune.models.load import load_tokenizer
from edgetune.models.masked_lm import exchange_body, load_masked_lm
from edgetune.objectives.language import masked_lm
from edgetune.recipe.read import recipe_from_dict
from edgetune.training import run_recipe


@pytest.fixture(scope="module")
def encoder_with_head(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny encoder's checkpoint with a masked-lm head in it."""
    folder = tmp_path_factory.mktemp("tiny-masked-lm")
    torch.manual_seed(1)
    model = BertForMaskedLM.from_pretrained(tiny_encoder)
    torch.manual_seed(
        1
    )  # again: transformers draws what is missing in another order in each process
    torch.nn.init.normal_(model.cls.predictions.transform.dense.weight, std=0.2)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_encoder / name).read_bytes())
    return folder


def batch_of(base_folder: Path, folder: Path, **stage: Any) -> tuple[Batch, Any]:
    base = open_folder(base_folder, name="tiny")
    tokenizer = load_tokenizer(base)
    examples = load_examples(masked_recipe(base_folder, folder, **stage).stage[0], tokenizer, base)
    return collate(examples.train, tokenizer.pad_token_id), examples.mask


def long_batch() -> Batch:
    ids = torch.randint(10, 300, (64, 512), generator=torch.Generator().manual_seed(0))
    return Batch(ids, torch.ones_like(ids), ids.clone(), tuple(range(64)), ids.numel(), 0)


def test_the_shares_are_those_of_transformers_collator(tiny_encoder: Path) -> None:
    batch = long_batch()
    masked = Masking(4, 320, seed=0)(batch, step=1)
    tokenizer = load_tokenizer(open_folder(tiny_encoder, name="tiny"))
    torch.manual_seed(0)
    theirs = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)(
        [{"input_ids": row} for row in batch.input_ids]
    )

    def shares(input_ids: torch.Tensor, labels: torch.Tensor) -> list[float]:
        chosen = labels != IGNORE
        hidden = (input_ids == tokenizer.mask_token_id) & chosen
        kept = (input_ids == batch.input_ids) & chosen
        return [
            x.sum().item() / y.sum().item()
            for x, y in ((chosen, torch.ones_like(chosen)), (hidden, chosen), (kept, chosen))
        ]

    ours = shares(masked.input_ids, masked.labels)
    assert ours == pytest.approx([0.15, 0.8, 0.1 + 0.1 / 320], abs=0.012)
    assert ours == pytest.approx(shares(theirs["input_ids"], theirs["labels"]), abs=0.02)
    random = masked.input_ids[
        (masked.labels != IGNORE) & (masked.input_ids != batch.input_ids) & (masked.input_ids != 4)
    ]
    assert random.min() < 10 and random.max() >= 310  # from the whole vocabulary


def test_masks_follow_from_seed_step_and_row_whatever_the_batch() -> None:
    batch, masking = long_batch(), Masking(4, 320, seed=0)
    one = masking(batch, step=3)
    half = replace(
        batch,
        **{k: getattr(batch, k)[32:] for k in ("input_ids", "attention_mask", "labels", "rows")},
    )
    assert torch.equal(masking(half, step=3).input_ids, one.input_ids[32:])
    assert not torch.equal(masking(batch, step=4).labels, one.labels)
    assert not torch.equal(Masking(4, 320, seed=1)(batch, step=3).labels, one.labels)


def test_a_row_of_which_chance_hides_nothing_is_measured_on_one_token(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    batch, _ = batch_of(tiny_encoder, tmp_path)
    counts = {step: set[int]() for step in (MEASURING, 1)}
    for step, found in counts.items():
        for seed in range(20):
            labels = Masking(4, 320, seed)(batch, step).labels
            assert (batch.labels[labels != IGNORE] != IGNORE).all()
            found.update((labels != IGNORE).sum(-1).tolist())
    assert 0 not in counts[MEASURING] and 0 in counts[1]  # a step of training has other rows


def test_special_tokens_and_padding_are_never_masked(tiny_encoder: Path, tmp_path: Path) -> None:
    batch, masking = batch_of(tiny_encoder, tmp_path)
    special = batch.labels == IGNORE
    for step in range(20):
        masked = masking(batch, step)
        assert torch.equal(masked.input_ids[special], batch.input_ids[special])
        assert (masked.labels[special] == IGNORE).all()
        assert masked.targets == int((masked.labels != IGNORE).sum())


def test_loss_and_gradient_are_transformers_own(encoder_with_head: Path, tmp_path: Path) -> None:
    batch, masking = batch_of(encoder_with_head, tmp_path)
    batch = masking(batch, 1)
    model, fresh = load_masked_lm(open_folder(encoder_with_head, name="tiny"), seed=0)
    reference = AutoModelForMaskedLM.from_pretrained(encoder_with_head, dtype=torch.float32).eval()
    theirs = reference(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
    ).loss
    theirs.backward()
    ours, count = masked_lm(model, batch)
    ours.backward()
    assert not fresh and count == batch.targets > 0
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    for (name, parameter), other in zip(
        model.named_parameters(), reference.parameters(), strict=True
    ):
        torch.testing.assert_close(parameter.grad, other.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_a_batch_without_hidden_tokens_has_no_loss_and_no_gradient(
    encoder_with_head: Path, tmp_path: Path
) -> None:
    batch, _ = batch_of(encoder_with_head, tmp_path)
    model, _ = load_masked_lm(open_folder(encoder_with_head, name="tiny"), seed=0)
    loss, count = masked_lm(model, replace(batch, labels=torch.full_like(batch.labels, IGNORE)))
    loss.backward()
    assert (loss.item(), count) == (0.0, 0)


def test_a_new_head_is_drawn_with_the_seed_and_tied_to_the_body_it_gets(tiny_encoder: Path) -> None:
    base = open_folder(tiny_encoder, name="tiny")
    (one, fresh), (two, _), (other, _) = (load_masked_lm(base, seed=seed) for seed in (0, 0, 1))
    weights = [model.cls.predictions.transform.dense.weight for model in (one, two, other)]
    assert fresh and torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    expected = torch.empty(64, 64).normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        weights[0], expected
    )  # whatever else was drawn before, in this process or another
    exchange_body(one, two.bert)
    assert one.cls.predictions.decoder.weight is two.bert.embeddings.word_embeddings.weight


def test_long_documents_are_cut_into_pieces_and_not_shortened(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    base = open_folder(tiny_encoder, name="tiny")
    tokenizer = load_tokenizer(base)
    text = " ".join(row["text"] for row in intent_rows())
    (tmp_path / "book.txt").write_text(text)
    stage = recipe(tiny_encoder, "masked-lm", tmp_path / "book.txt", None, max_length=16).stage[0]
    examples = load_examples(stage, tokenizer, base).train
    assert all(len(example.input_ids) <= 16 for example in examples)
    kept = [label for example in examples for label in example.labels if label != IGNORE]  # type: ignore[union-attr]
    assert kept == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_masked_lm_learns_with_the_checkpoints_head(
    encoder_with_head: Path, tmp_path: Path
) -> None:
    summary = run_recipe(
        masked_recipe(encoder_with_head, tmp_path, epochs=20),
        out=tmp_path / "run",
        progress=silent(),
    )
    assert (
        summary.base_metrics is not None
        and summary.metrics["loss"] < 0.85 * summary.base_metrics["loss"]
    )
    model, _, metadata = load_adapted_model(tmp_path / "run")
    assert metadata["task"] == "masked-lm" and metadata["generation"] is None
    assert not any("cls" in name for name, p in model.named_parameters() if "lora" in name)


def test_a_new_head_learns_and_is_not_compared_with(tiny_encoder: Path, tmp_path: Path) -> None:
    summary = run_recipe(
        masked_recipe(tiny_encoder, tmp_path, epochs=20), out=tmp_path / "run", progress=silent()
    )
    assert summary.base_metrics is None and summary.metrics["loss"] < 5.6  # a guess: ln 320 = 5.77
    tensors = json.loads((tmp_path / "run" / "summary.json").read_text())["trainable_parameters"]
    assert tensors > 64 * 64  # the head's transform learns too


def test_text_first_and_then_labels_make_one_adapter_with_one_head(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    labelled = intent_recipe(tiny_encoder, tmp_path, epochs=8, learning_rate=1e-3)
    both = replace(labelled, stage=(*masked_recipe(tiny_encoder, tmp_path).stage, *labelled.stage))
    summary = run_recipe(both, out=tmp_path / "run", progress=silent())
    assert summary.metrics["accuracy"] == 1.0
    assert summary.base_metrics is not None and summary.base_metrics["accuracy"] == 1.0
    model, _, metadata = load_adapted_model(tmp_path / "run")
    assert (metadata["task"], len(metadata["labels"])) == ("sequence-classification", 3)
    assert model.get_base_model().classifier.weight.shape == (3, 64)


def test_the_head_is_fitted_to_the_features_after_the_text(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    labelled = intent_recipe(tiny_encoder, tmp_path, max_steps=1, learning_rate=1e-6)
    text = masked_recipe(tiny_encoder, tmp_path, epochs=10).stage
    run_recipe(labelled, out=tmp_path / "alone", progress=silent())
    run_recipe(
        replace(labelled, stage=(*text, *labelled.stage)), out=tmp_path / "after", progress=silent()
    )
    alone, after = (
        load_adapted_model(tmp_path / n)[0].get_base_model().classifier.weight
        for n in ("alone", "after")
    )
    assert (alone - after).norm() > 0.01 * alone.norm()


def test_labels_cannot_come_before_text() -> None:
    stages = [
        {"method": name, "data": {"train": "x.jsonl"}}
        for name in ("sequence-classification", "masked-lm")
    ]
    with pytest.raises(RecipeError, match='"masked-lm" cannot follow "sequence-classification"'):
        recipe_from_dict({"base": "b", "stage": stages})


def test_a_tokenizer_without_mask_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    base = open_folder(tiny_encoder, name="tiny")
    tokenizer = load_tokenizer(base)
    tokenizer.mask_token = None
    with pytest.raises(BaseModelError, match="no mask token"):
        load_examples(masked_recipe(tiny_encoder, tmp_path).stage[0], tokenizer, base)
