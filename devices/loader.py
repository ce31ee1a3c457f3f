"""Device profiles: TOML files with hardware figures, where each was read, and a budget for each
kind of model.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgetune.core.errors import DeviceError, listed
from edgetune.core.settings import about, from_dict
from edgetune.devices.budget import Budget, check_budget
from edgetune.devices.host import probe_host

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib
PROFILES = Path(__file__).parent / "profiles"
HOST = "host"
KINDS = ("decoder", "encoder")
FIGURES = ("cores", "clock_ghz", "fp32_flops_per_cycle", "memory_mb", "memory_bandwidth_gb_s")
"""What a profile must have, each with a source."""
MEASURED = {
    "sustained_gflops": ("clock_ghz", "fp32_flops_per_cycle"),
    "sustained_bandwidth_gb_s": ("memory_bandwidth_gb_s",),
}
"""What was measured, and the figures on paper that are not needed beside it."""


@dataclass(frozen=True)
class FigureSource:
    """Where figures were read: the page, and what it says."""

    figures: tuple[str, ...]
    url: str
    read: str


@dataclass(frozen=True)
class Device:
    """One device: peaks on paper, and what was measured of it; None where neither is known."""

    name: str
    title: str
    arch: str
    cpu: str
    cores: int = field(metadata=about(help="as many as it has", above=0))
    threads: int = field(metadata=about(help="what a runtime should use there", above=0))
    memory_mb: int | None = field(default=None, metadata=about(help="all of it", above=0))
    clock_ghz: float | None = field(
        default=None, metadata=about(help="of a core at its fastest", above=0)
    )
    fp32_flops_per_cycle: float | None = field(
        default=None,
        metadata=about(help="per core, fused multiply-add counted as two", above=0),
    )
    memory_bandwidth_gb_s: float | None = field(
        default=None, metadata=about(help="at its peak", above=0)
    )
    sustained_bandwidth_gb_s: float | None = field(
        default=None, metadata=about(help="read by all threads, as measured", above=0)
    )
    sustained_gflops: float | None = field(
        default=None, metadata=about(help="fp32 GFLOP/s by all threads, as measured", above=0)
    )
    features: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    """execution providers in order of preference, as `--provider` takes them; empty: the CPU"""
    notes: str = ""
    budget: dict[str, Budget] = field(default_factory=dict)
    """"decoder" and "encoder" → limits"""
    sources: tuple[FigureSource, ...] = field(default=(), metadata=about(key="source"))

    @property
    def is_host(self) -> bool:
        """True for the machine this runs on."""
        return self.name == HOST

    @property
    def is_gpu(self) -> bool:
        """Whether its graph runs on a GPU."""
        return self.providers[:1] in (("cuda",), ("tensorrt",))

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
    refused, all at once.
    """
    values = {key: value for key, value in values.items() if value is not None}
    is_host = values.get("name") == HOST
    measured = {figure for key in MEASURED if key in values for figure in MEASURED[key]}
    needed = () if is_host else tuple(name for name in FIGURES if name not in measured)
    head = {key: value for key, value in values.items() if key not in ("budget", "source")}
    problems: list[DeviceError] = []

    def attempt(part: Callable[..., Any], *given: Any, **named: Any) -> Any:
        try:
            return part(*given, where=where, **named)
        except DeviceError as error:
            problems.append(error)

    attempt(_read, head, required=needed)
    budget = attempt(_budgets, values.get("budget", {}))
    for at, source in enumerate(_sources(values)):
        attempt(_read_source, source, at)
    if not is_host:  # the host's are probed
        attempt(_check_sources, needed, values)
    if len(problems) > 1:
        lines = [str(error).removeprefix(f"{where}: ") for error in problems]
        fix = "\nA profile to fill in: edgetune devices --template."
        raise DeviceError(listed(lines, "mistakes in a profile") + fix, where=where)
    if problems:
        raise problems[0]
    return _read({**values, "budget": budget}, where=where)


def _read(values: Mapping[str, Any], *, where: str, required: tuple[str, ...] = ()) -> Device:
    return from_dict(Device, values, where=where, error=DeviceError, required=required)


def _read_source(source: Any, at: int, *, where: str) -> None:
    """The entry alone, named by its place."""
    if not isinstance(source, Mapping):
        raise DeviceError(
            "source has a wrong value", where=where, expected="[[source]]", got=str(source)
        )
    from_dict(FigureSource, source, where=f"{where}, source {at + 1}", error=DeviceError)


def _check_sources(needed: tuple[str, ...], values: Mapping[str, Any], *, where: str) -> None:
    """Every figure of the profile has to have one."""
    tables = [source for source in _sources(values) if isinstance(source, Mapping)]
    sourced = {name for source in tables for name in _names(source.get("figures"))}
    wanted = [*needed, *(key for key in (*FIGURES, *MEASURED) if key in values)]
    if unsourced := [name for name in dict.fromkeys(wanted) if name not in sourced]:
        raise DeviceError(
            f"{', '.join(unsourced)}: no source",
            where=where,
            fix=f"Add a [[source]] with figures = {json.dumps(unsourced)}.",
        )


def _sources(values: Mapping[str, Any]) -> Sequence[Any]:
    found = values.get("source", [])
    return found if isinstance(found, (list, tuple)) else [found]


def _names(figures: Any) -> list[str]:
    listed_there = figures if isinstance(figures, (list, tuple)) else []
    return [name for name in listed_there if isinstance(name, str)]


def _budgets(budget: Any, *, where: str) -> dict[str, Budget]:
    tables = isinstance(budget, dict) and all(isinstance(table, dict) for table in budget.values())
    if not tables or set(budget) - set(KINDS):
        raise DeviceError(
            "budgets are tables",
            where=where,
            expected="[budget.decoder], [budget.encoder]",
            got=str(budget),
        )
    return {
        kind: check_budget(table, where=f"{where}, budget.{kind}") for kind, table in budget.items()
    }
