"""Rows that name no adapter get a merged bundle's own one: its labels, its head and its prompt
template.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_helpers import export, make_adapter
from head_helpers import make_head
from preference_helpers import adapted

from edgetune.adapters.folder import AdapterMetadata, save_adapter
from edgetune.models.resolve import resolve_base
from edgetune.runtime import Runtime
from edgetune.runtime.tasks.prediction_file import answer_rows, requests_of

PLAIN = {"template": "plain", "system": None}
ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [{"question": "why?"}, {"prompt": "hello"}],
    "reward": [{"question": "why?", "completion": "Yes."}, {"text": "No."}],
    "single": [{"said": "turn on the lights"}, {"text": "music"}],
    "pairs": [{"one": "the lights", "other": "the lamp"}, {"text": "music", "text_pair": "song"}],
    "parts": [{"tokens": ["the", "old", "room"]}, {"text": "lights on"}],
}
FORMS = {
    "text": {**PLAIN, "prompt": "Ask: {{ question }}"},
    "reward": {**PLAIN, "prompt": "Ask: {{ question }}"},
    "single": {**PLAIN, "text": "They said {{ said }}"},
    "pairs": {**PLAIN, "text": "{{ one }}", "text_pair": "{{ other }}"},
}
GAINED = {
    "text": "completion",
    "reward": "score",
    "single": "label",
    "pairs": "label",
    "parts": "tags",
}


def merged(kind: str, base: Path, folder: Path) -> Path:
    """A bundle with one random adapter of that kind in its weights."""
    adapter = folder / kind
    if kind == "parts":
        make_head(base, adapter)
    elif kind == "reward":
        found = resolve_base(str(base))
        metadata = AdapterMetadata(
            base={"name": found.name, "digest": found.digest}, task="reward", max_length=64
        )
        save_adapter(adapted(base, task="reward", noise=0.2), adapter, metadata)
    else:
        make_adapter(base, adapter)
    if kind in FORMS:
        metadata_file = adapter / "edgetune_adapter.json"
        metadata_file.write_text(
            json.dumps({**json.loads(metadata_file.read_text()), "prompt_format": FORMS[kind]})
        )
    export(folder / "bundle", adapter, mode="merged")
    return folder / "bundle"


def answered(
    runtime: Runtime, rows: list[dict[str, Any]], adapter: str | None
) -> list[dict[str, Any]]:
    """The rows with their answers, in their order."""
    requests = requests_of(runtime, list(enumerate(rows, 1)), path="rows", adapter=adapter)
    return [
        row
        for _, row in sorted(
            answer_rows(runtime, requests, **({"max_new_tokens": 4} if runtime.decoder else {})),
            key=lambda pair: pair[0],
        )
    ]


@pytest.mark.parametrize("kind", ROWS)
def test_rows_of_a_merged_bundle_need_no_adapter(
    kind: str, tiny_decoder: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    base = tiny_decoder if kind in ("text", "reward") else tiny_encoder
    with Runtime.open(merged(kind, base, tmp_path), threads=1) as runtime:
        named = answered(runtime, ROWS[kind], kind)
        assert answered(runtime, ROWS[kind], None) == named
        assert answered(runtime, [{**row, "adapter": None} for row in ROWS[kind]], None) == [
            {**row, "adapter": None} for row in named
        ]
        assert all(GAINED[kind] in row for row in named)
        contents: list[Any] = [
            request.content
            for request in requests_of(
                runtime, list(enumerate(ROWS[kind], 1)), path="rows", adapter=None
            )
        ]
        if kind == "text":
            mixed, alone = (
                runtime.generate(contents, **how, max_new_tokens=4)
                for how in ({"adapters": [None, kind]}, {})
            )  # type: ignore[arg-type]
            assert [one.text for one in mixed] == [one.text for one in alone]
            assert runtime.prompt_ids(contents[0]) == runtime.prompt_ids(contents[0], kind)
        elif kind == "reward":
            np.testing.assert_array_equal(
                runtime.score(contents, adapters=[None, kind]), runtime.score(contents)
            )
        elif kind == "parts":
            assert runtime.tag(contents, adapters=[None, kind]) == runtime.tag(contents)
        else:
            assert runtime.classify(contents, adapters=[None, kind]) == runtime.classify(contents)
