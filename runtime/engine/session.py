"""ONNX Runtime seen from numpy: sessions, adapter inputs and a key-value cache bound to arrays of
ours.

IO binding keeps no reference to what it binds, and `OrtValue.ortvalue_from_numpy` shares the
array's memory on the CPU. So everything bound lives in an object here, and whoever runs the graph
only writes into arrays that stay bound.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.core.arrays import Float32
from edgetune.core.errors import AdapterError, BundleError
from edgetune.devices.host import threads_to_ask_for
from edgetune.devices.paging import use_large_pages
from edgetune.runtime.bundle.manifest import GraphInfo, Manifest
from edgetune.runtime.engine.device_memory import OutputBuffer, bind_cache, cache_place
from edgetune.runtime.engine.interface import AdapterRow, BoundAdapter, Tensors
from edgetune.runtime.engine.providers import (
    CPU,
    ProvidersInUse,
    cannot_run,
    choose,
    in_use,
)

SETTLED = 4
"""Runs after which a session that lives long moves its weights to large pages: a first token does
not wait for that.
"""
ADAPTER_BRANCH = "situations"
"""Metadata of a graph with an adapter branch: it skips its adapter nodes when its first adapter
input has group 0.
"""


class BoundTensors(BoundAdapter):
    """Adapter tensors as OrtValues, made once and bound many times; keeps the memory alive."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = {
            name: np.ascontiguousarray(array, np.float32) for name, array in tensors.items()
        }
        self.values = {name: ort_value(array) for name, array in self.tensors.items()}
        self.active = any(array.size for array in self.tensors.values())


def ort_value(array: npt.NDArray[Any]) -> Any:
    """An OrtValue on the array's own memory, which must be contiguous; it holds the array."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def own(adapter: BoundAdapter) -> BoundTensors:
    """An adapter that this engine has bound; AdapterError for one of another engine."""
    if not isinstance(adapter, BoundTensors):
        raise AdapterError("this adapter was bound for another engine", fix="Bind it again.")
    return adapter


def open_session(
    path: Path, *, threads: int | None, providers: Sequence[str] = ()
) -> tuple[Any, ProvidersInUse]:
    """An inference session, and the execution providers it runs on (see
    `edgetune.runtime.engine.providers`).

    `threads` None takes every core that this process may use; `providers` in order of preference,
    none for the CPU.
    """
    import onnxruntime

    chosen, notes = choose(providers)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or threads_to_ask_for()
    options.inter_op_num_threads = 1
    # A memory pattern is one more block for each input shape: prompts have many lengths, and it
    # saved no time (SmolLM2 int4: peak 289 MB with, 272 MB without).
    options.enable_mem_pattern = False
    # errors only: warnings here are about graphs, not about the user's doing
    options.log_severity_level = 3
    if len(chosen) > 1:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        # a provider that refuses the graph is told in a line of our own
        options.log_severity_level = 4
    if any(choice.provider.name in ("cuda", "tensorrt") for choice in chosen):
        with contextlib.redirect_stdout(
            sys.stderr
        ):  # it prints what it misses; answers go to standard output
            # CUDA's libraries out of their own wheels, where they are installed so
            onnxruntime.preload_dlls()
    while True:
        try:
            wanted = [choice.for_session for choice in chosen]
            # Its own way of falling back would print on standard output, where answers go.
            session = onnxruntime.InferenceSession(
                str(path), options, providers=wanted, enable_fallback=0
            )
        except (
            Exception
        ) as error:  # ONNX Runtime raises a family of C++ exceptions without a common base
            if len(chosen) == 1:
                raise BundleError(
                    f"ONNX Runtime cannot open the graph: {error}", where=str(path)
                ) from error
            notes.append(cannot_run(chosen, error))
            chosen = chosen[1:]
        else:
            return session, in_use(session, chosen, notes)


KEY = re.compile(r"past_key_values\.\d+\.key")


class GraphSession:
    """An open graph and its adapter inputs: what both engines are made of."""

    def __init__(
        self,
        folder: str | Path,
        manifest: Manifest,
        *,
        threads: int | None = None,
        providers: Sequence[str] = (),
    ) -> None:
        """`providers`: execution providers in order of preference; see `providers_in_use` for what
        came of it.
        """
        self.folder, self.manifest, self.graph = Path(folder), manifest, manifest.graph
        self.session, self.providers_in_use = open_session(
            self.folder / manifest.graph.engine, threads=threads, providers=providers
        )
        self.place = cache_place(self.session)
        """where the cache and the logits lie; None: in arrays of ours"""
        self._runs_to_settle = 0
        self.rebinds = self.place is not None or self.providers_in_use.names != (CPU,)
        """whether small inputs are bound anew for each run: a device copies them when they are
        bound
        """
        self.inputs = {value.name for value in self.session.get_inputs()}
        self._types = {value.name: value.type for value in self.session.get_outputs()}
        self.outputs = list(self._types)
        empty = {}
        for site in manifest.sites:
            empty[site.A] = np.zeros((1, site.in_features, 0), np.float32)
            empty[site.B] = np.zeros((1, 0, site.out_features), np.float32)
        if manifest.head is not None and not manifest.is_decoder:
            empty[manifest.head.weight] = np.zeros((1, manifest.head.in_features, 0), np.float32)
            empty[manifest.head.bias] = np.zeros((1, 0), np.float32)
        if missing := sorted(set(empty) - self.inputs):
            raise BundleError(
                f"the graph lacks the adapter input {missing[0]}",
                where=str(folder),
                fix="Export it again.",
            )
        self._check_cache(folder)
        self.empty = BoundTensors(empty)
        head = manifest.head
        self._known = {*empty, *(() if head is None else (head.weight, head.bias))}
        self._inactive = self.empty.values
        if manifest.sites and ADAPTER_BRANCH in self.session.get_modelmeta().custom_metadata_map:
            first = manifest.sites[0]
            self._inactive = self.empty.values | {
                first.A: ort_value(np.zeros((0, first.in_features, 0), np.float32))
            }

    def _check_cache(self, folder: str | Path) -> None:
        """BundleError where the graph's keys and values have other sizes than the manifest says."""
        wanted = [self.graph.layers, self.graph.kv_heads, self.graph.head_dim]
        keys = [value.shape for value in self.session.get_inputs() if KEY.fullmatch(value.name)]
        for shape in keys:  # (rows, kv_heads, tokens, head_dim)
            found = [len(keys), shape[1], shape[3]]
            if [isinstance(size, str) or size for size in found] != [
                isinstance(size, str) or want for size, want in zip(found, wanted, strict=True)
            ]:
                raise BundleError(
                    "the manifest describes another graph than the bundle has",
                    where=str(folder),
                    expected="{} layers of {} heads of {} keys and values".format(*found),
                    got="{}, {} and {}".format(*wanted),
                    fix="Copy the bundle again, or export it again.",
                )

    def long_lived(self) -> None:
        """This session will answer for some time: after a few runs its memory may be put in better
        order.
        """
        self._runs_to_settle = SETTLED

    def swapper(self) -> Callable[[AdapterRow], None]:
        """What binds another adapter for the next run; see `Engine`."""
        io = self.session.io_binding()
        return lambda adapter: self.bind_adapters(io, self.group([adapter]))

    def group(self, adapters: Sequence[AdapterRow]) -> BoundTensors:
        """One adapter for all rows (group 1), or one a row (group = rows) with ranks padded by
        zeros.
        """
        first = adapters[0] if adapters else None
        if all(adapter is first for adapter in adapters):
            return self._bound(first)
        return BoundTensors(self._grouped([self._bound(adapter) for adapter in adapters]))

    def bind_adapters(self, io: Any, bound: BoundTensors) -> None:
        """Bind every adapter input; what the adapter lacks gets rank 0. The caller keeps `bound`
        alive.
        """
        if not bound.active:
            for name, value in self._inactive.items():
                io.bind_ortvalue_input(name, value)
            return
        for name, value in self.empty.values.items():
            io.bind_ortvalue_input(name, bound.values.get(name, value))

    def output_buffer(self, name: str, rows: int, wanted: int, width: int) -> OutputBuffer:
        """Room for one output (rows, wanted, width) of a run."""
        return OutputBuffer(self.place, (rows, wanted, width), self._types[name])

    def run_bound(self, io: Any, changing: Mapping[str, Any]) -> None:
        """Run; `changing`: the bound inputs that are written between runs."""
        if self.rebinds:
            for name, value in changing.items():
                io.bind_ortvalue_input(name, value)
        self.run_io(io)

    def run_io(self, io: Any) -> None:
        """Run what is bound."""
        self.session.run_with_iobinding(io)
        if self._runs_to_settle:
            self._runs_to_settle -= 1
            if not self._runs_to_settle:
                use_large_pages()

    def bind(self, tensors: Tensors) -> BoundTensors:
        """Make an adapter ready for this engine; see `Engine`."""
        return BoundTensors(tensors)

    def _bound(self, adapter: AdapterRow) -> BoundTensors:
        if adapter is None:
            return self.empty
        bound = own(adapter) if isinstance(adapter, BoundAdapter) else BoundTensors(adapter)
        if unknown := sorted(set(bound.tensors) - self._known):
            raise AdapterError(
                f"this graph has no adapter input {unknown[0]}",
                fix="Pack the adapter for this bundle.",
            )
        return bound

    def _grouped(self, rows: Sequence[BoundTensors]) -> dict[str, Float32]:
        """Stack the rows' tensors along the group dimension; ranks and label counts differ, so pad
        with zeros.
        """
        grouped = {}
        for name, empty in self.empty.tensors.items():
            arrays = [row.tensors.get(name, empty)[0] for row in rows]
            shape = np.max([array.shape for array in arrays], axis=0)
            stacked = np.zeros((len(rows), *shape), np.float32)
            for i, array in enumerate(arrays):
                stacked[i][tuple(slice(length) for length in array.shape)] = array
            grouped[name] = stacked
        return grouped


class KVCache:
    """Keys and values of `slots` rows: one array a layer and side, (slots, kv_heads, capacity,
    head_dim) in `cache_dtype`.

    Rows sit in slots 0…n-1, so a smaller batch is a view on the front of the same memory.
    """

    def __init__(self, graph: GraphInfo, *, slots: int, capacity: int) -> None:
        self.capacity = capacity
        names = [
            f"{layer}.{side}" for layer in range(graph.layers or 0) for side in ("key", "value")
        ]
        shape = (len(names), slots, graph.kv_heads or 0, capacity, graph.head_dim or 0)
        memory = np.zeros(
            shape, graph.cache_dtype or "float32"
        )  # one block: the system gives pages when they are first written
        self.arrays: dict[str, npt.NDArray[Any]] = dict(zip(names, memory, strict=True))
        self._values: list[Any] = []

    def bind(self, io: Any, rows: int) -> None:
        """Bind the first `rows` slots as past and as present: attention appends in place."""
        self._values = [ort_value(array[:rows]) for array in self.arrays.values()]
        bind_cache(io, list(self.arrays), self._values)

    def keep(self, rows: Sequence[int]) -> None:
        """Move the given rows to the front (ascending order, so nothing is overwritten before it is
        read).
        """
        for array in self.arrays.values():
            for to, source in enumerate(rows):
                if to != source:
                    array[to] = array[source]

    def take(self, other: KVCache, rows: Sequence[int]) -> None:
        """Copy rows of another cache of the same capacity into slots 0, 1, …"""
        for name, array in self.arrays.items():
            array[: len(rows)] = other.arrays[name][list(rows)]
