"""One training step of SmolLM2 with and without the fused parts of a layer, in turns; a line each,
then the ratio.

    python benchmarks/training_step.py [--threads 2] [--tokens 60] [--rounds 5] [--compile]

`--compile`: PEFT's own layers through torch.compile too, and how long the compiling takes for one
more length of rows.

LoRA r = 8 on all linear layers, the format that training chooses on this processor, 8 rows; the
second half of each row is answered. Also the difference of loss and gradients in fp32.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from edgetune.adapters.lora import adapt
from edgetune.data.batching import IGNORE, Batch
from edgetune.models.load import load_body
from edgetune.models.resolve import resolve_base
from edgetune.models.torch_device import (
    Precision,
    autocast,
    choose_precision,
    hold_frozen_linears_in_bf16,
)
from edgetune.objectives.language import sft
from edgetune.recipe.schema import Parameters
from edgetune.training.fast.fused_layers import fused_ops
from edgetune.training.fast.lora_products import fused_lora

ROWS = 8


def random_batch(tokens: int) -> Batch:
    """Rows of random tokens with loss on the second half."""
    ids = torch.randint(0, 40000, (ROWS, tokens), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, : tokens // 2] = IGNORE
    return Batch(
        ids,
        torch.ones_like(ids),
        labels,
        tuple(range(ROWS)),
        ids.numel(),
        int((labels[:, 1:] != IGNORE).sum()),
    )


def step(
    model: Any, batch: Batch, precision: Precision, *, fused: bool, forward: Any = None
) -> tuple[float, torch.Tensor]:
    """Loss and all gradients in one vector; `forward` is the compiled model, if any."""
    model.zero_grad()
    lora = fused_lora(model, precision) if forward is None else contextlib.nullcontext()
    with autocast(precision), lora, fused_ops(model) if fused else contextlib.nullcontext():
        loss, _ = sft(model if forward is None else forward, batch)
    loss.backward()
    return loss.item(), torch.cat(
        [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    )


def timed(call: Callable[[], Any]) -> float:
    """Seconds."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = adapt(
        load_body(resolve_base("builtin:smollm2-135m-instruct")),
        Parameters(),
        task="text-generation",
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    batch = random_batch(options.tokens)
    (loss, expected), (fused_loss, gradients) = (
        step(model, batch, "fp32", fused=fused) for fused in (False, True)
    )
    difference = float((gradients - expected).norm() / expected.norm())
    print(
        f"fp32: loss {loss:.6f} and {fused_loss:.6f}, gradients differ by {difference:.1e} of their"
        " length"
    )
    precision = choose_precision("auto", hidden=576)
    if precision == "bf16":
        hold_frozen_linears_in_bf16(model)
    print(f"{precision}, {options.threads} threads")
    variants: dict[str, Callable[[], Any]] = {
        "plain": lambda: step(model, batch, precision, fused=False),
        "fused": lambda: step(model, batch, precision, fused=True),
    }
    if options.compile:
        compiled: Any = torch.compile(model, dynamic=True)
        variants["compiled"] = lambda: step(model, batch, precision, fused=False, forward=compiled)
        first = timed(variants["compiled"])
        longer = random_batch(options.tokens + 7)
        second = timed(lambda: step(model, longer, precision, fused=False, forward=compiled))
        print(f"compiled: first step {first:.1f} s, first step of another length {second:.1f} s")
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(options.rounds):
        for name, variant in variants.items():
            seconds[name].append(timed(variant))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        print(
            f"{name} {batch.tokens / median:.0f} tok/s, {medians['plain'] / median:.2f} times plain"
        )


if __name__ == "__main__":
    main()
