"""`base_precision` through the whole of training: every task, resume, rollouts, forgetting, and
what is refused.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_helpers import VOWELS, prompt_recipe
from resume_helpers import WEIGHTS, stopped_at
from torch import nn
from training_helpers import intent_recipe, resolved, sft_recipe, silent
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from edgetune.adapters.folder import AdapterMetadata, save_adapter
from edgetune.adapters.lora import adapt
from edgetune.adapters.runs import load_adapted_model
from edgetune.core.errors import RecipeError
from edgetune.core.files import sha256_file
from edgetune.models.base import Base
from edgetune.models.fake_quantise import round_weights
from edgetune.models.heads import RewardModel
from edgetune.models.load import load_body
from edgetune.models.masked_lm import load_masked_lm
from edgetune.models.resolve import resolve_base
from edgetune.quantisation.blocks import quantise
from edgetune.quantisation.precision import Precision, shipped_precision
from edgetune.recipe.own_settings import Grpo
from edgetune.recipe.schema import Parameters
from edgetune.training import run_recipe
from edgetune.training.reinforcement import engine_rollout
from edgetune.training.reinforcement.engine_rollout import EngineRollout
from edgetune.training.reinforcement.rewards import reward_notes
from edgetune.training.stage_model import RunModel

INT4 = {"base_precision": "int4"}


def rounded(folder: Path, weights: str = "int4") -> Base:
    base = resolve_base(str(folder))
    return replace(base, precision=shipped_precision(weights, base.kind))


def body_of(model: Any) -> dict[str, torch.Tensor]:
    """The weights of the body, an adapter's left out."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    tensors = getattr(inner, "body", inner).state_dict()
    return {
        name.replace(".base_layer", ""): tensor
        for name, tensor in tensors.items()
        if "lora_" not in name
    }


def is_rounded(model: Any, folder: Path, weights: str = "int4") -> bool:
    expected = load_body(rounded(folder, weights)).state_dict()
    held = body_of(model)
    return held.keys() == expected.keys() and all(
        torch.equal(held[name], tensor) for name, tensor in expected.items()
    )


def test_killed_and_resumed_it_ends_with_the_same_adapter(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    recipe = replace(
        sft_recipe(tiny_decoder, tmp_path, parameters={"rank": 2, "dropout": 0.2, **INT4}),
        checkpoint_every=2,
    )
    run_recipe(recipe, out=tmp_path / "whole", progress=silent())
    stopped_at(3, recipe, tmp_path / "run")
    run_recipe(recipe, out=tmp_path / "run", progress=silent(), resume=True)
    assert sha256_file(tmp_path / "run" / WEIGHTS) == sha256_file(tmp_path / "whole" / WEIGHTS)


def test_a_run_is_not_resumed_on_other_weights(tiny_decoder: Path, tmp_path: Path) -> None:
    recipe = replace(sft_recipe(tiny_decoder, tmp_path, parameters=INT4), checkpoint_every=2)
    stopped_at(3, recipe, tmp_path / "run")
    other = replace(recipe, parameters=replace(recipe.parameters, base_precision="int8"))
    with pytest.raises(
        RecipeError,
        match=(
            r'expected parameters\.base_precision = "int4", got parameters\.base_precision = "int8"'
        ),
    ):
        run_recipe(other, out=tmp_path / "run", progress=silent(), resume=True)


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_training_and_what_it_is_compared_with_have_the_rounded_base(
    tiny_decoder: Path, tmp_path: Path, weights: str
) -> None:
    recipe = sft_recipe(tiny_decoder, tmp_path, parameters={"base_precision": weights})
    run, base = RunModel(resolved(recipe)), rounded(tiny_decoder, weights)
    assert is_rounded(run.model, tiny_decoder, weights)
    ids = torch.tensor([[5, 9, 30, 31]])
    with (
        torch.no_grad(),
        run.before() as before,
    ):  # of forgetting, of the adapter's effect, of the KL penalty
        assert torch.equal(before(input_ids=ids).logits, load_body(base)(input_ids=ids).logits)


def test_a_head_alone_learns_on_the_rounded_body(tiny_encoder: Path, tmp_path: Path) -> None:
    recipe = intent_recipe(tiny_encoder, tmp_path, parameters={"train": "head", **INT4})
    summary = run_recipe(recipe, out=tmp_path / "run", progress=silent())
    model, _, metadata = load_adapted_model(tmp_path / "run")
    assert is_rounded(model, tiny_encoder) and metadata["base_precision"] == summary.base_precision
    plain = intent_recipe(tiny_encoder, tmp_path, parameters={"train": "head"})
    assert (
        summary.train_loss
        != run_recipe(plain, out=tmp_path / "plain", progress=silent()).train_loss
    )


def test_masked_lm_predicts_from_the_rounded_body(tiny_encoder: Path) -> None:
    model, _ = load_masked_lm(rounded(tiny_encoder), seed=0)
    expected = body_of(load_body(rounded(tiny_encoder)))
    held = model.base_model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in held.items())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_all_weights_cannot_learn_on_a_rounded_base(tiny_decoder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r'parameters\.base_precision = "int4" has no meaning with train = "full"'
    ):
        sft_recipe(tiny_decoder, tmp_path, parameters={"train": "full", **INT4})


def test_an_unknown_precision_is_refused(tiny_decoder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match='expected one of "int4", "int8"'):
        sft_recipe(tiny_decoder, tmp_path, parameters={"base_precision": "int3"})


def test_grpo_samples_with_the_weights_that_are_trained_on(
    tiny_decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []

    class Watched(EngineRollout):
        def __init__(self, engine: Any, *, end: int) -> None:
            found.append((engine.manifest.precision, engine.logits([[5, 9, 30, 31]], [None])[0]))
            super().__init__(engine, end=end)

    monkeypatch.setattr(engine_rollout, "EngineRollout", Watched)
    recipe = prompt_recipe(
        tiny_decoder,
        tmp_path,
        VOWELS,
        rollout="engine",
        max_steps=1,
        max_new_tokens=8,
        group_size=2,
    )
    run_recipe(
        replace(recipe, parameters=replace(recipe.parameters, base_precision="int4")),
        out=tmp_path / "run",
        progress=silent(),
    )
    ((stored, logits),) = found
    assert (stored.weights, stored.overrides) == ("int4", {"lm_head": "int8"})
    exact, plain = (
        _logits(load_body(base))
        for base in (rounded(tiny_decoder), resolve_base(str(tiny_decoder)))
    )
    assert abs(logits - exact).max() * 4 < abs(logits - plain).max()


@torch.no_grad()
def _logits(model: Any) -> Any:
    return model(input_ids=torch.tensor([[5, 9, 30, 31]])).logits[0].numpy()


def test_a_reward_that_learned_on_other_weights_is_told_in_a_line(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    base = resolve_base(str(tiny_decoder))
    model = adapt(RewardModel(load_body(base)), Parameters(rank=2), task="reward")
    save_adapter(
        model,
        tmp_path / "reward",
        AdapterMetadata(base={"name": base.name, "digest": base.digest}, task="reward"),
    )
    settings = prompt_recipe(tiny_decoder, tmp_path, str(tmp_path / "reward")).stage[0].own(Grpo)
    assert list(reward_notes(settings, base)) == []
    (line,) = reward_notes(settings, rounded(tiny_decoder))
    assert "was trained on the unrounded base and scores on the int4 one" in line


def llama(**config: Any) -> LlamaForCausalLM:
    sizes = {
        "vocab_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(**{**sizes, "hidden_size": 64, "intermediate_size": 96, **config})
    )


def test_an_embedding_that_stays_float_is_untied_from_a_rounded_output_projection() -> None:
    model = llama(
        hidden_size=48, intermediate_size=80, tie_word_embeddings=True
    )  # the engine's embedding wants whole blocks
    table = model.model.embed_tokens.weight.clone()
    round_weights(model, shipped_precision("int4", "decoder"))
    assert torch.equal(model.model.embed_tokens.weight, table)
    assert torch.equal(model.lm_head.weight, quantise(table, bits=8).dequantise())


def test_an_untied_embedding_takes_eight_bits_and_norms_stay() -> None:
    model = llama(tie_word_embeddings=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    round_weights(model, shipped_precision("int4", "decoder"))
    assert torch.equal(
        model.model.embed_tokens.weight,
        quantise(before["model.embed_tokens.weight"], bits=8).dequantise(),
    )
    assert torch.equal(
        model.lm_head.weight, quantise(before["lm_head.weight"], bits=8).dequantise()
    )
    down = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(model.state_dict()[down], quantise(before[down], bits=4).dequantise())
    assert all(
        torch.equal(before[name], tensor)
        for name, tensor in model.state_dict().items()
        if "norm" in name
    )


def test_layers_that_keep_their_weight_transposed_are_rounded_along_their_inputs() -> None:
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=4, n_positions=32)
    )
    nn.init.normal_(model.transformer.h[0].mlp.c_fc.weight)
    weight = model.transformer.h[0].mlp.c_fc.weight.clone()  # (in, out)
    round_weights(model, Precision("int4"))
    assert torch.equal(
        model.transformer.h[0].mlp.c_fc.weight, quantise(weight.t(), bits=4).dequantise().t()
    )
