"""An open native model: tokens of several rows in, logits and states out."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.core.arrays import Float32
from edgetune.core.errors import AdapterError, BundleError, InputError
from edgetune.runtime.bundle.manifest import Manifest
from edgetune.runtime.engine.interface import BoundAdapter, Tensors
from edgetune.runtime.engine.native.library import ERROR_BYTES, CCache, CSizes, CSpan, library

Memory = npt.NDArray[np.uint8]
"""Keys and values: (2·layers, slots, kv_heads, capacity, cache_bytes)."""
CACHE_BITS = {"fp16": 16, "int8": 8}
"""Precisions of a cache, and the bits of a number there."""


@dataclass(frozen=True)
class Piece:
    """Tokens appended to one row: behind `length` others in its slot."""

    ids: Sequence[int]
    slot: int
    length: int
    adapter: NativeAdapter | None


class NativeAdapter(BoundAdapter):
    """An adapter in half precision, in the library's memory; `head`: a reward's weight and bias."""

    def __init__(self, model: NativeModel, tensors: Tensors, manifest: Manifest) -> None:
        lib, self.model = model.lib, model
        self.handle = lib.edgetune_adapter_new(model.handle)
        self._close = weakref.finalize(self, lib.edgetune_adapter_free, self.handle)
        heads = {} if manifest.head is None else {manifest.head.weight, manifest.head.bias}
        sites = {site.A: site for site in manifest.sites}
        known = {*heads, *sites, *(site.B for site in manifest.sites)}
        if unknown := sorted(set(tensors) - known):
            raise AdapterError(
                f"this graph has no adapter input {unknown[0]}",
                fix="Pack the adapter for this bundle.",
            )
        self.head = {name: tensors[name] for name in heads if name in tensors}
        for name, site in sites.items():
            if name in tensors:
                self._add(site.name, tensors[name], tensors[site.B])
        self.own_bytes = int(lib.edgetune_adapter_bytes(self.handle))

    def _add(self, site: str, a: Float32, b: Float32) -> None:
        """a (1, in, rank), b (1, rank, out)."""
        low, high = (np.ascontiguousarray(array[0], np.float32) for array in (a, b))
        message = ctypes.create_string_buffer(ERROR_BYTES)
        failed = self.model.lib.edgetune_adapter_add(
            self.handle,
            site.encode(),
            low.shape[1],
            low.ctypes.data,
            high.ctypes.data,
            message,
            ERROR_BYTES,
        )
        if failed:
            raise AdapterError(message.value.decode())


class NativeModel:
    """The library's model of one bundle. Calls from several threads wait for each other."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        threads: int,
        cache_precision: str = "fp16",
        instructions: str | None = None,
    ) -> None:
        """NoLibraryError where there is no library; BundleError for a plan that does not fit."""
        graph = manifest.graph
        assert graph.native is not None and graph.data is not None
        self.lib, self.manifest = library(), manifest
        path = folder / graph.native
        try:
            plan = path.read_bytes()
        except OSError as error:
            raise BundleError(f"cannot be read: {error.strerror}", where=str(path)) from error
        message = ctypes.create_string_buffer(ERROR_BYTES)
        self.handle = self.lib.edgetune_open(
            plan,
            len(plan),
            str(folder / graph.data).encode(),
            threads,
            CACHE_BITS[cache_precision],
            None if instructions is None else instructions.encode(),
            message,
            ERROR_BYTES,
        )
        if not self.handle:
            raise BundleError(message.value.decode(), where=str(path))
        self._close = weakref.finalize(self, self.lib.edgetune_close, self.handle)
        self.sizes = CSizes()
        self.lib.edgetune_model_sizes(self.handle, self.sizes)
        self._check_sizes(str(path))

    @property
    def instructions(self) -> str:
        """The instruction set that its kernels use."""
        return str(self.lib.edgetune_model_instruction_set(self.handle).decode())

    def seconds_to_read(self) -> float:
        """One plain read of all weights by the model's own threads, in seconds."""
        return float(self.lib.edgetune_read_weights(self.handle))

    def run(
        self,
        memory: Memory,
        pieces: Sequence[Piece],
        wanted: Sequence[int],
        *,
        logits: Float32 | None = None,
        states: Float32 | None = None,
    ) -> None:
        """Run tokens; of those in `wanted` (counted over all pieces, ascending) write logits
        (wanted, vocab) and final states (wanted, hidden).

        InputError where a row does not fit into its slot; at most `sizes.most_tokens` at once.
        """
        ids = np.array([token for piece in pieces for token in piece.ids], np.int32)
        spans, at = (CSpan * len(pieces))(), ids.ctypes.data
        for span, piece in zip(spans, pieces, strict=True):
            handle = None if piece.adapter is None else piece.adapter.handle
            span.ids, span.count, span.slot = at, len(piece.ids), piece.slot
            span.length, span.adapter = piece.length, handle
            at += 4 * len(piece.ids)
        places = np.array(wanted, np.int32)
        cache = CCache(memory.ctypes.data, memory.shape[1], memory.shape[3])
        message = ctypes.create_string_buffer(ERROR_BYTES)
        failed = self.lib.edgetune_run(
            self.handle,
            cache,
            spans,
            len(pieces),
            places.ctypes.data,
            len(places),
            None if logits is None else logits.ctypes.data,
            None if states is None else states.ctypes.data,
            message,
            ERROR_BYTES,
        )
        if failed:
            raise InputError(message.value.decode())

    def new_memory(self, slots: int, capacity: int) -> Memory:
        """Keys and values of so many rows, each of at least `capacity` tokens."""
        step = self.sizes.cache_step
        shape = (
            2 * self.sizes.layers,
            slots,
            self.sizes.kv_heads,
            -(-capacity // step) * step,
            self.sizes.cache_bytes,
        )
        return np.zeros(shape, np.uint8)

    def _check_sizes(self, where: str) -> None:
        """What the manifest says of the model is what the plan says."""
        graph, sizes = self.manifest.graph, self.sizes
        pairs: Mapping[str, tuple[Any, int]] = {
            "hidden_size": (graph.hidden_size, sizes.hidden),
            "vocab_size": (graph.vocab_size, sizes.vocab),
            "layers": (graph.layers, sizes.layers),
            "kv_heads": (graph.kv_heads, sizes.kv_heads),
            "head_dim": (graph.head_dim, sizes.head_dim),
        }
        for name, (expected, got) in pairs.items():
            if expected != got:
                raise BundleError(
                    f"the native plan has another {name}",
                    where=where,
                    expected=str(expected),
                    got=str(got),
                )
        if sizes.positions and sizes.positions < graph.max_length:
            raise BundleError(
                "the native plan has fewer positions than the manifest",
                where=where,
                expected=str(graph.max_length),
                got=str(sizes.positions),
            )
