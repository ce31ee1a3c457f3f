"""Classification on decoders: trained, shipped beside adapters that generate, and the same in PEFT,
with transformers' …ForSequenceClassification as the reference.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_helpers import export
from family_helpers import make_family
from peft_helpers import TEXTS, logits_of, opened, probabilities, stranger
from server_helpers import serve
from training_helpers import ROOMS, intent_recipe, recipe, sft_recipe, silent, write_rows

from edgetune.core.errors import InputError, RecipeError
from edgetune.export.bundle import export_bundle
from edgetune.quantisation.precision import Precision
from edgetune.runtime import Runtime
from edgetune.training import run_recipe

PROBLEMS: dict[str, list[Any]] = {
    "multi-label": [["lights"], [], ["lights", "heat"], ["heat"]],
    "regression": [1.0, 2.5, 3.0, 0.5],
}


def problem_run(base: Path, folder: Path, problem: str) -> Path:
    """A run of four rows, each with one of PROBLEMS' labels."""
    rows = [
        {"text": f"in the {room}", "label": label}
        for room, label in zip(ROOMS, PROBLEMS[problem], strict=True)
    ]
    train = write_rows(folder / f"{problem}.jsonl", rows)
    run = folder / problem.replace("-", "_")
    asked = recipe(base, "sequence-classification", train, train, problem=problem)
    run_recipe(asked, out=run, progress=silent())
    return run


@cache
def bundle(base: Path) -> Path:
    """A trained classifier of each problem, one of a stranger's, and an adapter that generates."""
    root = base.parent / f"{base.name}-classifiers"
    root.mkdir()
    run_recipe(intent_recipe(base, root), out=root / "intent", progress=silent())
    run_recipe(sft_recipe(base, root, epochs=1), out=root / "writer", progress=silent())
    runs = [problem_run(base, root, problem) for problem in PROBLEMS]
    stranger(base, root / "theirs", labels=4, modules_to_save=None)
    export_bundle(
        [(f.name, f) for f in (root / "intent", root / "writer", *runs, root / "theirs")],
        root / "bundle",
        precision=Precision("fp32"),
        base_name=str(base),
        threads=1,
    )
    return root / "bundle"


def rows_of(found: Any) -> np.ndarray:
    return np.array([list(one.scores.values()) for one in found])


def test_ours_and_a_strangers_answer_as_in_peft_in_one_batch(tiny_decoder: Path) -> None:
    folder = bundle(tiny_decoder)
    ours = opened(tiny_decoder, folder.parent / "intent" / "adapter", labels=3)
    theirs = opened(tiny_decoder, folder.parent / "theirs", labels=4)
    with Runtime.open(folder, threads=1) as runtime:
        found = runtime.classify([*TEXTS, *TEXTS], adapters=["intent"] * 4 + ["theirs"] * 4)
        written = runtime.generate(["turn on"], "writer", max_new_tokens=2)[0]
    for rows, model in ((found[:4], ours), (found[4:], theirs)):
        want = probabilities(logits_of(model, tiny_decoder, TEXTS))
        assert np.allclose(rows_of(rows), want, atol=1e-5)
    assert [one.label for one in found[4:]] == [
        f"LABEL_{i}" for i in logits_of(theirs, tiny_decoder, TEXTS).argmax(-1)
    ]
    assert written.completion_tokens == 2


def test_several_labels_and_a_number_answer_as_in_peft(tiny_decoder: Path) -> None:
    folder = bundle(tiny_decoder)
    several = opened(tiny_decoder, folder.parent / "multi_label" / "adapter", labels=2)
    number = opened(tiny_decoder, folder.parent / "regression" / "adapter", labels=1)
    with Runtime.open(folder, threads=1) as runtime:
        sets, values = (runtime.classify(TEXTS, name) for name in ("multi_label", "regression"))
    chances = 1 / (1 + np.exp(-logits_of(several, tiny_decoder, TEXTS)))
    assert np.allclose(rows_of(sets), chances, atol=1e-5)
    assert [len(one.labels or ()) for one in sets] == (chances >= 0.5).sum(-1).tolist()
    wanted = logits_of(number, tiny_decoder, TEXTS)[:, 0]
    assert np.allclose([one.value for one in values], wanted, atol=1e-4)


def test_a_server_classifies_with_a_decoder_and_generates_beside_it(tiny_decoder: Path) -> None:
    with serve(bundle(tiny_decoder)) as server:
        answer = server.post("/classify", {"model": "intent", "input": list(TEXTS)}).json()
        expected = server.runtime.classify(TEXTS, "intent")
        wrong = server.post("/classify", {"model": "writer", "input": "x"})
        text = server.post("/v1/completions", {"model": "intent", "prompt": "x"})
    assert np.allclose([row["probs"] for row in answer["data"]], rows_of(expected), atol=1e-5)
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "wrong_task")
    assert text.status_code == 400 and "classifies texts" in text.json()["error"]["message"]


def test_a_classifier_writes_no_text_and_a_writer_gives_no_label(tiny_decoder: Path) -> None:
    with Runtime.open(bundle(tiny_decoder), threads=1) as runtime:
        with pytest.raises(InputError, match="gives labels, not text"):
            runtime.generate(["x"], "intent")
        with pytest.raises(InputError, match="no labels"):
            runtime.classify(["x"], "writer")


def test_a_merged_classifier_answers_as_its_adapter(tiny_decoder: Path, tmp_path: Path) -> None:
    folder = bundle(tiny_decoder)
    export(tmp_path / "merged", folder.parent / "intent", mode="merged")
    with Runtime.open(folder, threads=1) as runtime:
        apart = rows_of(runtime.classify(TEXTS, "intent"))
    with Runtime.open(tmp_path / "merged", threads=1) as runtime:
        assert np.allclose(rows_of(runtime.classify(TEXTS)), apart, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "opt", "qwen3"])
def test_other_families_answer_as_in_peft(family: str, tiny_decoder: Path, tmp_path: Path) -> None:
    base = make_family(family, tiny_decoder, tmp_path / "base")
    run_recipe(intent_recipe(base, tmp_path), out=tmp_path / "ours", progress=silent())
    export(tmp_path / "bundle", tmp_path / "ours")
    theirs = opened(base, tmp_path / "ours" / "adapter", labels=3)
    with Runtime.open(tmp_path / "bundle", threads=1) as runtime:
        found = rows_of(runtime.classify(TEXTS, "ours"))
    assert np.allclose(found, probabilities(logits_of(theirs, base, TEXTS)), atol=1e-5)


def test_it_learns_in_bf16_and_as_a_head_alone(tiny_decoder: Path, tmp_path: Path) -> None:
    asked = intent_recipe(tiny_decoder, tmp_path, precision="bf16")
    run = run_recipe(asked, out=tmp_path / "bf16", progress=silent())
    assert run.metrics["accuracy"] >= 0.5
    asked = intent_recipe(tiny_decoder, tmp_path, parameters={"train": "head"})
    run = run_recipe(asked, out=tmp_path / "head", progress=silent())
    assert run.metrics["accuracy"] >= 0.5


def test_all_weights_are_not_trained_for_it(tiny_decoder: Path, tmp_path: Path) -> None:
    asked = intent_recipe(tiny_decoder, tmp_path, parameters={"train": "full"})
    with pytest.raises(RecipeError, match="does not fit sequence-classification on a decoder"):
        run_recipe(asked, out=tmp_path / "run", progress=silent())
