"""The example script that labels texts by a bundle's adapters and by their neighbours."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
pseudo_labels = pytest.importorskip("pseudo_labels")


def on_a_circle(*degrees: float) -> np.ndarray:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_labels_spread_along_neighbours_to_texts_far_from_every_labelled_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pseudo_labels, "NEIGHBOURS", 2)
    chain = on_a_circle(
        5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60
    )  # from the first label, up to 60 degrees
    other = on_a_circle(95, 100)
    found = pseudo_labels.spread(
        on_a_circle(0, 90), np.array([0, 1]), np.concatenate([chain, other]), labels=2
    )
    assert (
        found.argmax(axis=1).tolist() == [0] * 12 + [1] * 2
    )  # though 50 to 60 lie nearer to the second label


def test_both_voices_count() -> None:
    adapters, neighbours = (
        np.array([[0.9, 0.1], [0.5, 0.5]], np.float32),
        np.array([[0.5, 0.5], [0.1, 0.9]], np.float32),
    )
    mean = pseudo_labels.together(adapters, neighbours)
    assert mean.argmax(axis=1).tolist() == [0, 1]
    np.testing.assert_allclose(mean.sum(axis=1), 1.0, rtol=1e-5)


def test_the_surest_texts_join_in_their_order() -> None:
    probabilities = np.array([[0.9, 0.1], [0.55, 0.45], [0.2, 0.8], [0.05, 0.95]], np.float32)
    rows = pseudo_labels.surest(
        ["gone", "either", "costly", "dear"], ["lost", "fees"], probabilities, share=0.75
    )
    assert rows == [
        {"text": "gone", "label": "lost"},
        {"text": "costly", "label": "fees"},
        {"text": "dear", "label": "fees"},
    ]


def test_a_labelled_text_does_not_join_again_in_other_letters() -> None:
    assert pseudo_labels.new_texts(
        ["Where is  my card?", "Why the fee?"], ["where is my card?"]
    ) == ["Why the fee?"]
