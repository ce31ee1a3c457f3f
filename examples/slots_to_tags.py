"""Rows with an intent and slots become words and tags, for a tagger: a request is understood in one
pass of an encoder.

    python examples/slots_to_tags.py $EDGETUNE_DATASETS/snips_slots/train.jsonl.gz tags.jsonl
    python examples/slots_to_tags.py bundles/snips-tags slots --ask "Play some 1959 songs"

The words are the request's with "?" before them. The tag of "?" is the intent, the others mark
slots by B- and I-. Where a sentence's entities are all right its JSON is, so `exact_match` of the
tags is at most that of the JSON, which `understand` reads on the device, without torch.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

from edgetune.core.text import entities, split_words
from edgetune.runtime import Runtime

ASKED = "?"


def request_words(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """What the tagger reads of a request, and the characters of the text that each word
    stands for.
    """
    spans = split_words(text)
    return [ASKED, *(text[start:end] for start, end in spans)], [(0, 0), *spans]


def tagged(row: dict[str, Any]) -> dict[str, list[str]]:
    """A row {"text", "intent", "slots"} → its words and their tags. ValueError where a slot begins
    or ends inside a word.
    """
    words, spans = request_words(row["text"])
    tags = ["B-" + row["intent"], *["O"] * (len(words) - 1)]
    for slot in row["slots"]:
        inside = [
            at
            for at, (start, end) in enumerate(spans)
            if start < slot["end"] and end > slot["start"]
        ]
        if not inside or spans[inside[0]][0] < slot["start"] or spans[inside[-1]][1] > slot["end"]:
            raise ValueError(
                f'the slot {slot["slot"]} = "{slot["value"]}" begins or ends inside a word of'
                f' "{row["text"]}"'
            )
        for at in inside:
            tags[at] = ("B-" if at == inside[0] else "I-") + slot["slot"]
    return {"tokens": words, "tags": tags}


def understand(runtime: Runtime, adapter: str, text: str) -> dict[str, Any]:
    """A request → {"intent": …, slot: value, …}; a slot that occurs twice holds a list, intent is
    None where none was seen.
    """
    words, spans = request_words(text)
    (tagging,) = runtime.tag([words], adapter)
    found: dict[str, Any] = {"intent": None}
    for entity in entities(tagging.tags):
        if entity.start == 0:
            found["intent"] = entity.type
            continue
        value = text[spans[entity.start][0] : spans[entity.end - 1][1]]
        known = found.get(entity.type)
        found[entity.type] = (
            value if known is None else [*(known if isinstance(known, list) else [known]), value]
        )
    return found


def convert(source: Path, out: Path) -> None:
    """The whole file; a line says how many rows were left out."""
    opened = gzip.open if source.suffix == ".gz" else open
    made, inside = [], 0
    with opened(source, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            try:
                made.append(tagged(row))
            except ValueError:
                inside += 1
    out.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), encoding="utf-8"
    )
    print(
        f"{len(made)} rows written to {out}; {inside} left out, whose slots begin or end inside a"
        " word"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", type=Path, help="rows with text, intent and slots; or a bundle, with --ask"
    )
    parser.add_argument("out", help="the file to write; with --ask the adapter's name")
    parser.add_argument("--ask", metavar="REQUEST", help="understand this request")
    options = parser.parse_args()
    if options.ask is None:
        convert(options.source, Path(options.out))
    else:
        with Runtime.open(options.source) as runtime:
            print(json.dumps(understand(runtime, options.out, options.ask), ensure_ascii=False))


if __name__ == "__main__":
    main()
