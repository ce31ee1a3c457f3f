"""Rows with an intent and slots become words and tags, for a tagger: a request is understood in one pass of an encoder.

    python examples/slots_to_tags.py $EDGETUNE_DATASETS/snips_slots/train.jsonl.gz snips-tags-train.jsonl

The words are the request's with "?" before them. The tag of "?" is the intent, the others mark slots by B- and I-. A sentence's
entities are then all right exactly where its JSON is; `json_of` reads that JSON from a `Tagging`, on the device, without torch.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

from edgetune.words import split_words

ASKED = "?"  # the word whose tag is the intent


def tagged(row: dict[str, Any]) -> dict[str, list[str]]:
    """A row {"text", "intent", "slots"} → its words and their tags. ValueError where a slot begins or ends inside a word."""
    words = split_words(row["text"])
    tags = ["O"] * len(words)
    for slot in row["slots"]:
        inside = [at for at, (start, end) in enumerate(words) if start < slot["end"] and end > slot["start"]]
        if not inside or words[inside[0]][0] < slot["start"] or words[inside[-1]][1] > slot["end"]:
            raise ValueError(f'the slot {slot["slot"]} = "{slot["value"]}" begins or ends inside a word of "{row["text"]}"')
        for at in inside:
            tags[at] = ("B-" if at == inside[0] else "I-") + slot["slot"]
    return {"tokens": [ASKED, *(row["text"][start:end] for start, end in words)], "tags": ["B-" + row["intent"], *tags]}


def json_of(tagging: Any) -> dict[str, Any]:
    """A `Tagging` of "? request" → {"intent": …, slot: value, …}; a slot that occurs twice holds a list."""
    intent, *slots = tagging.entities
    found: dict[str, Any] = {"intent": intent.type}
    for slot in slots:
        known = found.get(slot.type)
        found[slot.type] = slot.text if known is None else [*(known if isinstance(known, list) else [known]), slot.text]
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    opened = gzip.open if options.source.suffix == ".gz" else open
    made, inside = [], 0
    with opened(options.source, "rt", encoding="utf-8") as file:
        for line in file:
            try:
                made.append(tagged(json.loads(line)))
            except ValueError:
                inside += 1
    options.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), encoding="utf-8")
    print(f"{len(made)} rows written to {options.out}; {inside} left out, whose slots begin or end inside a word")


if __name__ == "__main__":
    main()
