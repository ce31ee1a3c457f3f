"""What this machine can do is measured by real products and reads, and written as a profile."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner

from edgetune.cli.devices import command
from edgetune.core.errors import DeviceError
from edgetune.devices import load_device
from edgetune.runtime.check import host
from edgetune.runtime.check.host import FLOAT, INT8, PRODUCT, UINT8


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "LONG_ENOUGH_S", 0.01)


@pytest.mark.parametrize(
    ("operator", "left", "right"), [("MatMul", FLOAT, FLOAT), ("MatMulInteger", UINT8, INT8)]
)
def test_the_timed_product_is_the_product(operator: str, left: int, right: int) -> None:
    session = onnxruntime.InferenceSession(host._graph(operator, left, right))
    kind = np.float32 if left == FLOAT else np.uint8
    a = np.random.default_rng(0).integers(0, 8, (PRODUCT, PRODUCT)).astype(kind)
    b = np.random.default_rng(1).integers(-8, 8, (PRODUCT, PRODUCT))
    assert np.array_equal(session.run(None, {"a": a})[0], a.astype(np.int64) @ b)


def test_more_than_one_thread_and_the_whole_machine_are_measured() -> None:
    found = host.measure_host()
    assert found.one.threads == 1
    assert found.all.threads == load_device("host").cores
    figures = (found.one.gflops, found.one.gb_s, found.all.gflops, found.all.gb_s, found.int8_gops)
    assert min(figures) > 0
    assert np.isfinite(figures).all()


def test_the_host_is_shown_measured_and_written_as_a_profile(tmp_path: Path) -> None:
    path = tmp_path / "box.toml"
    shown = CliRunner().invoke(command, ["host", "--write", str(path)])
    assert shown.exit_code == 0, shown.output
    assert "measured      1 thread: memory read" in shown.output
    device = load_device(str(path))
    assert (device.name, device.is_host, device.cores) == ("box", False, load_device("host").cores)
    assert (device.sustained_gflops or 0) > 0
    assert (device.sustained_bandwidth_gb_s or 0) > 0
    assert device.budget == load_device("host").budget


def test_what_was_measured_is_in_the_json_and_what_was_not_says_why() -> None:
    found = json.loads(CliRunner().invoke(command, ["host", "--json"]).output)["measured"]
    assert found["measured"] is True
    assert found["one"]["gb_s"] > 0
    assert found["bf16_gflops"] is None
    assert "bf16" in found["bf16_why"]


@pytest.mark.parametrize(
    "arguments",
    [["host", "--write", "host.toml"], ["host", "--write", "box"], ["--write", "box.toml"]],
)
def test_a_profile_that_could_not_be_used_is_not_written(arguments: list[str]) -> None:
    assert isinstance(CliRunner().invoke(command, arguments).exception, DeviceError)
    assert not Path(arguments[-1]).exists()
