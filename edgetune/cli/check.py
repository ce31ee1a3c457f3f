"""`edgetune check`: latency and memory of a bundle against a device's budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import click

from edgetune.cli.options import THREADS, chosen_providers, engine_option, provider_option

if TYPE_CHECKING:
    from edgetune.devices.loader import Device
    from edgetune.runtime.check.latency import Workload
    from edgetune.runtime.check.verdict import Speed, Verdict


EXIT = {"ok": 0, "over": 1, "noisy": 3}
WORDS = {"ok": "ok", "over": "OVER", "noisy": "too noisy to tell"}


@click.command("check")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--device",
    "device_name",
    default="host",
    show_default=True,
    help="A profile's name, or a .toml of yours.",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    help="Measure with this adapter; may be given several times.",
)
@click.option(
    "--budget",
    "limits",
    multiple=True,
    metavar="KEY=LIMIT",
    help="Set or replace a limit, as ttft_ms=500.",
)
@click.option(
    "--runs",
    type=click.IntRange(min=3),
    default=20,
    show_default=True,
    help="Requests per adapter.",
)
@click.option(
    "--prompt-tokens", type=click.IntRange(min=1), help="Prompt length. [default: 256; encoder: 32]"
)
@click.option(
    "--new-tokens",
    type=click.IntRange(min=2),
    default=32,
    show_default=True,
    help="Tokens to generate.",
)
@click.option(
    "--threads",
    type=THREADS,
    help="Threads. [default: the device's, if this machine has them]",
)
@provider_option
@engine_option
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path),
    help="Write everything, raw samples too.",
)
@click.option(
    "--junit", type=click.Path(path_type=Path), help="Write the verdicts as a JUnit file for CI."
)
def command(
    bundle: Path,
    device_name: str,
    adapters: tuple[str, ...],
    limits: tuple[str, ...],
    runs: int,
    prompt_tokens: int | None,
    new_tokens: int,
    threads: int | None,
    providers: tuple[str, ...],
    engine: str,
    json_file: Path | None,
    junit: Path | None,
) -> int:
    """Measure BUNDLE in a fresh process and compare with the device's budget.

    Exit 0: within the budget; 1: a limit is exceeded; 3: too noisy to tell. Without --adapter every
    adapter of the bundle is measured. For another device than the host, times are estimates and say
    so.
    """
    from edgetune.core.errors import AdapterError, DeviceError
    from edgetune.core.settings import nearest
    from edgetune.devices import load_device, parse_budget
    from edgetune.runtime.bundle.manifest import read_manifest
    from edgetune.runtime.check.latency import Workload, host_speed, measure_latency
    from edgetune.runtime.check.verdict import judge, overall

    manifest = read_manifest(bundle)
    device = load_device(device_name)
    kind = "decoder" if manifest.is_decoder else "encoder"
    asked = parse_budget(limits)
    budget = {**device.budget.get(kind, {}), **asked}
    shipped = tuple(entry.name for entry in manifest.adapters)
    if unknown := [name for name in adapters if name not in shipped]:
        there = nearest(unknown[0], shipped, none="none in this bundle")
        raise AdapterError(f"unknown adapter {unknown[0]!r}", **there)
    length = prompt_tokens or (256 if manifest.is_decoder else 32)
    used = threads or min(device.threads, load_device("host").threads)
    workload = Workload(
        str(bundle),
        adapters or shipped,
        used,
        runs,
        length,
        new_tokens,
        chosen_providers(providers or device.providers, None),
        engine,
    )
    click.echo(
        f"measuring {bundle} with {used} threads, {runs} requests of {length} tokens …", err=True
    )
    measured = measure_latency(workload)
    for note in measured["providers"]["notes"]:
        click.echo(f"warning: {note}", err=True)
    speed = None if device.is_host else host_speed(used)
    verdicts = judge(measured, budget, device=device, host=speed)
    if unmeasured := sorted(set(asked) - {verdict.key for verdict in verdicts}):
        what = f"this bundle has no {unmeasured[0]}, so its limit cannot be checked"
        raise DeviceError(
            what,
            where="--budget",
            got=f"a bundle for {manifest.task}, {manifest.mode}",
            fix="Leave it out.",
        )
    state = overall(verdicts)
    _print(measured, verdicts, device, speed, state=state)
    document = _document(workload, measured, verdicts, device, speed, budget=budget, state=state)
    if json_file is not None:
        from edgetune.core.files import write_json

        write_json(json_file, document)
    if junit is not None:
        _write_junit(junit, bundle, device, verdicts)
    return EXIT[state]


def _print(
    measured: dict[str, Any],
    verdicts: list[Verdict],
    device: Device,
    speed: Speed | None,
    *,
    state: str,
) -> None:
    click.echo(f"engine: {measured['engine']}")
    click.echo(f"execution providers: {_providers(measured['providers'])}")
    click.echo(f"{'measured on this machine':28} {'p50':>9} {'p90':>9} {'p95':>9} {'p99':>9}")
    for row in measured["adapters"]:
        name = row["adapter"] or "base model"
        for key, label in (
            ("ttft_ms", "TTFT ms"),
            ("tpot_ms", "TPOT ms"),
            ("request_ms", "request ms"),
        ):
            if key in row:
                _print_percentiles(f"{name}: {label}", row[key])
        if "tokens_per_s" in row:
            click.echo(f"{name + ': tokens/s':28} {row['tokens_per_s']['p50']:9.1f}")
    if measured["swap_ms"]:
        _print_percentiles("swap ms", measured["swap_ms"])
    loads = ", ".join(f"{name} {ms:.1f}" for name, ms in measured["adapter_load_ms"].items())
    click.echo(
        f"load {measured['load_ms']:.0f} ms"
        + (f"; adapters from disk: {loads} ms" if loads else "")
    )
    click.echo(
        f"peak memory {measured['peak_rss_mb']:.0f} MB; bundle {measured['bundle_mb']:.1f} MB\n"
    )
    if speed is not None:
        from edgetune.runtime.check.verdict import FORMULA

        click.echo(
            f"The measurements are of this machine ({speed.gflops:.0f} GFLOP/s, {speed.gb_s:.0f}"
            " GB/s), not of"
        )
        click.echo(f"{device.title}; its times below are ESTIMATES: {FORMULA}.\n")
    click.echo(f"budget of {device.name}:")
    for v in verdicts:
        who = f" ({v.adapter})" if v.adapter else ""
        basis = " (estimate)" if v.basis == "estimate" else ""
        spread = "" if v.low == v.high else f" [{v.low:.3g} … {v.high:.3g}]"
        click.echo(
            f"  {v.key + who:32} {v.value:10.4g}{spread} of {v.limit:g}: {WORDS[v.state]}{basis}"
        )
    click.echo(f"{WORDS[state]}" if verdicts else "no limits: nothing to compare with")


def _providers(found: dict[str, Any]) -> str:
    """Which ran the graph, with the nodes each had where ONNX Runtime tells."""
    nodes = found["nodes"]
    return ", ".join(
        f"{name} ({nodes.get(name, 0)} nodes)" if nodes else name for name in found["in_use"]
    )


def _print_percentiles(label: str, row: dict[str, float]) -> None:
    click.echo(f"{label:28} " + " ".join(f"{row[f'p{p}']:9.3f}" for p in (50, 90, 95, 99)))


def _document(
    workload: Workload,
    measured: dict[str, Any],
    verdicts: list[Verdict],
    device: Device,
    speed: Speed | None,
    *,
    budget: dict[str, float],
    state: str,
) -> dict[str, Any]:
    """The contract for scripts: see `--json`."""
    from dataclasses import asdict

    from edgetune import __version__
    from edgetune.devices import probe_host
    from edgetune.runtime.check.verdict import FORMULA

    estimated = speed is not None
    host = probe_host() | ({} if speed is None else asdict(speed))
    return {
        "schema": 1,
        "edgetune_version": __version__,
        "state": state,
        "bundle": workload.bundle,
        "device": device.name,
        "host": host,
        "estimated": estimated,
        "formula": FORMULA if estimated else None,
        "workload": asdict(workload),
        "measured": measured,
        "budget": budget,
        "verdicts": [verdict.to_dict() for verdict in verdicts],
    }


def _write_junit(path: Path, bundle: Path, device: Device, verdicts: list[Verdict]) -> None:
    """One test case a limit; an exceeded one fails, an undecided one is skipped."""
    from edgetune.core.files import write_text

    failures = sum(v.state == "over" for v in verdicts)
    skipped = sum(v.state == "noisy" for v in verdicts)
    counts = {"tests": str(len(verdicts)), "failures": str(failures), "skipped": str(skipped)}
    suite = ElementTree.Element(
        "testsuite", {"name": f"edgetune check {bundle.name} on {device.name}", **counts}
    )
    for v in verdicts:
        name = f"{v.key} ({v.adapter})" if v.adapter else v.key
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"{bundle.name}.{device.name}", name=name
        )
        text = f"{v.value:.4g} of {v.limit:g} ({v.basis}, between {v.low:.4g} and {v.high:.4g})"
        if v.state != "ok":
            tag = "failure" if v.state == "over" else "skipped"
            ElementTree.SubElement(case, tag, message=text)
    ElementTree.indent(suite)
    write_text(
        path,
        '<?xml version="1.0" encoding="utf-8"?>\n'
        + ElementTree.tostring(suite, encoding="unicode")
        + "\n",
    )
