"""A training step with and without sharing of what rows begin with in common, in turns; a line a
task, then one JSON line.

    python benchmarks/prefix_sharing.py [dpo reward sft grpo] [--threads 1] [--rounds 5]

SmolLM2-135M with LoRA r = 8 on all linear layers, rows of EDGETUNE_DATASETS: pairs of answers
(politeness; HH helpful of at most 512 tokens), 8 E2E rows with the chat template's own system
prompt, 8 E2E meanings with 8 answers each. Loss and gradients of the rows of one optimizer step, in
parts as training makes them with and without. Seconds are the processor's.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from edgetune.adapters.lora import adapt
from edgetune.data.batching import IGNORE, Batch
from edgetune.data.loaders import load_examples
from edgetune.models.base import Base
from edgetune.models.heads import RewardModel
from edgetune.models.load import load_body, load_tokenizer
from edgetune.models.resolve import resolve_base
from edgetune.models.torch_device import choose_precision, hold_frozen_linears_in_bf16
from edgetune.objectives.grpo import AnswerExample, collate_rollouts, grpo
from edgetune.objectives.language import sft
from edgetune.objectives.preference import bradley_terry, collate_pairs, dpo
from edgetune.recipe.read import load_recipe
from edgetune.recipe.schema import Parameters
from edgetune.training.batches import Batching, padded_length
from edgetune.training.fast import shared_prefix as prefix_sharing
from edgetune.training.learner import Learner

E2E = ("sft", "e2e_nlg/train.jsonl.gz", 'prompt = "{{ mr }}"\ncompletion = "{{ ref }}"')
ROWS = {
    "dpo": (
        "dpo",
        "instruct_mix/llmfs_preference_politeness.jsonl.gz",
        'prompt = "{{ instruction }}{% if input %}\\n{{ input }}{% endif %}"\nsystem = ""',
    ),
    "reward": ("reward", "hh_helpful/train.jsonl.gz", 'system = ""'),
    "sft": E2E,
    "grpo": (E2E[0], E2E[1], E2E[2] + '\nsystem = ""'),
}
SIZE = 8
OBJECTIVES: dict[str, Callable[[Any, Any], Any]] = {
    "dpo": lambda model, batch: dpo(model, batch, beta=0.1),
    "reward": bradley_terry,
    "sft": sft,
    "grpo": lambda model, batch: grpo(model, batch, clip=0.2, kl=0.0),
}


def examples_of(task: str, tokenizer: Any, base: Base) -> Sequence[Any]:
    """The rows as the stage reads them."""
    method, data, form = ROWS[task]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.toml")
        path.write_text(
            f'base = "{base.name}"\nout = "{folder}/run"\n[[stage]]\nmethod ='
            f' "{method}"\nmax_length = 512\n[stage.data]\ntrain ='
            f' "{Path(os.environ["EDGETUNE_DATASETS"], data)}"\nskip_invalid = true\nhold_out = 0\n'
            f"{form}\n"
        )
        return load_examples(load_recipe(path).stage[0], tokenizer, base, None, seed=0).train


def steps_of(
    task: str, examples: Sequence[Any], pad_id: int, count: int, *, shared: bool
) -> list[list[Batch]]:
    """The parts of `count` steps, at equal distances in the data; rows of a step have like lengths,
    as in training.
    """
    if task == "grpo":
        groups: dict[tuple[int, ...], list[Any]] = {}
        for example in examples:
            groups.setdefault(
                tuple(
                    token
                    for token, label in zip(example.input_ids, example.labels, strict=True)
                    if label == IGNORE
                ),
                [],
            ).append(example)
        full = [
            [AnswerExample(e.input_ids, e.labels, e.row, 1.0) for e in group[:SIZE]]
            for group in groups.values()
            if len(group) >= SIZE
        ]
        batching, units = Batching(pad_id, collate_rollouts, by_prefix=shared), full
    else:
        pairs = task in ("dpo", "reward")
        batching, units = (
            (Batching(pad_id, collate_pairs, padded_length) if pairs else Batching(pad_id)),
            [[example] for example in examples],
        )
    found = []
    for step in range(count):
        pool = units[step * len(units) // count :][: SIZE * 4]
        chosen = sorted(pool, key=lambda unit: batching.length(unit[0]))[SIZE : 2 * SIZE]
        rows = [example for unit in chosen for example in unit]
        if task == "dpo":
            for row in rows:
                row.reference = (0.0, 0.0)
        found.append(batching.parts(rows, step))
    return found


def in_turns(
    learner: Learner, objective: Any, steps: dict[str, list[list[Batch]]]
) -> dict[str, list[float]]:
    """Processor seconds of each step but the first, by kind."""
    seconds: dict[str, list[float]] = {kind: [] for kind in steps}
    for pair in zip(*steps.values(), strict=True):
        for kind, parts in zip(steps, pair, strict=True):
            with mock.patch.object(
                prefix_sharing, "WORTH_IT", 0.0 if kind == "padded" else prefix_sharing.WORTH_IT
            ):
                started = time.process_time()
                learner.add_gradient(
                    objective, parts, spare=functools.partial(next, iter(parts)), weight=1.0
                )
                seconds[kind].append(time.process_time() - started)
    return {kind: times[1:] for kind, times in seconds.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", default=[*ROWS])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = resolve_base("builtin:smollm2-135m-instruct")
    tokenizer, precision = load_tokenizer(base), choose_precision("auto", hidden=576)
    print(
        f"{precision}, {options.threads} threads\n| task | real tokens | distinct | step, padded, s"
        " | shared, s | times faster |\n|---|---|---|---|---|---|"
    )
    results = {}
    for task in options.tasks:
        torch.manual_seed(0)
        body = load_body(base)
        model = adapt(
            RewardModel(body) if task == "reward" else body,
            Parameters(),
            task="reward" if task == "reward" else "text-generation",
        )
        if precision == "bf16":
            hold_frozen_linears_in_bf16(model)
        examples = examples_of(task, tokenizer, base)
        steps = {
            kind: steps_of(
                task, examples, tokenizer.pad_token_id, options.rounds + 1, shared=kind == "shared"
            )
            for kind in ("padded", "shared")
        }
        seconds = in_turns(Learner(model, precision), OBJECTIVES[task], steps)
        padded, shared = (statistics.median(times) for times in seconds.values())
        ratio = statistics.median(p / s for p, s in zip(*seconds.values(), strict=True))
        parts = [part for step in steps["shared"][1:] for part in step]
        real = sum(part.tokens for part in parts) / options.rounds
        distinct = (
            sum(
                prefix_sharing.shared_prefixes(
                    p.input_ids, p.attention_mask.sum(1)
                ).input_ids.numel()
                for p in parts
            )
            / options.rounds
        )
        print(
            f"| {task} | {real:.0f} | {distinct:.0f} | {padded:.2f} | {shared:.2f} | {ratio:.2f} |",
            flush=True,
        )
        results[task] = {"real": real, "distinct": distinct, "ratio": ratio, **seconds}
    print(json.dumps({"precision": precision, "threads": options.threads, "tasks": results}))


if __name__ == "__main__":
    main()
