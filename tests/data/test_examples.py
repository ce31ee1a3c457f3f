"""Examples: prompt and completion ids, loss only on the completion, labels, limits, rows that
cannot be used.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgetune.core.errors import DataError, RecipeError
from edgetune.core.tasks import MethodName
from edgetune.data.batching import IGNORE
from edgetune.data.completions import answer_spans
from edgetune.data.examples import ExampleSet
from edgetune.data.loaders import load_examples
from edgetune.data.prompts import apply_chat_template
from edgetune.models.base import Base
from edgetune.models.load import load_tokenizer
from edgetune.models.resolve import resolve_base
from edgetune.recipe.schema import Data, Stage

Load = Callable[..., ExampleSet]
PAIRS = [{"prompt": f"Turn on light {n}.", "completion": f'{{"level": {n}}}'} for n in range(8)]
TEXTS = [{"text": f"my card {n}", "label": ["card", "light", "dog"][n % 3]} for n in range(9)]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def loader(folder: Path, tmp_path: Path, method: MethodName) -> Load:
    base: Base = resolve_base(str(folder))
    tokenizer = load_tokenizer(base)

    def load(
        rows: list[Any],
        *,
        validation: list[Any] | None = None,
        labels: Any = None,
        seed: int = 0,
        max_length: int = 512,
        **data: Any,
    ) -> ExampleSet:
        held_out = write(tmp_path / "dev.jsonl", validation) if validation is not None else None
        source = Data(train=write(tmp_path / "train.jsonl", rows), validation=held_out, **data)
        stage = Stage(method=method, data=source, max_length=max_length)
        return load_examples(stage, tokenizer, base, labels, seed=seed)

    return load


@pytest.fixture
def load_pairs(tiny_decoder: Path, tmp_path: Path) -> Load:
    return loader(tiny_decoder, tmp_path, "sft")


@pytest.fixture
def load_texts(tiny_encoder: Path, tmp_path: Path) -> Load:
    return loader(tiny_encoder, tmp_path, "sequence-classification")


def test_ids_are_those_of_the_chat_template(tiny_decoder: Path, load_pairs: Load) -> None:
    tokenizer = load_tokenizer(resolve_base(str(tiny_decoder)))
    example = load_pairs(PAIRS).train[0]
    turn = [{"role": "user", "content": PAIRS[0]["prompt"]}]
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    answer = [
        *tokenizer.encode(PAIRS[0]["completion"], add_special_tokens=False),
        tokenizer.eos_token_id,
    ]
    assert example.input_ids == prompt + answer
    assert example.labels == [IGNORE] * len(prompt) + answer


def test_a_plain_prompt_is_the_text_alone(tiny_decoder: Path, load_pairs: Load) -> None:
    tokenizer = load_tokenizer(resolve_base(str(tiny_decoder)))
    loaded = load_pairs(
        PAIRS, template="plain", prompt="{{ prompt }} ->", completion=" {{ completion }}"
    )
    assert (
        tokenizer.decode(loaded.train[2].input_ids) == 'Turn on light 2. -> {"level": 2}<|im_end|>'
    )
    assert loaded.prompt_format.to_dict()["prompt"] == "{{ prompt }} ->"


def test_a_plain_prompt_gets_the_tokenizers_own_first_token(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    from tokenizers import processors

    base = resolve_base(str(tiny_decoder))
    tokenizer = load_tokenizer(base)
    first = ("<|im_start|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[first]
    )
    stage = Stage(
        method="sft", data=Data(train=write(tmp_path / "t.jsonl", PAIRS), template="plain")
    )
    ids = load_examples(stage, tokenizer, base).train[0].input_ids
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def test_every_answer_of_a_conversation_is_learned_and_nothing_else(
    tiny_decoder: Path, load_pairs: Load
) -> None:
    tokenizer = load_tokenizer(resolve_base(str(tiny_decoder)))
    says = [
        ("user", "a"),
        ("assistant", "b c "),
        ("user", "b c"),
        ("assistant", "d"),
        ("tool", "assistant"),
        ("assistant", "e f"),
    ]
    loaded = load_pairs(
        [{"messages": [{"role": role, "content": content} for role, content in says]}]
    )
    (example,) = loaded.train
    learned = [label for label in example.labels if label != IGNORE]  # type: ignore[union-attr]
    assert tokenizer.decode(learned) == "b c <|im_end|>d<|im_end|>e f<|im_end|>"
    assert all(
        label in (IGNORE, token)
        for label, token in zip(example.labels, example.input_ids, strict=True)
    )  # type: ignore[arg-type]


def test_an_answer_that_the_template_rewrites_is_not_learned(
    tiny_decoder: Path, load_pairs: Load
) -> None:
    base = resolve_base(str(tiny_decoder))
    tokenizer = load_tokenizer(base)
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "hm. b"},
        {"role": "user", "content": "c"},
    ]
    text = apply_chat_template(tokenizer, turns)
    assert [text[begin:end] for begin, end in answer_spans(turns, text, tokenizer)] == [
        "hm. b<|im_end|>"
    ]
    assert answer_spans(turns, text.replace("hm. ", ""), tokenizer) == ()


def test_of_one_exchange_the_answer_is_learned(tiny_decoder: Path, load_pairs: Load) -> None:
    tokenizer = load_tokenizer(resolve_base(str(tiny_decoder)))
    turns = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b c"},
    ]
    loaded = load_pairs([{"messages": turns}])
    learned = [label for label in loaded.train[0].labels if label != IGNORE]  # type: ignore[union-attr]
    assert tokenizer.decode(learned) == "b c<|im_end|>"
    assert loaded.prompt_format.prompt is None


def test_a_row_that_is_too_long_is_named_with_its_tokens(load_pairs: Load) -> None:
    with pytest.raises(
        DataError,
        match=r"line 2: prompt and completion are too long \(expected at most 60 tokens, got \d+\)",
    ):
        load_pairs([PAIRS[0], {**PAIRS[1], "prompt": "é" * 50}], max_length=60)


def test_the_bases_positions_limit_the_length_too(load_pairs: Load) -> None:
    with pytest.raises(DataError, match=r"at most 256 tokens.*the base has no more positions"):
        load_pairs([{**PAIRS[1], "prompt": "é" * 300}])


def test_skip_invalid_counts_every_row_left_out(load_pairs: Load) -> None:
    rows = [
        PAIRS[0],
        {"prompt": "x"},
        {**PAIRS[1], "prompt": "é" * 300},
        {"prompt": "", "completion": "y"},
    ]
    loaded = load_pairs(rows, skip_invalid=True)
    assert (len(loaded.train), loaded.skipped) == (1, {"train": 3})


def test_when_no_row_can_be_used_the_first_reason_is_given(load_pairs: Load) -> None:
    with pytest.raises(
        DataError,
        match=r'none of 2 rows can be used; the first: .*line 1: there is no column "completion"',
    ):
        load_pairs([{"prompt": "x"}, {"prompt": "y"}], skip_invalid=True)


def test_limit_draws_the_same_rows_for_the_same_seed(load_pairs: Load) -> None:
    drawn = [
        [example.row for example in load_pairs(PAIRS, limit=3, seed=seed).train]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] == sorted(drawn[0]) and len(drawn[0]) == 3


def test_labels_are_sorted_strings(load_texts: Load) -> None:
    loaded = load_texts(TEXTS, validation=TEXTS[:2])
    assert loaded.labels == ("card", "dog", "light")
    assert [example.labels for example in loaded.train[:3]] == [0, 2, 1]
    assert len(loaded.validation) == 2 and set(loaded.digests) == {"train", "validation"}


def test_label_names_are_rows_of_the_training_set(load_texts: Load, tiny_encoder: Path) -> None:
    rows = [
        {"text": "warm the hall", "label": "turn_on"},
        {"text": "darken it", "label": "turnOff"},
    ]
    plain, named = load_texts(rows), load_texts(rows, label_names=True)
    assert named.labels == plain.labels == ("turnOff", "turn_on")
    tokenizer = load_tokenizer(resolve_base(str(tiny_encoder)))
    added = [(tokenizer("turn Off")["input_ids"], 0), (tokenizer("turn on")["input_ids"], 1)]
    assert [(e.input_ids, e.labels) for e in named.train] == [
        (e.input_ids, e.labels) for e in plain.train
    ] + added


def test_integer_labels_become_strings(load_texts: Load) -> None:
    assert load_texts([{"text": "a", "label": 1}, {"text": "b", "label": 0}]).labels == ("0", "1")


def test_limit_does_not_change_the_labels(load_texts: Load) -> None:
    loaded = load_texts(TEXTS, limit=2)
    assert (len(loaded.train), loaded.labels) == (2, ("card", "dog", "light"))


def test_a_validation_label_unseen_in_training_is_named(load_texts: Load) -> None:
    with pytest.raises(
        DataError,
        match=(
            r'dev.jsonl, line 2: the label "cat" does not occur in the training rows \(expected one'
            r" of card"
        ),
    ):
        load_texts(TEXTS, validation=[TEXTS[0], {"text": "x", "label": "cat"}])


def test_given_labels_are_kept_in_their_order(load_texts: Load) -> None:
    assert load_texts(TEXTS, labels=("light", "dog", "card", "more")).train[0].labels == 2
    with pytest.raises(DataError, match='the label "dog" does not occur'):
        load_texts(TEXTS, labels=("card", "light"))


def test_one_label_is_nothing_to_learn(load_texts: Load) -> None:
    with pytest.raises(DataError, match="at least two labels, got only 'card'"):
        load_texts(TEXTS[:1])


def test_long_texts_are_cut_and_counted(tiny_encoder: Path, load_texts: Load) -> None:
    tokenizer = load_tokenizer(resolve_base(str(tiny_encoder)))
    loaded = load_texts([*TEXTS, {"text": "dog " * 300, "label": "dog"}])
    assert loaded.truncated == {"train": 1}
    assert len(loaded.train[-1].input_ids) == 128
    assert loaded.train[-1].input_ids[-1] == tokenizer.sep_token_id


def test_method_and_base_must_fit(tiny_encoder: Path, tmp_path: Path) -> None:
    base = resolve_base(str(tiny_encoder))
    stage = Stage(method="sft", data=Data(train=write(tmp_path / "t.jsonl", PAIRS)))
    with pytest.raises(
        RecipeError,
        match=(
            r'method "sft" does not fit .*expected a base that is a decoder, got bert, an encoder'
        ),
    ):
        load_examples(stage, load_tokenizer(base), base)
