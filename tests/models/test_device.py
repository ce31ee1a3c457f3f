"""Batches follow the model to its device; frozen layers keep nothing and learn nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_helpers import classifier_batch, decoder_batch

from edgetune.adapters.lora import adapt
from edgetune.core.errors import TrainingError
from edgetune.models.torch_device import (
    CPU_DEVICE,
    choose_device,
    choose_precision,
    device_of,
    has_bf16,
    to_device,
)
from edgetune.objectives.language import Objective, sequence_classification, sft
from edgetune.recipe.schema import Parameters
from edgetune.training.fast.lora_products import fused_lora

META = torch.device(
    "meta"
)  # stands in for a GPU: a device that is not the CPU and is on every machine


@dataclass(frozen=True)
class Pair:
    chosen: Tensor
    both: tuple[Tensor, list[Tensor]]
    named: dict[str, Tensor]
    rows: tuple[int, ...]


def test_every_tensor_of_a_batch_goes_along_and_nothing_else_changes(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    _, batch = decoder_batch(tiny_decoder, tmp_path)
    moved = to_device(batch, META)
    assert {moved.input_ids.device, moved.attention_mask.device, moved.labels.device} == {META}
    assert (moved.rows, moved.tokens, moved.targets) == (batch.rows, batch.tokens, batch.targets)
    pair = to_device(
        Pair(torch.ones(1), (torch.ones(2), [torch.ones(3)]), {"a": torch.ones(4)}, (7,)), META
    )
    assert {t.device for t in (pair.chosen, pair.both[0], pair.both[1][0], pair.named["a"])} == {
        META
    }
    assert pair.rows == (7,)


def test_on_the_cpu_a_batch_is_itself(tiny_decoder: Path, tmp_path: Path) -> None:
    _, batch = decoder_batch(tiny_decoder, tmp_path)
    assert to_device(batch, CPU_DEVICE) is batch


def test_a_device_that_is_not_there_is_named_with_those_that_are() -> None:
    missing = [
        k
        for k, there in (
            ("cuda", torch.cuda.is_available()),
            ("mps", torch.backends.mps.is_available()),
        )
        if not there
    ]
    for kind in missing:
        with pytest.raises(
            TrainingError,
            match=rf'device = "{kind}" is not on this machine \(expected one of .*cpu',
        ):
            choose_device(kind)
    there = [kind for kind in ("cuda", "mps", "cpu") if kind not in missing]
    assert choose_device("cpu") == CPU_DEVICE and choose_device("auto").type == there[0]


def test_bf16_is_not_chosen_by_itself_where_it_is_emulated() -> None:
    assert (
        not has_bf16(torch.device("mps"))
        and choose_precision("auto", hidden=64, device=torch.device("mps")) == "fp32"
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_ends_near_the_cpu(precision: str, tiny_decoder: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from training_helpers import sft_recipe, silent

    from edgetune.training import run_recipe

    recipe = sft_recipe(tiny_decoder, tmp_path, precision=precision, learning_rate=1e-3)
    on_cpu = run_recipe(replace(recipe, device="cpu"), out=tmp_path / "cpu", progress=silent())
    on_gpu = run_recipe(replace(recipe, device="cuda"), out=tmp_path / "gpu", progress=silent())
    assert on_gpu.device == "cuda" and on_gpu.peak_device_mb
    assert on_gpu.metrics["loss"] == pytest.approx(
        on_cpu.metrics["loss"], rel=1e-4 if precision == "fp32" else 0.05
    )


MODELS: dict[str, tuple[Callable[..., Any], Objective, str, str]] = {
    "decoder": (decoder_batch, sft, "text-generation", r".*layers\.1\..*"),
    "encoder": (
        classifier_batch,
        sequence_classification,
        "sequence-classification",
        r".*layer\.1\..*dense",
    ),
}


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_nothing_is_kept_below_the_first_adapted_layer(
    kind: str, tiny_decoder: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    make, objective, task, target = MODELS[kind]
    plain, batch = make(tiny_decoder if kind == "decoder" else tiny_encoder, tmp_path)
    model = adapt(plain, Parameters(target_modules=target), task=task).train()
    layers = [
        module
        for name, module in model.named_modules()
        if name.endswith((".layers.0", ".layers.1", ".layer.0", ".layer.1"))
    ]
    inside, kept, outputs = list[int](), list[int](), dict[int, Tensor]()

    def enter(number: int) -> Callable[..., None]:
        return lambda module, *_: inside.append(number)

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs[inside.pop()] = output[0] if isinstance(output, tuple) else output

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(enter(number))
        layer.register_forward_hook(leave)

    def pack(tensor: Tensor) -> Tensor:
        kept.append(inside[-1] if inside else -1)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        fused_lora(model, "fp32"),
    ):
        loss, _ = objective(model, batch)
    loss.backward()
    assert len(layers) == 2 and 1 in kept and 0 not in kept
    assert not outputs[0].requires_grad and outputs[1].requires_grad
    learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learned == {
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    assert (
        not any(".0." in name.split("lora_")[0] for name in learned)
        and device_of(model) == CPU_DEVICE
    )
