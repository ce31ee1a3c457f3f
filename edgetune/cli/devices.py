"""`edgetune devices`: the profiles, one profile with its sources, or this machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from edgetune.devices.loader import Device


@click.command("devices")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--template", is_flag=True, help="Print a profile to fill in.")
@click.option(
    "--write",
    type=click.Path(path_type=Path),
    metavar="FILE.toml",
    help="With host: write this machine as a profile, for a check elsewhere.",
)
def command(name: str | None, as_json: bool, template: bool, write: Path | None) -> None:
    """List the device profiles, or show one: NAME, or the path of a profile of your own (.toml).

    `edgetune devices host` measures this machine: memory read and matrix products.
    """
    from edgetune.core.errors import DeviceError
    from edgetune.devices import list_devices, load_device
    from edgetune.devices.template import template as form

    if write is not None and name != "host":
        fix = "Write edgetune devices host --write FILE.toml."
        raise DeviceError("--write is for this machine", got=name or "no name", fix=fix)
    if template:
        click.echo(form(), nl=False)
    elif name == "host":
        _host(as_json=as_json, write=write)
    elif name is None:
        _list([load_device(one) for one in list_devices()], as_json=as_json)
    else:
        _show(load_device(name), as_json=as_json)


def _host(*, as_json: bool, write: Path | None) -> None:
    """Measure first: a profile that cannot be written is refused before."""
    from edgetune.core.errors import DeviceError
    from edgetune.core.files import write_text
    from edgetune.core.settings import to_toml
    from edgetune.devices import load_device
    from edgetune.runtime.check.host import NO_BF16, measure_host, measured_profile

    if write is not None and (write.suffix != ".toml" or write.stem == "host"):
        raise DeviceError(
            "a profile is a .toml file, and host is the name of the machine that one sits at",
            where="--write",
            got=str(write),
            fix="For example --write my-board.toml.",
        )
    device = load_device("host")
    if write is not None and device.memory_mb is None:
        raise DeviceError("this system does not say its memory", fix="Fill in --template.")
    found = measure_host()
    if as_json:
        click.echo(json.dumps({**asdict(device), "measured": found.to_dict()}, indent=2))
    else:
        _show(device, as_json=False)
        for speed in dict.fromkeys((found.one, found.all)):
            threads = f"{speed.threads} threads" if speed.threads > 1 else "1 thread"
            click.echo(
                f"  measured      {threads}: memory read {speed.gb_s:.1f} GB/s,"
                f" fp32 {speed.gflops:.0f} GFLOP/s"
            )
        click.echo(f"  measured      int8 {found.int8_gops:.0f} GOP/s; bf16: {NO_BF16}")
    if write is not None:
        write_text(write, to_toml(measured_profile(write.stem, found)))
        click.echo(f"written: edgetune check BUNDLE --device {write}", err=True)


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
