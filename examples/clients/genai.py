"""A bundle and its adapters in onnxruntime-genai, without edgetune: pip install onnxruntime-genai

    python genai.py BUNDLE ADAPTER TOKEN_ID…         one adapter (or "-" for the base model), prompt
    as token ids

prints the answer's token ids. The folder is opened as it is; a swap is one call on a generator.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnxruntime_genai as og

MAX_NEW_TOKENS = 16


def generate(bundle: Path, adapter: str | None, prompt: list[int]) -> list[int]:
    """Greedy answer of the base model, or of one of the bundle's adapters."""
    model = og.Model(str(bundle))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + MAX_NEW_TOKENS, do_sample=False)
    generator = og.Generator(model, params)
    adapters = og.Adapters(model)
    if adapter is not None:
        entries = {
            entry["name"]: entry
            for entry in json.loads((bundle / "edgetune.json").read_text())["adapters"]
        }
        adapters.load(str(bundle / entries[adapter]["onnx_adapter"]), adapter)
        generator.set_active_adapter(adapters, adapter)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]


if __name__ == "__main__":
    folder, name, *ids = sys.argv[1:]
    print(*generate(Path(folder), None if name == "-" else name, [int(token) for token in ids]))
