"""Labels that spread among neighbours, and voices that are joined."""

from __future__ import annotations

import numpy as np

from edgetune.labelling.neighbours import spread_labels, surest, together


def on_a_circle(*degrees: float) -> np.ndarray:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_labels_spread_along_neighbours_to_texts_far_from_every_labelled_one() -> None:
    chain = on_a_circle(*range(5, 65, 5))  # from the first label, up to 60 degrees
    texts = np.concatenate([chain, on_a_circle(95, 100)])
    found = spread_labels(on_a_circle(0, 90), np.array([0, 1]), texts, labels=2, neighbours=2)
    # though 50 to 60 lie nearer to the second label
    assert found.argmax(axis=1).tolist() == [0] * 12 + [1] * 2
    np.testing.assert_allclose(found.sum(axis=1), 1.0, rtol=1e-5)


def test_it_is_the_fixed_point_of_label_spreading() -> None:
    """(1 − α S)⁻¹ Y with α = 0.95, as scikit-learn's LabelSpreading comes to."""
    random = np.random.default_rng(0)
    points = random.normal(size=(12, 4)).astype(np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    similar = points @ points.T
    edges = np.exp((similar - 1.0) / 0.1)
    np.fill_diagonal(edges, 0.0)
    scale = 1.0 / np.sqrt(edges.sum(axis=1))
    start = np.zeros((12, 2))
    start[[0, 1], [0, 1]] = 0.05
    expected = np.linalg.solve(np.eye(12) - 0.95 * scale[:, None] * edges * scale, start)[2:]
    expected /= expected.sum(axis=1, keepdims=True)
    found = spread_labels(points[:2], np.array([0, 1]), points[2:], labels=2, neighbours=11)
    np.testing.assert_allclose(found, expected, atol=0.1)  # after 30 steps
    assert (found.argmax(axis=1) == expected.argmax(axis=1)).mean() >= 0.9


def test_a_text_that_no_label_reaches_may_have_any() -> None:
    apart = on_a_circle(0, 5, 180, 185)
    found = spread_labels(apart[:1], np.array([0]), apart[1:], labels=2, neighbours=1)
    assert found[0].tolist() == [1.0, 0.0] and found[1:].tolist() == [[0.5, 0.5]] * 2


def test_both_voices_count() -> None:
    heads = np.array([[0.9, 0.1], [0.5, 0.5]], np.float32)
    neighbours = np.array([[0.5, 0.5], [0.1, 0.9]], np.float32)
    mean = together([(heads, 0.3), (neighbours, 0.7)])
    assert mean.argmax(axis=1).tolist() == [0, 1]
    np.testing.assert_allclose(mean.sum(axis=1), 1.0, rtol=1e-5)


def test_the_surest_join_in_their_order() -> None:
    table = np.array([[0.9, 0.1], [0.55, 0.45], [0.2, 0.8], [0.05, 0.95]], np.float32)
    assert surest(table, 0.75).tolist() == [0, 2, 3]
