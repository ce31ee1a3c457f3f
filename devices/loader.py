"""Device profiles: TOML files with hardware figures, where each was read, and a budget for each
kind of model.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgetune.core.errors import DeviceError
from edgetune.devices.budget import Budget, check_budget
from edgetune.devices.host import probe_host

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib
PROFILES = Path(__file__).parent / "profiles"
HOST = "host"
KINDS = ("decoder", "encoder")


@dataclass(frozen=True)
class Source:
    """Where figures were read: the page, and what it says."""

    figures: tuple[str, ...]
    url: str
    read: str


@dataclass(frozen=True)
class Device:
    """One device. Bandwidth and arithmetic are peaks on paper; None on the host, where they are
    measured.
    """

    name: str
    title: str
    arch: str
    cpu: str
    cores: int
    threads: int
    """threads a runtime should use there"""
    memory_mb: int | None
    clock_ghz: float | None = None
    fp32_flops_per_cycle: float | None = None
    """per core, fused multiply-add counted as two"""
    memory_bandwidth_gb_s: float | None = None
    features: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    """execution providers in order of preference, as `--provider` takes them; empty: the CPU"""
    notes: str = ""
    budget: dict[str, Budget] = field(default_factory=dict)
    """"decoder" and "encoder" → limits"""
    sources: tuple[Source, ...] = ()

    @property
    def is_host(self) -> bool:
        """True for the machine this runs on."""
        return self.name == HOST

    @property
    def peak_gflops(self) -> float | None:
        """threads · clock · FLOPs a cycle, in fp32 GFLOP/s."""
        if self.clock_ghz is None or self.fp32_flops_per_cycle is None:
            return None
        return self.threads * self.clock_ghz * self.fp32_flops_per_cycle


def list_devices() -> list[str]:
    """Names of the profiles that ship, the host first."""
    names = sorted(path.stem for path in PROFILES.glob("*.toml"))
    return sorted(names, key=lambda name: name != HOST)


def load_device(name: str) -> Device:
    """A shipped profile by name, or a TOML file of one's own by path. DeviceError names what is
    wrong.
    """
    path = PROFILES / f"{name}.toml"
    if name.endswith(".toml"):
        path = Path(name)
    elif name not in list_devices():
        near = difflib.get_close_matches(name, list_devices(), n=1)
        fix = (
            f"Did you mean {near[0]}?"
            if near
            else "Or give the path of a profile of your own, ending in .toml."
        )
        raise DeviceError(
            f"unknown device {name!r}", expected=" | ".join(list_devices()), got=name, fix=fix
        )
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DeviceError(
            f"the profile cannot be read: {error.strerror}", where=str(path)
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DeviceError(f"not valid TOML: {error}", where=str(path)) from error
    if values.get("name") == HOST:
        probed = {k: v for k, v in probe_host().items() if k != "system"}
        values = {**probed, **values}
    return device_from_dict(values, where=str(path))


def device_from_dict(values: Mapping[str, Any], *, where: str) -> Device:
    """Check a profile's table; unknown keys, missing figures and figures without a source are
    refused.
    """
    fields = {f.name: f for f in dataclasses.fields(Device)}
    known = {*fields, "source"} - {"sources"}
    if unknown := sorted(set(values) - known):
        raise DeviceError(
            f"unknown key {unknown[0]!r}",
            where=where,
            expected=", ".join(sorted(known)),
            got=unknown[0],
        )
    required = [
        n
        for n, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in values]:
        raise DeviceError(f"missing key {missing[0]!r}", where=where)
    for name, kind in TYPES.items():
        if name in values and not isinstance(values[name], kind):
            expected, got = f"a {'string' if kind is str else 'list'}", repr(values[name])
            raise DeviceError(f"{name} is wrong", where=where, expected=expected, got=got)
    sources = tuple(_source(entry, where=where) for entry in values.get("source", []))
    budget = values.get("budget", {})
    tables = isinstance(budget, dict) and all(isinstance(table, dict) for table in budget.values())
    if not tables or set(budget) - set(KINDS):
        raise DeviceError(
            "budgets are tables",
            where=where,
            expected="[budget.decoder], [budget.encoder]",
            got=str(budget),
        )
    limits = {
        kind: check_budget(table, where=f"{where}, budget.{kind}") for kind, table in budget.items()
    }
    plain = {k: v for k, v in values.items() if k not in ("source", "budget")}
    for name in ("features", "providers"):
        plain[name] = tuple(plain.get(name, ()))
        if wrong := [value for value in plain[name] if not isinstance(value, str)]:
            raise DeviceError(
                f"{name} is wrong", where=where, expected="a list of strings", got=repr(wrong[0])
            )
    device = Device(**plain, budget=limits, sources=sources)
    _check_figures(device, where=where)
    return device


TYPES: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "title": str,
    "arch": str,
    "cpu": str,
    "notes": str,
    "features": (list, tuple),
    "providers": (list, tuple),
    "source": (list, tuple),
}
FIGURES = ("cores", "clock_ghz", "fp32_flops_per_cycle", "memory_mb", "memory_bandwidth_gb_s")


def _check_figures(device: Device, *, where: str) -> None:
    """Numbers are numbers, and every one of them has a source (the host's are probed)."""
    sourced = {figure for source in device.sources for figure in source.figures}
    for name in (*FIGURES, "threads"):
        value = getattr(device, name)
        if value is None and device.is_host:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise DeviceError(
                f"{name} is wrong", where=where, expected="a number above 0", got=repr(value)
            )
        if name in FIGURES and name not in sourced and not device.is_host:
            raise DeviceError(
                f"{name} has no source",
                where=where,
                fix=f'Add a [[source]] with figures = ["{name}"].',
            )


def _source(entry: Any, *, where: str) -> Source:
    try:
        return Source(
            figures=tuple(entry["figures"]), url=str(entry["url"]), read=str(entry["read"])
        )
    except (KeyError, TypeError) as error:
        raise DeviceError(
            "a source has figures, url and read", where=where, got=repr(entry)[:80]
        ) from error
