"""Device profiles, their budgets and a probe of this machine; standard library only.

The names below are imported when they are first used, so that `import edgetune.devices` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgetune.devices.budget import Budget as Budget
    from edgetune.devices.budget import parse_budget as parse_budget
    from edgetune.devices.host import probe_host as probe_host
    from edgetune.devices.loader import Device as Device
    from edgetune.devices.loader import list_devices as list_devices
    from edgetune.devices.loader import load_device as load_device


if __name__ == "devices":  # a second copy of every module would be made under the bare name
    raise ImportError("import edgetune.devices, not devices")
HOMES = {
    "Budget": "budget",
    "parse_budget": "budget",
    "probe_host": "host",
    "Device": "loader",
    "list_devices": "loader",
    "load_device": "loader",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(HOMES)
