"""Choosing tokens agrees with transformers' samplers; texts end where they should and never leak a stop text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runtime_helpers import decoder_manifest
from transformers import TopKLogitsWarper, TopPLogitsWarper

from edgetune.errors import InputError
from edgetune.runtime.generation import (
    GenerationSettings,
    TokenSequence,
    choose,
    keep_likely,
    settings_from,
    stop_overlap,
)
from edgetune.runtime.manifest import TokenizerInfo
from edgetune.runtime.tokenizer import BundleTokenizer


@pytest.fixture
def tokenizer(tiny_decoder: Path) -> BundleTokenizer:
    return BundleTokenizer(
        tiny_decoder, decoder_manifest(tokenizer=TokenizerInfo("tokenizer.json", None, {}, (2,), 2))
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (5, 1.0), (7, 0.5), (1, 1.0), (0, 0.01), (400, 0.99)])
def test_the_kept_tokens_are_those_of_transformers(seed: int, top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(seed).normal(size=100).astype(np.float32) * 3
    expected = torch.tensor(logits)[None]
    if top_k:
        expected = TopKLogitsWarper(top_k)(torch.zeros(1, 1), expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(torch.zeros(1, 1), expected)
    np.testing.assert_array_equal(keep_likely(logits, top_k=top_k, top_p=top_p), expected[0].numpy())


def test_temperature_zero_takes_the_most_likely() -> None:
    logits = np.array([0.1, 3.0, 2.9], np.float32)
    assert choose(logits, GenerationSettings(), np.random.default_rng(0)) == 1


def test_samples_follow_the_probabilities() -> None:
    logits, rng = np.log(np.array([0.5, 0.3, 0.2], np.float32)), np.random.default_rng(0)
    settings = GenerationSettings(temperature=1.0)
    counts = np.bincount([choose(logits, settings, rng) for _ in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.2], atol=0.03)


def test_the_same_seed_gives_the_same_tokens_and_rows_differ(tokenizer: BundleTokenizer) -> None:
    settings = GenerationSettings(temperature=1.0, seed=3)
    logits = np.zeros(352, np.float32)

    def draw(row: int) -> list[int]:
        sequence = TokenSequence(tokenizer, settings, row=row)
        return [sequence.choose(logits) for _ in range(8)]

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def run(tokenizer: BundleTokenizer, ids: list[int], **settings: Any) -> tuple[list[str], TokenSequence]:
    sequence, pieces = TokenSequence(tokenizer, settings_from({}, settings)), []
    for token in ids:
        pieces.append(sequence.add(token))
        if sequence.finish_reason:
            break
    return pieces, sequence


def test_the_end_token_stops_and_is_not_shown(tokenizer: BundleTokenizer) -> None:
    _, sequence = run(tokenizer, [*tokenizer.encode("hello"), 2, 5])
    assert (sequence.text, sequence.finish_reason) == ("hello", "stop")


def test_the_limit_stops_with_length(tokenizer: BundleTokenizer) -> None:
    ids = tokenizer.encode("hello there")
    _, sequence = run(tokenizer, ids, max_new_tokens=3)
    assert (sequence.tokens, sequence.finish_reason) == (ids[:3], "length")


@pytest.mark.parametrize("stop", ["STOP", "\n\n", "🙂", "o", "the end"])
def test_no_part_of_a_stop_text_is_ever_emitted(stop: str, tokenizer: BundleTokenizer) -> None:
    before = "xyz SSTO the en \n"
    before = before.replace(stop, "")
    pieces, sequence = run(tokenizer, tokenizer.encode(f"{before}{stop} after"), stop=stop)
    assert "".join(pieces) == sequence.text == (before + stop)[: (before + stop).index(stop)]
    assert sequence.finish_reason == "stop"


def test_text_that_only_began_like_a_stop_text_is_kept(tokenizer: BundleTokenizer) -> None:
    _, sequence = run(tokenizer, [*tokenizer.encode("STO"), 2], stop=("STOP",))
    assert sequence.text == "STO"


def test_the_held_end_is_the_longest_possible_beginning() -> None:
    assert stop_overlap("abcab", ["abcd", "b"]) == 2
    assert stop_overlap("xyz", ["abcd"]) == 0


def test_a_callers_settings_win_over_the_adapters() -> None:
    settings = settings_from({"max_new_tokens": 7, "top_k": 3, "other": 1}, {"top_k": 9, "temperature": None})
    assert (settings.max_new_tokens, settings.top_k, settings.temperature) == (7, 9, 0.0)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -1),
        ("top_p", 0),
        ("top_k", -1),
        ("seed", -1),
        ("stop", [""]),
        ("beams", 2),
    ],
)
def test_settings_out_of_range_are_named(setting: str, value: Any) -> None:
    with pytest.raises(InputError, match=setting):
        settings_from({}, {setting: value})
