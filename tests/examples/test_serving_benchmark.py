"""The serving benchmark on the tiny bundle: its checks can fail, both ways answer in full, its
tables are complete.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from runtime_helpers import decoder_bundle
from server_helpers import serve

from edgetune.runtime import Runtime
from edgetune.runtime.scheduler.scheduler import Scheduler

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import serving
import serving_adapters
import serving_checks
import serving_clients
import serving_load
import serving_soak


@pytest.fixture(scope="module")
def library(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serving-adapters")
    with Runtime.open(decoder_bundle(tiny_decoder), threads=1) as runtime:
        serving_adapters.make_adapters(folder, runtime.manifest, 3, strength=serving_soak.STRENGTH)
    return folder


@pytest.fixture(scope="module")
def runtime(tiny_decoder: Path, library: Path) -> Iterator[Runtime]:
    with Runtime.open(decoder_bundle(tiny_decoder), threads=1, adapter_folder=library) as opened:
        yield opened


def test_no_other_adapter_answers_a_check(runtime: Runtime) -> None:
    names = ["a0", "a1", "a2"]
    found = serving_checks.find_checks(runtime, names)
    assert all(found.values())
    for name, checks in found.items():
        for check in checks:
            own = serving_checks.greedy(runtime, name, check.ids)[0][: check.new]
            assert serving_checks.text_of(runtime, name, check.ids, own) == check.text
            for other in (*(n for n in names if n != name), None):
                assert serving_checks.greedy(runtime, other, check.ids)[0][: check.new] != own


def test_equal_adapters_have_no_checks(runtime: Runtime, library: Path) -> None:
    runtime.load_adapter("twin", library / "a0")
    with pytest.raises(SystemExit, match="'a0', 'twin'"):
        serving_checks.find_checks(runtime, ["a0", "twin"], tries=4)
    runtime.unload_adapter("twin")


def test_the_soak_counts_right_and_wrong_answers_of_a_real_server(
    tiny_decoder: Path, runtime: Runtime, library: Path
) -> None:
    checks = serving_checks.find_checks(runtime, ["a0", "a1"], each=1)
    with serve(decoder_bundle(tiny_decoder), adapter_folders=(library,)) as running:
        for name in checks:
            running.runtime.load_adapter(name, library / name)
        server = serving_load.Server(None, running.http.base_url.port, library)  # type: ignore[arg-type]
        load = serving_clients.Load(server, checks, vocabulary=352, context=256)
        for seed in range(8):
            load.check(random.Random(seed), checks["a0"][0])
            load.malformed(random.Random(seed))
            load.vanish(random.Random(seed))
            load.long(random.Random(seed))
            load.structured(random.Random(seed))
        load._churn_once("hot", random.Random(0))
        assert not load.examples, load.examples
        assert load.seen["right"] == 8 + 3
        load.check(random.Random(0), checks["a0"][0], model="a1")
        assert load.seen["wrong, another adapter's"] == 1
        assert serving_clients.left_running(load) == 0


def test_both_ways_answer_with_all_tokens(
    tiny_decoder: Path, runtime: Runtime, library: Path
) -> None:
    jobs = [
        serving_load.Job(name, [20, 21, 22 + i], 12, at=0.01 * i)
        for i, name in enumerate(("a0", None, "a1"))
    ]
    with Scheduler(runtime) as scheduler:
        answers = serving_load.by_python(scheduler, jobs)
    with serve(decoder_bundle(tiny_decoder), model_name="base") as running:
        for name in ("a0", "a1"):
            running.runtime.load_adapter(name, library / name)
        answers += serving_load.by_http(
            running.http.base_url.port or 0, jobs, serving_load.no_end(runtime)
        )
    assert [answer.tokens for answer in answers] == [12] * 6
    assert all(answer.first > 0 and answer.first <= answer.end for answer in answers)


def test_tables_say_what_was_measured_and_json_comes_last(
    tiny_decoder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    size = (
        "--threads 1 --rounds 1 --prompt 4 --new 4 --samples 10 --adapters 12"
        " --adapter-memory-mb 0.3"
    )
    command = [
        "serving.py",
        "streams",
        "swap",
        "--bundle",
        str(decoder_bundle(tiny_decoder)),
        *size.split(),
    ]
    monkeypatch.setattr(sys, "argv", command)
    serving.main()
    lines = capsys.readouterr().out.splitlines()
    results = json.loads(lines[-1])["results"]
    assert len(
        [line for line in lines if line.startswith("| ") and "| measure |" not in line]
    ) == sum(map(len, results.values()))
    assert results["streams"]["onnxruntime: 8 streams, 8 adapters, with prompts"] > 0
    assert any("12 adapters registered" in title for title in results["swap"])


def test_a_value_is_held_to_its_bound() -> None:
    row = serving_load.Row
    assert (
        row("a", 0.8, "x", 0.9, at_least=True).line().endswith("| **0.80 x** | ≥ 0.9 x: missed |")
    )
    assert row("a", 0.8, "x", 0.9).line().endswith("| **0.80 x** | ≤ 0.9 x: met |")
    assert row("a", 3.0).line() == "| a | 3 | – |"
