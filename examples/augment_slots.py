"""More training rows from the same labels: slot values of like rows swapped, texts and JSON
rebuilt.

    python examples/augment_slots.py $EDGETUNE_DATASETS/snips_slots/train.jsonl.gz snips-2000.jsonl
    --rows 2000 --copies 4

A row "play [artist: Sam Sparro] on [service: itunes]" becomes "play [artist: Annie Herring] on
[service: Spotify]": the sentence keeps its form, and what a slot may hold is learned from every row
that has the slot. Only the chosen rows are used, so the labels that somebody must write are still
`--rows`. Rows: {"text", "intent", "slots": [{"slot", "value", "start", "end"}], "json"}; the
original rows come first.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

Row = dict[str, Any]
KEEP = 0.3  # probability that a slot keeps its value


def augment(rows: list[Row], copies: int, *, seed: int) -> list[Row]:
    """The rows, and `copies` versions of each that has slots."""
    rng = random.Random(seed)
    values: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        for slot in row["slots"]:
            values[row["intent"], slot["slot"]].append(slot["value"])
    made = [swap(row, values, rng) for _ in range(copies) for row in rows if row["slots"]]
    return rows + made


def swap(row: Row, values: dict[tuple[str, str], list[str]], rng: random.Random) -> Row:
    """The row with most of its slot values replaced by others of the same slot and intent."""
    text, at, slots = "", 0, []
    for slot in sorted(row["slots"], key=lambda slot: slot["start"]):
        value = (
            slot["value"]
            if rng.random() < KEEP
            else rng.choice(values[row["intent"], slot["slot"]])
        )
        text += row["text"][at : slot["start"]]
        slots.append(
            {
                "slot": slot["slot"],
                "value": value,
                "start": len(text),
                "end": len(text) + len(value),
            }
        )
        text, at = text + value, slot["end"]
    return {
        "text": text + row["text"][at:],
        "intent": row["intent"],
        "slots": slots,
        "json": target(row["intent"], slots),
    }


def target(intent: str, slots: list[dict[str, Any]]) -> str:
    """The JSON answer: intent, then slots in the order of the text; a slot that occurs twice holds
    a list.
    """
    found: dict[str, Any] = {"intent": intent}
    for slot in slots:
        name, value = slot["slot"], slot["value"]
        if name in found:
            found[name] = [
                *(found[name] if isinstance(found[name], list) else [found[name]]),
                value,
            ]
        else:
            found[name] = value
    return json.dumps(found, ensure_ascii=False)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=2000, help="rows drawn from the source")
    parser.add_argument("--copies", type=int, default=4, help="swapped versions of each")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    opened = gzip.open if options.source.suffix == ".gz" else open
    with opened(options.source, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    order = sorted(
        random.Random(options.seed).sample(range(len(rows)), min(options.rows, len(rows)))
    )
    chosen = augment([rows[index] for index in order], options.copies, seed=options.seed)
    options.out.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen), encoding="utf-8"
    )
    print(f"{len(chosen)} rows from {len(order)}, written to {options.out}")


if __name__ == "__main__":
    main()
