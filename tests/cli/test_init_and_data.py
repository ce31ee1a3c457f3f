"""`edgetune init` and `edgetune data` as a user calls them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from conftest import CommandLine
from file_kinds import KINDS, each, label, text, write_jsonl, write_table

from edgetune.cli.init import _asked
from edgetune.inspection.readings import Reading
from edgetune.recipe.read import load_recipe


@pytest.fixture
def tickets(tmp_path: Path) -> Path:
    return write_table(tmp_path / "tickets.csv", KINDS["one label"], ";")


def test_a_file_becomes_a_recipe_and_is_not_written_over(
    tickets: Path, tiny_encoder: Path, command_line: CommandLine
) -> None:
    init = ("init", tickets, "--base", tiny_encoder)
    code, out, err = command_line(*init)
    recipe = tickets.with_suffix(".toml")
    assert (code, err) == (0, "")
    assert 'read as sequence-classification: the text in "message", one of 3 labels' in out
    assert "to measure on: 20 rows held out of train" in out and f"edgetune train {recipe}" in out
    assert load_recipe(recipe).stage[0].data.label == "category"
    written = recipe.write_text(recipe.read_text() + "# mine\n")
    code, _, err = command_line(*init)
    assert (code, err.count("\n")) == (2, 1) and "there already" in err and "--force" in err
    assert len(recipe.read_text()) == written
    assert command_line(*init, "--force")[0] == 0 and "# mine" not in recipe.read_text()


def test_options_choose_another_reading(
    tmp_path: Path, tiny_decoder: Path, command_line: CommandLine
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", KINDS["preferences"])
    out = tmp_path / "recipes" / "r.toml"
    out.parent.mkdir()
    command = ("init", data, "--task", "reward", "--base", tiny_decoder, "--out", out)
    assert command_line(*command)[0] == 0
    (stage,) = load_recipe(out).stage
    assert stage.method == "reward" and stage.data.train == str(data)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", (), "the file is empty (expected at least one row, got 0 bytes)"),
        ("a,b\n", (), "there are no rows in this file"),
        ("a,b\n1,2\n3,4\n", (), "there is no column of text"),
        ("text,kind\nhello there,x\nhow are you,x\n", ("--label", "kind"), "is no label"),
        ("text,label\nhello there,\nhow are you,\n", (), '"label" is no label: it is empty'),
        ("text,kind\nhello there,x\nhow are you,y\n", ("--label", "kid"), 'Did you mean "kind"'),
        ("text,kind\nhello there,x\nhow are you,y\n", ("--task", "dpo"), "nothing fits --task dpo"),
    ],
)
def test_what_no_recipe_fits_is_one_line(
    content: str, options: tuple[str, ...], message: str, tmp_path: Path, command_line: CommandLine
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(content)
    code, out, err = command_line("init", path, *options)
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err and str(path) in err
    assert not path.with_suffix(".toml").exists()


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals of this kind here")
def test_a_terminal_is_asked_once_and_nothing_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Reading("dpo"), Reading("reward")]
    assert _asked(found) == 0  # pytest's stdin is none
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "r") as reads, os.fdopen(os.dup(theirs), "w") as writes:
        monkeypatch.setattr(sys, "stdin", reads)
        monkeypatch.setattr(sys, "stdout", writes)
        os.write(ours, b"2\n")
        assert _asked(found) == 1
        assert _asked(found[:1]) == 0
    os.close(ours)


ODD = [
    *each(lambda n: {"text": text(n), "label": label(n)}, 90),
    *({"text": text(0), "label": other} for other in ("heat", "heat")),
    {"text": "", "label": "heat"},
    {"text": "the MÃ¼ller family", "label": "orders"},
    {"text": "a lonely row", "label": "alone"},
    {"text": "long " * 300, "label": "orders"},
]


@pytest.fixture
def odd(tmp_path: Path, tiny_encoder: Path) -> Path:
    write_jsonl(tmp_path / "odd.jsonl", ODD)
    write_jsonl(tmp_path / "dev.jsonl", [{"text": text(3).upper(), "label": "lights"}])
    path = tmp_path / "odd.toml"
    path.write_text(
        f'base = "{tiny_encoder}"\n[[stage]]\nmethod = "sequence-classification"\nmax_length = 64\n'
        'data = { train = "odd.jsonl", validation = "dev.jsonl" }\n'
    )
    return path


def test_what_is_odd_about_a_recipes_rows_is_shown(
    odd: Path, tmp_path: Path, command_line: CommandLine
) -> None:
    page, facts = tmp_path / "page.html", tmp_path / "facts.json"
    code, out, err = command_line("data", odd, "--page", page, "--json", facts)
    assert (code, err) == (0, "")
    (look,) = json.loads(facts.read_text())["stages"]
    assert look["rows"] == {"train": 95, "validation": 1} and look["max_length"] == 64
    assert look["labels"]["alone"] == {"train": 1, "validation": 0}
    kinds = {one["kind"]: one["rows"] for one in look["findings"]}
    assert kinds == {
        "unusable": 1,
        "cut": 1,
        "repeated": 1,
        "mojibake": 1,
        "contradicting": 1,
        "validation-nearly-in-train": 1,
        "rare-labels": 1,
    }
    lines = {one["kind"]: one["line"] for one in look["findings"]}
    assert "1 train rows cannot be used (a training stops at the first)" in lines["unusable"]
    assert all(one["line"] in out for one in look["findings"])
    assert "tokens of a row, 0 to" in out and "lights" in out
    html = page.read_text()
    assert "MÃ¼ller" in html and "<svg" in html and "alone" in html


def test_a_line_that_is_no_row_is_counted_with_its_reason(
    tmp_path: Path, tiny_encoder: Path, command_line: CommandLine
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", KINDS["one label"])
    data.write_text(data.read_text() + '{"message": "cut off\n')
    code, out, _ = command_line("init", data, "--base", tiny_encoder)
    assert code == 0 and "skip_invalid = true" in (tmp_path / "rows.toml").read_text()
    code, out, _ = command_line("data", tmp_path / "rows.toml")
    assert code == 0 and "1 train rows cannot be used (left out)" in out
    assert "line 121: not valid JSON" in out


def test_prompts_that_leave_no_room_and_answers_that_are_too_long_are_told_apart(
    tmp_path: Path, tiny_decoder: Path, command_line: CommandLine
) -> None:
    rows = each(lambda n: {"prompt": text(n), "completion": "yes"}, 20)
    rows += [
        {"prompt": "long " * 200, "completion": "yes"},
        {"prompt": "a", "completion": "b " * 99},
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f'base = "{tiny_decoder}"\n[[stage]]\nmethod = "sft"\nmax_length = 96\n'
        'data = { train = "rows.jsonl", template = "plain" }\n'
    )
    code, out, _ = command_line("data", recipe)
    assert code == 0
    assert "the prompts of 1 train rows leave no room for an answer and stop a training" in out
    assert "1 train rows are too long and stop a training: more than max_length = 96" in out


def test_a_data_file_is_shown_as_init_would_read_it(
    tickets: Path, tiny_encoder: Path, command_line: CommandLine
) -> None:
    code, out, _ = command_line("data", tickets, "--base", tiny_encoder)
    assert code == 0 and "sequence-classification: text {{ message }}, label {{ category }}" in out
    assert not tickets.with_suffix(".toml").exists()


def test_a_recipe_takes_no_columns_from_the_command_line(
    odd: Path, command_line: CommandLine
) -> None:
    code, _, err = command_line("data", odd, "--label", "label")
    assert code == 2 and "a recipe says itself how its rows are read" in err


def test_the_doubts_of_a_run_are_listed(
    odd: Path, tmp_path: Path, command_line: CommandLine
) -> None:
    run, facts = tmp_path / "run", tmp_path / "facts.json"
    train = ("train", odd, "--out", run, "--set", "stage.0.max_steps=2")
    assert command_line(*train, "--set", "stage.0.data.skip_invalid=true")[0] == 0
    code, out, _ = command_line("data", odd, "--run", run, "--json", facts)
    doubts = json.loads(facts.read_text())["doubts"]
    assert code == 0 and doubts["line"] in out and "was trained on 95 of these rows" in out
    for one in doubts["rows"]:
        assert {*one} == {"line", "text", "given", "likely", "score", "learned"}


def test_pairs_of_texts_that_are_alike_are_shown(
    tmp_path: Path, tiny_encoder: Path, command_line: CommandLine
) -> None:
    rows = each(lambda n: {"anchor": text(n), "positive": f"{text(n)} again " * 9})
    write_jsonl(tmp_path / "rows.jsonl", rows)
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f'base = "{tiny_encoder}"\n[[stage]]\nmethod = "contrastive"\nmax_length = 64\n'
        'data = { train = "rows.jsonl" }\n'
    )
    code, out, err = command_line("data", recipe)
    assert (code, err) == (0, "") and "20 rows held out of train" in out
    assert "100 train rows truncated to 64 tokens" in out
