"""Every supported family, tiny and random: the bundle answers as torch, however the text reaches
it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_helpers import decoder_feed, export, make_adapter, op_counts, plain_session
from family_helpers import DECODERS, ENCODERS, make_family, some

from edgetune.adapters.folder import load_adapter
from edgetune.core.errors import EdgetuneError, ExportError
from edgetune.export.graph.families import DECODERS as EXPORTED_DECODERS
from edgetune.export.graph.families import ENCODERS as EXPORTED_ENCODERS
from edgetune.export.graph.families import decoder_family, fixed_length, known_family
from edgetune.models.heads import SequenceClassifier
from edgetune.models.load import load_body
from edgetune.models.resolve import resolve_base
from edgetune.runtime.adapters.packing import pack_adapter
from edgetune.runtime.bundle.manifest import Manifest
from edgetune.runtime.engine.decoder import DecoderEngine, DecodeState
from edgetune.runtime.engine.encoder import EncoderEngine

LENGTHS = (3, 29, 14)  # tokens; windows are 6
STEPS = 4
# Families whose code is another's, and merged exports of all but one of a kind, run with the slow
# tests.
COPIES = {"bert", "camembert", "gemma", "llama", "qwen2", "smollm3", "xlm-roberta"}
MERGED = {"gpt2", "phi3", "modernbert"}


@dataclass
class Exported:
    """A family's bundle, opened, and the same adapter in torch."""

    manifest: Manifest
    folder: Path
    engine: Any
    tensors: Any
    model: Any

    def torch_logits(self, row: list[int], *, adapter: bool = True) -> np.ndarray:
        ids = torch.tensor([row])
        with torch.no_grad(), self.model.disable_adapter() if not adapter else torch.no_grad():
            return self.model(input_ids=ids, use_cache=False).logits[0].numpy()

    def torch_pooled(self, row: list[int]) -> np.ndarray:
        ids = torch.tensor([row])
        with torch.no_grad():
            return self.model.get_base_model().pooled(ids, torch.ones_like(ids))[0].numpy()


def open_family(name: str, like: Path, folder: Path) -> Exported:
    base_folder = make_family(name, like, folder / name)
    adapter = make_adapter(base_folder, folder / "adapter", strength=0.2)
    manifest = export(folder / "bundle", adapter)
    base = resolve_base(str(base_folder))
    model: Any = load_body(base)
    if base.kind == "encoder":
        model = SequenceClassifier(model, labels=3, pooling=base.pooling or "mean")
    engine = (DecoderEngine if base.kind == "decoder" else EncoderEngine)(
        folder / "bundle", manifest, threads=1
    )
    tensors = pack_adapter(adapter, manifest).tensors
    return Exported(manifest, folder / "bundle", engine, tensors, load_adapter(model, adapter))


@pytest.fixture(scope="module", params=some(DECODERS, fast=set(DECODERS) - COPIES))
def decoder(request: Any, tiny_decoder: Path, tmp_path_factory: Any) -> Iterator[Exported]:
    yield open_family(request.param, tiny_decoder, tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module", params=some(ENCODERS, fast=set(ENCODERS) - COPIES))
def encoder(request: Any, tiny_encoder: Path, tmp_path_factory: Any) -> Iterator[Exported]:
    yield open_family(request.param, tiny_encoder, tmp_path_factory.mktemp("family"))


def rows(vocabulary: int) -> list[list[int]]:
    numbers = np.random.default_rng(0)
    return [numbers.integers(5, vocabulary, length).tolist() for length in LENGTHS]


def test_padded_rows_with_and_without_adapter_then_decode(decoder: Exported) -> None:
    texts, adapters = (
        rows(decoder.manifest.graph.vocab_size),
        [decoder.tensors, None, decoder.tensors],
    )
    state, logits = decoder.engine.start([row[:-STEPS] or row[:1] for row in texts], adapters)
    done = [max(1, len(row) - STEPS) for row in texts]
    expected = [
        decoder.torch_logits(row, adapter=adapter is not None)
        for row, adapter in zip(texts, adapters, strict=True)
    ]
    for step in range(STEPS):
        for i, length in enumerate(done):
            assert np.abs(logits[i] - expected[i][length - 1]).max() < 1e-3, (i, step)
        state.keep([i for i, length in enumerate(done) if length < len(texts[i])])
        texts, expected, done = (
            [
                value
                for value, row, length in zip(values, texts, done, strict=True)
                if length < len(row)
            ]
            for values in (texts, expected, done)
        )
        logits = state.step([row[length] for row, length in zip(texts, done, strict=True)])
        done = [length + 1 for length in done]


def test_a_prompt_goes_on_in_pieces(decoder: Exported) -> None:
    row = rows(decoder.manifest.graph.vocab_size)[1]
    state = DecodeState(decoder.engine, [decoder.tensors], capacity=64)
    expected = decoder.torch_logits(row)
    for start, end in ((0, 9), (9, 10), (10, 29)):
        logits = state.extend(row[start:end])
        assert np.abs(logits[0] - expected[end - 1]).max() < 1e-3


def test_plain_onnx_runtime_answers_as_torch_from_an_attention_mask(decoder: Exported) -> None:
    texts = rows(decoder.manifest.graph.vocab_size)
    ids = np.zeros((len(texts), max(LENGTHS)), np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(texts):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    logits = plain_session(decoder.folder).run(
        ["logits"], decoder_feed(decoder.manifest, ids, mask)
    )[0][:, 0]
    for i, row in enumerate(texts):
        assert np.abs(logits[i] - decoder.torch_logits(row, adapter=False)[-1]).max() < 1e-3


def test_the_proof_passes_and_attention_is_one_node_a_layer(decoder: Exported) -> None:
    proof = next(iter(decoder.manifest.proof["adapters"].values()))
    counts = op_counts(decoder.folder)
    assert proof["passed"] and proof["max_abs"] <= 1e-3
    assert counts["GroupQueryAttention"] == 2 and not {
        "Transpose",
        "Softmax",
        "Sigmoid",
        "Pow",
        "Concat",
    } & set(counts)


def test_padded_texts_with_and_without_adapter(encoder: Exported) -> None:
    texts = rows(encoder.manifest.graph.vocab_size)
    head = {name: tensor for name, tensor in encoder.tensors.items() if name.startswith("head.")}
    logits, pooled = encoder.engine.run(texts, [encoder.tensors, head, encoder.tensors])
    for i, row in enumerate(texts):
        if i == 1:
            continue
        assert (
            np.abs(
                logits[i]
                - encoder.model(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.int64))[0]
                .detach()
                .numpy()
            ).max()
            < 1e-3
        )
        assert np.abs(pooled[i] - encoder.torch_pooled(row)).max() < 1e-3
    alone, _ = encoder.engine.run(texts[1:2], [head])
    assert np.abs(alone[0] - logits[1]).max() < 1e-4


def test_an_encoders_proof_passes_and_attention_is_one_node_a_layer(encoder: Exported) -> None:
    proof = next(iter(encoder.manifest.proof["adapters"].values()))
    counts = op_counts(encoder.folder)
    assert proof["passed"] and proof["max_abs"] <= 1e-3
    own = (
        {"Transpose", "Reshape"} if encoder.manifest.base.model_type == "deberta-v2" else set()
    )  # scores of positions, head by head
    assert counts["MultiHeadAttention"] == 2 and not {
        "Transpose",
        "Softmax",
        "Reshape",
    } - own & set(counts)


@pytest.mark.parametrize("name", some([*DECODERS, *ENCODERS], fast=MERGED))
def test_merged_into_the_weights_it_answers_as_torch(
    name: str, tiny_decoder: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    base = make_family(name, tiny_decoder if name in DECODERS else tiny_encoder, tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "a", strength=0.1)
    manifest = export(tmp_path / "bundle", adapter, mode="merged")
    assert manifest.sites == () and manifest.proof["adapters"]["a"]["max_abs"] <= 1e-3


def test_the_tests_cover_exactly_what_is_supported() -> None:
    assert (
        DECODERS.keys() == EXPORTED_DECODERS.keys() and ENCODERS.keys() == EXPORTED_ENCODERS.keys()
    )


@pytest.mark.parametrize(("name", "kind"), [("bloom", "decoder"), ("deberta", "encoder")])
def test_another_family_is_refused_by_name_with_the_list(name: str, kind: str) -> None:
    with pytest.raises(ExportError, match=rf"{kind} family '{name}'.*one of .*(gemma2|modernbert)"):
        known_family(name, kind=kind)


def test_an_unsupported_family_is_refused_before_it_is_traced(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    from edgetune.export.bundle import export_bundle

    base = make_family("llama", tiny_decoder, tmp_path / "base")
    text = (base / "config.json").read_text()
    (base / "config.json").write_text(
        text.replace('"llama"', '"bloom"').replace("LlamaFor", "BloomFor")
    )
    with pytest.raises(EdgetuneError, match=r"'bloom' cannot be exported.*llama"):
        export_bundle([], tmp_path / "out", base_name=str(base))
    assert not (tmp_path / "out").exists()


def test_a_decoder_that_looks_both_ways_is_refused() -> None:
    from transformers import Gemma3TextConfig

    with pytest.raises(ExportError, match="see later ones"):
        decoder_family(Gemma3TextConfig(use_bidirectional_attention=True))


def test_a_rotation_that_changes_with_the_length_limits_the_context() -> None:
    from transformers import LlamaConfig, Phi3Config

    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    long = Phi3Config(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=512,
        original_max_position_embeddings=128,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **factors},
    )
    assert fixed_length(long, 512) == 128 and fixed_length(LlamaConfig(), 512) == 512
