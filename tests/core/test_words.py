"""Words of a text, their sub-words in every kind of tokenizer, and the entities that tags mark."""

from __future__ import annotations

import random
from typing import Any

import conftest
import pytest
from tokenizers import pre_tokenizers, processors

from edgetune.core.text import (
    Entity,
    case_mark,
    entities,
    first_subwords,
    has_entities,
    join_words,
    split_words,
)

SENTENCES = [
    ["Turn", "on", "the", "kitchen", "lights", "!"],
    ["name[Alimentum]", ",", "area", "[city", "centre]", "don't", "U.S."],
    ["Zoë", "😂", "\u200b", "日本語", "dog"],
    ["\u2764\ufe0f", "x" * 150, "@user", "http://t.co/a?b=1", "…", "#tag"],
]


def wordpiece() -> Any:
    return conftest._wordpiece_tokenizer()


def byte_level(*, prefix_space: bool, trim_offsets: bool = True) -> Any:
    """`prefix_space` in front of every text is what transformers demands for words that are split
    already.
    """
    tokenizer = conftest._bpe_tokenizer()
    tokenizer._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer._tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return tokenizer


@pytest.mark.parametrize("words", SENTENCES)
@pytest.mark.parametrize(
    "tokenizer", [wordpiece(), byte_level(prefix_space=True)], ids=["wordpiece", "byte-level"]
)
def test_every_word_begins_where_transformers_says(tokenizer: Any, words: list[str]) -> None:
    theirs = tokenizer(words, is_split_into_words=True)
    text, spans = join_words(words)
    ours = tokenizer(text, return_offsets_mapping=True)
    assert [text[start:end] for start, end in spans] == words
    pieces = tokenizer.convert_ids_to_tokens(theirs["input_ids"])
    # A piece that is nothing but the space in front is no part of the word here.
    of_word = [
        None if piece == "Ġ" else word
        for piece, word in zip(pieces, theirs.word_ids(), strict=True)
    ]
    assert ours["input_ids"] == theirs["input_ids"]
    assert first_subwords(text, ours["offset_mapping"], spans) == [
        of_word.index(at) if at in of_word else None for at in range(len(words))
    ]


@pytest.mark.parametrize("words", SENTENCES)
def test_the_form_of_the_offsets_does_not_matter(words: list[str]) -> None:
    text, spans = join_words(words)
    trimmed, whole = (
        byte_level(prefix_space=False, trim_offsets=trim)(text, return_offsets_mapping=True)
        for trim in (True, False)
    )
    first = first_subwords(text, trimmed["offset_mapping"], spans)
    assert first == first_subwords(text, whole["offset_mapping"], spans) and None not in first


def test_words_with_spaces_or_nothing_in_them_keep_their_place() -> None:
    text, spans = join_words(["a b", "", " ", "dog"])
    for tokenizer in (
        wordpiece(),
        byte_level(prefix_space=True),
        byte_level(prefix_space=False, trim_offsets=False),
    ):
        first = first_subwords(
            text, tokenizer(text, return_offsets_mapping=True)["offset_mapping"], spans
        )
        assert [token is None for token in first] == [False, True, True, False]


@pytest.mark.parametrize(
    ("word", "mark"),
    [
        ("dog", ""),
        ("Dog", "^"),
        ("iPhone", "^"),
        ("I", "^"),
        ("@Anna", "^"),
        ("NBA", "^^"),
        ("U.S.", "^^"),
        ("B2", "^"),
        ("ΔΣ", "^^"),
        ("東京", ""),
        ("!", ""),
        ("", ""),
    ],
)
def test_a_word_with_capitals_has_a_mark(word: str, mark: str) -> None:
    assert case_mark(word) == mark
    text, [(start, end), _] = join_words([word, "a"], case_marks=True)
    assert text == (f"{mark} {word} a" if mark else f"{word} a")
    assert text[start:end] == word


def test_a_space_in_front_of_a_token_belongs_to_no_word() -> None:
    assert first_subwords(
        "my ab cde", [(0, 0), (0, 2), (2, 5), (5, 8), (8, 9), (0, 0)], [(0, 2), (3, 5), (6, 9)]
    ) == [1, 2, 3]
    assert first_subwords("a b", [(0, 1), (1, 2), (2, 3)], [(0, 1), (2, 3)]) == [0, 2]


def test_a_token_over_two_words_is_the_first_ones() -> None:
    assert first_subwords("ab cde", [(0, 5), (5, 6)], [(0, 2), (3, 6)]) == [0, 1]
    assert first_subwords("ab cd", [(0, 5)], [(0, 2), (3, 5)]) == [0, None]


def test_a_text_is_split_at_white_space_and_around_punctuation() -> None:
    def words(text: str) -> list[str]:
        return [text[start:end] for start, end in split_words(text)]

    assert words("Ms. O'Neil paid 3€\tin New-York…") == [
        "Ms",
        ".",
        "O",
        "'",
        "Neil",
        "paid",
        "3",
        "€",
        "in",
        "New",
        "-",
        "York",
        "…",
    ]
    assert words("नमस्ते ❤️👩‍🚀 e\u0301a") == ["नमस्ते", "❤️", "👩‍", "🚀", "e\u0301a"]
    assert words(" \n ") == []


def test_split_words_are_cut_where_bert_cuts_too() -> None:
    tokenizer, text = wordpiece(), "Turn on the lights (kitchen), don't wait!"
    spans = split_words(text)
    assert (
        tokenizer(" ".join(text[start:end] for start, end in spans))["input_ids"]
        == tokenizer(text)["input_ids"]
    )


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("B-a I-a O B-b", [("a", 0, 2), ("b", 3, 4)]),
        ("B-a B-a I-b", [("a", 0, 1), ("a", 1, 2), ("b", 2, 3)]),
        ("O I-a I-a I-b O", [("a", 1, 3), ("b", 3, 4)]),
        ("B-creative-work I-creative-work", [("creative-work", 0, 2)]),
        ("S-a B-a I-a E-a I-a", [("a", 0, 1), ("a", 1, 4), ("a", 4, 5)]),
        ("B-a L-a U-b", [("a", 0, 2), ("b", 2, 3)]),
        ("NOUN O", []),
    ],
)
def test_entities_are_read_from_every_scheme(tags: str, found: list[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == [Entity(*entity) for entity in found]


def test_entities_are_conllevals_on_random_tags() -> None:
    tags = ["O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in ("x", "y"))]
    draw = random.Random(0)
    for _ in range(500):
        sentence = draw.choices(tags, k=8)
        assert entities(sentence) == conlleval(sentence)


def conlleval(tags: list[str]) -> list[Entity]:
    """The rules of conlleval.pl (CoNLL-2000, startOfChunk and endOfChunk), one by one."""
    found, begin = [], 0
    before, kind_before = "O", ""
    for at, tag in enumerate([*tags, "O"]):
        now, kind = (tag[0], tag[2:]) if tag != "O" else ("O", "")
        ends = (before, now) in {
            ("B", "B"),
            ("B", "S"),
            ("B", "O"),
            ("I", "B"),
            ("I", "S"),
            ("I", "O"),
        }
        ends |= before in "ES" or (before != "O" and kind_before != kind)
        starts = (
            now in "BS" or (before in "ESO" and now in "EI") or (now != "O" and kind_before != kind)
        )
        if before != "O" and ends:
            found.append(Entity(kind_before, begin, at))
        if starts and now != "O":
            begin = at
        before, kind_before = now, kind
    return found


def test_tags_of_parts_of_speech_are_no_entities() -> None:
    assert (
        has_entities(["B-a", "I-a", "O"])
        and not has_entities(["NOUN", "O"])
        and not has_entities(["O"])
    )
