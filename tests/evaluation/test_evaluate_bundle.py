"""`edgetune eval BUNDLE` on a device: without torch, and with the tools of a row in its prompt."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from head_helpers import bundle as head_bundle
from head_helpers import room_rows
from process_helpers import BLOCKED
from runtime_helpers import decoder_bundle
from training_helpers import write_rows

from edgetune.core.messages import Conversation
from edgetune.evaluation.answers import BundleAnswers
from edgetune.runtime import Runtime
from edgetune.runtime.tasks.prediction_file import requests_of
from edgetune.runtime.tasks.scoring import prompt_and_answer

EVAL = BLOCKED + "from edgetune.cli import main\nmain(sys.argv[1:])"


def evaluated(bundle: Path, *arguments: object) -> dict[str, Any]:
    """The metrics of `edgetune eval` in a process that has neither torch nor its friends."""
    out = bundle.parent / "found.json"
    words = ["eval", bundle, *arguments, "--json", out]
    command = [sys.executable, "-c", EVAL, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_a_bundle_of_heads_is_evaluated_without_torch(tiny_encoder: Path, tmp_path: Path) -> None:
    bundle = head_bundle(tiny_encoder)
    files = {
        "rooms": write_rows(tmp_path / "rooms.jsonl", room_rows()),
        "intent": write_rows(tmp_path / "intent.jsonl", [{"text": "on", "label": "low"}] * 2),
        "topics": write_rows(tmp_path / "topics.jsonl", [{"text": "on", "label": ["music"]}] * 2),
        "warmth": write_rows(
            tmp_path / "warmth.jsonl", [{"text": t, "label": n} for n, t in enumerate(("a", "b"))]
        ),
    }
    found = {
        name: evaluated(bundle, "--adapter", name, "--data", file)["metrics"]
        for name, file in files.items()
    }
    assert found["rooms"]["entity_f1"] > 0.5
    assert set(found["intent"]) >= {"accuracy", "macro_f1"}
    assert "micro_f1" in found["topics"] and "mse" in found["warmth"]


def test_a_bundle_that_generates_is_evaluated_without_torch(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    rows = [
        {"messages": [*TURNS, {"role": "assistant", "content": answer}], "tools": TOOLS}
        for answer in ("x", "y")
    ]
    general = tmp_path / "general"
    general.mkdir()
    items = [{"query": "it is", "choices": ["cold", "warm"], "gold": n % 2} for n in range(4)]
    with gzip.open(general / "piqa_val.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(item) + "\n" for item in items)
    found = evaluated(
        decoder_bundle(tiny_decoder),
        *("--adapter", "b", "--data", write_rows(tmp_path / "rows.jsonl", rows)),
        *("--forgetting", "--general", general),
    )
    assert {one["task"] for one in found["forgetting"]} == {"piqa"}
    assert found["rows"] == 1 and found["metrics"]["exact_match"] == 0.0


TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
)
TOOLS = [{"type": "function", "function": {"name": "lights", "parameters": {}}}]
TURNS = [{"role": "user", "content": "on"}]


@pytest.fixture
def with_tools(tiny_decoder: Path) -> Any:
    with Runtime.open(decoder_bundle(tiny_decoder), threads=1) as runtime:
        runtime.tokenizer.chat_template = runtime.tokenizer.tool_template = TEMPLATE
        yield runtime


def test_the_tools_of_a_conversation_are_in_a_bundles_prompt(with_tools: Runtime) -> None:
    text = with_tools.tokenizer.tokenizer.decode
    bare = with_tools.prompt_ids(TURNS, "b")
    ids = with_tools.prompt_ids(Conversation(TURNS, tools=TOOLS), "b")
    assert text(ids).startswith("lights ") and not text(bare).startswith("lights ")
    assert with_tools.prompt_ids(TURNS, "b", tools=TOOLS) == ids
    answers = BundleAnswers(with_tools, "b")
    assert answers.generate([Conversation(TURNS, tools=TOOLS)]) == [
        with_tools.generate([Conversation(TURNS, tools=TOOLS)], "b", temperature=0.0)[0].text
    ]


def test_a_row_to_predict_is_read_with_its_tools_in_any_spelling(with_tools: Runtime) -> None:
    said = [{"from": "human", "value": "on"}]
    rows = [
        {"messages": TURNS, "tools": TOOLS},
        {"messages": TURNS, "tools": json.dumps(TOOLS)},
        {"conversations": said, "functions": [TOOLS[0]["function"]]},
    ]
    found = requests_of(with_tools, list(enumerate(rows, 1)), path="rows", adapter="b")
    expected = with_tools.prompt_ids(TURNS, "b", tools=TOOLS)
    assert [with_tools.prompt_ids(one.content, "b") for one in found] == [expected] * 3  # type: ignore[arg-type]


def test_the_tools_of_an_answer_to_score_stay_with_its_prompt() -> None:
    turns = [*TURNS, {"role": "assistant", "content": "done"}]
    prompt, answer = prompt_and_answer(Conversation(turns, tools=TOOLS))
    assert isinstance(prompt, Conversation) and (prompt.tools, answer) == (TOOLS, "done")
