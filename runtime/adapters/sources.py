"""Where adapters are read from: the bundle, a folder of many, or any PEFT folder; checked while
they are read.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from edgetune.core.confidence import confidence_problems
from edgetune.core.errors import AdapterError, BundleError
from edgetune.core.files import is_regular, read_hashed_json, sha256_text
from edgetune.core.layout import ADAPTER_CONFIG, ADAPTER_FILES, ADAPTER_METADATA, ADAPTERS
from edgetune.runtime.adapters.packing import PackedAdapter, merged_head, pack_adapter
from edgetune.runtime.bundle.manifest import AdapterEntry, Manifest
from edgetune.runtime.signature.folder import check_signature, demand_signed
from edgetune.runtime.signature.keys import PublicKey

log = logging.getLogger("edgetune.runtime.adapters")
log.addHandler(logging.NullHandler())  # a library's: who runs it decides where lines go

Source = AdapterEntry | Path
"""A shipped adapter's entry in the manifest, or a PEFT folder."""


class AdapterSources:
    """The files behind adapter names."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        many: Path | None,
        *,
        strict: bool = False,
        by_site: bool = False,
        signed_by: PublicKey | None = None,
        signed: Mapping[str, str] | None = None,
    ) -> None:
        """`many`: a folder whose sub-folders are adapters; AdapterError when there is none.
        `strict`: an adapter with `PackedAdapter.doubts` is refused, unless it ships in the bundle.
        `by_site`: see `pack_adapter`. `signed_by`: the key that must have signed every adapter
        from elsewhere, each time that it is read; `signed`: the bundle's files as it signed them.
        """
        self._folder, self._manifest, self._many, self._strict = folder, manifest, many, strict
        self._by_site, self._signed_by, self._signed = by_site, signed_by, signed
        if many is not None and not many.is_dir():
            raise AdapterError(
                "no such adapter folder", where=str(many), expected="a folder of PEFT folders"
            )

    def names(self) -> list[str]:
        """The adapters in the folder of many, as they are there now."""
        if self._many is None:
            return []
        return sorted(path.parent.name for path in self._many.glob(f"*/{ADAPTER_CONFIG}"))

    def find(self, name: str) -> Path | None:
        """An adapter of the folder of many; a name is never a path, so nothing outside can be asked
        for.
        """
        if self._many is None or Path(name).name != name or name in (".", "..") or "\0" in name:
            return None
        path = self._many / name
        return path if is_regular(path / ADAPTER_CONFIG) else None

    def folder(self, source: Source | None) -> str | None:
        """Where a source's files lie; None for an adapter that is merged into the weights."""
        if isinstance(source, AdapterEntry):
            return None if source.path is None else str(self._folder / source.path)
        return None if source is None else str(source)

    def read(self, name: str, source: Source) -> tuple[PackedAdapter, str]:
        """The packed tensors, and a fingerprint of what they were made from. AdapterError lists
        every misfit, SignatureError what is not as it was signed.
        """
        if isinstance(source, Path):
            key = self._signed_by
            signed = None if key is None else check_signature(source, key).files
            packed = pack_adapter(source, self._manifest, name=name, by_site=self._by_site)
            if signed is not None:
                demand_signed(packed.files, signed, ADAPTER_FILES, where=source)
            if self._strict and packed.doubts:
                raise AdapterError(
                    f"the adapter {name!r} is refused: {'; '.join(packed.doubts)}",
                    where=str(source),
                    fix="Serve without --strict to use it all the same.",
                )
            for line in packed.doubts:
                log.warning("adapter %r: %s", name, line)
            return packed, _fingerprint(packed)
        if self._manifest.mode == "merged" or source.path is None:
            known = self._metadata(source)
            place = f"{ADAPTERS}/{source.name}"
            head = merged_head(
                self._folder / place,
                source.task,
                self._manifest,
                check=partial(self._demand_signed, place),
            )
            return (
                PackedAdapter(name, head, source.labels, source.rank, source.digest or "", known),
                source.digest or "",
            )
        path = self._folder / source.path
        packed = pack_adapter(path, self._manifest, name=name, by_site=self._by_site)
        self._demand_signed(source.path, packed.files)
        if source.digest is not None and packed.digest != source.digest:
            raise AdapterError(
                f"the adapter {name!r} is not the one the bundle was made with",
                where=str(path),
                expected=f"sha256 {source.digest[:16]}…",
                got=f"{packed.digest[:16]}…",
                fix="Copy or export the bundle again.",
            )
        return packed, _fingerprint(packed)

    def _demand_signed(
        self, place: str, read: Mapping[str, str], names: Sequence[str] = ADAPTER_FILES
    ) -> None:
        """SignatureError where a shipped adapter's files are not those that the bundle's key
        signed: they may be read long after it was opened.
        """
        if self._signed is not None:
            signed = {name: self._signed.get(f"{place}/{name}") for name in names}
            demand_signed(read, signed, names, where=self._folder / place)

    def _metadata(self, entry: AdapterEntry) -> dict[str, Any]:
        """What a merged adapter's entry says, with its folder's `edgetune_adapter.json` when there
        is one.
        """
        known: dict[str, Any] = {
            "task": entry.task,
            "problem": entry.problem,
            "labels": None if entry.labels is None else list(entry.labels),
            "prompt_format": entry.prompt_format,
            "max_length": entry.max_length,
            "generation": entry.generation,
        }
        if entry.confidence is not None:
            if wrong := confidence_problems(entry.confidence):
                raise BundleError("; ".join(wrong), where=str(self._folder), fix="Export it again.")
            known["confidence"] = entry.confidence
        path = self._folder / (entry.path or "") / ADAPTER_METADATA
        if entry.path is not None and path.is_file():
            more, digest = read_hashed_json(path, error=AdapterError)
            self._demand_signed(entry.path, {ADAPTER_METADATA: digest}, [ADAPTER_METADATA])
            return {**more, **known}
        return known


def _fingerprint(packed: PackedAdapter) -> str:
    """Of every file that it was made of: alpha or a label changes answers too."""
    return sha256_text(json.dumps([packed.files.get(name) for name in ADAPTER_FILES]))
