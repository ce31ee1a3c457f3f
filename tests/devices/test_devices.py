"""Device profiles: every figure has a source, every mistake in one is named, and the host describes
itself.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgetune.cli.devices import command
from edgetune.core.errors import DeviceError
from edgetune.devices import host, list_devices, load_device, parse_budget, probe_host
from edgetune.devices.budget import budget_keys, timed_key
from edgetune.devices.host import cpu_quota, threads_to_ask_for
from edgetune.devices.loader import FIGURES, device_from_dict

OTHERS = [name for name in list_devices() if name != "host"]


def test_the_promised_profiles_are_there() -> None:
    assert list_devices()[0] == "host"
    assert {"raspberry-pi-5", "jetson-orin-nano", "desktop-x86"} <= set(list_devices())


@pytest.mark.parametrize("name", OTHERS)
def test_every_figure_has_a_source_with_a_page_and_what_it_says(name: str) -> None:
    device = load_device(name)
    sourced = {figure for source in device.sources for figure in source.figures}
    assert set(FIGURES) <= sourced
    assert all(source.url.startswith("http") and len(source.read) > 20 for source in device.sources)


@pytest.mark.parametrize("name", list_devices())
def test_every_profile_limits_both_kinds_of_model(name: str) -> None:
    device = load_device(name)
    assert {"ttft_ms", "tpot_ms", "peak_rss_mb", "load_ms", "bundle_mb"} <= set(
        device.budget["decoder"]
    )
    assert {"request_ms", "peak_rss_mb", "load_ms", "bundle_mb"} <= set(device.budget["encoder"])


def test_the_host_is_probed() -> None:
    host, probed = load_device("host"), probe_host()
    assert host.is_host
    assert host.cores == probed["cores"] >= 1
    assert host.memory_mb is not None


def test_peak_arithmetic_is_threads_times_clock_times_flops() -> None:
    assert load_device("raspberry-pi-5").peak_gflops == pytest.approx(4 * 2.4 * 16)


@pytest.mark.parametrize(("text", "cores"), [("max 100000", None), ("150000 100000", 1.5)])
def test_a_containers_quota_is_read(text: str, cores: float | None, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert cpu_quota(tmp_path / "cpu.max") == cores


def test_an_unknown_device_names_the_nearest() -> None:
    with pytest.raises(DeviceError, match="Did you mean raspberry-pi-5"):
        load_device("rasberry-pi-5")


def changed(**changes: Any) -> dict[str, Any]:
    device = asdict(load_device("raspberry-pi-5"))
    values = {**device, "source": device.pop("sources"), **changes}
    return {k: v for k, v in values.items() if k != "sources" and v is not ...}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed(gpu="x"), 'unknown key "gpu"'),
        (changed(cores=...), 'the key "cores" is missing'),
        (
            changed(cores=..., memory_mb=..., clock_ghz=...),
            'the keys "cores", "memory_mb", "clock_ghz" are missing. Add them: cores = …',
        ),
        (changed(cores=0), "cores is out of range .expected more than 0, got 0"),
        (changed(clock_ghz="fast"), 'clock_ghz has a wrong value .expected a number, got "fast"'),
        (changed(source=[]), "cores, clock_ghz, .*: no source. Add"),
        (
            changed(source=[{"url": "x"}]),
            'the keys "source.0.figures", "source.0.read" are missing',
        ),
        (changed(budget={"decoder": {"ttft": 1}}), "unknown budget key 'ttft'"),
        (changed(budget={"vision": {}}), "budgets are tables"),
        (changed(budget=3), "budgets are tables"),
        (changed(budget={"decoder": 3}), "budgets are tables"),
        (changed(features=3), "features has a wrong value .expected a list of strings, got 3"),
        (changed(title=3), "title has a wrong value .expected a string, got 3"),
    ],
)
def test_a_mistake_in_a_profile_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        device_from_dict(values, where="mine.toml")


def test_a_profile_of_ones_own_is_loaded_by_path(tmp_path: Path) -> None:
    text = (
        Path(load_device.__code__.co_filename).parent / "profiles" / "raspberry-pi-5.toml"
    ).read_text()
    (tmp_path / "mine.toml").write_text(text.replace('"raspberry-pi-5"', '"mine"'))
    assert load_device(str(tmp_path / "mine.toml")).name == "mine"
    with pytest.raises(DeviceError, match="cannot be read"):
        load_device(str(tmp_path / "gone.toml"))


def test_budgets_on_the_command_line() -> None:
    assert parse_budget(["ttft_ms=500", "tpot_p99_ms = 20.5"]) == {
        "ttft_ms": 500,
        "tpot_p99_ms": 20.5,
    }
    assert set(budget_keys()) >= {
        "ttft_ms",
        "ttft_p50_ms",
        "request_p99_ms",
        "swap_ms",
        "tokens_per_s",
    }
    assert timed_key("ttft_ms") == ("ttft", 95)


@pytest.mark.parametrize(
    "pair",
    [
        "ttft_ms",
        "ttft_ms=fast",
        "speed=3",
        "ttft_ms=0",
        "ttft_ms=nan",
        "ttft_ms=inf",
        "ttft_p42_ms=3",
    ],
)
def test_a_wrong_budget_is_refused(pair: str) -> None:
    with pytest.raises(DeviceError):
        parse_budget([pair])


def test_the_command_lists_and_shows() -> None:
    assert "raspberry-pi-5" in CliRunner().invoke(command, []).output
    shown = CliRunner().invoke(command, ["raspberry-pi-5"]).output
    assert "17.1 GB/s" in shown
    assert "https://" in shown
    assert json.loads(CliRunner().invoke(command, ["host", "--json"]).output)["name"] == "host"


@pytest.mark.parametrize(("usable", "installed", "wanted"), [(1, 4, 1), (3, 4, 3), (4, 4, 0)])
def test_an_engine_takes_no_core_that_this_process_may_not_use(
    usable: int, installed: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "usable_cores", lambda: usable)
    monkeypatch.setattr("os.cpu_count", lambda: installed)
    assert threads_to_ask_for() == wanted
