"""How much memory keys and values get, and what it holds."""

from __future__ import annotations

from dataclasses import dataclass

from edgetune.devices.host import memory_mb
from edgetune.errors import InputError
from edgetune.runtime.arena import token_bytes
from edgetune.runtime.manifest import GraphInfo
from edgetune.runtime.prefix import BLOCK

USUAL_TOKENS = 1024
"""Tokens a row is given room for, on average, where no memory is named."""
PREFIX_SHARE = 4
"""One part in so many of the memory is for shared prefixes."""


@dataclass(frozen=True)
class CachePlan:
    """Tokens of cache over all rows, and blocks of shared prefixes."""

    tokens: int
    prefix_blocks: int


def plan_cache(graph: GraphInfo, *, rows: int, cache_mb: float | None = None) -> CachePlan:
    """Divide `cache_mb` (10⁶ bytes) between rows and shared prefixes.

    None: 1,024 tokens a row (the context where that is shorter), at most a quarter of the machine's memory. It is an
    upper bound: memory is used where tokens are written. InputError when it does not hold 64 tokens.
    """
    itemsize = 2 if graph.cache_dtype == "float16" else 4
    token = token_bytes(2 * (graph.layers or 0), graph.kv_heads or 0, graph.head_dim or 0, itemsize)
    if cache_mb is None:
        wanted = rows * min(graph.max_length, USUAL_TOKENS) * token * PREFIX_SHARE / (PREFIX_SHARE - 1)
        total = min(wanted, (memory_mb() or 4096) * 1e6 / 4)
    else:
        total = cache_mb * 1e6
    tokens = int(total * (PREFIX_SHARE - 1) / PREFIX_SHARE / token)
    if tokens < 64:
        least = 64 * token * PREFIX_SHARE / (PREFIX_SHARE - 1) / 1e6
        raise InputError("cache_mb is too small", expected=f"at least {least:.3g}", got=f"{total / 1e6:g}")
    return CachePlan(min(tokens, rows * graph.max_length), int(total / PREFIX_SHARE / (token * BLOCK)))
