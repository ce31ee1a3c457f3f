"""PEFT folders become graph inputs: PEFT's own delta weights are the reference; what does not fit
is refused, all of it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runtime_helpers import decoder_manifest, encoder_manifest, peft_adapter, write_metadata
from safetensors.torch import load_file, save_file

from edgetune.core.errors import AdapterError
from edgetune.runtime.adapters.lora import read_lora
from edgetune.runtime.adapters.packing import PackedAdapter, pack_adapter
from edgetune.runtime.bundle.manifest import BaseInfo, HeadInfo, Manifest

WEIGHTS = "adapter_model.safetensors"
KEY = "base_model.model.model.layers.0.self_attn.q_proj"


def reference_deltas(model: Any) -> dict[str, np.ndarray]:
    """Module → ΔW (out, in) as PEFT computes it."""
    layers = {
        n: m
        for n, m in model.named_modules()
        if hasattr(m, "get_delta_weight") and "default" in m.lora_A
    }
    return {
        n.removeprefix("base_model.model."): m.get_delta_weight("default").detach().numpy()
        for n, m in layers.items()
    }


def packed_deltas(packed: PackedAdapter, manifest: Manifest) -> dict[str, np.ndarray]:
    """Module → ΔW (out, in) out of the packed graph inputs."""
    deltas = {}
    for site in manifest.sites:
        if site.A in packed.tensors:
            whole = (packed.tensors[site.A][0] @ packed.tensors[site.B][0]).T
            for part in site.parts:
                if np.abs(whole[part.start : part.stop]).max() > 0:
                    deltas[part.module] = whole[part.start : part.stop]
    return deltas


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank one": {"r": 1, "lora_alpha": 2},
    "rslora": {"use_rslora": True, "r": 9},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 6}},
    "alpha_pattern": {"alpha_pattern": {"^model.layers.0.self_attn.k_proj": 32, "up_proj": 1}},
    "both patterns": {
        "rank_pattern": {"v_proj": 3},
        "alpha_pattern": {"v_proj": 5},
        "use_rslora": True,
    },
    "partial targets": {"target_modules": ["q_proj", "up_proj"]},
    "a regex": {"target_modules": r"model\.layers\.0\..*(v|down)_proj"},
    "one layer": {"target_modules": ["o_proj", "k_proj"], "layers_to_transform": [1]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_inputs_hold_the_delta_weights_of_peft(
    name: str, tiny_decoder: Path, tmp_path: Path
) -> None:
    model = peft_adapter(tiny_decoder, tmp_path, **CONFIGS[name])
    expected = reference_deltas(model)
    got = packed_deltas(pack_adapter(tmp_path, decoder_manifest()), decoder_manifest())
    assert set(got) == set(expected)
    for module in expected:
        np.testing.assert_allclose(got[module], expected[module], rtol=1e-5, atol=1e-6)


def test_lora_deltas_are_what_a_merge_adds(tiny_decoder: Path, tmp_path: Path) -> None:
    model = peft_adapter(tiny_decoder, tmp_path, rank_pattern={"q_proj": 2})
    deltas = read_lora(tmp_path).deltas
    for module, expected in reference_deltas(model).items():
        a, b = deltas[module]
        np.testing.assert_allclose(b @ a, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-2), (torch.bfloat16, 5e-2)])
def test_half_precision_files_are_read(
    dtype: torch.dtype, tolerance: float, tiny_decoder: Path, tmp_path: Path
) -> None:
    expected = reference_deltas(peft_adapter(tiny_decoder, tmp_path))
    save_file(
        {k: v.to(dtype) for k, v in load_file(tmp_path / WEIGHTS).items()}, tmp_path / WEIGHTS
    )
    got = packed_deltas(pack_adapter(tmp_path, decoder_manifest()), decoder_manifest())
    for module in expected:
        np.testing.assert_allclose(got[module], expected[module], atol=tolerance)


def test_the_classifier_head_is_packed_with_its_labels(tiny_encoder: Path, tmp_path: Path) -> None:
    model = peft_adapter(tiny_encoder, tmp_path, labels=3, target_modules=["query", "value"])
    write_metadata(tmp_path, task="sequence-classification", labels=["a", "b", "c"], pooling="mean")
    packed = pack_adapter(tmp_path, encoder_manifest())
    weight = model.base_model.model.classifier.modules_to_save["default"].weight.detach().numpy()
    np.testing.assert_array_equal(packed.tensors["head.weight"][0].T, weight)
    assert packed.tensors["head.bias"].shape == (1, 3)
    assert packed.labels == ("a", "b", "c")
    assert packed.notes == ()


def test_a_foreign_tagger_is_fitted_by_shape_and_that_is_said(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    peft_adapter(tiny_encoder, tmp_path, labels=3, target_modules=["query", "value"])
    with pytest.raises(AdapterError, match=r"dense layer or pooler of .*other labels"):
        pack_adapter(tmp_path, encoder_manifest())
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace("SEQ_CLS", "TOKEN_CLS"))
    packed = pack_adapter(tmp_path, encoder_manifest())
    assert packed.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert any("could not be checked" in note for note in packed.notes)


def test_a_classifier_of_several_labels_on_a_decoder_is_one(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    peft_adapter(tiny_decoder, tmp_path, labels=3, target_modules=["q_proj"])
    manifest = decoder_manifest()
    head = HeadInfo(weight="head.weight", bias="head.bias", in_features=64)
    packed = pack_adapter(tmp_path, replace(manifest, head=head))
    assert packed.task == "sequence-classification"
    assert packed.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert packed.tensors["head.weight"].shape == (1, 64, 3)


def refusal(folder: Path, manifest: Manifest) -> list[str]:
    """The mismatches of the refusal: one in the line itself, several on lines of their own."""
    with pytest.raises(AdapterError) as caught:
        pack_adapter(folder, manifest)
    first, *lines = str(caught.value).splitlines()
    assert (f": {len(lines)} mismatches:" in first) == bool(lines)
    return [line.strip() for line in lines] or [first.split("nothing was loaded: ")[1]]


def test_every_mismatch_is_listed_with_both_shapes(tiny_decoder: Path, tmp_path: Path) -> None:
    peft_adapter(tiny_decoder, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors[f"{KEY}.lora_B.weight"]
    tensors[f"{KEY.replace('q_proj', 'k_proj')}.lora_B.weight"] = torch.ones(40, 4)
    tensors["base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"] = torch.ones(4, 64)
    tensors["base_model.model.model.layers.7.mlp.up_proj.lora_B.weight"] = torch.ones(128, 4)
    tensors["base_model.model.model.norm.weight"] = torch.ones(64)
    save_file(tensors, tmp_path / WEIGHTS)
    lines = refusal(tmp_path, decoder_manifest())
    assert any("q_proj.lora_B.weight: missing" in line for line in lines)
    assert any("k_proj.lora_B.weight: expected (32, 4), got (40, 4)" in line for line in lines)
    assert any("layers.7.mlp.up_proj" in line and "no adapter input" in line for line in lines)
    assert any("model.norm.weight (64,): unknown" in line for line in lines)
    assert len(lines) == 4


def test_a_module_that_the_configuration_targets_must_be_there(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    peft_adapter(tiny_decoder, tmp_path, target_modules=["q_proj", "o_proj"])
    tensors = {
        k: v
        for k, v in load_file(tmp_path / WEIGHTS).items()
        if "layers.1.self_attn.o_proj" not in k
    }
    save_file(tensors, tmp_path / WEIGHTS)
    lines = refusal(tmp_path, decoder_manifest())
    assert len(lines) == 1
    assert "layers.1.self_attn.o_proj.lora_A.weight: missing" in lines[0]


def test_an_adapter_of_another_base_is_refused(tiny_decoder: Path, tmp_path: Path) -> None:
    peft_adapter(tiny_decoder, tmp_path)
    write_metadata(tmp_path)
    other = decoder_manifest(base=BaseInfo("other", "sha256:" + "b" * 64, "llama", 1))
    assert refusal(tmp_path, other)[0].startswith(
        "edgetune_adapter.json: base model: expected digest sha256:bbbb"
    )


def test_a_flipped_byte_fails_the_hash(tiny_decoder: Path, tmp_path: Path) -> None:
    peft_adapter(tiny_decoder, tmp_path)
    write_metadata(tmp_path)
    content = bytearray((tmp_path / WEIGHTS).read_bytes())
    content[-3] ^= 1
    (tmp_path / WEIGHTS).write_bytes(content)
    assert "adapter_model.safetensors: sha256: expected" in refusal(tmp_path, decoder_manifest())[0]


def test_a_truncated_file_is_refused_in_one_line(tiny_decoder: Path, tmp_path: Path) -> None:
    peft_adapter(tiny_decoder, tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[: len(content) // 2])
    lines = refusal(tmp_path, decoder_manifest())
    assert len(lines) == 1
    assert "truncated or damaged" in lines[0]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora: DoRA rescales"),
    "LoRA biases": ({"lora_bias": True}, "lora_bias"),
    "trained biases": ({"bias": "all"}, "bias: expected none, got all"),
    "trainable tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "embeddings": (
        {"target_modules": ["q_proj", "embed_tokens"]},
        "embeddings have no adapter input",
    ),
    "the output layer": ({"target_modules": ["q_proj", "lm_head"]}, "no adapter input for lm_head"),
    "a saved norm": (
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
        "takes no trained 'norm'",
    ),
    "pissa": ({"init_lora_weights": "pissa"}, "also changed the base weights"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_graph_cannot_take_is_refused_by_name(
    name: str, tiny_decoder: Path, tmp_path: Path
) -> None:
    config, expected = REFUSED[name]
    peft_adapter(tiny_decoder, tmp_path, **config)
    assert any(expected in line for line in refusal(tmp_path, decoder_manifest()))


WRONG_TYPES: list[tuple[str, str, Any]] = [
    ("adapter_config.json", "r", 0),
    ("adapter_config.json", "r", "four"),
    ("adapter_config.json", "lora_alpha", [8]),
    ("adapter_config.json", "rank_pattern", ["q_proj"]),
    ("adapter_config.json", "rank_pattern", {"(": 4}),
    ("adapter_config.json", "alpha_pattern", {"q_proj": "x"}),
    ("adapter_config.json", "target_modules", "(q_proj"),
    ("adapter_config.json", "modules_to_save", 5),
    ("edgetune_adapter.json", "prompt_format", "chat"),
    ("edgetune_adapter.json", "prompt_format", {"template": 1}),
    ("edgetune_adapter.json", "generation", {"temperature": "hot"}),
    ("edgetune_adapter.json", "generation", {"temperature": -1}),
    ("edgetune_adapter.json", "generation", {"stop": 5}),
    ("edgetune_adapter.json", "labels", 3),
    ("edgetune_adapter.json", "problem", 3),
    ("edgetune_adapter.json", "problem", "several"),
    ("edgetune_adapter.json", "base_precision", "int4"),
    ("edgetune_adapter.json", "base_precision", {"weights": 4}),
    ("edgetune_adapter.json", "base_precision", {"weights": "int4", "block_size": "32"}),
    ("edgetune_adapter.json", "base_precision", {"weights": "int4", "overrides": ["lm_head"]}),
    ("edgetune_adapter.json", "max_length", "long"),
    ("edgetune_adapter.json", "files", ["x"]),
    ("edgetune_adapter.json", "base", "tiny"),
]


def test_a_value_of_a_wrong_type_is_named(tiny_decoder: Path, tmp_path: Path) -> None:
    peft_adapter(tiny_decoder, tmp_path)
    write_metadata(tmp_path)
    for file, name, value in WRONG_TYPES:
        right = (tmp_path / file).read_text()
        (tmp_path / file).write_text(json.dumps(json.loads(right) | {name: value}))
        (line,) = refusal(tmp_path, decoder_manifest())
        assert line.startswith(f"{file}: {name}")
        (tmp_path / file).write_text(right)
    pack_adapter(tmp_path, decoder_manifest())


def test_another_pooling_and_another_task_are_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    peft_adapter(tiny_encoder, tmp_path, labels=2, target_modules=["query"])
    write_metadata(tmp_path, task="reward", labels=["a", "b", "c"], pooling="cls")
    lines = refusal(tmp_path, encoder_manifest())
    assert (
        "edgetune_adapter.json: task: expected sequence-classification or token-classification, got"
        " reward" in lines
    )
    assert "edgetune_adapter.json: pooling: expected mean, got cls" in lines
    assert any("classifier.weight: expected (3, 64), got (2, 64)" in line for line in lines)


def test_a_merged_bundle_takes_no_adapter(tiny_decoder: Path, tmp_path: Path) -> None:
    peft_adapter(tiny_decoder, tmp_path)
    with pytest.raises(AdapterError, match="merged into its weights"):
        pack_adapter(tmp_path, decoder_manifest(mode="merged"))


def test_a_folder_without_adapter_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"no adapter_config\.json here"):
        pack_adapter(tmp_path, decoder_manifest())


def test_another_kind_of_peft_is_refused(tiny_decoder: Path, tmp_path: Path) -> None:
    peft_adapter(tiny_decoder, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    assert refusal(tmp_path, decoder_manifest()) == [
        "adapter_config.json: peft_type: expected LORA, got IA3"
    ]


def test_sites_packed_one_after_the_other_are_those_of_the_whole(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    manifest = decoder_manifest()
    peft_adapter(tiny_decoder, tmp_path / "a", rank_pattern={"q_proj": 2})
    whole = pack_adapter(tmp_path / "a", manifest)
    lazy = pack_adapter(tmp_path / "a", manifest, by_site=True)
    assert list(lazy.tensors) == list(whole.tensors) and len(lazy.tensors) == len(whole.tensors)
    for name, tensor in whole.tensors.items():
        np.testing.assert_array_equal(lazy.tensors[name], tensor)
    assert lazy.nbytes == whole.nbytes and "nothing" not in lazy.tensors
