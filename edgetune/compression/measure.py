"""An adapter's task metric in torch, as trained and in any form that it may take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from edgetune.core.adapter_codes import decode_file
from edgetune.core.errors import ExportError
from edgetune.core.progress import Say
from edgetune.core.tasks import lower_is_better
from edgetune.export.inputs.small_adapter import SmallAdapter
from edgetune.export.inputs.sources import base_of, read_source
from edgetune.export.proof.task_metric import METRICS, measure_in_torch, relative_loss
from edgetune.export.proof.task_rows import TaskRows, rows_of
from edgetune.export.proof.torch_model import torch_model, trained_base
from edgetune.export.search import AUTO_ROWS


@dataclass(frozen=True)
class TaskFigure:
    """A task metric on some rows."""

    metric: str
    value: float
    rows: int
    data: str

    def loss(self, reference: TaskFigure) -> float:
        """What it lost, relative to `reference`: 0.01 is one hundredth, negative a gain."""
        better = not lower_is_better(self.metric)
        return relative_loss(reference.value, self.value, higher_is_better=better)


class TaskMetric:
    """The rows of one adapter, and a model that takes any form of it."""

    def __init__(
        self,
        folder: Path,
        *,
        rows: int | None,
        data: Path | None,
        base_name: str | None = None,
        say: Say,
    ) -> None:
        """ExportError where there are no rows; the errors of base, data and adapter."""
        self.source = read_source("adapter", folder)
        self.base = base_of([self.source], base_name)
        limit = AUTO_ROWS[self.base.kind] if rows is None else rows
        lines: list[str] = []
        found = rows_of([self.source], limit=limit, data=data, say=lines.append)
        if "adapter" not in found:
            raise ExportError(
                "there are no validation rows to measure on"
                + "".join(f" ({one})" for one in lines),
                where=str(folder),
                expected="a run whose recipe has data.validation or data.hold_out",
                fix="Give --task-data FILE; or --rank, --bits and --task-rows 0.",
            )
        self.rows: TaskRows = found["adapter"]
        self.model = torch_model(trained_base(self.base, self.source.metadata), self.source)
        self._trained = {
            name: tensor.clone() for name, tensor in get_peft_model_state_dict(self.model).items()
        }

    def as_trained(self) -> TaskFigure:
        """The adapter as it is in its folder."""
        set_peft_model_state_dict(self.model, self._trained)
        return self._measure()

    def of(self, small: SmallAdapter) -> TaskFigure:
        """The adapter that these codes stand for."""
        self.put(small)
        return self._measure()

    @torch.no_grad()
    def put(self, small: SmallAdapter) -> None:
        """Give the model the adapter that these codes stand for."""
        tensors = {
            name: torch.from_numpy(array) for name, array in decode_file(small.tensors).items()
        }
        set_peft_model_state_dict(self.model, _as_trained(tensors, self._trained, self.model))

    def _measure(self) -> TaskFigure:
        found = measure_in_torch(self.model, self.base, self.source, self.rows)
        metric = next((name for name in METRICS if name in found.metrics), None)
        if metric is None:
            raise ExportError("no task metric is known for it", where=str(self.source.folder))
        return TaskFigure(metric, found.metrics[metric], found.rows, self.rows.name)


def _as_trained(
    tensors: Mapping[str, Tensor], trained: Mapping[str, Tensor], model: Any
) -> dict[str, Tensor]:
    """The tensors in the shapes of the adapter as trained: ranks that were cut are zeros, its
    scaling is divided out.
    """
    scalings = {
        name: module.scaling["default"]
        for name, module in model.named_modules()
        if "default" in getattr(module, "lora_A", {})
    }
    found = {}
    for name, tensor in tensors.items():
        whole = torch.zeros_like(trained[name])
        module, is_b, _ = name.partition(".lora_B.")
        scale = scalings[module] if is_b else 1.0
        whole[tuple(slice(size) for size in tensor.shape)] = tensor.float() / scale
        found[name] = whole
    return found
