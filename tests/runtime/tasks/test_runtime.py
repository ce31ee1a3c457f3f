"""A bundle opened for answers: adapters load, swap and leave; what is wrong is said; nothing needs
torch.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from runtime_helpers import decoder_bundle, encoder_bundle, merged_bundle, peft_adapter

from edgetune.core.errors import AdapterError, BundleError, InputError
from edgetune.runtime import Runtime

TEXTS = ["Turn on the lights!", "My card has not arrived yet.", "hello"]


@pytest.fixture
def runtime(tiny_decoder: Path) -> Runtime:
    return Runtime.open(decoder_bundle(tiny_decoder), threads=2)


@pytest.fixture
def classifier(tiny_encoder: Path) -> Runtime:
    return Runtime.open(encoder_bundle(tiny_encoder), threads=2)


def test_one_batch_serves_mixed_adapters_as_each_alone(runtime: Runtime) -> None:
    names = ["a", "b", None]
    together = runtime.generate(TEXTS, adapters=names, max_new_tokens=8)
    alone = [
        runtime.generate([text], name, max_new_tokens=8)[0]
        for text, name in zip(TEXTS, names, strict=True)
    ]
    assert [c.text for c in together] == [c.text for c in alone]
    assert len({c.text for c in together}) == 3


def test_a_long_list_is_answered_in_batches_and_in_order(
    runtime: Runtime, classifier: Runtime
) -> None:
    prompts = [f"{'very ' * (i % 5)}long {i}" for i in range(37)]
    together = runtime.generate(prompts, "a", max_new_tokens=3)
    assert together[30].text == runtime.generate([prompts[30]], "a", max_new_tokens=3)[0].text
    assert [c.prompt_tokens for c in together] == [len(runtime.prompt_ids(p, "a")) for p in prompts]
    labels = [found.label for found in classifier.classify(prompts, "intent")]
    assert labels == [classifier.classify([prompt], "intent")[0].label for prompt in prompts]


def test_a_stream_is_the_generated_text_in_pieces(runtime: Runtime) -> None:
    stream = runtime.stream(TEXTS[0], "a", max_new_tokens=12)
    pieces = list(stream)
    expected = runtime.generate([TEXTS[0]], "a", max_new_tokens=12)[0]
    assert "".join(pieces) == expected.text
    assert stream.completion is not None
    assert (stream.completion.finish_reason, stream.completion.completion_tokens) == ("length", 12)


def test_an_adapters_own_settings_and_prompt_format_are_used(runtime: Runtime) -> None:
    assert runtime.generate(["x"], "a")[0].completion_tokens <= 9
    assert runtime.prompt_ids("x", "a") == runtime.tokenizer.encode("x")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}]
    assert runtime.prompt_ids("x", "b") == runtime.tokenizer.encode_chat(messages)
    assert runtime.prompt_ids([messages[1]], "b") == runtime.tokenizer.encode_chat(messages)


def test_samples_repeat_with_the_same_seed(runtime: Runtime) -> None:
    def draw(seed: int) -> str:
        return runtime.generate(["x"], "a", temperature=1.0, seed=seed)[0].text

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_a_stop_text_ends_the_answer_before_it(runtime: Runtime) -> None:
    whole = runtime.generate(["x"], None, max_new_tokens=12)[0].text
    stop = next(c for c in whole[1:] if c != "\ufffd")
    done = runtime.generate(["x"], None, max_new_tokens=12, stop=stop)[0]
    assert (done.text, done.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_a_peft_folder_loads_hot_and_its_notes_say_it_is_foreign(
    runtime: Runtime, tiny_decoder: Path, tmp_path: Path
) -> None:
    before = runtime.generate(["x"], max_new_tokens=6)[0].text
    peft_adapter(tiny_decoder, tmp_path / "new", seed=9)
    packed = runtime.load_adapter("new", tmp_path / "new")
    assert "could not be checked" in packed.notes[0]
    assert runtime.adapters == ("a", "b", "new")
    assert runtime.generate(["x"], "new", max_new_tokens=6)[0].text != before
    assert runtime.generate(["x"], max_new_tokens=6)[0].text == before


def test_unloading_lets_a_running_text_finish(runtime: Runtime) -> None:
    expected = runtime.generate(["x"], "a", max_new_tokens=8)[0].text
    stream = runtime.stream("x", "a", max_new_tokens=8)
    pieces = iter(stream)
    first = next(pieces)
    runtime.unload_adapter("a")
    assert first + "".join(pieces) == expected
    assert runtime.adapters == ("b",)


def test_an_unknown_adapter_is_answered_with_those_there_are(runtime: Runtime) -> None:
    for call in (
        runtime.unload_adapter,
        runtime.adapter,
        lambda name: runtime.generate(["x"], name),
    ):
        with pytest.raises(AdapterError, match=r"unknown adapter 'zz' \(expected a, b, got zz\)"):
            call("zz")


def test_a_taken_name_is_refused(runtime: Runtime, tiny_decoder: Path, tmp_path: Path) -> None:
    peft_adapter(tiny_decoder, tmp_path)
    with pytest.raises(AdapterError, match="the name 'a' is taken"):
        runtime.load_adapter("a", tmp_path)


def test_a_prompt_longer_than_the_context_names_tokens_and_limit(runtime: Runtime) -> None:
    with pytest.raises(
        InputError,
        match=r"longer than the context \(expected at most 255 tokens.*, got 300 tokens\)",
    ):
        runtime.generate(["~" * 300], "a")


def test_generation_stops_where_the_context_ends(runtime: Runtime) -> None:
    done = runtime.generate(["~" * 250], "a", max_new_tokens=50)[0]
    assert done.completion_tokens <= 6


def test_each_text_is_classified_by_its_own_adapter(classifier: Runtime) -> None:
    mixed = classifier.classify(TEXTS, adapters=["intent", "mood", "intent"])
    alone = [
        classifier.classify([text], name)[0]
        for text, name in zip(TEXTS, ["intent", "mood", "intent"], strict=True)
    ]
    assert [c.label for c in mixed] == [c.label for c in alone]
    assert set(mixed[0].scores) == {"lights", "card", "other"}
    assert set(mixed[1].scores) == {"calm", "upset"}
    assert mixed[0].score == max(mixed[0].scores.values())
    assert sum(mixed[0].scores.values()) == pytest.approx(1, abs=1e-5)


def test_embeddings_have_length_one_and_change_with_the_adapter(classifier: Runtime) -> None:
    base, adapted = classifier.embed(TEXTS), classifier.embed(TEXTS, "intent")
    np.testing.assert_allclose(np.linalg.norm(base, axis=1), 1, rtol=1e-5)
    assert np.abs(base - adapted).max() > 1e-3


def test_long_texts_are_truncated_only_when_asked(classifier: Runtime) -> None:
    text = "card " * 200
    with pytest.raises(
        InputError, match=r"longer than the model's positions \(expected at most 128 tokens"
    ):
        classifier.classify([text], "intent")
    assert classifier.classify([text], "intent", truncate=True)
    assert len(classifier.text_ids(text, "intent", truncate=True)) == 16


def test_classifying_without_an_adapter_names_the_choices(classifier: Runtime) -> None:
    with pytest.raises(InputError, match=r"no adapter is chosen.*\(expected intent, mood\)"):
        classifier.classify(TEXTS)


def test_a_bundle_does_only_its_own_task(runtime: Runtime, classifier: Runtime) -> None:
    with pytest.raises(InputError, match="does sequence-classification"):
        classifier.generate(["x"])
    with pytest.raises(InputError, match="does text-generation"):
        runtime.embed(["x"])


def test_a_merged_bundle_answers_as_the_adapter_it_holds(
    runtime: Runtime, tiny_decoder: Path, tmp_path: Path
) -> None:
    merged = Runtime.open(merged_bundle(tiny_decoder), threads=2)
    expected = runtime.generate(TEXTS, "a", max_new_tokens=4)
    assert merged.adapters == ("a",)
    for got in (
        merged.generate(TEXTS, max_new_tokens=4),
        merged.generate(TEXTS, "a", max_new_tokens=4),
    ):
        assert [c.text for c in got] == [c.text for c in expected]
    with pytest.raises(AdapterError, match="merged into its weights"):
        merged.load_adapter("new", tmp_path)


@pytest.mark.parametrize(
    "file", ["model.onnx.data", "tokenizer.json", "adapters/a/adapter_model.safetensors"]
)
def test_a_flipped_byte_anywhere_is_found_at_open(
    file: str, tiny_decoder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(decoder_bundle(tiny_decoder), folder)
    content = bytearray((folder / file).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / file).write_bytes(content)
    with pytest.raises(BundleError, match=f"not as exported: {file}: expected sha256"):
        Runtime.open(folder)


def test_weights_of_another_size_are_found_before_the_engine_reads_them(
    tiny_decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(decoder_bundle(tiny_decoder), folder)
    (folder / "model.onnx.data").write_bytes((folder / "model.onnx.data").read_bytes()[:-1])
    monkeypatch.setattr("edgetune.runtime.engine.session.open_session", None)
    with pytest.raises(
        BundleError, match=r"not as exported: model\.onnx\.data: expected \d+ bytes"
    ):
        Runtime.open(folder)


def test_a_closed_runtime_says_so(runtime: Runtime) -> None:
    with runtime:
        pass
    with pytest.raises(InputError, match="closed"):
        runtime.generate(["x"])
