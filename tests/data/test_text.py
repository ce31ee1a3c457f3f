"""Raw text: packing, no attention across documents, and runs on it."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from training_helpers import TEXTS, packed_recipe, recipe, sft_recipe, silent, write_rows

from edgetune.core.errors import DataError
from edgetune.data.batching import IGNORE
from edgetune.data.collation import collate
from edgetune.data.loaders import load_examples
from edgetune.data.plain_text import pack
from edgetune.models.base import open_folder
from edgetune.models.load import load_body, load_tokenizer
from edgetune.objectives.language import sft
from edgetune.training import run_recipe
from edgetune.training.fast.fused_layers import fused_ops


def test_sequences_are_full_and_predict_every_token_but_a_documents_first_once() -> None:
    documents = [
        (line, list(range(100 * line, 100 * line + length)))
        for line, length in enumerate((5, 30, 2, 9, 17), 1)
    ]
    packed = pack(documents, 8)
    assert all(len(example.input_ids) >= 7 for example in packed[:-1])
    predicted = [label for example in packed for label in example.labels if label != IGNORE]  # type: ignore[union-attr]
    assert predicted == [token for _, ids in documents for token in ids[1:]]


def test_a_piece_starts_at_position_0_without_label() -> None:
    first, second = pack([(1, [10, 11, 12]), (2, [20, 21, 22, 23, 24, 25, 26])], 8)
    assert first.input_ids == [10, 11, 12, 20, 21, 22, 23, 24]
    assert first.position_ids == [0, 1, 2, 0, 1, 2, 3, 4]
    assert first.labels == [IGNORE, 11, 12, IGNORE, 21, 22, 23, 24]
    assert (second.input_ids, second.labels) == ([24, 25, 26], [IGNORE, 25, 26])


@pytest.mark.parametrize("attention", ["sdpa", "eager", "as in training"])
def test_packed_loss_and_gradient_are_those_of_the_documents_one_by_one(
    tiny_decoder: Path, attention: str
) -> None:
    model = load_body(open_folder(tiny_decoder, name="tiny"))
    if attention != "as in training":
        model.set_attn_implementation(attention)
    torch.manual_seed(0)
    documents = [
        (line, torch.randint(3, 300, (length,)).tolist())
        for line, length in enumerate((9, 20, 6, 27, 2))
    ]
    batch = collate(pack(documents, 32), pad_id=0)
    weight = model.model.layers[0].self_attn.q_proj.weight
    with fused_ops(model) if attention == "as in training" else contextlib.nullcontext():
        loss, count = sft(model, batch)
    loss.backward()
    packed, weight.grad = weight.grad.clone(), None
    total, pieces = torch.zeros(()), []
    for ids, positions in zip(batch.input_ids, batch.position_ids, strict=True):  # type: ignore[arg-type]
        starts = [i for i, position in enumerate(positions) if position == 0]
        pieces += [
            ids[a:b] for a, b in zip(starts, [*starts[1:], len(ids)], strict=True) if b - a > 1
        ]
    for piece in pieces:
        logits = model(input_ids=piece[None]).logits[0, :-1]
        total = total + F.cross_entropy(logits, piece[1:], reduction="sum")
    (total / count).backward()
    assert len(pieces) > len(batch.rows) and count == sum(len(piece) - 1 for piece in pieces)
    assert loss.item() == pytest.approx(total.item() / count, abs=1e-5)
    torch.testing.assert_close(packed, weight.grad, atol=1e-5, rtol=1e-4)


def test_no_token_is_padding_but_in_the_last_sequence(tiny_decoder: Path, tmp_path: Path) -> None:
    base = open_folder(tiny_decoder, name="tiny")
    examples = load_examples(
        packed_recipe(tiny_decoder, tmp_path).stage[0], load_tokenizer(base), base
    )
    lengths = [len(example.input_ids) for example in examples.train]
    assert len(lengths) == 3 and min(lengths[:-1]) >= 63
    end = load_tokenizer(base).eos_token_id
    assert sum(ids.count(end) for ids in (e.input_ids for e in examples.train)) >= len(TEXTS)


def test_a_text_file_is_one_document(tiny_decoder: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(" ".join(TEXTS))
    base = open_folder(tiny_decoder, name="tiny")
    stage = recipe(tiny_decoder, "causal-lm", tmp_path / "book.txt", None, max_length=64).stage[0]
    examples = load_examples(stage, load_tokenizer(base), base).train
    assert all(example.position_ids == list(range(len(example.input_ids))) for example in examples)


def test_causal_lm_learns_the_text(tiny_decoder: Path, tmp_path: Path) -> None:
    summary = run_recipe(
        packed_recipe(tiny_decoder, tmp_path, epochs=10), out=tmp_path / "run", progress=silent()
    )
    assert summary.base_metrics is not None
    assert summary.metrics["loss"] < 0.7 * summary.base_metrics["loss"]
    adapter = json.loads((tmp_path / "run" / "adapter" / "edgetune_adapter.json").read_text())
    assert adapter["generation"]["max_new_tokens"] <= 256


def test_text_first_and_then_prompts_make_one_adapter(tiny_decoder: Path, tmp_path: Path) -> None:
    both = sft_recipe(tiny_decoder, tmp_path)
    both = replace(both, stage=(*packed_recipe(tiny_decoder, tmp_path).stage, *both.stage))
    summary = run_recipe(both, out=tmp_path / "run", progress=silent())
    assert [stage["method"] for stage in summary.stages] == ["causal-lm", "sft"]
    adapter = json.loads((tmp_path / "run" / "adapter" / "edgetune_adapter.json").read_text())
    assert adapter["prompt_format"]["prompt"] == "{{ prompt }}"


def test_an_empty_text_is_refused_with_its_line(tiny_decoder: Path, tmp_path: Path) -> None:
    train = write_rows(tmp_path / "bad.jsonl", [{"text": "fine"}, {"text": "  "}])
    base = open_folder(tiny_decoder, name="tiny")
    stage = recipe(tiny_decoder, "causal-lm", train, None).stage[0]
    with pytest.raises(
        DataError, match=r"bad\.jsonl, line 2.*the text is empty|the text is empty.*line 2"
    ):
        load_examples(stage, load_tokenizer(base), base)
