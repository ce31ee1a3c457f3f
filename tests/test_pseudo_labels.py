"""The example script that labels texts by the adapters of a bundle."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
pseudo_labels = pytest.importorskip("pseudo_labels")

ONE = [{"lost": 0.9, "fees": 0.1}, {"lost": 0.5, "fees": 0.5}, {"lost": 0.2, "fees": 0.8}]
TWO = [{"lost": 0.8, "fees": 0.2}, {"lost": 0.9, "fees": 0.1}, {"lost": 0.1, "fees": 0.9}]
TEXTS = ["gone", "either", "costly"]


def test_a_text_joins_where_the_mean_of_all_adapters_is_sure_enough() -> None:
    assert pseudo_labels.pseudo_labels(TEXTS, [ONE, TWO], least=0.8) == [{"text": "gone", "label": "lost"}, {"text": "costly", "label": "fees"}]


def test_with_nothing_asked_for_every_text_joins() -> None:
    assert [row["label"] for row in pseudo_labels.pseudo_labels(TEXTS, [ONE, TWO], least=0.0)] == ["lost", "lost", "fees"]


def test_one_adapter_is_enough() -> None:
    assert [row["text"] for row in pseudo_labels.pseudo_labels(TEXTS, [ONE], least=0.85)] == ["gone"]
