"""Tokens that rows of a batch have in common at their beginning go through a decoder's layers once.

With causal attention a token's states depend on what stands before it alone: two answers to one
prompt, a group's samples, or rows that begin with one system prompt have the same states there, and
the same weights' gradients add up there. So the batch is laid out as one row in which every such
token stands once, without padding; only attention sees the rows as they were. Loss and gradient are
those of the padded batch (Krishna Teja et al. 2024, "Prefix Sharing", for pairs of answers; here
for any rows). With dropout the common tokens share its mask. A layer that is computed again in the
backward pass (gradient checkpointing) would not find the rows; the loop has no such thing.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.data.batching import Batch
from edgetune.models.heads import RewardModel, unwrapped
from edgetune.objectives.language import BLIND_TO_PACKING

# at most this share of the padded tokens is left; gathering and scattering cost a few in a hundred
WORTH_IT = 0.9
TOLERANCE, TOLERANCE_BF16 = 1e-4, 0.03  # of the largest state
ATTENTION = "edgetune_training"  # attention that knows of the rows; see `fused_ops`
# settings by which a token may not see a row's first ones
WINDOWS = ("sliding_window", "attention_chunk_size")


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """A batch (rows, seq) as one row of `tokens` different ones."""

    input_ids: Tensor  # (1, tokens)
    position_ids: Tensor  # (1, tokens)
    place: Tensor  # (rows · seq,) where a position's token stands in the one row; 0 for padding
    source: Tensor  # (tokens,) a position of the batch that each token comes from
    shape: tuple[int, int]  # (rows, seq)

    def spread(self, x: Tensor) -> Tensor:
        """(tokens, …) → (rows, seq, …); gradients of a token's positions add up."""
        return _Spread.apply(x.flatten(1), self.place).view(*self.shape, *x.shape[1:])  # type: ignore[no-any-return]

    def gathered(self, x: Tensor) -> Tensor:
        """(rows, seq, …) → (tokens, …): a token's state from one of its positions."""
        flat = x.flatten(0, 1)
        return _Spread.apply(flat.flatten(1), self.source).view(-1, *flat.shape[1:])  # type: ignore[no-any-return]


class _Spread(torch.autograd.Function):
    """index_select of rows whose backward pass is torch's scatter_add for one index a row: many
    times faster than index_add.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor) -> Tensor:
        """(tokens, width) → (positions, width)."""
        ctx.save_for_backward(place)
        ctx.tokens = len(x)
        return x.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """The sum over a token's positions; those of padding are zero, because nothing reads what
        they give.
        """
        (place,) = ctx.saved_tensors
        (grad,) = grads
        total = grad.new_zeros(ctx.tokens, grad.shape[1])
        return total.scatter_add_(0, place[:, None].expand_as(grad), grad), None


def shared_prefixes(input_ids: Tensor, lengths: Tensor) -> SharedPrefixes:
    """Right-padded rows (rows, seq) with `lengths` (rows,) real tokens → each distinct beginning
    once.

    Among sorted rows, the longest beginning that a row has in common with any before it is the one
    with its neighbour.
    """
    rows, seq = input_ids.shape
    ids = input_ids.masked_fill(
        torch.arange(seq, device=input_ids.device) >= lengths[:, None], -1
    ).cpu()
    order = sorted(range(rows), key=ids.tolist().__getitem__)
    in_order = ids[order]
    same = (in_order[1:] == in_order[:-1]) & (in_order[1:] >= 0)
    common = [0, *same.cumprod(1).sum(1).tolist()]
    place = torch.zeros_like(ids)
    source: list[Tensor] = []
    tokens = 0
    for before, (row, kept) in zip([None, *order], zip(order, common, strict=True), strict=False):
        new = max(0, int(lengths[row]) - kept)
        if before is not None:
            place[row, :kept] = place[before, :kept]
        place[row, kept : kept + new] = torch.arange(tokens, tokens + new)
        source.append(row * seq + torch.arange(kept, kept + new))
        tokens += new
    at = torch.cat(source).to(input_ids.device)
    return SharedPrefixes(
        input_ids.flatten()[at][None],
        (at % seq)[None],
        place.flatten().to(input_ids.device),
        at,
        (rows, seq),
    )


_now: SharedPrefixes | None = None


def shared_now() -> SharedPrefixes | None:
    """What the forward pass under way shares; attention asks."""
    return _now


@contextlib.contextmanager
def prefixes_shared(model: Any, batch: Batch) -> Iterator[None]:
    """Let a decoder's body compute what the batch's rows begin with in common once, where that pays
    and gives the same.

    To be entered inside `fused_ops`, whose attention knows of it; elsewhere nothing is shared.
    """
    shared = worth_sharing(model, batch)
    if shared is None:
        yield
        return
    body = _body(model)
    own = vars(body).get("forward")
    body.forward = _forward(body, shared, batch.input_ids)
    try:
        yield
    finally:
        if own is None:
            del body.forward
        else:
            body.forward = own


def may_share(model: Any, longest: int) -> bool:
    """Whether rows of at most `longest` tokens that share a prefix had better stand in one batch of
    this model's.
    """
    body = _body(model)
    if (
        body is None
        or next(body.parameters()).device.type != "cpu"
        or body.config.model_type in BLIND_TO_PACKING
    ):
        return False
    windows = [getattr(body.config, name, None) for name in WINDOWS]
    inner = vars(body.config).get("_attn_implementation_internal")
    return inner in ("sdpa", ATTENTION) and all(
        window is None or window >= longest for window in windows
    )


def worth_sharing(model: Any, batch: Batch) -> SharedPrefixes | None:
    """The batch as one row; None where that saves too little, or the model would give something
    else.
    """
    body = _body(model)
    if (
        batch.position_ids is not None
        or batch.features is not None
        or not may_share(model, batch.input_ids.shape[1])
    ):
        return None
    if vars(body.config)["_attn_implementation_internal"] != ATTENTION or not _gives_the_same(body):
        return None
    shared = shared_prefixes(batch.input_ids, batch.attention_mask.sum(1))
    return shared if shared.input_ids.numel() <= WORTH_IT * batch.input_ids.numel() else None


def _body(model: Any) -> Any:
    """A causal or masked language model without its head; None for everything else."""
    whole = unwrapped(model)
    if isinstance(whole, RewardModel):
        return whole.body
    causal = (
        getattr(whole, "base_model", whole) is not whole and not whole.config.is_encoder_decoder
    )
    return whole.base_model if causal and whole.get_output_embeddings() is not None else None


def _forward(body: Any, shared: SharedPrefixes, expected: Tensor) -> Callable[..., Any]:
    """The body's forward pass over the one row, its last states given back as the batch's."""
    original = body.forward

    def forward(input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        global _now
        given = {
            name
            for name, value in kwargs.items()
            if value is not None and name not in ("use_cache", "return_dict")
        }
        if input_ids is not expected or given or kwargs.get("use_cache"):
            return original(input_ids=input_ids, **kwargs)
        _now = shared
        try:
            output = original(
                input_ids=shared.input_ids, position_ids=shared.position_ids, use_cache=False
            )
        finally:
            _now = None
        output.last_hidden_state = shared.spread(output.last_hidden_state[0])
        return output

    return forward


_same: weakref.WeakKeyDictionary[nn.Module, dict[bool, bool]] = weakref.WeakKeyDictionary()


def _gives_the_same(body: Any) -> bool:
    """Found out once for each model and format of products, on three short rows; whatever raises is
    not the same.

    Attention of a model's own, say, would not know of the rows.
    """
    narrow = torch.is_autocast_enabled("cpu")
    known = _same.setdefault(body, {})
    if narrow not in known:
        looks_back = [module.is_causal for module in body.modules() if hasattr(module, "is_causal")]
        reads_positions = "position_ids" in inspect.signature(type(body).forward).parameters
        known[narrow] = (
            bool(looks_back)
            and all(looks_back)
            and reads_positions
            and _compared(body, TOLERANCE_BF16 if narrow else TOLERANCE)
        )
    return known[narrow]


@torch.no_grad()
def _compared(body: Any, tolerance: float) -> bool:
    """Whether three rows' states are the same as one row's; no random number is drawn."""
    lengths = torch.tensor([6, 5, 4])
    real, training = (
        torch.arange(6) < lengths[:, None],
        [module for module in body.modules() if module.training],
    )
    body.eval()
    try:
        ids = (
            torch.tensor([[5, 6, 7, 8, 9, 5], [5, 6, 7, 9, 9, 0], [5, 6, 3, 3, 0, 0]])
            % body.config.vocab_size
        )
        expected = body(input_ids=ids, use_cache=False).last_hidden_state
        got = _forward(body, shared_prefixes(ids, lengths), ids)(
            input_ids=ids, use_cache=False
        ).last_hidden_state
        return torch.allclose(
            got[real], expected[real], atol=tolerance * float(expected.abs().max()), rtol=0
        )
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError):
        return False
    finally:
        for module in training:
            module.training = True
