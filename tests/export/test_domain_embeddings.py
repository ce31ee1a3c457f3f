"""A masked-lm adapter in a bundle: the encoder's embedding, adapted to the texts it read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from export_helpers import export
from peft import PeftModel
from training_helpers import intent_recipe, masked_recipe, silent
from transformers import AutoModelForMaskedLM, AutoTokenizer

from edgetune.core.errors import InputError
from edgetune.runtime import Runtime
from edgetune.training import run_recipe

TEXTS = ("turn on the lights", "my card has not arrived")


@torch.no_grad()
def mean_states(base: Path, adapter: Path) -> np.ndarray:
    """What a stranger gets of the folder: PEFT around the base's masked-language model, and the
    mean of the body's states, of length 1.
    """
    model = PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(base), adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    body = model.get_base_model().base_model
    found = [
        body(**tokenizer(text, return_tensors="pt")).last_hidden_state.mean(1)[0] for text in TEXTS
    ]
    return torch.nn.functional.normalize(torch.stack(found)).numpy()


@pytest.mark.parametrize("mode", ["separate", "merged"])
def test_a_masked_lm_adapter_ships_as_an_embedding(
    mode: str, tiny_encoder: Path, tmp_path: Path
) -> None:
    run_recipe(masked_recipe(tiny_encoder, tmp_path), out=tmp_path / "domain", progress=silent())
    run_recipe(intent_recipe(tiny_encoder, tmp_path), out=tmp_path / "intent", progress=silent())
    beside = [tmp_path / "intent"] if mode == "separate" else []
    manifest = export(tmp_path / "bundle", tmp_path / "domain", *beside, mode=mode)
    assert manifest.adapters[0].task == "feature-extraction"
    with Runtime.open(tmp_path / "bundle", threads=1) as runtime:
        found = runtime.embed(TEXTS, "domain")
        assert runtime.task("domain") == "feature-extraction"
        with pytest.raises(InputError, match="no labels"):
            runtime.classify(TEXTS, "domain")
        if beside:
            assert runtime.classify(TEXTS, "intent")[0].scores
            assert not np.allclose(runtime.embed(TEXTS), found, atol=1e-3)
    assert np.allclose(found, mean_states(tiny_encoder, tmp_path / "domain" / "adapter"), atol=1e-5)
