"""Encoder-decoders learn prompt → completion as transformers and PEFT train them, and the whole
road works on them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export_helpers import rounded, stored_weights, train_and_ship
from family_helpers import loss_and_gradients, with_adapter
from seq2seq_helpers import FAMILIES, make_seq2seq
from training_helpers import action_rows, recipe, sft_recipe, silent, write_rows

from edgetune.adapters.lora import target_names
from edgetune.cli import main
from edgetune.core.errors import BaseModelError, DataError, EdgetuneError, RecipeError
from edgetune.data.loaders import load_examples
from edgetune.data.seq2seq import collate_answers
from edgetune.export.graph.seq2seq import ENCODER
from edgetune.models.base import open_folder
from edgetune.models.fake_quantise import stored_bits
from edgetune.models.load import load_body, load_tokenizer
from edgetune.models.resolve import resolve_base
from edgetune.objectives.seq2seq import answer_loss
from edgetune.training.fast.fused_layers import fused_ops
from edgetune.training.fast.lora_products import fused_lora
from edgetune.training.run import run_recipe


@pytest.fixture(scope="module")
def t5(tmp_path_factory: Any) -> Path:
    return make_seq2seq("t5", tmp_path_factory.mktemp("t5") / "base")


def batch(base: Path, folder: Path) -> Any:
    opened = open_folder(base, name="t5")
    tokenizer = load_tokenizer(opened)
    return collate_answers(
        load_examples(sft_recipe(base, folder).stage[0], tokenizer, opened).train[:5],
        tokenizer.pad_token_id,
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_transformers_and_peft(name: str, tmp_path: Path) -> None:
    base = make_seq2seq(name, tmp_path / "base")
    model, rows = (
        with_adapter(load_body(resolve_base(str(base))), "text-generation"),
        batch(base, tmp_path),
    )

    def theirs(model: Any, rows: Any) -> Any:
        return (
            model(
                input_ids=rows.input_ids, attention_mask=rows.attention_mask, labels=rows.labels
            ).loss,
            0,
        )

    expected_loss, expected = loss_and_gradients(theirs, model, rows)
    with fused_lora(model, "fp32"), fused_ops(model):
        loss, gradients = loss_and_gradients(answer_loss, model, rows)
    assert loss == pytest.approx(expected_loss, abs=1e-5) and gradients.keys() == expected.keys()
    assert any("EncDecAttention.k.lora_B" in name for name in gradients)
    for path, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[path], atol=1e-5, rtol=1e-4)


def test_prompt_and_answer_are_what_the_tokenizer_writes_and_padding_counts_for_nothing(
    t5: Path, tmp_path: Path
) -> None:
    base = open_folder(t5, name="t5")
    tokenizer = load_tokenizer(base)
    row = action_rows()[0]
    example = load_examples(sft_recipe(t5, tmp_path).stage[0], tokenizer, base).train[0]
    assert (
        example.input_ids == tokenizer(row["prompt"])["input_ids"]
        and example.input_ids[-1] == tokenizer.eos_token_id
    )
    assert example.labels == tokenizer(text_target=row["completion"])["input_ids"]
    together = batch(t5, tmp_path)
    assert (
        together.targets == int((together.labels >= 0).sum())
        and together.tokens == int(together.attention_mask.sum()) + together.targets
    )


def test_all_linear_reaches_encoder_decoder_and_what_is_between_them(t5: Path) -> None:
    found = target_names(load_body(resolve_base(str(t5))), "all-linear")
    kinds = {path.partition(".block.")[0] + "." + ".".join(path.split(".")[5:]) for path in found}
    assert {
        "encoder.SelfAttention.q",
        "decoder.SelfAttention.o",
        "decoder.EncDecAttention.v",
        "decoder.DenseReluDense.wo",
    } <= kinds
    assert len(found) == 2 * 6 + 3 * 10


def test_a_run_lowers_its_loss_and_peft_loads_the_adapter_as_it_is(
    t5: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSeq2SeqLM

    summary = run_recipe(
        sft_recipe(t5, tmp_path, epochs=6), out=tmp_path / "run", progress=silent()
    )
    assert summary.metrics["loss"] < 0.8 * summary.base_metrics["loss"]  # type: ignore[index]
    config = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    metadata = json.loads((tmp_path / "run/adapter/edgetune_adapter.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM" and metadata["task"] == "text-generation"
    model = PeftModel.from_pretrained(
        AutoModelForSeq2SeqLM.from_pretrained(t5), str(tmp_path / "run/adapter")
    ).eval()
    rows = batch(t5, tmp_path)
    with torch.no_grad(), model.disable_adapter():
        before = answer_loss(model, rows)[0].item()
    with torch.no_grad():
        after = answer_loss(model, rows)[0].item()
    assert after < 0.8 * before


def test_from_a_recipe_to_the_device_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """train, export with its task metric, verify --parity, predict a mixed file, eval of run and
    bundle, check.
    """

    def run(*arguments: object, expected: tuple[int, ...] = (0,)) -> str:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert int(stop.value.code or 0) in expected, captured.err
        return captured.out + captured.err  # progress and the proof go to the latter

    base = make_seq2seq("flan-t5", tmp_path / "base")

    write_rows(tmp_path / "train.jsonl", action_rows())
    write_rows(tmp_path / "dev.jsonl", action_rows()[:4])
    (tmp_path / "r.toml").write_text(
        f'base = "{base}"\nthreads = 1\n[[stage]]\nmethod = "sft"\nepochs = 30\nbatch_size ='
        ' 4\nlearning_rate = 1e-2\nprecision = "fp32"\ndata = { train = "train.jsonl", validation'
        ' = "dev.jsonl" }\n'
    )
    trained, bundle, report = tmp_path / "run", tmp_path / "bundle", tmp_path / "e.json"
    run("train", tmp_path / "r.toml", "--out", trained)
    assert "same answer on 100.0%" in run(
        "export", "--adapter", f"home={trained}", "--out", bundle, "--precision", "fp32"
    )
    assert "passed" in run("verify", bundle, "--parity")
    write_rows(
        tmp_path / "in.jsonl",
        [
            {"prompt": "turn on the lights in the hall"},
            {"prompt": "turn on the lights in the hall", "adapter": "home"},
        ],
    )
    run("predict", bundle, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    plain, adapted = (
        json.loads(line)["completion"] for line in (tmp_path / "out.jsonl").read_text().splitlines()
    )
    assert adapted.startswith('{"intent"') and plain != adapted
    scores = []
    for place in (trained, bundle):
        run("eval", place, "--data", tmp_path / "dev.jsonl", "--json", report)
        scores.append(json.loads(report.read_text())["metrics"])
    assert scores[0] == scores[1]
    budget = [
        part
        for name in ("ttft_ms", "tpot_ms", "load_ms", "swap_ms")
        for part in ("--budget", f"{name}=600000")
    ]
    assert "tpot" in run(
        "check",
        bundle,
        "--adapter",
        "home",
        "--prompt-tokens",
        "8",
        "--runs",
        "3",
        *budget,
        expected=(0, 3),
    )


@pytest.mark.slow
def test_an_adapter_trained_for_the_int4_base_learns_on_what_both_graphs_hold(
    t5: Path, tmp_path: Path
) -> None:
    shipped = train_and_ship(
        sft_recipe(t5, tmp_path, parameters={"base_precision": "int4"}), tmp_path
    )
    model = load_body(rounded(t5))
    stored = [
        stored_weights(shipped.bundle, shipped.manifest, name) for name in ("engine.onnx", ENCODER)
    ]
    assert {*stored[0], *stored[1]} == {
        name for name, bits in stored_bits(model, rounded(t5).precision).items() if bits
    }  # type: ignore[arg-type]
    assert all(
        torch.equal(model.get_submodule(name).weight, weight)
        for half in stored
        for name, weight in half.items()
    )
    assert shipped.manifest.proof["adapters"]["a"]["passed"] and not any(
        "trained for" in line for line in shipped.said
    )


def test_it_trains_in_bf16(t5: Path, tmp_path: Path) -> None:
    summary = run_recipe(
        sft_recipe(t5, tmp_path, epochs=4, precision="bf16"),
        out=tmp_path / "run",
        progress=silent(),
    )
    assert summary.metrics["loss"] < 0.95 * summary.base_metrics["loss"]  # type: ignore[index]


def test_the_loss_goes_through_the_projection_in_pieces_and_only_where_there_are_labels(
    t5: Path, tmp_path: Path
) -> None:
    from edgetune.objectives.projection import can_fuse

    model, rows = (
        with_adapter(load_body(resolve_base(str(t5))), "text-generation"),
        batch(t5, tmp_path),
    )
    assert can_fuse(model)
    with torch.no_grad():
        assert answer_loss(model, rows)[0].item() == pytest.approx(
            model(
                input_ids=rows.input_ids, attention_mask=rows.attention_mask, labels=rows.labels
            ).loss.item(),
            abs=1e-5,
        )


def test_all_its_weights_train_and_ship(t5: Path, tmp_path: Path) -> None:
    from edgetune.export.bundle import export_bundle
    from edgetune.runtime import Runtime

    run_recipe(
        sft_recipe(t5, tmp_path, learning_rate=3e-3, parameters={"train": "full"}),
        out=tmp_path / "run",
        progress=silent(),
    )
    manifest = export_bundle([("all", tmp_path / "run")], tmp_path / "bundle", threads=1)
    assert manifest.mode == "merged" and manifest.proof["adapters"]["all"]["max_abs"] <= 1e-3
    with Runtime.open(tmp_path / "bundle", threads=1) as runtime:
        assert runtime.generate(["turn on the lights"], max_new_tokens=4)[0].completion_tokens > 0


@pytest.mark.parametrize(
    "method",
    [
        "causal-lm",
        "masked-lm",
        "dpo",
        "grpo",
        "reward",
        "sequence-classification",
        "token-classification",
    ],
)
def test_other_methods_are_refused_by_name(method: str, t5: Path, tmp_path: Path) -> None:
    rows = write_rows(
        tmp_path / "rows.jsonl",
        [
            {
                "text": "a",
                "prompt": "a",
                "label": "b",
                "chosen": "a",
                "rejected": "b",
                "tokens": ["a"],
                "tags": ["O"],
            }
        ],
    )
    extra = {"grpo": {"reward": "json_valid"}} if method == "grpo" else {}
    with pytest.raises(
        RecipeError,
        match=rf'method "{method}" does not fit.*got t5, an encoder-decoder.*method = "sft"',
    ):
        run_recipe(recipe(t5, method, rows, None, **extra), out=tmp_path / "run", progress=silent())


def test_conversations_need_a_template(t5: Path, tmp_path: Path) -> None:
    rows = write_rows(
        tmp_path / "rows.jsonl",
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
    )
    with pytest.raises(RecipeError, match="rows with messages need a base with a chat template"):
        run_recipe(recipe(t5, "sft", rows, None), out=tmp_path / "run", progress=silent())


def test_a_long_prompt_is_refused_whatever_its_answer(t5: Path, tmp_path: Path) -> None:
    rows = write_rows(
        tmp_path / "rows.jsonl",
        [{"prompt": "turn on " * 60, "completion": "a"}, {"prompt": "a", "completion": "b"}],
    )
    with pytest.raises(DataError, match=r"the prompt is too long.*at most 128 tokens"):
        run_recipe(recipe(t5, "sft", rows, None), out=tmp_path / "run", progress=silent())


def test_replay_and_forgetting_are_refused(t5: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from edgetune.recipe.schema import Forgetting

    with pytest.raises(RecipeError, match=r"stage\[0\]\.replay is general text"):
        run_recipe(
            sft_recipe(t5, tmp_path, replay={"data": "x.txt"}),
            out=tmp_path / "run",
            progress=silent(),
        )
    with pytest.raises(RecipeError, match="an encoder-decoder does not"):
        run_recipe(
            replace(sft_recipe(t5, tmp_path), forgetting=Forgetting(general="x")),
            out=tmp_path / "run",
            progress=silent(),
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["T5EncoderModel"]}, "ForConditionalGeneration of mt5, t5, umt5"),
        (
            {"model_type": "bart", "architectures": ["BartForConditionalGeneration"]},
            "model_type 'bart'",
        ),
        ({"decoder_start_token_id": None}, "names no decoder_start_token_id"),
    ],
)
def test_other_encoder_decoders_and_their_halves_are_no_bases(
    change: dict[str, Any], message: str, t5: Path, tmp_path: Path
) -> None:
    for file in t5.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((t5 / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match=message):
        open_folder(tmp_path, name="other")


def test_the_digest_tells_scaled_states_from_plain_ones_however_they_are_written_down(
    t5: Path, tmp_path: Path
) -> None:
    for file in t5.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())

    def digest(**change: Any) -> str:
        config = {
            key: value
            for key, value in json.loads((t5 / "config.json").read_text()).items()
            if key not in ("scale_decoder_outputs", "tie_word_embeddings")
        }
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        return open_folder(tmp_path, name="t5").digest

    old, new = (
        digest(tie_word_embeddings=False),
        digest(tie_word_embeddings=True, scale_decoder_outputs=False),
    )
    assert old == new != digest(tie_word_embeddings=True) == digest()


def test_a_bare_base_is_asked_by_generating_only(t5: Path, tmp_path: Path) -> None:
    from edgetune.evaluation.answers import Prompting
    from edgetune.evaluation.evaluate import evaluate

    data = write_rows(tmp_path / "dev.jsonl", action_rows()[:2])
    assert evaluate(t5, data).rows == 2
    with pytest.raises(EdgetuneError, match=r"not compared by likelihood yet.*--choose"):
        evaluate(t5, data, how=Prompting(choose=True))
