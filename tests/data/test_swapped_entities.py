"""`data.swap_entities`: sentences whose entities come from other sentences, for training alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from training_helpers import write_rows

from edgetune.core.errors import RecipeError
from edgetune.core.text import entities
from edgetune.data.examples import ExampleSet
from edgetune.data.loaders import load_examples
from edgetune.data.swapped_entities import Sentence, swapped
from edgetune.models.base import open_folder
from edgetune.models.load import load_tokenizer
from edgetune.recipe.read import recipe_from_dict


def sentence(text: str) -> Sentence:
    """ "Anna/B-who lives in New/B-where York/I-where" → words and tags."""
    pairs = [part.partition("/") for part in text.split()]
    return [word for word, _, _ in pairs], [tag or "O" for _, _, tag in pairs]


THERE = [
    sentence("Anna/B-who lives in New/B-where York/I-where ."),
    sentence("did Bo/B-who Li/I-who leave Oslo/B-where ?"),
    sentence("nobody left"),
]


def form_and_names(words: list[str], tags: list[str]) -> tuple[tuple[str, ...], list[Any]]:
    """The sentence with <type> for each entity, and (type, words, tags) of these."""
    form, names, at = list[str](), [], 0
    for entity in entities(tags):
        form += [*words[at : entity.start], f"<{entity.type}>"]
        span = slice(entity.start, entity.end)
        names.append((entity.type, tuple(words[span]), tuple(tags[span])))
        at = entity.end
    return (*form, *words[at:]), names


def test_a_version_keeps_its_words_and_takes_entities_of_the_same_type() -> None:
    made = swapped(THERE, 50, seed=0)
    forms = {form_and_names(*one)[0] for one in THERE[:2]}
    names = {name for one in THERE for name in form_and_names(*one)[1]}
    assert {form_and_names(*one)[0] for one in made} == forms
    assert {name for one in made for name in form_and_names(*one)[1]} == names
    texts = [" ".join(words) for words, _ in made]
    assert "Bo Li lives in New York ." in texts and "did Anna leave New York ?" in texts
    assert sorted(texts) == sorted(set(texts)) and len(texts) == 6  # 2 x 2 x 2, less what is there
    assert swapped(THERE, 2, seed=0) == swapped(THERE, 2, seed=0) != swapped(THERE, 2, seed=1)


def loaded(base: Path, folder: Path, rows: list[Sentence], **data: Any) -> ExampleSet:
    """A tagger's stage over these rows, the same ones for validation."""
    file = str(
        write_rows(folder / "rows.jsonl", [{"tokens": one, "tags": two} for one, two in rows])
    )
    stage = {
        "method": "token-classification",
        "max_length": 8,
        "data": {"train": file, "validation": file, **data},
    }
    made = recipe_from_dict({"base": str(base), "stage": [stage]})
    opened = open_folder(base, name="tiny")
    return load_examples(made.stage[0], load_tokenizer(opened), opened)


def test_only_training_has_more_rows_and_what_is_told_of_the_file_stays(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    plain = loaded(tiny_encoder, tmp_path, THERE)
    more = loaded(tiny_encoder, tmp_path, THERE, swap_entities=3)
    count = len(swapped(THERE, 3, seed=0))
    assert more.train[:3] == plain.train and len(more.train) == 3 + count > 3
    assert {example.row for example in more.train[3:]} == {0}
    assert more.validation == plain.validation and more.labels == plain.labels
    assert (more.truncated, more.unseen_words) == (plain.truncated, plain.unseen_words)
    assert more.findings == plain.findings and more.digests == plain.digests
    assert more.notes["train"] == [
        *plain.notes["train"],
        f"{count} rows more, whose entities come from other rows",
    ]


def test_tags_that_mark_no_entities_are_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    rows = [(["a", "dog"], ["DET", "NOUN"])]
    expected = r"swap_entities has no use.*B-person.*got DET, NOUN.*Remove swap_entities"
    with pytest.raises(RecipeError, match=expected):
        loaded(tiny_encoder, tmp_path, rows, swap_entities=1)
