"""Rows that share a prefix: each distinct token goes through the layers once, and loss and
gradients stay the padded batch's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from family_helpers import DECODERS, ENCODERS, body, loss_and_gradients, make_family, with_adapter
from torch import Tensor

from edgetune.data.batching import IGNORE, Batch
from edgetune.models.base import open_folder
from edgetune.models.heads import RewardModel, SequenceClassifier, unwrapped
from edgetune.models.load import load_body
from edgetune.models.masked_lm import load_masked_lm
from edgetune.models.torch_device import autocast, hold_frozen_linears_in_bf16
from edgetune.objectives.language import sft
from edgetune.training.fast.fused_layers import fused_ops
from edgetune.training.fast.memory import computing
from edgetune.training.fast.shared_prefix import (
    SharedPrefixes,
    may_share,
    shared_now,
    shared_prefixes,
    worth_sharing,
)

WINDOW = 6  # of the tiny families that have one
# eager attention because of its soft-cap; positions that come out of a mask
PADDED = ("gemma2", "opt")


def rows_of(rows: list[list[int]], *, labels_from: int = 0) -> Batch:
    """Right-padded rows with a label everywhere from `labels_from` on."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [2] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    labels = ids.masked_fill((mask == 0) | (torch.arange(longest) < labels_from), IGNORE)
    return Batch(
        ids,
        mask,
        labels,
        rows=tuple(range(len(rows))),
        tokens=int(mask.sum()),
        targets=int((labels[:, 1:] != IGNORE).sum()),
    )


def alike(vocabulary: int, *, prompt: int, answers: tuple[int, ...], seed: int = 0) -> Batch:
    """Answers of these lengths to one prompt, one of them twice and one row that shares nothing."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda count: torch.randint(5, vocabulary, (count,), generator=generator).tolist()  # noqa: E731
    start = draw(prompt)
    rows = [start + draw(count) for count in answers]
    return rows_of([*rows, rows[0], draw(prompt)], labels_from=prompt)


def tokens_computed(model: Any, run: Any) -> list[int]:
    """The tokens that each call of the embedding saw while `run` ran."""
    seen: list[int] = []
    embedding = unwrapped(model).get_input_embeddings()
    hook = embedding.register_forward_hook(
        lambda _module, inputs, _output: seen.append(inputs[0].numel())
    )
    try:
        run()
    finally:
        hook.remove()
    return seen


def test_every_distinct_beginning_stands_once() -> None:
    batch = rows_of([[7, 8, 9], [7, 8, 5, 6], [3], [7, 8, 9], [7, 8, 9, 4]])
    shared = shared_prefixes(batch.input_ids, batch.attention_mask.sum(1))
    assert sorted(
        zip(shared.position_ids[0].tolist(), shared.input_ids[0].tolist(), strict=True)
    ) == [
        (0, 3),
        (0, 7),
        (1, 8),
        (2, 5),
        (2, 9),
        (3, 4),
        (3, 6),
    ]
    real = batch.attention_mask.bool()
    assert torch.equal(
        shared.spread(shared.input_ids[0][:, None].float())[real][:, 0].long(),
        batch.input_ids[real],
    )
    assert torch.equal(shared.gathered(batch.input_ids[..., None])[:, 0], shared.input_ids[0])


def test_gradients_of_a_shared_token_add_up() -> None:
    batch = rows_of([[7, 8, 9], [7, 8, 5], [7]])
    shared = shared_prefixes(batch.input_ids, batch.attention_mask.sum(1))
    x = torch.ones(shared.input_ids.numel(), 2, requires_grad=True)
    (shared.spread(x) * batch.attention_mask[..., None]).sum().backward()
    counts = dict(zip(shared.input_ids[0].tolist(), x.grad[:, 0].tolist(), strict=True))  # type: ignore[index]
    assert counts == {7: 3, 8: 2, 9: 1, 5: 1}


@pytest.mark.parametrize("name", DECODERS)
def test_loss_and_gradients_are_those_of_the_padded_rows(
    name: str, tiny_decoder: Path, tmp_path: Path
) -> None:
    model = with_adapter(body(name, tiny_decoder, tmp_path / "base"), "text-generation")
    batch = alike(model.config.vocab_size, prompt=3, answers=(3, 2, 1, 3))
    assert batch.input_ids.shape[1] == WINDOW
    expected_loss, expected = loss_and_gradients(sft, model, batch)
    losses: list[Any] = []

    def run() -> None:
        with computing(model, batch, "fp32"):
            losses.append(loss_and_gradients(sft, model, batch))

    run()  # whether a model can share is found out once
    computed = tokens_computed(model, run)
    shared = max(computed) < batch.tokens - 6
    assert shared == (unwrapped(model).config.model_type not in PADDED), (
        f"{computed} of {batch.tokens} tokens computed"
    )
    for loss, gradients in losses:
        assert (
            loss == pytest.approx(expected_loss, abs=1e-5) and gradients.keys() == expected.keys()
        )
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[parameter], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("prompt", [20, 200])  # attention of our own, and torch's
def test_long_rows_too_and_every_weight(prompt: int, tiny_decoder: Path, tmp_path: Path) -> None:
    model = body("llama", tiny_decoder, tmp_path / "base")
    batch = alike(model.config.vocab_size, prompt=prompt, answers=(9, 30, 4))
    expected_loss, expected = loss_and_gradients(sft, model, batch)
    with computing(model, batch, "fp32"):
        loss, gradients = loss_and_gradients(sft, model, batch)
        assert loss_and_gradients(sft, model, batch)[0] == loss, "the same batch, the same bits"
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=2e-5, rtol=1e-3)


def test_with_products_in_bf16_as_well(tiny_decoder: Path, tmp_path: Path) -> None:
    model = with_adapter(body("llama", tiny_decoder, tmp_path / "base"), "text-generation")
    hold_frozen_linears_in_bf16(model)
    batch = alike(model.config.vocab_size, prompt=20, answers=(9, 6, 4))
    losses: list[float] = []

    def run() -> None:
        with computing(model, batch, "bf16"):
            losses.append(loss_and_gradients(sft, model, batch)[0])

    run()
    assert max(tokens_computed(model, run)) < batch.tokens - 20
    with autocast("bf16"):
        assert losses[0] == pytest.approx(loss_and_gradients(sft, model, batch)[0], rel=0.01)


def test_rewards_of_pairs(tiny_decoder: Path, tmp_path: Path) -> None:
    model = RewardModel(body("llama", tiny_decoder, tmp_path / "base"))
    batch = alike(model.config.vocab_size, prompt=12, answers=(3, 8, 5))

    def rewards(model: Any, rows: Batch) -> tuple[Tensor, int]:
        return model(input_ids=rows.input_ids, attention_mask=rows.attention_mask).square().sum(), 1

    expected_loss, expected = loss_and_gradients(rewards, model, batch)
    with computing(model, batch, "fp32"):
        computed = tokens_computed(model.body, lambda: loss_and_gradients(rewards, model, batch))
        loss, gradients = loss_and_gradients(rewards, model, batch)
    assert computed[-1] < batch.tokens - 12
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_never_shares(name: str, tiny_encoder: Path, tmp_path: Path) -> None:
    base = open_folder(make_family(name, tiny_encoder, tmp_path / "base"), name=name)
    classifier = SequenceClassifier(load_body(base), labels=3, pooling="mean").eval()
    batch = alike(classifier.config.vocab_size, prompt=8, answers=(3, 2))
    models: list[Any] = [classifier, load_masked_lm(base, seed=0)[0].eval()]
    for model in models:
        with torch.no_grad(), fused_ops(model):
            assert worth_sharing(model, batch) is None


def shares(model: Any, batch: Batch) -> bool:
    """Whether fewer tokens than the batch's padded ones go through the layers; the logits must be
    those without.
    """
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=batch.input_ids, use_cache=False).logits
        got: list[Tensor] = []
        with computing(model, batch, "fp32"):
            computed = tokens_computed(
                model, lambda: got.append(model(input_ids=batch.input_ids, use_cache=False).logits)
            )
    real = batch.attention_mask.bool()
    torch.testing.assert_close(got[0][real], expected[real], atol=2e-5, rtol=1e-4)
    return computed[-1] < batch.input_ids.numel()


def test_rows_beyond_a_window_stay_padded(tiny_decoder: Path, tmp_path: Path) -> None:
    model = body("mistral", tiny_decoder, tmp_path / "base")
    size = model.config.vocab_size
    assert shares(model, alike(size, prompt=WINDOW - 2, answers=(2, 1, 2)))
    assert not shares(model, alike(size, prompt=WINDOW - 2, answers=(3, 1, 2)))
    assert may_share(model, WINDOW) and not may_share(model, WINDOW + 1)


def test_rows_unlike_each_other_stay_padded(tiny_decoder: Path, tmp_path: Path) -> None:
    model = body("llama", tiny_decoder, tmp_path / "base")
    assert shares(model, rows_of([[5, 6, 7, 8], [5, 6, 7, 9]]))
    assert not shares(model, rows_of([[5, *range(6, 17)], [5, *range(26, 37)]])), (
        "one token of 24 is not worth it"
    )


def test_a_model_that_gives_something_else_stays_padded(
    tiny_decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = (
        body("llama", tiny_decoder, tmp_path / "base"),
        body("llama", tiny_decoder, tmp_path / "other"),
    )
    batch = alike(model.config.vocab_size, prompt=20, answers=(3, 2))
    with monkeypatch.context() as patch:
        patch.setattr(
            SharedPrefixes, "gathered", lambda _self, x: x.flatten(0, 1)[: x.shape[1]]
        )  # attention gone wrong
        assert not shares(model, batch)
    assert shares(other, batch)


def test_attention_of_another_kind_knows_nothing_of_the_rows(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    model = body("llama", tiny_decoder, tmp_path / "base")
    batch = alike(model.config.vocab_size, prompt=20, answers=(3, 2))
    assert worth_sharing(model, batch) is None  # outside `fused_ops`
    assert shares(model, batch)  # which was not remembered
    model.set_attn_implementation("eager")
    assert not shares(model, batch) and not may_share(model, 8)


def test_a_pass_over_other_rows_inside_is_left_alone(tiny_decoder: Path, tmp_path: Path) -> None:
    model = body("llama", tiny_decoder, tmp_path / "base").eval()
    batch = alike(model.config.vocab_size, prompt=20, answers=(3, 2))
    other = batch.input_ids.flip(1).clone()
    with torch.no_grad():
        expected = model(input_ids=other, use_cache=False).logits
        with computing(model, batch, "fp32"):
            torch.testing.assert_close(
                model(input_ids=other, use_cache=False).logits, expected, atol=1e-5, rtol=1e-4
            )


def test_an_error_inside_leaves_nothing_behind(tiny_decoder: Path, tmp_path: Path) -> None:
    model = body("llama", tiny_decoder, tmp_path / "base").eval()
    batch = alike(model.config.vocab_size, prompt=20, answers=(3, 2))
    assert shares(model, batch)

    def fail(*_: Any) -> None:
        raise KeyError("inside")

    hook = model.base_model.layers[1].register_forward_hook(fail)
    with torch.no_grad(), pytest.raises(KeyError), computing(model, batch, "fp32"):
        model(input_ids=batch.input_ids, use_cache=False)
    hook.remove()
    assert shared_now() is None and "forward" not in vars(model.base_model)
    assert shares(model, batch)
