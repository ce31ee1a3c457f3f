"""What a precision costs: the base in torch beside the bundle, on WikiText-2 and STS-B, printed
with every export.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from export_helpers import make_adapter
from seq2seq_helpers import make_seq2seq
from training_helpers import intent_recipe, silent

from edgetune.cli.export import command
from edgetune.export.bundle import export_bundle
from edgetune.export.proof.cost import CostPlan
from edgetune.models.load import load_body, load_tokenizer
from edgetune.models.resolve import resolve_base
from edgetune.quantisation.precision import Precision
from edgetune.runtime.bundle.manifest import read_manifest
from edgetune.training import run_recipe

TEXT = (
    "The quick brown fox jumps over the lazy dog. Turn on the lights in the kitchen, please! " * 30
)
PAIRS = [
    ("turn on the lights", "lights on please", 4.0),
    ("my card", "the lazy dog", 0.5),
    ("what should i do", "what to do", 3.0),
    ("a fox", "the fox", 5.0),
]


@pytest.fixture(scope="module")
def general(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets") / "general_ability"
    (folder.parent / "stsb_en").mkdir(parents=True)
    folder.mkdir()
    (folder / "wikitext2_raw_test.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    rows = "".join(
        json.dumps({"sentence1": one, "sentence2": other, "score": score}) + "\n"
        for one, other, score in PAIRS
    )
    (folder.parent / "stsb_en" / "test.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    return folder


@pytest.fixture(scope="module")
def topics(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("intents")
    run_recipe(
        intent_recipe(tiny_encoder, folder, epochs=10), out=folder / "run", progress=silent()
    )
    return folder / "run"


def export(*arguments: object) -> str:
    done = CliRunner().invoke(
        command, [str(argument) for argument in arguments], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    return done.output


def test_a_decoders_perplexity_is_torchs_and_the_bundles_own_is_printed(
    tiny_decoder: Path, tmp_path: Path, general: Path
) -> None:
    import torch

    base = resolve_base(str(tiny_decoder))
    adapters = [
        (name, make_adapter(tiny_decoder, tmp_path / name, strength=0.6, seed=seed))
        for seed, name in enumerate("ab")
    ]
    said: list[str] = []
    plan = CostPlan(general, items=2)
    manifest = export_bundle(
        adapters,
        tmp_path / "bundle",
        precision=Precision("int8"),
        cost=plan,
        threads=1,
        say=said.append,
    )
    cost = manifest.quality["cost"]
    ids = load_tokenizer(base)(TEXT, add_special_tokens=False)["input_ids"]
    ids = (
        [load_tokenizer(base).bos_token_id, *ids]
        if cost["items"] and _starts_with_bos(base)
        else ids
    )
    cut = [ids[at : at + 256] for at in range(0, len(ids) - 1, 255)]
    windows = [cut[at * len(cut) // 2] for at in range(2)]
    model = load_body(base).eval()
    with torch.no_grad():
        losses = [
            (model(input_ids=torch.tensor([w]), labels=torch.tensor([w])).loss.item(), len(w) - 1)
            for w in windows
        ]
    expected = np.exp(
        sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    )
    assert cost["torch"] == pytest.approx(expected, rel=1e-4)
    assert cost["bundle"] != cost["torch"] and cost["bundle"] == pytest.approx(expected, rel=0.1)
    assert cost["loss"] == pytest.approx(cost["bundle"] / cost["torch"] - 1)
    (line,) = [line for line in said if line.startswith("cost of int8: wikitext2 perplexity ")]
    assert line.endswith("% worse (2 windows of at most 512 tokens)")
    assert "Cost of the precision" in (tmp_path / "bundle" / "report.html").read_text()


def _starts_with_bos(base: object) -> bool:
    tokenizer = load_tokenizer(base)  # type: ignore[arg-type]
    first = tokenizer("a")["input_ids"]
    return bool(first) and first[0] == tokenizer.bos_token_id


def test_an_encoders_correlation_is_printed_and_fp32_costs_nothing(
    topics: Path, tmp_path: Path, general: Path
) -> None:
    output = export(
        "--adapter",
        f"topics={topics}",
        "--out",
        tmp_path / "b",
        "--precision",
        "fp32",
        "--general",
        general,
        "--threads",
        1,
    )
    assert "cost of fp32: stsb spearman" in output and ": 0.0 % worse (4 pairs)" in output
    assert read_manifest(tmp_path / "b").quality["cost"]["loss"] == pytest.approx(0, abs=1e-6)


def test_a_merged_bundle_is_compared_with_the_merged_model(
    topics: Path, tmp_path: Path, general: Path
) -> None:
    output = export(
        "--adapter",
        f"topics={topics}",
        "--out",
        tmp_path / "b",
        "--mode",
        "merged",
        "--precision",
        "fp32",
        "--general",
        general,
    )
    assert ": 0.0 % worse (4 pairs)" in output


def test_the_search_shows_it_for_every_precision(
    topics: Path, tmp_path: Path, general: Path
) -> None:
    output = export(
        "--adapter",
        f"topics={topics}",
        "--out",
        tmp_path / "b",
        "--precision",
        "auto",
        "--max-loss",
        "60%",
        "--general",
        general,
    )
    head, torch_row, *rows = [
        line
        for line in output.splitlines()
        if line.startswith(("   precision", "   torch", "1  ", "2  "))
    ]
    assert "stsb spearman" in head and len(torch_row.split()) >= 3
    assert read_manifest(tmp_path / "b").quality["cost"]["items"] == 4 and len(rows) == 2


def test_without_the_sets_a_line_says_how_to_get_it(
    topics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EDGETUNE_DATASETS", raising=False)
    assert "--general FOLDER says where WikiText-2 and STS-B are" in export(
        "--adapter", f"t={topics}", "--out", tmp_path / "a"
    )
    output = export("--adapter", f"t={topics}", "--out", tmp_path / "b", "--general", tmp_path)
    assert "cost of int8: not measured: " in output and read_manifest(tmp_path / "b").quality == {}
    assert "cost" not in export(
        "--adapter",
        f"t={topics}",
        "--out",
        tmp_path / "b",
        "--general",
        tmp_path,
        "--general-items",
        0,
        "--replace",
    )


def test_no_general_set_is_for_an_encoder_decoder_and_that_is_said(
    tmp_path: Path, general: Path
) -> None:
    base = resolve_base(str(make_seq2seq("t5", tmp_path / "t5")))
    said: list[str] = []
    stored: Any = SimpleNamespace(precision=SimpleNamespace(weights="int8"))
    assert (
        CostPlan(general, items=2).measure(
            tmp_path, stored, base, lambda: None, threads=1, say=said.append
        )
        is None
    )
    assert said == ["cost of int8: not measured: no general set is for an encoder-decoder"]
