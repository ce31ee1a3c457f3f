"""A cluster of Ray: the one at an address, or one on this machine."""

from __future__ import annotations

import importlib
import re
import socket
from typing import Any

from edgetune.core.errors import InputError

HERE = "here"
"""In place of an address: the cluster of this machine, or a new one on it."""
RETRIES = 3
"""How often work is begun again whose worker died."""
PATIENCE_S = 10
"""For an answer at an address; Ray itself tries for minutes."""


def connected(address: str = HERE, *, needs: str = "ray") -> Any:
    """The module `ray`, connected, unless it already is; `needs`: which module of it is imported.
    InputError where Ray is missing or cannot be reached.
    """
    try:
        importlib.import_module(needs)
        import ray
    except ImportError as error:
        raise InputError(
            "Ray is not installed", fix='Install it: pip install "edgetune[ray]".'
        ) from error
    if not ray.is_initialized():
        try:
            _reach(address)
            ray.init(
                address=None if address == HERE else address,
                log_to_driver=False,
                include_dashboard=False,
                configure_logging=True,
                logging_level="ERROR",
            )
        except Exception as error:
            line = (str(error).splitlines() or [""])[0]
            raise InputError(
                "there is no Ray cluster",
                where=address,
                got=f"{type(error).__name__}: {line}"[:200],
            ) from error
    return ray


def _reach(address: str) -> None:
    """OSError where nobody listens at host:port; names of other forms are Ray's to understand."""
    if found := re.fullmatch(r"(?:ray://)?([^:/]+):(\d{1,5})", address):
        socket.create_connection((found[1], int(found[2])), timeout=PATIENCE_S).close()
