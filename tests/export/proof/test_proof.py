"""The proof's figures, on outputs made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from edgetune.core.errors import ProofError
from edgetune.export.proof.distances import (
    ELEMENTS_AT_ONCE,
    largest_difference,
    mean_kl,
    mean_kls,
    movement,
)
from edgetune.export.proof.proof import Outputs, demand, prove, top1_agreement
from edgetune.quantisation.precision import coarsest

rng = np.random.default_rng(0)
BASE = rng.standard_normal((20, 50)).astype(np.float32)
CHANGE = rng.standard_normal((20, 50)).astype(np.float32)


def outputs(logits: np.ndarray) -> Outputs:
    return Outputs(logits, logits)


def proof(
    shipped: np.ndarray,
    shipped_off: np.ndarray,
    precision: str = "int8",
    change: np.ndarray = CHANGE,
):
    return prove(
        trained=outputs(BASE + change),
        trained_off=outputs(BASE),
        shipped=outputs(shipped),
        shipped_off=outputs(shipped_off),
        precision=precision,
    )


def test_a_faithful_bundle_passes() -> None:
    assert proof(BASE + CHANGE, BASE, "fp32").passed


def test_rounding_noise_passes_at_eight_bits_and_fails_at_fp32() -> None:
    noise = 0.02 * rng.standard_normal(BASE.shape).astype(np.float32)
    assert proof(BASE + CHANGE + noise, BASE + noise).passed
    assert not proof(BASE + CHANGE + noise, BASE + noise, "fp32").passed


def test_an_adapter_that_silently_does_nothing_fails() -> None:
    result = proof(BASE, BASE, "int4")
    assert not result.passed and result.strength == 0 and result.recovered <= 0


def test_an_adapter_that_pushes_the_wrong_way_fails() -> None:
    assert any("direction" in failure for failure in proof(BASE - CHANGE, BASE, "int4").failures)


def test_a_change_smaller_than_the_rounding_fails() -> None:
    small, noise = 0.05 * CHANGE, rng.standard_normal(BASE.shape).astype(np.float32) * 0.2
    assert not proof(BASE + small + noise, BASE - noise, "int4", change=small).passed


def test_an_adapter_that_was_never_trained_fails_even_when_the_bundle_is_exact() -> None:
    result = proof(BASE, BASE, "fp32", change=np.zeros_like(CHANGE))
    assert "changes nothing even in torch" in result.failures[0]


def test_a_head_cannot_hide_a_dead_adapter() -> None:
    logits = rng.standard_normal((20, 4)).astype(np.float32) * 3
    trained, off = Outputs(logits, BASE + CHANGE), Outputs(logits, BASE)
    dead = prove(
        trained=trained,
        trained_off=off,
        shipped=Outputs(logits.copy(), BASE),
        shipped_off=Outputs(logits.copy(), BASE),
        precision="int8",
    )
    assert dead.mean_kl == pytest.approx(0, abs=1e-9) and not dead.passed


def test_kl_is_that_of_the_definition() -> None:
    p, q = np.log([[0.5, 0.5]]).astype(np.float32), np.log([[0.9, 0.1]]).astype(np.float32)
    assert mean_kl(p, q) == pytest.approx(
        0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1), rel=1e-5
    )


def test_a_failed_proof_names_the_adapter_and_the_reason() -> None:
    with pytest.raises(ProofError, match=r"mute: .*strength"):
        demand({"mute": proof(BASE, BASE, "int4")}, where="bundle")


def test_answers_that_torch_itself_cannot_tell_apart_count_as_the_same() -> None:
    p = np.array([[2.0, 1.95, 0.0], [2.0, 1.0, 0.0]], np.float32)
    q = np.array([[1.9, 2.0, 0.0], [1.0, 2.0, 0.0]], np.float32)
    assert top1_agreement(p, q) == 0.5


def test_a_mixed_bundle_is_judged_by_its_coarsest_precision() -> None:
    assert coarsest(["int4", "int8"]) == "int4" and coarsest(["fp32", "int8"]) == "int8"


def test_figures_of_many_positions_are_those_of_all_at_once() -> None:
    width = ELEMENTS_AT_ONCE // 3  # three positions a piece
    p, q, p0, q0 = (rng.standard_normal((7, width)).astype(np.float32) for _ in range(4))
    log_p, log_q = (x - np.log(np.exp(x.astype(np.float64)).sum(-1, keepdims=True)) for x in (p, q))
    assert mean_kls(p, [q, None]) == pytest.approx(
        [
            (np.exp(log_p) * (log_p - log_q)).sum(-1).mean(),
            (np.exp(log_p) * (log_p + np.log(width))).sum(-1).mean(),
        ]
    )
    d, e = ((a - b).astype(np.float64) for a, b in ((p, p0), (q, q0)))
    d, e = d - d.mean(-1, keepdims=True), e - e.mean(-1, keepdims=True)
    moved = movement(p, p0, q, q0)
    assert (moved.product, moved.size, moved.shipped) == pytest.approx(
        ((d * e).sum(), np.linalg.norm(d), np.linalg.norm(e)), rel=1e-4
    )
    assert largest_difference(p, q) == np.abs(p - q).max()


def test_a_nan_is_no_small_difference() -> None:
    assert np.isnan(
        largest_difference(np.array([[1.0], [np.nan]], np.float32), np.ones((2, 1), np.float32))
    )
