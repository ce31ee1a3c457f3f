"""A few rows from text to final answer: transformers and PEFT beside the runtime."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from export_helpers import export, make_adapter
from training_helpers import (
    intent_recipe,
    sft_recipe,
    silent,
    with_an_end_token_it_can_say,
)

from edgetune.core.errors import ProofError
from edgetune.export.bundle import export_bundle
from edgetune.export.inputs.sources import read_source
from edgetune.export.proof.from_text import NEW_TOKENS, prove_from_text
from edgetune.export.proof.greedy import generate_ids, greedy_alone, until_end
from edgetune.models.load import load_body
from edgetune.models.resolve import resolve_base
from edgetune.quantisation.precision import Precision
from edgetune.runtime.bundle.manifest import read_manifest
from edgetune.training import run_recipe


@pytest.fixture(scope="module")
def actions(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("actions")
    base = with_an_end_token_it_can_say(tiny_decoder, folder / "base")
    run_recipe(sft_recipe(base, folder, epochs=20), out=folder / "run", progress=silent())
    return folder / "run"


@pytest.fixture(scope="module")
def intents(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("intents")
    run_recipe(
        intent_recipe(tiny_encoder, folder, epochs=10), out=folder / "run", progress=silent()
    )
    return folder / "run"


def test_a_decoders_rows_are_answered_word_for_word(actions: Path, tmp_path: Path) -> None:
    manifest = export_bundle([("a", actions)], tmp_path / "b", precision=Precision("fp32"))
    found = manifest.proof["answers"]["a"]
    assert (found["kind"], found["rows"], found["same"]) == ("completions", 3, 3)
    assert not found["others"]
    assert "3 of 3" in (tmp_path / "b" / "report.html").read_text()


def test_a_classifier_gives_labels_and_probabilities_and_the_base_its_embeddings(
    intents: Path, tmp_path: Path
) -> None:
    manifest = export_bundle([("a", intents)], tmp_path / "b", precision=Precision("fp32"))
    labels, embeddings = (manifest.proof["answers"][name] for name in ("a", "(base)"))
    assert labels["kind"] == "labels" and labels["same"] == labels["rows"] == 3
    assert labels["largest"] < 1e-5 and embeddings["largest"] < 1e-5
    assert embeddings["kind"] == "embeddings"


def edited(bundle: Path, adapter: str, **changes: object) -> Path:
    """The bundle with other words in its adapter's description."""
    path = bundle / "adapters" / adapter / "edgetune_adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    manifest = json.loads((bundle / "edgetune.json").read_text())
    manifest["adapters"][0] |= {key: changes[key] for key in changes if key != "generation"}
    (bundle / "edgetune.json").write_text(json.dumps(manifest))
    return bundle


def test_labels_in_another_order_on_the_device_are_found(intents: Path, tmp_path: Path) -> None:
    whole = tmp_path / "b"
    manifest = export_bundle([("a", intents)], whole, precision=Precision("fp32"))
    source, base = read_source("a", intents), resolve_base(manifest.base.name)
    bundle = edited(whole, "a", labels=list(source.labels or ())[::-1])
    with pytest.raises(ProofError, match=r"a: labels of .* differ by"):
        prove_from_text(bundle, read_manifest(bundle), base, [source])


def test_a_prompt_that_the_device_reads_otherwise_is_found_at_every_precision(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_decoder, tmp_path / "a")
    for precision in ("fp32", "int4"):
        bundle = tmp_path / precision
        manifest = export(bundle, adapter, precision=precision)
        edited(bundle, "a", prompt_format={"template": "plain"})
        base, source = resolve_base(str(tiny_decoder)), read_source("a", adapter)
        with pytest.raises(ProofError, match=r"a: the prompt .* is read as"):
            prove_from_text(bundle, read_manifest(bundle), base, [source])
        assert manifest.proof["answers"]["a"]["rows"] == 3


def test_another_answer_of_4_bits_is_recorded_and_for_the_task_metric_to_judge(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_decoder, tmp_path / "a")
    found = export(tmp_path / "b", adapter, precision="int4").proof["answers"]["a"]
    assert found["same"] + len(found["others"]) == found["rows"] and not found["failures"]


def test_what_a_base_asks_of_greedy_answers_is_said_where_the_device_does_not_apply_it(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_decoder, base)
    config = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(config | {"repetition_penalty": 1.3}))
    lines: list[str] = []
    adapter = make_adapter(base, tmp_path / "a")
    manifest = export_bundle(
        [("a", adapter)], tmp_path / "b", precision=Precision("fp32"), say=lines.append
    )
    found = manifest.proof["answers"]["a"]
    assert found["not_applied"] == {"repetition_penalty": 1.3} and found["same"] == 3
    (line,) = [line for line in lines if line.startswith("answers a")]
    assert line.endswith("as generation_config.json says: repetition_penalty 1.3")


def test_greedy_ids_are_those_of_generate(tiny_decoder: Path) -> None:
    model, left = greedy_alone(load_body(resolve_base(str(tiny_decoder))))
    ids = generate_ids(model, [5, 6, 7], most=NEW_TOKENS)
    assert left == {} and 1 <= len(ids) <= NEW_TOKENS
    assert until_end([1, 2, 9, 3], {9}) == [1, 2] and until_end([1, 2], {9}) == [1, 2]
