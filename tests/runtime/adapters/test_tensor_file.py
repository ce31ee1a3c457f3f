"""A safetensors file read at once: the library's values for every dtype, damage found, NaN and
infinity named.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

from edgetune.core.files import sha256_file
from edgetune.runtime.adapters.tensor_file import TensorFile

SHAPES = {"b": (3, 4), "a": (2,), "scalar": (), "empty": (0, 5)}


def written(folder: Path, dtype: torch.dtype) -> tuple[Path, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}
    save_file(tensors, folder / "x.safetensors", metadata={"format": "pt"})
    return folder / "x.safetensors", tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.bfloat16])
def test_every_dtype_becomes_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    path, tensors = written(tmp_path, dtype)
    file = TensorFile(path)
    assert file.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert file.tensors[name].dtype == np.float32
        np.testing.assert_array_equal(file.tensors[name], tensor.float().numpy())
    assert file.not_finite() == set()
    assert file.digest() == sha256_file(path)


def test_float32_as_the_library_reads_it(tmp_path: Path) -> None:
    path, _ = written(tmp_path, torch.float32)
    for name, tensor in load_file(path).items():
        np.testing.assert_array_equal(TensorFile(path).tensors[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_named(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "nan": torch.tensor([1.0, float("nan")]),
        "inf": torch.tensor([float("inf"), -float("inf")]),
        "fine": torch.ones(2),
    }
    save_file(
        {name: tensor.to(dtype) for name, tensor in tensors.items()}, tmp_path / "x.safetensors"
    )
    assert TensorFile(tmp_path / "x.safetensors").not_finite() == {"nan", "inf"}


def test_a_sum_beyond_float32_is_still_finite(tmp_path: Path) -> None:
    save_file({"large": torch.full((4,), 3e38)}, tmp_path / "x.safetensors")
    assert TensorFile(tmp_path / "x.safetensors").not_finite() == set()


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
def test_a_damaged_file_is_a_value_error(tmp_path: Path, keep: int) -> None:
    path, _ = written(tmp_path, torch.float32)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="truncated or damaged"):
        _ = TensorFile(path).tensors


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    save_file({"ids": torch.arange(3)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="ids: expected a floating-point tensor, got I64"):
        _ = TensorFile(tmp_path / "x.safetensors").tensors
