"""Raw text becomes pieces of at most `max_length` tokens for masked-lm; what is masked is drawn anew at every step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from edgetune.errors import BaseModelError, DataError
from edgetune.examples.common import IGNORED, Example, ExampleSet, Loading, subset
from edgetune.examples.text import TextRow, text_rows
from edgetune.masking import Masking


def load_masked(loading: Loading) -> ExampleSet:
    """Every document cut into pieces, each between the tokenizer's own special tokens."""
    stage, tokenizer = loading.stage, loading.tokenizer
    if tokenizer.mask_token_id is None:
        raise BaseModelError("the base's tokenizer has no mask token", expected="mask_token in tokenizer_config.json")
    examples, skipped = {}, {}
    for name, source in loading.sources.items():
        if name == "train":
            source = subset(source, stage.data.limit, seed=loading.seed)
        rows, unusable = text_rows(source, loading.form, skip_invalid=stage.data.skip_invalid)
        examples[name] = cut(rows, tokenizer, loading.limit)
        skipped[name] = loading.sources[name].skipped + unusable
        if not examples[name]:
            raise DataError("there is no text to learn from", where=source.source, expected="at least one token")
    masking = Masking(tokenizer.mask_token_id, len(tokenizer), loading.seed)
    return loading.example_set(examples, skipped=skipped, mask=masking)


def cut(rows: Iterable[TextRow], tokenizer: Any, limit: int) -> list[Example]:
    """Pieces of at most `limit` tokens, special ones included; labels on the tokens that may be masked."""
    rows = list(rows)
    encoded = tokenizer(
        [row.text for row in rows],
        truncation=True,
        max_length=limit,
        return_overflowing_tokens=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    examples = []
    for ids, special, row in zip(
        encoded["input_ids"], encoded["special_tokens_mask"], encoded["overflow_to_sample_mapping"], strict=True
    ):
        labels = [IGNORED if is_special else token for token, is_special in zip(ids, special, strict=True)]
        if any(label != IGNORED for label in labels):
            examples.append(Example(ids, labels, rows[row].line))
    return examples
