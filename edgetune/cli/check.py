"""`edgetune check`: latency and memory of a bundle against a device's budget."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgetune.cli.options import (
    THREADS,
    chosen_providers,
    engine_option,
    provider_option,
    slower_option,
)

if TYPE_CHECKING:
    from edgetune.devices.loader import Device
    from edgetune.runtime.bundle.manifest import Manifest
    from edgetune.runtime.check.latency import Workload
    from edgetune.runtime.check.projection import Projection
    from edgetune.runtime.check.rounds import Measuring
    from edgetune.runtime.check.verdict import Verdict


EXIT = {"ok": 0, "over": 1, "slower": 1, "noisy": 3}


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
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    help="Fresh processes, of --runs requests each. [default: 1; with --against the baseline's]",
)
@click.option(
    "--beside",
    type=click.IntRange(min=0, max=256),
    default=0,
    help="Busy processes next to it: what contention costs.",
)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="BASELINE.json",
    help="Exit 1 where a figure is slower than in this file of --json (of 3 rounds or more).",
)
@slower_option("With --against: slower by less is no regression.")
@click.option(
    "--sweep",
    "sweeps",
    multiple=True,
    metavar="AXIS=N,N,…",
    help="Measure over prompt, new, batch, threads or beside, without a verdict; several times.",
)
@click.option(
    "--page", type=click.Path(path_type=Path), help="With --sweep: write pictures and a table."
)
@click.option(
    "--on",
    metavar="ssh://[USER@]HOST[:PORT]",
    help="Measure there: bundle and runtime are copied, and removed afterwards.",
)
@click.option(
    "--remote-python", default="python3", show_default=True, help="With --on: the Python there."
)
@click.option(
    "--wheel",
    type=click.Path(path_type=Path),
    help="With --on: install this wheel of edgetune there, such as one with its native engine.",
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
    "--markdown",
    type=click.Path(path_type=Path),
    help="Write the verdicts as Markdown, for a pull request.",
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
    rounds: int | None,
    beside: int,
    against: Path | None,
    allow_slower: float,
    sweeps: tuple[str, ...],
    page: Path | None,
    on: str | None,
    remote_python: str,
    wheel: Path | None,
    providers: tuple[str, ...],
    engine: str,
    json_file: Path | None,
    markdown: Path | None,
    junit: Path | None,
) -> int:
    """Measure BUNDLE in fresh processes and compare with the device's budget and, with --against,
    with an earlier measurement.

    Exit 0: within the budget and no slower; 1: a limit is exceeded or a figure is slower; 3: too
    noisy to tell. Without --adapter every adapter of the bundle is measured. For another device
    than the host, times are estimates with their error and say so.
    """
    from edgetune.core.files import write_json, write_text
    from edgetune.devices import load_device, parse_budget
    from edgetune.runtime.bundle.manifest import read_manifest
    from edgetune.runtime.check import report
    from edgetune.runtime.check.latency import Workload, measure_latency
    from edgetune.runtime.check.projection import project
    from edgetune.runtime.check.regression import changes, read_baseline
    from edgetune.runtime.check.remote import Remote, address_of, host_there, measured_there
    from edgetune.runtime.check.rounds import measure_rounds
    from edgetune.runtime.check.sweep import parse_sweep
    from edgetune.runtime.check.verdict import judge

    judging = {"--against": against, "--budget": limits, "--rounds": rounds}
    judging |= {"--markdown": markdown, "--junit": junit}
    _refuse_beside_sweep(sweeps, page, [name for name, value in judging.items() if value])
    manifest = read_manifest(bundle)
    axes = parse_sweep(sweeps)
    baseline = None if against is None else read_baseline(against)
    device = load_device(device_name)
    kind = "decoder" if manifest.is_decoder else "encoder"
    asked = parse_budget(limits)
    budget = {**device.budget.get(kind, {}), **asked}
    measured_ones = _measured_adapters(adapters, manifest)
    length = prompt_tokens or (256 if manifest.is_decoder else 32)
    remote = None if on is None else Remote(address_of(on), python=remote_python)
    used = threads
    if remote is None:
        used = threads or min(device.threads, load_device("host").threads)
    elif not device.is_host:
        used = threads or device.threads
    if rounds is None:
        rounds = 1 if baseline is None else len(baseline["measured"]["rounds"])
    workload = Workload(
        str(bundle),
        measured_ones,
        used,
        runs,
        length,
        new_tokens,
        chosen_providers(providers or device.providers, None),
        engine,
        beside,
    )
    _note(
        f"measuring {bundle} {'' if on is None else f'on {on} '}with {used or 'all'} threads,"
        f" {rounds} x {runs} requests of {length} tokens …"
    )
    with contextlib.ExitStack() as stack:
        measure: Measuring = measure_latency
        if remote is not None:
            copied = measured_there(remote, bundle, wheel=wheel, say=_note)
            measure = stack.enter_context(copied)
        if axes:
            return _sweep(workload, axes, measure, page, json_file)
        measured = measure_rounds(workload, rounds=rounds, measure=measure)
    for note in [*measured["providers"]["notes"], *measured["machine"]["notes"]]:
        click.echo(f"warning: {note}", err=True)
    projection = None
    if not device.is_host and remote is None:
        _note("measuring other thread counts and prompts, for the estimate …")
        projection = project(workload, measured)
    verdicts = judge(measured, budget, device=device, projection=projection)
    _refuse_unmeasured(asked, verdicts, manifest, device)
    document = _document(workload, measured, verdicts, device, projection, budget=budget)
    if remote is not None:
        document["host"] = host_there(remote)
    changed = (
        []
        if baseline is None
        else changes(baseline, document["workload"], measured["rounds"], allowed=allow_slower / 100)
    )
    state = report.overall_state([v.state for v in verdicts] + [c.state for c in changed])
    document |= {"state": state, "changes": [one.to_dict() for one in changed]}
    lines = (
        *report.measured_lines(measured),
        "",
        *report.budget_lines(verdicts, device, projection),
        *(report.change_lines(changed, str(against)) if changed else ()),
    )
    click.echo("\n".join(lines))
    click.echo(report.WORDS[state] if verdicts or changed else "no limits: nothing to compare with")
    title = f"edgetune check {bundle.name} on {device.name}"
    if json_file is not None:
        write_json(json_file, document)
    if markdown is not None:
        write_text(markdown, report.markdown(measured, verdicts, changed, title=title, state=state))
    if junit is not None:
        write_text(junit, report.junit(verdicts, changed, bundle=bundle.name, on=device.name))
    return EXIT[state]


def _refuse_beside_sweep(sweeps: Sequence[str], page: Path | None, judging: list[str]) -> None:
    """DeviceError for options that a sweep would ignore, and for a page without one."""
    from edgetune.core.errors import DeviceError

    if sweeps and judging:
        raise DeviceError(
            "a sweep measures each point once and gives no verdict",
            where="--sweep",
            got=f"{', '.join(judging)} beside it",
            fix="Leave one of them out.",
        )
    if page is not None and not sweeps:
        fix = "Give --sweep prompt=64,256, or --markdown for the verdicts."
        raise DeviceError("a page shows a sweep, and none was asked for", where="--page", fix=fix)


def _measured_adapters(asked: tuple[str, ...], manifest: Manifest) -> tuple[str, ...]:
    """Those that were asked for, else all of the bundle; AdapterError for one that it lacks."""
    from edgetune.core.errors import AdapterError
    from edgetune.core.settings import nearest

    shipped = tuple(entry.name for entry in manifest.adapters)
    if unknown := [name for name in asked if name not in shipped]:
        there = nearest(unknown[0], shipped, none="none in this bundle")
        raise AdapterError(f"unknown adapter {unknown[0]!r}", **there)
    return asked or shipped


def _refuse_unmeasured(
    asked: Mapping[str, float], verdicts: Sequence[Verdict], manifest: Manifest, device: Device
) -> None:
    """DeviceError where a limit was asked for that nothing was measured of."""
    from edgetune.core.errors import DeviceError

    unmeasured = sorted(set(asked) - {verdict.key for verdict in verdicts})
    if not unmeasured:
        return
    what = f"this bundle has no {unmeasured[0]}, so its limit cannot be checked"
    if device.is_gpu:
        what = f"{unmeasured[0]} of a GPU is not estimated from a processor's"
    raise DeviceError(
        what,
        where="--budget",
        got=f"a bundle for {manifest.task}, {manifest.mode}",
        fix="Leave it out.",
    )


def _sweep(
    workload: Workload,
    axes: dict[str, tuple[int, ...]],
    measure: Measuring,
    page: Path | None,
    json_file: Path | None,
) -> int:
    """Measure every combination, say each as it comes, and write what was asked for."""
    from edgetune.core.files import write_json, write_text
    from edgetune.report.sweep_page import render_sweep
    from edgetune.runtime.check.sweep import sweep, sweep_line

    found = []
    for point in sweep(workload, axes, measure):
        click.echo(sweep_line(point))
        found.append(point.to_dict())
    name = Path(workload.bundle).name
    if json_file is not None:
        write_json(json_file, {"schema": 2, "bundle": workload.bundle, "points": found})
    if page is not None:
        write_text(page, render_sweep(found, title=f"edgetune check {name}"))
    return 0


def _note(line: str) -> None:
    click.echo(line, err=True)


def _document(
    workload: Workload,
    measured: dict[str, Any],
    verdicts: list[Verdict],
    device: Device,
    projection: Projection | None,
    *,
    budget: dict[str, float],
) -> dict[str, Any]:
    """The contract for scripts: see `--json`."""
    from dataclasses import asdict

    from edgetune import __version__
    from edgetune.devices import probe_host
    from edgetune.runtime.check.projection import FORMULA

    estimated = projection is not None
    host = probe_host() | ({} if projection is None else asdict(projection.speed))
    return {
        "schema": 2,
        "edgetune_version": __version__,
        "bundle": workload.bundle,
        "device": device.name,
        "host": host,
        "estimated": estimated,
        "formula": FORMULA if estimated else None,
        "projection": None if projection is None else projection.to_dict(),
        "workload": asdict(workload),
        "measured": measured,
        "budget": budget,
        "verdicts": [verdict.to_dict() for verdict in verdicts],
    }
