"""`edgetune bench compare`: ratios, what else changed, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgetune.cli import main

ROUNDS = [100.0, 101.0, 99.0, 100.5, 99.5]


def results(path: Path, *, times: float = 1.0, rounds: list[float] = ROUNDS, **more: Any) -> Path:
    """A file of edgetune's decode speed `times` as high, a peer's, and a load that is taken
    once.
    """
    speed = {"figure": "decode", "unit": "tok/s", "more_is_better": True, "a_round": 1}
    measures = [
        {**speed, "title": "edgetune", "peer": False, "samples": [times * x for x in rounds]},
        {**speed, "title": "llama.cpp", "peer": True, "samples": [x / times for x in rounds]},
        {**speed, "title": "edgetune", "figure": "load", "peer": False, "samples": [0.4]},
        {**speed, "title": "edgetune", "figure": "lost", "peer": False, "samples": [-0.1, 0, 2]},
    ]
    decode = {"rounds": len(rounds), "versions": {"numpy": "2.0"}, "measures": measures}
    path.write_text(json.dumps({"host": {"cpu": "A"}, "benchmarks": {"decode": decode}} | more))
    return path


@pytest.mark.parametrize(
    ("times", "code", "said"),
    [(1.0, 0, "ok"), (1.2, 0, "ok"), (0.9, 1, "SLOWER"), (0.98, 0, "ok")],
)
def test_what_is_slower_beyond_doubt_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], times: float, code: int, said: str
) -> None:
    a, b = results(tmp_path / "a.json"), results(tmp_path / "b.json", times=times)
    with pytest.raises(SystemExit) as stop:
        main(["bench", "compare", str(a), str(b), "--json", str(tmp_path / "c.json")])
    assert stop.value.code == code
    assert capsys.readouterr().out.splitlines()[-1] == said
    (own, peer, load) = json.loads((tmp_path / "c.json").read_text())["measures"]
    assert own["ratio"] == pytest.approx(times) and own["low"] < times < own["high"]
    assert peer["peer"] and load["state"] == "too few rounds"


@pytest.mark.parametrize("rounds", [[100.0], [60.0, 100.0, 140.0]])
def test_few_or_scattered_rounds_are_too_noisy(tmp_path: Path, rounds: list[float]) -> None:
    a, b = (results(tmp_path / name, rounds=rounds) for name in ("a.json", "b.json"))
    with pytest.raises(SystemExit) as stop:
        main(["bench", "compare", str(a), str(b)])
    assert stop.value.code == 3


def test_what_else_changed_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = results(tmp_path / "a.json"), results(tmp_path / "b.json", host={"cpu": "B"})
    with pytest.raises(SystemExit):
        main(["bench", "compare", str(a), str(b)])
    assert capsys.readouterr().out.startswith("host cpu: A → B\n")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"benchmarks": {"decode": {"measures": [], "versions": [1]}}}',
        '{"benchmarks": {"decode": {"measures": [{"samples": []}]}}}',
        "not there",
    ],
)
def test_a_file_that_is_no_result_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    a, b = results(tmp_path / "a.json"), tmp_path / "b.json"
    if text != "not there":
        b.write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(["bench", "compare", str(a), str(b)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "b.json" in said


def test_files_without_a_common_measure_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = results(tmp_path / "a.json"), results(tmp_path / "b.json", benchmarks={})
    with pytest.raises(SystemExit) as stop:
        main(["bench", "compare", str(a), str(b)])
    assert stop.value.code == 2 and "no measure in common" in capsys.readouterr().err
