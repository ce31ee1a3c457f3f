"""What llama.cpp calls the layers of a decoder, and in which order it holds a weight's rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.core.arrays import Array
from edgetune.core.errors import ExportError
from edgetune.export.graph.families import cache_sizes, normalised


@dataclass(frozen=True)
class TensorPlace:
    """A linear layer in llama.cpp: the name of its weight there, and which row of ours each of its
    rows is (None: the same).
    """

    tensor: str
    rows: RowOrder | None

    def reordered(self, matrix: Array) -> Array:
        """(out, …) in our order → in llama.cpp's."""
        return matrix if self.rows is None else matrix[self.rows]


def architecture(model_type: str) -> str:
    """llama.cpp's name; ExportError for a family it does not have."""
    if model_type not in ARCHITECTURES:
        raise ExportError(
            f"llama.cpp has no decoder family {model_type!r}",
            where="--format gguf-adapter",
            expected=f"one of {', '.join(ARCHITECTURES)}",
        )
    return ARCHITECTURES[model_type]


def place_of(module: str, config: Any) -> TensorPlace | None:
    """Where llama.cpp has the linear layer `module` (its path in transformers); None where it has
    none of that name.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    wanted = architecture(config.model_type)
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == wanted)
    name = get_tensor_name_map(arch, int(normalised(config).num_layers)).get_name(module)
    return (
        None
        if name is None
        else TensorPlace(f"{name}.weight", _rows(module.rpartition(".")[2], config))
    )


def _rows(kind: str, config: Any) -> RowOrder | None:
    sizes, heads = cache_sizes(config), int(normalised(config).num_attention_heads)
    if config.model_type in ROTATES_PAIRS and kind in ("q_proj", "k_proj"):
        count = heads if kind == "q_proj" else sizes.kv_heads
        rows = np.arange(count * sizes.head_dim).reshape(count, 2, sizes.head_dim // 2)
        return rows.swapaxes(1, 2).reshape(-1)
    if (
        config.model_type == "gpt_neox" and kind == "query_key_value"
    ):  # head by head q, k, v → all q, all k, all v
        return (
            np.arange(heads * 3 * sizes.head_dim)
            .reshape(heads, 3, sizes.head_dim)
            .swapaxes(0, 1)
            .reshape(-1)
        )
    return None


RowOrder = npt.NDArray[np.intp]
# model_type → llama.cpp's architecture
ARCHITECTURES = {
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "gpt_neox": "gptneox",
    "llama": "llama",
    "mistral": "llama",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
}
ROTATES_PAIRS = frozenset({"llama", "mistral", "smollm3"})
