"""What a grpo stage gained: the reward of greedy and of sampled answers to held-out prompts, before
and after.

    python benchmarks/reward_gain.py BUNDLE DATA REWARD... --before sft --after grpo [--rows 300]
    [--samples 4] [--reference output] [--answers answers.jsonl]

BUNDLE holds both adapters; one that it lacks may be named by its run folder. A REWARD is a function
(FILE.py:FUNCTION or MODULE:FUNCTION) or the name of a reward adapter in BUNDLE; all of them score
the same answers. Beside them stand tokens an answer, the share that ended by itself and the share
that says three words twice; with --reference, ROUGE-L (F-measure and recall) against that column.
Everything is compared prompt by prompt; 95 % intervals are bootstrapped over prompts. DATA needs
the columns of the prompt and those that the functions read; of rows with the same prompt the first
counts. --answers writes the greedy answers with their rewards, to be read. A table, then one JSON
line.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from edgetune.adapters.runs import find_adapter
from edgetune.data.conversations import last_turn, row_prompt
from edgetune.data.prompts import PromptFormat
from edgetune.data.row import Row
from edgetune.data.rows import read_rows
from edgetune.metrics.statistics import paired_bootstrap
from edgetune.recipe.paths import locate_reward, split_function
from edgetune.runtime import Runtime
from edgetune.training.reinforcement.rewards import load_function

Asked = Sequence[tuple[Any, Row]]  # prompts and their rows
Measure = Callable[[Asked, Sequence[Any]], list[float]]  # of each completion


def usable(runtime: Runtime, name: str) -> str:
    """The name of an adapter of the bundle, or of one that is loaded out of a run folder now."""
    if name in runtime.adapters or not Path(name).is_dir():
        return name
    runtime.load_adapter(Path(name).name, find_adapter(Path(name)))
    return Path(name).name


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


def measures(runtime: Runtime, rewards: Sequence[str], reference: str | None) -> dict[str, Measure]:
    """What is measured of an answer, by name."""
    found: dict[str, Measure] = {name: reward_of(runtime, name) for name in rewards}
    found |= {
        "tokens": lambda _, answers: [float(answer.completion_tokens) for answer in answers],
        "ended": lambda _, answers: [float(answer.finish_reason == "stop") for answer in answers],
        "repeats": lambda _, answers: [float(repeats(answer.text)) for answer in answers],
    }
    if reference is not None:
        for part in ("fmeasure", "recall"):
            found[f"rouge_l_{part}"] = rouge(reference, part)
    return found


def reward_of(runtime: Runtime, name: str) -> Measure:
    """A function's rewards, or those of a reward adapter in the bundle."""
    if split_function(name) is None:
        return lambda asked, answers: runtime.score(
            [(prompt, answer.text) for (prompt, _), answer in zip(asked, answers, strict=True)],
            name,
        )
    function = load_function(locate_reward(name, Path.cwd()))
    return lambda asked, answers: [
        function(last_turn(prompt), answer.text, dict(row.values))
        for (prompt, row), answer in zip(asked, answers, strict=True)
    ]


def repeats(text: str) -> bool:
    """Whether three words in a row come again."""
    words = re.findall(r"\w+", text.lower())
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(triples)) < len(triples)


def rouge(column: str, part: str) -> Measure:
    """ROUGE-L against a column, of 0 to 1."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return lambda asked, answers: [
        float(getattr(scorer.score(str(row.values[column]), answer.text)["rougeL"], part))
        for (_, row), answer in zip(asked, answers, strict=True)
    ]


def measured(
    of: Mapping[str, Measure], asked: Asked, answers: Sequence[Any], samples: int
) -> dict[str, list[float]]:
    """The mean of each prompt's `samples` answers, for every measure."""
    repeated = [one for one in asked for _ in range(samples)]
    each = {name: measure(repeated, answers) for name, measure in of.items()}
    return {
        name: [fmean(values[at : at + samples]) for at in range(0, len(values), samples)]
        for name, values in each.items()
    }


def compared(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """Both means and the mean difference with its interval."""
    differences = [b - a for a, b in zip(before, after, strict=True)]
    low, high = paired_bootstrap(differences)
    return {
        "before": fmean(before),
        "after": fmean(after),
        "gain": fmean(differences),
        "low": low,
        "high": high,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("reward", nargs="+", help="a function, or a reward adapter of the bundle")
    parser.add_argument("--before", default="sft")
    parser.add_argument("--after", default="grpo")
    parser.add_argument("--rows", type=int, help="prompts at most; not set: all")
    parser.add_argument(
        "--samples", type=int, default=4, help="sampled answers a prompt, at temperature 1; 0: none"
    )
    parser.add_argument("--reference", help="the column that answers are compared with")
    parser.add_argument("--answers", type=Path, help="where the greedy answers are written")
    options = parser.parse_args()
    results: dict[str, dict[str, dict[str, float]]] = {}
    with Runtime.open(options.bundle) as runtime:
        before_name, after_name = (
            usable(runtime, name) for name in (options.before, options.after)
        )
        form = PromptFormat(**(runtime.adapter(after_name).prompt_format or {}))
        asked = questions(options.data, form, options.rows)
        prompts = [prompt for prompt, _ in asked]
        of = measures(runtime, options.reward, options.reference)
        for how, samples, settings in (
            ("greedy", 1, {"temperature": 0.0}),
            ("sampled", options.samples, {"temperature": 1.0, "seed": 0}),
        ):
            if not samples:
                continue
            given = {
                name: runtime.generate(prompts, name, n=samples, **settings)
                for name in (before_name, after_name)
            }
            before, after = (measured(of, asked, answers, samples) for answers in given.values())
            results[how] = {name: compared(before[name], after[name]) for name in of}
            for name, found in results[how].items():
                print(
                    f"{how:<8} {len(asked)} prompts  {name:<24} before {found['before']:8.4f}"
                    f"  after {found['after']:8.4f}  gain {found['gain']:+.4f}"
                    f"  (95 %: {found['low']:+.4f} to {found['high']:+.4f})",
                    flush=True,
                )
            if how == "greedy" and options.answers is not None:
                write_answers(options.answers, prompts, given, before, after)
    print(
        json.dumps(
            {
                "benchmark": "reward_gain",
                "prompts": len(asked),
                "rewards": options.reward,
                "results": results,
            }
        )
    )


def write_answers(
    file: Path,
    prompts: Sequence[Any],
    given: Mapping[str, Sequence[Any]],
    *measures: Mapping[str, Sequence[float]],
) -> None:
    """A line a prompt: each adapter's answer and what was measured of it."""
    lines = []
    for at, prompt in enumerate(prompts):
        line: dict[str, Any] = {"prompt": prompt}
        for (name, answers), found in zip(given.items(), measures, strict=True):
            line[name] = {"text": answers[at].text} | {key: found[key][at] for key in found}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    file.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
