"""DeBERTa's attention while a model is traced: scores of relative positions as the bias of one
`MultiHeadAttention`.

A layer applies the query and key projections of its states to the embedding of relative positions
too (He et al. 2021, arXiv 2006.03654, eq. 4). The base's own product with that embedding is the
same for every text: it is one node `edgetune::LinearRows`, which becomes a table of rows, and only
what an adapter adds to it is computed. A text of S tokens takes the rows of the 2S - 1 distances
that its tokens can have; which row belongs to a distance, the model's own code says once for all of
them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.onnx.ops as onnx_ops
from torch import Tensor, nn

from edgetune.export.graph.attention import now
from edgetune.export.graph.symbolic_layers import DOMAIN

LINEAR_ROWS = "LinearRows"


class Distances(nn.Module):
    """The relative positions of an encoder for texts of up to `max_length` tokens."""

    embedding: Tensor
    """(rows, hidden), as the layers project it"""
    rows: Tensor
    """(2 · max_length - 1,): the row of the distance 1 - max_length … max_length - 1 of a query
    from its key
    """
    scale: Tensor

    def __init__(self, body: nn.Module, max_length: int) -> None:
        super().__init__()
        encoder, attention = _encoder(body), next(found for _, found in _attentions(body))
        span, self.heads = int(attention.pos_ebd_size), int(attention.num_attention_heads)
        one, all_of_them = torch.zeros(1, 1, 1), torch.zeros(1, max_length, 1)
        with torch.no_grad():
            before, after = (
                encoder.get_rel_pos(all_of_them, one),
                encoder.get_rel_pos(one, all_of_them),
            )  # (1, queries, keys)
            embedding = encoder.get_rel_embedding()[: 2 * span]
        rows = torch.cat([before[0, 0].flip(0), after[0, 1:, 0]]) + span
        self.register_buffer("embedding", embedding.detach().contiguous(), persistent=False)
        self.register_buffer("rows", rows.clamp(0, 2 * span - 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_scale(attention)), persistent=False)

    @contextlib.contextmanager
    def swapped(self, body: nn.Module) -> Iterator[None]:
        """The body's attention, and what it is told of positions, as they are traced."""
        encoder = _encoder(body)
        changed: dict[nn.Module, dict[str, Any]] = {
            encoder: {"get_rel_pos": self._places, "get_rel_embedding": self._near}
        }
        changed |= {
            module: {"forward": _Attend(module, path)} for path, module in _attentions(body)
        }
        for module, methods in changed.items():
            vars(module).update(methods)
        try:
            yield
        finally:
            for module, methods in changed.items():
                for name in methods:
                    del vars(module)[name]

    def _places(self, hidden_states: Tensor, *_: Any) -> Tensor:
        """Of each query from each key, its place among the distances of this text: (B, heads, S,
        S).
        """
        batch, seq = hidden_states.shape[:2]
        place = torch.arange(seq)
        self.seq = seq
        return (place[:, None] - place[None, :] + (seq - 1)).expand(batch, self.heads, seq, seq)

    def _near(self) -> tuple[Tensor, Tensor, Tensor]:
        """The embedding, its rows (1, 2S - 1) for the distances of this text, and what scores are
        multiplied with.
        """
        first = self.rows.shape[0] // 2 + 1 - self.seq
        return self.embedding, self.rows[torch.arange(2 * self.seq - 1) + first][None], self.scale


class _Attend:
    """The forward of a `DisentangledSelfAttention` whose scores, but for those of positions, are
    one node.
    """

    def __init__(self, module: Any, path: str) -> None:
        self.module, self.path = module, path

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        *_: Any,
        relative_pos: Tensor,
        rel_embeddings: tuple[Tensor, Tensor, Tensor],
        **__: Any,
    ) -> tuple[Tensor, None]:
        """(B, S, hidden) → (B, S, heads · width)."""
        own, heads, batch = self.module, self.module.num_attention_heads, hidden_states.shape[0]
        q, k, v = (
            own.query_proj(hidden_states),
            own.key_proj(hidden_states),
            own.value_proj(hidden_states),
        )
        embedding, rows, scale = rel_embeddings
        far_q, far_k = (
            _rows(getattr(own, name), embedding, rows, batch=batch, module=f"{self.path}.{name}")
            for name in ("query_proj", "key_proj")
        )
        query, key, far_query, far_key = (_by_head(x, heads) for x in (q, k, far_q, far_k))
        to_position = torch.gather(query @ far_key.transpose(-1, -2), -1, relative_pos)
        from_position = torch.gather(far_query @ key.transpose(-1, -2), -2, relative_pos)
        bias = (to_position + from_position) * scale
        out = onnx_ops.symbolic(
            "com.microsoft::MultiHeadAttention",
            [q, k, v, None, now.mask, bias],
            attrs={"num_heads": heads, "scale": _scale(own)},
            dtype=q.dtype,
            shape=q.shape,
            version=1,
        )
        return out, None


def _scale(attention: Any) -> float:
    """Scores are of three kinds, and divided by √(3 · width)."""
    return float((3 * attention.attention_head_size) ** -0.5)


def _rows(linear: Any, embedding: Tensor, rows: Tensor, *, batch: int, module: str) -> Tensor:
    """One node for linear(embedding)[rows], of rows (1, R): (B, R, out).

    Really it is (1, R, out), and with an adapter a row (B, R, out). Declared so, no pass takes the
    first size for one.
    """
    shape = (batch, rows.shape[1], linear.weight.shape[0])
    operands = [rows, embedding, linear.weight, linear.bias]
    return onnx_ops.symbolic(
        f"{DOMAIN}::{LINEAR_ROWS}",
        operands,
        attrs={"module": module},
        dtype=embedding.dtype,
        shape=shape,
        version=1,
    )


def _by_head(x: Tensor, heads: int) -> Tensor:
    """(B, rows, heads · width) → (B, heads, rows, width)."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def is_disentangled(body: nn.Module) -> bool:
    """Whether a model has this attention."""
    return any(True for _ in _attentions(body))


def _attentions(body: nn.Module) -> Iterator[tuple[str, Any]]:
    """Path and module of each."""
    return (
        (path, module)
        for path, module in body.named_modules()
        if hasattr(module, "disentangled_attention_bias")
    )


def _encoder(body: nn.Module) -> Any:
    """The module that tells the layers their positions."""
    return next(module for module in body.modules() if hasattr(module, "get_rel_embedding"))
