"""What this machine can do, measured in a second or two: memory read, and matrix products by ONNX
Runtime with as many threads as asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.devices.host import memory_mb, usable_cores
from edgetune.devices.loader import HOST, Device, FigureSource, load_device

PRODUCT = 384
"""Rows, columns and depth of a product."""
READ_MB, READ_MB_A_THREAD = 128, 16
"""Read over and over by all threads, at least: more than the caches of most machines hold."""
PIECE_MB = 4
"""Of them a thread reads so much between two looks at the clock."""
LONG_ENOUGH_S = 0.4
"""Of a measurement; at least two repeats."""
FLOAT, UINT8, INT8, INT32 = 1, 2, 3, 6
"""Types of tensors in an ONNX file (onnx.proto3, TensorProto.DataType)."""
NO_BF16 = "neither numpy nor ONNX Runtime multiplies matrices in bf16 on a processor"


@dataclass(frozen=True)
class Speed:
    """What a machine does with `threads` threads: fp32 GFLOP/s and memory read, GB/s."""

    gflops: float
    gb_s: float
    threads: int


@dataclass(frozen=True)
class HostSpeed:
    """This machine, measured: with one thread and with all that this process may use."""

    one: Speed
    all: Speed
    int8_gops: float
    """products of 8-bit numbers by all threads, multiply and add counted as two"""

    def to_dict(self) -> dict[str, Any]:
        """For JSON; bf16 is None and says why."""
        return {"measured": True, **asdict(self), "bf16_gflops": None, "bf16_why": NO_BF16}


def measure_host() -> HostSpeed:
    """Read bandwidth and products of this machine now; other processes take their share."""
    cores = usable_cores()
    one = host_speed(1)
    return HostSpeed(one, one if cores == 1 else host_speed(cores), _product(cores, UINT8, INT8))


def measured_profile(name: str, found: HostSpeed) -> Device:
    """This machine as a profile that any machine can load: what the system says and what was
    measured, with the host's budgets.
    """
    host = load_device(HOST)
    say = (
        f"ONNX Runtime's product of {PRODUCT} x {PRODUCT} matrices: {found.all.gflops:.1f} GFLOP/s"
        f" fp32 by {found.all.threads} threads, {found.one.gflops:.1f} by one; memory read"
        f" {found.all.gb_s:.1f} GB/s, by one {found.one.gb_s:.1f}; int8 {found.int8_gops:.1f} GOP/s"
    )
    figures = ("cores", "memory_mb", "sustained_gflops", "sustained_bandwidth_gb_s")
    return replace(
        host,
        name=name,
        title=host.cpu,
        sustained_gflops=round(found.all.gflops, 1),
        sustained_bandwidth_gb_s=round(found.all.gb_s, 1),
        notes=f"Measured by edgetune devices host on {time.strftime('%Y-%m-%d')}.",
        sources=(FigureSource(figures, "the machine itself", say),),
    )


def host_speed(threads: int | None = None) -> Speed:
    """fp32 GFLOP/s of a matrix product and GB/s read, with so many threads (None: every core that
    this process may use).
    """
    used = min(threads or usable_cores(), usable_cores())
    return Speed(_product(used, FLOAT, FLOAT), _read(used), used)


def _read(threads: int) -> float:
    """GB/s of summing 64-bit integers, each thread its own, all at once: the sum over threads of a
    piece by the median of its times, so what another process takes from a few pieces is left out.
    """
    mb = min(max(READ_MB, READ_MB_A_THREAD * threads), (memory_mb() or 8 * READ_MB) // 8)
    piece = PIECE_MB << 17  # integers
    parts = [np.ones(max(1, mb // PIECE_MB // threads) * piece, np.int64) for _ in range(threads)]
    end = time.perf_counter() + LONG_ENOUGH_S

    def read(part: npt.NDArray[np.int64]) -> float:
        took: list[float] = []
        while len(took) < 2 or time.perf_counter() < end:
            for at in range(0, len(part), piece):
                start = time.perf_counter()
                part[at : at + piece].sum()
                took.append(time.perf_counter() - start)
        return 8 * piece / float(np.median(took)) / 1e9

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(read, parts))


def _product(threads: int, left: int, right: int) -> float:
    """Thousand millions of operations a second of one product of two square matrices."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    graph = _graph("MatMul" if left == FLOAT else "MatMulInteger", left, right)
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    kind = np.float32 if left == FLOAT else np.uint8
    values = np.random.default_rng(0).integers(0, 8, (PRODUCT, PRODUCT)).astype(kind)
    return 2 * PRODUCT**3 / _best(lambda: session.run(None, {"a": values})) / 1e9


def _best(call: Callable[[], object]) -> float:
    """Seconds of the fastest call, after one that is not counted."""
    call()
    found: list[float] = []
    while len(found) < 2 or sum(found) < LONG_ENOUGH_S:
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def _graph(operator: str, left: int, right: int) -> bytes:
    """An ONNX file with one product: input a times a constant b (onnx.proto3 gives the numbers of
    the fields).
    """
    kind = np.float32 if right == FLOAT else np.int8
    constant = np.random.default_rng(1).integers(-8, 8, (PRODUCT, PRODUCT)).astype(kind)
    b = (
        b"".join(_number(1, PRODUCT) for _ in range(2))
        + _number(2, right)
        + _bytes(8, b"b")
        + _bytes(9, constant.tobytes())
    )
    node = b"".join(_bytes(1, name) for name in (b"a", b"b"))
    node += _bytes(2, b"c") + _bytes(4, operator.encode())
    graph = _bytes(1, node) + _bytes(2, b"product") + _bytes(5, b)
    graph += _bytes(11, _value(b"a", left))
    graph += _bytes(12, _value(b"c", FLOAT if left == FLOAT else INT32))
    return _number(1, 8) + _bytes(7, graph) + _bytes(8, _number(2, 17))


def _value(name: bytes, kind: int) -> bytes:
    """A tensor's name, type and shape."""
    shape = b"".join(_bytes(1, _number(1, PRODUCT)) for _ in range(2))
    return _bytes(1, name) + _bytes(2, _bytes(1, _number(1, kind) + _bytes(2, shape)))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """Seven bits a byte, the low ones first; the high bit says that more follow."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])
