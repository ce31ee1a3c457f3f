"""The adapters a runtime knows: shipped ones are read at first use, others load hot; each is bound once."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.errors import AdapterError, BundleError
from edgetune.runtime.adapters import PackedAdapter, pack_adapter
from edgetune.runtime.binding import BoundTensors
from edgetune.runtime.manifest import AdapterEntry, Manifest


@dataclass(frozen=True)
class Resident:
    """An adapter in memory: its packed tensors bound for the engine."""

    packed: PackedAdapter
    bound: BoundTensors


class AdapterRegistry:
    """Name → adapter. A name that is being used keeps its tensors alive by itself: unloading never pulls them away."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._shipped = {entry.name: entry for entry in manifest.adapters}
        self._resident: dict[str, Resident] = {}
        self._lock = threading.Lock()

    def names(self) -> tuple[str, ...]:
        """Every name that can be used, shipped ones first."""
        return tuple(dict.fromkeys([*self._shipped, *self._resident]))

    def load(self, name: str, folder: str | Path) -> PackedAdapter:
        """Read and check a PEFT folder under a new name. AdapterError when the name is taken or it does not fit."""
        if not name:
            raise AdapterError("an adapter needs a name", expected="a text that is not empty", got=repr(name))
        if name in self.names():
            raise AdapterError(
                f"the name {name!r} is taken",
                expected="a new name",
                got=name,
                fix="Unload it first, or choose another.",
            )
        packed = pack_adapter(folder, self._manifest, name=name)
        with self._lock:
            self._resident[name] = Resident(packed, BoundTensors(packed.tensors))
        return packed

    def unload(self, name: str) -> None:
        """Forget an adapter; a shipped one too, for as long as this runtime is open."""
        self._known(name)
        with self._lock:
            self._resident.pop(name, None)
            self._shipped.pop(name, None)

    def get(self, name: str) -> Resident:
        """The adapter of that name, read from the bundle at its first use."""
        self._known(name)
        with self._lock:
            if name not in self._resident:
                packed = self._read(self._shipped[name])
                self._resident[name] = Resident(packed, BoundTensors(packed.tensors))
            return self._resident[name]

    def _known(self, name: str) -> None:
        if name not in self.names():
            there = ", ".join(self.names()) or "none in this bundle"
            raise AdapterError(f"unknown adapter {name!r}", expected=there, got=name)

    def _read(self, entry: AdapterEntry) -> PackedAdapter:
        if self._manifest.mode == "merged" or entry.path is None:
            return PackedAdapter(
                entry.name, {}, entry.labels, entry.rank, entry.digest or "", _metadata(self._folder, entry)
            )
        packed = pack_adapter(self._folder / entry.path, self._manifest, name=entry.name)
        if entry.digest is not None and packed.digest != entry.digest:
            raise BundleError(
                f"the adapter {entry.name!r} is not the one the bundle was made with",
                where=str(self._folder / entry.path),
                expected=f"sha256 {entry.digest[:16]}…",
                got=f"{packed.digest[:16]}…",
            )
        return packed


def _metadata(folder: Path, entry: AdapterEntry) -> dict[str, Any]:
    """What a merged adapter's entry says, with its folder's `edgetune_adapter.json` when there is one."""
    known: dict[str, Any] = {
        "task": entry.task,
        "problem": entry.problem,
        "labels": None if entry.labels is None else list(entry.labels),
        "prompt_format": entry.prompt_format,
        "generation": entry.generation,
    }
    path = folder / (entry.path or "") / "edgetune_adapter.json"
    if entry.path is not None and path.is_file():
        return {**json.loads(path.read_text(encoding="utf-8")), **known}
    return known
