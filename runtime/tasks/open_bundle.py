"""A bundle that is open: its manifest, tokenizer, engines and adapters, which both kinds of answers
are made from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from edgetune.core.errors import InputError
from edgetune.core.tasks import REWARD
from edgetune.devices.host import release_free_memory
from edgetune.runtime.adapters.packing import PackedAdapter
from edgetune.runtime.adapters.registry import AdapterRegistry, InUse, Resident
from edgetune.runtime.bundle.manifest import Manifest
from edgetune.runtime.bundle.tokenizer import BundleTokenizer
from edgetune.runtime.engine.engine import EncoderEngine
from edgetune.runtime.engine.seq2seq import decoder_engine
from edgetune.runtime.engine.session import AdapterRow

Held = Mapping[str | None, Resident | None]
"""Adapters in use by name; None is the base model."""


class OpenBundle:
    """One base model and its adapters: they load and swap without touching the base."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        threads: int | None = None,
        providers: Sequence[str] = (),
        adapter_folder: Path | None = None,
        adapter_memory_mb: float | None = None,
        situations: bool = False,
    ) -> None:
        self.folder, self.manifest = folder, manifest
        self.tokenizer = BundleTokenizer(folder, manifest)
        release_free_memory()  # what parsing the vocabulary took
        self.registry = AdapterRegistry(
            folder, manifest, adapter_folder=adapter_folder, memory_mb=adapter_memory_mb
        )
        self.decoder = (
            decoder_engine(
                folder, manifest, threads=threads, providers=providers, situations=situations
            )
            if manifest.is_decoder
            else None
        )
        self.encoder = (
            None
            if manifest.is_decoder
            else EncoderEngine(folder, manifest, threads=threads, providers=providers)
        )
        engine = self.decoder or self.encoder
        assert engine is not None
        self.providers = engine.providers_in_use
        release_free_memory()  # what parsing the vocabulary and rearranging the weights took
        engine.long_lived()

    def close(self) -> None:
        """Let go of the session's and the adapters' memory."""
        self.decoder = self.encoder = None
        self.registry = AdapterRegistry(self.folder, self.manifest)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names that can be used: shipped in the bundle, or loaded."""
        return self.registry.names()

    def load_adapter(self, name: str, folder: str | Path, *, pin: bool = False) -> PackedAdapter:
        """Load a PEFT folder under a new name; its `.notes` say what could not be checked. See
        `pack_adapter`.
        """
        return self.registry.load(name, folder, pin=pin)

    def unload_adapter(
        self, name: str, *, in_use: InUse = "forget", timeout_s: float | None = None
    ) -> None:
        """Forget an adapter; a text that is being generated with it goes on, or see
        AdapterRegistry.unload.
        """
        self.registry.unload(name, in_use=in_use, timeout_s=timeout_s)

    def adapter(self, name: str) -> PackedAdapter:
        """An adapter's labels, prompt format and tensors (read from the bundle at first use)."""
        return self.registry.get(name).packed

    def labels(self, name: str | None) -> tuple[str, ...] | None:
        """What an adapter classifies into; None for the base model and for adapters that generate
        or embed.
        """
        chosen = self.chosen(name)
        return None if chosen is None else self.adapter(chosen).labels

    def chosen(self, adapter: str | None) -> str | None:
        """The adapter that answers: the one in the weights of a merged bundle, whether it is named
        or not.
        """
        return self._names(1, adapter, None)[0]

    def task(self, name: str | None) -> str | None:
        """What an adapter was trained for, as in its recipe's methods; None for a base that
        embeds.
        """
        chosen = self.chosen(name)
        if self.manifest.is_decoder:
            scores = chosen is not None and self.adapter(chosen).task == REWARD
            return REWARD if scores else self.manifest.task
        return None if chosen is None else self.adapter(chosen).task

    def bound(self, name: str | None) -> AdapterRow:
        """What the engine takes for an adapter's name; None is the base model."""
        return None if name is None else self.registry.get(name).bound

    @contextlib.contextmanager
    def _held(self, names: Sequence[str | None]) -> Iterator[Held]:
        """The adapters of these names, in use for the length of a with statement."""
        with contextlib.ExitStack() as stack:
            yield {name: stack.enter_context(self.registry.lease(name)) for name in {*names}}

    def _names(
        self, count: int, adapter: str | None, adapters: Sequence[str | None] | None
    ) -> list[str | None]:
        merged = (
            self.manifest.adapters[0].name if self.manifest.mode == "merged" else None
        )  # in the weights, named or not
        if adapters is None:
            return [merged if adapter is None else adapter] * count
        if adapter is not None:
            raise InputError("give `adapter` for all rows or `adapters` for each, not both")
        if len(adapters) != count:
            raise InputError(
                "one adapter (or None) for each row", expected=str(count), got=str(len(adapters))
            )
        return [merged if name is None else name for name in adapters]

    def _need(self, engine: Any) -> Any:
        if engine is None:
            closed = self.decoder is None and self.encoder is None
            what = (
                "the runtime is closed"
                if closed
                else f"this bundle does {self.manifest.task}, nothing else"
            )
            raise InputError(what, where=str(self.folder))
        return engine


def each(held: Held, names: Sequence[str | None]) -> list[Resident | None]:
    """The adapter of every row."""
    return [held[name] for name in names]


def bound(found: Resident | None) -> AdapterRow:
    """What the engine takes for it."""
    return None if found is None else found.bound


def batches(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Row numbers in batches of at most `rows`, like lengths together, so that little is padded."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[start : start + rows] for start in range(0, len(order), rows)]
