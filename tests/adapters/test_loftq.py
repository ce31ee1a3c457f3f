"""`init = "loftq"`: the adapter starts with the rank-r part of what rounding the base loses, on the
base that ships.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from export_helpers import export
from peft import PeftModel
from resume_helpers import WEIGHTS, stopped_at
from training_helpers import intent_recipe, q4_1, sft_recipe, silent
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from edgetune.adapters.first_weights import adapted_layers, start_from_rounding
from edgetune.adapters.lora import adapt
from edgetune.adapters.runs import load_adapted_model
from edgetune.core.errors import RecipeError
from edgetune.core.files import sha256_file
from edgetune.models.base import Base
from edgetune.models.fake_quantise import round_weights
from edgetune.models.load import load_body
from edgetune.models.resolve import resolve_base
from edgetune.quantisation.blocks import quantise
from edgetune.quantisation.precision import Precision, shipped_precision
from edgetune.recipe.schema import Parameters
from edgetune.training import run_recipe

LOFTQ = {"init": "loftq", "base_precision": "int4", "rank": 4}
IDS = torch.tensor([[5, 9, 30, 31, 7]])


def rounded(folder: Path, weights: str = "int4") -> Base:
    base = resolve_base(str(folder))
    return replace(base, precision=shipped_precision(weights, base.kind))


def started(folder: Path, weights: str = "int4", **settings: Any) -> tuple[PeftModel, Any]:
    """The rounded base with LoftQ's adapter, and the base as it is."""
    base, original = rounded(folder, weights), load_body(resolve_base(str(folder)))
    torch.manual_seed(0)
    model = adapt(
        load_body(base),
        Parameters(**{"init": "loftq", "base_precision": weights, "rank": 4, **settings}),
        task="text-generation",
    )
    assert base.precision is not None
    start_from_rounding(model, original, base.precision)
    return model, original


@pytest.mark.parametrize("weights", ["int4", "int8"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"rslora": True, "alpha": 3.0},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3.0}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_it_starts_with_the_truncated_svd_of_the_rounding_error(
    tiny_decoder: Path, weights: str, more: dict[str, Any]
) -> None:
    model, original = started(tiny_decoder, weights, **more)
    layers = dict(adapted_layers(model))
    assert len(layers) == 14
    for name, layer in layers.items():
        weight = original.get_submodule(name.removeprefix("base_model.model.")).weight.detach()
        stored = quantise(weight, bits=4 if weights == "int4" else 8).dequantise()
        assert torch.equal(layer.get_base_layer().weight, stored)
        u, s, v = torch.linalg.svd((weight - stored).double())
        rank = layer.r["default"]
        expected = (u[:, :rank] * s[:rank]) @ v[:rank]
        start = (
            layer.scaling["default"]
            * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
        )
        assert (start - expected).abs().max() < 1e-5
        assert (start - expected).norm() < 1e-4 * expected.norm()
        assert (weight - stored - start).norm() < 0.98 * (weight - stored).norm()


def test_the_base_with_it_answers_nearer_to_the_base_as_it_is(tiny_decoder: Path) -> None:
    model, original = started(tiny_decoder, rank=32)
    with torch.no_grad():
        expected, near = original(input_ids=IDS).logits, model(input_ids=IDS).logits
        with model.disable_adapter():
            far = model(input_ids=IDS).logits
    assert (near - expected).norm() < 0.5 * (far - expected).norm()


def test_the_magnitudes_of_dora_are_those_of_the_sum(tiny_decoder: Path) -> None:
    plain, with_magnitudes = started(tiny_decoder)[0], started(tiny_decoder, dora=True)[0]
    with torch.no_grad():
        torch.testing.assert_close(
            with_magnitudes(input_ids=IDS).logits, plain(input_ids=IDS).logits, atol=1e-4, rtol=1e-4
        )


def test_a_weight_that_lies_transposed_starts_the_same_way(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    )
    torch.nn.init.normal_(model.transformer.h[0].mlp.c_fc.weight)
    model.save_pretrained(tmp_path)
    original, precision = GPT2LMHeadModel.from_pretrained(tmp_path), Precision("int4")
    round_weights(model, precision)
    adapted = adapt(
        model,
        Parameters(rank=32, init="loftq", base_precision="int4", target_modules=("c_fc",)),
        task="text-generation",
    )
    start_from_rounding(adapted, original, precision)
    with torch.no_grad():  # of full rank it makes up for all of it
        weight = adapted.merge_and_unload().transformer.h[0].mlp.c_fc.weight
        torch.testing.assert_close(
            weight, original.transformer.h[0].mlp.c_fc.weight, atol=1e-5, rtol=1e-5
        )


def test_layers_whose_grid_is_kept_start_as_ever_and_a_base_of_such_is_refused(
    tiny_decoder: Path,
) -> None:
    on_grid = load_body(rounded(tiny_decoder))  # what int4 stored already
    with torch.no_grad():  # a grid that is kept but for a fiftieth of a step
        on_grid.get_submodule("model.layers.0.mlp.up_proj").weight.copy_(q4_1(128, 64))
    before = copy.deepcopy(on_grid)
    round_weights(before, Precision("int4"))
    model = adapt(before, Parameters(init="loftq", base_precision="int4"), task="text-generation")
    drawn = {name: layer.lora_A["default"].weight.clone() for name, layer in adapted_layers(model)}
    with pytest.raises(RecipeError, match='"loftq" has nothing to start from: int4 keeps the grid'):
        start_from_rounding(model, on_grid, Precision("int4"))
    changed = next(name for name in drawn if name.endswith("layers.1.mlp.up_proj"))
    with torch.no_grad():
        on_grid.get_submodule(changed.removeprefix("base_model.model.")).weight[:, ::2] += 0.01
    start_from_rounding(model, on_grid, Precision("int4"))
    for name, layer in adapted_layers(model):
        assert torch.equal(layer.lora_A["default"].weight, drawn[name]) == (name != changed)
        assert bool(layer.lora_B["default"].weight.any()) == (name == changed)


def test_a_trained_one_loads_in_peft_and_exports_with_proof(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    run_recipe(
        sft_recipe(tiny_decoder, tmp_path, parameters=LOFTQ),
        out=tmp_path / "run",
        progress=silent(),
    )
    config = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["r"]) == (True, 4)
    base = AutoModelForCausalLM.from_pretrained(tiny_decoder, dtype=torch.float32)
    round_weights(base, shipped_precision("int4", "decoder"))
    theirs, (ours, _, _) = (
        PeftModel.from_pretrained(base, str(tmp_path / "run/adapter")).eval(),
        load_adapted_model(tmp_path / "run"),
    )
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=IDS).logits, ours(input_ids=IDS).logits)
    proof = export(tmp_path / "bundle", tmp_path / "run", precision="int4").proof["adapters"]["run"]
    assert proof["passed"]


def test_an_encoder_starts_there_too(tiny_encoder: Path, tmp_path: Path) -> None:
    recipe = intent_recipe(tiny_encoder, tmp_path, parameters=LOFTQ)
    run_recipe(recipe, out=tmp_path / "run", progress=silent())
    plain = replace(recipe, parameters=replace(recipe.parameters, init="default"))
    run_recipe(plain, out=tmp_path / "plain", progress=silent())
    assert sha256_file(tmp_path / "run" / WEIGHTS) != sha256_file(tmp_path / "plain" / WEIGHTS)
    assert export(tmp_path / "bundle", tmp_path / "run", precision="int4").proof["adapters"]["run"][
        "passed"
    ]


def test_killed_and_resumed_it_ends_with_the_same_adapter(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    recipe = replace(
        sft_recipe(tiny_decoder, tmp_path, parameters={**LOFTQ, "dropout": 0.2}), checkpoint_every=2
    )
    run_recipe(recipe, out=tmp_path / "whole", progress=silent())
    stopped_at(3, recipe, tmp_path / "run")
    run_recipe(recipe, out=tmp_path / "run", progress=silent(), resume=True)
    assert sha256_file(tmp_path / "run" / WEIGHTS) == sha256_file(tmp_path / "whole" / WEIGHTS)


def test_without_a_rounded_base_it_is_refused_with_what_to_set(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"not rounded.*Set parameters\.base_precision"):
        sft_recipe(tiny_decoder, tmp_path, parameters={"init": "loftq"})


def test_a_rank_that_no_weight_has_is_refused(tiny_decoder: Path) -> None:
    with pytest.raises(RecipeError, match="at most 32"):
        started(tiny_decoder, rank=64)
