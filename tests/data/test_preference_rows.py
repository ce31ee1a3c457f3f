"""Preference rows and prompts: what becomes of them, and which are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from preference_helpers import pair_recipe, pair_rows, prompt_recipe, tiny
from training_helpers import recipe, write_rows

from edgetune.core.errors import DataError, RecipeError
from edgetune.data.conversations import closing_tokens
from edgetune.data.examples import ExampleSet
from edgetune.data.loaders import load_examples
from edgetune.data.prompts import PromptFormat

ASKED = (
    "<|im_start|>system\nYou are a tiny"
    " model.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


def load(
    base_folder: Path, folder: Path, rows: list[dict[str, Any]], method: str = "dpo", **stage: Any
) -> ExampleSet:
    base, tokenizer = tiny(base_folder)
    made = recipe(base_folder, method, write_rows(folder / "rows.jsonl", rows), None, **stage)
    return load_examples(made.stage[0], tokenizer, base)


def test_a_pair_is_two_sequences_with_labels_on_the_answers(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    pair: Any = load(tiny_decoder, tmp_path, pair_rows(1)).train[0]
    tokenizer = tiny(tiny_decoder)[1]
    asked, row = ASKED.format("Where is my card?"), pair_rows(1)[0]
    assert tokenizer.decode(pair.input_ids) == asked + row["chosen"] + "<|im_end|>"
    assert tokenizer.decode(pair.rejected_ids) == asked + row["rejected"] + "<|im_end|>"
    assert tokenizer.decode([t for t in pair.labels if t != -100]) == row["chosen"] + "<|im_end|>"
    assert len(pair.rejected_labels) == len(pair.rejected_ids)


def test_a_reward_reads_the_answer_as_the_chat_template_closes_it(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    pair: Any = load(tiny_decoder, tmp_path, pair_rows(1), "reward").train[0]
    tokenizer = tiny(tiny_decoder)[1]
    turns = [
        {"role": "user", "content": "Where is my card?"},
        {"role": "assistant", "content": pair_rows(1)[0]["chosen"]},
    ]
    assert tokenizer.decode(pair.input_ids) == tokenizer.apply_chat_template(turns, tokenize=False)


def test_an_end_token_that_is_also_padding_is_left_out_of_a_plain_reward(
    tiny_decoder: Path,
) -> None:
    tokenizer = tiny(tiny_decoder)[1]
    assert closing_tokens(PromptFormat(template="plain"), tokenizer) == []
    tokenizer.pad_token = "<|endoftext|>"
    assert closing_tokens(PromptFormat(template="plain"), tokenizer) == [tokenizer.eos_token_id]


@pytest.mark.parametrize("method", ["reward", "dpo"])
def test_equal_answers_are_refused_by_file_and_line(
    tiny_decoder: Path, tmp_path: Path, method: str
) -> None:
    rows = pair_rows(3)
    rows[1]["rejected"] = rows[1]["chosen"] + " "
    with pytest.raises(
        DataError, match=r"rows\.jsonl, line 2: the chosen and the rejected answer are the same"
    ):
        load(tiny_decoder, tmp_path, rows, method)


def test_equal_answers_can_be_left_out_and_are_counted(tiny_decoder: Path, tmp_path: Path) -> None:
    rows = pair_rows(3)
    rows[1]["rejected"] = rows[1]["chosen"]
    base, tokenizer = tiny(tiny_decoder)
    path = write_rows(tmp_path / "rows.jsonl", rows)
    made = recipe(tiny_decoder, "dpo", path, None, data={"train": str(path), "skip_invalid": True})
    examples = load_examples(made.stage[0], tokenizer, base)
    assert (len(examples.train), examples.skipped) == (2, {"train": 1})


def test_a_conversation_is_rendered_by_the_chat_template(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    turns = [
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Where is my card?"},
    ]
    row = {
        "prompt": turns,
        "chosen": [{"role": "assistant", "content": "Here."}],
        "rejected": "No.",
    }
    pair: Any = load(tiny_decoder, tmp_path, [row]).train[0]
    tokenizer = tiny(tiny_decoder)[1]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(pair.input_ids) == prompt + "Here.<|im_end|>"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, 'line 1: there is no column "rejected"'),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "line 1: the chosen is empty"),
        (
            {"prompt": [], "chosen": "b", "rejected": "c"},
            r'column "prompt" cannot be used .*an empty conversation',
        ),
        (
            {"prompt": [{"role": "user"}], "chosen": "b", "rejected": "c"},
            r"prompt\[0\] cannot be used: its content is no text",
        ),
        (
            {"prompt": [{"role": "assistant", "content": "x"}], "chosen": "b", "rejected": "c"},
            "the prompt ends with an answer",
        ),
        (
            {"prompt": "a", "chosen": [{"role": "user", "content": "x"}], "rejected": "c"},
            "the chosen answer cannot be used",
        ),
        (
            {"prompt": "a", "chosen": "b" * 400, "rejected": "c"},
            r"too long \(expected at most 128 tokens, got 4\d\d\)",
        ),
    ],
)
def test_a_row_that_cannot_be_used_is_named(
    tiny_decoder: Path, tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load(tiny_decoder, tmp_path, [row])


def test_templates_over_the_row_make_prompt_and_answers(tiny_decoder: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"q": "Where?", "good": "Here", "bad": "No"}])
    data = {
        "train": str(path),
        "prompt": "Q: {{ q }}",
        "chosen": "{{ good }}!",
        "rejected": "bad",
        "template": "plain",
    }
    base, tokenizer = tiny(tiny_decoder)
    pair: Any = load_examples(
        recipe(tiny_decoder, "dpo", path, None, data=data).stage[0], tokenizer, base
    ).train[0]
    assert tokenizer.decode(pair.input_ids) == "Q: Where?Here!<|im_end|>"
    assert tokenizer.decode(pair.rejected_ids) == "Q: Where?No<|im_end|>"


def test_grpo_needs_a_prompt_alone_and_keeps_the_row(tiny_decoder: Path, tmp_path: Path) -> None:
    base, tokenizer = tiny(tiny_decoder)
    stage = prompt_recipe(
        tiny_decoder, tmp_path, "def score(prompt, completion, row):\n    return 1.0\n"
    ).stage[0]
    examples = load_examples(stage, tokenizer, base)
    example: Any = examples.train[0]
    assert tokenizer.decode(example.input_ids) == ASKED.format("Where is my card?")
    assert example.values == {"prompt": "Where is my card?", "wanted": "W"}
    assert examples.max_new_tokens == 8


def test_a_prompt_without_room_for_its_answer_is_refused(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    base, tokenizer = tiny(tiny_decoder)
    reward = "def score(prompt, completion, row):\n    return 1.0\n"
    stage = prompt_recipe(tiny_decoder, tmp_path, reward, max_new_tokens=120).stage[0]
    with pytest.raises(
        DataError,
        match=r"line 1: the prompt leaves no room for 120 new tokens \(expected at most 128",
    ):
        load_examples(stage, tokenizer, base)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("dpo", {"grpo": {"group_size": 4}}, "stage.0.grpo has no meaning for dpo"),
        ("grpo", {}, 'key "stage.0.grpo.reward" is missing'),
        ("grpo", {"grpo": {"reward": []}}, "stage.0.grpo.reward is empty"),
        ("grpo", {"grpo": {"reward": "a:b"}, "dpo": {"beta": 0.2}}, "dpo has no meaning for grpo"),
        (
            "grpo",
            {"grpo": {"reward": ["a:b", "c:d"], "reward_weights": [1.0]}},
            r"weigh each reward \(expected 2 numbers, got 1\)",
        ),
        ("grpo", {"grpo": {"reward": "a:b", "group_size": 1}}, "group_size is out of range"),
    ],
)
def test_settings_of_another_method_are_refused(
    tiny_decoder: Path, tmp_path: Path, method: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(tiny_decoder, method, tmp_path / "rows.jsonl", None, **settings)


def test_a_reward_stage_cannot_share_a_recipe_with_a_policy(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    from edgetune.recipe.read import recipe_from_dict

    stages = [{"method": method, "data": {"train": "rows.jsonl"}} for method in ("sft", "reward")]
    with pytest.raises(
        RecipeError, match=r'method = "reward" cannot follow "sft".*Split this into two recipes'
    ):
        recipe_from_dict({"base": str(tiny_decoder), "stage": stages})


def test_the_recorded_format_of_a_policy_is_evaluated_on_the_chosen_answer(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    base, tokenizer = tiny(tiny_decoder)
    for method, completion in (("dpo", "{{ chosen }}"), ("reward", None)):
        form = load_examples(
            pair_recipe(tiny_decoder, tmp_path, method).stage[0], tokenizer, base
        ).prompt_format
        assert (form.prompt, form.completion, form.rejected) == (
            "{{ prompt }}",
            completion,
            "{{ rejected }}",
        )


def test_rows_held_out_of_train_validate(tiny_decoder: Path, tmp_path: Path) -> None:
    base, tokenizer = tiny(tiny_decoder)
    rows = [row | {"prompt": f"{'abcdefghijkl'[n]}?"} for n, row in enumerate(pair_rows(12))]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = {"train": str(path), "hold_out": 4}
    stage = recipe(tiny_decoder, "dpo", path, None, data=data).stage[0]
    examples = load_examples(stage, tokenizer, base, seed=3)
    train, held = {e.row for e in examples.train}, {e.row for e in examples.validation}
    assert (len(train), len(held), train & held, train | held) == (8, 4, set(), set(range(1, 13)))
    again = load_examples(stage, tokenizer, base, seed=3)
    assert [e.row for e in again.validation] == [e.row for e in examples.validation]
    with pytest.raises(
        DataError, match=r"leaves no row to train on \(expected less than 12, got 12"
    ):
        too_many = recipe(tiny_decoder, "dpo", path, None, data={**data, "hold_out": 12}).stage[0]
        load_examples(too_many, tokenizer, base)
