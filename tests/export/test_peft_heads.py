"""Classifiers of transformers' own shape, with PEFT as the reference: a stranger's adapter answers
in a bundle as in PEFT, and ours in PEFT as in a bundle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_helpers import export
from family_helpers import ENCODERS, make_family, some
from peft_helpers import TEXTS, logits_of, opened, probabilities, stranger
from training_helpers import intent_recipe, silent

from edgetune.core.errors import AdapterError
from edgetune.export.bundle import export_bundle
from edgetune.quantisation.precision import Precision
from edgetune.runtime import Runtime
from edgetune.training import run_recipe

FAST = ("bert", "modernbert")


def ship(base: Path, out: Path, *adapters: Path, **options: Any) -> Path:
    export_bundle(
        [(folder.name, folder) for folder in adapters],
        out,
        precision=Precision("fp32"),
        base_name=str(base),
        threads=1,
        **options,
    )
    return out


def answers(bundle: Path, adapter: str | None) -> np.ndarray:
    with Runtime.open(bundle, threads=1) as runtime:
        found = runtime.classify(TEXTS, adapter)
    return np.array([list(one.scores.values()) for one in found])


@pytest.mark.parametrize("family", some(ENCODERS, fast=FAST))
def test_a_strangers_classifier_answers_as_in_peft(
    family: str, tiny_encoder: Path, tmp_path: Path
) -> None:
    base = make_family(family, tiny_encoder, tmp_path / "base")
    want = probabilities(logits_of(stranger(base, tmp_path / "theirs"), base))
    bundle = ship(base, tmp_path / "bundle", tmp_path / "theirs")
    assert np.allclose(answers(bundle, "theirs"), want, atol=1e-5)
    merged = ship(base, tmp_path / "merged", tmp_path / "theirs", mode="merged")
    assert np.allclose(answers(merged, None), want, atol=1e-5)


@pytest.mark.parametrize("family", some(ENCODERS, fast=FAST))
def test_a_classifier_of_ours_answers_in_peft_as_in_its_bundle(
    family: str, tiny_encoder: Path, tmp_path: Path
) -> None:
    base = make_family(family, tiny_encoder, tmp_path / "base")
    run_recipe(intent_recipe(base, tmp_path), out=tmp_path / "ours", progress=silent())
    export(tmp_path / "bundle", tmp_path / "ours")
    theirs = opened(base, tmp_path / "ours" / "adapter", labels=3)
    assert np.allclose(
        answers(tmp_path / "bundle", "ours"), probabilities(logits_of(theirs, base)), atol=1e-5
    )


@pytest.mark.parametrize("family", some(ENCODERS, fast=FAST))
def test_a_strangers_tagger_answers_as_in_peft(
    family: str, tiny_encoder: Path, tmp_path: Path
) -> None:
    base = make_family(family, tiny_encoder, tmp_path / "base")
    want = logits_of(stranger(base, tmp_path / "theirs", labels=5, task="TOKEN_CLS"), base)
    bundle = ship(base, tmp_path / "bundle", tmp_path / "theirs")
    with Runtime.open(bundle, threads=1) as runtime:
        ids = [runtime.text_ids(text) for text in TEXTS]
        logits, _ = runtime.opened.need_encoder().tokens(ids, [runtime.bound("theirs")] * len(ids))
    assert np.allclose(np.concatenate(logits), want, atol=1e-4)


def test_heads_of_every_kind_answer_beside_each_other_in_one_batch(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    """tiny_encoder is a sentence encoder: ours read its mean, a stranger's BERT its pooler."""
    run_recipe(intent_recipe(tiny_encoder, tmp_path), out=tmp_path / "ours", progress=silent())
    want = probabilities(logits_of(stranger(tiny_encoder, tmp_path / "a", seed=1), tiny_encoder))
    number = logits_of(stranger(tiny_encoder, tmp_path / "b", labels=1, seed=2), tiny_encoder)
    bundle = ship(tiny_encoder, tmp_path / "bundle", tmp_path / "ours", tmp_path / "a")
    alone = answers(bundle, "ours")
    with Runtime.open(bundle, threads=1) as runtime:
        runtime.load_adapter("b", tmp_path / "b")
        names = ["ours", "a", "b", "a", "ours", "b"]
        found = runtime.classify([TEXTS[i % 4] for i in range(6)], adapters=names)
    rows = [list(one.scores.values()) for one in found]
    assert np.allclose(rows[0], alone[0], atol=1e-5) and np.allclose(rows[4], alone[0], atol=1e-5)
    assert np.allclose(rows[1], want[1], atol=1e-5) and np.allclose(rows[3], want[3], atol=1e-5)
    assert found[2].value == pytest.approx(float(number[2, 0]), abs=1e-4)
    assert found[5].value == pytest.approx(float(number[1, 0]), abs=1e-4)


def test_a_pooler_with_low_rank_weights_answers_as_in_peft(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    model = stranger(tiny_encoder, tmp_path / "theirs", target_modules=["query", "dense"])
    want = probabilities(logits_of(model, tiny_encoder))
    bundle = ship(tiny_encoder, tmp_path / "bundle", tmp_path / "theirs")
    assert np.allclose(answers(bundle, "theirs"), want, atol=1e-5)


def test_a_layer_that_peft_did_not_save_and_the_base_lacks_is_named(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    base = make_family("modernbert", tiny_encoder, tmp_path / "base")
    stranger(base, tmp_path / "theirs", modules_to_save=["classifier"], target_modules=["Wqkv"])
    with pytest.raises(AdapterError, match=r"head.dense.weight: missing.*modules_to_save"):
        ship(base, tmp_path / "bundle", tmp_path / "theirs")
