"""Class weights: the numbers of scikit-learn and torch, over parts and processes too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn
from training_helpers import intent_recipe, recipe, resolved, sft_recipe, silent, write_rows

from edgetune.core.errors import RecipeError
from edgetune.models.heads import SequenceClassifier, TokenClassifier
from edgetune.models.load import load_body
from edgetune.objectives.labels import word_logits
from edgetune.objectives.language import class_logits
from edgetune.recipe.schema import Recipe
from edgetune.training import run_recipe
from edgetune.training.context import ResolvedStage
from edgetune.training.learner import Learner
from edgetune.training.probes import C, fit_label_probes, fit_probe, output_features

LABELS = ["calm"] * 6 + ["upset"] * 3 + ["angry"]
SENTENCES = [("turn on the lights", "O O O B-X"), ("play a song", "O O O"), ("the hall", "O B-Y")]


def labelled(base: Path, folder: Path, **stage: Any) -> Recipe:
    rows = [{"text": f"message number {i} " * (1 + i), "label": x} for i, x in enumerate(LABELS)]
    train = write_rows(folder / "rows.jsonl", rows)
    return recipe(base, "sequence-classification", train, train, **stage)


def tagged(base: Path, folder: Path, **stage: Any) -> Recipe:
    rows = [{"tokens": text.split(), "tags": tags.split()} for text, tags in SENTENCES]
    train = write_rows(folder / "tagged.jsonl", rows)
    return recipe(base, "token-classification", train, train, **stage)


def multi_labelled(base: Path, folder: Path, **stage: Any) -> Recipe:
    sets = [["a"], ["a", "b"], ["a"], ["b", "c"], [], ["a"]]
    rows = [{"text": f"message number {i}", "label": labels} for i, labels in enumerate(sets)]
    train = write_rows(folder / "sets.jsonl", rows)
    return recipe(base, "sequence-classification", train, train, problem="multi-label", **stage)


def stage_of(made: Recipe) -> ResolvedStage:
    return resolved(made).stages[0]


def weights(made: Recipe) -> Tensor:
    found = stage_of(made).class_weights
    assert found is not None
    return found


def test_balanced_is_what_scikit_learn_computes(tiny_encoder: Path, tmp_path: Path) -> None:
    names = sorted(set(LABELS))
    expected = compute_class_weight("balanced", classes=np.array(names), y=LABELS)
    found = weights(labelled(tiny_encoder, tmp_path, class_weights="balanced"))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    tags = [tag for _, line in SENTENCES for tag in line.split()]
    expected = compute_class_weight("balanced", classes=np.array(sorted(set(tags))), y=tags)
    found = weights(tagged(tiny_encoder, tmp_path, class_weights="balanced"))
    names = list(stage_of(tagged(tiny_encoder, tmp_path)).examples.labels or ())
    by_name = dict(zip(names, found, strict=True))
    np.testing.assert_allclose([by_name[name] for name in sorted(set(tags))], expected, rtol=1e-6)
    found = weights(multi_labelled(tiny_encoder, tmp_path, class_weights="balanced"))
    np.testing.assert_allclose(found.numpy(), [2 / 4, 4 / 2, 5 / 1], rtol=1e-6)


def test_a_table_weighs_the_labels_it_names(tiny_encoder: Path, tmp_path: Path) -> None:
    found = weights(labelled(tiny_encoder, tmp_path, class_weights={"angry": 5, "calm": 0.5}))
    assert found.tolist() == [5.0, 0.5, 1.0]  # angry, calm, upset
    assert stage_of(labelled(tiny_encoder, tmp_path)).class_weights is None


@pytest.mark.parametrize("kind", ["classes", "tags", "sets"])
def test_a_steps_gradient_is_that_of_torchs_weighted_loss(
    kind: str, tiny_encoder: Path, tmp_path: Path
) -> None:
    """In two parts of a step, which torch's loss over all rows at once knows nothing of."""
    make = {"classes": labelled, "tags": tagged, "sets": multi_labelled}[kind]
    stage = stage_of(make(tiny_encoder, tmp_path, class_weights="balanced"))
    model_of = TokenClassifier if kind == "tags" else SequenceClassifier
    torch.manual_seed(0)
    model = model_of(load_body(stage.base), labels=3, pooling="mean").eval()
    rows, by = stage.examples.train, stage.class_weights
    assert by is not None
    parts = [stage.batching.batch(rows[:2], 1), stage.batching.batch(rows[2:], 1)]
    learned = Learner(model, "fp32").add_gradient(
        stage.objective, parts, spare=lambda: parts[0], weight=1.0
    )
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    whole = stage.batching.batch(rows, 1)
    if kind == "tags":
        loss = nn.CrossEntropyLoss(weight=by)(*word_logits(model, whole))
    elif kind == "sets":
        loss = nn.BCEWithLogitsLoss(pos_weight=by)(class_logits(model, whole), whole.labels)
    else:
        loss = nn.CrossEntropyLoss(weight=by)(class_logits(model, whole), whole.labels)
    loss.backward()
    assert learned.loss == pytest.approx(loss.item(), abs=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, atol=1e-6, rtol=1e-5)


def test_the_heads_first_weights_are_weighed_too(tiny_encoder: Path, tmp_path: Path) -> None:
    stage = stage_of(labelled(tiny_encoder, tmp_path, class_weights="balanced"))
    torch.manual_seed(0)
    model = SequenceClassifier(load_body(stage.base), labels=3, pooling="mean").eval()
    fit_probe(model, stage.examples.train, pad_id=stage.pad_id, weights=stage.class_weights)
    features = output_features(model, stage.examples.train, pad_id=stage.pad_id)
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    targets = [example.labels for example in stage.examples.train]
    expected = LogisticRegression(
        C=C, fit_intercept=False, max_iter=1000, class_weight="balanced"
    ).fit(features / lengths, targets)
    ours = model.output.weight.detach().numpy() * lengths.mean()
    np.testing.assert_allclose(ours, expected.coef_, atol=1e-3)
    sets = stage_of(multi_labelled(tiny_encoder, tmp_path, class_weights="balanced"))
    fit_label_probes(model, sets.examples.train, pad_id=sets.pad_id, weights=sets.class_weights)
    weighed = model.output.weight.detach().clone()
    fit_label_probes(model, sets.examples.train, pad_id=sets.pad_id)
    assert not torch.allclose(weighed, model.output.weight)


def test_a_run_with_them_is_judged_by_macro_f1(tiny_encoder: Path, tmp_path: Path) -> None:
    made = labelled(tiny_encoder, tmp_path, class_weights="balanced", max_steps=2)
    summary = run_recipe(made, out=tmp_path / "run", progress=silent())
    assert summary.stages[0]["kept"]["metric"] == "macro_f1"


def test_a_wrong_label_or_method_is_one_line(
    tiny_encoder: Path, tiny_decoder: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        RecipeError, match=r'weighs "heats", which is no label.*Did you mean "heat"'
    ):
        resolved(intent_recipe(tiny_encoder, tmp_path, class_weights={"heats": 2}))
    with pytest.raises(RecipeError, match=r"class_weights has no meaning for sft"):
        sft_recipe(tiny_decoder, tmp_path, class_weights="balanced")
    with pytest.raises(RecipeError, match=r"class_weights has no meaning for problem = \"regr"):
        intent_recipe(tiny_encoder, tmp_path, problem="regression", class_weights="balanced")
    with pytest.raises(RecipeError, match=r'class_weights has a wrong value.*"none", "balanced"'):
        intent_recipe(tiny_encoder, tmp_path, class_weights="balance")
    with pytest.raises(RecipeError, match=r"class_weights is out of range.*more than 0"):
        intent_recipe(tiny_encoder, tmp_path, class_weights={"heat": 0})
