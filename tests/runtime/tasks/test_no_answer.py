"""What is no answer is an error that names its cause, and reaches nobody but its caller: results
that are not finite, tokens that the model does not know.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runtime_helpers import Listener, alone, decoder_bundle, encoder_bundle, request
from safetensors.numpy import load_file, save_file

from edgetune.core.errors import AdapterError, InputError
from edgetune.core.files import sha256_file
from edgetune.runtime import Runtime
from edgetune.runtime.adapters.packing import PackedAdapter
from edgetune.runtime.scheduler.scheduler import Scheduler
from edgetune.runtime.tasks.answers import classification_of

NOT_FINITE = "what the adapter 'x' computed is not finite"


def overflowing(bundle: Path, name: str, folder: Path) -> Path:
    """A shipped adapter whose weights are finite and whose products are not."""
    shutil.copytree(bundle / "adapters" / name, folder)
    path = folder / "adapter_model.safetensors"
    save_file({k: np.full_like(v, 1e30) for k, v in load_file(path).items()}, path)
    metadata = json.loads((folder / "edgetune_adapter.json").read_text())
    metadata["files"][path.name] = sha256_file(path)
    (folder / "edgetune_adapter.json").write_text(json.dumps(metadata))
    return folder


@pytest.fixture(scope="module")
def classifier(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    bundle = encoder_bundle(tiny_encoder)
    with Runtime.open(bundle, threads=1) as runtime:
        folder = tmp_path_factory.mktemp("nan") / "x"
        runtime.load_adapter("x", overflowing(bundle, "intent", folder))
        yield runtime


@pytest.fixture(scope="module")
def generator(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    bundle = decoder_bundle(tiny_decoder)
    with Runtime.open(bundle, threads=1) as runtime:
        folder = tmp_path_factory.mktemp("nan") / "x"
        runtime.load_adapter("x", overflowing(bundle, "a", folder))
        yield runtime


@pytest.mark.parametrize(
    ("problem", "gives"), [("multi-label", "several labels"), ("regression", "a number")]
)
def test_a_threshold_of_what_is_not_one_label_is_refused(problem: str, gives: str) -> None:
    adapter = PackedAdapter("x", {}, ("one",), 1, "", {"problem": problem})
    logits = np.zeros(1, np.float32)
    assert classification_of(logits, adapter).score in (0.0, 0.5)
    with pytest.raises(InputError, match=f"'x' gives {gives}, which no threshold rejects"):
        classification_of(logits, adapter, 0.3)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan"), True, "0.5"])
def test_a_threshold_that_is_no_probability_is_refused(threshold: Any, classifier: Runtime) -> None:
    with pytest.raises(InputError, match="threshold is out of range"):
        classifier.classify(["hello"], "intent", threshold=threshold)


def test_a_classification_that_is_not_finite_is_an_error(classifier: Runtime) -> None:
    with pytest.raises(AdapterError, match=NOT_FINITE):
        classifier.classify(["hello"], "x")
    with pytest.raises(AdapterError, match=NOT_FINITE):
        classifier.embed(["hello"], "x")


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 1}, {"logprobs": 2}])
def test_a_text_that_is_not_finite_is_an_error(
    generator: Runtime, settings: dict[str, float]
) -> None:
    with pytest.raises(AdapterError, match=NOT_FINITE):
        generator.generate(["lights on"], "x", max_new_tokens=8, **settings)
    with pytest.raises(AdapterError, match=NOT_FINITE):
        list(generator.stream("lights on", "x", max_new_tokens=8))


def test_it_is_its_callers_error_alone_in_a_batch_of_texts(classifier: Runtime) -> None:
    by_itself = classifier.classify(["hello"], "intent")
    scheduler = Scheduler(classifier)
    bad, good = scheduler.classify(["hello"], "x"), scheduler.classify(["hello"], "intent")
    vectors = scheduler.embed(["hello"], "x")
    with scheduler:
        assert good.result(60)[0].label == by_itself[0].label
        for future in (bad, vectors):
            with pytest.raises(AdapterError, match=NOT_FINITE):
                future.result(60)


def test_it_is_its_callers_error_alone_among_rows_and_in_the_memory_they_leave(
    generator: Runtime,
) -> None:
    ids = generator.tokenizer.encode("lights on")
    wanted = {name: alone(generator, ids, name, 6) for name in (None, "a", "b")}
    with Scheduler(generator, max_rows=2) as scheduler:
        for _ in range(3):
            listeners = {name: Listener() for name in ("x", *wanted)}
            for name, listener in listeners.items():
                scheduler.submit(request(generator, ids, name, max_new_tokens=6), listener)
            with pytest.raises(AdapterError, match=NOT_FINITE):
                listeners["x"].done()
            found = {name: list(listeners[name].done().token_ids) for name in wanted}
            assert found == wanted


@pytest.fixture(scope="module")
def with_a_token_too_many(
    tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runtime]:
    """A bundle whose tokenizer got a token while the model was never resized."""
    folder = tmp_path_factory.mktemp("grown") / "bundle"
    shutil.copytree(encoder_bundle(tiny_encoder), folder)
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    token = {**document["added_tokens"][0], "id": 320, "content": "<think>", "special": False}
    document["added_tokens"].append(token)
    path.write_text(json.dumps(document))
    with Runtime.open(folder, threads=1, verify=False) as runtime:
        yield runtime


def test_a_token_that_the_model_does_not_know_is_named(with_a_token_too_many: Runtime) -> None:
    with pytest.raises(InputError, match="token '<think>', which the model does not know"):
        with_a_token_too_many.classify(["hello <think>"], "intent")
    with Scheduler(with_a_token_too_many) as scheduler:
        good = scheduler.classify(["hello"], "intent")
        with pytest.raises(InputError, match="<think>"):
            scheduler.classify(["hello <think>"], "intent")
        assert good.result(60)


def test_ids_outside_the_vocabulary_stop_before_the_graph(classifier: Runtime) -> None:
    for row in ([-1], [320]):
        with pytest.raises(InputError, match="a token id outside the vocabulary"):
            classifier.encoder.run([row])  # type: ignore[union-attr]


def test_structured_answers_survive_a_thread_switch_at_every_step(generator: Runtime) -> None:
    pytest.importorskip("llguidance")
    schema = json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}})
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for seed in range(20):
            generator.generate(
                ["lights on"], schema=schema, max_new_tokens=20, temperature=1.0, seed=seed
            )
    finally:
        sys.setswitchinterval(interval)
