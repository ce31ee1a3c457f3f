"""Next-token loss without the logits of all positions: hidden states go through the output
projection in pieces.

The logits of a small model are its largest tensor (49,152 numbers a token), and cross entropy keeps
three of that size. Here a piece of rows is projected, its loss and its gradient with respect to the
hidden states are taken at once, and the piece is forgotten: the idea of Liger's fused linear cross
entropy (Hsu et al. 2024, arXiv:2410.10989), for a frozen projection and without a kernel of its
own.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

ROWS_AT_ONCE = 128  # 25 MB of fp32 logits at a vocabulary of 49,152


class ProjectedCrossEntropy(torch.autograd.Function):
    """mean over rows of -log softmax(h Wᵀ + b)[target]: h (rows, hidden), W (vocab, hidden) and b
    frozen.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        """`hidden` in any format; products in the format of `weight`, softmax in fp32."""
        gradient = torch.empty_like(hidden, dtype=weight.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        shape = min(ROWS_AT_ONCE, len(hidden)), len(weight)
        products, scores = (
            hidden.new_empty(shape, dtype=weight.dtype),
            hidden.new_empty(shape, dtype=_wide(weight)),
        )
        for start in range(0, len(hidden), ROWS_AT_ONCE):
            rows, wanted = (
                hidden[start : start + ROWS_AT_ONCE].to(weight.dtype),
                targets[start : start + ROWS_AT_ONCE, None],
            )
            product, score = products[: len(rows)], scores[: len(rows)]  # (piece, vocab)
            torch.mm(rows, weight.T, out=product)
            if bias is not None:
                product += bias
            total += _losses_to_gradient(score.copy_(product), wanted).sum()
            torch.mm(product.copy_(score), weight, out=gradient[start : start + ROWS_AT_ONCE])
        ctx.save_for_backward(gradient)
        ctx.dtype = hidden.dtype
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the hidden states is there already."""
        (gradient,) = ctx.saved_tensors
        return (gradient * (grads[0] / len(gradient))).to(ctx.dtype), None, None, None


def _losses_to_gradient(scores: Tensor, wanted: Tensor) -> Tensor:
    """-log softmax(scores)[wanted], a number a row; `scores` becomes its gradient, softmax(scores)
    less 1 at `wanted`.

    torch's softmax is several times faster than its log_softmax, so the logarithm of the sum is
    taken back from the largest probability, which is never small.
    """
    largest, score = scores.amax(-1), scores.gather(1, wanted).squeeze(1)
    torch.softmax(scores, -1, out=scores)
    log_sum = largest - scores.amax(-1).log()
    scores.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=scores.dtype))
    return log_sum - score


def _wide(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


@contextlib.contextmanager
def projection_captured(model: Any, labelled: Tensor) -> Iterator[list[Tensor]]:
    """Let a forward pass stop before the output projection; afterwards the list holds the hidden
    states (targets, hidden) where `labelled` (batch, seq) is true."""
    positions = labelled.flatten().nonzero().squeeze(1)
    captured: list[Tensor] = []
    head = model.get_output_embeddings()

    def capture(hidden: Tensor) -> Tensor:
        captured.append(hidden.flatten(0, 1).index_select(0, positions))
        return hidden.new_zeros(1, 1, 1)

    head.forward = capture
    try:
        yield captured
    finally:
        del head.forward


def projected_loss(model: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of `targets` (targets,) given the hidden states (targets, hidden);
    products in autocast's format.
    """
    head, kind = model.get_output_embeddings(), hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    bias = None if head.bias is None else head.bias.to(dtype)
    weight = _in_format(head, dtype)
    with torch.autocast(kind, enabled=False):
        loss: Tensor = ProjectedCrossEntropy.apply(hidden, weight, bias, targets)
    return loss


_cast: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[int, int], Tensor]] = (
    weakref.WeakKeyDictionary()
)


def _in_format(head: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The frozen projection's weight in `dtype`: one that is tied to the embedding stays fp32, and
    is converted once.
    """
    if head.weight.dtype == dtype:
        return head.weight
    state = head.weight.data_ptr(), head.weight._version
    if head not in _cast or _cast[head][0] != state or _cast[head][1].dtype != dtype:
        _cast[head] = state, head.weight.detach().to(dtype)
    return _cast[head][1]


def can_fuse(model: Any) -> bool:
    """Whether a training pass may leave the projection to `ProjectedCrossEntropy`: it is frozen,
    plain, and what it gives are the model's logits (no soft-cap, no scale)."""
    head = model.get_output_embeddings() if torch.is_grad_enabled() else None
    frozen = type(head) is nn.Linear and not any(p.requires_grad for p in head.parameters())
    return frozen and _logits_are_the_projection(model)


_plain: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def _logits_are_the_projection(model: Any) -> bool:
    """Found out once for each model, on two tokens."""
    if model not in _plain:
        given: list[Tensor] = []
        head = model.get_output_embeddings()
        hook = head.register_forward_hook(lambda _module, _inputs, output: given.append(output))
        ids = torch.zeros(1, 2, dtype=torch.long, device=head.weight.device)
        answer = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                logits = model(input_ids=ids, **answer, use_cache=False).logits
        finally:
            hook.remove()
        _plain[model] = (
            len(given) == 1
            and logits.shape == given[0].shape
            and bool(torch.equal(logits, given[0]))
        )
    return _plain[model]
