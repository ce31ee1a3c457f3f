"""Encoder-decoders of the T5 family, tiny and random: the bundle answers as torch, however a batch
is made up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from export_helpers import export, make_adapter, op_counts
from seq2seq_helpers import FAMILIES, TYPES, make_seq2seq, prompts

from edgetune.adapters.folder import load_adapter
from edgetune.core.errors import EdgetuneError, ExportError, InputError
from edgetune.export.graph.adapter_branch import adapted_graph
from edgetune.export.graph.families import SEQ2SEQ
from edgetune.export.graph.seq2seq import ENCODER
from edgetune.models.load import load_body
from edgetune.models.resolve import resolve_base
from edgetune.runtime import Runtime
from edgetune.runtime.adapters.packing import pack_adapter
from edgetune.runtime.bundle.manifest import Manifest, manifest_from_dict, read_manifest
from edgetune.runtime.engine.seq2seq import Seq2SeqEngine

LENGTHS = (3, 29, 14)  # tokens of prompts; distances are told apart up to 12
ANSWERS = (9, 24, 1)  # tokens of given answers
START, STEPS = 0, 5
COPIES = {"mt5"}  # transformers' code is T5's, copied


def some(names: Any, *, slow: set[str] = COPIES) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in slow else []) for name in names]


@dataclass
class Exported:
    """A bundle, its engine opened, and the same adapter in torch."""

    manifest: Manifest
    folder: Path
    base: Path
    engine: Seq2SeqEngine
    tensors: Any
    model: Any

    def torch_logits(
        self, prompt: list[int], answer: list[int], *, adapter: bool = True
    ) -> np.ndarray:
        """Logits (len + 1, vocab) of the answer's tokens and of the one after."""
        with torch.no_grad(), self.model.disable_adapter() if not adapter else torch.no_grad():
            given = torch.tensor([[START, *answer]])
            return (
                self.model(
                    input_ids=torch.tensor([prompt]), decoder_input_ids=given, use_cache=False
                )
                .logits[0]
                .numpy()
            )


@pytest.fixture(scope="module", params=some(FAMILIES, slow={*COPIES, "umt5"}))
def family(request: Any, tmp_path_factory: Any) -> Iterator[Exported]:
    folder = tmp_path_factory.mktemp("seq2seq")
    base = make_seq2seq(request.param, folder / "base")
    adapter = make_adapter(base, folder / "a", strength=0.2)
    manifest = export(folder / "bundle", adapter)
    engine = Seq2SeqEngine(folder / "bundle", manifest, threads=1)
    model = load_adapter(load_body(resolve_base(str(base))), adapter)
    yield Exported(
        manifest, folder / "bundle", base, engine, pack_adapter(adapter, manifest).tensors, model
    )


def answers(vocabulary: int) -> list[list[int]]:
    numbers = np.random.default_rng(1)
    return [numbers.integers(3, vocabulary, length).tolist() for length in ANSWERS]


def test_padded_prompts_with_and_without_adapter_are_answered_token_by_token(
    family: Exported,
) -> None:
    texts, given = (
        prompts(family.manifest.graph.vocab_size, LENGTHS),
        answers(family.manifest.graph.vocab_size),
    )
    adapters = [family.tensors, None, family.tensors]
    expected = [
        family.torch_logits(*pair, adapter=tensors is not None)
        for *pair, tensors in zip(texts, given, adapters, strict=True)
    ]
    state, logits = family.engine.start(texts, adapters)
    live = [0, 1, 2]
    for step in range(max(ANSWERS) + 1):
        for place, row in enumerate(live):
            assert np.abs(logits[place] - expected[row][step]).max() < 1e-3, (row, step)
        going = [row for row in live if step < len(given[row])]
        if not going:
            break
        state.keep([live.index(row) for row in going])
        live = going
        logits = state.step([given[row][step] for row in live])


def test_given_answers_go_through_the_decoder_at_once_and_then_on_through_the_cache(
    family: Exported,
) -> None:
    vocabulary = family.manifest.graph.vocab_size
    texts, given = prompts(vocabulary, LENGTHS), answers(vocabulary)
    adapters = [None, family.tensors, family.tensors]
    state, found = family.engine.answer_logits(texts, given, adapters)
    for i in range(3):
        assert (
            np.abs(found[i] - family.torch_logits(texts[i], given[i], adapter=i > 0)).max() < 1e-3
        )
    for step in range(STEPS):  # rows stand at different places now
        given = [[*answer, 7 + step] for answer in given]
        logits = state.step([answer[-1] for answer in given])
        for i in range(3):
            assert (
                np.abs(logits[i] - family.torch_logits(texts[i], given[i], adapter=i > 0)[-1]).max()
                < 1e-3
            )


def test_rows_that_are_repeated_go_on_as_the_first(family: Exported) -> None:
    texts = prompts(family.manifest.graph.vocab_size, LENGTHS[:2])
    state, _ = family.engine.start(texts, [family.tensors, None])
    logits = state.repeat(2).step([5, 6, 5, 6])
    for place, (row, token) in enumerate([(0, 5), (0, 6), (1, 5), (1, 6)]):
        assert (
            np.abs(
                logits[place] - family.torch_logits(texts[row], [token], adapter=row == 0)[-1]
            ).max()
            < 1e-3
        )


def test_the_proof_passes_and_attention_is_one_node_a_layer(family: Exported) -> None:
    proof = family.manifest.proof["adapters"]["a"]
    decoder = op_counts(family.folder)
    encoder = [
        node.op_type
        for node in adapted_graph(
            onnx.load(str(family.folder / ENCODER), load_external_data=False)
        ).node
    ]
    assert proof["passed"] and proof["max_abs"] <= 1e-3
    assert (
        decoder["GroupQueryAttention"] == 3
        and decoder["MultiHeadAttention"] == 3
        and encoder.count("MultiHeadAttention") == 2
    )
    assert not {"Softmax", "Pow", "Log", "Sqrt"} & {*encoder, *decoder}


def test_a_mixed_batch_is_answered_as_transformers_generates(family: Exported) -> None:
    texts = ["Turn on the lights", "The quick brown fox jumps over the lazy dog.", "My card"]
    with Runtime.open(family.folder, threads=1) as runtime:
        got = runtime.generate(texts, adapters=["a", None, "a"], max_new_tokens=12)
        ids = [runtime.tokenizer.encode(text) for text in texts]
    for row, completion, adapter in zip(ids, got, (True, False, True), strict=True):
        assert list(completion.token_ids) == greedy(
            family, row, len(completion.token_ids), adapter=adapter
        )


def greedy(family: Exported, prompt: list[int], count: int, *, adapter: bool) -> list[int]:
    written: list[int] = []
    while len(written) < count:
        written.append(int(family.torch_logits(prompt, written, adapter=adapter)[-1].argmax()))
    return written


# what flan-t5 has, umt5 has too: gated layers, an output projection of its own
@pytest.mark.parametrize("name", some(FAMILIES, slow={*COPIES, "flan-t5", "umt5"}))
def test_merged_into_the_weights_it_answers_as_torch(name: str, tmp_path: Path) -> None:
    adapter = make_adapter(make_seq2seq(name, tmp_path / "base"), tmp_path / "a", strength=0.1)
    manifest = export(tmp_path / "bundle", adapter, mode="merged")
    assert manifest.sites == () and manifest.proof["adapters"]["a"]["max_abs"] <= 1e-3
    with Runtime.open(tmp_path / "bundle", threads=1) as runtime:
        assert runtime.generate(["Turn on the lights"], max_new_tokens=3)[0].completion_tokens <= 3


def test_the_tests_cover_exactly_what_is_supported() -> None:
    assert {TYPES.get(name, name) for name in FAMILIES} == SEQ2SEQ.keys()


@dataclass
class Tiny:
    """One family's base, an adapter, and an int8 bundle of it."""

    base: Path
    adapter: Path
    bundle: Path
    manifest: Manifest


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: Any) -> Tiny:
    folder = tmp_path_factory.mktemp("seq2seq-int8")
    base = make_seq2seq("t5", folder / "base")
    adapter = make_adapter(base, folder / "a", strength=0.1)
    return Tiny(
        base, adapter, folder / "bundle", export(folder / "bundle", adapter, precision="int8")
    )


def test_a_base_alone_is_a_bundle_that_takes_adapters(tiny: Tiny, tmp_path: Path) -> None:
    from edgetune.export.bundle import export_bundle

    manifest = export_bundle([], tmp_path / "base", base_name=str(tiny.base), threads=1)
    assert manifest.adapters == () and manifest.proof["adapters"]["(base)"]["max_abs"] <= 1e-3
    with Runtime.open(tmp_path / "base", threads=1) as runtime:
        runtime.load_adapter("mine", tiny.adapter)
        plain, adapted = (
            runtime.generate(["Turn on the lights"], adapter=name, max_new_tokens=8)[0].token_ids
            for name in (None, "mine")
        )
    assert plain != adapted


def test_the_weights_of_both_graphs_are_stored_once(tiny: Tiny, tmp_path: Path) -> None:
    manifest = export(tmp_path / "fp32", tiny.adapter)
    assert (
        manifest.files["model.onnx.data"].bytes < 4 * manifest.base.parameters * 1.05 + 4096 * 60
    )  # each begins at a page
    assert {info.graph for info in manifest.sites} == {None, ENCODER}
    assert "standard" not in manifest.files and {"engine.onnx", ENCODER} < manifest.files.keys()


def test_int8_holds_and_its_tied_embedding_is_the_output_projection(tiny: Tiny) -> None:
    model = onnx.load(str(tiny.bundle / "engine.onnx"), load_external_data=False)
    projection = [node for node in adapted_graph(model).node if node.op_type == "MatMulNBits"][
        -1
    ].input[1]
    places = {
        one.name: {entry.key: entry.value for entry in one.external_data}
        for one in model.graph.initializer
    }
    assert tiny.manifest.proof["adapters"]["a"]["passed"]
    assert places["shared.weight"]["offset"] == places[projection]["offset"]


def test_sampling_repeats_with_its_seed_and_several_answers_differ(tiny: Tiny) -> None:
    with Runtime.open(tiny.bundle, threads=1) as runtime:
        first, second = (
            [
                one.token_ids
                for one in runtime.generate(
                    ["Turn on"], adapter="a", n=3, temperature=2.0, seed=4, max_new_tokens=8
                )
            ]
            for _ in range(2)
        )
        streamed = "".join(runtime.stream("Turn on", adapter="a", max_new_tokens=8))
        whole = runtime.generate(["Turn on"], adapter="a", max_new_tokens=8)[0].text
    assert first == second and len(set(first)) > 1 and streamed == whole


def test_a_long_prompt_leaves_room_for_an_answer_and_a_longer_one_is_refused(tiny: Tiny) -> None:
    with Runtime.open(tiny.bundle, threads=1) as runtime:
        limit = runtime.manifest.graph.max_length
        answer = runtime.generate(["a " * (limit - 3)], max_new_tokens=6)[0]
        assert answer.prompt_tokens > 0.9 * limit and answer.completion_tokens > 1
        with pytest.raises(InputError, match=f"longer than the context.*at most {limit - 1}"):
            runtime.generate(["a " * limit])


def test_an_adapter_of_peft_alone_loads_hot(tiny: Tiny, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=2, target_modules="all-linear", init_lora_weights=False
    )
    model = get_peft_model(load_body(resolve_base(str(tiny.base))), config).eval()
    model.save_pretrained(tmp_path / "other")
    manifest = export(tmp_path / "fp32", tiny.adapter)
    with Runtime.open(tmp_path / "fp32", threads=1) as runtime:
        notes = runtime.load_adapter("other", tmp_path / "other").notes
        ids = runtime.tokenizer.encode("My card")
        engine: Any = runtime.decoder
        _, (logits,) = engine.answer_logits([ids], [[5, 6]], [runtime.bound("other")])
    with torch.no_grad():
        expected = (
            model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([[START, 5, 6]]))
            .logits[0]
            .numpy()
        )
    assert (
        np.abs(logits - expected).max() < 1e-3
        and "could not be checked" in notes[0]
        and manifest.graph.encoder == ENCODER
    )


def test_a_manifest_from_before_encoder_decoders_still_opens(tiny: Tiny) -> None:
    written = read_manifest(tiny.bundle)
    document = written.to_dict()
    assert manifest_from_dict(document) == written
    for name in ("encoder", "start_token_id"):
        del document["graph"][name]
    for site in document["sites"]:
        site.pop("graph", None)
    read = manifest_from_dict(document)
    assert read.to_dict() == document
    assert read.graph.encoder is None and all(site.graph is None for site in read.sites)


def test_an_encoder_outside_the_bundle_is_refused(tiny: Tiny) -> None:
    document = tiny.manifest.to_dict()
    document["graph"]["encoder"] = "../encoder.onnx"
    with pytest.raises(EdgetuneError, match="leaves the bundle"):
        manifest_from_dict(document)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp16"}, "overflow in fp16"),
        ({"precision": "int4", "quantiser": "gptq"}, "gptq does not read prompts"),
    ],
)
def test_what_an_export_cannot_do_is_said_before_it_begins(
    options: Any, message: str, tiny: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        export(tmp_path / "out", tiny.adapter, **options)
    assert not (tmp_path / "out").exists()


def test_what_is_not_there_is_refused_in_a_line(tiny: Tiny) -> None:
    from edgetune.evaluation.forgetting.subjects import BundleSubject
    from edgetune.runtime.scheduler.scheduler import Scheduler

    with Runtime.open(tiny.bundle, threads=1) as runtime:
        with pytest.raises(InputError, match="guesses no tokens"):
            Scheduler(runtime, lookup=4)
        with pytest.raises(InputError, match="answers of this tokenizer cannot be held to a form"):
            runtime.generate(["a"], adapter="a", regex="[a-z]+")
        with pytest.raises(InputError, match="does not go on with a text"):
            BundleSubject(runtime, "a")
        with pytest.raises(InputError, match="does not predict its prompt"):
            runtime.decoder.logits([[5, 6]])  # type: ignore[union-attr]
        with pytest.raises(InputError, match="does text-generation, nothing else"):
            runtime.embed(["a"])
        with pytest.raises(InputError, match="gives no scores"):
            runtime.score(["a"], adapter="a")


def test_an_adapter_goes_into_no_gguf_file(tiny: Tiny, tmp_path: Path) -> None:
    from edgetune.export.gguf import export_gguf_adapters

    with pytest.raises(ExportError, match="t5"):
        export_gguf_adapters([("a", tiny.adapter)], tmp_path / "a.gguf")
