"""`make bench` on the tiny bundle, and the page SPEED.md that is made from its files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from runtime_helpers import decoder_bundle, engines_here

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import bench
import bench_measures
import bench_page

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_says_what_the_files_say() -> None:
    text, pictures = bench_page.rendered(ROOT / "benchmarks" / "results")
    page = (ROOT / "benchmarks" / "SPEED.md").read_text(encoding="utf-8")
    assert text == page, "python benchmarks/bench_page.py"
    there = {*(ROOT / "benchmarks" / "results").glob("*.svg")}
    assert {path: path.read_text(encoding="utf-8") for path in there} == pictures


def test_no_place_of_a_machine_is_in_the_files() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        commands = [
            command
            for found in json.loads(path.read_text())["benchmarks"].values()
            for command in found["commands"]
        ]
        assert not [command for command in commands if " /" in command or "=/" in command]


@pytest.mark.skipif("native" not in engines_here(), reason="no native engine is built here")
def test_bench_measures_a_tiny_bundle_and_says_what_is_missing(
    tiny_decoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    size = "--rounds 1 --threads 1 --prompt 16 --new 4"
    words = ["bench.py", "decode", "--decoder", str(decoder_bundle(tiny_decoder)), *size.split()]
    words += ["--peers", str(tmp_path / "none"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        bench.main()
    assert stop.value.code == 0, capsys.readouterr()
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())["benchmarks"]["decode"]
    assert found["commands"] == [
        "python benchmarks/decode.py --bundle BUNDLE --rounds 1 --threads 1 --adapter a"
        " --prompt 16 --new 4"
    ]
    assert {one["what"] for one in found["not_measured"]} == {
        "onnxruntime-genai",
        "llama-cpp-python",
    }
    active = next(one for one in found["measures"] if one["title"].startswith("decode: adapter"))
    by = {(one["title"], one["figure"]): one for one in found["measures"]}
    pair = [
        by[f"edgetune, {state} active", "decode"]["samples"][0] for state in ("adapter", "none")
    ]
    assert active["median"] == pytest.approx(pair[0] / pair[1], rel=1e-4)
    text, pictures = bench_page.rendered(tmp_path)
    assert "| onnxruntime-genai | not installed | `python3 -m venv" in text
    assert len(pictures) == 1 and "decode, tok/s" in next(iter(pictures.values()))


def test_a_benchmark_that_there_is_not_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", "decod"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "no benchmark 'decod': one of decode, serving" in capsys.readouterr().err


def test_ratios_are_taken_round_by_round_and_held_to_their_targets() -> None:
    def speed(samples: list[float]) -> bench_measures.Measure:
        return bench_measures.Measure("x", "decode", "tok/s", samples, more_is_better=True)

    made = bench_measures.ratio("own / peer", speed([2.0, 4.0, 9.0]), speed([1.0, 2.0, 3.0]), 2.5)
    assert made.samples == [2.0, 2.0, 3.0]
    assert (made.to_dict()["median"], made.to_dict()["met"]) == (2.0, False)
    assert made.to_dict()["interval"] == [2.0, 3.0]
    nested = bench_measures.Measure(
        "y", "f", "ms", [1.0, 9.0, 2.0, 3.0, 3.0, 3.0], False, a_round=3
    )
    assert nested.rounds() == [2.0, 3.0]
