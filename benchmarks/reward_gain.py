"""What a grpo stage gained: the reward of greedy and of sampled answers to held-out prompts, before
and after.

    python benchmarks/reward_gain.py BUNDLE DATA file.py:function --before sft --after grpo [--rows
    300] [--samples 4]

BUNDLE holds both adapters. Each prompt's rewards before and after are compared pair by pair; 95 %
intervals are bootstrapped over prompts. DATA needs the columns of the prompt and those that the
reward function reads; of rows with the same prompt the first counts. A table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from edgetune.data.conversations import row_prompt
from edgetune.data.prompts import PromptFormat
from edgetune.data.row import Row
from edgetune.data.rows import read_rows
from edgetune.metrics.statistics import paired_bootstrap
from edgetune.recipe.paths import locate_reward
from edgetune.runtime import Runtime
from edgetune.training.reinforcement.rewards import RewardFunction, load_function


def questions(data: Path, form: PromptFormat, limit: int | None) -> list[tuple[Any, Row]]:
    """Every prompt once, with its row; at most `limit`, at equal distances."""
    found: dict[str, tuple[Any, Row]] = {}
    for row in read_rows(data).rows:
        prompt = row_prompt(form, row.values, where=f"{data}, line {row.line}")
        found.setdefault(json.dumps(prompt), (prompt, row))
    rows = list(found.values())
    return (
        rows
        if limit is None or limit >= len(rows)
        else [rows[at * len(rows) // limit] for at in range(limit)]
    )


def rewards(
    runtime: Runtime,
    adapter: str,
    asked: Sequence[tuple[Any, Row]],
    reward: RewardFunction,
    *,
    samples: int,
    **settings: Any,
) -> list[float]:
    """The mean reward of each prompt's `samples` answers."""
    answers = runtime.generate([prompt for prompt, _ in asked], adapter, n=samples, **settings)
    each = [
        reward(str(prompt), answer.text, dict(row.values))
        for (prompt, row), answer in zip(
            [a for a in asked for _ in range(samples)], answers, strict=True
        )
    ]
    return [fmean(each[at : at + samples]) for at in range(0, len(each), samples)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("reward", help="FILE.py:FUNCTION or MODULE:FUNCTION")
    parser.add_argument("--before", default="sft")
    parser.add_argument("--after", default="grpo")
    parser.add_argument("--rows", type=int, help="prompts at most; not set: all")
    parser.add_argument(
        "--samples", type=int, default=4, help="sampled answers a prompt, at temperature 1"
    )
    options = parser.parse_args()
    reward = load_function(locate_reward(options.reward, Path.cwd()))
    results: dict[str, dict[str, float]] = {}
    with Runtime.open(options.bundle) as runtime:
        form = PromptFormat(**(runtime.adapter(options.after).prompt_format or {}))
        asked = questions(options.data, form, options.rows)
        for how, samples, settings in (
            ("greedy", 1, {"temperature": 0.0}),
            ("sampled", options.samples, {"temperature": 1.0, "seed": 0}),
        ):
            before, after = (
                rewards(runtime, name, asked, reward, samples=samples, **settings)
                for name in (options.before, options.after)
            )
            low, high = paired_bootstrap([b - a for a, b in zip(before, after, strict=True)])
            results[how] = {
                "before": fmean(before),
                "after": fmean(after),
                "gain": fmean(after) - fmean(before),
                "low": low,
                "high": high,
            }
            print(
                f"{how:<8} {len(asked)} prompts  before {fmean(before):.4f}  after"
                f" {fmean(after):.4f}  gain {results[how]['gain']:+.4f}  (95 %: {low:+.4f} to"
                f" {high:+.4f})",
                flush=True,
            )
    print(
        json.dumps(
            {
                "benchmark": "reward_gain",
                "prompts": len(asked),
                "reward": options.reward,
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
