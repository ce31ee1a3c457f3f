"""Bundles in fp16: what is stored and computed in it, and that the CPU's engine answers as
torch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from export_helpers import decoder_feed, export, make_adapter, plain_session
from onnx import TensorProto
from runtime_helpers import Listener, alone, request

from edgetune.core.errors import ExportError
from edgetune.runtime import Runtime
from edgetune.runtime.bundle.manifest import Manifest, read_manifest
from edgetune.runtime.scheduler.scheduler import Scheduler


@pytest.fixture(scope="module")
def decoder(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("half")
    export(folder / "bundle", make_adapter(tiny_decoder, folder / "chat"), precision="fp16")
    return folder / "bundle"


@pytest.fixture(scope="module")
def encoder(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("half")
    export(folder / "bundle", make_adapter(tiny_encoder, folder / "topics"), precision="fp16")
    return folder / "bundle"


def proven(bundle: Path) -> tuple[Manifest, dict[str, object]]:
    manifest = read_manifest(bundle)
    (proof,) = manifest.proof["adapters"].values()
    return manifest, proof


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_it_answers_as_torch_within_what_eleven_bits_leave(
    kind: str, request: pytest.FixtureRequest
) -> None:
    manifest, proof = proven(request.getfixturevalue(kind))
    assert proof["passed"] and 0 < proof["mean_kl"] < 1e-4  # type: ignore[operator]
    assert (manifest.precision.weights, manifest.precision.block_size) == ("fp16", None)
    assert manifest.graph.cache_dtype == ("float16" if kind == "decoder" else None)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_every_weight_and_every_step_is_fp16(kind: str, request: pytest.FixtureRequest) -> None:
    bundle = request.getfixturevalue(kind)
    graph = onnx.load(str(bundle / "engine.onnx"), load_external_data=False).graph
    assert not [
        weight.name for weight in graph.initializer if weight.data_type == TensorProto.FLOAT
    ]
    to = [
        attribute.i
        for node in graph.node
        if node.op_type == "Cast"
        for attribute in node.attribute
        if attribute.name == "to"
    ]
    assert to.count(TensorProto.FLOAT) == sum(
        value.type.tensor_type.elem_type == TensorProto.FLOAT for value in graph.output
    )
    assert not [
        value.name
        for value in graph.value_info
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    ]
    kinds = {
        value.name.partition(".")[0]: value.type.tensor_type.elem_type
        for value in [*graph.input, *graph.output]
    }
    assert kinds["logits"] == TensorProto.FLOAT
    if kind == "decoder":
        assert kinds["present"] == kinds["past_key_values"] == TensorProto.FLOAT16


def test_the_data_take_half(decoder: Path, tiny_decoder: Path) -> None:
    manifest = read_manifest(decoder)
    assert (
        manifest.files["model.onnx.data"].bytes
        < 2.2 * manifest.base.parameters + 60 * 4096 + 2 * 256 * 16 * 2
    )


def test_runtime_and_scheduler_keep_the_cache_in_it_and_agree(decoder: Path) -> None:
    prompts = [[5, 9, 30, 31], [7, 100, 12]]
    with Runtime.open(decoder, threads=1) as runtime:
        expected = [alone(runtime, ids, "chat", 6) for ids in prompts]
        with Scheduler(runtime, max_rows=2) as scheduler:
            listeners = [Listener() for _ in prompts]
            for ids, listener in zip(prompts, listeners, strict=True):
                scheduler.submit(request(runtime, ids, "chat", max_new_tokens=6), listener)
            assert [list(listener.done().token_ids) for listener in listeners] == expected
            assert (
                scheduler.worker.loop is not None
                and scheduler.worker.loop.batch.arena.memory.dtype == np.float16
            )


def test_plain_onnx_runtime_opens_the_standard_graph(decoder: Path) -> None:
    manifest, ids = read_manifest(decoder), np.array([[5, 9, 30]], np.int64)
    feed = {
        name: value.astype(np.float16) if value.dtype == np.float32 else value
        for name, value in decoder_feed(manifest, ids, np.ones_like(ids)).items()
    }
    session = plain_session(decoder)
    names = [value.name for value in session.get_outputs()]
    found = dict(zip(names, session.run(None, feed), strict=True))
    assert (
        found["logits"].dtype == np.float32
        and found["present.0.key"].dtype == np.float16
        and np.isfinite(found["logits"]).all()
    )


def test_layers_of_other_precisions_are_refused(tiny_decoder: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_decoder, tmp_path / "a")
    with pytest.raises(ExportError, match="an fp16 bundle has one precision"):
        export(tmp_path / "b", adapter, precision="fp16", overrides={"lm_head": "int8"})


def test_a_copy_in_fp16_leaves_the_graph_it_was_copied_from_in_fp32(tiny_decoder: Path) -> None:
    from edgetune.export.graph import build
    from edgetune.export.graph.fp16 import to_half
    from edgetune.models.load import load_body
    from edgetune.models.resolve import resolve_base

    base = resolve_base(str(tiny_decoder))
    model = build._trace(base, load_body(base))
    before = [value.dtype for node in model.graph for value in node.outputs]
    to_half(model.clone())
    assert [value.dtype for node in model.graph for value in node.outputs] == before
