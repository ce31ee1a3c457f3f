"""A device that is not here: bytes and operations explain what was measured, what is held out is
predicted, and the estimate is no closer than its error.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from edgetune.devices import load_device
from edgetune.devices.loader import Device
from edgetune.runtime.check.host import Speed
from edgetune.runtime.check.projection import (
    ACHIEVABLE,
    UNCERTAINTY,
    Configuration,
    Projection,
    Work,
    configuration,
    reachable,
)
from edgetune.runtime.check.verdict import judge

ONE, TWO = Speed(gflops=100, gb_s=25, threads=1), Speed(gflops=200, gb_s=40, threads=2)
PI = load_device("raspberry-pi-5")


def made_configuration(
    speed: Speed, tokens: int, a: float, b: float, *, off: float = 1.0
) -> Configuration:
    """A machine whose steps take a · bytes / bandwidth + b · operations / arithmetic seconds."""
    work = {
        "tpot_ms": Work(100e6 + 50e3 * tokens, 270e6 + 70e3 * tokens),
        "ttft_ms": Work(100e6, 270e6 * tokens),
    }
    seconds = {
        key: off * (a * one.seconds(speed)[0] + b * one.seconds(speed)[1])
        for key, one in work.items()
    }
    return Configuration(speed.threads, tokens, speed, work, seconds)


def made(a: float, b: float, *, off: float = 1.0) -> Projection:
    points = [made_configuration(TWO, 256, a, b), made_configuration(ONE, 256, a, b)]
    points += [made_configuration(ONE, 64, a, b), made_configuration(TWO, 64, a, b, off=off)]
    return Projection(tuple(points))


@pytest.mark.parametrize(("a", "b"), [(1.3, 2.0), (1.3, 0.0), (0.0, 2.0)])
def test_what_is_held_out_is_predicted_from_the_other_configurations(a: float, b: float) -> None:
    held_out = made(a, b).held_out
    assert held_out is not None
    assert (held_out.threads, held_out.prompt_tokens) == (2, 64)
    assert held_out.errors == pytest.approx({"tpot_ms": 0.0, "ttft_ms": 0.0}, abs=1e-6)


def test_a_configuration_that_took_longer_than_predicted_is_said_and_widens_the_estimate() -> None:
    found = made(1.3, 2.0, off=2.0)
    assert found.held_out is not None
    assert found.held_out.errors["tpot_ms"] == pytest.approx(-0.5)
    assert found.spread == pytest.approx(2.0)
    assert made(1.3, 2.0).spread == UNCERTAINTY


def other(name: str, gflops: float, gb_s: float, threads: int) -> Device:
    return replace(
        PI, name=name, sustained_gflops=gflops, sustained_bandwidth_gb_s=gb_s, threads=threads
    )


def test_a_device_with_half_the_bandwidth_doubles_what_reading_bounds() -> None:
    half = other("half", gflops=200, gb_s=20, threads=2)
    assert made(1.3, 0.0).factor("tpot_ms", half) == pytest.approx(2.0)
    assert made(0.0, 1.3).factor("tpot_ms", half) == pytest.approx(1.0)
    assert made(1.3, 0.0).factor("tokens_per_s", half) == pytest.approx(0.5)
    assert 1 < (made(1.3, 2.0).factor("ttft_ms", half) or 0) < 1.1


def test_this_machine_projected_onto_itself_is_what_was_measured() -> None:
    same = other("same", TWO.gflops, TWO.gb_s, 2)
    keys = ("ttft_ms", "tpot_p50_ms", "load_ms", "swap_ms", "tokens_per_s", "adapter_load_ms")
    assert [made(1.3, 2.0).factor(key, same) for key in keys] == pytest.approx([1.0] * len(keys))


def test_loads_and_swaps_follow_one_thread_and_memory_stays() -> None:
    wide = other("wide", gflops=400, gb_s=40, threads=8)  # 50 GFLOP/s a thread, here 100
    assert made(1.0, 1.0).factor("load_ms", wide) == pytest.approx(2.0)
    assert made(1.0, 1.0).factor("swap_ms", wide) == pytest.approx(2.0)
    assert made(1.0, 1.0).factor("peak_rss_mb", wide) is None


def test_one_configuration_alone_gives_an_estimate_without_a_known_error() -> None:
    alone = Projection((made_configuration(TWO, 256, 1.3, 2.0),))
    assert alone.held_out is None
    assert alone.factor("tpot_ms", other("same", TWO.gflops, TWO.gb_s, 2)) == pytest.approx(1.0)


def test_what_a_profile_says_is_sustained_stands_before_its_peak() -> None:
    assert reachable(PI) == Speed(4 * 2.4 * 16 * ACHIEVABLE, 11.4, 4)
    on_paper = replace(PI, sustained_bandwidth_gb_s=None)
    assert reachable(on_paper) == Speed(4 * 2.4 * 16 * ACHIEVABLE, 17.1 * ACHIEVABLE, 4)
    assert reachable(load_device("host")) is None


def test_a_measurement_becomes_a_point_with_its_bytes_and_operations() -> None:
    from edgetune.runtime.check.latency import Workload

    facts = {"batch": 1, "prompt_tokens": 10, "weights": 1000, "weight_bytes": 500, "layers": 2}
    facts |= {"hidden_size": 8, "cache_bytes_a_token": 32}
    run: dict[str, Any] = {
        "adapter": None,
        "ttft_ms": [[5.0], [4.0]],
        "tpot_ms": [[1.0, 3.0], [2.0]],
    }
    found = configuration(Workload("x", threads=1), {"samples": {"runs": [run]}, "work": facts})
    assert found.work["tpot_ms"] == Work(500 + 320, 2 * 1000 + 4 * 2 * 8 * 10)
    assert found.work["ttft_ms"] == Work(500, 10 * (2 * 1000 + 2 * 2 * 8 * 10))
    assert found.seconds == pytest.approx({"ttft_ms": 0.004, "tpot_ms": 0.001})


STEADY = {"samples": {"runs": [{"adapter": "a", "tpot_ms": [[10.0, 10.1]] * 8}], "swap_ms": []}}


def test_an_estimate_is_scaled_labelled_and_as_wide_as_its_error() -> None:
    half = other("half", gflops=200, gb_s=20, threads=2)
    limits = {"tpot_ms": 60.0, "peak_rss_mb": 100.0}
    values = {**STEADY, "peak_rss_mb": 80.0}
    found = judge(values, limits, device=half, projection=made(1.3, 0.0))
    assert [(v.basis, v.state) for v in found] == [("estimate", "ok"), ("measured", "ok")]
    assert found[0].value == pytest.approx(20.2, rel=0.01)
    assert found[0].high == pytest.approx(20.2 * UNCERTAINTY, rel=0.01)
    assert judge(values, {"tpot_ms": 22.0}, device=half, projection=made(1.3, 0.0))[0].state == (
        "noisy"
    )


def test_a_gpu_is_not_estimated_from_a_processor() -> None:
    limits = {"tpot_ms": 9.0, "bundle_mb": 10.0}
    values = {**STEADY, "bundle_mb": 9.0}
    found = judge(values, limits, device=load_device("h100"), projection=made(1.0, 1.0))
    assert [(v.key, v.basis) for v in found] == [("bundle_mb", "measured")]
