"""The loss in pieces against cross entropy of all logits: value, gradients, and when it must not be
used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from training_helpers import adapted_decoder, decoder_batch

from edgetune.models.torch_device import autocast
from edgetune.objectives import projection
from edgetune.objectives.language import completion_logits, sft
from edgetune.objectives.projection import ProjectedCrossEntropy, can_fuse


def gradients_of(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bias", [True, False])
def test_the_function_passes_torchs_gradient_check(
    monkeypatch: pytest.MonkeyPatch, bias: bool
) -> None:
    monkeypatch.setattr(projection, "ROWS_AT_ONCE", 3)  # 7 rows: the last piece is smaller
    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(7, 5, dtype=torch.float64, requires_grad=True),
        torch.randn(11, 5, dtype=torch.float64),
    )
    offset, targets = (
        torch.randn(11, dtype=torch.float64) if bias else None,
        torch.randint(0, 11, (7,)),
    )

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        return ProjectedCrossEntropy.apply(hidden, weight, offset, targets)

    torch.testing.assert_close(
        loss(hidden).double(),
        F.cross_entropy(F.linear(hidden, weight, offset), targets),
        atol=1e-6,
        rtol=1e-6,
    )
    (ours,) = torch.autograd.grad(loss(hidden), hidden)
    (theirs,) = torch.autograd.grad(
        F.cross_entropy(F.linear(hidden, weight, offset), targets), hidden
    )
    torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-6)


def test_loss_and_gradients_are_those_of_all_logits(
    tiny_decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projection, "ROWS_AT_ONCE", 5)
    model, batch = adapted_decoder(tiny_decoder, tmp_path)
    logits, targets = completion_logits(model, batch)
    plain = F.cross_entropy(logits, targets)
    expected = gradients_of(model, plain)
    assert can_fuse(model)
    loss, count = sft(model, batch)
    gradients = gradients_of(model, loss)
    assert count == targets.numel()
    assert loss.item() == pytest.approx(plain.item(), abs=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)


def test_in_bf16_the_loss_is_autocasts(tiny_decoder: Path, tmp_path: Path) -> None:
    model, batch = adapted_decoder(tiny_decoder, tmp_path)
    with autocast("bf16"):
        logits, targets = completion_logits(model, batch)
        assert sft(model, batch)[0].item() == pytest.approx(
            F.cross_entropy(logits, targets).item(), abs=1e-4
        )


def test_the_projection_works_as_before_afterwards(tiny_decoder: Path, tmp_path: Path) -> None:
    model, batch = adapted_decoder(tiny_decoder, tmp_path)
    before, _ = completion_logits(model, batch)
    sft(model, batch)
    assert torch.equal(completion_logits(model, batch)[0], before)


def test_a_projection_that_learns_is_left_alone(tiny_decoder: Path, tmp_path: Path) -> None:
    model, _ = decoder_batch(tiny_decoder, tmp_path)
    assert not can_fuse(model)  # all weights learn


def test_logits_that_are_more_than_the_projection_are_left_alone(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    model, batch = adapted_decoder(tiny_decoder, tmp_path)
    body = model.get_base_model()
    forward = body.forward

    def capped(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = torch.tanh(output.logits)
        return output

    body.forward = capped
    assert not can_fuse(model)
    loss, _ = sft(model, batch)
    logits, targets = completion_logits(model, batch)
    assert loss.item() == pytest.approx(F.cross_entropy(logits, targets).item(), abs=1e-6)
