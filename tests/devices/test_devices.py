"""Device profiles: every figure has a source, every mistake in one is named, and the host describes
itself.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgetune.cli.devices import command
from edgetune.core.errors import DeviceError
from edgetune.core.settings import to_toml
from edgetune.devices import host, list_devices, load_device, parse_budget, probe_host
from edgetune.devices.budget import budget_keys, timed_key
from edgetune.devices.host import cpu_quota, threads_to_ask_for
from edgetune.devices.loader import FIGURES, MEASURED, device_from_dict
from edgetune.devices.template import template

OTHERS = [name for name in list_devices() if name != "host"]


def test_the_promised_profiles_are_there() -> None:
    assert list_devices()[0] == "host"
    assert set(OTHERS) == {
        *("raspberry-pi-zero-2-w", "raspberry-pi-4", "raspberry-pi-5", "jetson-orin-nano"),
        *("snapdragon-8-gen-3", "intel-n100", "apple-m2", "desktop-x86", "server-epyc-9354"),
        *("h100", "h200"),
    }


@pytest.mark.parametrize("name", OTHERS)
def test_every_figure_has_a_source_with_a_page_and_what_it_says(name: str) -> None:
    device = load_device(name)
    sourced = {figure for source in device.sources for figure in source.figures}
    assert {name for name in (*FIGURES, *MEASURED) if getattr(device, name) is not None} <= sourced
    assert all(source.url.startswith("http") and len(source.read) > 20 for source in device.sources)


@pytest.mark.parametrize("name", list_devices())
def test_every_profile_limits_both_kinds_of_model(name: str) -> None:
    device = load_device(name)
    assert {"ttft_ms", "tpot_ms", "peak_rss_mb", "load_ms", "bundle_mb"} <= set(
        device.budget["decoder"]
    )
    assert {"request_ms", "peak_rss_mb", "load_ms", "bundle_mb"} <= set(device.budget["encoder"])


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_sustained_lies_below_what_is_on_paper_or_is_said_to_be_unknown(name: str) -> None:
    device = load_device(name)
    peak, sustained = device.memory_bandwidth_gb_s, device.sustained_bandwidth_gb_s
    if peak is None or sustained is None:
        assert "No page was found" in device.notes
    else:
        assert 0.5 * peak < sustained < peak


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
    return {k: v for k, v in values.items() if k != "sources" and v is not ...}  # ...: left out


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed(gpu="x"), 'unknown key "gpu"'),
        (changed(cores=...), 'the key "cores" is missing'),
        (
            changed(cores=..., memory_mb=..., clock_ghz=...),
            'the keys "cores", "memory_mb", "clock_ghz" are missing. Add them: cores = …',
        ),
        (
            changed(cores=..., source=[{"url": "x"}, {"figures": ["cores"]}], gpu="x"),
            "4 mistakes in a profile:(\n  .*)*unknown key(.*\n)*.*source 1: .*(.*\n)*.*source 2: ",
        ),
        (changed(source=3), "source has a wrong value"),
        (changed(cores=0), "cores is out of range .expected more than 0, got 0"),
        (changed(clock_ghz="fast"), 'clock_ghz has a wrong value .expected a number, got "fast"'),
        (changed(source=[]), "cores, clock_ghz, .*: no source. Add"),
        (changed(source=[{"url": "x"}]), 'source 1: the keys "figures", "read" are missing'),
        (changed(sustained_gflops=60), "sustained_gflops: no source"),
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


def test_a_profile_that_lacks_most_is_refused_once_with_everything() -> None:
    values = {"name": "mine", "title": "My board"}
    with pytest.raises(DeviceError) as refused:
        device_from_dict(values, where="mine.toml")
    wanted = ("arch", "cpu", "threads", *FIGURES)
    assert [name for name in wanted if f'"{name}"' not in str(refused.value)] == []
    assert "edgetune devices --template" in str(refused.value)


def test_what_was_measured_stands_for_what_is_on_paper() -> None:
    source = {"figures": ["cores", "memory_mb", *MEASURED], "url": "", "read": "measured"}
    values = changed(
        clock_ghz=...,
        fp32_flops_per_cycle=...,
        memory_bandwidth_gb_s=...,
        sustained_bandwidth_gb_s=11,
        sustained_gflops=60,
        source=[source],
    )
    device = device_from_dict(values, where="mine.toml")
    assert (device.sustained_bandwidth_gb_s, device.peak_gflops) == (11, None)


def test_the_template_loads_once_it_is_filled_in(tmp_path: Path) -> None:
    form = CliRunner().invoke(command, ["--template"]).output
    assert set(FIGURES) <= set(re.findall(r"^# (\w+) = ", form, re.MULTILINE))
    filled = re.sub(r"^# (features|providers) = ", r"\1 = []", form, flags=re.MULTILINE)
    filled = re.sub(r"^# notes = ", 'notes = "none"', filled, flags=re.MULTILINE)
    filled = re.sub(r"^# (\w+) = ", r"\1 = 2", filled, flags=re.MULTILINE)
    figures = json.dumps([*FIGURES, *MEASURED])
    (tmp_path / "mine.toml").write_text(filled.replace("figures = []", f"figures = {figures}"))
    device = load_device(str(tmp_path / "mine.toml"))
    assert (device.name, device.cores, device.budget["encoder"]["request_ms"]) == ("my-board", 2, 2)


def test_an_empty_template_is_refused_with_everything(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(template())
    with pytest.raises(DeviceError, match=r'"cores", "threads", "memory_mb"(.*\n)*.*no source'):
        load_device(str(tmp_path / "mine.toml"))


def test_a_profile_is_written_as_it_is_read(tmp_path: Path) -> None:
    device = load_device("raspberry-pi-5")
    (tmp_path / "pi.toml").write_text(to_toml(device))
    assert load_device(str(tmp_path / "pi.toml")) == device


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
