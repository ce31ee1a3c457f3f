"""A scratch folder in which what the pages show can be run: tiny bases, rows, runs and bundles of
the names that they use.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training_helpers import action_rows, intent_rows, write_rows

ROOT = Path(__file__).parents[1]
BASES = {"builtin:minilm-l6": "encoder", "builtin:smollm2-135m-instruct": "decoder"}
DECODER_RUNS = ("home", "a", "b", "kitchen", "recipe", "e2e-500")
BUNDLES = {
    "desk": ("support", "urgency"),
    "shop": ("support", "urgency"),
    "before": ("support", "urgency"),
    "banking": ("few", "all"),
    "home": ("home", "polite"),
    "old": ("home", "polite"),
    "new": ("home", "polite"),
}
SMALLER = {
    "epochs": 1,
    "max_steps": 2,
    "batch_size": 2,
    "group_size": 2,
    "max_new_tokens": 8,
    "max_length": 128,
    "rank": 2,
}
SMALLER_WORDS = {
    "--shots 8": "--shots 2",  # what a tiny context holds
    "hold_out = 190": "hold_out = 8",
    # of random weights; in int8 an adapter of two steps would move them elsewhere
    "bundles/e2e-grpo --precision int8": "bundles/e2e-grpo --precision fp32",
    "bundles/politeness --precision int8": "bundles/politeness --precision fp32",
}
RECIPE = """
base = "{base}"
out = "runs/{name}"
threads = 1
[parameters]
rank = 2
{generation}[[stage]]
method = "{method}"
epochs = 1
batch_size = 4
learning_rate = 1e-2
max_length = 128
precision = "fp32"
data = {data}
"""
SCHEMA = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}


def only_examples(folder: str, names: list[str]) -> list[str]:
    """Of examples/, what copytree leaves out: what a reader's own runs have written there."""
    return [name for name in names if name.endswith((".jsonl", "__pycache__"))]


class World:
    """Files first; a run or a bundle when a command first names it."""

    def __init__(self, folder: Path, bases: dict[str, Path], run: Callable[..., Any]) -> None:
        self.folder, self._bases, self._run = folder, bases, run
        self._write_files()

    def here(self, text: str) -> str:
        """The same words with tiny bases for the built-in ones and this folder for /srv."""
        for name, kind in BASES.items():
            text = text.replace(name, str(self._bases[kind]))
        for shown, small in SMALLER_WORDS.items():
            text = text.replace(shown, small)
        return text.replace("/srv/", f"{self.folder}/srv/")

    def need(self, words: list[str]) -> None:
        """Make the runs and bundles that a command reads, unless they are there."""
        for word in words:
            for kind, name in re.findall(r"(runs|bundles)/([\w-]+)", word):
                place = self.folder / kind / name
                if not place.exists():
                    (self.run if kind == "runs" else self.bundle)(name)
        if "--against" in words and not (self.folder / "baseline.json").exists():
            asked = ["--rounds", 3, "--runs", 3, "--json", "baseline.json"]
            self._run("check", words[1], *asked, expected=frozenset({0, 1, 3}))

    def run(self, name: str) -> None:
        """A run of one epoch over a dozen rows."""
        if (self.folder / "examples" / f"{name}.toml").exists():
            self._run("train", f"examples/{name}.toml")
            return
        if name in ("reward", "polite"):
            method, base, data = "reward", "decoder", '{ train = "pairs.jsonl", hold_out = 4 }'
        elif name in DECODER_RUNS:
            method, base = "sft", "decoder"
            data = '{ train = "train.jsonl", validation = "test.jsonl" }'
        else:
            kind = name if name == "urgency" else "support"
            method, base = "sequence-classification", "encoder"
            data = f'{{ train = "shop/{kind}_train.jsonl", validation = "shop/{kind}_test.jsonl" }}'
        text = RECIPE.format(
            base=self._bases[base],
            name=name,
            method=method,
            data=data,
            generation="[generation]\nmax_new_tokens = 8\n" if method == "sft" else "",
        )
        path = self.folder / f".{name}.toml"
        path.write_text(text)
        self._run("train", path)

    def bundle(self, name: str) -> None:
        """A bundle in fp32 of the adapters that the pages name."""
        adapters = BUNDLES[name]
        self.need([f"runs/{adapter}" for adapter in adapters])
        chosen = [word for a in adapters for word in ("--adapter", f"{a}=runs/{a}")]
        self._run("export", *chosen, "--out", f"bundles/{name}", "--precision", "fp32")

    def _write_files(self) -> None:
        folder = self.folder
        data = folder / "edgetune" / "quickstart" / "data"
        shutil.copytree(ROOT / "edgetune" / "quickstart" / "data", data)
        for path in data.glob("*.jsonl"):  # every label, few rows
            path.write_text("".join(path.read_text().splitlines(keepends=True)[:60]))
        for name in ("shop", "general_ability", "srv/adapters", "srv/incoming"):
            (folder / name).mkdir(parents=True)
        for path in [*data.glob("support_*.jsonl"), *data.glob("urgency_*.jsonl")]:
            shutil.copy(path, folder / "shop")
        tutorial = (ROOT / "docs" / "tutorial.md").read_text()
        if found := re.search(r"^```toml\n(.*?)^```", tutorial, re.MULTILINE | re.DOTALL):
            self._recipe(folder / "shop" / "support.toml", found[1])
            self._recipe(folder / "shop" / "urgency.toml", found[1].replace("support", "urgency"))
        for path in data.glob("*.toml"):
            self._recipe(path, path.read_text())
        self._recipe(
            folder / "recipe.toml",
            RECIPE.format(
                base="builtin:smollm2-135m-instruct",
                name="recipe",
                method="sft",
                generation="",
                data='{ train = "train.jsonl", validation = "test.jsonl" }',
            ),
        )
        rows = [dict(**a, **b) for a, b in zip(action_rows(), intent_rows(), strict=True)]
        write_rows(folder / "train.jsonl", rows)
        write_rows(folder / "test.jsonl", rows[:4])
        pairs = [
            {"prompt": row["prompt"], "chosen": f"yes, {index}", "rejected": f"no {index}"}
            for index, row in enumerate(rows)
        ]
        write_rows(folder / "pairs.jsonl", pairs)
        write_rows(
            folder / "answers.jsonl",
            [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs],
        )
        item = json.dumps({"query": "Open a door.", "choices": ["turn", "eat"], "gold": 0})
        (folder / "general_ability" / "piqa_val.jsonl.gz").write_bytes(
            gzip.compress(f"{item}\n".encode() * 4)
        )
        (folder / "action.json").write_text(json.dumps(SCHEMA))
        (folder / "action.lark").write_text('start: "on" | "off"\n')
        (folder / "keys.txt").write_text("secret\n")
        (folder / "mails.txt").write_text("where is my parcel?\n")
        with (folder / "tickets.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, ["text", "label"])
            table.writeheader()
            table.writerows(intent_rows())
        shutil.copy(ROOT / "devices" / "profiles" / "raspberry-pi-5.toml", folder / "my-board.toml")

        shutil.copytree(ROOT / "examples", folder / "examples", ignore=only_examples)
        for path in (folder / "examples").glob("*.toml"):
            self._recipe(path, path.read_text())
        write_rows(folder / "examples" / "banking77-pseudo.jsonl", intent_rows())
        self._write_datasets(folder / "datasets")

    def _write_datasets(self, datasets: Path) -> None:
        """A few rows in the columns of each public data set that an example learns from."""
        intents, sentence = intent_rows(), "book a table in Rome"
        slots = [{"slot": "city", "value": "Rome", "start": 16, "end": 20}]
        answer = {"intent": "BookRestaurant", "city": "Rome"}
        asked = {"text": sentence, "intent": "BookRestaurant", "slots": slots}
        rows: dict[str, list[dict[str, Any]]] = {
            "banking77/": intents,
            "snips_slots/": [{**asked, "json": json.dumps(answer)}] * 6,
            "e2e_nlg/": [{"mr": "name[Alimentum], area[city centre]", "ref": "Alimentum is here."}]
            * 6,
            "instruct_mix/llmfs_preference_politeness": [
                {
                    "instruction": f"say {n}",
                    "input": "",
                    "output": f"{n}",
                    "chosen": f"please {n}",
                    "rejected": f"{n}",
                }
                for n in range(40)
            ],
            "instruct_mix/dolly_hhrlhf_train": [{"output": "A book is read by day."}] * 8,
            "wnut17/": [{"tokens": ["In", "Rome"], "tags": ["O", "B-location"]}] * 6,
        }
        parts = ("train", "dev", "test", "train_5shot", "train_10shot")
        for name, found in rows.items():
            for part in parts if name.endswith("/") else [""]:
                path = datasets / f"{name}{part}.jsonl.gz"
                path.parent.mkdir(parents=True, exist_ok=True)
                text = "".join(json.dumps(row) + "\n" for row in found)
                path.write_bytes(gzip.compress(text.encode()))

    def _recipe(self, path: Path, text: str) -> None:
        text = self.here(text)
        for key, small in SMALLER.items():
            text = re.sub(rf"^{key} = \d+", f"{key} = {small}", text, flags=re.MULTILINE)
        path.write_text(text)
