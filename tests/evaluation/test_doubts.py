"""Which labels are doubtful, and how rows that the run has learned are judged."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from training_helpers import intent_recipe, packed_recipe

from edgetune.core.errors import InputError
from edgetune.core.progress import Progress
from edgetune.evaluation.doubts import doubted_rows, doubtful, held_out_shares
from edgetune.training import run_recipe


def clusters(rows: int, wrong: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Features (rows, 8) of two well parted classes, and labels of which some are wrong."""
    draw = np.random.default_rng(0)
    true = np.arange(rows) % 2
    features = draw.normal(0, 0.3, (rows, 8)) + np.where(true[:, None], 1.0, -1.0)
    given = true.copy()
    given[wrong] = 1 - given[wrong]
    return features, given


def test_wrong_labels_are_found_by_rows_that_have_not_seen_them() -> None:
    wrong = [4, 31, 50]
    features, given = clusters(80, wrong)
    shares = held_out_shares(features, given, 2)
    assert shares.shape == (80, 2) and np.allclose(shares.sum(1), 1)
    found = doubtful(given, shares, np.arange(80))
    places = {place for place, _ in found}
    assert len(places) >= 2 and places <= {*wrong}
    believed = shares[np.arange(80), given]
    assert sorted(believed.argsort()[:3].tolist()) == wrong
    assert all(score < 0.5 for _, score in found)


def test_right_labels_are_not_doubted_and_few_rows_are_not_judged() -> None:
    features, given = clusters(80, [])
    assert doubtful(given, held_out_shares(features, given, 2), np.arange(80)) == []
    assert held_out_shares(features[:3], given[:3], 2).tolist() == [[0.5, 0.5]] * 3
    assert doubtful(given[:1], np.array([[0.1, 0.9]]), np.arange(1)) == []


def test_a_run_says_which_rows_it_has_learned(tiny_encoder: Path, tmp_path: Path) -> None:
    recipe = intent_recipe(tiny_encoder, tmp_path, epochs=1)
    run_recipe(recipe, out=tmp_path / "run", progress=Progress(io.StringIO()))
    found = doubted_rows(tmp_path / "run", recipe.stage[0], seed=0)
    assert "16 labels are doubtful. The run was trained on 16 of these rows" in found.line
    assert all(0 <= one.score <= 1 and one.given != one.likely for one in found.rows)
    assert [one.score for one in found.rows] == sorted(one.score for one in found.rows)


def test_a_run_without_labels_has_no_doubts(tiny_decoder: Path, tmp_path: Path) -> None:
    recipe = packed_recipe(tiny_decoder, tmp_path, epochs=1)
    run_recipe(recipe, out=tmp_path / "run", progress=Progress(io.StringIO()))
    with pytest.raises(InputError, match="only a classifier with one label a row can doubt"):
        doubted_rows(tmp_path / "run", recipe.stage[0], seed=0)
