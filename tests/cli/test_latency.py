"""Latency: percentiles and verdicts are right, undecided is said, an estimate is labelled; the
child measures.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from runtime_helpers import decoder_bundle, encoder_bundle

from edgetune.cli import main
from edgetune.core.errors import EdgetuneError
from edgetune.core.memory import peak_rss_mb
from edgetune.devices import load_device
from edgetune.runtime.check.latency import Workload, measure_latency, synthetic_ids
from edgetune.runtime.check.projection import FORMULA
from edgetune.runtime.check.verdict import Verdict, judge, overall, percentile, summary


def test_percentiles_are_those_of_numpy_and_lie_in_their_interval() -> None:
    groups = np.random.default_rng(0).gamma(2.0, size=(20, 16)).tolist()
    for p in (50, 90, 95, 99):
        found = percentile(groups, p)
        assert found.value == pytest.approx(np.percentile(groups, p))
        assert found.low <= found.value <= found.high
    assert summary(groups)["p95"] == percentile(groups, 95).value


def test_the_interval_covers_the_true_median_about_as_often_as_it_says() -> None:
    rng, hits = np.random.default_rng(1), 0
    for _ in range(30):
        found = percentile([[x] for x in rng.normal(10, 1, 30)], 50)
        hits += found.low <= 10 <= found.high
    assert 25 <= hits <= 30


def measured(tpot: list[list[float]], **figures: Any) -> dict[str, Any]:
    runs = [{"adapter": "a", "tpot_ms": tpot}]
    return {
        "load_ms": 100.0,
        "adapter_load_ms": {},
        **figures,
        "samples": {"runs": runs, "swap_ms": []},
    }


STEADY = [[10.0, 10.1, 9.9, 10.0]] * 8
HOST = load_device("host")


@pytest.mark.parametrize(("limit", "state"), [(12, "ok"), (9, "over"), (10.1, "ok")])
def test_a_steady_measurement_decides(limit: float, state: str) -> None:
    assert judge(measured(STEADY), {"tpot_ms": limit}, device=HOST)[0].state == state


def test_a_limit_inside_the_interval_is_too_noisy_to_tell() -> None:
    rng = np.random.default_rng(0)
    noisy = rng.uniform(1, 30, (6, 8)).tolist()
    assert judge(measured(noisy), {"tpot_ms": 28}, device=HOST)[0].state == "noisy"


def test_tokens_per_second_is_a_lower_limit() -> None:
    verdicts = judge(measured(STEADY), {"tokens_per_s": 90}, device=HOST)
    assert (verdicts[0].state, verdicts[0].value) == ("ok", pytest.approx(100))
    assert judge(measured(STEADY), {"tokens_per_s": 110}, device=HOST)[0].state == "over"


def test_limits_on_what_a_bundle_does_not_do_are_left_out() -> None:
    assert (
        judge(measured(STEADY), {"request_ms": 1, "swap_ms": 1, "peak_rss_mb": 1}, device=HOST)
        == []
    )


def test_one_exceeded_limit_outweighs_an_undecided_one() -> None:
    def verdict(state: str) -> Verdict:
        return Verdict("ttft_ms", None, 1, 1, 1, 1, state, "measured")

    assert overall([verdict("ok"), verdict("noisy"), verdict("over")]) == "over"
    assert overall([verdict("ok"), verdict("noisy")]) == "noisy"
    assert overall([]) == "ok"


def test_synthetic_ids_avoid_special_tokens_and_repeat() -> None:
    ids = synthetic_ids(500, 10, avoid=[0, 2], seed=1)
    assert set(ids) <= {1, 3, 4, 5, 6, 7, 8, 9}
    assert ids == synthetic_ids(500, 10, avoid=[0, 2], seed=1)


def test_a_fresh_process_measures_both_adapters(tiny_decoder: Path) -> None:
    result = measure_latency(Workload(str(decoder_bundle(tiny_decoder)), ("a", "b"), 2, 3, 20, 5))
    assert [row["adapter"] for row in result["adapters"]] == ["a", "b"]
    run = result["samples"]["runs"][0]
    assert [len(run["ttft_ms"]), [len(steps) for steps in run["tpot_ms"]]] == [3, [4, 4, 4]]
    assert 20 < result["peak_rss_mb"] < peak_rss_mb()  # the child has no torch, this process has
    assert set(result["adapter_load_ms"]) == {"a", "b"}
    assert len(result["samples"]["swap_ms"]) > 10


def test_what_the_child_refuses_is_raised_here(tmp_path: Path) -> None:
    with pytest.raises(EdgetuneError, match=r"no edgetune\.json in this folder"):
        measure_latency(Workload(str(tmp_path)))


def check(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["check", *map(str, arguments), "--runs", "3", "--threads", "2"])
    return int(stop.value.code or 0)


def test_check_writes_json_and_junit_and_exits_by_the_verdict(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    bundle, document, junit = decoder_bundle(tiny_decoder), tmp_path / "c.json", tmp_path / "c.xml"
    loose = [
        "--budget",
        "ttft_ms=1e6",
        "--budget",
        "tpot_ms=1e6",
        "--budget",
        "swap_ms=1e6",
        "--budget",
        "load_ms=1e6",
    ]
    assert check(bundle, *loose, "--json", document, "--junit", junit, "--prompt-tokens", 10) == 0
    found = json.loads(document.read_text())
    assert (found["state"], found["estimated"], found["budget"]["ttft_ms"]) == ("ok", False, 1e6)
    assert {v["adapter"] for v in found["verdicts"] if v["key"] == "ttft_ms"} == {"a", "b"}
    suite = ElementTree.parse(junit).getroot()
    assert (suite.tag, suite.get("failures"), suite.get("tests")) == (
        "testsuite",
        "0",
        str(len(found["verdicts"])),
    )


def test_check_exits_1_over_budget(tiny_encoder: Path, tmp_path: Path) -> None:
    bundle, junit = encoder_bundle(tiny_encoder), tmp_path / "c.xml"
    assert check(bundle, "--adapter", "mood", "--budget", "bundle_mb=0.001", "--junit", junit) == 1
    failed = [
        case.get("name")
        for case in ElementTree.parse(junit).getroot()
        if case.find("failure") is not None
    ]
    assert failed == ["bundle_mb"]


def test_check_says_when_its_verdict_is_an_estimate_and_how_good_it_is(
    tiny_decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, document = decoder_bundle(tiny_decoder), tmp_path / "c.json"
    check(bundle, "--device", "raspberry-pi-5", "--json", document, "--prompt-tokens", 16)
    found = json.loads(document.read_text())
    assert (found["estimated"], found["formula"]) == (True, FORMULA)
    assert {v["basis"] for v in found["verdicts"] if v["key"] == "tpot_ms"} == {"estimate"}
    points = [(one["threads"], one["prompt_tokens"]) for one in found["projection"]["points"]]
    assert points == [(2, 16), (1, 16), (1, 4), (2, 4)]
    assert set(found["projection"]["held_out"]["errors"]) == {"ttft_ms", "tpot_ms"}
    said = capsys.readouterr().out
    assert "ESTIMATES" in said
    assert "Held out here (2 threads, prompt of 4)" in said


def test_check_names_an_unknown_adapter(
    tiny_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(encoder_bundle(tiny_encoder), "--adapter", "zz") == 2
    assert "unknown adapter 'zz' (expected intent, mood)" in capsys.readouterr().err
