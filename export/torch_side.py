"""What a bundle holds, in torch in fp32: the other side of its proof."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgetune.adapters import load_adapter
from edgetune.bases import Base, load_body
from edgetune.errors import ExportError
from edgetune.export import merging
from edgetune.export.reference import trained_base
from edgetune.export.sources import Source
from edgetune.heads import RewardModel
from edgetune.runtime.manifest import REWARD
from edgetune.token_classifier import build_classifier


def torch_model(base: Base, source: Source | None = None, *, merge: bool = False) -> Any:
    """The base in torch fp32, with a source's adapter on it (or merged into it)."""
    body = load_body(base).float().eval()
    if source is None or source.is_model:
        return body
    model: Any = RewardModel(body) if source.task == REWARD else body
    if base.kind == "encoder":
        if source.labels is None:
            raise ExportError(
                "an adapter for an encoder needs its labels", where=str(source.folder), expected="edgetune_adapter.json with labels", got="none",
                fix="Adapters of other tools load into a finished bundle with Runtime.load_adapter.",
            )  # fmt: skip
        pooling = source.metadata.get("pooling") or base.pooling
        model = build_classifier(body, task=source.task or "", labels=len(source.labels), pooling=pooling)
    adapted = load_adapter(model, source.folder).eval()
    return merging.merge(adapted, where=str(source.folder)) if merge else adapted


def as_stored(base: Base, sources: Sequence[Source], mode: str) -> Any:
    """What a bundle's graph holds with no adapter active, in torch in fp32."""
    return torch_model(trained_base(base, sources[0].metadata), sources[0], merge=True) if mode == "merged" else torch_model(base)
