"""The fused LoRA layer against PEFT's own forward: outputs and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import adapted_decoder

from edgetune.models.torch_device import autocast, hold_frozen_linears_in_bf16
from edgetune.objectives.language import completion_logits, sft
from edgetune.training.fast.lora_products import LoraProducts, fused_lora


def loss_and_gradients(model: Any, batch: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss, _ = sft(model, batch)
    loss.backward()
    return loss.item(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize(
    "settings",
    [{}, {"rslora": True}, {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"v_proj": 3.0}}],
)
def test_loss_and_gradients_are_pefts(
    tiny_decoder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    model, batch = adapted_decoder(tiny_decoder, tmp_path, **settings)
    expected_loss, expected = loss_and_gradients(model, batch)
    with fused_lora(model, "fp32") as layers:
        loss, gradients = loss_and_gradients(model, batch)
    assert layers == 14
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)


def test_in_bf16_it_is_as_near_to_fp32_as_autocast(tiny_decoder: Path, tmp_path: Path) -> None:
    model, batch = adapted_decoder(tiny_decoder, tmp_path)
    exact, _ = completion_logits(model, batch)
    hold_frozen_linears_in_bf16(model)
    with autocast("bf16"):
        theirs = (completion_logits(model, batch)[0] - exact).norm()
        with fused_lora(model, "bf16"):
            ours = (completion_logits(model, batch)[0] - exact).norm()
    assert ours < 1.5 * theirs


def test_the_function_passes_torchs_gradient_check() -> None:
    torch.manual_seed(0)
    x, w, c, a, b = (
        torch.randn(*shape, dtype=torch.float64)
        for shape in ((2, 3, 5), (4, 5), (4,), (2, 5), (4, 2))
    )
    inputs = tuple(t.requires_grad_() for t in (x, a, b))

    def product(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return LoraProducts.apply(x, x.detach(), [0.7], w, c, a, b)[0]

    expected = x @ w.T + c + 0.7 * (x @ a.T) @ b.T
    torch.testing.assert_close(product(*inputs), expected)
    assert torch.autograd.gradcheck(product, inputs)


@pytest.mark.parametrize("settings", [{"dropout": 0.1}, {"dora": True}])
def test_layers_with_dropout_or_dora_keep_pefts_forward(
    tiny_decoder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    model, _ = adapted_decoder(tiny_decoder, tmp_path, **settings)
    with fused_lora(model, "fp32") as layers:
        assert layers == 0


def test_a_disabled_adapter_stays_disabled(tiny_decoder: Path, tmp_path: Path) -> None:
    model, batch = adapted_decoder(tiny_decoder, tmp_path)
    with model.disable_adapter():
        expected, _ = completion_logits(model, batch)
        with fused_lora(model, "fp32"):
            assert torch.equal(completion_logits(model, batch)[0], expected)


def test_afterwards_the_layers_are_pefts_again(tiny_decoder: Path, tmp_path: Path) -> None:
    model, _ = adapted_decoder(tiny_decoder, tmp_path)
    with fused_lora(model, "fp32"):
        pass
    assert all("forward" not in vars(module) for module in model.modules())


def test_layers_that_read_different_x_are_on_their_own(tiny_decoder: Path, tmp_path: Path) -> None:
    model, _ = adapted_decoder(tiny_decoder, tmp_path)
    block = model.get_base_model().model.layers[0].self_attn
    first, second = (
        torch.randn(2, 3, block.q_proj.in_features),
        torch.randn(2, 3, block.q_proj.in_features),
    )
    expected = [
        block.q_proj(first),
        block.k_proj(second),
        block.v_proj(second),
        block.q_proj(second),
    ]
    with fused_lora(model, "fp32"):
        given = [
            block.q_proj(first),
            block.k_proj(second),
            block.v_proj(second),
            block.q_proj(second),
        ]
    torch.testing.assert_close(given, expected)


def test_an_x_that_was_changed_in_place_is_computed_anew(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    model, _ = adapted_decoder(tiny_decoder, tmp_path)
    block = model.get_base_model().model.layers[0].self_attn
    x = torch.randn(2, 3, block.q_proj.in_features)
    with fused_lora(model, "fp32"):
        block.q_proj(x)
        x.mul_(2)
        given = block.k_proj(x)
    torch.testing.assert_close(given, block.k_proj(x))
