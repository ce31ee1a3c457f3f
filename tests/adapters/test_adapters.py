"""Adapters: what is targeted, what learns, and folders that load in PEFT unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from training_helpers import classifier_batch, decoder_batch, parameters
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from edgetune.adapters.folder import AdapterMetadata, load_adapter, read_metadata, save_adapter
from edgetune.adapters.lora import adapt, target_names, trainable_parameters
from edgetune.core.errors import AdapterError, RecipeError
from edgetune.objectives.language import completion_logits

METADATA = AdapterMetadata(base={"name": "tiny", "digest": "sha256:0"}, task="text-generation")


def adapted_decoder(base: Path, folder: Path, **settings: Any) -> tuple[Any, Any]:
    """The tiny decoder with an adapter whose B is not zero, and a batch."""
    model, batch = decoder_batch(base, folder)
    torch.manual_seed(1)
    adapted = adapt(model, parameters(**settings), task="text-generation")
    shake(adapted)
    return adapted.eval(), batch


def shake(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            torch.nn.init.normal_(parameter, std=0.1)


def test_only_the_adapter_learns(tiny_decoder: Path, tmp_path: Path) -> None:
    model, batch = adapted_decoder(tiny_decoder, tmp_path, rank=4)
    completion_logits(model, batch)[0].sum().backward()
    with_gradient = {
        name for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    assert with_gradient == {
        name for name, parameter in model.named_parameters() if "lora_" in name
    }
    assert trainable_parameters(model) == sum(
        p.numel() for n, p in model.named_parameters() if "lora_" in n
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 1},
        {"rank": 4, "rslora": True},
        {"rank": 4, "dora": True},
        {"rank": 2, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 3.0}},
        {"rank": 2, "target_modules": ("q_proj", "down_proj")},
        {"rank": 2, "target_modules": r".*layers\.1\.self_attn\.[qv]_proj"},
    ],
)
def test_a_saved_adapter_gives_the_same_logits_in_peft(
    tiny_decoder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    model, batch = adapted_decoder(tiny_decoder, tmp_path, **settings)
    save_adapter(model, tmp_path / "adapter", METADATA)
    fresh = AutoModelForCausalLM.from_pretrained(tiny_decoder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")).eval()
    expected, _ = completion_logits(model, batch)
    torch.testing.assert_close(completion_logits(theirs, batch)[0], expected, atol=1e-5, rtol=1e-5)
    with theirs.disable_adapter():
        assert (completion_logits(theirs, batch)[0] - expected).abs().max() > 1e-3


def test_a_saved_adapter_loads_here_with_the_same_logits(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    model, batch = adapted_decoder(tiny_decoder, tmp_path, rank=3)
    save_adapter(model, tmp_path / "adapter", METADATA)
    loaded = load_adapter(decoder_batch(tiny_decoder, tmp_path)[0], tmp_path / "adapter")
    assert torch.equal(completion_logits(loaded, batch)[0], completion_logits(model, batch)[0])


def test_the_classifier_loads_every_key_where_no_layer_stands_before_its_head(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    model, _ = classifier_batch(tiny_encoder, tmp_path)
    adapted = adapt(model, parameters(rank=2), task="sequence-classification")
    shake(adapted)
    save_adapter(adapted, tmp_path / "adapter", METADATA)
    fresh = AutoModelForSequenceClassification.from_pretrained(tiny_encoder, num_labels=3)
    with pytest.raises(KeyError, match="pooler"):  # its head reads the pooler: other labels
        PeftModel.from_pretrained(fresh, str(tmp_path / "adapter"))
    fresh = AutoModelForSequenceClassification.from_pretrained(tiny_encoder, num_labels=3)
    fresh.bert.pooler = None
    theirs = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter"))
    ours, others = adapted.state_dict(), theirs.state_dict()
    learnt = [name for name in ours if "lora_" in name or "modules_to_save" in name]
    assert len(learnt) == 2 * 6 * 2 + 2
    assert all(torch.equal(ours[name], others[name]) for name in learnt)
    assert {name for name in others if "lora_" in name} == {
        name for name in ours if "lora_" in name
    }


def test_all_linear_leaves_out_pooler_head_and_output_projection(
    tiny_decoder: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    encoder = target_names(classifier_batch(tiny_encoder, tmp_path)[0], "all-linear")
    decoder = target_names(decoder_batch(tiny_decoder, tmp_path)[0], "all-linear")
    assert len(encoder) == 2 * 6 and all(name.startswith("bert.encoder.layer.") for name in encoder)
    assert len(decoder) == 2 * 7 and "lm_head" not in decoder


@pytest.mark.parametrize("target", [("q_proj", "no_such"), "nothing.*"])
def test_a_target_that_matches_nothing_is_refused_with_what_there_is(
    tiny_decoder: Path, tmp_path: Path, target: str | tuple[str, ...]
) -> None:
    model, _ = decoder_batch(tiny_decoder, tmp_path)
    with pytest.raises(RecipeError, match=r"matches no linear layer.*gate_proj"):
        target_names(model, target)


def test_a_pattern_that_matches_nothing_is_refused(tiny_decoder: Path, tmp_path: Path) -> None:
    model, _ = decoder_batch(tiny_decoder, tmp_path)
    with pytest.raises(RecipeError, match="rank_pattern"):
        adapt(model, parameters(rank=2, rank_pattern={"query": 4}), task="text-generation")


def test_the_same_weights_give_the_same_bytes(tiny_decoder: Path, tmp_path: Path) -> None:
    model, _ = adapted_decoder(tiny_decoder, tmp_path, rank=2)
    for name in ("one", "two"):
        save_adapter(model, tmp_path / name, METADATA)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors", "edgetune_adapter.json"]
    assert all(
        (tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files
    )


def test_the_metadata_says_base_task_and_hashes(tiny_decoder: Path, tmp_path: Path) -> None:
    model, _ = adapted_decoder(tiny_decoder, tmp_path, rank=2)
    save_adapter(model, tmp_path / "adapter", METADATA)
    metadata = read_metadata(tmp_path / "adapter")
    assert metadata["schema"] == 1
    assert metadata["base"] == {"name": "tiny", "digest": "sha256:0"}
    assert set(metadata["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["peft_type"]) == (
        "tiny",
        2,
        "LORA",
    )


def test_a_flipped_byte_is_found(tiny_decoder: Path, tmp_path: Path) -> None:
    model, _ = adapted_decoder(tiny_decoder, tmp_path, rank=2)
    save_adapter(model, tmp_path / "adapter", METADATA)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(AdapterError, match="damaged"):
        read_metadata(tmp_path / "adapter")


def test_tensors_that_do_not_fit_are_all_listed(tiny_decoder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, _ = adapted_decoder(tiny_decoder, tmp_path, rank=2, target_modules=("q_proj",))
    save_adapter(model, tmp_path / "adapter", METADATA)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    names = sorted(tensors)
    tensors["surprise"] = tensors.pop(names[0])
    tensors[names[1]] = tensors[names[1]][:1].clone()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(AdapterError) as caught:
        load_adapter(decoder_batch(tiny_decoder, tmp_path)[0], tmp_path / "adapter")
    assert all(
        word in str(caught.value)
        for word in (
            f"missing {names[0]}",
            "unknown base_model.model.surprise",
            f"{names[1]} has shape",
        )
    )


def test_a_folder_without_edgetunes_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"edgetune_adapter\.json"):
        read_metadata(tmp_path)
