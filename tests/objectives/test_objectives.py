"""Losses and gradients against transformers and torch on the same batch, fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from training_helpers import classifier_batch, decoder_batch

from edgetune.data.batching import IGNORE
from edgetune.models.heads import pool
from edgetune.objectives.language import completion_logits, sequence_classification, sft


def test_sft_loss_and_gradient_are_transformers_own(tiny_decoder: Path, tmp_path: Path) -> None:
    model, batch = decoder_batch(tiny_decoder, tmp_path)
    theirs = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
    ).loss
    theirs.backward()
    weight = model.model.layers[0].self_attn.q_proj.weight
    expected, weight.grad = weight.grad.clone(), None
    ours, targets = sft(model, batch)
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    torch.testing.assert_close(weight.grad, expected, atol=1e-5, rtol=1e-4)
    assert targets == batch.targets == int((batch.labels[:, 1:] != IGNORE).sum())


def test_the_projection_runs_only_where_there_are_labels(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    model, batch = decoder_batch(tiny_decoder, tmp_path)
    seen: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    logits, targets = completion_logits(model, batch)
    assert seen == [torch.Size([1, batch.targets, model.config.vocab_size])]
    assert logits.shape == (len(targets), model.config.vocab_size)


def test_the_projection_sees_all_positions_again_afterwards(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    model, batch = decoder_batch(tiny_decoder, tmp_path)
    completion_logits(model, batch)
    assert model(input_ids=batch.input_ids).logits.shape[:2] == batch.input_ids.shape


def test_padding_changes_no_loss(tiny_decoder: Path, tmp_path: Path) -> None:
    model, batch = decoder_batch(tiny_decoder, tmp_path)
    expected, _ = sft(model, batch)
    batch.input_ids[batch.attention_mask == 0] = 7
    assert sft(model, batch)[0].item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_classification_loss_is_cross_entropy_of_the_full_forward(
    tiny_encoder: Path, tmp_path: Path, smoothing: float
) -> None:
    model, batch = classifier_batch(tiny_encoder, tmp_path)
    hidden = model.body(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask
    ).last_hidden_state
    rows = [
        h[:n].mean(0) for h, n in zip(hidden, batch.attention_mask.sum(1).tolist(), strict=True)
    ]
    expected = F.cross_entropy(
        model.classifier(torch.stack(rows)), batch.labels, label_smoothing=smoothing
    )
    loss, count = sequence_classification(model, batch, label_smoothing=smoothing)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert count == len(batch.rows)


def test_cls_pooling_is_the_first_token() -> None:
    hidden = torch.randn(2, 3, 4)
    assert torch.equal(pool(hidden, torch.ones(2, 3, dtype=torch.int64), "cls"), hidden[:, 0])
