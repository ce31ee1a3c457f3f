"""The example that turns slots into tags: what a trained tagger says of a request is read back as
the JSON it came from.
"""

from __future__ import annotations

import gzip
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from export_helpers import export
from training_helpers import recipe, silent

from edgetune.evaluation.torch_answers import TorchAnswers
from edgetune.runtime import Runtime
from edgetune.training import run_recipe

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
slots_to_tags = pytest.importorskip("slots_to_tags")


def row(text: str, intent: str, *slots: tuple[str, str]) -> dict[str, object]:
    found = [
        {
            "slot": name,
            "value": value,
            "start": text.index(value),
            "end": text.index(value) + len(value),
        }
        for name, value in slots
    ]
    return {"text": text, "intent": intent, "slots": found}


ROWS = [
    row("Turn on the lights in the kitchen, please!", "LightsOn", ("room", "kitchen")),
    row("The quick brown Fox jumps", "Jump", ("animal", "quick brown Fox")),
    row(
        "name the brown dog and the lazy Fox",
        "Name",
        ("animal", "brown dog"),
        ("animal", "lazy Fox"),
    ),
]
ANSWERS = [
    {"intent": "LightsOn", "room": "kitchen"},
    {"intent": "Jump", "animal": "quick brown Fox"},
    {"intent": "Name", "animal": ["brown dog", "lazy Fox"]},
]


def test_words_and_tags_of_a_row() -> None:
    assert slots_to_tags.tagged(ROWS[1]) == {
        "tokens": ["?", "The", "quick", "brown", "Fox", "jumps"],
        "tags": ["B-Jump", "O", "B-animal", "I-animal", "I-animal", "O"],
    }
    assert slots_to_tags.tagged(ROWS[0])["tokens"][-4:] == ["kitchen", ",", "please", "!"]


def test_a_slot_that_ends_inside_a_word_is_left_out_and_a_broken_line_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "rows.jsonl.gz", tmp_path / "tags.jsonl"
    source.write_bytes(
        gzip.compress(
            "".join(
                json.dumps(each) + "\n"
                for each in [*ROWS, row("lighting", "LightsOn", ("room", "light"))]
            ).encode()
        )
    )
    slots_to_tags.convert(source, out)
    assert len(out.read_text().splitlines()) == 3 and "3 rows" in capsys.readouterr().out
    (tmp_path / "broken.jsonl").write_text("{\n")
    with pytest.raises(json.JSONDecodeError):
        slots_to_tags.convert(tmp_path / "broken.jsonl", out)


def test_a_trained_taggers_answers_are_the_json(
    tiny_encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, data = tmp_path / "rows.jsonl", tmp_path / "tags.jsonl"
    source.write_text("".join(json.dumps(each) + "\n" for each in ROWS))
    slots_to_tags.convert(source, data)
    made = recipe(
        tiny_encoder,
        "token-classification",
        data,
        data,
        epochs=60,
        learning_rate=5e-3,
        max_length=64,
    )
    (stage,) = made.stage
    made = replace(made, stage=(replace(stage, data=replace(stage.data, case_marks=True)),))
    summary = run_recipe(made, out=tmp_path / "slots", progress=silent())
    assert summary.metrics["exact_match"] == 1.0
    export(tmp_path / "bundle", tmp_path / "slots" / "adapter")
    with Runtime.open(tmp_path / "bundle") as runtime:
        assert [
            slots_to_tags.understand(runtime, "adapter", str(each["text"])) for each in ROWS
        ] == ANSWERS
        form = runtime.adapter("adapter").prompt_format or {}
        assert (form["case_marks"], form["tag_scheme"]) == (True, "IOB2")
        words = [["?", "NAME", "the", "lazy", "Dog"], ["?", "name", "the", "lazy", "dog"]]
        for row, given in zip(runtime.tag(words, "adapter"), words, strict=True):
            assert row.text == " ".join(given)  # without the marks that the model reads
            assert [word.word for word in row.words] == given
            assert [row.text[word.start : word.end] for word in row.words] == given
        expected = TorchAnswers.open(tmp_path / "slots").scored_tags(words)
        for ours, theirs in zip(runtime.tag(words, "adapter"), expected, strict=True):
            assert ours.tags == [one.label for one in theirs]
            assert [word.score for word in ours.words] == pytest.approx(
                [one.score for one in theirs], abs=1e-4
            )
        with_marks, without = (
            [word.score for word in row.words] for row in runtime.tag(words, "adapter")
        )
        assert with_marks != without
    capsys.readouterr()
    monkeypatch.setattr(
        sys,
        "argv",
        ["slots_to_tags.py", str(tmp_path / "bundle"), "adapter", "--ask", str(ROWS[2]["text"])],
    )
    slots_to_tags.main()
    assert json.loads(capsys.readouterr().out) == ANSWERS[2]
