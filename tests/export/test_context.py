"""A bundle with fewer positions than its base says so, and keeps more where asked to."""

from __future__ import annotations

from pathlib import Path

import pytest
from family_helpers import make_family

from edgetune.export.bundle import export_bundle
from edgetune.export.proof.task_metric import TaskPlan
from edgetune.quantisation.precision import Precision


@pytest.mark.parametrize(("context", "kept"), [(None, 8192), (10_000, 10_000)])
def test_a_cut_context_is_said(
    context: int | None, kept: int, tiny_decoder: Path, tmp_path: Path
) -> None:
    base = make_family("llama", tiny_decoder, tmp_path / "base", max_position_embeddings=32768)
    lines: list[str] = []
    manifest = export_bundle(
        [],
        tmp_path / "out",
        precision=Precision("fp32"),
        base_name=str(base),
        threads=1,
        task=TaskPlan(0),
        say=lines.append,
        context=context,
    )
    assert manifest.graph.max_length == kept
    said = f"context: the base has 32,768 positions, the bundle {kept:,}; --context N keeps more"
    assert any(line.startswith(said) for line in lines)
    assert manifest.proof["text"]["texts"] > 40
