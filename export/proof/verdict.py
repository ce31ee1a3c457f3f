"""What a proof's figures mean to somebody who ships the bundle: as trained, changed by so much, or
refused.

Rounding is held against what the adapter itself does: its KL(p‖q) against KL(p‖p₀), the share of
positions whose likeliest answer it changes against the share that the adapter changes. And, where
there are validation rows, the task metric in torch against the one in the bundle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from edgetune.core.errors import ProofError
from edgetune.export.proof.proof import TRY_AFTER_MERGING, Proof
from edgetune.export.proof.task_loss import ENOUGH_ROWS, POINT, line_of
from edgetune.export.proof.task_metric import TaskResult
from edgetune.runtime.bundle.manifest import Manifest
from edgetune.runtime.tasks.choose_engine import ONNX_RUNTIME

AS_TRAINED, CHANGED, REFUSED = "as trained", "changed", "refused"
GRADES = (AS_TRAINED, CHANGED, REFUSED)
"""the better ones first"""
NOTHING_SEEN = 0.01
"""As trained: rounding is at most this share of the adapter's effect, and as few of the rows and
positions are answered otherwise."""
LARGEST_SHARE = 0.2
"""Rounding may be this share of the adapter's effect where no task metric says what that costs."""
LARGEST_SHARE_MEASURED = 0.5
"""The same where `ENOUGH_ROWS` validation rows say it."""
BASE_KL, BASE_TOP1 = 0.3, 0.25
"""Of a base alone, which has no adapter to compare with: nats (a text's perplexity grows by a
third), and the share of positions with another likeliest token."""
ALLOW = "--allow-metric-loss"
TRY = "Try --precision int8, a smaller --block-size or --quantiser gptq."


@dataclass(frozen=True)
class ProofVerdict:
    """Of one adapter in one bundle."""

    value: str
    """AS_TRAINED, CHANGED or REFUSED"""
    says: str
    """by how much, in numbers for people"""
    reasons: tuple[str, ...] = ()
    """why it is refused, or would have been"""
    allowed_by: str = ""
    """the option that ships it in spite of them"""

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {**asdict(self), "reasons": list(self.reasons)}

    def line(self) -> str:
        """For a person."""
        despite = f"; {self.allowed_by}: {'; '.join(self.reasons)}" if self.reasons else ""
        return f"{self.value}: {self.says}{despite}"


def judge_adapter(
    proof: Proof, task: TaskResult | None, *, allowed_by: str = "", measured: bool = False
) -> ProofVerdict:
    """The verdict of one adapter; an option that allows losses turns a refusal into a change that
    says so. `measured`: its task metric was taken before, on enough rows.
    """
    reasons = (
        *_against_the_effect(proof, measured=_enough(task) or measured),
        *(_lost(task, proof) if task else ()),
    )
    says = _figures(proof, task)
    if reasons:
        return ProofVerdict(CHANGED if allowed_by else REFUSED, says, reasons, allowed_by)
    return ProofVerdict(AS_TRAINED if _nothing_seen(proof, task) else CHANGED, says)


ByEngine = Mapping[str, Mapping[str, Proof]]
"""Proofs by the engine's name and the adapter's."""


def verdicts_of(
    proven: ByEngine, tasks: Mapping[str, TaskResult], *, allowed_by: str = ""
) -> dict[str, ProofVerdict]:
    """The verdict of every adapter of a bundle: of two engines the worse one's."""
    return {
        name: _worst(
            {
                engine: judge_adapter(proof, tasks.get(name), allowed_by=allowed_by)
                for engine, proof in _of_adapter(proven, name)
            }
        )
        for name in _adapters(proven)
    }


def _adapters(proven: ByEngine) -> list[str]:
    return list(dict.fromkeys(name for proofs in proven.values() for name in proofs))


def _of_adapter(proven: ByEngine, name: str) -> list[tuple[str, Proof]]:
    return [(engine, proofs[name]) for engine, proofs in proven.items() if name in proofs]


def _worst(verdicts: Mapping[str, ProofVerdict]) -> ProofVerdict:
    """The worst of several engines' verdicts, the first of equals; another engine than ONNX Runtime
    is named.
    """
    engine = max(verdicts, key=lambda name: GRADES.index(verdicts[name].value))
    worst = verdicts[engine]
    if engine == ONNX_RUNTIME:
        return worst
    return replace(
        worst,
        says=f"{engine} engine: {worst.says}",
        reasons=tuple(f"{engine} engine: {reason}" for reason in worst.reasons),
    )


def demand_verdicts(
    verdicts: Mapping[str, ProofVerdict], *, where: str, merged: bool = False
) -> None:
    """ProofError that lists every refused adapter and why, when any is."""
    refused = {name: one for name, one in verdicts.items() if one.value == REFUSED}
    if refused:
        lines = "; ".join(
            f"{name}: {one.says}. {'; '.join(one.reasons)}" for name, one in refused.items()
        )
        raise ProofError(
            f"the bundle is not what was trained: {lines}",
            where=where,
            fix=(
                f"Nothing was written. {TRY_AFTER_MERGING if merged else TRY} {ALLOW} ships it as"
                " it is, and records the loss."
            ),
        )


def verdicts_again(
    manifest: Manifest,
    proven: ByEngine,
    tasks: Mapping[str, TaskResult],
    *,
    allowed_by: str = "",
) -> dict[str, ProofVerdict]:
    """The verdicts of a finished bundle; what its export measured and was told to allow still
    holds.
    """
    return {
        name: _worst(
            {
                engine: judge_adapter(
                    proof,
                    tasks.get(name),
                    allowed_by=allowed_by
                    or str(_recorded(manifest, "verdict", name, "allowed_by") or ""),
                    measured=_counted(_recorded(manifest, "task", name, "rows")),
                )
                for engine, proof in _of_adapter(proven, name)
            }
        )
        for name in _adapters(proven)
    }


def _recorded(manifest: Manifest, *keys: str) -> Any:
    """A value of the manifest's proof; None where it is not there, as in older bundles."""
    value: Any = manifest.proof
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _counted(rows: Any) -> bool:
    return isinstance(rows, int) and rows >= ENOUGH_ROWS


def _enough(task: TaskResult | None) -> bool:
    return task is not None and task.changed is not None and task.changed.answered >= ENOUGH_ROWS


def _against_the_effect(proof: Proof, *, measured: bool) -> Iterator[str]:
    """Rounding that is too large beside what the adapter does."""
    other = 1 - proof.top1
    if not proof.adapter_kl:
        if not proof.mean_kl <= BASE_KL:
            yield f"rounding is {proof.mean_kl:.2g} nats a position, bound {BASE_KL:g}"
        if not other <= BASE_TOP1:
            yield f"another likeliest token at {other:.1%} of positions, bound {BASE_TOP1:.0%}"
        return
    share = LARGEST_SHARE_MEASURED if measured else LARGEST_SHARE
    if not proof.mean_kl <= share * proof.adapter_kl:
        yield (
            f"rounding moves its answers by {proof.mean_kl:.2g} nats,"
            f" {proof.mean_kl / proof.adapter_kl:.0%} of what the adapter itself does"
            f" ({proof.adapter_kl:.2g}), bound {share:.0%}"
        )
    if not other <= share * proof.top1_effect:
        yield (
            f"rounding changes the likeliest answer at {other:.1%} of positions, the adapter itself"
            f" at {proof.top1_effect:.1%}, bound {share:.0%} of that"
        )


def _lost(task: TaskResult, proof: Proof) -> Iterator[str]:
    """What the task lost, beyond a point and beyond chance."""
    if task.changed is not None:
        if task.points > POINT and task.changed.beyond_chance:
            rows = f"{task.rows} of {task.found} rows of {task.data}"
            yield f"more than a point and chance lost on {rows}: {line_of(task.changed)}"
        return
    nats = math.log(task.bundle[task.metric] / task.torch[task.metric])
    bound = max(
        math.log1p(POINT), LARGEST_SHARE * proof.adapter_kl if proof.adapter_kl else BASE_KL
    )
    if not nats <= bound:
        yield f"{_metric(task)}: {nats:.2g} nats a token, bound {bound:.2g}"


def _nothing_seen(proof: Proof, task: TaskResult | None) -> bool:
    effect = proof.adapter_kl or 1.0
    figures = [proof.mean_kl / effect, 1 - proof.top1]
    if task is not None:
        figures.append(task.points if task.changed is not None else task.loss)
    if task is not None and task.changed is not None:
        figures.append(task.changed.changed / task.changed.answered)
    return all(figure <= NOTHING_SEEN for figure in figures)


def _figures(proof: Proof, task: TaskResult | None) -> str:
    share = f"rounding is {_share(proof)}"
    if task is None:
        return (
            f"same likeliest answer at {proof.top1:.1%} of {proof.positions} positions; {share}; no"
            " validation rows measured"
        )
    if task.changed is None:
        return f"{_metric(task)}; {share}"
    same = task.changed.answered - task.changed.changed
    return f"same answer on {same} of {task.changed.answered} rows; {_metric(task)}"


def _share(proof: Proof) -> str:
    if not proof.adapter_kl:
        return f"{proof.mean_kl:.2g} nats a position"
    return f"{proof.mean_kl / proof.adapter_kl:.1%} of the adapter's effect"


def _metric(task: TaskResult) -> str:
    """`exact match 86.0 → 84.5`: shares in per cent, others as they are."""
    plain = task.metric in ("perplexity", "spearman")
    before, after = (
        f"{side[task.metric]:.4g}" if plain else f"{100 * side[task.metric]:.1f}"
        for side in (task.torch, task.bundle)
    )
    name = task.metric.removeprefix("json_").replace("_", " ")
    return f"{name} {before} → {after}"
