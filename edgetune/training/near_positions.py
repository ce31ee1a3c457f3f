"""DeBERTa's relative positions while it trains: of the embedding only the rows that a batch can reach.

A layer projects the whole embedding (512 rows) for every batch, and scores every token against every row. Of a text
of S tokens no two are further apart than S - 1, so the rows around the middle give the same scores and gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

METHOD = "disentangled_attention_bias"


def near_positions(module: Any) -> Callable[..., Tensor]:
    """What stands for the module's `disentangled_attention_bias`: its own code, on fewer rows."""

    def bias(query: Tensor, key: Tensor, relative_pos: Tensor, rel_embeddings: Tensor, scale_factor: int) -> Tensor:
        span = module.pos_ebd_size
        near = min(span, int(relative_pos.abs().max()) + 1)
        module.pos_ebd_size = near
        try:
            return getattr(type(module), METHOD)(module, query, key, relative_pos, rel_embeddings[span - near : span + near], scale_factor)  # type: ignore[no-any-return]
        finally:
            module.pos_ebd_size = span

    return bias
