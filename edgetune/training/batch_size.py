"""`batch_size = "auto"`: the largest batch that fits in one pass, measured once.

A pass over a batch of the longest rows is timed for 4, 8, 16 … rows. The batch grows while it fits
(a GPU's memory; on the CPU half of what is free), while a row becomes cheaper with it, and while an
epoch still has STEPS steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from edgetune.core.errors import RecipeError
from edgetune.core.memory import peak_rss_mb, reset_peak_rss
from edgetune.data.batching import steps_per_epoch
from edgetune.models.torch_device import device_of, generators_untouched
from edgetune.training.context import ResolvedRun, ResolvedStage
from edgetune.training.learner import Learner
from edgetune.training.stage_model import RunModel

FIRST, MOST, STEPS = 4, 512, 20  # rows of the first try and of the last; steps of an epoch at least
GAIN = 0.05  # a batch of twice the rows must take this share less time for a row
FREE = 0.5  # of the CPU's free memory; of a GPU's memory MOST_OF_GPU
MOST_OF_GPU = 0.8
MEMINFO = Path("/proc/meminfo")


def measured_size(run: ResolvedRun, stage: ResolvedStage, model: RunModel) -> int:
    """Rows a step for this stage on this machine; the model and every generator stay as they are.
    RecipeError for a stage whose steps are more than a pass.
    """
    if stage.replay is not None or stage.method == "grpo":
        what = "replay" if stage.replay is not None else "grpo"
        raise RecipeError(
            f'stage.{stage.index}.batch_size = "auto" has no meaning with {what}, whose steps are'
            " more than one pass",
            fix="Give a number.",
        )
    trained = model.for_stage(stage, begins=False)
    learner = Learner(trained, stage.precision)
    rows = sorted(stage.examples.train, key=stage.batching.length, reverse=True)

    def seconds(size: int) -> float:
        batch = stage.batching.batch(rows[:size], 1)
        started = time.perf_counter()
        learner.add_gradient(stage.objective, [batch], spare=lambda: batch, weight=1.0)
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        return time.perf_counter() - started

    with generators_untouched(device_of(trained)):
        trained.train()
        try:
            return largest(seconds, sizes(len(rows)), memory=_memory(run.device))
        finally:
            trained.zero_grad(set_to_none=True)
            trained.eval()


def sizes(rows: int) -> Iterator[int]:
    """The batches to try: twice as many rows each time."""
    size = FIRST
    yield size
    while size * 2 <= MOST and steps_per_epoch(rows, size * 2) >= STEPS:
        size *= 2
        yield size


def largest(
    seconds: Callable[[int], float], tried: Iterator[int], *, memory: Callable[[], float]
) -> int:
    """The largest size that fits and makes a row cheaper. `seconds` of one pass; `memory`: the
    share of the budget that passes have taken since it was asked last.
    """
    chosen, cheapest = FIRST, float("inf")
    for size in tried:
        try:
            seconds(size)  # the first pass pays for what the others find done
            memory()
            each = min(seconds(size), seconds(size)) / size
        except torch.OutOfMemoryError:
            break
        if each > (1 - GAIN) * cheapest:
            break
        chosen, cheapest = size, each
        if 2 * memory() > 1:  # twice the rows take about twice the memory
            break
    return chosen


def _memory(device: torch.device) -> Callable[[], float]:
    if device.type == "cuda":
        return lambda: (
            torch.cuda.max_memory_allocated(device)
            / torch.cuda.get_device_properties(device).total_memory
            / MOST_OF_GPU
        )
    free, held = _free_mb(), peak_rss_mb()

    def grown() -> float:
        share = max(0.0, peak_rss_mb() - held) / (FREE * free) if free else 0.0
        reset_peak_rss()
        return share

    return grown


def _free_mb() -> float | None:
    """Memory that is free on this machine, MB; None where only Linux could tell."""
    lines = MEMINFO.read_text().splitlines() if MEMINFO.exists() else []
    return next(
        (int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("MemAvailable:")),
        None,
    )
