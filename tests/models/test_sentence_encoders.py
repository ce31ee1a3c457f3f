"""Folders of sentence-transformers: what is read of them, and what is refused by its name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from edgetune.core.errors import BaseModelError
from edgetune.models.resolve import resolve_base

ST = "sentence_transformers.models."
TRANSFORMER, POOLING = ("Transformer", ""), ("Pooling", "1_Pooling")


def sentence_encoder(
    base: Path,
    folder: Path,
    *modules: tuple[str, str],
    poolings: tuple[str, ...] = ("mean_tokens",),
) -> Path:
    """A copy of the tiny encoder with this `modules.json` and these poolings."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("1_Pooling"))
    listed = [{"idx": i, "type": ST + kind, "path": path} for i, (kind, path) in enumerate(modules)]
    write(folder / "modules.json", listed)
    for kind, path in modules:
        if path:
            (folder / path).mkdir()
            flags = {f"pooling_mode_{name}": True for name in poolings}
            write(folder / path / "config.json", flags if kind == "Pooling" else {})
    return folder


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def test_pooling_of_any_folder_and_the_limit_are_read(tiny_encoder: Path, tmp_path: Path) -> None:
    modules = (TRANSFORMER, ("Pooling", "pooling"), ("Normalize", "2_Normalize"))
    folder = sentence_encoder(tiny_encoder, tmp_path / "base", *modules)
    write(folder / "sentence_bert_config.json", {"max_seq_length": 16, "do_lower_case": False})
    base = resolve_base(str(folder))
    assert (base.pooling, base.max_length) == ("mean", 16)


@pytest.mark.parametrize("kind", ["Dense", "LSTM", "WordWeights", "LayerNorm", "Router"])
def test_a_module_that_changes_the_embedding_is_named(
    tiny_encoder: Path, tmp_path: Path, kind: str
) -> None:
    modules = (TRANSFORMER, POOLING, (kind, f"2_{kind}"))
    with pytest.raises(BaseModelError, match=f"its module {kind} is not supported"):
        resolve_base(str(sentence_encoder(tiny_encoder, tmp_path / "base", *modules)))


@pytest.mark.parametrize(
    ("poolings", "got"),
    [(("mean_tokens", "max_tokens"), "max_tokens and mean"), (("lasttoken",), "lasttoken")],
)
def test_other_poolings_are_named(
    tiny_encoder: Path, tmp_path: Path, poolings: tuple[str, ...], got: str
) -> None:
    folder = sentence_encoder(
        tiny_encoder, tmp_path / "base", TRANSFORMER, POOLING, poolings=poolings
    )
    with pytest.raises(BaseModelError, match=f"this pooling is not supported.*{got}"):
        resolve_base(str(folder))


def test_a_default_prompt_is_refused_and_a_named_one_is_not(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    folder = sentence_encoder(tiny_encoder, tmp_path / "base", TRANSFORMER, POOLING)
    prompts = {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": None}
    write(folder / "config_sentence_transformers.json", prompts)
    assert resolve_base(str(folder)).pooling == "mean"
    write(folder / "config_sentence_transformers.json", prompts | {"default_prompt_name": "query"})
    with pytest.raises(BaseModelError, match=r"prompt before every text.*'query: '"):
        resolve_base(str(folder))


@pytest.mark.parametrize(
    ("quantised", "method"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
    ],
)
def test_a_quantised_base_is_refused_with_what_to_do(
    tiny_decoder: Path, tmp_path: Path, quantised: dict[str, Any], method: str
) -> None:
    folder = Path(shutil.copytree(tiny_decoder, tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", config | {"quantization_config": quantised})
    with pytest.raises(BaseModelError, match=f"already quantised.*{method}.*unquantised model"):
        resolve_base(str(folder))
