"""Reward adapters in a decoder bundle: scores as in torch, beside adapters that generate, and
nothing mixed up.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CommandLine
from export_helpers import decoder_feed, export, make_adapter, plain_session
from preference_helpers import QUESTIONS, adapted, pair_recipe, pair_rows
from server_helpers import Running, serve
from training_helpers import silent, write_rows

from edgetune.adapters.folder import AdapterMetadata, save_adapter
from edgetune.core.errors import AdapterError, InputError
from edgetune.data.prompts import PromptFormat
from edgetune.evaluation.evaluate import evaluate
from edgetune.evaluation.torch_answers import TorchAnswers
from edgetune.export.proof.prove import reprove
from edgetune.models.resolve import resolve_base
from edgetune.runtime import Runtime
from edgetune.runtime.bundle.manifest import read_manifest
from edgetune.runtime.scheduler.requests import GenerationRequest, SchedulerClosed
from edgetune.runtime.scheduler.scheduler import Scheduler
from edgetune.runtime.tasks.scoring import answered_ids
from edgetune.training import run_recipe

PROMPTS: list[Any] = [
    *QUESTIONS,
    [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "So?"},
    ],
]
ANSWERS = ["Yes, with pleasure, right away.", "No way, you fool", "x", "Yes.", "No, " * 20]


@cache
def reward_run(base: Path) -> Path:
    """A trained reward run with an effect that rounding does not hide."""
    root = base.parent / f"{base.name}-reward"
    root.mkdir()
    out = root / "polite"
    run_recipe(pair_recipe(base, root, "reward", epochs=6), out=out, progress=silent())
    return out


@cache
def plain_reward(base: Path) -> Path:
    """A reward adapter on plain prompts with a system message it never saw, random and strong."""
    folder = base.parent / f"{base.name}-reward" / "plain"
    reward_run(base)
    model = adapted(base, task="reward", noise=0.2, seed=3)
    found = resolve_base(str(base))
    form = PromptFormat(
        template="plain", prompt="{{ prompt }}", chosen="{{ chosen }}", rejected="{{ rejected }}"
    )
    metadata = AdapterMetadata(
        base={"name": found.name, "digest": found.digest},
        task="reward",
        prompt_format=form.to_dict(),
        max_length=64,
    )
    save_adapter(model, folder, metadata)
    return folder


@cache
def bundle(base: Path) -> Path:
    """Two rewards and an adapter that generates on one fp32 decoder."""
    out = base.parent / f"{base.name}-reward-bundle"
    talk = make_adapter(base, base.parent / f"{base.name}-reward-talk" / "talk", seed=5)
    export(out, reward_run(base), plain_reward(base), talk)
    return out


@pytest.fixture(scope="module")
def runtime(tiny_decoder: Path) -> Any:
    with Runtime.open(bundle(tiny_decoder), threads=1) as opened:
        yield opened


def test_rewards_pass_their_proof_beside_an_adapter_that_generates(tiny_decoder: Path) -> None:
    manifest = read_manifest(bundle(tiny_decoder))
    assert [(entry.name, entry.task, entry.labels) for entry in manifest.adapters] == [
        ("polite", "reward", None),
        ("plain", "reward", None),
        ("talk", "text-generation", None),
    ]
    proofs = manifest.proof["adapters"]
    assert manifest.task == "text-generation" and all(proof["passed"] for proof in proofs.values())
    assert proofs["polite"]["max_abs"] < 1e-4 and proofs["polite"]["direction"] > 0.999
    assert proofs["polite"]["positions"] == len(
        manifest.proof["probe"]["polite"]
    )  # one score a row
    task = manifest.proof["task"]["polite"]
    assert (task["metric"], task["same"]) == ("preference_accuracy", 1.0) and task[
        "bundle"
    ] == task["torch"]
    assert all(
        proof.passed
        for found in reprove(bundle(tiny_decoder), manifest, threads=1).values()
        for proof in found.values()
    )


@pytest.mark.parametrize("name", ["polite", "plain"])
def test_scores_are_torchs(tiny_decoder: Path, runtime: Runtime, name: str) -> None:
    folder = reward_run(tiny_decoder) if name == "polite" else plain_reward(tiny_decoder)
    prompts, answers = (PROMPTS, ANSWERS) if name == "polite" else (PROMPTS[:4], ANSWERS[1:])
    expected = TorchAnswers.open(folder).rewards(prompts, answers)
    found = runtime.score(list(zip(prompts, answers, strict=True)), name)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)
    assert np.std(expected) > 1e-2


def test_a_conversation_is_its_prompt_and_its_last_answer(runtime: Runtime) -> None:
    turns = [*PROMPTS[-1], {"role": "assistant", "content": "So it is."}]
    (expected,) = runtime.score([(PROMPTS[-1], "So it is.")], "polite")
    assert runtime.score([turns], "polite") == [expected]
    rendered = (
        runtime.tokenizer.chat_of(turns, add_generation_prompt=False)
        .rstrip("\n")
        .removesuffix("<|im_end|>")
    )
    assert runtime.score([rendered], "polite") != [
        expected
    ]  # as it stands: nothing closes the answer


def test_rows_of_one_batch_have_heads_and_adapters_of_their_own(runtime: Runtime) -> None:
    answers = [*zip(PROMPTS[:4], ANSWERS, strict=False)] * 2
    names = [("polite", "plain")[i % 3 == 0] for i in range(8)]
    mixed = runtime.score(answers, adapters=names)
    alone = [runtime.score([answer], name)[0] for answer, name in zip(answers, names, strict=True)]
    np.testing.assert_allclose(mixed, alone, atol=1e-5)


def test_a_long_answer_is_read_in_pieces_and_cut_at_its_beginning_when_asked(
    tiny_decoder: Path, runtime: Runtime
) -> None:
    long, longer = "Yes, sir, at once. " * 12, "Yes, sir, at once. " * 60
    model = TorchAnswers.open(reward_run(tiny_decoder))
    assert len(runtime.tokenizer.encode(long)) > 128
    found = runtime.score([(QUESTIONS[0], long), (QUESTIONS[0], longer)], "polite", truncate=True)
    np.testing.assert_allclose(found, model.rewards([QUESTIONS[0]] * 2, [long, longer]), atol=1e-5)
    with pytest.raises(InputError, match=r"longer than the context \(expected at most 256 tokens"):
        runtime.score([(QUESTIONS[0], longer)], "polite")


def test_the_base_and_other_adapters_answer_as_they_did(
    tiny_decoder: Path, runtime: Runtime
) -> None:
    text = [
        answer.text
        for answer in runtime.generate(
            list(QUESTIONS), adapters=["talk", None, None, "talk"], max_new_tokens=6
        )
    ]
    alone = [
        runtime.generate([q], name, max_new_tokens=6)[0].text
        for q, name in zip(QUESTIONS, ["talk", None, None, "talk"], strict=True)
    ]
    assert text == alone and text[0] != runtime.generate([QUESTIONS[0]], max_new_tokens=6)[0].text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rt: rt.generate(["a"], "polite"), "'polite' gives scores, not text.*Runtime.score"),
        (lambda rt: rt.stream("a", "polite"), "gives scores, not text"),
        (
            lambda rt: rt.score([("a", "b")], "talk"),
            r"'talk' gives no scores \(expected polite, plain\)",
        ),
        (lambda rt: rt.score([("a", "b")]), "no adapter is chosen"),
        (lambda rt: rt.classify(["a"], "polite"), "nothing to classify into"),
        (
            lambda rt: rt.score([[{"role": "user", "content": "a"}]], "polite"),
            "does not end with an answer",
        ),
        (lambda rt: rt.score([""], "plain"), "nothing to score"),
    ],
)
def test_the_wrong_question_is_refused(runtime: Runtime, call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(runtime)


def test_scores_go_through_the_scheduler_beside_running_streams(runtime: Runtime) -> None:
    long = "Yes, sir, at once. " * 12
    asked = [(q, a) for q in QUESTIONS for a in ("Yes.", "No way.", long)]
    events: list[Any] = []
    with Scheduler(runtime, max_rows=2) as scheduler:
        settings = runtime.settings("talk", max_new_tokens=30)
        ids = runtime.prompt_ids("Hello", "talk")
        scheduler.submit(GenerationRequest(ids, "talk", settings), events.append)
        futures = [
            scheduler.score([pair], ("polite", "plain")[i % 2]) for i, pair in enumerate(asked)
        ]
        together = scheduler.score(asked, "polite")
        dropped = scheduler.score(asked, "plain")
        dropped.cancel()
        found = [future.result(60)[0] for future in futures]
        np.testing.assert_allclose(together.result(60), runtime.score(asked, "polite"), atol=1e-5)
        with pytest.raises(InputError, match="gives scores, not text"):
            scheduler.submit(GenerationRequest(ids, "polite", settings), events.append)
        with pytest.raises(InputError, match="gives no scores"):
            scheduler.score(asked, "talk")
    expected = [
        runtime.score([pair], ("polite", "plain")[i % 2])[0] for i, pair in enumerate(asked)
    ]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert (
        events[-1].completion.text == runtime.generate(["Hello"], "talk", max_new_tokens=30)[0].text
    )
    assert all(status.users == 0 for status in runtime.registry.statuses())


def test_a_small_context_bounds_what_is_scored(runtime: Runtime) -> None:
    with Scheduler(runtime, max_context=64) as scheduler:
        with pytest.raises(InputError, match="at most 64 tokens"):
            scheduler.score([(QUESTIONS[0], "Yes, sir. " * 20)], "polite")
        assert (
            len(
                scheduler.score(
                    [(QUESTIONS[0], "Yes, sir. " * 20)], "polite", truncate=True
                ).result(30)
            )
            == 1
        )


def test_what_a_long_answer_holds_counts_as_cache_until_it_is_read(runtime: Runtime) -> None:
    scheduler = Scheduler(runtime)
    pair = QUESTIONS[0], "Yes, sir, at once. " * 12
    tokens, future = (
        len(answered_ids(runtime.opened, pair, "polite", truncate=False)),
        scheduler.score([pair], "polite"),
    )
    assert scheduler.worker.loop is not None
    scheduler.worker.turn()
    assert (
        not future.done()
        and scheduler.stats().cache_bytes >= tokens * scheduler.worker.loop.batch.arena.token_bytes
    )
    while not future.done():
        scheduler.worker.turn()
    assert scheduler.stats().cache_bytes == 0
    scheduler.close()


def test_a_scheduler_that_closes_answers_who_waits_for_scores(runtime: Runtime) -> None:
    scheduler = Scheduler(runtime)
    future = scheduler.score([("a", "b")], "polite")
    scheduler.close(drain=False)
    with pytest.raises(SchedulerClosed):
        future.result(5)
    assert all(status.users == 0 for status in runtime.registry.statuses())


def test_eval_of_a_bundle_is_that_of_the_run(tiny_decoder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", pair_rows(6))
    run, shipped = (
        evaluate(reward_run(tiny_decoder), data),
        evaluate(bundle(tiny_decoder), data, adapter="polite"),
    )
    assert shipped.task == "reward" and shipped.metrics == pytest.approx(run.metrics)
    assert {"preference_accuracy", "preference_accuracy_low", "length_baseline"} <= set(
        shipped.metrics
    )
    for ours, theirs in zip(shipped.predictions, run.predictions, strict=True):
        assert (ours["chosen"], ours["rejected"]) == pytest.approx(
            (theirs["chosen"], theirs["rejected"]), abs=1e-5
        )


def test_predict_scores_rows_and_generates_others(
    tiny_decoder: Path, tmp_path: Path, runtime: Runtime, command_line: CommandLine
) -> None:
    turns = [
        {"role": "user", "content": QUESTIONS[0]},
        {"role": "assistant", "content": ANSWERS[0]},
    ]
    rows = [
        {"prompt": QUESTIONS[0], "completion": ANSWERS[0], "adapter": "polite"},
        {"prompt": QUESTIONS[1], "adapter": "talk"},
        {"messages": turns, "adapter": "polite"},
        {"text": "Yes.", "adapter": "plain"},
    ]
    source, out = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    assert (
        command_line(
            "predict",
            bundle(tiny_decoder),
            "--input",
            source,
            "--output",
            out,
            "--max-new-tokens",
            4,
        )[0]
        == 0
    )
    answered = [json.loads(line) for line in out.read_text().splitlines()]
    (expected,) = runtime.score([(QUESTIONS[0], ANSWERS[0])], "polite")
    assert (
        answered[0] == {**rows[0], "score": pytest.approx(expected, abs=1e-5)}
        and answered[2]["score"] == answered[0]["score"]
    )
    assert set(answered[1]) - set(rows[1]) == {"completion", "finish_reason"}
    assert answered[3]["score"] == pytest.approx(runtime.score(["Yes."], "plain")[0], abs=1e-5)
    code, shown, _ = command_line("predict", bundle(tiny_decoder), "--adapter", "plain", "Yes.")
    assert code == 0 and float(shown) == pytest.approx(answered[3]["score"], rel=1e-4)
    write_rows(source, [{"prompt": "x"}])
    code, _, error = command_line(
        "predict",
        bundle(tiny_decoder),
        "--adapter",
        "plain",
        "--input",
        source,
        "--output",
        out,
    )
    assert (
        code == 2 and "no answer to score" in error and "line 1" in error and error.count("\n") == 1
    )


def test_a_merged_reward_scores_and_generates_nothing(tiny_decoder: Path, tmp_path: Path) -> None:
    expected = TorchAnswers.open(reward_run(tiny_decoder)).rewards(PROMPTS, ANSWERS)
    manifest = export(tmp_path / "merged", reward_run(tiny_decoder), mode="merged")
    assert manifest.proof["adapters"]["polite"]["passed"] and manifest.adapters[0].task == "reward"
    assert not (tmp_path / "merged" / "genai_config.json").exists()
    assert manifest.graph.native is None  # its graph has the output score
    with Runtime.open(tmp_path / "merged", threads=1) as runtime:
        np.testing.assert_allclose(
            runtime.score(list(zip(PROMPTS, ANSWERS, strict=True))), expected, atol=1e-4
        )
        with pytest.raises(InputError, match="'polite' gives scores, not text"):
            runtime.generate(["a"])


@pytest.mark.parametrize("mode", ["separate", "merged"])
def test_rounded_weights_keep_the_preferences(
    tiny_decoder: Path, tmp_path: Path, mode: str
) -> None:
    export(tmp_path / "int8", reward_run(tiny_decoder), mode=mode, precision="int8")
    data = write_rows(tmp_path / "pairs.jsonl", pair_rows(6))
    assert (
        evaluate(tmp_path / "int8", data).metrics["preference_accuracy"]
        == evaluate(reward_run(tiny_decoder), data).metrics["preference_accuracy"]
    )


def test_plain_onnx_runtime_scores_with_its_own_adapter_format(
    tiny_decoder: Path, runtime: Runtime
) -> None:
    import onnxruntime as ort

    folder, manifest = bundle(tiny_decoder), runtime.manifest
    session = plain_session(folder)
    answers = [(QUESTIONS[0], ANSWERS[0])]
    ids = np.array([answered_ids(runtime.opened, answers[0], "polite", truncate=False)])
    feed = decoder_feed(manifest, ids, np.ones_like(ids))
    assert session.run(["score"], feed)[0].shape == (1, 0)  # no adapter, no score
    adapter, options = ort.LoraAdapter(), ort.RunOptions()
    adapter.Load(str(folder / (manifest.adapters[0].onnx_adapter or "")))
    options.add_active_adapter(adapter)
    np.testing.assert_allclose(
        session.run(["score"], feed, options)[0][:, 0], runtime.score(answers, "polite"), atol=1e-5
    )


def test_a_reward_of_another_tool_scores_as_there(
    tiny_decoder: Path, tmp_path: Path, runtime: Runtime
) -> None:
    """PEFT's SEQ_CLS adapter on a decoder, as TRL's RewardTrainer leaves it: no
    edgetune_adapter.json.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    body = AutoModelForSequenceClassification.from_pretrained(tiny_decoder, num_labels=1)
    model = get_peft_model(
        body,
        LoraConfig(
            task_type="SEQ_CLS", r=4, target_modules="all-linear", modules_to_save=["score"]
        ),
    ).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "foreign")
    text = "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nYes."
    with torch.no_grad():
        expected = (
            model(torch.tensor([runtime.tokenizer.encode(text, add_special_tokens=False)]))
            .logits[0, 0]
            .item()
        )
    packed = runtime.load_adapter("foreign", tmp_path / "foreign")
    try:
        assert packed.task == "reward" and "it gives a score" in packed.notes[1]
        assert runtime.score([text], "foreign")[0] == pytest.approx(expected, abs=1e-5)
    finally:
        runtime.unload_adapter("foreign")


def test_a_reward_without_its_score_is_refused(
    tiny_decoder: Path, tmp_path: Path, runtime: Runtime
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    folder.mkdir()
    tensors = load_file(plain_reward(tiny_decoder) / "adapter_model.safetensors")
    config = (plain_reward(tiny_decoder) / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(config)
    key = "base_model.model.score.weight"
    for change, problem in (
        ({key: torch.zeros(1, 32)}, r"score\.weight: expected \(1, 64\), got \(1, 32\)"),
        ({}, r"score\.weight: missing"),
    ):
        save_file(
            {**{name: tensor for name, tensor in tensors.items() if name != key}, **change},
            folder / "adapter_model.safetensors",
        )
        with pytest.raises(AdapterError, match=problem):
            runtime.load_adapter("broken", folder)


@pytest.fixture(scope="module")
def server(tiny_decoder: Path) -> Iterator[Running]:
    with serve(bundle(tiny_decoder)) as running:
        yield running


def test_the_server_scores_pairs_conversations_and_texts(server: Running) -> None:
    pairs = [(QUESTIONS[0], ANSWERS[0]), (QUESTIONS[0], ANSWERS[1])]
    expected = server.runtime.score(pairs, "polite")
    answer = server.post(
        "/score", {"model": "polite", "text_1": QUESTIONS[0], "text_2": ANSWERS[:2]}
    ).json()
    assert [(row["index"], row["object"]) for row in answer["data"]] == [(0, "score"), (1, "score")]
    np.testing.assert_allclose([row["score"] for row in answer["data"]], expected, atol=1e-5)
    assert answer["usage"]["prompt_tokens"] == sum(
        len(answered_ids(server.runtime.opened, pair, "polite", truncate=False)) for pair in pairs
    )
    turns = [
        {"role": "user", "content": QUESTIONS[0]},
        {"role": "assistant", "content": ANSWERS[0]},
    ]
    (row,) = server.post("/pooling", {"model": "polite", "messages": turns}).json()["data"]
    assert (row["object"], row["data"]) == ("pooling", [pytest.approx(expected[0], abs=1e-5)])
    rows = server.post("/pooling", {"model": "plain", "input": ["Yes.", "No."]}).json()["data"]
    np.testing.assert_allclose(
        [row["data"][0] for row in rows], server.runtime.score(["Yes.", "No."], "plain"), atol=1e-5
    )
    cards = {card["id"]: card["task"] for card in server.get("/v1/models").json()["data"]}
    assert cards["polite"] == "reward" and cards["talk"] == "text-generation"


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("/score", {"model": "talk", "text_1": "a", "text_2": "b"}, "no_scores"),
        ("/score", {"model": "tiny", "text_1": "a", "text_2": "b"}, "no_scores"),
        ("/score", {"model": "polite", "text_1": ["a", "b"], "text_2": "c"}, "invalid_value"),
        (
            "/score",
            {"model": "polite", "text_1": ["a", "b"], "text_2": ["c", "d", "e"]},
            "invalid_value",
        ),
        (
            "/score",
            {"model": "polite", "text_1": "a", "text_2": "Yes, sir. " * 100},
            "context_length_exceeded",
        ),
        ("/pooling", {"model": "polite"}, "invalid_value"),
        (
            "/pooling",
            {"model": "polite", "messages": [{"role": "user", "content": "a"}]},
            "invalid_value",
        ),
        (
            "/v1/chat/completions",
            {"model": "polite", "messages": [{"role": "user", "content": "a"}]},
            "wrong_task",
        ),
        ("/v1/completions", {"model": "polite", "prompt": "a"}, "wrong_task"),
    ],
)
def test_the_server_refuses_what_does_not_fit(
    path: str, body: dict[str, object], code: str, server: Running
) -> None:
    answer = server.post(path, body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)


def test_one_prompt_of_many_answers_is_tokenised_once(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, calls = server.runtime.tokenizer, []
    for name in ("encode_prompt", "chat_of"):
        plain = getattr(tokenizer, name)
        monkeypatch.setattr(
            tokenizer,
            name,
            lambda *a, plain=plain, name=name, **b: calls.append(name) or plain(*a, **b),
        )
    expected = server.runtime.score([(QUESTIONS[0], answer) for answer in ANSWERS], "polite")
    calls.clear()
    answer = server.post(
        "/score", {"model": "polite", "text_1": [QUESTIONS[0]], "text_2": ANSWERS}
    ).json()
    np.testing.assert_allclose([row["score"] for row in answer["data"]], expected, atol=1e-5)
    once = list(calls)
    server.post("/score", {"model": "polite", "text_1": QUESTIONS[0], "text_2": ANSWERS[0]})
    assert once.count("encode_prompt") == 1 and calls == once * 2  # as much as for one answer


def test_a_request_for_scores_is_bounded_and_says_what_is_too_long(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"model": "polite", "text_1": QUESTIONS[0], "text_2": ANSWERS}
    monkeypatch.setattr("edgetune.runtime.server.endpoints.encode.SCORE_REQUEST_TOKENS", 60)
    error = server.post("/score", body).json()["error"]
    assert "expected at most 60 in all" in error["message"] and error["param"] == "text_2"
    monkeypatch.undo()
    monkeypatch.setattr(
        server.service, "options", replace(server.service.options, max_prompt_tokens=20)
    )
    turns = [
        {"role": "user", "content": QUESTIONS[0]},
        {"role": "assistant", "content": ANSWERS[0]},
    ]
    whole = server.runtime.score([turns], "polite")[0]
    for path, asked, param in (
        ("/score", body, "text_2"),
        ("/pooling", {"messages": turns}, "messages"),
        ("/pooling", {"input": "Yes, " * 20}, "input"),
    ):
        answer = server.post(path, {"model": "polite", **asked})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (
            400,
            "context_length_exceeded",
            param,
        )
        assert "at most 20 tokens" in error["message"]
    cut = server.post(
        "/pooling", {"model": "polite", "messages": turns, "truncate_prompt_tokens": -1}
    ).json()
    assert cut["usage"]["prompt_tokens"] == 20 and cut["data"][0]["data"] != [
        pytest.approx(whole, abs=1e-5)
    ]


def test_models_tell_the_context_that_the_server_has(tiny_decoder: Path) -> None:
    with serve(bundle(tiny_decoder), scheduler={"max_context": 64}) as small:
        assert {card["max_model_len"] for card in small.get("/v1/models").json()["data"]} == {64}
