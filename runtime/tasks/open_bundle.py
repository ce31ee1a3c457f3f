"""A bundle that is open: its manifest, tokenizer, engine and adapters, which every answer is made
from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edgetune.core.errors import InputError
from edgetune.core.tasks import CLASSIFICATION, REWARD
from edgetune.devices.host import release_free_memory
from edgetune.runtime.adapters.packing import PackedAdapter
from edgetune.runtime.adapters.registry import AdapterRegistry, Resident
from edgetune.runtime.bundle.manifest import Manifest
from edgetune.runtime.bundle.tokenizer import BundleTokenizer
from edgetune.runtime.engine.interface import AdapterRow, BoundAdapter, Decoder, Encoder, Tensors
from edgetune.runtime.signature.keys import PublicKey
from edgetune.runtime.tasks.choose_engine import (
    AUTO,
    ONNX_RUNTIME,
    OURS,
    SMALL_CACHE,
    EngineInUse,
    check_engine_name,
    open_decoder,
)

Held = Mapping[str | None, Resident | None]
"""Adapters in use by name; None is the base model."""


class OpenBundle:
    """One base model and its adapters. Here it is chosen which engine runs the model."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        threads: int | None = None,
        providers: Sequence[str] = (),
        adapter_folder: Path | None = None,
        adapter_memory_mb: float | None = None,
        strict: bool = False,
        engine: str = AUTO,
        signed_by: PublicKey | None = None,
        signed: Mapping[str, str] | None = None,
    ) -> None:
        """See `Runtime.open`, whose arguments these are. `signed`: the bundle's files as its key
        signed them.
        """
        check_engine_name(engine)
        self.folder, self.manifest = folder, manifest
        with ThreadPoolExecutor(1) as beside:  # the engine takes as long as the vocabulary
            opening = beside.submit(_open_engine, folder, manifest, engine, threads, providers)
            self.tokenizer = BundleTokenizer(folder, manifest)
            self.decoder, self.encoder, self.engine = opening.result()
        self.registry = AdapterRegistry(
            folder,
            manifest,
            bind=self._bind,
            adapter_folder=adapter_folder,
            memory_mb=adapter_memory_mb,
            strict=strict,
            by_site=self.engine.name == OURS,
            signed_by=signed_by,
            signed=signed,
        )
        release_free_memory()  # what parsing the vocabulary and rearranging the weights took
        opened = self.decoder or self.encoder
        assert opened is not None
        self.providers = opened.providers_in_use
        opened.long_lived()

    def close(self) -> None:
        """Let go of the engine's and the adapters' memory."""
        self.decoder = self.encoder = None
        self.registry = AdapterRegistry(self.folder, self.manifest, bind=self._bind)

    def adapter(self, name: str) -> PackedAdapter:
        """An adapter's labels, prompt format and tensors (read from the bundle at first use)."""
        return self.registry.get(name).packed

    def labels(self, name: str | None) -> tuple[str, ...] | None:
        """What an adapter classifies into; None for the base model and for adapters that generate
        or embed.
        """
        chosen = self.chosen(name)
        return None if chosen is None else self.adapter(chosen).labels

    def tokenizer_of(self, name: str | None, control_tokens: str | None = None) -> BundleTokenizer:
        """The tokenizer for an adapter's requests. `control_tokens`: what text spells of them is
        "text" or "tokens"; None: as the adapter was trained.
        """
        if control_tokens is not None:
            return self.tokenizer.reading({"control_tokens": control_tokens})
        return self.tokenizer.reading(None if name is None else self.adapter(name).prompt_format)

    def task(self, name: str | None) -> str | None:
        """What an adapter was trained for, as in its recipe's methods; None for a base that
        embeds.
        """
        chosen = self.chosen(name)
        if self.manifest.is_decoder:
            own = None if chosen is None else self.adapter(chosen).task
            return own if own in (REWARD, CLASSIFICATION) else self.manifest.task
        return None if chosen is None else self.adapter(chosen).task

    def chosen(self, adapter: str | None) -> str | None:
        """The adapter that answers: the one in the weights of a merged bundle, whether it is named
        or not.
        """
        merged = self.manifest.adapters[0].name if self.manifest.mode == "merged" else None
        return merged if adapter is None else adapter

    def chosen_for(
        self, count: int, adapter: str | None, adapters: Sequence[str | None] | None
    ) -> list[str | None]:
        """The adapter that answers each of `count` rows: `adapter` all of them, or `adapters` one
        each. InputError when both are given, or not as many as there are rows.
        """
        if adapters is None:
            return [self.chosen(adapter)] * count
        if adapter is not None:
            raise InputError("give `adapter` for all rows or `adapters` for each, not both")
        if len(adapters) != count:
            raise InputError(
                "one adapter (or None) for each row", expected=str(count), got=str(len(adapters))
            )
        return [self.chosen(name) for name in adapters]

    def bound(self, name: str | None) -> AdapterRow:
        """What the engine takes for an adapter's name; None is the base model."""
        return None if name is None else self.registry.get(name).bound

    @contextlib.contextmanager
    def held(self, names: Sequence[str | None]) -> Iterator[Held]:
        """The adapters of these names, in use for the length of a with statement."""
        with contextlib.ExitStack() as stack:
            yield {name: stack.enter_context(self.registry.lease(name)) for name in {*names}}

    def need_decoder(self) -> Decoder:
        """The engine that generates; InputError when it is closed or the bundle generates
        nothing.
        """
        if self.decoder is None:
            raise self._cannot()
        return self.decoder

    def need_encoder(self) -> Encoder:
        """The engine that encodes; InputError when it is closed or the bundle encodes nothing."""
        if self.encoder is None:
            raise self._cannot()
        return self.encoder

    def _cannot(self) -> InputError:
        closed = self.decoder is None and self.encoder is None
        only = f"this bundle does {self.manifest.task}, nothing else"
        return InputError("the runtime is closed" if closed else only, where=str(self.folder))

    def _bind(self, tensors: Tensors) -> BoundAdapter:
        engine = self.decoder or self.encoder
        if engine is None:
            raise self._cannot()
        return engine.bind(tensors)


def _open_engine(
    folder: Path,
    manifest: Manifest,
    engine: str,
    threads: int | None,
    providers: Sequence[str],
) -> tuple[Decoder | None, Encoder | None, EngineInUse]:
    """The engine that runs a bundle's model, and why it is that one."""
    if manifest.is_decoder:
        decoder, used = open_decoder(
            folder, manifest, engine=engine, threads=threads, providers=providers
        )
        return decoder, None, used
    if engine in (OURS, SMALL_CACHE):
        raise InputError("the native engine runs no encoders", where=str(folder))
    from edgetune.runtime.engine.encoder import EncoderEngine

    encoder = EncoderEngine(folder, manifest, threads=threads, providers=providers)
    return None, encoder, EngineInUse(ONNX_RUNTIME)


def bound(found: Resident | None) -> AdapterRow:
    """What the engine takes for an adapter in use; None is the base model."""
    return None if found is None else found.bound


def batches(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Row numbers in batches of at most `rows`, like lengths together, so that little is padded."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[start : start + rows] for start in range(0, len(order), rows)]
