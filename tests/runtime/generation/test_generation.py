"""Choosing tokens agrees with transformers' samplers; texts end where they should and never leak a
stop text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runtime_helpers import decoder_manifest
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from edgetune.core.errors import InputError
from edgetune.runtime.bundle.manifest import TokenizerInfo
from edgetune.runtime.bundle.tokenizer import BundleTokenizer
from edgetune.runtime.generation.sampling import (
    Penalties,
    TokenSequence,
    choose_token,
    keep_likely,
    stop_overlap,
)
from edgetune.runtime.generation.settings import GenerationSettings, settings_from


@pytest.fixture
def tokenizer(tiny_decoder: Path) -> BundleTokenizer:
    return BundleTokenizer(
        tiny_decoder, decoder_manifest(tokenizer=TokenizerInfo("tokenizer.json", None, {}, (2,), 2))
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 0.9), (5, 1.0), (7, 0.5), (1, 1.0), (0, 0.01), (400, 0.99)]
)
def test_the_kept_tokens_are_those_of_transformers(seed: int, top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(seed).normal(size=100).astype(np.float32) * 3
    expected = torch.tensor(logits)[None]
    if top_k:
        expected = TopKLogitsWarper(top_k)(torch.zeros(1, 1), expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(torch.zeros(1, 1), expected)
    np.testing.assert_array_equal(
        keep_likely(logits, top_k=top_k, top_p=top_p), expected[0].numpy()
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("min_p", [0.01, 0.3, 1.0])
def test_min_p_keeps_the_tokens_of_transformers(seed: int, min_p: float) -> None:
    logits = np.random.default_rng(seed).normal(size=100).astype(np.float32) * 3
    expected = MinPLogitsWarper(min_p)(torch.zeros(1, 1), torch.tensor(logits)[None])
    kept = keep_likely(logits, top_k=0, top_p=1.0, min_p=min_p)
    np.testing.assert_array_equal(kept, expected[0].numpy())


def shifted(
    logits: np.ndarray, prompt: list[int], answer: list[int], **settings: Any
) -> np.ndarray:
    penalties = Penalties(settings_from({}, settings), prompt, vocab_size=len(logits))
    for token in answer:
        penalties.add(token)
    return penalties.apply(logits)


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits = np.random.default_rng(0).normal(size=50).astype(np.float32)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([[3, 4, 5, 5, 9]]), torch.tensor(logits)[None]
    )
    got = shifted(logits, [3, 4], [5, 5, 9], repetition_penalty=penalty)
    np.testing.assert_allclose(got, expected[0].numpy(), rtol=1e-6)


def test_frequency_presence_and_bias_are_taken_as_openai_says() -> None:
    logits = np.zeros(10, np.float32)
    got = shifted(
        logits,
        [1, 1],
        [2, 3, 3],
        frequency_penalty=0.5,
        presence_penalty=0.25,
        logit_bias={"3": 2, 7: -100},
    )
    np.testing.assert_allclose(got, [0, 0, -0.75, 2 - 1.25, 0, 0, 0, -100, 0, 0])
    assert not logits.any()


def test_a_bias_outside_the_vocabulary_is_named() -> None:
    with pytest.raises(InputError, match=r"unknown token \(expected token ids below 10, got 10\)"):
        shifted(np.zeros(10, np.float32), [], [], logit_bias={10: 1})


def test_log_probabilities_are_those_of_the_raw_logits(tokenizer: BundleTokenizer) -> None:
    logits = np.random.default_rng(0).normal(size=352).astype(np.float32) * 4
    expected = torch.log_softmax(torch.tensor(logits), 0).numpy()
    sequence = TokenSequence(
        tokenizer, GenerationSettings(logprobs=3, logit_bias=((7, 100.0),)), vocab_size=352
    )
    token = sequence.choose(logits)
    found = sequence.logprobs[0]
    assert (token, found.token_id, found.token) == (7, 7, tokenizer.token_text(7))
    assert found.logprob == pytest.approx(float(expected[7]), abs=1e-5)
    best = np.argsort(-expected)[:3]
    assert [i for i, _, _ in found.top] == best.tolist()
    np.testing.assert_allclose([value for _, _, value in found.top], expected[best], atol=1e-5)


def test_temperature_zero_takes_the_most_likely() -> None:
    logits = np.array([0.1, 3.0, 2.9], np.float32)
    assert choose_token(logits, GenerationSettings(), np.random.default_rng(0)) == 1


@pytest.mark.parametrize("temperature", [1e-3, 1e-37, 1e-300, 5e-324])
def test_a_tiny_temperature_takes_the_most_likely(temperature: float) -> None:
    logits = np.array([-900, 3, 2.5, -np.inf], np.float32)
    for options in ({}, {"top_p": 0.9}, {"min_p": 0.1}):
        settings = GenerationSettings(temperature=temperature, **options)  # type: ignore[arg-type]
        assert choose_token(logits, settings, np.random.default_rng(0)) == 1


def test_logits_that_are_no_numbers_still_give_an_id_of_the_vocabulary() -> None:
    settings = GenerationSettings(temperature=1.0)
    for bad in (np.inf, np.nan, -np.inf):
        assert (
            0 <= choose_token(np.full(5, bad, np.float32), settings, np.random.default_rng(0)) < 5
        )


def test_samples_follow_the_probabilities() -> None:
    logits, rng = np.log(np.array([0.5, 0.3, 0.2], np.float32)), np.random.default_rng(0)
    settings = GenerationSettings(temperature=1.0)
    counts = (
        np.bincount([choose_token(logits, settings, rng) for _ in range(4000)], minlength=3) / 4000
    )
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.2], atol=0.03)


def test_the_same_seed_gives_the_same_tokens_and_rows_differ(tokenizer: BundleTokenizer) -> None:
    settings = GenerationSettings(temperature=1.0, seed=3)
    logits = np.zeros(352, np.float32)

    def draw(row: int) -> list[int]:
        sequence = TokenSequence(tokenizer, settings, row=row)
        return [sequence.choose(logits) for _ in range(8)]

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def run(
    tokenizer: BundleTokenizer, ids: list[int], **settings: Any
) -> tuple[list[str], TokenSequence]:
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
    settings = settings_from(
        {"max_new_tokens": 7, "top_k": 3, "other": 1}, {"top_k": 9, "temperature": None}
    )
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
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-30),
        ("frequency_penalty", 3),
        ("presence_penalty", -3),
        ("logit_bias", {5: 101}),
        ("logprobs", 21),
        ("beams", 2),
    ],
)
def test_settings_out_of_range_are_named(setting: str, value: Any) -> None:
    with pytest.raises(InputError, match=setting):
        settings_from({}, {setting: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 8.5),
        ("max_new_tokens", True),
        ("temperature", "hot"),
        ("seed", "1"),
        ("stop", 5),
        ("stop", [5]),
        ("logit_bias", 5),
        ("logit_bias", [5]),
        ("logit_bias", {"x": 1.0}),
        ("logit_bias", {"1": "much"}),
        ("confidence", 1),
        ("regex", 5),
    ],
)
def test_a_setting_of_a_wrong_type_is_one_line(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{name} has a wrong type"):
        settings_from({}, {name: value})


def test_settings_take_numpys_numbers_and_json_s_keys() -> None:
    found = settings_from({}, {"max_new_tokens": np.int64(3), "logit_bias": {"7": 1}, "stop": "x"})
    assert (found.max_new_tokens, found.logit_bias, found.stop) == (3, ((7, 1),), ("x",))
