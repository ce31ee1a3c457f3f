"""The engine's outputs are torch's, with any mix of adapters and lengths in one batch, whole or
token by token.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from runtime_helpers import ENCODER_ADAPTERS, decoder_bundle, encoder_bundle
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from edgetune.core.errors import AdapterError, BundleError, InputError
from edgetune.runtime.adapters.packing import pack_adapter
from edgetune.runtime.bundle.manifest import read_manifest
from edgetune.runtime.engine.decoder import DecoderEngine
from edgetune.runtime.engine.encoder import EncoderEngine
from edgetune.runtime.engine.session import BoundTensors

TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def adapters(tiny_decoder: Path) -> dict[str | None, BoundTensors | None]:
    folder = decoder_bundle(tiny_decoder)
    packed = {
        name: pack_adapter(folder / "adapters" / name, read_manifest(folder)) for name in "ab"
    }
    return {None: None, **{name: BoundTensors(p.tensors) for name, p in packed.items()}}


def random_rows(count: int, seed: int, longest: int = 40) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 352) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


def torch_logits(base: Path, name: str | None, row: list[int]) -> np.ndarray:
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    if name is not None:
        model = PeftModel.from_pretrained(model, base.parent / f"{base.name}-adapter-{name}")
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([row])).logits[0].numpy()


def test_a_batch_of_mixed_adapters_and_lengths_gives_torchs_logits(
    decoder: DecoderEngine, adapters: dict[str | None, Any], tiny_decoder: Path
) -> None:
    rows, names = random_rows(4, seed=0), ["a", None, "b", "a"]
    got = decoder.logits(rows, [adapters[name] for name in names])
    for row, name, logits in zip(rows, names, got, strict=True):
        np.testing.assert_allclose(logits, torch_logits(tiny_decoder, name, row), atol=TOLERANCE)


def test_packed_tensors_can_be_given_as_they_are(
    decoder: DecoderEngine, adapters: dict[str | None, Any]
) -> None:
    row = random_rows(1, seed=1)
    packed = adapters["b"].tensors
    np.testing.assert_array_equal(
        decoder.logits(row, [packed])[0], decoder.logits(row, [adapters["b"]])[0]
    )


def test_chosen_positions_are_those_of_all(decoder: DecoderEngine) -> None:
    rows = [[5, 6, 7, 8], [9, 10]]
    every, some = decoder.logits(rows), decoder.logits(rows, positions=[[1, 3], [0]])
    np.testing.assert_array_equal(some[0], every[0][[1, 3]])
    np.testing.assert_array_equal(some[1], every[1][[0]])


def test_token_by_token_gives_the_logits_of_one_prefill(
    decoder: DecoderEngine, adapters: dict[str | None, Any]
) -> None:
    rows, names = [list(range(10, 30)), list(range(40, 47))], ["a", "b"]
    bound = [adapters[name] for name in names]
    whole = decoder.logits(rows, bound)
    cuts = [15, 2]
    state, logits = decoder.start([row[:cut] for row, cut in zip(rows, cuts, strict=True)], bound)
    for step in range(5):
        for i, cut in enumerate(cuts):
            np.testing.assert_allclose(logits[i], whole[i][cut + step - 1], atol=TOLERANCE)
        logits = state.step([row[cut + step] for row, cut in zip(rows, cuts, strict=True)])


def greedy(
    decoder: DecoderEngine, rows: list[list[int]], bound: list[Any], steps: int
) -> list[list[int]]:
    state, logits = decoder.start(rows, bound, capacity=64)
    tokens = []
    for _ in range(steps):
        tokens.append(logits.argmax(-1).tolist())
        logits = state.step(tokens[-1])
    return [list(row) for row in zip(*tokens, strict=True)]


@pytest.mark.parametrize("length", [1, 7, 8, 9, 33])
def test_a_long_prompt_goes_through_in_pieces(
    decoder: DecoderEngine,
    adapters: dict[str | None, Any],
    monkeypatch: pytest.MonkeyPatch,
    length: int,
) -> None:
    monkeypatch.setattr("edgetune.runtime.engine.decoder.PREFILL_CHUNK", 8)
    row = [3 + (7 * i) % 300 for i in range(length)]
    whole = decoder.logits([[*row, 9]], [adapters["a"]])[0]
    state, logits = decoder.start([row], [adapters["a"]])
    np.testing.assert_allclose(logits[0], whole[-2], atol=TOLERANCE)
    np.testing.assert_allclose(state.step([9])[0], whole[-1], atol=TOLERANCE)


@pytest.mark.parametrize("seed", range(20))
def test_a_row_in_a_batch_is_the_row_alone_token_for_token(
    seed: int, decoder: DecoderEngine, adapters: dict[str | None, Any]
) -> None:
    rng = random.Random(seed)
    rows = random_rows(rng.randrange(2, 6), seed=seed)
    bound = [adapters[rng.choice(["a", "b", None])] for _ in rows]
    together = greedy(decoder, rows, bound, 6)
    alone = [greedy(decoder, [row], [one], 6)[0] for row, one in zip(rows, bound, strict=True)]
    assert together == alone


def test_rows_that_end_leave_the_others_as_they_were(
    decoder: DecoderEngine, adapters: dict[str | None, Any]
) -> None:
    rows, bound = [[5, 6, 7], [8, 9], [10, 11, 12, 13]], [adapters["a"], adapters["b"], None]
    expected = greedy(decoder, rows, bound, 6)
    state, logits = decoder.start(rows, bound, capacity=64)
    for step in range(5):
        live = [0, 1, 2] if step < 2 else [1, 2] if step < 4 else [2]
        assert logits.argmax(-1).tolist() == [expected[i][step] for i in live]
        if step in (1, 3):
            state.keep([1, 2] if step == 1 else [1])
            live = live[1:]
        logits = state.step([expected[i][step] for i in live])


def test_two_states_at_once_do_not_disturb_each_other(
    decoder: DecoderEngine, adapters: dict[str | None, Any]
) -> None:
    alone = [
        greedy(decoder, [[5, 6, 7]], [adapters["a"]], 4)[0],
        greedy(decoder, [[9]], [None], 4)[0],
    ]
    first, second = decoder.start([[5, 6, 7]], [adapters["a"]]), decoder.start([[9]])
    tokens: list[list[int]] = [[], []]
    logits = [first[1], second[1]]
    for _ in range(4):
        for i, (state, _) in enumerate((first, second)):
            tokens[i].append(int(logits[i][0].argmax()))
            logits[i] = state.step(tokens[i][-1:])
    assert tokens == alone


def test_the_cache_says_when_it_is_full(decoder: DecoderEngine) -> None:
    state, _ = decoder.start([[5] * 250], capacity=256)
    for _ in range(6):
        state.step([7])
    with pytest.raises(InputError, match=r"the cache is full \(expected at most 256 tokens"):
        state.step([7])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([[1], []], "row 1: an empty prompt"),
        (
            [[1] * 257],
            (
                r"row 0: the prompt is longer than the context \(expected at most 256 tokens, got"
                r" 257\)"
            ),
        ),
        ([[352]], r"a token id outside the vocabulary \(expected ids from 0 to 351, got 352\)"),
    ],
)
def test_rows_that_cannot_be_run_are_named(
    rows: list[list[int]], message: str, decoder: DecoderEngine
) -> None:
    with pytest.raises(InputError, match=message):
        decoder.logits(rows)


def test_tensors_of_another_bundle_are_refused(decoder: DecoderEngine) -> None:
    with pytest.raises(AdapterError, match=r"no adapter input other\.lora_A"):
        decoder.logits([[5]], [{"other.lora_A": np.zeros((1, 2, 3), np.float32)}])


def test_one_adapter_for_each_row_is_asked_for(decoder: DecoderEngine) -> None:
    with pytest.raises(InputError, match=r"one adapter \(or None\) for each row"):
        decoder.logits([[5], [6]], [None])


def test_a_damaged_graph_is_named(tiny_decoder: Path, tmp_path: Path) -> None:
    manifest = read_manifest(decoder_bundle(tiny_decoder))
    (tmp_path / "engine.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match="ONNX Runtime cannot open the graph"):
        DecoderEngine(tmp_path, manifest)


def head_tensors(tiny_encoder: Path) -> dict[str | None, Any]:
    folder = encoder_bundle(tiny_encoder)
    manifest = read_manifest(folder)
    return {
        name: pack_adapter(folder / "adapters" / name, manifest).tensors
        for name in ENCODER_ADAPTERS
    }


def test_classifiers_of_different_labels_share_a_batch(
    encoder: EncoderEngine, tiny_encoder: Path
) -> None:
    packed, names = head_tensors(tiny_encoder), ["intent", "mood", "mood"]
    rows = [[2, 10, 11, 12, 3], [2, 20, 3], [2, 30, 31, 3]]
    logits, _ = encoder.run(rows, [packed[name] for name in names])
    for row, name, got in zip(rows, names, logits, strict=True):
        np.testing.assert_allclose(got, torch_scores(tiny_encoder, name, row), atol=TOLERANCE)


def torch_scores(base: Path, name: str, row: list[int]) -> np.ndarray:
    """Mean pooling and the adapter's head, by PEFT on transformers' own body."""
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=len(ENCODER_ADAPTERS[name])
    )
    adapted: Any = PeftModel.from_pretrained(
        model, base.parent / f"{base.name}-adapter-{name}"
    ).eval()
    inner = adapted.base_model.model
    with torch.no_grad():
        pooled = inner.bert(input_ids=torch.tensor([row])).last_hidden_state.mean(1)
        return inner.classifier(pooled)[0].numpy()


def test_without_adapter_an_encoder_gives_pooled_states(
    encoder: EncoderEngine, tiny_encoder: Path
) -> None:
    rows = [[2, 10, 11, 12, 3], [2, 20, 3]]
    logits, pooled = encoder.run(rows)
    assert [row.shape for row in logits] == [(0,), (0,)]
    model = AutoModel.from_pretrained(tiny_encoder)
    with torch.no_grad():
        expected = [
            model(input_ids=torch.tensor([row])).last_hidden_state[0].mean(0).numpy()
            for row in rows
        ]
    np.testing.assert_allclose(pooled, expected, atol=TOLERANCE)


def test_a_text_that_is_too_long_for_an_encoder_is_named(encoder: EncoderEngine) -> None:
    with pytest.raises(
        InputError,
        match=(
            r"row 0: a text of a length the model cannot take \(expected 1 to 128 tokens, got 129\)"
        ),
    ):
        encoder.run([[5] * 129])


@pytest.mark.parametrize(
    "sizes",
    [{"kv_heads": None}, {"kv_heads": 1}, {"head_dim": 99}, {"layers": 3}, {"layers": None}],
)
def test_a_manifest_with_other_sizes_of_keys_and_values_is_refused(
    tiny_decoder: Path, sizes: dict[str, int | None]
) -> None:
    folder = decoder_bundle(tiny_decoder)
    manifest = read_manifest(folder)
    changed = replace(manifest, graph=replace(manifest.graph, **sizes))
    with pytest.raises(BundleError, match="2 layers of 2 heads of 16 keys and values"):
        DecoderEngine(folder, changed, threads=1)
