"""Random recipes, valid and mutated, drawn by a seed: each trains a tiny model for a step or two to
finite weights, or is refused by an error of ours in one line.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz.figures import ROUNDS, SEED, Figures
from fuzz.test_fuzz_adapters import FILES
from preference_helpers import QUESTIONS, pair_rows
from safetensors.numpy import load_file
from training_helpers import action_rows, intent_rows, silent, write_rows

from edgetune.core.tasks import METHODS
from edgetune.recipe.own_settings import Dpo, Grpo
from edgetune.recipe.read import load_recipe
from edgetune.recipe.schema import Data, Parameters, Recipe, Stage
from edgetune.training import run_recipe

Table = dict[str, Any]
ROWS: dict[str, list[Table]] = {
    "actions": [*action_rows()],
    "intents": [*intent_rows()],
    "pairs": [*pair_rows()],
    "prompts": [{"prompt": question, "wanted": "x"} for question in QUESTIONS],
    "numbers": [{"text": row["text"], "label": i / 3} for i, row in enumerate(intent_rows())],
    "many": [{"text": row["text"], "label": [row["label"], "all"]} for row in intent_rows()],
    "tags": [
        {"tokens": row["text"].split(), "tags": ["O"] * (len(row["text"].split()) - 1) + ["B-X"]}
        for row in intent_rows()
    ],
    "odd": [
        {"text": "é\u202e\x00 😀" * 9, "label": None}, {"text": 7, "label": "x"}, {}, {"a": [{}]},
        {"text": "", "label": ""}, {"prompt": "x" * 9999, "completion": "<|im_end|>"},
        {"messages": [{"role": "user", "content": None}]}, {"tokens": [], "tags": ["O"]},
    ],
}  # fmt: skip
OWN = {
    "sft": "actions", "causal-lm": "intents", "masked-lm": "intents", "dpo": "pairs",
    "reward": "pairs", "grpo": "prompts", "sequence-classification": "intents",
    "token-classification": "tags", "multi-label": "many", "regression": "numbers",
}  # fmt: skip
SCORE = "def score(prompt, completion, row):\n    return len(completion) / 8\n"
GOOD: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("stage.0.batch_size", (1, 2, 5)),
    ("stage.0.learning_rate", (1e-5, 1e-2, 3)),
    ("stage.0.max_length", (8, 20, 128)),
    ("stage.0.epochs", (0.1, 1, 3)),
    ("stage.0.precision", ("fp32", "bf16")),
    ("stage.0.warmup_ratio", (0, 0.5)),
    ("stage.0.head_init", ("probe", "random")),
    ("stage.0.label_smoothing", (0, 0.1)),
    ("stage.0.validate_every", (1,)),
    ("stage.0.keep", ("best", "last")),
    ("stage.0.patience", (1, 2)),
    ("stage.0.class_weights", ("balanced", {"heat": 3, "lights": 0.5})),
    ("stage.0.data.hold_out", (1, 4)),
    ("stage.0.data.limit", (2, 9)),
    ("stage.0.data.skip_invalid", (True,)),
    ("stage.0.data.template", ("chat", "plain")),
    ("stage.0.data.system", ("", "Be brief.", "{{ prompt }}")),
    ("stage.0.data.control_tokens", ("text", "tokens")),
    ("parameters.train", ("lora", "full")),
    ("parameters.rank", (1, 3, 64)),
    ("parameters.dora", (True,)),
    ("parameters.rslora", (True,)),
    ("parameters.dropout", (0.1,)),
    ("parameters.init", ("gaussian", "orthogonal", "olora", "pissa", "pissa_niter_2", "loftq")),
    ("parameters.base_precision", ("int4", "int8")),
    ("parameters.layers", ([0, 0], [1, 1])),
    ("parameters.target_modules", (["q_proj"], ["query"], ".*proj")),
    ("parameters.rank_pattern", ({"q_proj": 2}, {"query": 9})),
    ("seed", (1, 2**31)),
    ("checkpoint_every", (1,)),
)
NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 0.5, 1000, 10**18, -(10**18), 1e30, 1e308, -1e-300, 1e-300, float("nan"),
    float("inf"),
)  # fmt: skip
TEXTS: tuple[Any, ...] = (
    "", " ", "x", "x" * 5000, "é\u202e😀", "\x00", "auto", "..", "/", "/dev/zero", "/dev/null",
    "pipe", "~nobody/x", "$NOPE/x", "https://example.org/x.jsonl", "owner/name:a:b:c", "a,b", "[",
    "int2", "(a*)*b", "cuda", "text", "label", "prompt", "latin-1", "utf-16", "{{ text }}",
    "{{ no such }}", "{{ text.__class__.__mro__ }}", "{% for %}", "{{ 9**9**9 }}",
    "{{ 'a' * 10**12 }}", "{% for i in range(10**9) %}{% endfor %}", "*.jsonl", "odd.jsonl",
    "folder", "broken.jsonl", "intents.jsonl", "pairs.jsonl", "scoring:score", "scoring:nobody",
    "recipe.toml",
)  # fmt: skip
LISTS: tuple[Any, ...] = (
    True, False, [], [[]], [0, 1], [1, 0], [-1, 99], [0.5], ["x"], ["intents.jsonl", "odd.jsonl"],
    ["a"] * 300, {}, {"x": 1}, {"": 0}, {"(a*)*b": 3}, {"x": {}}, {"query": 10**18},
    {"q_proj": 0.5},
)  # fmt: skip
KINDS = {"int": NUMBERS, "flo": NUMBERS, "str": TEXTS, "boo": LISTS[:2], "tup": LISTS, "dic": LISTS}
"""by the first letters of a field's type"""


def places_of(table: type, prefix: str) -> list[tuple[str, tuple[Any, ...]]]:
    """Every setting of a table, and values of its type."""
    return [(prefix + field.name, KINDS.get(str(field.type)[:3], TEXTS)) for field in fields(table)]


RECIPE, PARAMETERS = places_of(Recipe, ""), places_of(Parameters, "parameters.")
STAGE, DATA = places_of(Stage, "stage.0."), places_of(Data, "stage.0.data.")
OWN_TABLES = [*places_of(Dpo, "stage.0.dpo."), *places_of(Grpo, "stage.0.grpo.")]
NOWHERE = [(place, TEXTS + LISTS) for place in (
    "nobody", "stage.0.nobody", "stage.7.method", "parameters.Rank", "generation.stop", "",
    "generation.regex", "generation.schema", "generation.temperature", "stage.0.replay.data",
    "stage.0.replay.share", "forgetting.general", "stage", "stage.0.data.train.x",
)]  # fmt: skip
PLACES = (RECIPE, PARAMETERS, PARAMETERS, STAGE, STAGE, STAGE, DATA, DATA, OWN_TABLES, NOWHERE)
DECODERS = ("stage.0.data.template", "stage.0.data.system")
HEADS = ("stage.0.head_init", "stage.0.label_smoothing", "stage.0.class_weights")


def mutation(rng: random.Random) -> tuple[str, Any]:
    """A place and a value, mostly of the type that is expected there."""
    place, values = rng.choice(rng.choice(PLACES))
    return place, rng.choice(values if rng.random() < 0.8 else NUMBERS + TEXTS + LISTS)


def toml(value: Any) -> str:
    """A value as TOML; a text is a JSON string, which TOML reads alike."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x00", "\\u0000")


def put(values: Table, place: str, value: Any) -> None:
    """Set `a.0.b`; what stands in the way is replaced."""
    *parents, last = place.split(".")
    at: Any = values
    for part in parents:
        if isinstance(at, list):
            at = at[int(part) % len(at)] if at else {}
        else:
            at = at.setdefault(part, {})
        if not isinstance(at, (dict, list)):
            return
    if isinstance(at, dict):
        at[last] = value


def remove(values: Table, rng: random.Random) -> None:
    at: Any = rng.choice([values, values["stage"][0], values["stage"][0].get("data", {})])
    if isinstance(at, dict) and at:
        del at[rng.choice(sorted(at))]


def drawn(rng: random.Random, bases: dict[str, Path]) -> Table:
    """A recipe that may well be valid."""
    name = rng.choice([*METHODS])
    problem = rng.choice(["single-label", "multi-label", "regression"])
    problem = problem if name == "sequence-classification" else "single-label"
    kind = METHODS[name].kinds[0] if rng.random() < 0.95 else "decoder"
    rows = OWN[name if problem == "single-label" else problem]
    stage: Table = {"method": name, "data": {"train": f"{rows}.jsonl"}}
    if rng.random() < 0.3:
        stage["data"]["validation"] = f"{rows}.jsonl"
    if problem != "single-label":
        stage["problem"] = problem
    if name == "grpo":
        stage["grpo"] = {"reward": "scoring:score", "group_size": 2, "max_new_tokens": 4}
    values: Table = {"base": str(bases[kind]), "threads": 1, "stage": [stage]}
    unfit = (DECODERS if kind == "encoder" else ()) + (() if METHODS[name].has_head else HEADS)
    for place, choices in rng.sample([good for good in GOOD if good[0] not in unfit], 3):
        if rng.random() < 0.6:
            put(values, place, rng.choice(choices))
    if rng.random() < 0.15:
        before = "masked-lm" if kind == "encoder" else "causal-lm"
        values["stage"].insert(0, {"method": before, "data": {"train": "intents.jsonl"}})
    return values


def text_of(values: Table, rng: random.Random) -> str:
    """The file, sometimes damaged as text."""
    text = "".join(f"{json.dumps(key)} = {toml(value)}\n" for key, value in values.items())
    if rng.random() < 0.04:
        at = rng.randrange(len(text))
        text = rng.choice(
            [text[:at], text[:at] + rng.choice("\x00\n\"'[]{}=é\ufeff9") + text[at:], text * 2]
        )
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data files of every method, and things that are none."""
    folder = tmp_path_factory.mktemp("recipes")
    for name, rows in ROWS.items():
        write_rows(folder / f"{name}.jsonl", rows)
    (folder / "scoring.py").write_text(SCORE)
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    return folder


def trained(recipe: Recipe, out: Path, figures: Figures, seed: int) -> None:
    """A step or two of a recipe that was read, whatever it asks for."""
    stages = tuple(replace(stage, max_steps=min(stage.max_steps or 2, 2)) for stage in recipe.stage)
    run_recipe(replace(recipe, stage=stages), out=out, progress=silent())
    tensors = [t for path in out.rglob("*.safetensors") for t in load_file(path).values()]
    assert tensors
    if all(np.isfinite(tensor).all() for tensor in tensors):
        figures.count("trained")
    else:
        figures.fault("not finite", f"seed {seed}")


@pytest.mark.slow
def test_a_recipe_trains_or_is_refused(
    tiny_decoder: Path, tiny_encoder: Path, folder: Path, tmp_path: Path
) -> None:
    figures = Figures("recipes")
    for seed in range(SEED, SEED + ROUNDS):
        rng = random.Random(seed)
        (folder / "broken.jsonl").write_bytes(rng.choice(FILES[:8]))
        values = drawn(rng, {"decoder": tiny_decoder, "encoder": tiny_encoder})
        for _ in range(rng.choice([0, 0, 1, 1, 1, 1, 2])):
            if rng.random() < 0.1:
                remove(values, rng)
            else:
                put(values, *mutation(rng))
            if not isinstance(values.get("stage"), list) or not values["stage"]:
                break
        path = folder / "recipe.toml"
        path.write_text(text_of(values, rng), encoding="utf-8", errors="replace")
        place, value = mutation(rng)
        sets = [f"{place}={toml(value)}"] if rng.random() < 0.1 else []
        with figures.case(seed):
            trained(load_recipe(path, sets), tmp_path / "run", figures, seed)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    figures.check()
