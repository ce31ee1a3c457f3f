"""Rows held out of train: how many, which, and that nothing leaks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from data_helpers import Load, loader

from edgetune.core.tasks import MethodName, Problem
from edgetune.data.alike import alike_keys
from edgetune.data.row import Row
from edgetune.data.rows import Rows
from edgetune.data.splits import hold_out, usual_hold_out
from edgetune.recipe.schema import Data, Stage


def held(
    values: list[dict[str, Any]],
    count: int | None = None,
    *,
    method: MethodName = "sequence-classification",
    problem: Problem = "single-label",
    limit: int | None = None,
    seed: int = 0,
) -> tuple[Rows, Rows] | None:
    source = Rows("rows", [Row(n, one) for n, one in enumerate(values, start=1)], 0, "", [])
    data = Data(train="rows", hold_out=count, limit=limit)
    return hold_out(Stage(method=method, data=data, problem=problem), source, seed=seed)


def intents(rows: int, labels: int = 4) -> list[dict[str, Any]]:
    return [{"text": f"{word(n)} please", "label": f"l{n % labels}"} for n in range(rows)]


def word(number: int) -> str:
    """Another word for each number, without a digit."""
    return "".join("abcdefghij"[int(digit)] for digit in str(number))


@pytest.mark.parametrize(
    ("rows", "count"), [(99, 0), (100, 20), (199, 20), (400, 40), (10_000, 1000), (10**6, 1000)]
)
def test_a_tenth_is_held_out_within_bounds(rows: int, count: int) -> None:
    assert usual_hold_out(rows) == count


def test_few_rows_hold_none_out_and_a_limit_counts_as_few() -> None:
    assert held(intents(99)) is None
    assert held(intents(200), limit=50) is None
    assert held(intents(200), limit=150) is not None


def test_each_label_gives_its_share_and_nothing_is_lost() -> None:
    found = held(intents(400))
    assert found is not None
    _, validation = found
    assert Counter(row.values["label"] for row in validation.rows) == dict.fromkeys(
        ("l0", "l1", "l2", "l3"), 10
    )
    lines = sorted(row.line for part in found for row in part.rows)
    assert lines == list(range(1, 401))
    assert [row.line for row in validation.rows] == sorted(row.line for row in validation.rows)
    assert validation.notes == ["40 rows held out of train"]


def test_texts_that_are_nearly_equal_stay_on_one_side() -> None:
    variants = ("{} please", "{}  PLEASE!", "{} please, 7")
    rows = [
        {"text": variants[n % 3].format(word(n // 3)), "label": f"l{n // 3 % 4}"}
        for n in range(300)
    ]
    found = held(rows)
    assert found is not None
    asked = [{row.values["text"].split()[0] for row in part.rows} for part in found]
    assert len(found[1].rows) == 30 and not asked[0] & asked[1]


def test_a_label_of_one_row_stays_in_train_and_is_named() -> None:
    rows = [*intents(200), {"text": "alone", "label": "rare"}]
    for seed in range(5):
        found = held(rows, seed=seed)
        assert found is not None
        assert "rare" in {row.values["label"] for row in found[0].rows}
        assert found[1].notes[1] == "no row is held out of 'rare', which have too few"


def test_the_number_that_was_drawn_draws_the_same_rows_again() -> None:
    rows = [{"text": f"{word(n // 7)} please", "label": f"l{n % 3}"} for n in range(210)]
    first = held(rows, 40)
    assert first is not None and len(first[1].rows) == 35
    assert first[1].notes[0].startswith("35 rows held out of train by data.hold_out, not 40")
    again = held(rows, 35)
    assert again is not None and again[1].rows == first[1].rows


def test_of_questions_that_are_all_the_same_equal_answers_stay_together() -> None:
    rows = [{"prompt": "Tell a joke.", "completion": word(n // 2)} for n in range(200)]
    found = held(rows, method="sft")
    assert found is not None
    told = [{row.values["completion"] for row in part.rows} for part in found]
    assert len(found[1].rows) == 20 and not told[0] & told[1]


def test_rows_that_are_too_many_to_be_held_out_are_told() -> None:
    same = [{"text": "please help me", "label": f"l{n % 4}"} for n in range(300)]
    found = held([*same, *intents(100)], 20)
    assert found is not None and len(found[1].rows) == 20
    assert found[1].notes[1] == (
        "300 rows that ask the same are all learned: nothing is measured on them"
    )


def test_pairs_and_conversations_and_tags_are_held_out_too() -> None:
    turns = [
        {
            "messages": [
                {"role": "user", "content": word(n // 2)},
                {"role": "assistant", "content": str(n)},
            ]
        }
        for n in range(120)
    ]
    pairs = [{"prompt": word(n // 3), "chosen": "yes", "rejected": "no"} for n in range(120)]
    tags = [{"tokens": [word(n), "x"], "tags": ["O", "B-A" if n % 2 else "O"]} for n in range(120)]
    for rows, method in ((turns, "sft"), (pairs, "dpo"), (tags, "token-classification")):
        found = held(rows, method=method)  # type: ignore[arg-type]
        assert found is not None and 18 <= len(found[1].rows) <= 20


def test_rows_that_cannot_be_used_are_not_held_out() -> None:
    rows = [*intents(200), *({"text": "", "label": "l0"} for _ in range(50))]
    found = held(rows, 100)
    assert found is not None and all(row.values["text"] for row in found[1].rows)


@pytest.fixture
def load(tiny_encoder: Path, tmp_path: Path) -> Load:
    return loader(tiny_encoder, tmp_path, "sequence-classification")


def test_a_stage_without_validation_rows_holds_some_out(load: Load) -> None:
    loaded = load(intents(120))
    assert (len(loaded.train), len(loaded.validation), loaded.held_out) == (100, 20, 20)
    without = load(intents(120), hold_out=0)
    assert (len(without.train), len(without.validation), without.held_out) == (120, 0, 0)
    assert load(intents(120), validation=intents(3)).held_out is None


def test_texts_are_alike_but_for_case_spaces_digits_and_punctuation() -> None:
    keys = alike_keys(["Order 12 is LATE!", "order 7 is late", "Order is early", "12", "13"])
    assert keys[0] == keys[1] != keys[2] and keys[3] != keys[4]


def test_digits_count_where_they_are_all_that_differs() -> None:
    sums = alike_keys([f"What is {n} + 4?" for n in range(30)])
    assert len(set(sums)) == 30


def test_scripts_without_case_are_told_apart() -> None:
    assert len(set(alike_keys(["कि", "की", "你好", "您好", "😀", "😢"]))) == 6


def test_of_numbers_small_and_large_ones_are_held_out_alike() -> None:
    numbers = [{"text": word(n), "label": (n * 37 % 200) / 7} for n in range(200)]
    found = held(numbers, problem="regression")
    assert found is not None
    values = [row.values["label"] * 7 for row in found[1].rows]
    assert [sum(40 * n <= one < 40 * (n + 1) for one in values) for n in range(5)] == [4] * 5
