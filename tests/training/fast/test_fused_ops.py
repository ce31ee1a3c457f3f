"""The fused parts of a layer against transformers' own: loss and gradients, and what is left
alone.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_helpers import decoder_batch, parameters
from transformers import AutoModel
from transformers.models.llama import modeling_llama

from edgetune.adapters.lora import adapt
from edgetune.objectives.language import sft
from edgetune.training.fast import fused_layers as ops
from edgetune.training.fast.fused_layers import Attention, GatedSiLU, RMSNorm, Rotation, fused_ops
from edgetune.training.fast.lora_products import fused_lora


def loss_and_gradients(model: Any, batch: Any) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss, _ = sft(model, batch)
    loss.backward()
    return loss.item(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def test_loss_and_gradients_are_transformers(tiny_decoder: Path, tmp_path: Path) -> None:
    model, batch = decoder_batch(tiny_decoder, tmp_path)
    model = adapt(model, parameters(rank=4), task="text-generation")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    expected_loss, expected = loss_and_gradients(model, batch)
    with fused_lora(model, "fp32"), fused_ops(model) as counts:
        loss, gradients = loss_and_gradients(model, batch)
    layers = model.config.num_hidden_layers
    assert counts == {"norm": 2 * layers + 1, "gate": layers, "rotation": 1}
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)


def test_everything_is_put_back(tiny_decoder: Path, tmp_path: Path) -> None:
    model, batch = decoder_batch(tiny_decoder, tmp_path)
    before = modeling_llama.apply_rotary_pos_emb, model.config._attn_implementation
    expected = model(input_ids=batch.input_ids).logits
    with pytest.raises(KeyError), fused_ops(model):
        assert modeling_llama.apply_rotary_pos_emb is ops.rotate
        raise KeyError
    assert (modeling_llama.apply_rotary_pos_emb, model.config._attn_implementation) == before
    assert all("forward" not in vars(module) for module in model.modules())
    assert torch.equal(model(input_ids=batch.input_ids).logits, expected)


def test_a_trained_norm_gets_its_gradient(tiny_decoder: Path, tmp_path: Path) -> None:
    model, batch = decoder_batch(tiny_decoder, tmp_path)
    model.requires_grad_(True)
    _, expected = loss_and_gradients(model, batch)
    with fused_ops(model):
        _, gradients = loss_and_gradients(model, batch)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)


def test_padding_is_never_attended_to_by_an_encoder(tiny_encoder: Path) -> None:
    model = AutoModel.from_pretrained(tiny_encoder).eval()
    ids, mask = torch.randint(5, 100, (3, 9)), torch.ones(3, 9, dtype=torch.int64)
    mask[0, 4:] = mask[1, 7:] = 0
    expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
    with fused_ops(model):
        result = model(input_ids=ids, attention_mask=mask).last_hidden_state
    for row, length in enumerate((4, 7, 9)):
        torch.testing.assert_close(
            result[row, :length], expected[row, :length], atol=1e-5, rtol=1e-4
        )


def test_long_rows_go_to_torchs_attention(
    tiny_decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = decoder_batch(tiny_decoder, tmp_path)
    expected = model(input_ids=batch.input_ids).logits
    monkeypatch.setattr(ops, "SHORT", 2)
    monkeypatch.setattr(ops.Attention, "apply", None)
    with fused_ops(model):
        torch.testing.assert_close(model(input_ids=batch.input_ids).logits, expected)


def test_a_module_that_computes_something_else_is_left_alone(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    class OneMoreRMSNorm(modeling_llama.LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) + hidden_states

    class OtherMLP(modeling_llama.LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))  # type: ignore[no-any-return]

    model, _ = decoder_batch(tiny_decoder, tmp_path)
    for module in model.modules():
        if isinstance(module, modeling_llama.LlamaRMSNorm):
            module.__class__ = OneMoreRMSNorm
        if isinstance(module, modeling_llama.LlamaMLP):
            module.__class__ = OtherMLP
    with fused_ops(model) as counts:
        assert counts["norm"] == counts["gate"] == 0


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_the_functions_pass_torchs_gradient_check() -> None:
    torch.manual_seed(0)
    weight, angle = torch.rand(6, dtype=torch.float64), torch.rand(2, 1, 3, 4, dtype=torch.float64)
    cos, sin = (torch.cat([f(angle)] * 2, dim=-1) for f in (torch.cos, torch.sin))
    assert torch.autograd.gradcheck(lambda x: RMSNorm.apply(x, weight, 1e-5), (numbers(2, 3, 6),))
    assert torch.autograd.gradcheck(lambda x: Rotation.apply(x, cos, sin), (numbers(2, 5, 3, 8),))
    assert torch.autograd.gradcheck(GatedSiLU.apply, (numbers(3, 4), numbers(3, 4)))


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2)])
def test_attention_is_scaled_dot_product_attention(heads: int, kv_heads: int) -> None:
    torch.manual_seed(0)
    given = [torch.randn(2, n, 7, 8, requires_grad=True) for n in (heads, kv_heads, kv_heads)]
    reference = [copy.deepcopy(x.detach()).requires_grad_() for x in given]
    hidden = torch.ones(7, 7, dtype=torch.bool).triu(1)
    ours = Attention.apply(*given, hidden, 0.3)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *reference, is_causal=True, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(ours, theirs.transpose(1, 2), atol=1e-6, rtol=1e-5)
    grad = torch.randn_like(ours)
    ours.backward(grad)
    theirs.backward(grad.transpose(1, 2))
    for mine, other in zip(given, reference, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-4)
