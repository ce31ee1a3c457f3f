"""Can a pull request be stopped by `edgetune check`? Its verdicts and alarms, over and over.

    python benchmarks/check_gate.py verdicts BUNDLE [--runs 10] [--pause 180]
    python benchmarks/check_gate.py alarms BUNDLE [--runs 20] [--planted 10] [--slower 1.05]
    python benchmarks/check_gate.py projection BUNDLE [--runs 5] [--device raspberry-pi-5]

`verdicts`: a first run's medians, then runs with budgets 10 % above and below them, and how often
the interval of a run's p95 covers the next run's p95. `alarms`: a baseline, then runs against it,
as they are and with every decode step made longer by a busy wait, in turns. `projection`: how far
off the configuration is that was held out. Each prints a line a run, and one JSON line at the end.
Words after `--` go to `edgetune check`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.runtime.check.report import overall_state

FIGURES = ("ttft", "tpot")
SITE = '''"""Decode steps of the native engine, each made longer by a share; for one benchmark."""
import importlib.abc, importlib.util, os, sys, time

SLOWER = float(os.environ["SLOWER"])


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "edgetune.runtime.engine.native.decoder":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def with_wait(module):
            run(module)
            plain = module.NativeState.step

            def step(self, tokens):
                start = time.perf_counter()
                found = plain(self, tokens)
                until = start + (time.perf_counter() - start) * SLOWER
                while time.perf_counter() < until:
                    pass
                return found

            module.NativeState.step = step

        spec.loader.exec_module = with_wait
        return spec


sys.meta_path.insert(0, Finder())
'''
"""`sitecustomize.py` of the processes that are to be slower."""


def check(words: Sequence[str], *, slower: float = 1.0) -> tuple[int, dict[str, Any], float]:
    """(exit code, what --json wrote, seconds) of `edgetune check WORDS`."""
    with tempfile.TemporaryDirectory() as work:
        out, environment = Path(work) / "found.json", dict(os.environ)
        if slower > 1:
            (Path(work) / "sitecustomize.py").write_text(SITE, encoding="utf-8")
            places = [work, environment.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
            environment["SLOWER"] = str(slower)
        command = [sys.executable, "-m", "edgetune", "check", *words, "--json", str(out)]
        start = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        taken = time.monotonic() - start
        if not out.is_file():
            raise SystemExit(done.stderr)
        return done.returncode, json.loads(out.read_text(encoding="utf-8")), taken


def p95(found: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Figure → p95 and the interval that check gives it."""
    return {
        one["key"]: (one["value"], one["low"], one["high"])
        for one in found["verdicts"]
        if one["key"].endswith("_p95_ms")
    }


def verdicts(bundle: str, more: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Budgets 10 % above and below the first run's medians; who covers whom."""
    probes = [word for key in FIGURES for word in ("--budget", f"{key}_p95_ms=1e9")]
    _, first, _ = check([bundle, *more, *probes])
    medians = {key: _median(first, key) for key in FIGURES}
    above, below = (
        [w for key, m in medians.items() for w in ("--budget", f"{key}_p50_ms={m * share:.4f}")]
        for share in (1.1, 0.9)
    )
    states: dict[str, list[str]] = {f"{key} {side}": [] for key in FIGURES for side in "+-"}
    seen = list[dict[str, tuple[float, float, float]]]()
    for number in range(options.runs):
        if number:
            time.sleep(options.pause)
        line = []
        for side, budget in (("+", above), ("-", below)):
            _, found, _ = check([bundle, *more, *budget, *(probes if side == "+" else [])])
            for one in found["verdicts"]:
                name = f"{one['key'].removesuffix('_p50_ms')} {side}"
                if name in states:
                    states[name].append(one["state"])
                    line.append(f"{name} {one['value']:.3f} {one['state']}")
            if side == "+":
                seen.append(p95(found))
        print(f"run {number}: {'  '.join(line)}", flush=True)
    pairs = list(itertools.pairwise(seen))
    covers = {
        key: sum(old[key][1] <= new[key][0] <= old[key][2] for old, new in pairs)
        for key in (seen[0] if seen else ())
    }
    counted = {name: dict(Counter(found)) for name, found in states.items()}
    return {"medians": medians, "states": counted, "covers": covers, "pairs": len(pairs)}


def _median(found: dict[str, Any], key: str) -> float:
    """Of all samples of the first adapter."""
    groups = found["measured"]["samples"]["runs"][0][f"{key}_ms"]
    return float(np.median(np.concatenate([np.asarray(group) for group in groups])))


def alarms(bundle: str, more: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Runs against a baseline, as they are and slower."""
    with tempfile.TemporaryDirectory() as work:
        baseline = Path(work) / "baseline.json"
        _, first, taken = check([bundle, *more, "--rounds", str(options.rounds)])
        baseline.write_text(json.dumps(first), encoding="utf-8")
        print(f"baseline: {taken:.0f} s", flush=True)
        states: dict[str, list[str]] = {"as it is": [], "slower": []}
        seconds = [taken]
        for number in range(max(options.runs, options.planted)):
            for name, runs, slower in (
                ("as it is", options.runs, 1.0),
                ("slower", options.planted, options.slower),
            ):
                if number >= runs:
                    continue
                words = [bundle, *more, "--against", str(baseline)]
                _, found, taken = check(words, slower=slower)
                states[name].append(overall_state([one["state"] for one in found["changes"]]))
                seconds.append(taken)
                ratios = "  ".join(
                    f"{one['key']} {one['ratio']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"
                    f" {one['state']}"
                    for one in found["changes"]
                )
                print(f"{name:8} {states[name][-1]}  {taken:.0f} s  {ratios}", flush=True)
    counted = {name: dict(Counter(found)) for name, found in states.items()}
    return {"slower_by": options.slower, "states": counted, "longest_s": max(seconds)}


def projection(bundle: str, more: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """The errors of the configuration that was held out."""
    errors: dict[str, list[float]] = {}
    for _ in range(options.runs):
        _, found, _ = check([bundle, *more, "--device", options.device])
        held_out = found["projection"]["held_out"]
        for key, error in held_out["errors"].items():
            errors.setdefault(key, []).append(error)
        print(json.dumps(held_out), flush=True)
    return {"errors": errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", choices=("verdicts", "alarms", "projection"))
    parser.add_argument("bundle")
    parser.add_argument("--runs", type=int)
    parser.add_argument("--pause", type=float, default=180.0, help="seconds between verdicts")
    parser.add_argument("--planted", type=int, default=10)
    parser.add_argument("--slower", type=float, default=1.05)
    parser.add_argument("--rounds", type=int, default=15, help="fresh processes of a run")
    parser.add_argument("--device", default="raspberry-pi-5")
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:at])
    section = {"verdicts": verdicts, "alarms": alarms, "projection": projection}[options.section]
    options.runs = options.runs or {"verdicts": 10, "alarms": 20, "projection": 5}[options.section]
    print(json.dumps(section(options.bundle, words[at + 1 :], options)))


if __name__ == "__main__":
    main()
