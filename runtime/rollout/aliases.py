"""Aliases: names that clients ask for, each answered by one version of an adapter, or by several in
shares.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from edgetune.core.errors import InputError

FORM = "NAME=ADAPTER, or NAME=ADAPTER:SHARE,ADAPTER:SHARE"
VersionShares = Mapping[str, float]
"""version → its share of the requests; they add up to 1"""


@dataclass
class Aliases:
    """Alias → shares, thread-safe. A change holds for the next request; those under way go on."""

    _shares: dict[str, dict[str, float]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def set(self, alias: str, shares: VersionShares) -> None:
        """Have these versions answer from the next request on; no versions take the alias away."""
        total = sum(shares.values())
        with self._lock:
            self._shares.pop(alias, None)
            if shares:
                self._shares[alias] = {name: share / total for name, share in shares.items()}

    def choose(self, alias: str, key: str) -> str | None:
        """The version that answers the request of this key, always the same one while the shares
        stay; None for a name that is no alias.
        """
        with self._lock:
            shares = self._shares.get(alias)
        if shares is None:
            return None
        digest = hashlib.sha256(f"{alias}\0{key}".encode("utf-8", "surrogatepass")).digest()
        point, last = int.from_bytes(digest[:8], "big") / 2**64, ""
        for last, share in shares.items():  # noqa: B007 - rounding may leave the last one over
            point -= share
            if point < 0:
                break
        return last

    def all(self) -> dict[str, dict[str, float]]:
        """Every alias with its shares."""
        with self._lock:
            return {alias: dict(shares) for alias, shares in self._shares.items()}

    def using(self, version: str) -> str | None:
        """An alias that this version answers for, or None."""
        return next((alias for alias, shares in self.all().items() if version in shares), None)


def parse_alias(text: str) -> tuple[str, dict[str, float]]:
    """`home=home@v2`, or `home=home@v1:90,home@v2:10` → the alias and its shares. InputError for
    anything else.
    """
    alias, equals, versions = text.partition("=")
    shares: dict[str, float] = {}
    for one in versions.split(",") if "," in versions or ":" in versions else [f"{versions}:1"]:
        name, colon, share = one.strip().rpartition(":")
        try:
            value = float(share)
        except ValueError:
            value = math.nan
        if not (name and colon) or name in shares or not 0 < value < math.inf:
            shares.clear()
            break
        shares[name] = value
    if not (alias and equals and shares):
        raise InputError("cannot read --alias", expected=FORM, got=text)
    return alias, shares
