"""The proof: what ships answers as what was trained, through the real engine, and the adapter does
something.

Parity compares torch with the adapter on (p) with the bundle with the adapter on (q), position by
position. Effect asks whether the adapter's change survived: with p₀ and q₀ the two without the
adapter,

    recovered = 1 − KL(p‖q) / KL(p‖q₀)       1: all of the way from the base to the trained model,
    0: none direction = cos(p − p₀, q − q₀)          of the outputs; differences within one engine,
    so that rounding cancels strength  = |q − q₀| / |p − p₀|

An adapter that silently does nothing has q = q₀: recovered 0, strength 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from edgetune.core.arrays import Float32
from edgetune.core.errors import ProofError
from edgetune.export.proof.distances import largest_difference, mean_kls, movement


@dataclass(frozen=True)
class Bounds:
    """What a proof must hold to, by precision of the weights. KL in nats, a mean over positions.

    None: no constant says it; `verdict` holds the figure against the adapter's own effect.
    """

    max_abs: float | None
    mean_kl: float | None
    top1: float | None
    recovered: float = 0.5
    direction: float = 0.7
    strength: tuple[float, float] = (0.5, 2.0)
    least_effect: float = 1e-6  # relative size of p − p₀ below which the adapter was not trained


BOUNDS = {
    "fp32": Bounds(
        max_abs=1e-3,
        mean_kl=1e-6,
        top1=0.999,
        recovered=0.99,
        direction=0.999,
        strength=(0.99, 1.01),
    ),
    "fp16": Bounds(
        max_abs=None, mean_kl=1e-3, top1=0.98, recovered=0.98, direction=0.99, strength=(0.95, 1.05)
    ),
    "int8": Bounds(max_abs=None, mean_kl=0.03, top1=0.9, direction=0.9),
    "int4": Bounds(max_abs=None, mean_kl=None, top1=None),
}
TIE = 0.1  # nats; closer than this, which answer is likelier is chance


@dataclass(frozen=True)
class Outputs:
    """One model on the probe: logits (positions, classes), and states (positions, width) the
    adapter moves.

    Decoders: states are the logits. Encoders: states are the pooled embeddings, so that a head
    cannot hide an adapter that does nothing.
    """

    logits: Float32
    states: Float32


@dataclass(frozen=True)
class Proof:
    """The figures of one adapter; `passed` says whether they keep within the bounds, `failures` why
    not.

    `adapter_kl` and `top1_effect` are the adapter's own effect in torch: KL(p‖p₀), and the share of
    positions whose likeliest answer it changes. With a head it is the distance from a guess that
    favours no class; 0 nats of a base alone.
    """

    positions: int
    max_abs: float
    mean_kl: float
    top1: float
    top1_effect: float
    adapter_kl: float
    unadapted_kl: float
    recovered: float
    direction: float
    strength: float
    failures: tuple[str, ...]
    survived: Mapping[str, Any] | None = None
    """after a quantised merge: what rounding left of ΔW (`survival.summary`)"""

    @property
    def passed(self) -> bool:
        """True when every figure keeps within its bound."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {**asdict(self), "failures": list(self.failures), "passed": self.passed}

    def line(self) -> str:
        """For a person."""
        return self._figures() + (
            "" if self.survived is None else f"; {_survival_line(self.survived)}"
        )

    def _figures(self) -> str:
        return (
            f"max |Δ| {self.max_abs:.1e}, KL {self.mean_kl:.2e} nats, top-1 {self.top1:.1%};"
            f" adapter effect {self.adapter_kl:.3g} nats, recovered {self.recovered:.1%}, direction"
            f" {self.direction:.3f}, strength {self.strength:.2f}"
        )


def prove(
    *,
    trained: Outputs,
    trained_off: Outputs,
    shipped: Outputs,
    shipped_off: Outputs,
    precision: str,
) -> Proof:
    """Compare torch (`trained`) with the bundle (`shipped`), each with the adapter on and off, on
    the same probe.

    For an adapter with a head, `…_off` has the head but not the low-rank change; KL(p‖q₀) is then
    taken from a uniform guess, because the base alone knows no labels.
    """
    bounds = BOUNDS[precision]
    has_head = trained.logits is not trained.states
    residual, distance, effect = mean_kls(
        trained.logits,
        [
            shipped.logits,
            None if has_head else shipped_off.logits,
            None if has_head else trained_off.logits,
        ],
    )
    moved = movement(trained.states, trained_off.states, shipped.states, shipped_off.states)
    figures = {
        "positions": len(trained.logits),
        "max_abs": largest_difference(trained.logits, shipped.logits),
        "mean_kl": residual,
        "top1": top1_agreement(trained.logits, shipped.logits),
        "top1_effect": (
            _missed_by_a_guess(trained.logits)
            if has_head
            else 1 - top1_agreement(trained.logits, trained_off.logits)
        ),
        "adapter_kl": effect,
        "unadapted_kl": distance,
        "recovered": 1 - residual / distance if distance > 0 else 0.0,
        "direction": (
            moved.product / (moved.size * moved.shipped) if moved.size and moved.shipped else 0.0
        ),
        "strength": moved.shipped / moved.size if moved.size else 0.0,
    }
    relative = moved.size / (moved.states or 1.0)
    return Proof(**figures, failures=tuple(_failures(figures, bounds, relative)))  # type: ignore[arg-type]


def prove_head(*, trained: Outputs, shipped: Outputs, precision: str) -> Proof:
    """The proof of an adapter that is a head alone: its change is the one from a guess that favours
    no label.
    """

    def against_a_guess(outputs: Outputs) -> tuple[Outputs, Outputs]:
        guess = np.zeros_like(outputs.logits)
        return Outputs(outputs.logits, outputs.logits), Outputs(guess, guess)

    (on, off), (shipped_on, shipped_off) = against_a_guess(trained), against_a_guess(shipped)
    proof = prove(
        trained=on,
        trained_off=off,
        shipped=shipped_on,
        shipped_off=shipped_off,
        precision=precision,
    )
    return replace(proof, top1_effect=_missed_by_a_guess(trained.logits))


def prove_parity(*, trained: Outputs, shipped: Outputs, precision: str) -> Proof:
    """The proof of a base without adapter: only that it answers as in torch, for there is no effect
    to look for.
    """
    guess = np.zeros_like(trained.logits)
    proof = prove(
        trained=trained,
        trained_off=Outputs(guess, guess),
        shipped=shipped,
        shipped_off=Outputs(guess, guess),
        precision=precision,
    )
    return replace(proof, adapter_kl=0.0, unadapted_kl=0.0, top1_effect=0.0)


def _missed_by_a_guess(logits: Float32) -> float:
    return 1 - 1 / logits.shape[-1]


def _failures(figures: Mapping[str, float], bounds: Bounds, relative_effect: float) -> list[str]:
    if relative_effect < bounds.least_effect:
        return [
            "the trained adapter changes nothing even in torch (are its B matrices still zero?)"
        ]
    failures = []
    if bounds.max_abs is not None and not figures["max_abs"] <= bounds.max_abs:
        failures.append(
            f"logits differ by up to {figures['max_abs']:.2e}, bound {bounds.max_abs:.0e}"
        )
    if bounds.mean_kl is not None and not figures["mean_kl"] <= bounds.mean_kl:
        failures.append(f"KL to torch is {figures['mean_kl']:.3g} nats, bound {bounds.mean_kl:g}")
    if bounds.top1 is not None and not figures["top1"] >= bounds.top1:
        failures.append(
            f"the likeliest answer agrees on {figures['top1']:.1%}, bound {bounds.top1:.0%}"
        )
    if not figures["recovered"] >= bounds.recovered:
        failures.append(
            f"only {figures['recovered']:.1%} of the adapter's effect arrives, bound"
            f" {bounds.recovered:.0%}"
        )
    if not figures["direction"] >= bounds.direction:
        failures.append(
            f"the adapter moves the output in another direction (cosine {figures['direction']:.3f},"
            f" bound {bounds.direction})"
        )
    low, high = bounds.strength
    if not low <= figures["strength"] <= high:
        failures.append(
            f"the adapter's effect has {figures['strength']:.2f} of its strength, bounds {low} to"
            f" {high}"
        )
    return failures


def top1_agreement(p: Float32, q: Float32) -> float:
    """Share of positions where q's likeliest class is p's, or one that p itself cannot tell from it
    (0.1 nats).
    """
    rows = np.arange(len(p))
    return float((p.max(-1) - p[rows, q.argmax(-1)] <= TIE).mean())


def with_survival(proof: Proof, survived: Mapping[str, Any], *, least: float) -> Proof:
    """The proof of a quantised merge with what rounding left of the weights; under `least` of ΔW it
    fails.
    """
    failures = proof.failures
    if not survived["strength"] >= least:
        lost = (
            f"rounding leaves {survived['strength']:.0%} of ΔW, bound {least:.0%}, least in"
            f" {survived['weakest']}"
        )
        failures = (*failures, lost)
    return replace(proof, survived=survived, failures=failures)


def _survival_line(survived: Mapping[str, Any]) -> str:
    weakest = survived["layers"][survived["weakest"]]
    return (
        f"ΔW after rounding: strength {survived['strength']:.2f}, direction"
        f" {survived['direction']:.3f} (weakest {survived['weakest']}: {weakest['strength']:.2f},"
        f" {weakest['direction']:.3f})"
    )


TRY = (
    "Try a higher --precision (int8, fp32), or --mode separate; if torch itself shows no effect,"
    " train longer."
)
TRY_AFTER_MERGING = (
    "Try --precision int8, a smaller --block-size, or --mode separate (the adapter then stays as it"
    " was trained, beside the quantised base); or train longer: a larger change survives. A base"
    " that lies on a grid (out of a GGUF file) leaves it when an adapter is merged."
)


def demand(proofs: Mapping[str, Proof], *, where: str, merged: bool = False) -> None:
    """ProofError that lists every adapter that failed and why, when any did."""
    failed = {name: proof for name, proof in proofs.items() if not proof.passed}
    if failed:
        reasons = "; ".join(
            f"{name}: {', '.join(proof.failures)}" for name, proof in failed.items()
        )
        raise ProofError(
            f"the proof failed: {reasons}",
            where=where,
            fix=f"Nothing was written. {TRY_AFTER_MERGING if merged else TRY}",
        )
