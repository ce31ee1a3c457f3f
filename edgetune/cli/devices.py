"""`edgetune devices`: the profiles, one profile with its sources, or this machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from edgetune.devices.loader import Device


@click.command("devices")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--template", is_flag=True, help="Print a profile to fill in.")
def command(name: str | None, as_json: bool, template: bool) -> None:
    """List the device profiles, or show one: NAME, or the path of a profile of your own (.toml).

    `edgetune devices host` shows this machine.
    """
    from edgetune.devices import list_devices, load_device
    from edgetune.devices.template import template as form

    if template:
        click.echo(form(), nl=False)
    elif name is None:
        _list([load_device(one) for one in list_devices()], as_json=as_json)
    else:
        _show(load_device(name), as_json=as_json)


def _list(devices: list[Device], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([asdict(device) for device in devices], indent=2))
        return
    for device in devices:
        memory = f"{device.memory_mb / 1024:.3g} GB" if device.memory_mb else "?"
        speed = _both(device.sustained_bandwidth_gb_s, device.memory_bandwidth_gb_s, "GB/s")
        found = ", ".join([f"{device.cores} cores", memory, *([speed] if speed else [])])
        click.echo(f"{device.name:22} {device.title}: {found}")
    click.echo("\nShow one with its sources and budget: edgetune devices NAME")


def _available() -> str:
    """The execution providers that can be asked for here."""
    from edgetune.runtime.engine.providers import available

    return f"execution providers {', '.join(available())} (--provider)"


def _both(sustained: float | None, peak: float | None, unit: str) -> str | None:
    """What was measured, and the peak on paper."""
    parts = [
        f"{value:g} {unit} {what}"
        for value, what in ((sustained, "sustained"), (peak, "at peak"))
        if value is not None
    ]
    return ", ".join(parts) or None


def _show(device: Device, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(asdict(device), indent=2))
        return
    click.echo(f"{device.name}: {device.title}")
    facts = {
        "processor": device.cpu,
        "architecture": device.arch,
        "cores": f"{device.cores}, of which {device.threads} are used",
        "memory": f"{device.memory_mb} MB" if device.memory_mb else "unknown",
        "clock": f"{device.clock_ghz} GHz" if device.clock_ghz else None,
        "arithmetic": _both(device.sustained_gflops, device.peak_gflops, "GFLOP/s fp32"),
        "bandwidth": _both(device.sustained_bandwidth_gb_s, device.memory_bandwidth_gb_s, "GB/s"),
        "features": ", ".join(device.features) or None,
        "providers": ", ".join(device.providers) or None,
        "available": _available() if device.is_host else None,
        "note": device.notes or None,
    }
    for label, fact in facts.items():
        if fact is not None:
            click.echo(f"  {label:13} {fact}")
    for kind, budget in device.budget.items():
        limits = ", ".join(f"{key} {limit:g}" for key, limit in budget.items())
        click.echo(f"  budget        {kind}: {limits}")
    for source in device.sources:
        click.echo(
            f"  source        {', '.join(source.figures)}: {source.url}\n               "
            f" “{source.read}”"
        )
