"""Texts → pooled states and logits over ONNX Runtime."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgetune.core.arrays import Float32, Int64
from edgetune.core.errors import BundleError, InputError
from edgetune.core.head_layers import HeadLayers
from edgetune.core.text import second_of
from edgetune.devices.host import saturates_int8
from edgetune.runtime.bundle.manifest import STATES
from edgetune.runtime.engine.head import (
    LAYER_TENSORS,
    LORA_A,
    base_layers,
    before_output,
    read_by,
)
from edgetune.runtime.engine.interface import AdapterRow, adapter_per_row
from edgetune.runtime.engine.session import BoundTensors, GraphSession, ort_value

log = logging.getLogger("edgetune.runtime")


class EncoderEngine(GraphSession):
    """An encoder graph: texts in, pooled states and the head's logits out."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._own_layers = base_layers(self.folder, self.manifest.head)
        if self.manifest.head is not None:
            self._known |= LAYER_TENSORS
        if self.manifest.precision.activations == "int8" and saturates_int8():
            log.warning(
                "this processor has no VNNI: products of 8-bit integers saturate, and answers are"
                " less exact than where it has; export without --activations int8 for it"
            )
        self._check_manifest()
        self._last: list[tuple[BoundTensors, Any]] = []
        """the last run's adapter and what it was bound to: binding fifty inputs anew takes a tenth
        of a short text's time
        """

    def _check_manifest(self) -> None:
        """BundleError where the manifest describes another graph than this one."""
        sites = self.manifest.sites
        listed = {name for site in sites for name in (site.A, site.B)}
        inputs = {name for name in self.inputs if name.endswith((".lora_A", ".lora_B"))}
        width = next((o.shape[-1] for o in self.session.get_outputs() if o.name == "pooled"), None)
        if listed != inputs or (isinstance(width, int) and width != self.graph.hidden_size):
            raise BundleError(
                "the manifest describes another graph than the bundle has",
                where=self.graph.engine,
                expected=f"{len(inputs)} adapter inputs, states of {width} numbers",
                got=f"{len(listed)} adapter inputs, states of {self.graph.hidden_size} numbers",
                fix="Copy the bundle again, or export it again.",
            )

    def run(
        self,
        rows: Sequence[Sequence[int]],
        adapters: Sequence[AdapterRow] | None = None,
        *,
        pad_token_id: int = 0,
    ) -> tuple[list[Float32], Float32]:
        """Logits (labels of the row's head,) a row, and pooled states (rows, hidden), not
        normalised.

        InputError when a row is empty or longer than the graph's positions.
        """
        chosen, head = adapter_per_row(rows, adapters), self.manifest.head
        layers = None if head is None else head.sequence
        layered = [i for i, one in enumerate(chosen) if LORA_A in self._bound(one).tensors]
        outputs = ["logits", "pooled"]
        if layers is not None and layered and layers.reads != self.graph.pooling:
            outputs.append(STATES)
        logits, pooled, *states = self._run(self._padded(rows, pad_token_id), chosen, outputs)
        found = [logits[i, : self._labels(adapter, logits)] for i, adapter in enumerate(chosen)]
        for i in layered:
            if layers is None:
                break
            read = read_by(layers, states[0][i, : len(rows[i])]) if states else pooled[i]
            found[i] = self._head_of(chosen[i], read, layers)
        return found, pooled

    def tokens(
        self,
        rows: Sequence[Sequence[int]],
        adapters: Sequence[AdapterRow] | None = None,
        *,
        pad_token_id: int = 0,
    ) -> tuple[list[Float32], list[Float32]]:
        """The head's logits of every token (tokens, labels), and the tokens' states (tokens,
        hidden), a row each.

        The head is applied here: one graph serves heads that read a text and heads that read its
        tokens. A merged bundle that tags holds it in the graph. InputError as in `run`.
        """
        chosen, head = adapter_per_row(rows, adapters), self.manifest.head
        inputs = self._padded(rows, pad_token_id)
        wanted = ("last_hidden_state",) if head is not None else ("last_hidden_state", "logits")
        found = self._run(inputs, chosen, wanted)
        states = [found[0][i, : len(row)] for i, row in enumerate(rows)]
        if head is None:
            return [found[1][i, : len(row)] for i, row in enumerate(rows)], states
        logits = [
            self._head_of(adapter, row, head.words)
            for adapter, row in zip(chosen, states, strict=True)
        ]
        return logits, states

    def _head_of(self, adapter: AdapterRow, states: Float32, layers: HeadLayers | None) -> Float32:
        """The logits (…, labels) of a row's head on states (…, hidden)."""
        head, tensors = self.manifest.head, self._bound(adapter).tensors
        assert head is not None
        if layers is not None and LORA_A in tensors:
            states = before_output(states, layers, tensors, self._own_layers)
        weight, bias = (
            tensors.get(name, self.empty.tensors[name])[0] for name in (head.weight, head.bias)
        )
        logits: Float32 = states @ weight + bias
        return logits

    def _padded(self, rows: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, Int64]:
        """Ids, mask and, where the graph takes them, types (1 in the second text of a row), (rows,
        longest), right-padded.
        """
        limit = self.graph.max_length
        for i, row in enumerate(rows):
            if not 0 < len(row) <= limit:
                raise InputError(
                    "a text of a length the model cannot take",
                    where=f"row {i}",
                    expected=f"1 to {limit} tokens",
                    got=str(len(row)),
                )
            if min(row) < 0 or max(row) >= self.graph.vocab_size:
                raise InputError(
                    "a token id outside the vocabulary",
                    where=f"row {i}",
                    expected=f"ids from 0 to {self.graph.vocab_size - 1}",
                    got=str(min(row) if min(row) < 0 else max(row)),
                )
        width = max(map(len, rows))
        ids = np.full((len(rows), width), pad_token_id, np.int64)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
            if (second := second_of(row)) is not None:
                types[i, second : len(row)] = 1
        return {"input_ids": ids, "attention_mask": mask} | (
            {"token_type_ids": types} if "token_type_ids" in self.inputs else {}
        )

    def _run(
        self, inputs: Mapping[str, Int64], adapters: Sequence[AdapterRow], outputs: Sequence[str]
    ) -> list[Float32]:
        bound = self.group(adapters)
        io = self._binding_of(bound)
        values = {name: ort_value(array) for name, array in inputs.items()}
        for name, value in values.items():
            io.bind_ortvalue_input(name, value)
        for name in outputs:
            io.bind_output(name, "cpu")
        self.run_io(io)
        arrays = [value.numpy() for value in io.get_outputs()]
        io.clear_binding_outputs()
        if bound is self.empty or bound is adapters[0]:  # not what was stacked for this batch alone
            self._last = [(bound, io)]
        del values
        return arrays

    def _binding_of(self, bound: BoundTensors) -> Any:
        """A binding whose adapter inputs are these: the last run's where it used the same, and no
        other thread has it now.
        """
        with contextlib.suppress(IndexError):
            last, io = self._last.pop()
            if last is bound:
                return io
        io = self.session.io_binding()
        self.bind_adapters(io, bound)
        return io

    def _labels(self, adapter: AdapterRow, logits: Float32) -> int:
        """How many of the padded logits belong to this row's head."""
        head = self.manifest.head
        if head is None:
            return int(logits.shape[1])
        tensors = self._bound(adapter).tensors
        return 0 if head.bias not in tensors else int(tensors[head.bias].shape[1])
