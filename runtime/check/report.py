"""What `edgetune check` found, for people and for scripts: lines, Markdown for a pull request,
JUnit for CI.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from edgetune.devices.budget import PERCENTILES
from edgetune.devices.loader import Device
from edgetune.runtime.check.projection import FORMULA, HeldOut, Projection
from edgetune.runtime.check.regression import SLOWER, Against
from edgetune.runtime.check.verdict import NOISY, OK, OVER, Verdict

WORDS = {OK: "ok", OVER: "OVER", SLOWER: "SLOWER", NOISY: "too noisy to tell"}
TITLES = {"ttft_ms": "TTFT ms", "tpot_ms": "TPOT ms", "request_ms": "request ms"}


def measured_lines(measured: Mapping[str, Any]) -> Iterator[str]:
    """Engine, percentiles, loads, memory, and what is to be known of the machine."""
    yield f"engine: {measured['engine']}"
    yield f"execution providers: {_providers(measured['providers'])}"
    yield f"{'measured on this machine':28} " + " ".join(f"{f'p{p}':>9}" for p in PERCENTILES)
    for row in measured["adapters"]:
        name = row["adapter"] or "base model"
        for key, title in TITLES.items():
            if key in row:
                yield _percentiles(f"{name}: {title}", row[key])
        if "tokens_per_s" in row:
            yield f"{name + ': tokens/s':28} {row['tokens_per_s']['p50']:9.1f}"
    if measured["swap_ms"]:
        yield _percentiles("swap ms", measured["swap_ms"])
    loads = ", ".join(f"{name} {ms:.1f}" for name, ms in measured["adapter_load_ms"].items())
    yield f"load {measured['load_ms']:.0f} ms" + (f"; adapters from disk: {loads} ms" * bool(loads))
    yield (
        f"peak memory {measured['peak_rss_mb']:.0f} MB; bundle {measured['bundle_mb']:.1f} MB;"
        f" energy {_energy(measured['machine']['energy'])}"
    )
    yield _machine(measured["machine"])


def budget_lines(
    verdicts: Sequence[Verdict], device: Device, projection: Projection | None
) -> Iterator[str]:
    """Every limit beside what was found; `projection`: where the device is another machine."""
    if projection is not None and device.is_gpu:
        yield f"Measured on this machine's processor: times on {device.title} are not estimated.\n"
    elif projection is not None:
        speed, out = projection.speed, projection.held_out
        yield (
            f"The measurements are of this machine ({speed.gflops:.0f} GFLOP/s, {speed.gb_s:.0f}"
            f" GB/s with {speed.threads} threads), not of"
        )
        yield f"{device.title}; its times below are ESTIMATES: {FORMULA}."
        yield f"{_held_out(out)}\n"
    yield f"budget of {device.name}:"
    for v in verdicts:
        who = f" ({v.adapter})" if v.adapter else ""
        basis = " (estimate)" if v.basis == "estimate" else ""
        spread = "" if v.low == v.high else f" [{v.low:.3g} … {v.high:.3g}]"
        yield f"  {v.key + who:32} {v.value:10.4g}{spread} of {v.limit:g}: {WORDS[v.state]}{basis}"


def change_lines(changes: Sequence[Against], baseline: str) -> Iterator[str]:
    """Every figure beside the baseline's."""
    yield f"against {baseline} (a fixed job beside each request taken out):"
    for c in changes:
        who = f" ({c.adapter})" if c.adapter else ""
        yield (
            f"  {c.key + who:32} {c.ratio:6.3f} x [{c.low:.3f} … {c.high:.3f}],"
            f" {c.before_ms:.3g} → {c.now_ms:.3g} ms: {WORDS[c.state]}"
        )


def markdown(
    measured: Mapping[str, Any],
    verdicts: Sequence[Verdict],
    changes: Sequence[Against],
    *,
    title: str,
    state: str,
) -> str:
    """A comment for a pull request: the verdict first, then tables."""
    lines = [f"### {title}: {WORDS[state]}", ""]
    if changes:
        lines += ["| against the baseline | ratio | 98 % | before ms | now ms | |"]
        lines += ["|---|---|---|---|---|---|"]
        lines += [
            f"| {_who(c.key, c.adapter)} | {c.ratio:.3f} | {c.low:.3f} … {c.high:.3f} |"
            f" {c.before_ms:.4g} | {c.now_ms:.4g} | {WORDS[c.state]} |"
            for c in changes
        ]
        lines.append("")
    if verdicts:
        lines += ["| budget | found | 95 % | limit | |", "|---|---|---|---|---|"]
        lines += [
            f"| {_who(v.key, v.adapter)} | {v.value:.4g}"
            f"{' (estimate)' if v.basis == 'estimate' else ''} | {v.low:.4g} … {v.high:.4g} |"
            f" {v.limit:g} | {WORDS[v.state]} |"
            for v in verdicts
        ]
        lines.append("")
    lines += [f"{measured['engine']}; {_machine(measured['machine'])}", ""]
    return "\n".join(lines)


def junit(verdicts: Sequence[Verdict], changes: Sequence[Against], *, bundle: str, on: str) -> str:
    """One test case a limit and a figure of the baseline: what is exceeded fails, what cannot be
    told is skipped.
    """
    cases = [
        (
            _who(v.key, v.adapter),
            v.state,
            f"{v.value:.4g} of {v.limit:g} ({v.basis}, between {v.low:.4g} and {v.high:.4g})",
        )
        for v in verdicts
    ] + [
        (
            f"{_who(c.key, c.adapter)} against the baseline",
            c.state,
            f"{c.ratio:.3f} x the baseline (between {c.low:.3f} and {c.high:.3f})",
        )
        for c in changes
    ]
    failures = sum(state in (OVER, SLOWER) for _, state, _ in cases)
    skipped = sum(state == NOISY for _, state, _ in cases)
    counts = {"tests": str(len(cases)), "failures": str(failures), "skipped": str(skipped)}
    suite = ElementTree.Element("testsuite", {"name": f"edgetune check {bundle} on {on}", **counts})
    for name, state, text in cases:
        case = ElementTree.SubElement(suite, "testcase", classname=f"{bundle}.{on}", name=name)
        if state != OK:
            tag = "skipped" if state == NOISY else "failure"
            ElementTree.SubElement(case, tag, message=text)
    ElementTree.indent(suite)
    head = '<?xml version="1.0" encoding="utf-8"?>\n'
    return head + ElementTree.tostring(suite, encoding="unicode") + "\n"


def overall_state(states: Sequence[str]) -> str:
    """The state of a whole check: exceeded, slower, too noisy to tell, or ok."""
    return next((state for state in (OVER, SLOWER, NOISY) if state in states), OK)


def _who(key: str, adapter: str | None) -> str:
    return f"{key} ({adapter})" if adapter else key


def _held_out(found: HeldOut | None) -> str:
    """How good the same prediction was where the truth is known."""
    if found is None:
        return "Its error is not known: one configuration only was measured here."
    errors = ", ".join(
        f"{figure.removesuffix('_ms')} {error:+.0%}" for figure, error in found.errors.items()
    )
    threads = "1 thread" if found.threads == 1 else f"{found.threads} threads"
    return (
        f"Held out here ({threads}, prompt of {found.prompt_tokens}) and predicted from the other"
        f" configurations: off by {errors}."
    )


def _percentiles(label: str, row: Mapping[str, float]) -> str:
    return f"{label:28} " + " ".join(f"{row[f'p{p}']:9.3f}" for p in PERCENTILES)


def _providers(found: Mapping[str, Any]) -> str:
    """Which ran the graph, with the nodes each had where ONNX Runtime tells."""
    nodes = found["nodes"]
    return ", ".join(
        f"{name} ({nodes.get(name, 0)} nodes)" if nodes else name for name in found["in_use"]
    )


def _energy(found: Mapping[str, Any]) -> str:
    if found["source"] is None:
        return "not readable here"
    return (
        f"{found['joules_per_request']:.3g} J a request, {found['joules_per_token']:.3g} J a token"
        f" ({found['source']})"
    )


def _machine(machine: Mapping[str, Any]) -> str:
    """Clock, heat and how steady the machine was, on one line."""
    before, after = machine["before"], machine["after"]
    parts = []
    if after["clock_mhz"] is not None:
        parts.append(f"clock {before['clock_mhz'] or 0:.0f} → {after['clock_mhz']:.0f} MHz")
    if after["celsius"] is not None:
        parts.append(f"{after['celsius']:.0f} °C")
    for job, took in before["yardstick"].items():
        change = after["yardstick"][job] / took - 1
        parts.append(f"fixed {job.removesuffix('_ms')} {took:.2f} ms, {change:+.0%} afterwards")
    return "machine: " + "; ".join([*parts, *machine["notes"]])
