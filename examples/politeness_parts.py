"""Rows of polite and impolite answers dealt to three files by their prompt, so that no prompt
stands in two of them: what the policy's judge learns, what another judge learns that only measures,
and what is held out.

    python examples/politeness_parts.py PAIRS.jsonl.gz OUT_FOLDER
"""

import gzip
import json
import sys
import zlib
from pathlib import Path

PARTS = ("judge", "judge", "second", "second", "heldout")  # of five rows

source, out = Path(sys.argv[1]), Path(sys.argv[2])
parts: dict[str, list[str]] = {name: [] for name in PARTS}
with gzip.open(source, "rt", encoding="utf-8") as lines:
    for line in lines:
        row = json.loads(line)
        prompt = f"{row['instruction']}\n{row['input']}".lower()
        parts[PARTS[zlib.crc32(prompt.encode()) % len(PARTS)]].append(line)
for name, rows in parts.items():
    file = out / f"politeness-{name}.jsonl"
    file.write_text("".join(rows), encoding="utf-8")
    print(f"{file}: {len(rows)} rows")
