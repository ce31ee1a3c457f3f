"""`--precision auto`: what is tried in which order, when it stops, and what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from export_helpers import make_adapter
from training_helpers import intent_recipe, intent_rows, silent, write_rows

from edgetune.cli.export import command
from edgetune.core.errors import ExportError
from edgetune.export.candidates import Candidate, candidates, estimated_bytes, kinds
from edgetune.export.inputs.sources import read_source
from edgetune.export.proof.task_metric import TaskPlan
from edgetune.export.proof.torch_model import torch_model
from edgetune.export.search import Found, Trial, export_smallest
from edgetune.export.search_page import render_search, trial_lines
from edgetune.models.fake_quantise import linear_layers
from edgetune.models.load import load_body
from edgetune.models.resolve import resolve_base
from edgetune.quantisation.precision import Precision
from edgetune.runtime import Runtime
from edgetune.runtime.bundle.digests import verify_files
from edgetune.runtime.bundle.manifest import read_manifest
from edgetune.runtime.check.rounds import Latency
from edgetune.training import run_recipe

ROW = [5, 9, 30, 31, 7, 100, 12]


@pytest.fixture(scope="module")
def run(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("intents")
    run_recipe(
        intent_recipe(tiny_encoder, folder, epochs=10), out=folder / "run", progress=silent()
    )
    return folder / "run"


@pytest.fixture(scope="module")
def out(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle that the command finds, with what it printed beside it."""
    folder = tmp_path_factory.mktemp("found")
    arguments = [
        "--adapter",
        f"topics={run}",
        "--out",
        str(folder / "bundle"),
        "--precision",
        "auto",
        "--max-loss",
        "60%",
        "--threads",
        "1",
    ]
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    (folder / "printed.txt").write_text(done.output)
    return folder / "bundle"


def test_the_first_precision_that_holds_is_an_ordinary_bundle_in_its_place(out: Path) -> None:
    manifest = read_manifest(out)
    assert verify_files(out, manifest) == [] and manifest.proof["adapters"]["topics"]["passed"]
    searched = manifest.quality["auto"]
    assert (
        len(searched["tried"]) == searched["chosen"] + 1 and searched["tried"][0]["name"] == "fp32"
    )
    assert (
        searched["tried"][-1]["loss"] <= 0.6
        and searched["tried"][-1]["mb"] < searched["tried"][0]["mb"]
    )
    with Runtime.open(out, threads=1) as runtime:
        texts = [row["text"] for row in intent_rows()]
        right = sum(
            found.label == row["label"]
            for found, row in zip(runtime.classify(texts, "topics"), intent_rows(), strict=True)
        )
        assert right > len(texts) / 2


def test_the_table_and_the_page_show_what_was_tried(out: Path) -> None:
    printed = (out.parent / "printed.txt").read_text()
    assert "accuracy topics" in printed and "torch, fp32" in printed and "chosen" in printed
    page = (out.parent / "bundle.precision.html").read_text()
    assert page.count("<svg") == 2 and "Loss over size" in page and "polyline" in page
    assert {path.name for path in out.parent.iterdir()} == {
        "bundle",
        "bundle.precision.html",
        "printed.txt",
    }


def test_without_rows_one_line_says_what_to_do(
    tiny_encoder: Path, tiny_decoder: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_encoder, tmp_path / "plain")
    with pytest.raises(
        ExportError,
        match=(
            r"no validation rows to measure plain on .*data\.validation.*--task-data FILE, or a"
            r" fixed --precision"
        ),
    ):
        export_smallest([("plain", adapter)], tmp_path / "b", max_loss=0.005)
    with pytest.raises(ExportError, match="to measure the base on"):
        export_smallest([], tmp_path / "b", max_loss=0.005, base_name=str(tiny_decoder))


def test_a_base_alone_is_judged_by_its_perplexity(tiny_decoder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "text.jsonl", [{"text": row["text"]} for row in intent_rows()])
    found = export_smallest(
        [],
        tmp_path / "b",
        max_loss=0.5,
        base_name=str(tiny_decoder),
        task=TaskPlan(data=rows),
        threads=1,
    )
    assert (
        found.metric == {"(base)": "perplexity"}
        and found.chosen > 0
        and found.trials[0].loss == pytest.approx(0, abs=1e-4)
    )
    assert (
        found.trials[found.chosen].latency is not None
        and found.trials[found.chosen].latency.tpot_ms is not None
    )
    assert found.manifest.proof["task"]["(base)"]["same"] is None


def test_candidates_come_smallest_first_with_the_layers_that_suffer_most_at_eight_bits(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    base = resolve_base(str(tiny_decoder))
    model = torch_model(base, read_source("a", make_adapter(tiny_decoder, tmp_path / "a")))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    found = candidates(model, [ROW, ROW[::-1]], keep={"down_proj": "fp32"}, decoder=True)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert [one.bytes for one in found] == sorted(one.bytes for one in found)
    assert all(one.precision.overrides["down_proj"] == "fp32" for one in found)
    four = [one for one in found if one.precision.weights == "int4"]
    assert {one.precision.block_size for one in four} >= {16, 32, 64} and all(
        one.precision.overrides["lm_head"] == "int8" for one in four
    )
    mixed = [
        set(one.precision.overrides) - {"lm_head", "down_proj"}
        for one in four
        if len(one.precision.overrides) > 2
    ]
    packed = (
        {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
        {"mlp.gate_proj", "mlp.up_proj"},
        {"self_attn.o_proj"},
    )
    assert sorted(map(len, mixed)) and all(any(part <= kept for part in packed) for kept in mixed)


def test_what_the_user_keeps_is_never_asked_for_otherwise(tiny_decoder: Path) -> None:
    body = load_body(resolve_base(str(tiny_decoder)))
    found = candidates(
        body, [ROW], keep={"down_proj": "int4", "layers.0.self_attn.k_proj": "int4"}, decoder=True
    )
    mixed = [
        one.precision
        for one in found
        if one.precision.weights == "int4" and len(one.precision.overrides) > 3
    ]
    assert mixed and all(one.bits(["model.layers.0.mlp.down_proj"]) == 4 for one in mixed)
    assert not {"self_attn.q_proj", "mlp.down_proj"} & {
        end for one in mixed for end in one.overrides
    }


def test_layers_that_read_one_input_are_one_kind(tiny_decoder: Path, tiny_encoder: Path) -> None:
    decoder = kinds(load_body(resolve_base(str(tiny_decoder))), ROW)
    assert ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj") in decoder and (
        "mlp.down_proj",
    ) in decoder
    assert not any("lm_head" in name for kind in decoder for name in kind) and all(
        len(paths) == 2 * len(kind) for kind, paths in decoder.items()
    )


def test_the_estimate_is_the_size_of_the_weights(tiny_decoder: Path) -> None:
    body = load_body(resolve_base(str(tiny_decoder)))
    linears = sum(
        layer.weight.numel()
        for name, layer in body.named_modules()
        if isinstance(layer, torch.nn.Linear) and name != "lm_head"
    )
    tied = body.lm_head.weight.numel()
    assert estimated_bytes(body, Precision("fp32")) == 4 * (linears + tied)
    four = Precision("int4", 32, overrides={"lm_head": "int8"})
    assert estimated_bytes(body, four) == pytest.approx(
        linears * (0.5 + 4 / 32) + tied * (1 + 4 / 32)
    )


def test_four_bits_are_rounded_more_carefully_where_they_lie_on_no_grid(tiny_decoder: Path) -> None:
    body = load_body(resolve_base(str(tiny_decoder)))
    found = candidates(body, [ROW], keep={}, decoder=True, quantisers=("rtn", "gptq"))
    names = [one.name for one in found if one.precision.weights == "int4"]
    assert [name.replace(" by gptq", "") for name in names[1::2]] == names[::2] and all(
        "by gptq" in name for name in names[1::2]
    )
    assert not any(one.careful for one in found if one.precision.weights == "int8")
    with torch.no_grad():
        for layer in linear_layers(body).values():
            blocks = layer.weight.view(-1, 32)
            blocks.copy_(
                (blocks / blocks.abs().amax(1, keepdim=True) * 7).round()
                * torch.tensor([2.0**-7, 2.0**-5]).repeat(len(blocks) // 2)[:, None]
            )
    kept = candidates(body, [ROW], keep={}, decoder=True, quantisers=("rtn", "gptq"))
    assert (
        {one.precision.block_size for one in kept if one.careful}
        == {128, 64}
        < {one.precision.block_size for one in found if one.careful}
    )
    merged = candidates(body, [ROW], keep={}, decoder=True, quantisers=("rtn", "hqq"), merged=True)
    assert {one.precision.block_size for one in merged if one.careful} >= {64, 32, 16}


def pair(found: list[Candidate]) -> list[Candidate]:
    """A size rounded to nearest, and the same more carefully."""
    at = next(at for at, one in enumerate(found) if one.careful)
    assert found[at - 1].precision.block_size == found[at].precision.block_size
    return found[at - 1 : at + 1]


def test_a_size_is_tried_again_only_where_the_bound_is_near(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgetune.export import search

    every = search._candidates
    monkeypatch.setattr(
        search, "_candidates", lambda *given, **options: pair(every(*given, **options))
    )
    monkeypatch.setattr("edgetune.export.proof.task_metric.relative_loss", lambda *_, **__: 0.02)
    monkeypatch.setattr(search, "WITHIN_REACH", 3)
    said: list[str] = []
    with pytest.raises(ExportError, match=r"2\.00% at best"):
        export_smallest([("a", run)], tmp_path / "b", max_loss=0.01, threads=1, say=said.append)
    assert any(line.startswith("trying int4 by gptq") for line in said)
    said.clear()
    with pytest.raises(ExportError, match=r"2\.00% at best"):
        export_smallest([("a", run)], tmp_path / "b", max_loss=0.005, threads=1, say=said.append)
    assert any(line.startswith("trying int4") for line in said) and not any(
        "gptq" in line for line in said
    )


def test_the_quantiser_asked_for_is_the_only_one(run: Path, tmp_path: Path) -> None:
    found = export_smallest([("a", run)], tmp_path / "b", max_loss=0.9, threads=1, quantiser="gptq")
    assert (
        found.trials[-1].name.startswith("int4 by gptq")
        and read_manifest(tmp_path / "b").precision.quantiser == "gptq"
    )
    with pytest.raises(
        ExportError, match="what of merged or fully trained weights survives calibrated rounding"
    ):
        export_smallest([("a", run)], tmp_path / "c", max_loss=0.9, mode="merged", quantiser="gptq")
    text = write_rows(tmp_path / "text.jsonl", [{"text": "play a song"}])
    with pytest.raises(ExportError, match="only gptq reads text, and it does not round this base"):
        export_smallest([("a", run)], tmp_path / "c", max_loss=0.9, mode="merged", calibration=text)


def trial(name: str, mb: float, ms: float, loss: float) -> Trial:
    return Trial(name, {"a": 1 - loss}, loss, mb, Latency(None, None, ms, 1.0, 1.0))


def test_what_another_beats_in_everything_is_not_on_the_front() -> None:
    trials = (
        trial("fp32", 9, 4, 0.0),
        trial("small", 2, 2, 0.1),
        trial("worse", 3, 3, 0.2),
        trial("right", 4, 2, 0.0),
        Trial("bad", {}, failed="no"),
    )
    found = Found(None, trials, 3, 0.005, {"a": "accuracy"}, {"a": 1.0}, 10)  # type: ignore[arg-type]
    assert found.front == {1, 3}
    lines = trial_lines(found)
    assert (
        "beaten" in lines[2]
        and "chosen" in lines[5]
        and "failed: no" in lines[6]
        and "accuracy a" in lines[0]
    )
    assert render_search(found, "b").count("<circle") == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "auto", "--max-loss", "half"], "cannot read --max-loss .*0.5%"),
        (["--precision", "auto", "--block-size", "64"], "several block sizes by itself"),
        (["--precision", "int8", "--max-loss", "1%"], "bounds what --precision auto may lose"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    run: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        CliRunner().invoke(
            command,
            ["--adapter", f"a={run}", "--out", str(tmp_path / "b"), *options],
            catch_exceptions=False,
            standalone_mode=False,
        )
    assert not (tmp_path / "b").exists()


def test_a_bound_that_nothing_keeps_is_an_error_and_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgetune.export import search

    monkeypatch.setattr(search, "_candidates", lambda *_, **__: [])
    monkeypatch.setattr("edgetune.export.proof.task_metric.relative_loss", lambda *_, **__: 0.25)
    with pytest.raises(
        ExportError, match=r"no precision keeps within --max-loss 0\.50% .*25\.00% at best"
    ):
        export_smallest([("a", run)], tmp_path / "b", max_loss=0.005, threads=1)
    assert list(tmp_path.iterdir()) == []


def test_the_result_is_json(out: Path) -> None:
    assert json.loads((out / "edgetune.json").read_text())["quality"]["auto"]["max_loss"] == 0.6
