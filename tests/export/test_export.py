"""Bundles of the tiny models: what is in them, that they answer as torch, and that a failed proof
leaves nothing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from export_helpers import decoder_feed, export, make_adapter, op_counts, plain_session

from edgetune.adapters.runs import load_adapted_model
from edgetune.core.errors import AdapterError, ExportError, OutputError, ProofError
from edgetune.export.proof.prove import reprove
from edgetune.runtime.adapters.packing import pack_adapter
from edgetune.runtime.bundle.digests import verify_files
from edgetune.runtime.bundle.manifest import read_manifest

IDS = np.array([[5, 9, 30, 31, 7, 100, 12], [8, 4, 77, 0, 0, 0, 0]], np.int64)
MASK = np.array([[1] * 7, [1, 1, 1, 0, 0, 0, 0]], np.int64)


@pytest.fixture(scope="module")
def chat(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_decoder, tmp_path_factory.mktemp("adapters") / "chat")


@pytest.fixture(scope="module")
def bundle(chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "decoder"
    export(out, chat)
    return out


@pytest.fixture(scope="module")
def topics(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_encoder, tmp_path_factory.mktemp("adapters") / "topics")


def test_a_decoder_bundle_holds_exactly_these_files(bundle: Path) -> None:
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    adapter = {
        "adapter_config.json",
        "adapter_model.safetensors",
        "edgetune_adapter.json",
        "chat.onnx_adapter",
    }
    graph = {
        "edgetune.json",
        "engine.onnx",
        "native.json",
        "model.onnx",
        "model.onnx.data",
        "genai_config.json",
        "report.html",
    }
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert files == graph | tokenizer | {f"adapters/chat/{name}" for name in adapter}


def test_the_manifest_knows_every_file_and_the_proof(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert verify_files(bundle, manifest) == []
    assert (
        manifest.proof["adapters"]["chat"]["passed"]
        and manifest.proof["adapters"]["chat"]["max_abs"] <= 1e-3
    )


def test_the_proof_can_be_repeated_from_the_bundle_alone(bundle: Path) -> None:
    again = reprove(bundle, read_manifest(bundle))
    assert again["onnxruntime"]["chat"].passed
    assert all(found["chat"].passed for found in again.values())


@pytest.mark.parametrize(
    "parameters",
    [
        {"rank": 1},
        {"rslora": True},
        {
            "rank_pattern": {"q_proj": 2, "down_proj": 6},
            "alpha_pattern": {"q_proj": 3, "o_proj": 64},
        },
        {"target_modules": ("q_proj", "v_proj")},
        {"target_modules": ("up_proj",)},
    ],
    ids=["rank 1", "rsLoRA", "rank and alpha patterns", "only q and v", "only up"],
)
def test_every_kind_of_lora_answers_as_torch(
    tiny_decoder: Path, tmp_path: Path, parameters: dict[str, object]
) -> None:
    adapter = make_adapter(tiny_decoder, tmp_path / "a", **parameters)
    manifest = export(tmp_path / "bundle", adapter)
    assert manifest.proof["adapters"]["a"]["max_abs"] <= 1e-3


def test_several_adapters_share_one_base(tiny_decoder: Path, tmp_path: Path) -> None:
    adapters = [
        make_adapter(tiny_decoder, tmp_path / name, seed=i, rank=2 + i)
        for i, name in enumerate("abc")
    ]
    manifest = export(tmp_path / "bundle", *adapters)
    assert [entry.name for entry in manifest.adapters] == ["a", "b", "c"]
    assert [entry.rank for entry in manifest.adapters] == [2, 3, 4]


def test_a_merged_bundle_has_no_adapter_inputs_and_answers_as_torch(
    chat: Path, tmp_path: Path
) -> None:
    manifest = export(tmp_path / "merged", chat, mode="merged")
    assert manifest.sites == () and manifest.proof["adapters"]["chat"]["max_abs"] <= 1e-3
    assert all(found["chat"].passed for found in reprove(tmp_path / "merged", manifest).values())


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("mode", ["separate", "merged"])
def test_quantised_decoders_keep_the_adapter(
    tiny_decoder: Path, tmp_path: Path, precision: str, mode: str
) -> None:
    adapter = make_adapter(
        tiny_decoder, tmp_path / "a", strength=0.5 if mode == "separate" else 0.1
    )
    manifest = export(
        tmp_path / "bundle",
        adapter,
        precision=precision,
        mode=mode,
        overrides={"lm_head": "int8", "down_proj": "int8"},
    )
    assert manifest.proof["adapters"]["a"]["recovered"] > 0.5
    if mode == "merged":
        assert manifest.proof["adapters"]["a"]["survived"]["strength"] == pytest.approx(
            1.0, abs=0.1
        )


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("mode", ["separate", "merged"])
def test_encoders_with_their_head_answer_as_torch(
    topics: Path, tmp_path: Path, precision: str, mode: str
) -> None:
    manifest = export(tmp_path / "bundle", topics, precision=precision, mode=mode)
    assert manifest.proof["adapters"]["topics"]["passed"]
    assert manifest.adapters[0].labels == ("low", "high", "none")


def test_a_dead_adapter_fails_the_proof_and_leaves_nothing(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_decoder, tmp_path / "dead", strength=0.0)
    with pytest.raises(ProofError, match="changes nothing even in torch"):
        export(tmp_path / "bundle", adapter)
    assert {path.name for path in tmp_path.iterdir()} == {"dead"}


def test_dora_is_refused_as_input_with_the_reason_and_merges(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_decoder, tmp_path / "dora", dora=True)
    with pytest.raises(ExportError, match="--mode merged"):
        export(tmp_path / "bundle", adapter)
    assert (
        export(tmp_path / "merged", adapter, mode="merged").proof["adapters"]["dora"]["max_abs"]
        <= 1e-3
    )


def test_an_adapter_of_another_base_is_refused(chat: Path, topics: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="another base model"):
        export(tmp_path / "bundle", chat, topics)


def test_only_one_adapter_merges(tiny_decoder: Path, tmp_path: Path) -> None:
    adapters = [make_adapter(tiny_decoder, tmp_path / name, seed=i) for i, name in enumerate("ab")]
    with pytest.raises(ExportError, match="exactly one"):
        export(tmp_path / "bundle", *adapters, mode="merged")


def test_a_folder_that_is_no_bundle_is_never_replaced(chat: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(OutputError, match="something else"):
        export(tmp_path / "thesis", chat)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_a_missing_run_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"nowhere.*run folder.*no such folder"):
        export(tmp_path / "bundle", tmp_path / "nowhere")


def test_plain_onnx_runtime_runs_the_base_and_the_adapter(bundle: Path, chat: Path) -> None:
    manifest, session = read_manifest(bundle), plain_session(bundle)
    feed = decoder_feed(manifest, IDS, MASK)
    adapter = ort.LoraAdapter()
    adapter.Load(str(bundle / "adapters/chat/chat.onnx_adapter"))
    options = ort.RunOptions()
    options.add_active_adapter(adapter)
    model, _, _ = load_adapted_model(chat)
    for run_options, context in ((options, None), (None, model.disable_adapter())):
        logits = session.run(["logits"], feed, run_options)[0][:, 0]
        with torch.no_grad(), context or torch.no_grad():
            expected = [
                model(torch.tensor([IDS[i][MASK[i] == 1].tolist()])).logits[0, -1].numpy()
                for i in (0, 1)
            ]
        assert np.abs(logits - np.stack(expected)).max() < 1e-3


def test_the_standard_graph_goes_on_from_its_own_cache(bundle: Path) -> None:
    manifest, session = read_manifest(bundle), plain_session(bundle)
    whole = session.run(["logits"], decoder_feed(manifest, IDS[:1], MASK[:1]))[0]
    first = decoder_feed(manifest, IDS[:1, :4], MASK[:1, :4])
    names = [value.name for value in session.get_outputs()]
    results = dict(zip(names, session.run(None, first), strict=True))
    cache = {
        name.replace("present", "past_key_values"): value
        for name, value in results.items()
        if name.startswith("present")
    }
    for i in range(4, 7):
        feed = {"input_ids": IDS[:1, i : i + 1], "attention_mask": MASK[:1, : i + 1], **cache}
        results = dict(zip(names, session.run(None, feed), strict=True))
        cache = {
            name.replace("present", "past_key_values"): value
            for name, value in results.items()
            if name.startswith("present")
        }
    assert np.abs(results["logits"] - whole).max() < 1e-4


def test_the_graph_has_no_reshapes_and_one_attention_a_layer(bundle: Path) -> None:
    kinds = op_types(bundle)
    assert kinds.count("GroupQueryAttention") == 2 and not {
        "Reshape",
        "Transpose",
        "Sigmoid",
    } & set(kinds)
    assert (
        kinds.count("SkipSimplifiedLayerNormalization") == 4
        and kinds.count("MatMul") == 2 * 4 * 3 + 1
    )


def test_a_tied_embedding_is_stored_once(chat: Path, bundle: Path, tmp_path: Path) -> None:
    manifest = export(tmp_path / "int8", chat, precision="int8")
    embedding = manifest.graph.vocab_size * manifest.graph.hidden_size
    body = manifest.base.parameters - embedding
    assert (tmp_path / "int8" / "model.onnx.data").stat().st_size < 1.25 * (
        embedding + body
    ) + 2 * 256 * 16 * 4 + 60 * 4096


def odd_decoder(tiny_decoder: Path, folder: Path, *, tied: bool) -> Path:
    """A Llama whose width is no multiple of the block size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(tiny_decoder, folder)
    config = LlamaConfig.from_pretrained(folder)
    config.hidden_size, config.intermediate_size, config.tie_word_embeddings = 48, 80, tied
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_an_odd_width_keeps_its_embedding_in_fp32(
    tiny_decoder: Path, tmp_path: Path, tied: bool
) -> None:
    adapter = make_adapter(odd_decoder(tiny_decoder, tmp_path / "odd", tied=tied), tmp_path / "a")
    manifest = export(tmp_path / "bundle", adapter, precision="int8")
    assert manifest.proof["adapters"]["a"]["passed"]
    assert op_types(tmp_path / "bundle").count("GatherBlockQuantized") == 0


def op_types(bundle: Path) -> list[str]:
    return list(op_counts(bundle).elements())


def last_outputs_that_nobody_reads(bundle: Path) -> list[str]:
    """OpenVINO refuses a skip-norm that names more outputs than are read."""
    graph = onnx.load(bundle / "engine.onnx", load_external_data=False).graph
    read = {name for node in graph.node for name in node.input} | {
        value.name for value in graph.output
    }
    return [
        node.output[-1]
        for node in graph.node
        if node.op_type.startswith("Skip") and node.output[-1] not in read
    ]


def test_an_embedding_is_kept_as_it_is_asked_for(topics: Path, tmp_path: Path) -> None:
    export(tmp_path / "int8", topics, precision="int8")
    export(tmp_path / "kept", topics, precision="int8", overrides={"word_embeddings": "fp32"})
    assert op_types(tmp_path / "int8").count("GatherBlockQuantized") == 1
    assert op_types(tmp_path / "kept").count("GatherBlockQuantized") == 0
    assert last_outputs_that_nobody_reads(tmp_path / "int8") == []


def test_an_encoder_read_at_its_first_token_answers_as_torch(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_encoder, tmp_path / "base")
    shutil.rmtree(base / "1_Pooling")
    manifest = export(tmp_path / "bundle", make_adapter(base, tmp_path / "a"))
    assert manifest.graph.pooling == "cls" and manifest.proof["adapters"]["a"]["max_abs"] <= 1e-3


def test_a_bundle_behind_a_link_is_replaced_and_the_link_stays(chat: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    export(tmp_path / "link", chat)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "edgetune.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link"}


def test_a_four_bit_decoder_keeps_its_output_projection_in_eight(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_decoder, tmp_path / "a", strength=0.5)
    manifest = export(tmp_path / "bundle", adapter, precision="int4")
    assert manifest.precision.overrides == {"lm_head": "int8"}


def test_genai_config_names_the_graph_as_it_is(bundle: Path) -> None:
    config = json.loads((bundle / "genai_config.json").read_text())["model"]
    inputs = {value.name for value in plain_session(bundle).get_inputs()}
    assert (
        config["decoder"]["filename"] == "model.onnx"
        and config["decoder"]["num_hidden_layers"] == 2
    )
    assert {
        config["decoder"]["inputs"]["past_key_names"] % 1,
        "attention_mask",
        "input_ids",
    } <= inputs


def test_onnx_adapter_and_peft_folder_hold_the_same_tensors(bundle: Path, chat: Path) -> None:
    packed = pack_adapter(chat, read_manifest(bundle))
    form = ort.AdapterFormat.read_adapter(str(bundle / "adapters/chat/chat.onnx_adapter"))
    stored = {name: value.numpy() for name, value in form.get_parameters().items()}
    assert stored.keys() == packed.tensors.keys()
    assert all(np.array_equal(stored[name], packed.tensors[name]) for name in stored)
