"""Block-wise quantisation: error, exact grids, and the bytes that ONNX Runtime's kernel reads."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from edgetune.quantisation.blocks import ROUNDING, quantise


def engine_product(
    x: np.ndarray, weight: torch.Tensor, *, bits: int, symmetric: bool
) -> np.ndarray:
    """x Wᵀ by the engine's `MatMulNBits` in full precision (accuracy level 1)."""
    import onnx_ir as ir
    import onnxruntime as ort

    q = quantise(weight, bits=bits, symmetric=symmetric)
    arrays = {"w": q.packed().numpy(), "s": q.scales.numpy()}
    zeros = q.packed_zeros()
    if zeros is not None:
        arrays["z"] = zeros.numpy()
    source = ir.Value(name="x", shape=ir.Shape(x.shape), type=ir.TensorType(ir.DataType.FLOAT))
    constants = [
        ir.Value(
            name=n,
            const_value=ir.tensor(a, name=n),
            shape=ir.Shape(a.shape),
            type=ir.TensorType(ir.DataType.from_numpy(a.dtype)),
        )
        for n, a in arrays.items()
    ]
    sizes = {
        "K": weight.shape[1],
        "N": weight.shape[0],
        "bits": bits,
        "block_size": 32,
        "accuracy_level": 1,
    }
    node = ir.node("MatMulNBits", [source, *constants], domain="com.microsoft", attributes=sizes)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [source],
        [node.outputs[0]],
        nodes=[node],
        initializers=constants,
        opset_imports={"": 21, "com.microsoft": 1},
        name="g",
    )
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [64, 96, 80])
def test_the_engine_computes_with_the_weights_that_dequantise_returns(
    bits: int, symmetric: bool, columns: int
) -> None:
    torch.manual_seed(0)
    weight, x = (
        torch.randn(48, columns),
        np.random.default_rng(0).standard_normal((3, columns)).astype(np.float32),
    )
    expected = x @ quantise(weight, bits=bits, symmetric=symmetric).dequantise().numpy().T
    assert np.abs(engine_product(x, weight, bits=bits, symmetric=symmetric) - expected).max() < 1e-4


def test_no_weight_is_further_from_its_grid_than_half_a_step_with_eight_bits() -> None:
    weight = torch.randn(16, 128)
    q = quantise(weight, bits=8)
    steps = q.scales.abs().repeat_interleave(32, dim=1)
    assert ((q.dequantise() - weight).abs() <= steps * 1.0001).all()


def test_weights_on_a_symmetric_grid_are_kept_exactly() -> None:
    grid = torch.randint(-8, 8, (8, 64)).float()
    grid[:, ::32] = -8  # every block reaches the end of the grid
    weight = grid * 0.25
    assert torch.equal(quantise(weight, bits=4).dequantise(), weight)


def test_the_best_of_several_grids_is_never_worse_than_the_plain_one() -> None:
    weight = torch.randn(64, 256)
    plain = weight.view(64, 8, 32)
    extreme = (
        torch.where(plain.amax(-1) > -plain.amin(-1), plain.amax(-1), plain.amin(-1))[..., None]
        / -8
    )
    rounded = (torch.round(plain / extreme).clamp(-8, 7) * extreme).view(64, 256)
    searched = quantise(weight, bits=4).dequantise()
    assert (searched - weight).square().sum() <= (rounded - weight).square().sum() + 1e-4


def test_a_block_of_zeros_stays_zero() -> None:
    assert torch.equal(quantise(torch.zeros(4, 64), bits=4).dequantise(), torch.zeros(4, 64))


def test_todays_rounding_is_the_one_that_its_number_names() -> None:
    """Adapters are trained against these values. Where this fails because they changed on purpose,
    raise ROUNDING.
    """
    weight = torch.sin(torch.arange(8 * 128, dtype=torch.float64).square()).float().view(8, 128)
    stored = [
        quantise(weight, bits=bits, symmetric=symmetric)
        for bits in (4, 8)
        for symmetric in (True, False)
    ]
    digest = hashlib.sha256(b"".join(q.values.numpy().tobytes() for q in stored)).hexdigest()
    assert (ROUNDING, digest[:16]) == (2, "b5e0718a560bd02d")
