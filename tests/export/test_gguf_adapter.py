"""LoRA as GGUF: llama.cpp's own arithmetic on the written file gives what torch gives; what it
cannot hold is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from export_helpers import make_adapter
from family_helpers import make_family
from gguf import GGUFReader, GGUFWriter
from runtime_helpers import peft_adapter, write_metadata
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from edgetune.cli.export import command
from edgetune.core.errors import AdapterError, EdgetuneError, ExportError, OutputError, ProofError
from edgetune.export import gguf_names
from edgetune.export.gguf import export_gguf_adapters
from edgetune.models.resolve import resolve_base
from edgetune.runtime.adapters.lora import read_lora

PATTERNS = {
    "rank_pattern": {"q_proj": 2, "down_proj": 6},
    "alpha_pattern": {"q_proj": 3, "o_proj": 64},
}


def written(adapter: Path, **options: Any) -> GGUFReader:
    (file,) = export_gguf_adapters([("a", adapter)], adapter.parent / "a.gguf", **options)
    return GGUFReader(file)


def value(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    assert field is not None, key
    return field.contents()


def change(reader: GGUFReader, name: str) -> np.ndarray:
    """ΔW (out, in) as llama.cpp applies it (`llama_adapter_lora_weight::get_scale`), its rows in
    llama.cpp's order.
    """
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    a, b = tensors[f"{name}.weight.lora_a"], tensors[f"{name}.weight.lora_b"]
    return np.asarray(value(reader, "adapter.lora.alpha") / b.shape[1] * (b @ a))


def in_our_order(matrix: np.ndarray, heads: int) -> np.ndarray:
    """transformers' own way back, from the loader of GGUF models."""
    return np.asarray(
        LlamaTensorProcessor(config={})._reverse_permute_weights(matrix, heads, heads)
    )


LAYERS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HEADS = {"attn_q": 4, "attn_k": 2}


@pytest.mark.parametrize(
    "config",
    [{}, PATTERNS, {**PATTERNS, "use_rslora": True}, {"lora_alpha": 3}],
    ids=["plain", "patterns", "rsLoRA", "alpha 3"],
)
def test_llama_cpp_computes_from_the_file_what_peft_computes(
    tiny_decoder: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    model = peft_adapter(tiny_decoder, tmp_path / "a", **config)
    reader = written(tmp_path / "a", base_name=str(tiny_decoder))
    assert len(reader.tensors) == 2 * 2 * len(LAYERS)
    x = torch.randn(64 * 4, generator=torch.Generator().manual_seed(0))
    for layer in range(2):
        for theirs, ours in LAYERS.items():
            module = model.get_submodule(f"base_model.model.model.layers.{layer}.{ours}")
            weight = module.base_layer.weight.detach()
            delta = change(reader, f"blk.{layer}.{theirs}")
            if theirs in HEADS:
                delta = in_our_order(delta, HEADS[theirs])
            vector = x[: weight.shape[1]]
            with torch.no_grad():
                torch.testing.assert_close(
                    (weight + torch.tensor(delta)) @ vector,
                    module(vector[None])[0],
                    atol=1e-5,
                    rtol=1e-5,
                )


def test_the_file_says_what_it_is(tiny_decoder: Path, tmp_path: Path) -> None:
    reader = written(make_adapter(tiny_decoder, tmp_path / "a"))
    facts = {
        key: value(reader, key)
        for key in (
            "general.architecture",
            "general.type",
            "adapter.type",
            "adapter.lora.alpha",
            "edgetune.base_digest",
        )
    }
    digest = resolve_base(str(tiny_decoder)).digest
    assert facts == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 16.0,
        "edgetune.base_digest": digest,
    }


@pytest.mark.parametrize(
    ("family", "layer", "module"),
    [
        ("gpt2", "attn_qkv", "transformer.h.0.attn.c_attn"),
        ("phi3", "ffn_up", "model.layers.0.mlp.gate_up_proj"),
        ("qwen3", "attn_q", "model.layers.0.self_attn.q_proj"),
        ("gemma3_text", "ffn_down", "model.layers.0.mlp.down_proj"),
    ],
)
def test_other_families_keep_the_order_of_their_rows(
    family: str, layer: str, module: str, tiny_decoder: Path, tmp_path: Path
) -> None:
    base = make_family(family, tiny_decoder, tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "a")
    a, b = read_lora(adapter).deltas[module]
    np.testing.assert_allclose(change(written(adapter), f"blk.0.{layer}"), b @ a, atol=1e-6)


def test_gpt_neox_is_taken_apart_into_all_queries_then_keys_then_values(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    base = make_family("gpt_neox", tiny_decoder, tmp_path / "base")  # 2 heads of 32
    adapter = make_adapter(base, tmp_path / "a")
    a, b = read_lora(adapter).deltas["gpt_neox.layers.0.attention.query_key_value"]
    by_head = (b @ a).reshape(2, 3, 32, 64)
    expected = np.concatenate([by_head[:, part].reshape(64, 64) for part in range(3)])
    np.testing.assert_allclose(change(written(adapter), "blk.0.attn_qkv"), expected, atol=1e-6)


def refused(adapter: Path, match: str, *, kind: type[EdgetuneError], **options: Any) -> None:
    with pytest.raises(kind, match=match):
        export_gguf_adapters([("a", adapter)], adapter.parent / "a.gguf", **options)
    assert not (adapter.parent / "a.gguf").exists()


def test_what_a_gguf_adapter_cannot_hold_is_refused_by_name(
    tiny_decoder: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    refused(
        make_adapter(tiny_decoder, tmp_path / "dora", dora=True),
        "use_dora: DoRA",
        kind=AdapterError,
    )
    refused(make_adapter(tiny_encoder, tmp_path / "topics"), "no task head", kind=ExportError)
    peft_adapter(tiny_encoder, tmp_path / "encoder", target_modules=["query"])
    refused(
        tmp_path / "encoder",
        "decoders only.*is an encoder",
        kind=ExportError,
        base_name=str(tiny_encoder),
    )
    peft_adapter(
        tiny_decoder,
        tmp_path / "saved",
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
    )
    refused(
        tmp_path / "saved",
        "modules_to_save: .*'embed_tokens'",
        kind=AdapterError,
        base_name=str(tiny_decoder),
    )
    peft_adapter(tiny_decoder, tmp_path / "output", target_modules=["q_proj", "lm_head"])
    refused(
        tmp_path / "output",
        "lm_head: llama.cpp has no weight of its own",
        kind=AdapterError,
        base_name=str(tiny_decoder),
    )


def test_of_several_adapters_all_are_written_or_none(tiny_decoder: Path, tmp_path: Path) -> None:
    good = make_adapter(tiny_decoder, tmp_path / "good")
    peft_adapter(tiny_decoder, tmp_path / "output", target_modules=["q_proj", "lm_head"])
    with pytest.raises(AdapterError, match="no weight of its own"):
        export_gguf_adapters(
            [("good", good), ("bad", tmp_path / "output")],
            tmp_path / "files",
            base_name=str(tiny_decoder),
        )
    assert not list((tmp_path / "files").glob("*"))
    files = export_gguf_adapters([("good", good), ("again", good)], tmp_path / "files")
    assert sorted((tmp_path / "files").iterdir()) == sorted(files) and len(files) == 2


def test_a_family_that_llama_cpp_does_not_have_is_refused(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    base = make_family("opt", tiny_decoder, tmp_path / "base")
    refused(
        make_adapter(base, tmp_path / "a"),
        "no decoder family 'opt'.*expected one of gemma",
        kind=ExportError,
    )


def test_an_adapter_of_another_base_is_refused(tiny_decoder: Path, tmp_path: Path) -> None:
    other = make_family("qwen2", tiny_decoder, tmp_path / "other")
    peft_adapter(tiny_decoder, tmp_path / "a")
    write_metadata(tmp_path / "a")
    refused(
        tmp_path / "a", "trained on another base", kind=AdapterError, base_name=str(tiny_decoder)
    )
    (tmp_path / "a" / "edgetune_adapter.json").unlink()
    refused(
        tmp_path / "a",
        r"mlp.gate_proj: the base's weight is \(96, 64\)",
        kind=AdapterError,
        base_name=str(other),
    )


WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def as_gguf_base(folder: Path) -> Path:
    """Put a GGUF file of the base beside its weights, as for a base that came out of one; llama.cpp
    runs it, by token ids.
    """
    from safetensors.numpy import load_file

    config, ours = (
        json.loads((folder / "config.json").read_text()),
        {**{layer: name for name, layer in LAYERS.items()}, **NORMS},
    )
    writer = GGUFWriter(folder / "source.gguf", "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, weight in load_file(folder / "model.safetensors").items():
        layer, kind = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")[::2]
        theirs = ours.get(kind, "")
        if heads := HEADS.get(theirs):  # llama.cpp's LlamaModel.permute
            weight = (
                weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
                .swapaxes(1, 2)
                .reshape(weight.shape)
            )
        writer.add_tensor(
            WHOLE.get(name, f"blk.{layer}.{theirs}.weight"), np.ascontiguousarray(weight)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "source.gguf"


LLAMA = """
import json, sys, llama_cpp
model, adapter, *ids = sys.argv[1:]
float32 = {"type_k": 0, "type_v": 0}  # of the cache
options = {"n_ctx": 64, "n_threads": 1, "lora_path": adapter or None, "logits_all": True}
llama = llama_cpp.Llama(model, verbose=False, **options, **float32)
llama.eval([int(token) for token in ids])
print(json.dumps(llama.scores[: llama.n_tokens].tolist()))
"""


@pytest.fixture(scope="module")
def llama_python() -> str:
    """A Python with llama-cpp-python, else a skip that says so."""
    python = os.environ.get("EDGETUNE_LLAMA_PYTHON", sys.executable)
    if subprocess.run(
        [python, "-c", "import llama_cpp"], capture_output=True, check=False
    ).returncode:
        pytest.skip(
            "llama-cpp-python is not installed: EDGETUNE_LLAMA_PYTHON names a Python that has it"
        )
    return python


@pytest.mark.parametrize(
    "config", [PATTERNS, {"use_rslora": True}, None], ids=["patterns", "rsLoRA", "no adapter"]
)
def test_llama_cpp_itself_answers_as_torch_with_the_adapter(
    config: dict[str, Any] | None, llama_python: str, tiny_decoder: Path, tmp_path: Path
) -> None:
    base, ids = shutil.copytree(tiny_decoder, tmp_path / "base"), [5, 9, 30, 31, 7, 100, 12, 200]
    model, adapter = as_gguf_base(base), ""
    torch_model = peft_adapter(base, tmp_path / "a", **(config or {}))
    if config is not None:
        written(tmp_path / "a", base_name=str(base))
        adapter = str(tmp_path / "a.gguf")
    done = subprocess.run(
        [llama_python, "-c", LLAMA, str(model), adapter, *map(str, ids)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with (
        torch.no_grad(),
        torch_model.disable_adapter() if config is None else contextlib.nullcontext(),
    ):
        expected = torch_model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(
        torch.tensor(json.loads(done.stdout.splitlines()[-1])), expected, atol=2e-3, rtol=1e-3
    )


def test_a_base_out_of_a_gguf_file_proves_the_order_of_the_rows(
    tiny_decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shutil.copytree(tiny_decoder, tmp_path / "base")
    as_gguf_base(base)
    adapter, said = make_adapter(base, tmp_path / "a"), list[str]()
    written(adapter, say=said.append)
    assert "proof: passed; 14 layers" in said[-1] and "own GGUF file" in said[-1]
    (tmp_path / "a.gguf").unlink()
    monkeypatch.setattr(gguf_names, "ROTATES_PAIRS", frozenset())
    refused(
        adapter,
        r"does not compute what was trained: model.layers.0.self_attn.[qk]_proj",
        kind=ProofError,
    )


def test_the_command_writes_one_file_or_a_folder_of_them(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    for i, name in enumerate("ab"):
        make_adapter(tiny_decoder, tmp_path / name, seed=i)
    arguments = ["--format", "gguf-adapter", "--adapter", f"a={tmp_path / 'a'}"]
    done = CliRunner().invoke(
        command, [*arguments, "--out", str(tmp_path / "one.gguf")], catch_exceptions=False
    )
    assert done.exit_code == 0 and f"{tmp_path / 'one.gguf'}: GGUF adapter, " in done.output
    more = ["--adapter", f"b={tmp_path / 'b'}", "--adapter", "ab=a+0.5*b"]
    CliRunner().invoke(
        command, [*arguments, *more, "--out", str(tmp_path / "all")], catch_exceptions=False
    )
    assert {path.name for path in (tmp_path / "all").iterdir()} == {"a.gguf", "b.gguf", "ab.gguf"}
    a, b, ab = (
        change(GGUFReader(tmp_path / "all" / f"{name}.gguf"), "blk.1.attn_q")
        for name in ("a", "b", "ab")
    )
    np.testing.assert_allclose(ab, a + 0.5 * b, atol=1e-5)
    with pytest.raises(ExportError, match=r"nothing that this could say.*--precision"):
        CliRunner().invoke(
            command,
            [*arguments, "--out", str(tmp_path / "two.gguf"), "--precision", "int4"],
            catch_exceptions=False,
        )
    with pytest.raises(ExportError, match="one GGUF file holds one adapter"):
        CliRunner().invoke(
            command,
            [*arguments, *more, "--out", str(tmp_path / "two.gguf")],
            catch_exceptions=False,
        )


def test_only_an_adapter_is_overwritten(tiny_decoder: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_decoder, tmp_path / "a")
    written(adapter)
    written(adapter)
    shutil.copytree(tiny_decoder, tmp_path / "base")
    as_gguf_base(tmp_path / "base")
    (tmp_path / "notes.gguf").write_text("years of work")
    for path in (tmp_path / "base" / "source.gguf", tmp_path / "notes.gguf"):
        before = path.read_bytes()
        with pytest.raises(OutputError, match="something else"):
            export_gguf_adapters([("a", adapter)], path)
        assert path.read_bytes() == before
