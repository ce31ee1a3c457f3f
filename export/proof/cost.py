"""What a precision costs, apart from any task: the base in torch in fp32 beside the bundle with no
adapter active, on WikiText-2 (decoders: perplexity) or STS-B (encoders: Spearman's correlation of
cosines with people's scores).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgetune.core.errors import EdgetuneError
from edgetune.core.progress import Say
from edgetune.evaluation.forgetting.measure import General, Subject, compare_general
from edgetune.evaluation.forgetting.subjects import BundleSubject
from edgetune.evaluation.forgetting.torch_subject import TorchSubject
from edgetune.models.base import Base
from edgetune.models.load import load_tokenizer
from edgetune.runtime import Runtime
from edgetune.runtime.bundle.manifest import Manifest
from edgetune.runtime.tasks.open_bundle import OpenBundle

TASK = {"decoder": "wikitext2", "encoder": "stsb"}
ITEMS = {"decoder": 6, "encoder": 400}  # windows of 512 tokens; pairs of sentences
UNITS = {"wikitext2": "windows of at most 512 tokens", "stsb": "pairs"}


@dataclass(frozen=True)
class Cost:
    """One metric of the base in torch in fp32, and of the bundle."""

    task: str
    metric: str
    items: int
    higher_is_better: bool
    torch: float
    bundle: float

    @property
    def loss(self) -> float:
        """What was lost, as a share of torch's value; below 0 where the bundle is better."""
        change = self.bundle / self.torch - 1 if self.torch else 0.0
        return -change if self.higher_is_better else change

    def line(self) -> str:
        """For a person."""
        figures = f"{self.torch:.4g} in torch fp32, {self.bundle:.4g} in the bundle"
        return (
            f"{self.task} {self.metric} {figures}: {100 * round(self.loss, 3) + 0.0:.1f} % worse"
            f" ({self.items} {UNITS[self.task]})"
        )

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {**asdict(self), "loss": self.loss}


@dataclass(frozen=True)
class CostPlan:
    """Where the general sets are, and how many items of the one set count."""

    general: Path
    items: int | None = None
    """None: `ITEMS`; 0: nothing is measured"""
    known: dict[str, General] | None = None
    """what torch gave, kept from bundle to bundle of the same base"""

    def measure(
        self,
        folder: Path,
        manifest: Manifest,
        base: Base,
        model: Callable[[], Any],
        *,
        threads: int | None,
        say: Say,
    ) -> Cost | None:
        """The base's cost; None, with a line, where it cannot be measured. `model`: what the bundle
        holds, in torch in fp32.
        """
        limit = ITEMS.get(base.kind, 0) if self.items is None else self.items
        if base.kind not in TASK:
            if limit:
                say(
                    f"cost of {manifest.precision.weights}: not measured: no general set is for an"
                    f" {base.kind}"
                )
            return None
        if not limit:
            return None
        known = {} if self.known is None else self.known
        try:
            if base.digest not in known:
                known[base.digest] = self._one(_in_torch(base, model()), base, limit)
            base_alone = manifest if manifest.mode == "merged" else replace(manifest, adapters=())
            with Runtime(OpenBundle(folder, base_alone, threads=threads)) as runtime:
                shipped = self._one(BundleSubject(runtime, None), base, limit)
        except EdgetuneError as error:
            say(f"cost of {manifest.precision.weights}: not measured: {error}")
            return None
        before = known[base.digest]
        cost = Cost(
            before.task,
            before.metric,
            before.items,
            before.higher_is_better,
            before.before,
            shipped.before,
        )
        say(f"cost of {manifest.precision.weights}: {cost.line()}")
        return cost

    def _one(self, subject: Subject, base: Base, limit: int) -> General:
        return compare_general(
            subject, self.general, limit=limit, tasks=(TASK[base.kind],), trained=False
        )[0]


def _in_torch(base: Base, model: Any) -> TorchSubject:
    def lend() -> Any:
        return contextlib.nullcontext(model)

    return TorchSubject(
        load_tokenizer(base),
        kind=base.kind,
        limit=base.max_length,
        pooling=base.pooling,
        before=lend,
        after=lend,
    )
