"""Tags of a sentence chosen together, against all sequences tried one by one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edgetune.core.tag_sequences import IOB2, likeliest_tags, scheme_of_labels

LABELS = ("B-a", "B-b", "I-a", "I-b", "O")


def is_valid(tags: tuple[str, ...]) -> bool:
    """Whether every I- continues an entity of its type."""
    return all(
        tag[0] != "I" or before in ("B" + tag[1:], tag)
        for before, tag in itertools.pairwise(("O", *tags))
    )


def test_the_sequence_is_the_best_of_all_valid_ones() -> None:
    draw = np.random.default_rng(0)
    valid = [tags for tags in itertools.product(LABELS, repeat=4) if is_valid(tags)]
    differs = 0
    for _ in range(50):
        logits = draw.normal(size=(4, 5)).astype(np.float32)
        found = likeliest_tags(list(logits), LABELS, scheme=IOB2)
        best = max(
            valid,
            key=lambda tags: sum(
                float(row[LABELS.index(tag)]) for row, tag in zip(logits, tags, strict=True)
            ),
        )
        assert [LABELS[at] for at in found if at is not None] == list(best)
        alone = likeliest_tags(list(logits), LABELS, scheme=None)
        assert alone == logits.argmax(-1).tolist()
        differs += found != alone
    assert differs > 10


def test_a_word_that_is_never_seen_ends_what_may_be_continued() -> None:
    begins, continues = np.array([3.0, 0, 0, 0, 0]), np.array([1.0, 0, 3, 0, 0])
    assert likeliest_tags([begins, continues], LABELS, scheme=IOB2) == [0, 2]
    assert likeliest_tags([begins, None, continues, None], LABELS, scheme=IOB2) == [
        0,
        None,
        0,
        None,
    ]
    assert likeliest_tags([], LABELS, scheme=IOB2) == []


def test_a_type_without_a_beginning_is_begun_by_what_there_is() -> None:
    assert likeliest_tags([np.array([1.0, 0])] * 2, ("I-a", "O"), scheme=IOB2) == [0, 0]


def test_no_logit_is_so_large_that_an_entity_is_continued_from_nothing() -> None:
    rows = [np.array([0, 0, 1e12, 0, 1], np.float32)] * 2
    assert likeliest_tags(rows, LABELS, scheme=IOB2) == [0, 2]


def test_an_empty_label_is_one_like_any_other() -> None:
    assert likeliest_tags([np.array([0.0, 1])], ("", "O"), scheme=IOB2) == [1]


@pytest.mark.parametrize(
    ("labels", "scheme"),
    [
        (LABELS, IOB2),
        (("B-a", "O"), IOB2),
        (("B-a", "E-a", "O"), None),
        (("DET", "NOUN"), None),
        (("0", "1"), None),
        (("", "O"), None),
        ((), None),
    ],
)
def test_only_tags_of_entities_are_chosen_together(
    labels: tuple[str, ...], scheme: str | None
) -> None:
    assert scheme_of_labels(labels) == scheme
