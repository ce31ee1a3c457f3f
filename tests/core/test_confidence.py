"""What an adapter's file may say of its confidence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgetune.core.confidence import NONE, Confidence, confidence_of
from edgetune.core.errors import AdapterError


def test_an_adapter_without_it_is_as_before() -> None:
    assert confidence_of({}) == confidence_of({"confidence": None}) == NONE
    assert NONE.temperature == 1.0 and not NONE.rejects(0.0)


def test_what_is_written_is_read_and_keys_of_later_versions_are_passed_over() -> None:
    written = Confidence(temperature=1.5, threshold=0.4, target=0.9, rows=50)
    assert confidence_of({"confidence": {**written.to_dict(), "of_later": 1}}) == written


def test_logits_of_any_size_stay_finite() -> None:
    largest = np.finfo(np.float32).max
    scaled = Confidence(temperature=0.05).scaled(np.array([largest, -largest, 1.0], np.float32))
    assert scaled.tolist() == [largest, -largest, 20.0]


def test_a_requests_threshold_goes_before_the_adapters() -> None:
    own = Confidence(threshold=0.4)
    assert own.rejects(0.39) and not own.rejects(0.4)
    assert own.rejects(0.5, 0.6) and not own.rejects(0.1, 0.0)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([1], "expected an object"),
        ({"temperature": 0}, "confidence.temperature: expected 0.05 to 20, got 0"),
        ({"temperature": None}, "confidence.temperature"),
        ({"temperature": float("nan")}, "confidence.temperature"),
        ({"temperature": True}, "confidence.temperature"),
        ({"threshold": 1.5}, "confidence.threshold: expected 0 to 1, got 1.5"),
        ({"threshold": "high"}, "confidence.threshold"),
    ],
)
def test_a_number_that_answers_depend_on_is_checked(value: Any, said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        confidence_of({"confidence": value})
