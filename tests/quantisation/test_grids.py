"""A base that lies on a grid of 4 or 8 bits keeps it: found from the values, the same in torch, in
the file and in the engine.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from export_helpers import export, make_adapter
from onnx import numpy_helper
from torch import Tensor
from training_helpers import half, q4_1

from edgetune.export.graph.adapter_branch import adapted_graph
from edgetune.export.graph.lower import lower
from edgetune.export.graph.symbolic_layers import DOMAIN
from edgetune.export.proof.proof import BOUNDS
from edgetune.models.fake_quantise import quantised_weight
from edgetune.models.load import load_body
from edgetune.models.resolve import resolve_base
from edgetune.quantisation.blocks import quantise
from edgetune.quantisation.grids import find_grid
from edgetune.quantisation.precision import Precision, shipped_precision
from edgetune.runtime.bundle.manifest import Manifest
from edgetune.runtime.engine.decoder import DecoderEngine


def q4_0(rows: int, columns: int, *, levels: int = 16) -> Tensor:
    q = (
        torch.randint(0, levels, (rows, columns // 32, 32))
        + torch.randint(0, 17 - levels, (rows, columns // 32, 1))
        - 8
    )
    return (q * half(rows, columns // 32, 1, low=0.01, high=0.03)).flatten(1)


def q8_0(rows: int, columns: int) -> Tensor:
    q = torch.randint(-127, 128, (rows, columns // 32, 32))
    q[..., 5] = 127  # GGUF's scale puts the largest magnitude there
    return (q * half(rows, columns // 32, 1, low=0.001, high=0.002)).flatten(1)


@pytest.mark.parametrize("levels", [1, 2, 3, 5, 9, 16])
def test_q4_1_is_found_to_the_last_bit_however_few_levels_a_block_has(levels: int) -> None:
    weight = q4_1(64, 192, levels=levels)
    rows, grid = find_grid(weight.view(64, 6, 32), bits=4, offsets=True)
    again = (grid.values - grid.zero[..., None]) * grid.scale[..., None] + grid.offset[..., None]
    assert rows.all() and torch.equal(again.flatten(1), weight)


def test_rounded_offsets_move_a_weight_by_a_fiftieth_of_a_step() -> None:
    """Rounding to the nearest would move it by a step over the square root of 12, and does where
    there is no grid.
    """
    weight = q4_1(64, 192)
    step = 0.02
    assert (quantise(weight, bits=4).dequantise() - weight).square().mean().sqrt() < step / 30
    weight[:, 3] += 0.0001
    assert (quantise(weight, bits=4).dequantise() - weight).square().mean().sqrt() > step / 5


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("levels", [1, 2, 3, 5, 9, 16])
def test_q4_0_is_kept_bit_for_bit_without_offsets(bits: int, levels: int) -> None:
    weight = q4_0(64, 192, levels=levels)
    q = quantise(weight, bits=bits)
    assert torch.equal(q.dequantise(), weight) and q.inputs == q.columns


def test_q8_0_is_kept_bit_for_bit_without_zeros() -> None:
    weight = q8_0(64, 192)
    q = quantise(weight, bits=8)
    assert torch.equal(q.dequantise(), weight) and q.zeros is None


def test_smaller_blocks_keep_the_grid_too_and_larger_ones_cannot() -> None:
    weight = q4_1(16, 192)
    assert find_grid(weight.view(16, 12, 16), bits=4, offsets=True)[0].all()
    assert not find_grid(weight.view(16, 3, 64), bits=4, offsets=True)[0].any()


@pytest.mark.parametrize("symmetric", [True, False])
def test_stacked_weights_are_each_stored_as_alone(symmetric: bool) -> None:
    parts = [q4_1(8, 96), torch.randn(8, 96), q4_0(8, 96), torch.zeros(2, 96)]
    stacked = quantise(torch.cat(parts), bits=4, symmetric=symmetric).dequantise()
    assert torch.equal(
        stacked,
        torch.cat([quantise(part, bits=4, symmetric=symmetric).dequantise() for part in parts]),
    )


def test_a_row_off_the_grid_in_one_weight_is_rounded_as_before() -> None:
    weight, noise = q4_1(4, 96), torch.randn(4, 96)
    weight[1, 70] += 0.001
    assert find_grid(weight.view(4, 3, 32), bits=4, offsets=True)[0].tolist() == [
        True,
        False,
        True,
        True,
    ]
    alone = quantise(noise, bits=4)
    assert alone.zeros is None and alone.inputs == alone.columns
    assert torch.equal(
        quantise(torch.cat([weight[1:2], noise]), bits=4).dequantise(),
        torch.cat([quantise(weight[1:2], bits=4).dequantise(), alone.dequantise()]),
    )


def test_where_offsets_cannot_be_added_a_grid_without_any_is_kept() -> None:
    assert quantise(q4_1(8, 96), bits=4, offsets=False).inputs == 96
    weight = q4_0(8, 96)
    assert torch.equal(quantise(weight, bits=4, offsets=False).dequantise(), weight)


@pytest.fixture(scope="module")
def base(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny decoder with its linear weights on Q4_1 and its embedding on Q8_0, as a GGUF file
    leaves a model.
    """
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("grid") / "base"
    shutil.copytree(tiny_decoder, folder)
    model = load_body(resolve_base(str(tiny_decoder)))
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight.copy_(q4_1(*module.weight.shape))
        model.model.embed_tokens.weight.copy_(2 * q8_0(*model.model.embed_tokens.weight.shape))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapter") / "a")


@pytest.fixture(scope="module")
def bundle(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    out = tmp_path_factory.mktemp("bundle") / "b"
    return out, export(out, adapter, precision="int4")


def test_the_proof_of_an_int4_bundle_of_such_a_base_passes(bundle: tuple[Path, Manifest]) -> None:
    proof = bundle[1].proof["adapters"]["a"]
    assert proof["passed"] and proof["mean_kl"] < BOUNDS["int8"].mean_kl


def rounded(base: Path) -> Any:
    """The base as `base_precision = "int4"` trains on it."""
    return load_body(
        replace(resolve_base(str(base)), precision=shipped_precision("int4", "decoder"))
    )


def test_training_sees_bit_for_bit_what_the_file_holds(
    base: Path, bundle: tuple[Path, Manifest]
) -> None:
    """Read without edgetune's quantiser: (q − zero) · scale, and the last columns once for each
    weight of a block.
    """
    model = onnx.load(str(bundle[0] / "engine.onnx"))
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    graph = adapted_graph(model)
    makers = {name: node for node in graph.node for name in node.output}
    named = {node.name: node for node in graph.node}
    weights = {name: tensor.numpy() for name, tensor in rounded(base).state_dict().items()}
    for site in bundle[1].sites:
        product = makers[named[f"{site.name}.adapted"].input[0]]
        octets, scales, packed = (arrays[name] for name in product.input[1:4])
        q = np.stack([octets & 15, octets >> 4], -1).reshape(*scales.shape, 32).astype(np.float32)
        zero = (
            np.stack([packed & 15, packed >> 4], -1)
            .reshape(len(scales), -1)[:, : scales.shape[1], None]
            .astype(np.float32)
        )
        stored, k = ((q - zero) * scales[..., None]).reshape(len(scales), -1), site.in_features
        stored = stored[:, :k] + np.repeat(stored[:, k : k + k // 32] / 32, 32, axis=1)
        expected = np.concatenate([weights[f"{part.module}.weight"] for part in site.parts])
        assert np.array_equal(stored, expected)


def test_an_embedding_on_q8_0_stays_as_it_is(base: Path) -> None:
    name = "model.embed_tokens.weight"
    assert torch.equal(
        rounded(base).state_dict()[name], load_body(resolve_base(str(base))).state_dict()[name]
    )


def test_without_rounded_activations_the_engine_answers_as_torch_one_token_at_a_time(
    base: Path, bundle: tuple[Path, Manifest], tmp_path: Path
) -> None:
    row = [5, 9, 11, 3, 8, 2, 14]
    shutil.copytree(bundle[0], tmp_path / "exact")
    model = onnx.load(str(tmp_path / "exact" / "engine.onnx"), load_external_data=False)
    levels = [a for node in model.graph.node for a in node.attribute if a.name == "accuracy_level"]
    assert levels
    for attribute in levels:
        attribute.i = 1
    onnx.save(model, str(tmp_path / "exact" / "engine.onnx"))
    with torch.no_grad():
        expected = rounded(base)(input_ids=torch.tensor([row])).logits[0].numpy()
    state, logits = DecoderEngine(tmp_path / "exact", bundle[1], threads=1).start([row[:4]])
    steps = [logits[0].copy(), *(state.step([token])[0].copy() for token in row[4:])]
    assert (
        max(np.abs(got - want).max() for got, want in zip(steps, expected[3:], strict=True))
        < 1e-5 * np.abs(expected).max()
    )


def lowered(weight: Tensor, *leading: str) -> bytes:
    """A graph of one linear layer as int4, its input (*leading, in)."""
    source = ir.Value(
        name="x", shape=ir.Shape([*leading, weight.shape[1]]), type=ir.TensorType(ir.DataType.FLOAT)
    )
    held = ir.Value(
        name="w",
        const_value=ir.tensor(weight.numpy(), name="w"),
        shape=ir.Shape(weight.shape),
        type=ir.TensorType(ir.DataType.FLOAT),
    )
    node = ir.node("Linear", [source, held], attributes={"module": "proj"}, domain=DOMAIN)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [source],
        [node.outputs[0]],
        nodes=[node],
        initializers=[held],
        opset_imports={"": 21, "com.microsoft": 1},
        name="g",
    )
    model = ir.Model(graph, ir_version=10)
    assert lower(model, Precision("int4"), adapter_inputs=False) == []
    return ir.to_proto(model).SerializeToString()


@pytest.mark.parametrize("leading", [(2, 3), (5,)])
def test_the_engine_adds_the_offsets_to_inputs_of_any_rank(
    leading: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgetune.export.graph.lower.ACCURACY_LEVEL", 1)
    weight, x = q4_1(48, 96), torch.randn(*leading, 96)
    session = ort.InferenceSession(
        lowered(weight, *"ab"[: len(leading)]), providers=["CPUExecutionProvider"]
    )
    expected = (x @ quantise(weight, bits=4).dequantise().t()).numpy()
    assert (
        np.abs(session.run(None, {"x": x.numpy()})[0] - expected).max()
        < 1e-5 * np.abs(expected).max()
    )


def test_a_grid_without_offsets_is_one_node() -> None:
    nodes = onnx.load_from_string(lowered(q4_0(48, 96), "a", "b")).graph.node
    assert [node.op_type for node in nodes] == ["MatMulNBits"]


def test_a_tied_table_is_never_given_offsets() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from edgetune.models.fake_quantise import round_weights

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )
    with torch.no_grad():
        model.lm_head.weight.copy_(q4_1(40, 64))
        expected = quantised_weight(model.lm_head, 4, Precision("int4"), offsets=False).dequantise()
        round_weights(model, Precision("int4"))
    assert model.lm_head.weight is model.model.embed_tokens.weight and torch.equal(
        model.lm_head.weight, expected
    )
