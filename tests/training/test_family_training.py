"""Every family trains as transformers and PEFT train it: loss and gradients with the fused parts,
packed texts apart.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family_helpers import DECODERS, ENCODERS, body, loss_and_gradients, with_adapter
from torch import Tensor

from edgetune.adapters.lora import target_names
from edgetune.data.batching import Batch
from edgetune.models.heads import SequenceClassifier
from edgetune.objectives.language import completion_logits, sequence_classification, sft
from edgetune.training.fast.fused_layers import fused_ops
from edgetune.training.fast.lora_products import fused_lora

TOKENS = 20  # windows are 6


def batch(vocabulary: int, labels: Tensor | None = None) -> Batch:
    """Two rows, the second padded by six."""
    ids = torch.randint(5, vocabulary, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, -6:], mask[1, -6:] = 2, 0
    labels = ids.masked_fill(mask == 0, -100) if labels is None else labels
    return Batch(
        ids, mask, labels, rows=(0, 1), tokens=int(mask.sum()), targets=int(mask.sum()) - 2
    )


def fused_is_theirs(objective: Any, model: Any, rows: Batch) -> None:
    expected_loss, expected = loss_and_gradients(objective, model, rows)
    with fused_lora(model, "fp32"), fused_ops(model):
        loss, gradients = loss_and_gradients(objective, model, rows)
    assert loss == pytest.approx(expected_loss, abs=1e-5) and gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoders_loss_and_gradients_are_pefts(
    name: str, tiny_decoder: Path, tmp_path: Path
) -> None:
    model = body(name, tiny_decoder, tmp_path / "base")
    rows = batch(model.config.vocab_size)
    model = with_adapter(model, "text-generation")
    fused_is_theirs(sft, model, rows)
    plain = model(
        input_ids=rows.input_ids, attention_mask=rows.attention_mask, labels=rows.labels
    ).loss
    assert loss_and_gradients(sft, model, rows)[0] == pytest.approx(plain.item(), abs=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoders_loss_and_gradients_are_pefts(
    name: str, tiny_encoder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = SequenceClassifier(
        body(name, tiny_encoder, tmp_path / "base"), labels=3, pooling="mean"
    ).eval()
    rows = batch(model.config.vocab_size, labels=torch.tensor([0, 2]))
    fused_is_theirs(sequence_classification, with_adapter(model, "sequence-classification"), rows)


@pytest.mark.parametrize("name", DECODERS)
def test_texts_packed_into_one_row_do_not_see_each_other(
    name: str, tiny_decoder: Path, tmp_path: Path
) -> None:
    model = body(name, tiny_decoder, tmp_path / "base")
    ids = batch(model.config.vocab_size).input_ids[:1]
    together = Batch(ids, torch.ones_like(ids), ids, rows=(0,), tokens=TOKENS, targets=TOKENS - 1)
    packed = replace(together, position_ids=torch.tensor([[*range(8), *range(TOKENS - 8)]]))
    second = Batch(
        ids[:, 8:],
        torch.ones_like(ids[:, 8:]),
        ids[:, 8:],
        rows=(0,),
        tokens=TOKENS - 8,
        targets=TOKENS - 9,
    )
    with torch.no_grad():
        expected, got = completion_logits(model, second)[0], completion_logits(model, packed)[0][8:]
        with fused_ops(model):
            fused = completion_logits(model, packed)[0][8:]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(fused, expected, atol=1e-4, rtol=1e-4)


def test_all_linear_reaches_conv1d_and_packed_projections(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    expected = {
        "gpt2": {"c_attn", "c_proj", "c_fc"},
        "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    }
    for name, kinds in expected.items():
        found = target_names(body(name, tiny_decoder, tmp_path / name), "all-linear")
        assert {path.rpartition(".")[2] for path in found} == kinds and len(found) == 2 * 4
