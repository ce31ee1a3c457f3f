"""A GGUF file → a folder with fp32 safetensors, config.json, tokenizer.json and
chat_template.jinja.

transformers' GGUF loader de-quantises the weights. Its tokenizer needs two repairs: it ignores the
file's splitting rule (`tokenizer.ggml.pre`), which changes the ids of numbers after spaces and
newlines, and it records no model_max_length.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import struct
from pathlib import Path
from typing import Any

from edgetune.core.errors import BaseModelError
from edgetune.core.layout import TOKENIZER_CONFIG
from edgetune.models.load import auto_class, quiet

SOURCE = "source.gguf"
# The splitting rules by llama.cpp's names (src/llama-vocab.cpp, llama_vocab_pre_type): regexes
# applied in order.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [LLAMA3],
    "qwen2": [LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")],
}


def convert_gguf(source: Path, folder: Path) -> None:
    """Write the model in `source` to `folder` and keep the file itself there as `source.gguf`."""
    import torch
    from transformers import AutoTokenizer

    fields = _fields(source)
    shutil.copyfile(source, folder / SOURCE)
    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # its progress bar heeds no setting
        try:
            loaded = auto_class("text-generation").from_pretrained(
                folder, gguf_file=SOURCE, dtype=torch.float32
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=SOURCE)
        except (ValueError, RuntimeError, KeyError, NotImplementedError, struct.error) as error:
            raise BaseModelError(
                f"transformers cannot read this GGUF file: {error}", where=str(source)
            ) from error
        _save_weights(loaded, folder)
        _set_splits(tokenizer, fields, source)
        tokenizer.model_max_length = loaded.config.max_position_embeddings
        tokenizer.save_pretrained(folder)
    _clean(folder / TOKENIZER_CONFIG, "is_local", "local_files_only")


def _fields(source: Path) -> dict[str, Any]:
    """The file's single values (strings and numbers); a damaged file raises."""
    import gguf

    with source.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise BaseModelError(
                "not a GGUF file", where=str(source), expected="a file that begins with GGUF"
            )
    try:
        reader = gguf.GGUFReader(source)
        last = max((tensor.data_offset + tensor.n_bytes for tensor in reader.tensors), default=0)
        arrays = gguf.GGUFValueType.ARRAY
        fields = {
            name: f.contents()
            for name, f in reader.fields.items()
            if f.types and f.types[0] != arrays
        }
    except (ValueError, IndexError, KeyError, OSError, struct.error) as error:
        fix = "Fetch the file again."
        raise BaseModelError(
            f"the GGUF file is damaged: {error}", where=str(source), fix=fix
        ) from error
    if last > source.stat().st_size:
        raise BaseModelError(
            "the GGUF file is truncated", where=str(source), fix="Fetch the file again."
        )
    return fields


def _save_weights(loaded: Any, folder: Path) -> None:
    """Save through a model that was never quantised, so that config.json and the file carry no
    trace of GGUF.
    """
    import torch

    config = loaded.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path", "_name_or_path"):
        config.pop(key, None)
    with torch.device("meta"):
        model = auto_class("text-generation").from_config(
            type(loaded.config)(**config), dtype=torch.float32
        )
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)


def _set_splits(tokenizer: Any, fields: dict[str, Any], source: Path) -> None:
    """Give a byte-level BPE tokenizer the splitting rule that the file names."""
    if fields.get("tokenizer.ggml.model") != "gpt2":
        return
    from tokenizers import Regex, pre_tokenizers

    rule = fields.get("tokenizer.ggml.pre", "gpt-2")
    if rule not in SPLITS:
        raise BaseModelError(
            "the tokenizer's splitting rule is not known",
            where=str(source),
            expected="one of " + ", ".join(SPLITS),
            got=repr(rule),
            fix="Use the model's safetensors folder instead.",
        )
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in SPLITS[rule]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])


def _clean(path: Path, *keys: str) -> None:
    """Drop keys that describe the loading, not the tokenizer."""
    values = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in values.items() if key not in keys}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
