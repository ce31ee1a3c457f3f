"""A program that ONNX can say as it stands is not traced again, and the graph is the same."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

from edgetune.export.graph import decomposition, trace
from edgetune.export.graph.trace import trace_encoder
from edgetune.models.load import load_body
from edgetune.models.resolve import resolve_base


def test_the_graph_is_the_one_of_a_program_taken_apart(
    tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    plain = decomposition._is_plain
    monkeypatch.setattr(
        decomposition, "_is_plain", lambda *given: seen.append(plain(*given)) or seen[-1]
    )
    base = resolve_base(str(tiny_encoder))

    def graph() -> list[str]:
        nodes = trace_encoder(load_body(base), pooling="mean", max_length=32).graph
        return [f"{node.op_type} {sorted(node.attributes)} {len(node.inputs)}" for node in nodes]

    without = graph()
    assert seen == [True]
    monkeypatch.setattr(trace, "only_where_needed", contextlib.nullcontext)
    assert without == graph() and seen == [True]


class Changes(nn.Module):
    """Writes into a tensor of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 1).mul_(2)


class Casts(nn.Module):
    """Ends in a cast, whose name is the program's."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 1).to(torch.float64)


class Unknown(nn.Module):
    """Has an operator that the exporter has no form of."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


@pytest.mark.parametrize("module", [Changes(), Casts(), Unknown()])
def test_a_program_that_must_be_taken_apart_is(module: nn.Module) -> None:
    program = torch.export.export(module, (torch.ones(2, 3),))
    assert not decomposition._is_plain(program, ONNXRegistry.from_torchlib())
