"""The files beside the graph: tokenizer, onnxruntime-genai's configuration, and each adapter for
other engines.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

from edgetune.core.errors import OutputError
from edgetune.core.files import write_json
from edgetune.core.layout import (
    ADAPTER_CONFIG,
    ADAPTER_METADATA,
    ADAPTER_WEIGHTS,
    CHAT_TEMPLATE,
    MODEL_CONFIG,
    SPECIAL_TOKENS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    TOOL_TEMPLATE,
)
from edgetune.export.graph.families import DECODERS, cache_sizes, normalised
from edgetune.export.graph.onnx_file import STANDARD
from edgetune.models.base import Base
from edgetune.runtime.adapters.packing import PackedAdapter
from edgetune.runtime.bundle.manifest import TokenizerInfo

ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_METADATA)


def write_tokenizer(base: Base, tokenizer: Any, folder: Path) -> TokenizerInfo:
    """Write the tokenizer that training used, and say what generation needs of it.

    `tokenizer.json` is what transformers made of all of the base's files, not the base's own: a
    device reads nothing else.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()  # both belong to the last call, not to the tokenizer
    backend.no_truncation()
    (folder / TOKENIZER).write_text(backend.to_str(pretty=True), encoding="utf-8")
    for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS):
        if (base.folder / name).is_file():
            shutil.copyfile(base.folder / name, folder / name)
    named = _templates(tokenizer)
    for place, template in named.items():
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_text(template, encoding="utf-8")
    config = json.loads((base.folder / MODEL_CONFIG).read_text(encoding="utf-8"))
    ends = [
        tokenizer.eos_token_id,
        *_listed(config.get("eos_token_id")),
        *_listed(_generation_config(base).get("eos_token_id")),
    ]
    return TokenizerInfo(
        file=TOKENIZER,
        chat_template=CHAT_TEMPLATE if CHAT_TEMPLATE in named else None,
        special_tokens=dict(tokenizer.special_tokens_map),
        eos_token_ids=(
            tuple(sorted({int(token) for token in ends if token is not None}))
            if base.kind != "encoder"
            else ()
        ),
        pad_token_id=tokenizer.pad_token_id,
        model_max_length=base.max_length,
        clean_up=base.kind != "encoder" and _cleans_up(tokenizer),
        tool_template=TOOL_TEMPLATE if TOOL_TEMPLATE in named else None,
    )


def _cleans_up(tokenizer: Any) -> bool:
    """Whether transformers takes spaces out of decoded text: never of BPE unless told twice."""
    return bool(tokenizer.clean_up_tokenization_spaces) and (
        type(tokenizer.backend_tokenizer.model).__name__ != "BPE"
        or tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
    )


def _templates(tokenizer: Any) -> dict[str, str]:
    """Where each chat template goes that transformers chooses by itself: of several named ones
    `default`, and `tool_use` where tools are given.
    """
    given = tokenizer.chat_template
    named = given if isinstance(given, dict) else {"default": given}
    places = {"default": CHAT_TEMPLATE, "tool_use": TOOL_TEMPLATE}
    return {place: named[name] for name, place in places.items() if named.get(name)}


def _generation_config(base: Base) -> dict[str, Any]:
    path = base.folder / "generation_config.json"
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return value


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def write_genai_config(
    config: Any, tokenizer: TokenizerInfo, folder: Path, *, max_length: int
) -> None:
    """`genai_config.json`, so that onnxruntime-genai opens this folder as it is."""
    ends, sizes = list(tokenizer.eos_token_ids), cache_sizes(config)
    named = normalised(config)
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": STANDARD,
        "head_size": sizes.head_dim,
        "hidden_size": named.hidden_size,
        "num_attention_heads": named.num_attention_heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    model = {
        "bos_token_id": config.bos_token_id if config.bos_token_id is not None else ends[0],
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0],
        "context_length": max_length,
        "type": DECODERS[config.model_type].genai,
        "vocab_size": named.vocab_size,
        "decoder": decoder,
    }
    search = {
        "do_sample": False,
        "max_length": max_length,
        "num_beams": 1,
        "past_present_share_buffer": True,
        "temperature": 1.0,
        "top_k": 1,
        "top_p": 1.0,
    }
    write_json(folder / "genai_config.json", {"model": model, "search": search})


def copy_adapter(source: Path, target: Path) -> None:
    """Keep the PEFT folder as it was trained."""
    target.mkdir(parents=True)
    for name in ADAPTER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_onnx_adapter(packed: PackedAdapter, path: Path) -> None:
    """The packed tensors in ONNX Runtime's own adapter format, for `LoraAdapter` in any
    language.
    """
    form = ort.AdapterFormat()
    form.set_adapter_version(1)
    form.set_model_version(1)
    form.set_parameters(
        {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
            for name, array in packed.tensors.items()
        }
    )
    try:
        form.export_adapter(str(path))
    except RuntimeError as error:  # ONNX Runtime's own words name neither the reason nor the place
        free = shutil.disk_usage(path.parent).free
        raise OutputError(
            f"ONNX Runtime cannot write {path.name}",
            expected=f"{packed.nbytes} free bytes",
            got=str(free),
            fix="Choose another --out or free the place.",
        ) from error
