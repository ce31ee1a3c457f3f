"""As trained, changed by so much, or refused: figures made by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from edgetune.core.errors import ProofError
from edgetune.data.row import Row
from edgetune.export.proof.proof import Proof
from edgetune.export.proof.task_loss import task_loss
from edgetune.export.proof.task_metric import TaskResult
from edgetune.export.proof.verdict import (
    ALLOW,
    ProofVerdict,
    demand_verdicts,
    judge_adapter,
    verdicts_again,
    verdicts_of,
)

EXACT = Proof(
    positions=300,
    max_abs=0.01,
    mean_kl=1e-4,
    top1=1.0,
    top1_effect=0.5,
    adapter_kl=1.0,
    unadapted_kl=1.0,
    recovered=1.0,
    direction=1.0,
    strength=1.0,
    failures=(),
)


def task(in_torch: int, in_bundle: int, rows: int = 100) -> TaskResult:
    """So many rows right in torch and in the bundle."""

    def side(right: int) -> list[dict[str, object]]:
        return [
            {"line": at, "prediction": "a" if at < right else "b", "label": "a"}
            for at in range(rows)
        ]

    changed = task_loss(
        "accuracy", side(in_torch), side(in_bundle), [Row(at, {}) for at in range(rows)]
    )
    torch, bundle = ({"accuracy": right / rows} for right in (in_torch, in_bundle))
    return TaskResult(
        "accuracy", True, rows, rows, "dev.jsonl", "", torch, bundle, None, changed=changed
    )


def perplexity(in_torch: float, in_bundle: float) -> TaskResult:
    torch, bundle = ({"perplexity": value} for value in (in_torch, in_bundle))
    return TaskResult("perplexity", False, 9, 9, "text.txt", "", torch, bundle, None)


def test_the_same_answers_are_as_trained() -> None:
    assert judge_adapter(EXACT, task(86, 86)) == ProofVerdict(
        "as trained", "same answer on 100 of 100 rows; accuracy 86.0 → 86.0"
    )


def test_a_few_other_answers_are_a_change_in_numbers_that_people_read() -> None:
    verdict = judge_adapter(EXACT, task(172, 169, rows=200))
    assert (verdict.value, verdict.says) == (
        "changed",
        "same answer on 197 of 200 rows; accuracy 86.0 → 84.5",
    )


def test_a_third_of_the_task_lost_is_refused_with_metric_rows_and_the_way_out() -> None:
    verdict = judge_adapter(EXACT, task(86, 58))
    assert verdict.value == "refused" and not verdict.allowed_by
    with pytest.raises(ProofError) as refused:
        demand_verdicts({"home": verdict, "fine": judge_adapter(EXACT, None)}, where="bundle")
    text = str(refused.value)
    assert "accuracy 86.0 → 58.0" in text and "28 rows answered differently, 28 worse" in text
    assert "row 58" in text and ALLOW in text and "fine" not in text and "\n" not in text


def test_the_option_ships_a_loss_and_says_so() -> None:
    verdict = judge_adapter(EXACT, task(86, 58), allowed_by=ALLOW)
    assert (verdict.value, verdict.allowed_by) == ("changed", ALLOW)
    assert "86.0 → 58.0" in verdict.line() and ALLOW in verdict.line()
    assert "28 rows answered differently" in verdict.reasons[0]
    demand_verdicts({"home": verdict}, where="bundle")


def test_an_option_that_was_not_needed_is_not_recorded() -> None:
    assert judge_adapter(EXACT, task(86, 86), allowed_by=ALLOW).allowed_by == ""


def test_less_than_a_point_is_no_loss_however_many_rows_say_it() -> None:
    assert judge_adapter(EXACT, task(9000, 8950, rows=10_000)).value == "as trained"
    assert judge_adapter(EXACT, task(9000, 8850, rows=10_000)).value == "refused"


def test_rounding_as_large_as_the_adapters_effect_is_refused() -> None:
    for proof in (replace(EXACT, mean_kl=1.0), replace(EXACT, top1=0.5)):
        assert (
            judge_adapter(proof, None).value
            == judge_adapter(proof, task(86, 86)).value
            == "refused"
        )


def test_rows_that_could_show_a_loss_and_show_none_leave_rounding_more_room() -> None:
    proof = replace(EXACT, mean_kl=0.3)
    assert (
        judge_adapter(proof, None).value
        == "refused"
        == judge_adapter(proof, task(9, 9, rows=12)).value
    )
    assert judge_adapter(proof, task(86, 86)).value == "changed"


def test_without_rows_the_verdict_says_what_it_rests_on() -> None:
    verdict = judge_adapter(replace(EXACT, top1=0.98), None)
    assert verdict.value == "changed" and "no validation rows" in verdict.says
    assert "98.0% of 300 positions" in verdict.says and "0.0% of the adapter's" in verdict.says


def test_text_is_judged_in_nats_against_the_adapters_effect() -> None:
    assert judge_adapter(EXACT, perplexity(20.0, 20.1)).value == "as trained"
    assert judge_adapter(EXACT, perplexity(20.0, 22.0)).value == "changed"
    assert judge_adapter(EXACT, perplexity(20.0, 26.0)).value == "refused"
    weak = replace(EXACT, adapter_kl=0.3)
    assert judge_adapter(weak, perplexity(20.0, 22.0)).value == "refused"


def test_a_base_alone_has_bounds_of_its_own() -> None:
    alone = replace(EXACT, adapter_kl=0.0, top1_effect=0.0)
    assert judge_adapter(alone, None).value == "as trained"
    assert judge_adapter(replace(alone, mean_kl=0.1, top1=0.9), None).value == "changed"
    assert judge_adapter(replace(alone, mean_kl=0.4), None).value == "refused"
    assert judge_adapter(replace(alone, top1=0.7), None).value == "refused"


def test_a_figure_that_is_not_a_number_is_refused() -> None:
    assert judge_adapter(replace(EXACT, mean_kl=float("nan")), None).value == "refused"


@pytest.mark.parametrize(
    "recorded", [{}, {"verdict": [], "task": 3}, {"task": {"a": {"rows": "x"}}}]
)
def test_a_manifest_that_records_no_verdict_is_judged_by_the_proof_alone(recorded: dict) -> None:
    manifest = SimpleNamespace(proof=recorded)
    found = verdicts_again(manifest, {"onnxruntime": {"a": replace(EXACT, mean_kl=0.3)}}, {})  # type: ignore[arg-type]
    assert found["a"].value == "refused"


def test_what_an_export_was_told_to_allow_still_holds() -> None:
    recorded = {"verdict": {"a": {"allowed_by": ALLOW}}, "task": {"b": {"rows": 64}}}
    proof = replace(EXACT, mean_kl=0.3)
    proven = {"onnxruntime": {"a": proof, "b": proof}}
    found = verdicts_again(SimpleNamespace(proof=recorded), proven, {})  # type: ignore[arg-type]
    assert [one.value for one in found.values()] == ["changed", "changed"]
    assert [one.allowed_by for one in found.values()] == [ALLOW, ""]


def test_of_two_engines_the_worse_one_decides_and_is_named() -> None:
    worse = replace(EXACT, mean_kl=0.3)
    found = verdicts_of({"onnxruntime": {"a": EXACT}, "native": {"a": worse}}, {})
    assert found["a"].value == "refused"
    assert found["a"].reasons == tuple(
        f"native engine: {reason}" for reason in judge_adapter(worse, None).reasons
    )
    found = verdicts_of({"onnxruntime": {"a": EXACT}, "native": {"a": EXACT}}, {})
    assert found == {"a": judge_adapter(EXACT, None)}
