"""What a base model is: a folder in Hugging Face layout, its digest, and what can be read off its
files.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.core.errors import BaseModelError
from edgetune.core.files import CHUNK
from edgetune.core.layout import ADAPTER, ADAPTER_CONFIG, MODEL_CONFIG, MODEL_WEIGHTS, TOKENIZER
from edgetune.core.tasks import Kind
from edgetune.models.model_files import read_object, refuse_quantised
from edgetune.models.sentence_encoder import Pooling, read_sentence_encoder
from edgetune.quantisation.precision import Precision

# Keys that change what the weights compute; other keys vary with the version of transformers that
# wrote the file.
ARCHITECTURE_KEYS = (
    "activation",
    "activation_function",
    "attn_logit_softcapping",
    "do_layer_norm_before",
    "final_logit_softcapping",
    "hidden_act",
    "hidden_activation",
    "hidden_size",
    "intermediate_size",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "local_attention",
    "model_type",
    "n_head",
    "n_heads",
    "norm_eps",
    "num_attention_heads",
    "num_hidden_layers",
    "partial_rotary_factor",
    "query_pre_attn_scalar",
    "rms_norm_eps",
    "rotary_pct",
    "scale_attn_by_inverse_layer_idx",
    "sliding_window",
    "type_vocab_size",
    "use_parallel_residual",
    "vocab_size",
)
# Further keys of encoder-decoders, which name their sizes otherwise. (Not of all: that would change
# known digests.)
SEQ2SEQ_KEYS = (
    "d_ff",
    "d_kv",
    "d_model",
    "decoder_start_token_id",
    "feed_forward_proj",
    "num_decoder_layers",
    "num_heads",
    "num_layers",
    "relative_attention_max_distance",
    "relative_attention_num_buckets",
)
# Further keys of DeBERTa v2 and v3, whose layers score relative positions in one way or another.
DEBERTA = "deberta-v2"
DEBERTA_KEYS = (
    "conv_kernel_size",
    "max_position_embeddings",
    "max_relative_positions",
    "norm_rel_ebd",
    "pos_att_type",
    "position_biased_input",
    "position_buckets",
    "relative_attention",
    "share_att_key",
)
SEQ2SEQ = frozenset({"mt5", "t5", "umt5"})
ENCODERS = frozenset(
    {
        "albert",
        "bert",
        "camembert",
        "deberta",
        "deberta-v2",
        "distilbert",
        "electra",
        "ernie",
        "modernbert",
        "mpnet",
        "nomic_bert",
        "roberta",
        "xlm-roberta",
    }
)
PAD_OFFSET = frozenset(
    {"camembert", "mpnet", "roberta", "xlm-roberta"}
)  # positions start after pad_token_id
UNLIMITED = 1 << 20
# tokens of a text for positions that are all relative: the work grows with their square
RELATIVE = 2048


@dataclass(frozen=True)
class Base:
    """A base model on this machine. `max_length`: positions in tokens; `pooling` is None for all
    but encoders.

    `context`: positions that a bundle of it may have, where somebody chose.

    With a `precision` torch loads the weights that a bundle of that precision holds, else those of
    the files.
    """

    name: str
    folder: Path
    digest: str
    kind: Kind
    pooling: Pooling | None
    model_type: str
    max_length: int
    precision: Precision | None = None
    context: int | None = None


def open_folder(folder: Path, *, name: str, digest: str | None = None) -> Base:
    """Check a folder's files and describe it; the digest is computed over all weights unless it is
    known.
    """
    config = _config(folder)
    refuse_quantised(config, folder)
    _check_tokenizer(folder)
    kind = _kind(config, folder)
    sentences = read_sentence_encoder(folder) if kind == "encoder" else None
    longest = _max_length(config)
    return Base(
        name=name,
        folder=folder,
        digest=digest or digest_of(folder),
        kind=kind,
        pooling=sentences.pooling if sentences else None,
        model_type=str(config["model_type"]),
        max_length=min(longest, (sentences and sentences.max_length) or longest),
    )


def digest_of(folder: Path) -> str:
    """`sha256:…` over the architecture and every tensor (name, dtype, shape, bytes), however they
    are spread over files.
    """
    digest = hashlib.sha256(json.dumps(_architecture(_config(folder)), sort_keys=True).encode())
    tensors = sorted(entry for path in weight_files(folder) for entry in _tensors(path))
    for name, dtype, shape, start, stop, path in tensors:
        if name.endswith("position_ids"):  # a constant 0, 1, 2, … that some versions save
            continue
        digest.update(f"\n{name} {dtype} {list(shape)}\n".encode())
        with path.open("rb") as file:
            file.seek(start)
            while start < stop:
                block = file.read(min(CHUNK, stop - start))
                digest.update(block)
                start += len(block)
    return "sha256:" + digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, one or the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(read_object(index).get("weight_map", {}).values()))
        files = [folder / name for name in names]
    else:
        files = [folder / MODEL_WEIGHTS]
    missing = [path.name for path in files if not path.exists()]
    if missing or not files:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
        raise BaseModelError(
            "there are no weights in this folder",
            where=str(folder),
            expected=", ".join(missing[:3]) or MODEL_WEIGHTS,
            got=found or "an empty folder",
            fix="Save the model with save_pretrained (safetensors).",
        )
    return files


def _tensors(path: Path) -> list[tuple[str, str, tuple[int, ...], int, int, Path]]:
    """(name, dtype, shape, first byte, last byte + 1, file) of every tensor; a truncated file
    raises.
    """
    size = path.stat().st_size
    fix = "Copy or fetch the file again."
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise BaseModelError(
                "the file is truncated", where=str(path), got=f"{size} bytes", fix=fix
            )
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = [
                (name, e["dtype"], tuple(e["shape"]), *e["data_offsets"])
                for name, e in header.items()
            ]
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise BaseModelError("not a safetensors file", where=str(path), fix=fix) from error
    first = 8 + length
    stop = first + max((end for *_, end in entries), default=0)
    if stop != size:
        raise BaseModelError(
            "the file is damaged",
            where=str(path),
            expected=f"{stop} bytes",
            got=f"{size} bytes",
            fix=fix,
        )
    return [
        (name, dtype, shape, first + begin, first + end, path)
        for name, dtype, shape, begin, end in entries
    ]


def _config(folder: Path) -> dict[str, Any]:
    path = folder / MODEL_CONFIG
    if not path.exists():
        is_adapter = (folder / ADAPTER_CONFIG).exists() or (folder / ADAPTER).exists()
        raise BaseModelError(
            (
                "this is an adapter or a run, not a base model"
                if is_adapter
                else "this folder holds no model"
            ),
            where=str(folder),
            expected="config.json, model.safetensors, tokenizer.json",
            fix="Give the folder of a base model.",
        )
    config = read_object(path)
    if not isinstance(config.get("model_type"), str):
        raise BaseModelError("the configuration names no model_type", where=str(path))
    return config


def _check_tokenizer(folder: Path) -> None:
    if not (folder / TOKENIZER).exists():
        fix = (
            "Write it once:"
            f" AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
        raise BaseModelError(
            "there is no tokenizer.json in this folder", where=str(folder), fix=fix
        )


def _kind(config: dict[str, Any], folder: Path) -> Kind:
    classes = [str(name) for name in config.get("architectures") or []]
    if config.get("is_encoder_decoder"):
        return _seq2seq(config, classes, folder)
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in classes):
        return "decoder"
    if config["model_type"] in ENCODERS or any(name.endswith("ForMaskedLM") for name in classes):
        return "encoder"
    raise BaseModelError(
        "neither a decoder (…ForCausalLM) nor a known encoder",
        where=str(folder / MODEL_CONFIG),
        expected="one of the encoders " + ", ".join(sorted(ENCODERS)),
        got=f"model_type {config['model_type']!r}, architectures {classes}",
    )


def _seq2seq(config: dict[str, Any], classes: list[str], folder: Path) -> Kind:
    """An encoder-decoder that generates; BaseModelError for other families, and for one half or
    another head of it.
    """
    fits = config["model_type"] in SEQ2SEQ and any(
        name.endswith("ForConditionalGeneration") for name in classes
    )
    if not fits:
        raise BaseModelError(
            "this encoder-decoder is not supported",
            where=str(folder / MODEL_CONFIG),
            expected=f"…ForConditionalGeneration of {', '.join(sorted(SEQ2SEQ))}",
            got=f"model_type {config['model_type']!r}, architectures {classes}",
        )
    if config.get("decoder_start_token_id") is None:
        raise BaseModelError(
            "the configuration names no decoder_start_token_id",
            where=str(folder / MODEL_CONFIG),
            expected="a token id, of T5 0",
        )
    return "encoder-decoder"


def _max_length(config: dict[str, Any]) -> int:
    unlimited = RELATIVE if config["model_type"] in SEQ2SEQ else UNLIMITED
    positions = config.get("max_position_embeddings") or config.get("n_positions") or unlimited
    if config["model_type"] in PAD_OFFSET:
        positions -= (config.get("pad_token_id") or 0) + 1
    return int(positions)


def _architecture(config: dict[str, Any]) -> dict[str, Any]:
    """The keys that matter, with the defaults that some versions write and others leave out."""
    more = (
        SEQ2SEQ_KEYS
        if config.get("is_encoder_decoder")
        else DEBERTA_KEYS
        if config["model_type"] == DEBERTA
        else ()
    )
    kept = {key: config[key] for key in (*ARCHITECTURE_KEYS, *more) if config.get(key) is not None}
    if "pos_att_type" in kept:  # "p2c|c2p", or a list
        names = (
            kept["pos_att_type"].split("|")
            if isinstance(kept["pos_att_type"], str)
            else kept["pos_att_type"]
        )
        kept["pos_att_type"] = sorted(name.strip().lower() for name in names)
    if (
        config["model_type"] == "t5"
    ):  # which writes down in one of two ways whether the decoder's states are scaled
        kept["scale_decoder_outputs"] = config.get(
            "scale_decoder_outputs", config.get("tie_word_embeddings") is not False
        )
    heads = config.get("num_attention_heads")
    if heads:
        kept["num_key_value_heads"] = config.get("num_key_value_heads") or heads
        kept["head_dim"] = config.get("head_dim") or config.get("hidden_size", 0) // heads
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if any(isinstance(table, dict) for table in rope.values()):  # one for each type of layer
        return {**kept, "rope": rope}
    if rope.get("partial_rotary_factor") is not None:
        kept["partial_rotary_factor"] = rope["partial_rotary_factor"]
    theta = rope.pop("rope_theta", None) or config.get("rope_theta")
    if theta:
        kept["rope_theta"] = float(theta)
    kind = rope.pop("rope_type", None) or rope.pop("type", None)
    if kind not in (None, "default"):
        kept["rope"] = {"type": kind, **rope}
    return kept
