"""LoRA's layer range and initialisations; those that change the base are saved for the base as it
ships.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export_helpers import export
from peft import PeftModel
from training_helpers import decoder_batch, intent_recipe, sft_recipe, silent
from transformers import AutoModelForCausalLM

from edgetune.adapters.first_weights import restore_base, start_of
from edgetune.adapters.folder import AdapterMetadata, save_adapter
from edgetune.adapters.lora import adapt
from edgetune.core.errors import RecipeError
from edgetune.objectives.language import completion_logits
from edgetune.recipe.schema import Parameters
from edgetune.training import run_recipe

INITS = ["pissa", "pissa_niter_4", "olora"]


def adapted(base: Path, folder: Path, **settings: Any) -> tuple[PeftModel, Any]:
    model, batch = decoder_batch(base, folder)
    torch.manual_seed(0)
    return adapt(model, Parameters(**settings), task="text-generation"), batch


def disturb(model: PeftModel) -> None:
    """As if it had been trained."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.05 * torch.randn_like(parameter)


@pytest.mark.parametrize("init", [*INITS, "gaussian", "orthogonal"])
def test_at_the_start_the_model_answers_as_the_base(
    tiny_decoder: Path, tmp_path: Path, init: str
) -> None:
    model, batch = adapted(tiny_decoder, tmp_path, rank=4, init=init)
    base, _ = decoder_batch(tiny_decoder, tmp_path)
    torch.testing.assert_close(
        completion_logits(model, batch)[0], completion_logits(base, batch)[0], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3.0}},
        {"dora": True},
    ],
    ids=["plain", "rslora", "patterns", "dora"],
)
def test_the_base_with_the_saved_adapter_is_the_trained_model(
    tiny_decoder: Path, tmp_path: Path, init: str, more: dict[str, Any]
) -> None:
    model, batch = adapted(tiny_decoder, tmp_path, rank=4, init=init, **more)
    start = start_of(model)
    disturb(model)
    trained = completion_logits(model, batch)[0]
    restore_base(model, start)
    torch.testing.assert_close(completion_logits(model, batch)[0], trained, atol=1e-4, rtol=1e-4)
    save_adapter(
        model,
        tmp_path / "adapter",
        AdapterMetadata(base={"name": "tiny", "digest": "-"}, task="text-generation"),
    )
    fresh = AutoModelForCausalLM.from_pretrained(tiny_decoder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(completion_logits(theirs, batch)[0], trained, atol=1e-4, rtol=1e-4)
    with model.disable_adapter():
        off = completion_logits(model, batch)[0]
    torch.testing.assert_close(
        off,
        completion_logits(decoder_batch(tiny_decoder, tmp_path)[0], batch)[0],
        atol=1e-4,
        rtol=1e-4,
    )


def test_a_pissa_run_on_one_layer_exports_with_proof(tiny_encoder: Path, tmp_path: Path) -> None:
    recipe = intent_recipe(
        tiny_encoder, tmp_path, epochs=3, parameters={"rank": 2, "init": "pissa", "layers": [1, 1]}
    )
    summary = run_recipe(recipe, out=tmp_path / "run", progress=silent())
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (4, True)
    assert summary.effect["mean_kl"] > 0
    assert export(tmp_path / "bundle", tmp_path / "run").adapters[0].rank > 0


def test_only_the_chosen_layers_learn(tiny_decoder: Path, tmp_path: Path) -> None:
    model, _ = adapted(tiny_decoder, tmp_path, layers=(1, 1))
    layers = {
        name.split("layers.")[1][0] for name, p in model.named_parameters() if p.requires_grad
    }
    assert layers == {"1"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [1]}, "layers is no range"),
        ({"layers": [2, 1]}, "layers is no range"),
        ({"init": "eva"}, "calibration data"),
        ({"init": "pisa"}, "is not known"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(
    tiny_decoder: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        sft_recipe(tiny_decoder, tmp_path, parameters=settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": (0, 2)}, "beyond the last layer"),
        ({"init": "orthogonal", "rank": 3}, "even rank"),
        ({"init": "pissa", "rank": 64}, "at most 32"),
        ({"rank": 129}, "at most 128 for this base"),
        ({"rank_pattern": {"q_proj": 10**18}}, "at most 128 for this base"),
        ({"rank_pattern": {"query": 4}}, "expected .*q_proj.*, got query"),
    ],
)
def test_what_does_not_fit_the_base_is_refused(
    tiny_decoder: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        adapted(tiny_decoder, tmp_path, **settings)
