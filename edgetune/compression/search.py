"""The smallest form of an adapter whose task metric stays within a bound of the adapter as trained.

Sizes lie on a front of bytes and of what is kept of ΔW; that is computed, so only sizes on the
front are measured: in torch, on the run's validation rows, as `export` measures bundles. The
smallest that holds is found by halving; then, among those below it, the smallest that holds after
some steps of training against its codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from edgetune.compression.finish import finish
from edgetune.compression.measure import TaskFigure, TaskMetric
from edgetune.core.adapter_codes import BITS
from edgetune.core.errors import ExportError
from edgetune.core.progress import Progress
from edgetune.export.inputs.small_adapter import (
    Factors,
    SmallAdapter,
    code_bytes,
    factors_of,
    kept_effect,
    mean_rank,
    ranks_within,
    round_factors,
    small_adapter,
    spectra_of,
)
from edgetune.runtime.adapters.lora import LoraFolder

RANKS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""numbers that are tried, as the rank of every module that takes as many"""
STEPS = 100
"""of the training against the codes"""


@dataclass(frozen=True)
class AdapterSize:
    """A form that an adapter may take."""

    factors: Mapping[str, Factors]
    bits: int
    bytes: int
    """of its codes and scales"""
    kept: float
    """the share of |ΔW|² that they keep"""


@dataclass(frozen=True)
class SizeTrial:
    """One form that was measured."""

    rank: float
    """of all modules, in the mean by their numbers"""
    bits: int
    bytes: int
    """of the weights file"""
    kept: float
    steps: int
    """of the training against the codes; 0: none"""
    metric: float | None
    """None where there are no rows"""
    loss: float | None
    """relative to the adapter as trained"""

    def to_dict(self) -> dict[str, Any]:
        """For edgetune_adapter.json."""
        return asdict(self)


@dataclass(frozen=True)
class Compressed:
    """What a search found."""

    trials: Sequence[SizeTrial]
    chosen: int
    whole_bytes: int
    """of the weights file as trained"""
    reference: TaskFigure | None
    """the adapter as trained"""


def sizes_of(
    read: LoraFolder, *, rank: float | None = None, bits: int | None = None
) -> list[AdapterSize]:
    """The forms that no smaller one equals, the smallest first; of a `rank` or `bits` that is asked
    for.
    """
    spectra = spectra_of(read)
    most = mean_rank(spectra)
    means = [one for one in RANKS if one < most] + [most] if rank is None else [min(rank, most)]
    found = []
    for own_bits in BITS if bits is None else (bits,):
        shipped = round_factors(spectra, own_bits)
        for mean in means:
            ranks = ranks_within(spectra, mean)
            factors = factors_of(spectra, ranks)
            kept = kept_effect(spectra, _cut(shipped, ranks))
            found.append(AdapterSize(factors, own_bits, code_bytes(factors, own_bits), kept))
    front: list[AdapterSize] = []
    for size in sorted(found, key=lambda one: (one.bytes, -one.kept)):
        if not front or size.kept > front[-1].kept:
            front.append(size)
    return front


def _cut(factors: Mapping[str, Factors], ranks: Mapping[str, int]) -> dict[str, Factors]:
    return {
        module: Factors(own.a[: ranks[module]], own.b[:, : ranks[module]])
        for module, own in factors.items()
    }


class Search:
    """Measures forms of one adapter, and remembers the form behind every trial."""

    def __init__(
        self,
        read: LoraFolder,
        task: TaskMetric | None,
        *,
        max_loss: float | None,
        steps: int,
        progress: Progress,
    ) -> None:
        self.read, self.task, self.max_loss = read, task, max_loss
        self.steps, self.progress = steps, progress
        self.trials: list[SizeTrial] = []
        self.made: list[SmallAdapter] = []  # one a trial
        self.reference = None if task is None else task.as_trained()

    def tried(self, size: AdapterSize, *, steps: int = 0) -> SizeTrial:
        """Round, or train against the codes and round; and measure."""
        read, factors, kept = self.read, size.factors, size.kept
        if steps:
            self.progress.say(f"training rank {mean_rank(factors):.3g} against {size.bits} bits")
            done = finish(read, factors, size.bits, steps=steps, progress=self.progress)
            read, factors = replace(read, head=dict(done.head)), done.factors
            kept = kept_effect(spectra_of(self.read), round_factors(factors, size.bits))
        small = small_adapter(read, factors, size.bits)
        found = None if self.task is None else self.task.of(small)
        trial = SizeTrial(
            rank=mean_rank(factors),
            bits=size.bits,
            bytes=len(small.file),
            kept=kept,
            steps=steps,
            metric=None if found is None else found.value,
            loss=None if found is None or self.reference is None else found.loss(self.reference),
        )
        self.trials.append(trial)
        self.made.append(small)
        self.progress.say(size_line(trial))
        return trial

    def holds(self, size: AdapterSize, *, steps: int = 0) -> bool:
        """Whether it keeps within the bound."""
        trial = self.tried(size, steps=steps)
        return self.max_loss is None or trial.loss is None or trial.loss <= self.max_loss

    def forced(self, size: AdapterSize) -> int:
        """The trial of a size that was asked for, also trained against its codes."""
        self.tried(size)
        if self.steps:
            self.tried(size, steps=self.steps)
        losses = [trial.loss for trial in self.trials if trial.loss is not None]
        return losses.index(min(losses)) if losses else len(self.trials) - 1

    def smallest(self, sizes: Sequence[AdapterSize]) -> int:
        """The trial of the smallest size that holds. ExportError where none does, or where the
        adapter as trained gets nothing right: no size could lose by that.
        """
        reference = self.reference
        if reference is not None and not (math.isfinite(reference.value) and reference.value):
            raise ExportError(
                f"the adapter as trained has {reference.metric} {reference.value:g} on these rows,"
                " so they choose no size",
                where=str(self.read.path),
                got=f"{reference.rows} rows of {reference.data}",
                fix="Give other rows (--task-data FILE, more --task-rows), or --rank and --bits.",
            )
        chosen = -1

        def note(size: AdapterSize, *, steps: int = 0) -> bool:
            nonlocal chosen
            held = self.holds(size, steps=steps)
            chosen = len(self.trials) - 1 if held else chosen
            return held

        first = halved(sizes, note)
        if self.steps:
            halved(sizes[:first], lambda size: note(size, steps=self.steps))
        if chosen < 0:
            losses = [trial.loss for trial in self.trials if trial.loss is not None]
            raise ExportError(
                f"no size keeps within --max-loss {self.max_loss:.2%} of the adapter as trained",
                where=str(self.read.path),
                got=f"{min(losses):.2%} at best",
                fix="Give a larger --max-loss, or more --task-rows.",
            )
        return chosen


def halved(sizes: Sequence[AdapterSize], holds: Callable[[AdapterSize], bool]) -> int:
    """The index of the smallest that holds, where every larger one does; len(sizes): none."""
    low, high = 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        if holds(sizes[middle]):
            high = middle
        else:
            low = middle + 1
    return low


def size_line(trial: SizeTrial) -> str:
    """`rank 3 in 3 bits: 0.37 MB, 88.5% of ΔW kept, metric 0.87 (+0.00%)`."""
    after = f" after {trial.steps} steps" if trial.steps else ""
    metric = "" if trial.metric is None else f", metric {trial.metric:.4f}"
    loss = "" if trial.loss is None else f", loss {trial.loss:+.2%}"
    return (
        f"rank {trial.rank:.3g} in {trial.bits} bits{after}: {trial.bytes / 1e6:.3f} MB,"
        f" {trial.kept:.1%} of ΔW kept{metric}{loss}"
    )
