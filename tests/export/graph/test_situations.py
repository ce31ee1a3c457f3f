"""A decoder's engine graph skips its adapter nodes when no adapter is active, and answers the
same.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from export_helpers import decoder_feed, export, make_adapter, op_counts, plain_session

from edgetune.export.graph.adapter_branch import adapted_graph
from edgetune.runtime.adapters.packing import pack_adapter
from edgetune.runtime.bundle.manifest import read_manifest
from edgetune.runtime.engine import session as binding
from edgetune.runtime.engine.decoder import DecoderEngine
from edgetune.runtime.engine.session import ADAPTER_BRANCH, BoundTensors

PROMPT = [5, 9, 11, 3]


@pytest.fixture(scope="module")
def bundle(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("situations")
    export(folder / "bundle", make_adapter(tiny_decoder, folder / "a"), precision="int8")
    return folder / "bundle"


@pytest.fixture(scope="module")
def engine(bundle: Path) -> DecoderEngine:
    return DecoderEngine(bundle, read_manifest(bundle), threads=1, adapter_branch=True)


@pytest.fixture(scope="module")
def adapter(bundle: Path) -> BoundTensors:
    return BoundTensors(pack_adapter(bundle / "adapters" / "a", read_manifest(bundle)).tensors)


def branch_of(bundle: Path, name: str) -> onnx.GraphProto:
    model = onnx.load(str(bundle / "situations.onnx"), load_external_data=False)
    node = next(node for node in model.graph.node if node.name == ADAPTER_BRANCH)
    return next(attribute.g for attribute in node.attribute if attribute.name == name)


def tokens(engine: DecoderEngine, adapters: list[BoundTensors | None]) -> list[np.ndarray]:
    state, logits = engine.start([PROMPT] * len(adapters), adapters, capacity=16)
    return [logits.copy(), *(state.step([7 + step] * len(adapters)).copy() for step in range(4))]


def test_the_plain_branch_has_none_of_the_adapters_nodes(bundle: Path) -> None:
    sites = read_manifest(bundle).sites
    adapted, plain = (list(branch_of(bundle, name).node) for name in ("then_branch", "else_branch"))
    assert len(adapted) - len(plain) == 3 * len(sites)
    assert not {site.A for site in sites} & {name for node in plain for name in node.input}
    assert op_counts(bundle).total() == len(adapted)


def test_both_branches_read_the_same_weights(bundle: Path) -> None:
    weights = [
        [node.input[1] for node in branch_of(bundle, name).node if node.op_type == "MatMulNBits"]
        for name in ("then_branch", "else_branch")
    ]
    assert weights[0] == weights[1] and len(weights[0]) == len(read_manifest(bundle).sites) + 1


def test_without_an_adapter_the_logits_are_those_of_rank_0_bit_for_bit(
    engine: DecoderEngine, bundle: Path
) -> None:
    site = read_manifest(bundle).sites[0]
    zeros = BoundTensors(
        {
            site.A: np.zeros((1, site.in_features, 1), np.float32),
            site.B: np.zeros((1, 1, site.out_features), np.float32),
        }
    )
    assert zeros.active and not engine.empty.active
    for got, expected in zip(tokens(engine, [None]), tokens(engine, [zeros]), strict=True):
        assert np.array_equal(got, expected)


def test_the_graph_of_one_situation_answers_the_same_and_is_what_is_opened_unless_asked(
    engine: DecoderEngine, adapter: BoundTensors, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, opened = read_manifest(bundle), list[str]()
    real = binding.open_session
    monkeypatch.setattr(
        binding,
        "open_session",
        lambda path, **options: opened.append(path.name) or real(path, **options),
    )
    plain = DecoderEngine(bundle, manifest, threads=1)
    for chosen in (None, adapter):
        for got, expected in zip(tokens(plain, [chosen]), tokens(engine, [chosen]), strict=True):
            assert np.array_equal(got, expected)
    DecoderEngine(bundle, manifest, threads=1, providers=["cpu"], adapter_branch=True)
    DecoderEngine(bundle, manifest, threads=1, providers=["cuda", "cpu"], adapter_branch=True)
    DecoderEngine(
        bundle,
        replace(manifest, graph=replace(manifest.graph, situations=None)),
        threads=1,
        adapter_branch=True,
    )
    assert (
        opened == ["engine.onnx", "situations.onnx", "engine.onnx", "engine.onnx"]
        and manifest.graph.situations in manifest.files
    )


def test_a_row_without_adapter_answers_the_same_beside_one_with(
    engine: DecoderEngine, adapter: BoundTensors
) -> None:
    alone = [tokens(engine, [chosen]) for chosen in (None, adapter)]
    assert not np.allclose(alone[0][-1], alone[1][-1], atol=1e-3)
    for step, logits in enumerate(tokens(engine, [None, adapter])):
        assert np.allclose(logits, np.concatenate([rows[step] for rows in alone]), atol=1e-4)


def maker_of(output: str, graph: onnx.GraphProto) -> str:
    return next(
        node.op_type for node in graph.node if node.output[0].removeprefix("adapted.") == output
    )


def test_an_engine_of_before_that_knows_situations_runs(
    engine: DecoderEngine, adapter: BoundTensors, bundle: Path, tmp_path: Path
) -> None:
    shutil.copytree(bundle, tmp_path / "old")
    (tmp_path / "old" / "situations.onnx").replace(tmp_path / "old" / "engine.onnx")
    old = DecoderEngine(tmp_path / "old", read_manifest(bundle), threads=1)
    for chosen in (None, adapter):
        for got, expected in zip(tokens(old, [chosen]), tokens(engine, [chosen]), strict=True):
            assert np.array_equal(got, expected)


def test_the_logits_are_made_alike_in_every_graph(bundle: Path) -> None:
    graphs = [
        adapted_graph(onnx.load(str(bundle / name), load_external_data=False))
        for name in ("engine.onnx", "situations.onnx", "model.onnx")
    ]
    assert len({maker_of("logits", graph) for graph in graphs}) == 1 and len(graphs[0].node) == len(
        graphs[1].node
    )


def test_a_caller_that_knows_no_situations_gets_the_base_by_rank_0(
    engine: DecoderEngine, bundle: Path
) -> None:
    manifest = read_manifest(bundle)
    feed = decoder_feed(manifest, np.array([PROMPT]), np.ones((1, len(PROMPT)), np.int64))
    expected = plain_session(bundle).run(["logits"], feed)[0]
    del feed["attention_mask"]
    feed = {
        name: np.zeros((1, 2, 8, 16), np.float32) if name.startswith("past") else array
        for name, array in feed.items()
    }
    feed |= {
        "seqlens_k": np.array([3], np.int32),
        "total_sequence_length": np.array(4, np.int32),
        "logits_index": np.array([[3]]),
    }
    got = engine.session.run(["logits"], feed | engine.empty.tensors)[0]
    assert np.allclose(got, expected, atol=1e-5)
