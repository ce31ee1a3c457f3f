"""The model families that can be exported, and the few things that the model's own code does not
say.

Everything else is read from the code while it is traced (`trace`, `attention`, `leaves`): which
norm, which rotary table a layer uses and over how many dimensions, windows, soft caps, packed
projections, learned positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgetune.core.errors import ExportError


@dataclass(frozen=True)
class Family:
    """What differs. `title` is for people; `genai` is the type that onnxruntime-genai knows such a
    graph by.
    """

    title: str
    genai: str = "decoder"


DECODERS = {
    "gemma": Family("Gemma", genai="gemma"),
    "gemma2": Family("Gemma 2", genai="gemma2"),
    "gemma3_text": Family("Gemma 3 (text)", genai="gemma3_text"),
    "gpt2": Family("GPT-2"),
    "gpt_neox": Family("GPT-NeoX, Pythia"),
    "llama": Family("Llama, SmolLM2", genai="llama"),
    "mistral": Family("Mistral", genai="mistral"),
    "opt": Family("OPT"),
    "phi3": Family("Phi-3, Phi-4-mini", genai="phi3"),
    "qwen2": Family("Qwen 2, Qwen 2.5", genai="qwen2"),
    "qwen3": Family("Qwen 3", genai="qwen3"),
    "smollm3": Family("SmolLM3", genai="smollm3"),
}
ENCODERS = {
    "bert": Family("BERT, MiniLM"),
    "camembert": Family("CamemBERT"),
    "deberta-v2": Family("DeBERTa v3"),
    "distilbert": Family("DistilBERT"),
    "electra": Family("ELECTRA"),
    "modernbert": Family("ModernBERT"),
    "roberta": Family("RoBERTa"),
    "xlm-roberta": Family("XLM-RoBERTa"),
}
SEQ2SEQ = {
    "mt5": Family("mT5"),
    "t5": Family("T5, FLAN-T5"),
    "umt5": Family("UMT5"),
}
# Rotary angles that change with the length of the text: one table holds for the first so many
# positions only.
CHANGING_ROTARY = {
    "longrope": "original_max_position_embeddings",
    "dynamic": "original_max_position_embeddings",
}


@dataclass(frozen=True)
class CacheSizes:
    """A decoder's key-value cache."""

    layers: int
    kv_heads: int
    head_dim: int


def known_family(model_type: str, *, kind: str) -> Family:
    """The family called `model_type`; ExportError names it and the supported ones where there is
    none.
    """
    families = {"decoder": DECODERS, "encoder": ENCODERS, "encoder-decoder": SEQ2SEQ}[kind]
    if model_type not in families:
        raise ExportError(
            f"the {kind} family {model_type!r} cannot be exported",
            expected=f"one of {', '.join(families)}",
        )
    return families[model_type]


def decoder_family(config: Any) -> Family:
    """The family of a decoder's configuration; ExportError for a decoder of another kind."""
    family = known_family(config.model_type, kind="decoder")
    if getattr(config, "use_bidirectional_attention", None):
        raise ExportError(
            "a decoder whose tokens see later ones cannot be exported",
            got="use_bidirectional_attention = true",
        )
    if getattr(config, "add_cross_attention", False):
        raise ExportError(
            "a decoder that reads an encoder cannot be exported", got="add_cross_attention = true"
        )
    return family


def encoder_family(config: Any) -> Family:
    """The family of an encoder's configuration; ExportError for one that is set up as a decoder."""
    if getattr(config, "is_decoder", False):
        raise ExportError(
            "an encoder that is set up as a decoder cannot be exported", got="is_decoder = true"
        )
    family = known_family(config.model_type, kind="encoder")
    if config.model_type == "deberta-v2":
        _check_disentangled(config)
    return family


def _check_disentangled(config: Any) -> None:
    """ExportError for a DeBERTa whose layers are not those of the v3 checkpoints."""
    kinds = " and ".join(sorted(set(config.pos_att_type or ()))) or "none"
    found = {
        "relative_attention": (True, bool(config.relative_attention)),
        "pos_att_type": ("c2p and p2c", kinds),
        "share_att_key": (True, bool(getattr(config, "share_att_key", False))),
        "conv_kernel_size": (0, int(getattr(config, "conv_kernel_size", 0) or 0)),
    }
    for name, (expected, got) in found.items():
        if got != expected:
            raise ExportError(
                "this kind of DeBERTa cannot be exported",
                where=name,
                expected=f"{expected}, as in DeBERTa v3".lower(),
                got=str(got).lower(),
            )


def seq2seq_family(config: Any) -> Family:
    """The family of an encoder-decoder's configuration."""
    return known_family(config.model_type, kind="encoder-decoder")


def normalised(config: Any) -> Any:
    """optimum's view of a configuration, which calls sizes by one name whatever the family does:
    `num_layers`, `num_attention_heads`, `hidden_size`, `vocab_size`.
    """
    from optimum.utils import NormalizedConfigManager, NormalizedTextConfigWithGQA

    try:
        view = NormalizedConfigManager.get_normalized_config_class(config.model_type)
    except KeyError:  # gemma2, gemma3_text, umt5: not in its table, and called as most are
        view = NormalizedTextConfigWithGQA
    return view(config)


def cache_sizes(config: Any) -> CacheSizes:
    """Sizes of a decoder's cache, of an encoder-decoder also those of the encoder's keys and
    values; families that name none have as many key heads as heads, of hidden_size / heads.
    """
    sizes = normalised(config)
    heads = sizes.num_attention_heads
    return CacheSizes(
        layers=int(getattr(sizes, "num_decoder_layers", sizes.num_layers)),
        kv_heads=int(getattr(sizes, "num_key_value_heads", heads)),
        head_dim=int(getattr(sizes, "head_dim", sizes.hidden_size // heads)),
    )


def fixed_length(config: Any, max_length: int) -> int:
    """Positions up to which one rotary table holds, at most `max_length`."""
    rope = getattr(config, "rope_parameters", None) or {}
    for table in [value for value in rope.values() if isinstance(value, dict)] or [rope]:
        key = CHANGING_ROTARY.get(str(table.get("rope_type")))
        if key is not None:
            original = (
                table.get(key) or getattr(config, key, None) or config.max_position_embeddings
            )
            max_length = min(max_length, int(original))
    return max_length
