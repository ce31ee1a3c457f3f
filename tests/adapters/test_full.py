"""parameters.train = "full": a run whose result is a base of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from export_helpers import export
from training_helpers import (
    decoder_batch,
    intent_recipe,
    intent_rows,
    recipe,
    sft_recipe,
    silent,
    write_rows,
)
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from edgetune.adapters.runs import load_adapted_model
from edgetune.core.errors import ExportError
from edgetune.evaluation.evaluate import evaluate
from edgetune.export.bundle import export_bundle
from edgetune.export.proof.prove import reprove
from edgetune.models.load import load_body
from edgetune.models.resolve import resolve_base
from edgetune.objectives.language import completion_logits
from edgetune.quantisation.precision import Precision
from edgetune.runtime import Runtime
from edgetune.runtime.bundle.manifest import read_manifest
from edgetune.training import run_recipe

FULL = {"train": "full"}


@pytest.fixture(scope="module")
def full_run(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    recipe = sft_recipe(tiny_decoder, folder, epochs=8, learning_rate=1e-3, parameters=FULL)
    run_recipe(recipe, out=folder / "run", progress=silent())
    return folder / "run"


def test_every_weight_learns_and_the_base_is_what_it_is_compared_with(
    full_run: Path, tiny_decoder: Path
) -> None:
    summary = json.loads((full_run / "summary.json").read_text())
    base = load_body(resolve_base(str(tiny_decoder)))
    trained = AutoModelForCausalLM.from_pretrained(full_run / "model")
    assert summary["trainable_parameters"] == sum(p.numel() for p in base.parameters())
    assert summary["metrics"]["loss"] < 0.5 * summary["base_metrics"]["loss"]
    assert summary["effect"]["mean_kl"] > 0.1
    changed = [
        name
        for name, p in base.named_parameters()
        if not torch.equal(p, trained.get_parameter(name))
    ]
    assert len(changed) == len(list(base.named_parameters()))


def test_the_run_holds_a_model_that_transformers_loads_and_no_adapter(
    full_run: Path, tmp_path: Path
) -> None:
    assert not (full_run / "adapter").exists()
    theirs = AutoModelForCausalLM.from_pretrained(full_run / "model", dtype=torch.float32).eval()
    ours, _, metadata = load_adapted_model(full_run)
    _, batch = decoder_batch(full_run / "model", tmp_path)
    assert torch.equal(completion_logits(ours, batch)[0], completion_logits(theirs, batch)[0])
    assert metadata["prompt_format"]["prompt"] == "{{ prompt }}"
    assert AutoTokenizer.from_pretrained(full_run / "model").chat_template


def test_eval_and_the_next_recipe_take_the_run(full_run: Path, tmp_path: Path) -> None:
    rows = (full_run.parent / "actions-dev.jsonl").read_text()
    (tmp_path / "dev.jsonl").write_text(rows)
    assert evaluate(full_run, tmp_path / "dev.jsonl").rows == 4
    assert resolve_base(str(full_run)).digest == resolve_base(str(full_run / "model")).digest
    summary = run_recipe(
        sft_recipe(full_run, tmp_path, max_steps=2), out=tmp_path / "next", progress=silent()
    )
    assert summary.base["digest"] == resolve_base(str(full_run / "model")).digest


def test_it_exports_as_its_own_base_with_proof(full_run: Path, tmp_path: Path) -> None:
    manifest = export(tmp_path / "bundle", full_run)
    assert (manifest.mode, manifest.base.digest) == (
        "merged",
        resolve_base(str(full_run / "model")).digest,
    )
    assert manifest.adapters[0].prompt_format and manifest.adapters[0].generation
    proof = manifest.proof["adapters"]["run"]
    assert proof["passed"] and proof["adapter_kl"] > 0.1  # away from what the base answers
    assert reprove(tmp_path / "bundle", read_manifest(tmp_path / "bundle"), threads=1)[
        "onnxruntime"
    ]["run"].passed
    prompt = "turn on the lights in the hall"
    from edgetune.evaluation.torch_answers import TorchAnswers

    with Runtime.open(tmp_path / "bundle", threads=1) as runtime:
        assert (
            runtime.generate([prompt])[0].text == TorchAnswers.open(full_run).generate([prompt])[0]
        )


def test_a_base_alone_exports_with_a_proof_of_parity(full_run: Path, tmp_path: Path) -> None:
    base = str(full_run / "model")
    manifest = export_bundle(
        [], tmp_path / "bundle", precision=Precision("fp32"), base_name=base, threads=1
    )
    assert manifest.adapters == () and manifest.proof["adapters"]["(base)"]["passed"]
    assert reprove(tmp_path / "bundle", manifest, threads=1)["onnxruntime"]["(base)"].passed
    with Runtime.open(tmp_path / "bundle", threads=1) as runtime:
        assert runtime.generate(["hello"], max_new_tokens=4)[0].completion_tokens == 4


def test_it_shares_a_bundle_with_no_adapter(full_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="a base of its own"):
        export_bundle([("a", full_run), ("b", full_run)], tmp_path / "bundle")


def test_a_classifier_is_a_base_and_a_head_that_swaps_on_it(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    recipe = intent_recipe(tiny_encoder, tmp_path, epochs=10, learning_rate=3e-4, parameters=FULL)
    summary = run_recipe(recipe, out=tmp_path / "run", progress=silent())
    assert summary.base_metrics is not None and summary.effect["mean_logit_change"] > 0
    assert AutoModel.from_pretrained(tmp_path / "run" / "model").config.model_type == "bert"
    shutil.move(tmp_path / "run", tmp_path / "moved")  # the adapter finds the model beside it
    data = write_rows(tmp_path / "test.jsonl", intent_rows())
    assert evaluate(tmp_path / "moved", data).metrics["accuracy"] == 1.0
    assert export(tmp_path / "bundle", tmp_path / "moved").proof["adapters"]["moved"]["passed"]
    assert evaluate(tmp_path / "bundle", data).metrics["accuracy"] == 1.0


def test_masked_lm_leaves_an_encoder_with_its_head(tiny_encoder: Path, tmp_path: Path) -> None:
    train = write_rows(tmp_path / "text.jsonl", [{"text": row["text"]} for row in intent_rows()])
    text = recipe(tiny_encoder, "masked-lm", train, None, learning_rate=1e-3, parameters=FULL)
    run_recipe(text, out=tmp_path / "run", progress=silent())
    _, report = AutoModelForMaskedLM.from_pretrained(
        tmp_path / "run" / "model", output_loading_info=True
    )
    assert not report["missing_keys"]
    with pytest.raises(ExportError, match="answers nothing"):
        export(tmp_path / "bundle", tmp_path / "run")
    run_recipe(
        intent_recipe(tmp_path / "run" / "model", tmp_path, max_steps=2),
        out=tmp_path / "next",
        progress=silent(),
    )
