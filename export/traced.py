"""A graph that is traced once and lowered several times, for bundles of one model at several precisions."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir


class Traced:
    """Keeps the graph of the first caller; everybody gets a copy that shares its weights."""

    def __init__(self) -> None:
        self._model: ir.Model | None = None

    def copy(self, trace: Callable[[], ir.Model]) -> ir.Model:
        """A graph of one's own; `trace` makes it the first time, and is not called again."""
        if self._model is None:
            self._model = trace()
        return self._model.clone()
