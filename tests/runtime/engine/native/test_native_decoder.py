"""The native engine answers as torch and as the plan in exact arithmetic, no further from it than
ONNX Runtime, for every family it takes; a row's answer is its own whoever stands beside it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_helpers import some
from native_helpers import COPIES, IDS, PRECISIONS, TAKEN, Array, Family, PlanRun, make

from edgetune.core.errors import AdapterError, BundleError, InputError
from edgetune.runtime.adapters.packing import pack_adapter
from edgetune.runtime.bundle.manifest import Manifest
from edgetune.runtime.engine.decoder import DecoderEngine
from edgetune.runtime.engine.native.decoder import NativeDecoder
from edgetune.runtime.engine.native.library import NoLibraryError, library
from edgetune.runtime.tasks.choose_engine import open_decoder

try:
    SETS = [*library().edgetune_instruction_sets().decode().split(), "scalar"]
except NoLibraryError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module", params=some(TAKEN, fast=set(TAKEN) - COPIES))
def family(request: Any, tiny_decoder: Path, tmp_path_factory: Any) -> Family:
    return make(request.param, tiny_decoder, tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def llama(tiny_decoder: Path, tmp_path_factory: Any) -> Family:
    return make("llama", tiny_decoder, tmp_path_factory.mktemp("native-llama"))


def opened(family: Family, precision: str, **options: Any) -> tuple[NativeDecoder, Any]:
    bundle, manifest = family.build(PRECISIONS[precision], precision)
    engine = NativeDecoder(bundle, manifest, **{"threads": 2} | options)
    return engine, engine.bind(pack_adapter(family.adapter, manifest).tensors)


def distance(got: Array, expected: Array) -> float:
    """Root mean square of the difference, as a share of the logits' own."""
    return float(np.sqrt(((got - expected) ** 2).mean() / (expected**2).mean()))


def test_in_float_it_answers_as_torch(family: Family) -> None:
    engine, adapter = opened(family, "fp32")
    plain, adapted = engine.logits([IDS, IDS], [None, adapter])
    assert distance(plain, family.torch_logits(adapter=False)) < 2e-3
    assert distance(adapted, family.torch_logits(adapter=True)) < 2e-3
    assert distance(adapted, plain) > 0.02


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_rounded_it_is_as_close_to_exact_arithmetic_as_onnx_runtime(
    family: Family, precision: str
) -> None:
    engine, adapter = opened(family, precision)
    bundle, manifest = family.build(PRECISIONS[precision], precision)
    tensors = pack_adapter(family.adapter, manifest).tensors
    graph = DecoderEngine(bundle, manifest, threads=1)
    run = PlanRun.open(bundle, manifest)
    for exact, native, onnx in (
        (run.logits(IDS), engine.logits([IDS])[0], graph.logits([IDS])[0]),
        (
            run.with_adapter(tensors).logits(IDS),
            engine.logits([IDS], [adapter])[0],
            graph.logits([IDS], [tensors])[0],
        ),
    ):
        assert distance(native, exact) < 1.4 * distance(onnx, exact) + 2e-3


@pytest.mark.parametrize("instructions", SETS)
def test_every_instruction_set_gives_the_same(llama: Family, instructions: str) -> None:
    plain, _ = opened(llama, "int4", instructions="scalar", threads=1)
    engine, _ = opened(llama, "int4", instructions=instructions)
    assert engine.model.instructions == instructions
    again, _ = opened(llama, "int4", instructions=instructions, threads=1)
    np.testing.assert_array_equal(engine.logits([IDS])[0], again.logits([IDS])[0])
    assert distance(engine.logits([IDS])[0], plain.logits([IDS])[0]) < 0.02
    assert distance(again.logits([IDS])[0], plain.logits([IDS])[0]) < 0.02


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_prompt_in_pieces_by_any_threads_is_the_same_to_the_bit(
    family: Family, precision: str
) -> None:
    engine, adapter = opened(family, precision)
    longer = [*IDS, *IDS[::-1], *IDS[::2], *IDS]  # more than one block of keys
    whole = engine.logits([longer], [adapter])[0]
    state, first = engine.start([longer[:5]], [adapter], capacity=len(longer))
    found = [first[0].copy(), *(state.step([token])[0].copy() for token in longer[5:])]
    np.testing.assert_array_equal(np.array(found), whole[4:])
    for threads in (1, 3):
        other, own = opened(family, precision, threads=threads)
        np.testing.assert_array_equal(other.logits([longer], [own])[0], whole)
    with pytest.raises(InputError, match="cache is full"):
        for _ in range(engine.graph.max_length):
            state.step([7])


def test_a_cache_in_eight_bits_takes_half_and_answers_nearly_the_same(llama: Family) -> None:
    bundle, manifest = llama.build(PRECISIONS["int4"], "int4")
    usual, _ = open_decoder(bundle, manifest, engine="native", threads=2)
    small, which = open_decoder(bundle, manifest, engine="native:cache=int8", threads=2)
    assert isinstance(usual, NativeDecoder) and isinstance(small, NativeDecoder)
    assert which.name == "native" and "8 bits" in str(which)
    width = usual.model.sizes.cache_bytes // 2
    assert small.model.sizes.cache_bytes == width + 4
    longer = [*IDS, *IDS[::-1], *IDS[::2], *IDS]
    whole = small.logits([longer])[0]
    assert 0 < distance(whole, usual.logits([longer])[0]) < 0.05
    batch = small.new_batch(rows=2, max_context=len(longer))
    batch.begin(None, tokens=len(longer))
    np.testing.assert_array_equal(batch.prefill(longer[:5]), whole[4])
    batch.join()
    for at, token in enumerate(longer[5:], start=5):
        np.testing.assert_array_equal(batch.step([token])[0], whole[at])


def test_rows_with_other_adapters_beside_them_answer_as_alone(family: Family) -> None:
    engine, adapter = opened(family, "fp32")
    double = engine.bind(
        {
            name: tensor * (2 if name.endswith("lora_B") else 1)
            for name, tensor in pack_adapter(family.adapter, engine.manifest).tensors.items()
        }
    )
    rows = [IDS[:9], IDS[3:20], IDS[1:4], IDS[2:12]]
    adapters = [adapter, None, double, adapter]
    state, logits = engine.start(rows, adapters)
    together = [logits.copy(), state.step([1, 2, 3, 4]).copy()]
    state.keep([1, 2])
    together.append(state.step([5, 6]).copy())
    for i, (row, own) in enumerate(zip(rows, adapters, strict=True)):
        alone, logits = engine.start([row], [own])
        np.testing.assert_array_equal(together[0][i], logits[0])
        np.testing.assert_array_equal(together[1][i], alone.step([i + 1])[0])
        if i in (1, 2):
            np.testing.assert_array_equal(together[2][i - 1], alone.step([i + 4])[0])
    repeated = engine.start([rows[0]], [adapter])[0].repeat(3)
    again = repeated.step([1, 2, 1])
    np.testing.assert_array_equal(again[0], again[2])
    np.testing.assert_array_equal(again[0], together[1][0])


def test_a_batch_joins_leaves_remembers_and_checks(family: Family) -> None:
    engine, adapter = opened(family, "fp32")
    batch = engine.new_batch(rows=3, max_context=90)
    prompts = [[*IDS, *IDS[:17]], IDS[:6], IDS[4:11]]  # 40 tokens: one block of 32 is shared
    rows = []
    for prompt, own in zip(prompts, [adapter, None, adapter], strict=True):
        assert batch.has_room(len(prompt) + 10)
        rows.append(batch.begin(own, tokens=len(prompt) + 10))
        assert batch.restore(("key", own is None), prompt) == 0
        batch.prefill(prompt)
        batch.join()
        batch.remember(rows[-1], ("key", own is None), prompt)
    batch.step([1, 2, 3])
    batch.leave(rows[0])
    after = batch.step([4, 5])  # the last row took the first one's slot
    for place, (row, expected) in enumerate(((2, [3, 4]), (1, [2, 5]))):
        own = adapter if row == 2 else None
        whole = engine.logits([[*prompts[row], *expected]], [own])[0]
        np.testing.assert_array_equal(after[place], whole[-1])
    again = batch.begin(adapter, tokens=60)
    assert batch.restore(("key", False), prompts[0]) == 32
    logits = batch.prefill(prompts[0][32:])
    np.testing.assert_array_equal(logits, engine.logits([prompts[0]], [adapter])[0][-1])
    batch.join()
    for row in list(batch.decoding)[:2]:
        batch.leave(row)
    checked = batch.check([[9, 8, 7]])
    whole = engine.logits([[*prompts[0], 9, 8, 7]], [adapter])[0]
    np.testing.assert_array_equal(checked, whole[-3:])
    again.length -= 2  # take two back, and go on from there
    assert (
        distance(batch.step([5])[0], engine.logits([[*prompts[0], 9, 5]], [adapter])[0][-1]) < 1e-3
    )


def test_chosen_positions_and_scores_are_those_of_all(llama: Family) -> None:
    engine, adapter = opened(llama, "fp32")
    whole = engine.logits([IDS], [adapter])[0]
    chosen = engine.logits([IDS], [adapter], positions=[[7, 2, 7]])[0]
    np.testing.assert_allclose(chosen, whole[[7, 2, 7]], atol=1e-4)
    with pytest.raises(InputError, match="no score"):
        engine.begin_scores([IDS], [adapter]).step()


def test_what_is_not_its_own_is_refused(llama: Family, family: Family) -> None:
    engine, _ = opened(llama, "int4")
    _, foreign = opened(family, "int4")
    graph = DecoderEngine(*llama.build(PRECISIONS["int4"], "int4"), threads=1)
    for adapter in (foreign, graph.bind({})):
        with pytest.raises(AdapterError, match="bound for another engine"):
            engine.start([IDS], [adapter])
    with pytest.raises(AdapterError, match="no adapter input nobody"):
        engine.bind({"nobody": np.zeros((1, 2, 2), np.float32)})
    site = engine.manifest.sites[0]
    bad = {site.A: np.zeros((1, site.in_features, 2), np.float32)}
    bad[site.B] = np.full((1, 2, site.out_features), np.nan, np.float32)
    with pytest.raises(AdapterError, match="not finite"):
        engine.bind(bad)
    for rows, what in (([[]], "empty"), ([[10**6]], "vocabulary"), ([IDS * 99], "longer")):
        with pytest.raises(InputError, match=what):
            engine.start(rows)


def damaged(llama: Family, folder: Path, change: Any) -> tuple[Path, Manifest]:
    bundle, manifest = llama.build(PRECISIONS["int4"], "int4")
    shutil.copytree(bundle, folder / "bundle")
    change(folder / "bundle")
    return folder / "bundle", manifest


def _other_hidden(folder: Path) -> None:
    plan = json.loads((folder / "native.json").read_text())
    plan["layers"][0]["qkv"]["inputs"] += 32
    (folder / "native.json").write_text(json.dumps(plan))


DAMAGES = {
    "no plan": lambda folder: (folder / "native.json").unlink(),
    "half a plan": lambda folder: (folder / "native.json").write_text(
        (folder / "native.json").read_text()[:900]
    ),
    "other sizes": _other_hidden,
    "weights cut off": lambda folder: (folder / "model.onnx.data").write_bytes(
        (folder / "model.onnx.data").read_bytes()[:5000]
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_plan_is_one_line_and_never_an_answer(
    damage: str, llama: Family, tmp_path: Path
) -> None:
    bundle, manifest = damaged(llama, tmp_path, DAMAGES[damage])
    with pytest.raises(BundleError) as caught:
        NativeDecoder(bundle, manifest, threads=1)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="cannot run this bundle"):
        open_decoder(bundle, manifest, engine="native")


def test_who_answers_is_said_with_the_reason(
    llama: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle, manifest = llama.build(PRECISIONS["int4"], "int4")
    _, native = open_decoder(bundle, manifest)
    assert (native.name, native.instructions) == ("native", SETS[0])
    _, asked = open_decoder(bundle, manifest, engine="onnxruntime")
    assert (asked.name, asked.why) == ("onnxruntime", "")
    broken, _ = damaged(llama, tmp_path, DAMAGES["other sizes"])
    _, fallen = open_decoder(broken, manifest)
    assert fallen.name == "onnxruntime" and "native plan" in fallen.why
    assert len([r for r in caplog.records if "onnxruntime answers" in r.message]) == 1
    old = dataclasses.replace(manifest, graph=dataclasses.replace(manifest.graph, native=None))
    assert "no native.json" in open_decoder(bundle, old)[1].why
    with pytest.raises(InputError, match="unknown engine"):
        open_decoder(bundle, manifest, engine="fast")
