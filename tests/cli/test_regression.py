"""A measurement against an earlier one: a slower figure is seen, a slower machine is not; what the
machine did is told; files for people and for scripts.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from runtime_helpers import decoder_bundle

from edgetune.cli import main
from edgetune.core.errors import DeviceError
from edgetune.runtime.check.machine import (
    Conditions,
    EnergyMeter,
    Yardstick,
    busy_neighbours,
    conditions,
    notes_of,
)
from edgetune.runtime.check.regression import changes, read_baseline
from edgetune.runtime.check.sweep import parse_sweep

WORKLOAD = {"prompt_tokens": 16, "new_tokens": 8, "threads": 2, "batch": 1}


def rounds(
    seed: int, *, slower: float = 1.0, machine: float = 1.0, scatter: float = 0.01, count: int = 5
) -> list[dict[str, Any]]:
    """Rounds of 10 requests: a token takes 10 ms and the yardstick 3 on a machine of speed 1."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        mood = machine * (1 + 0.1 * rng.random())  # of this process's minute
        own = slower * mood * (1 + scatter * rng.normal())
        tokens = 10 * own * (1 + 0.05 * rng.random((10, 7)))
        beside = 3 * mood * (1 + 0.02 * rng.random(10))
        found.append(
            {
                "runs": [
                    {
                        "adapter": "a",
                        "ttft_ms": [[50.0 * own]] * 10,
                        "tpot_ms": tokens.tolist(),
                        "yardstick": {"read_ms": beside.tolist(), "product_ms": beside.tolist()},
                    }
                ]
            }
        )
    return found


def against(then: list[dict[str, Any]], now: list[dict[str, Any]], **options: Any) -> dict:
    baseline = {"workload": WORKLOAD, "measured": {"rounds": then}}
    return {one.key: one for one in changes(baseline, WORKLOAD, now, **options)}


def test_seven_per_cent_more_is_slower_and_a_slower_machine_is_not() -> None:
    for seed in range(10):
        found = against(rounds(seed), rounds(seed + 100, slower=1.07))["tpot_ms"]
        assert found.state == "slower"
        assert found.low <= found.ratio <= found.high
        same = against(rounds(seed), rounds(seed + 200, machine=1.4))["tpot_ms"]
        assert same.state == "ok"
        assert same.now_ms > 1.2 * same.before_ms
    faster = against(rounds(1), rounds(2, slower=0.8))
    assert {one.state for one in faster.values()} == {"ok"}


def test_a_measurement_that_scatters_cannot_be_told() -> None:
    for seed in range(5):
        found = against(rounds(seed, scatter=0.2), rounds(seed + 100, scatter=0.2))
        assert found["tpot_ms"].state == "noisy"
    assert against(rounds(0), rounds(1, slower=1.07), allowed=0.2)["tpot_ms"].state == "ok"


def test_other_work_and_other_files_are_refused(tmp_path: Path) -> None:
    baseline = {"workload": WORKLOAD, "measured": {"rounds": rounds(0)}}
    with pytest.raises(DeviceError, match=r"another prompt_tokens .*expected 16, got 32"):
        changes(baseline, {**WORKLOAD, "prompt_tokens": 32}, rounds(1))
    other = [{"runs": [{**run["runs"][0], "adapter": "b"}]} for run in rounds(1)]
    with pytest.raises(DeviceError, match="no figure in common"):
        changes(baseline, WORKLOAD, other)
    path = tmp_path / "base.json"
    for text in ("", "[]", "{}", '{"measured": {"rounds": [1]}, "workload": {}}'):
        path.write_text(text)
        with pytest.raises(DeviceError, match="no baseline of edgetune check"):
            read_baseline(path)
    for wrong in (0, -1, float("nan"), "x", None):
        bad = rounds(0)
        bad[1]["runs"][0]["tpot_ms"][3] = [wrong]
        path.write_text(json.dumps({"workload": WORKLOAD, "measured": {"rounds": bad}}))
        with pytest.raises(DeviceError, match="no baseline of edgetune check"):
            read_baseline(path)
    path.write_text(json.dumps({"workload": WORKLOAD, "measured": {"rounds": rounds(0, count=2)}}))
    with pytest.raises(DeviceError, match=r"too few rounds .*at least 3, got 2"):
        read_baseline(path)
    with pytest.raises(DeviceError, match="cannot be read"):
        read_baseline(tmp_path / "none.json")


def test_the_machine_is_read_where_the_system_tells(tmp_path: Path) -> None:
    def put(name: str, value: object) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")

    for core, khz in enumerate((1_500_000, 2_500_000)):
        put(f"devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq", khz)
        put(f"devices/system/cpu/cpu{core}/thermal_throttle/core_throttle_count", core)
    put("class/thermal/thermal_zone0/temp", 61_000)
    put("class/powercap/intel-rapl:0/energy_uj", 1_000_000)
    put("class/powercap/intel-rapl:0:0/energy_uj", 5)  # a part of the other
    yardstick = Yardstick(2)
    before = conditions(yardstick, system=tmp_path)
    meter = EnergyMeter(system=tmp_path)
    put("class/powercap/intel-rapl:0/energy_uj", 3_500_000)
    put("devices/system/cpu/cpu0/thermal_throttle/core_throttle_count", 4)
    after = conditions(yardstick, system=tmp_path)
    yardstick.close()
    assert (before.clock_mhz, before.throttled, before.celsius) == (2000, 1, 61)
    assert set(before.yardstick) == {"read_ms", "product_ms"}
    assert all(value > 0 for value in before.yardstick.values())
    assert (meter.source, meter.joules()) == ("RAPL", 2.5)
    put("class/powercap/intel-rapl:0/energy_uj", 10)  # the counter began again
    assert meter.joules() is None
    assert any("because of heat 4 times" in note for note in notes_of(before, after))
    assert EnergyMeter(system=tmp_path / "none").source is None


def test_a_machine_that_changed_is_said() -> None:
    before, after = (Conditions(None, None, None, {"read_ms": ms}) for ms in (2.0, 3.0))
    assert notes_of(before, before) == []
    assert notes_of(before, after) == [
        "the machine changed while it was measured: a fixed read took +50% afterwards"
    ]


def test_busy_neighbours_end_with_their_block() -> None:
    with busy_neighbours(2):
        pass


def test_check_gates_on_a_baseline(
    tiny_decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, base = decoder_bundle(tiny_decoder), tmp_path / "base.json"
    document, page, junit = (tmp_path / name for name in ("now.json", "now.md", "now.xml"))
    loose = [f"{key}=1e6" for key in ("ttft_ms", "tpot_ms", "swap_ms", "load_ms", "peak_rss_mb")]
    common = ["check", str(bundle), "--adapter", "a", "--runs", "3", "--threads", "2"]
    common += ["--prompt-tokens", "8", "--new-tokens", "4"]
    common += [word for limit in loose for word in ("--budget", limit)]

    def check(*more: object) -> int:
        with pytest.raises(SystemExit) as stop:
            main([*common, *map(str, more)])
        return int(stop.value.code or 0)

    assert check("--rounds", 3, "--json", base, "--beside", 1) == 0
    slow = json.loads(base.read_text())
    for one in slow["measured"]["rounds"]:
        for run in one["runs"]:  # as if it had been a hundred times as fast
            run["tpot_ms"] = [[ms / 100 for ms in steps] for steps in run["tpot_ms"]]
    base.write_text(json.dumps(slow))
    assert check("--against", base, "--json", document, "--markdown", page, "--junit", junit) == 1
    found = json.loads(document.read_text())
    assert found["state"] == "slower"
    assert len(found["measured"]["rounds"]) == 3
    assert {c["key"]: c["state"] for c in found["changes"]}["tpot_ms"] == "slower"
    assert page.read_text().startswith(f"### edgetune check {bundle.name} on host: SLOWER")
    assert "| tpot_ms (a) |" in page.read_text()
    failed = [
        case for case in ElementTree.parse(junit).getroot() if case.find("failure") is not None
    ]
    assert [case.get("name") for case in failed][:1] == ["tpot_ms (a) against the baseline"]
    assert "SLOWER" in capsys.readouterr().out


def test_a_sweep_measures_every_combination(
    tiny_decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, document = tmp_path / "sweep.html", tmp_path / "sweep.json"
    words = ["check", str(decoder_bundle(tiny_decoder)), "--adapter", "a", "--runs", "3"]
    words += ["--sweep", "batch=1,3", "--sweep", "prompt=4,8,16", "--new-tokens", "3"]
    words += ["--page", str(page), "--json", str(document), "--threads", "1"]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert not stop.value.code
    points = json.loads(document.read_text())["points"]
    assert [(p["at"]["batch"], p["at"]["prompt"]) for p in points] == [
        (batch, prompt) for batch in (1, 3) for prompt in (4, 8, 16)
    ]
    assert all(p["tpot_ms"]["p50"] > 0 for p in points)
    assert page.read_text().count("<svg") == 2
    assert "batch 3, prompt 16 (a): TTFT p50" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sweep", "batch=1", "--against", "x.json"], "--sweep: .*got --against beside it"),
        (
            ["--sweep", "batch=1", "--budget", "ttft_ms=1", "--markdown", "x.md"],
            "got --budget, --markdown beside it",
        ),
        (["--page", "x.html"], "--page: a page shows a sweep"),
    ],
)
def test_what_a_sweep_would_ignore_is_refused_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["check", "no-bundle", *options])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and re.search(said, error)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["prompt"], "a sweep is axis=numbers"),
        (["prmpt=1"], "unknown axis 'prmpt'"),
        (["prompt=a"], "a value of prompt is wrong"),
        (["new=1"], "whole numbers from 2 on"),
        (["batch=1", "batch=2"], "batch is given twice"),
        (["prompt=" + ",".join(map(str, range(1, 70)))], "at most 64, got 69"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_one_line(asked: list[str], said: str) -> None:
    with pytest.raises(DeviceError, match=said):
        parse_sweep(asked)
