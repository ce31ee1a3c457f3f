"""Batches: every row once, like lengths together, no padding beyond the longest, an order that the
seed fixes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from edgetune.data.batching import (
    IGNORE,
    epoch_order,
    in_order_of_length,
    last_answer,
    rows_within,
    split,
    split_by_prefix,
    steps,
    steps_per_epoch,
)
from edgetune.data.collation import collate


@dataclass
class Row:
    input_ids: list[int]
    labels: list[int] | int
    row: int


LENGTHS = [random.Random(0).randint(1, 200) for _ in range(1000)]


def test_an_epoch_holds_every_row_once() -> None:
    order = epoch_order(LENGTHS, 8, seed=0, epoch=0)
    assert sorted(index for batch in order for index in batch) == list(range(1000))


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    assert epoch_order(LENGTHS, 8, seed=1, epoch=2) == epoch_order(LENGTHS, 8, seed=1, epoch=2)
    assert epoch_order(LENGTHS, 8, seed=1, epoch=2) != epoch_order(LENGTHS, 8, seed=1, epoch=3)
    assert epoch_order(LENGTHS, 8, seed=1, epoch=2) != epoch_order(LENGTHS, 8, seed=2, epoch=2)


def test_rows_of_like_length_share_a_batch() -> None:
    order = epoch_order(LENGTHS, 8, seed=0, epoch=0)
    padded = sum(max(LENGTHS[i] for i in batch) * len(batch) for batch in order)
    assert padded < 1.05 * sum(LENGTHS)


def test_a_batch_is_padded_to_its_longest_row_and_no_further() -> None:
    batch = collate([Row([5, 6, 7], [IGNORE, 6, 7], 3), Row([8], [8], 9)], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[IGNORE, 6, 7], [8, IGNORE, IGNORE]]
    assert (batch.rows, batch.tokens, batch.targets) == ((3, 9), 4, 2)


def test_classes_are_one_label_a_row() -> None:
    batch = collate([Row([5, 6], 1, 1), Row([7], 0, 2)], pad_id=0)
    assert torch.equal(batch.labels, torch.tensor([1, 0]))
    assert batch.targets == 2


def test_steps_go_on_over_epochs_and_can_start_anywhere() -> None:
    whole = list(steps(LENGTHS[:20], 8, seed=0, total=7))
    assert len(whole) == 7
    assert list(steps(LENGTHS[:20], 8, seed=0, total=7, start=4)) == whole[4:]
    assert sorted(i for batch in whole[3:6] for i in batch) == list(range(20))


def test_the_last_batch_of_an_epoch_may_be_smaller() -> None:
    assert steps_per_epoch(20, 8) == 3
    assert sorted(map(len, epoch_order(LENGTHS[:20], 8, seed=0, epoch=0))) == [4, 8, 8]


def test_a_step_is_split_into_parts_within_the_token_limit() -> None:
    parts = split(range(50), LENGTHS, 512)
    assert sorted(i for part in parts for i in part) == list(range(50))
    assert all(len(part) * max(LENGTHS[i] for i in part) <= 512 for part in parts)


def test_a_row_longer_than_the_limit_is_a_part_of_its_own() -> None:
    assert split([0, 1], [900, 3], 512) == [[1], [0]]


def test_measuring_batches_hold_every_row_once() -> None:
    parts = in_order_of_length(LENGTHS, 4096, batch_size=16)
    assert sorted(i for part in parts for i in part) == list(range(1000))
    assert max(map(len, parts)) <= 16


def test_rows_that_share_a_prefix_stand_in_one_part() -> None:
    prompts = [[1] * 30, [2] * 30]
    rows = [prompts[at % 2] + [10 + at] * 5 for at in range(12)]
    parts = split_by_prefix(rows, 60)
    assert sorted(index for part in parts for index in part) == list(range(12))
    assert all(len({rows[index][0] for index in part}) == 1 for part in parts)
    for part in parts:
        padded = max(len(rows[index]) for index in part) * len(part)
        different = 30 + 5 * len(part)
        assert padded <= 2 * 60 and different <= 60
    assert split_by_prefix([[1] * 99, [1] * 99, [3]], 60) == [[0], [1], [2]]
    assert split_by_prefix([], 60) == []


def test_rows_within_are_evenly_spaced_and_all_where_they_fit() -> None:
    assert rows_within([10] * 4, 40) == [0, 1, 2, 3]
    assert rows_within([10] * 6, 30) == [0, 2, 4]
    assert rows_within([10] * 3, 1) == [0] and rows_within([], 50) == []


def test_the_last_answer_of_a_conversation() -> None:
    no = IGNORE
    assert last_answer([no, 5, 6, no, 7, 8, 9, no]) == (5, [4, 5, 6])
    assert last_answer([no, 5]) == (1, [1]) and last_answer([5, 6]) == (2, [0, 1])
    assert last_answer([no, no]) == (0, [])
