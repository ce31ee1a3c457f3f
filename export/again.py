"""Proof and task metric once more, from a finished bundle alone and the base it names: `edgetune verify --parity`."""

from __future__ import annotations

from pathlib import Path

from edgetune.bases import Base, resolve_base
from edgetune.errors import ExportError
from edgetune.export.bundle import Say
from edgetune.export.proof import Proof
from edgetune.export.proving import probe_of, prove_bundle
from edgetune.export.sources import Source, read_source
from edgetune.export.task import TaskPlan, TaskResult
from edgetune.export.torch_side import torch_model
from edgetune.runtime.manifest import AdapterEntry, Manifest


def reprove(folder: Path, manifest: Manifest, *, threads: int | None = None) -> dict[str, Proof]:
    """The proof again, from the bundle alone and the base it names."""
    base, sources = _shipped(folder, manifest)
    if missing := sorted({source.name for source in sources} - set(manifest.proof.get("probe", {}))):
        raise ExportError(f"the manifest holds no probe for {missing[0]}", where=str(folder), fix="Export the bundle again.")
    return prove_bundle(folder, manifest, base, sources, probe_of(manifest), threads=threads)


def remeasure(folder: Path, manifest: Manifest, task: TaskPlan, *, threads: int | None = None, say: Say = lambda line: None) -> dict[str, TaskResult]:
    """The task metric again, of rows that `task.data` names: a bundle does not carry its recipe's."""
    base, sources = _shipped(folder, manifest)
    return task.measure(folder, manifest, base, sources, load=torch_model, threads=threads, say=say)


def _shipped(folder: Path, manifest: Manifest) -> tuple[Base, list[Source]]:
    """The base that a bundle names, and its adapters as they lie in it; ExportError for another base."""
    base = resolve_base(manifest.base.name)
    if base.digest != manifest.base.digest:
        raise ExportError("the base model here is another one", expected=manifest.base.digest, got=base.digest)
    places = ((entry.name, base.folder if _is_the_base(entry, folder) else folder / "adapters" / entry.name) for entry in manifest.adapters)
    return base, [read_source(name, place) for name, place in places]


def _is_the_base(entry: AdapterEntry, folder: Path) -> bool:
    return entry.path is None and not (folder / "adapters" / entry.name).is_dir()
