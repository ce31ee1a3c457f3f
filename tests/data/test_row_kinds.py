"""Rows as people have them: chat, instructions, preferences, labels and tags in their widespread
spellings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_helpers import Load, learned_text, loader

from edgetune.core.errors import DataError, RecipeError
from edgetune.core.messages import Conversation, read_messages
from edgetune.core.text import outside_tag
from edgetune.data.batching import IGNORE
from edgetune.data.completions import written_answer
from edgetune.data.sentences import scheme_of, to_iob2
from edgetune.models.load import load_tokenizer
from edgetune.models.resolve import resolve_base

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "hello"}]},
]
ALIKE: dict[str, dict[str, Any]] = {
    "messages": {"messages": TURNS},
    "messages beside a prompt": {"messages": TURNS, "prompt": "id-1"},
    "ShareGPT": {"conversations": SHAREGPT},
    "parts": {"messages": PARTS},
    "Alpaca": {"instruction": "hi", "input": "", "output": "hello"},
    "Dolly": {"instruction": "hi", "context": None, "response": "hello"},
    "questions": {"question": "hi", "answer": "hello"},
    "conversational prompt": {"prompt": TURNS[:1], "completion": TURNS[1:]},
    "end token": {"prompt": "hi", "completion": "hello<|im_end|>\n"},
}


@pytest.fixture
def load_sft(tiny_decoder: Path, tmp_path: Path) -> Load:
    return loader(tiny_decoder, tmp_path, "sft")


@pytest.mark.parametrize("row", ALIKE.values(), ids=ALIKE)
def test_one_exchange_in_every_spelling_is_the_same_example(
    load_sft: Load, row: dict[str, Any]
) -> None:
    expected = load_sft([{"prompt": "hi", "completion": "hello"}]).train[0]
    found = load_sft([row]).train[0]
    assert (found.input_ids, found.labels) == (expected.input_ids, expected.labels)


def test_an_input_stands_below_its_instruction(load_sft: Load) -> None:
    row = {"instruction": "Sum up.", "input": "1 2", "output": "3"}
    loaded = load_sft([row])
    expected = load_sft([{"prompt": "Sum up.\n\n1 2", "completion": "3"}]).train[0]
    assert loaded.train[0].input_ids == expected.input_ids
    assert any("asked with '{{ instruction }}" in note for note in loaded.notes["train"])


def test_answers_of_weight_0_are_read_and_not_learned(tiny_decoder: Path, load_sft: Load) -> None:
    def chat(*weights: int) -> dict[str, Any]:
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "BAD"}] * 2
        turns = [dict(turn) for turn in turns]
        turns[3]["content"] = "GOOD"
        for turn, weight in zip(turns[1::2], weights, strict=True):
            turn["weight"] = weight  # type: ignore[assignment]
        return {"messages": turns}

    assert learned_text(tiny_decoder, load_sft([chat(0, 1)])) == "GOOD<|im_end|>"
    assert learned_text(tiny_decoder, load_sft([chat(1, 1)])) == "BAD<|im_end|>GOOD<|im_end|>"
    assert learned_text(tiny_decoder, load_sft([chat(1, 0)])) == "BAD<|im_end|>"
    with pytest.raises(DataError, match="no answer is to be learned"):
        load_sft([chat(0, 0)])
    with pytest.raises(DataError, match=r"messages\[1\]\.weight is out of range"):
        load_sft([chat(2, 1)])


@pytest.mark.parametrize(
    ("role", "read"), [("developer", "system"), ("function", "tool"), ("human", "user")]
)
def test_roles_have_other_names(role: str, read: str) -> None:
    found = read_messages([{"role": role, "content": "x"}], where="", field="messages")
    assert found == [{"role": read, "content": "x"}]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "robot", "content": "x"}, "its role is not known"),
        ({"role": "user", "content": None}, "its content is no text"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "a part of its content is no text"),
        ({"role": "user", "content": "x", "tool_calls": [{"name": "f"}]}, "only the assistant"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "no function with a name"),
        ("x", "it is no message"),
    ],
)
def test_a_message_that_cannot_be_used_says_why(message: Any, reason: str) -> None:
    with pytest.raises(DataError, match=rf"messages\[0\] cannot be used: .*{reason}|{reason}"):
        read_messages([message], where="", field="messages")


def test_tool_calls_are_learned_as_the_template_writes_them(tiny_decoder: Path) -> None:
    tokenizer = load_tokenizer(resolve_base(str(tiny_decoder)))
    call = {"id": "1", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    turns = read_messages(
        [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [call]}],
        where="",
        field="messages",
    )
    head = Conversation(turns[:1])
    with pytest.raises(DataError, match='chat template does not write the call of "weather"'):
        written_answer(head, "", turns[1], tokenizer, where="")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}[{{ c.function | tojson }}]{% endfor %}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    before = "<user>hi<|im_end|><assistant>"
    answer = written_answer(head, before, turns[1], tokenizer, where="")
    assert answer == '[{"name": "weather", "arguments": {"city": "Rome"}}]'


def test_a_template_that_shows_no_tools_is_said(load_sft: Load) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    notes = load_sft([{"messages": TURNS, "tools": tools}]).notes["train"]
    assert "the base's chat template does not show the tools of a row" in notes


@pytest.mark.parametrize("system", [None, "{{ system }}", "system"])
def test_a_row_has_a_system_message_of_its_own(load_sft: Load, system: str | None) -> None:
    rows = [
        {"system": "be kind", "prompt": "hi", "completion": "hello"},
        {"system": None, "prompt": "hi", "completion": "hello"},
    ]
    loaded = load_sft(rows, system=system)
    plain = load_sft([{"prompt": "hi", "completion": "hello"}], system="be kind")
    bare = load_sft([{"prompt": "hi", "completion": "hello"}])
    assert [one.input_ids for one in loaded.train] == [
        plain.train[0].input_ids,
        bare.train[0].input_ids,
    ]
    assert (loaded.prompt_format.system, loaded.prompt_format.system_column) == (
        None,
        "{{ system }}",
    )


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("my question", "0"),
        ("{{ my question }}", "{{ 0 }}"),
        ('{{ row["my question"] }}', "{{ row['0'] }}"),
    ],
)
def test_columns_need_not_be_identifiers(load_sft: Load, prompt: str, completion: str) -> None:
    loaded = load_sft([{"my question": "hi", "0": "hello"}], prompt=prompt, completion=completion)
    expected = load_sft([{"prompt": "hi", "completion": "hello"}])
    assert loaded.train[0].input_ids == expected.train[0].input_ids
    with pytest.raises(RecipeError, match=r"uses no column of the row .*the columns are my qu"):
        load_sft([{"my question": "hi", "0": "hello"}], prompt="a question?", completion="0")


CHOSEN = [*TURNS[:1], {"role": "assistant", "content": "good"}]
REJECTED = [*TURNS[:1], {"role": "assistant", "content": "bad"}]
PAIRS: dict[str, list[dict[str, Any]]] = {
    "full conversations": [{"prompt": "hi", "chosen": CHOSEN, "rejected": REJECTED}],
    "no prompt": [{"chosen": CHOSEN, "rejected": REJECTED}],
    "prompt of messages": [{"prompt": TURNS[:1], "chosen": CHOSEN[1:], "rejected": REJECTED[1:]}],
    "hh-rlhf": [
        {
            "chosen": "\n\nHuman: hi\n\nAssistant: good",
            "rejected": "\n\nHuman: hi\n\nAssistant: bad",
        }
    ],
    "question": [{"question": "hi", "chosen": "good", "rejected": "bad"}],
    "marked answers": [
        {"prompt": "hi", "completion": "bad", "label": False},
        {"prompt": "hi", "completion": "good", "label": True},
        {"prompt": "other", "completion": "good", "label": True},
    ],
}


@pytest.mark.parametrize("rows", PAIRS.values(), ids=PAIRS)
def test_preferences_in_every_spelling_are_the_same_pair(
    tiny_decoder: Path, tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    load = loader(tiny_decoder, tmp_path, "dpo")
    expected: Any = load([{"prompt": "hi", "chosen": "good", "rejected": "bad"}]).train
    found: Any = load(rows).train
    assert [(one.input_ids, one.rejected_ids) for one in found] == [
        (one.input_ids, one.rejected_ids) for one in expected
    ]


def test_conversations_that_differ_before_the_answer_are_refused(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    other = [{"role": "user", "content": "other"}, REJECTED[1]]
    with pytest.raises(DataError, match="the chosen answer cannot be used"):
        loader(tiny_decoder, tmp_path, "dpo")([{"chosen": CHOSEN, "rejected": other}])


@pytest.fixture
def load_sets(tiny_encoder: Path, tmp_path: Path) -> Load:
    return loader(tiny_encoder, tmp_path, "sequence-classification", problem="multi-label")


SETS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "vectors": ([[0, 1, 0], [1, 0, 0], [1, 1, 0]], {}),
    "truth values": ([[False, True, False], [True, False, False], [True, True, False]], {}),
    "vectors as text": (["[0 1 0]", "[1, 0, 0]", "[1,1,0]"], {}),
}


@pytest.mark.parametrize("labels", [one[0] for one in SETS.values()], ids=SETS)
def test_vectors_of_0_and_1_are_a_place_per_label(load_sets: Load, labels: list[Any]) -> None:
    loaded: Any = load_sets([{"text": f"t {n}", "label": one} for n, one in enumerate(labels)])
    assert loaded.labels == ("0", "1", "2")
    assert [one.target for one in loaded.train] == [(0, 1, 0), (1, 0, 0), (1, 1, 0)]


def test_lists_of_numbers_stay_labels(load_sets: Load) -> None:
    loaded: Any = load_sets([{"text": "a", "label": [0]}, {"text": "b", "label": [1, 0]}])
    assert [one.target for one in loaded.train] == [(1, 0), (1, 1)]


@pytest.mark.parametrize("label", [None, ["toxic", "insult", "threat"]])
def test_columns_of_0_and_1_are_a_label_each(load_sets: Load, label: Any) -> None:
    rows = [
        {"id": "x1", "text": "a", "toxic": 0, "insult": "1", "threat": 0},
        {"id": "x2", "text": "b", "toxic": 1, "insult": "0", "threat": False},
    ]
    loaded: Any = load_sets(rows, label=None if label is None else tuple(label))
    assert loaded.labels == ("toxic", "insult", "threat")
    assert [one.target for one in loaded.train] == [(0, 1, 0), (1, 0, 0)]


@pytest.mark.parametrize(
    "cells",
    [['["a", "b"]', "[]", "['a']"], ["a|b", "", "a"], ["a; b", "", "a"], ["a, b", "", "a"]],
)
def test_a_cell_holds_several_labels(load_sets: Load, cells: list[str]) -> None:
    loaded: Any = load_sets([{"text": f"t {n}", "label": cell} for n, cell in enumerate(cells)])
    assert (loaded.labels, [one.target for one in loaded.train]) == (
        ("a", "b"),
        [(1, 1), (0, 0), (1, 0)],
    )


def test_numbers_that_are_all_the_same_teach_nothing(tiny_encoder: Path, tmp_path: Path) -> None:
    load = loader(tiny_encoder, tmp_path, "sequence-classification", problem="regression")
    with pytest.raises(DataError, match=r"nothing to tell apart .*got only 2\)"):
        load([{"text": "a", "label": 2.0}, {"text": "b", "label": 2}])


@pytest.fixture
def load_texts(tiny_encoder: Path, tmp_path: Path) -> Load:
    return loader(tiny_encoder, tmp_path, "sequence-classification")


def test_rows_held_out_never_take_a_class_and_give_each_its_share(load_texts: Load) -> None:
    rows = [{"text": f"t{n}", "label": f"c{n // 2}"} for n in range(40)]
    for seed in range(5):
        loaded = load_texts(rows, hold_out=12, seed=seed)
        assert (len(loaded.labels or ()), len(loaded.validation)) == (20, 12)
    rows = [{"text": f"t{n}", "label": "rare" if n % 10 == 0 else "usual"} for n in range(100)]
    held = load_texts(rows, hold_out=20).validation
    assert [example.labels for example in held].count(0) == 2
    nearly_all = load_texts(rows, hold_out=99)
    assert (len(nearly_all.train), len(nearly_all.validation), nearly_all.held_out) == (2, 98, 98)
    assert nearly_all.notes["validation"] == [
        "98 rows held out of train by data.hold_out, not 99, for rows that ask the same stay"
        " together and each label keeps one"
    ]
    with pytest.raises(DataError, match=r"data\.hold_out can draw no row"):
        load_texts([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}], hold_out=1)


def test_what_is_odd_about_rows_is_said(load_texts: Load) -> None:
    rows = [
        {"text": "same", "label": "Pos"},
        {"text": "same", "label": "pos"},
        {"text": "other", "label": "neg"},
        {"text": "other", "label": "neg"},
    ]
    found = load_texts(rows, validation=rows[:1]).findings
    assert [one.line.split(":")[0] for one in found] == [
        "1 of 4 training rows repeat an earlier one",
        "texts with contradicting labels",
        "all 1 validation rows stand in train too",
        "labels with a single training row",
        "labels that differ only in case or spaces",
    ]
    assert load_texts(rows, normalise_labels=True).labels == ("neg", "pos")


@pytest.fixture
def load_tags(tiny_encoder: Path, tmp_path: Path) -> Load:
    return loader(tiny_encoder, tmp_path, "token-classification")


SENTENCE = {
    "tokens": ["Ann", "Lee", "is", "in", "Rome"],
    "tags": ["B-PER", "I-PER", "O", "O", "B-LOC"],
}
TEXT = "Ann Lee is in Rome"
TAGGED: dict[str, dict[str, Any]] = {
    "ner_tags": {"tokens": SENTENCE["tokens"], "ner_tags": SENTENCE["tags"]},
    "IOB1": {**SENTENCE, "tags": ["I-PER", "I-PER", "O", "O", "I-LOC"]},
    "IOBES": {**SENTENCE, "tags": ["B-PER", "E-PER", "O", "O", "S-LOC"]},
    "spaCy": {"text": TEXT, "entities": [[0, 7, "PER"], [14, 18, "LOC"]]},
    "Doccano": {"text": TEXT, "label": [[0, 7, "PER"], [14, 18, "LOC"]]},
    "Doccano's objects": {
        "text": TEXT,
        "entities": [
            {"label": "PER", "start_offset": 0, "end_offset": 7},
            {"label": "LOC", "start_offset": 14, "end_offset": 18},
        ],
    },
    "Label Studio": {
        "data": {"text": TEXT},
        "annotations": [
            {
                "result": [
                    {"value": {"start": 0, "end": 7, "labels": ["PER"]}},
                    {"value": {"start": 14, "end": 18, "labels": ["LOC"]}},
                ]
            }
        ],
    },
}


@pytest.mark.parametrize("row", TAGGED.values(), ids=TAGGED)
def test_tags_in_every_spelling_are_the_same_example(load_tags: Load, row: dict[str, Any]) -> None:
    expected, found = load_tags([SENTENCE]), load_tags([row])
    assert (found.labels, found.train[0].labels) == (expected.labels, expected.train[0].labels)


def test_a_conll_file_is_a_sentence_between_blank_lines(load_tags: Load, tmp_path: Path) -> None:
    path = tmp_path / "train.conll"
    path.write_text("-DOCSTART- -X- O O\n\nAnn NN B-PER\nLee NN I-PER\n\n\nRome NN B-LOC\n. . O\n")
    loaded = load_tags(None, train=str(path))
    assert [(one.row, one.tags) for one in loaded.train] == [  # type: ignore[attr-defined]
        (3, ("B-PER", "I-PER")),
        (7, ("B-LOC", "O")),
    ]


def test_schemes_become_iob2() -> None:
    assert to_iob2(["I-A", "B-A", "L-B", "U_C"]) == ["B-A", "B-A", "B-B", "B_C"]
    assert [
        scheme_of([tags]) for tags in (["I-A"], ["S-A", "O"], ["U-A"], ["B-A"], ["N", "V"])
    ] == [
        "IOB1",
        "IOBES",
        "BILOU",
        None,
        None,
    ]


def test_words_that_are_cut_off_are_outside_in_the_datas_own_tags() -> None:
    assert [outside_tag(tags) for tags in (["0", "1"], ["O", "B-A"], ["N", "V"], ["1", "2"])] == [
        "0",
        "O",
        "O",
        "O",
    ]


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([[0, 99, "A"]], "a span cannot be used .*the text's 18 characters"),
        ([[0, 7, "A"], [4, 9, "B"]], "two spans overlap"),
        ([[0, "7", "A"]], "a span cannot be used"),
    ],
)
def test_spans_that_cannot_be_used_are_named(
    load_tags: Load, spans: list[Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_tags([{"text": TEXT, "entities": spans}])


def test_nothing_is_learned_of_ignored_tokens(load_tags: Load) -> None:
    labels: Any = load_tags([SENTENCE]).train[0].labels
    assert labels[0] == labels[-1] == IGNORE


MARKED = [
    {"prompt": "hi", "completion": "hello", "label": True},
    {"prompt": "hi", "completion": "go away", "label": False},
    {"prompt": "yo", "completion": "good day", "label": True},
]


@pytest.mark.parametrize("spelled", [bool, str])
def test_of_marked_answers_sft_learns_the_good_ones_and_says_so(
    load_sft: Load, spelled: Any
) -> None:
    loaded = load_sft([row | {"label": spelled(row["label"])} for row in MARKED])
    expected = load_sft([row for row in MARKED if row["label"]]).train
    assert [one.input_ids for one in loaded.train] == [one.input_ids for one in expected]
    note = (
        'answers marked by "label": the 2 good ones of 3 are learned (dpo learns from both kinds)'
    )
    assert note in loaded.notes["train"]


def test_marked_answers_without_a_good_one_or_with_an_odd_mark_are_refused(load_sft: Load) -> None:
    with pytest.raises(DataError, match=r"no answer is marked as good .*method = \"dpo\""):
        load_sft(MARKED[1:2])
    with pytest.raises(DataError, match=r'line 2: the column "label" does not say .*got "maybe"'):
        load_sft([MARKED[0], MARKED[1] | {"label": "maybe"}])


def test_a_mark_that_the_recipe_reads_as_text_is_no_mark(load_sft: Load) -> None:
    rows = [{"prompt": "hi", "completion": "x", "label": "false"}]
    assert len(load_sft(rows, completion="label").train) == 1
