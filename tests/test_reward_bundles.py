"""Reward adapters in a decoder bundle: scores as in torch, beside adapters that generate, and nothing mixed up."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_helpers import decoder_feed, export, make_adapter, plain_session
from preference_helpers import QUESTIONS, adapted, pair_recipe, pair_rows
from training_helpers import silent, write_rows

from edgetune.adapters import AdapterMetadata, save_adapter
from edgetune.bases import resolve_base
from edgetune.cli import main
from edgetune.errors import AdapterError, InputError
from edgetune.evaluate import evaluate
from edgetune.export.bundle import reprove
from edgetune.prompts import PromptFormat
from edgetune.runtime import Runtime, Scheduler, read_manifest
from edgetune.torch_answers import TorchAnswers
from edgetune.training import run_recipe

PROMPTS: list[Any] = [*QUESTIONS, [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "So?"}]]
ANSWERS = ["Yes, with pleasure, right away.", "No way, you fool", "x", "Yes.", "No, " * 20]


@cache
def reward_run(base: Path) -> Path:
    """A trained reward run with an effect that rounding does not hide."""
    root = base.parent / f"{base.name}-reward"
    root.mkdir()
    out = root / "polite"
    run_recipe(pair_recipe(base, root, "reward", epochs=6), out=out, progress=silent())
    return out


@cache
def plain_reward(base: Path) -> Path:
    """A reward adapter on plain prompts with a system message it never saw, random and strong."""
    folder = base.parent / f"{base.name}-reward" / "plain"
    reward_run(base)
    model = adapted(base, task="reward", noise=0.2, seed=3)
    found = resolve_base(str(base))
    form = PromptFormat(template="plain", prompt="{{ prompt }}", chosen="{{ chosen }}", rejected="{{ rejected }}")
    metadata = AdapterMetadata(base={"name": found.name, "digest": found.digest}, task="reward", prompt_format=form.to_dict(), max_length=64)
    save_adapter(model, folder, metadata)
    return folder


@cache
def bundle(base: Path) -> Path:
    """Two rewards and an adapter that generates on one fp32 decoder."""
    out = base.parent / f"{base.name}-reward-bundle"
    talk = make_adapter(base, base.parent / f"{base.name}-reward-talk" / "talk", seed=5)
    export(out, reward_run(base), plain_reward(base), talk)
    return out


@pytest.fixture(scope="module")
def runtime(tiny_decoder: Path) -> Any:
    with Runtime.open(bundle(tiny_decoder), threads=1) as opened:
        yield opened


def test_rewards_pass_their_proof_beside_an_adapter_that_generates(tiny_decoder: Path) -> None:
    manifest = read_manifest(bundle(tiny_decoder))
    assert [(entry.name, entry.task, entry.labels) for entry in manifest.adapters] == [
        ("polite", "reward", None), ("plain", "reward", None), ("talk", "text-generation", None),
    ]  # fmt: skip
    proofs = manifest.proof["adapters"]
    assert manifest.task == "text-generation" and all(proof["passed"] for proof in proofs.values())
    assert proofs["polite"]["max_abs"] < 1e-4 and proofs["polite"]["direction"] > 0.999
    assert proofs["polite"]["positions"] == len(manifest.proof["probe"]["polite"])  # one score a row
    assert all(proof.passed for proof in reprove(bundle(tiny_decoder), manifest, threads=1).values())


@pytest.mark.parametrize("name", ["polite", "plain"])
def test_scores_are_torchs(tiny_decoder: Path, runtime: Runtime, name: str) -> None:
    folder = reward_run(tiny_decoder) if name == "polite" else plain_reward(tiny_decoder)
    prompts, answers = (PROMPTS, ANSWERS) if name == "polite" else (PROMPTS[:4], ANSWERS[1:])
    expected = TorchAnswers.open(folder).rewards(prompts, answers)
    found = runtime.score(list(zip(prompts, answers, strict=True)), name)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)
    assert np.std(expected) > 1e-2
