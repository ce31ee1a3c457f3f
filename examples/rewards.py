"""Reward functions for grpo recipes: (prompt, completion, row) → a number, the higher the better.

`prompt` is what the user said (the recipe's `prompt` template filled in), `completion` the sampled answer as text,
`row` all columns of the data row. A function must return a finite number for every completion, also for an empty one.
"""

import json


def exact_json(prompt: str, completion: str, row: dict) -> float:
    """1 for JSON that equals the row's `json`; for other valid JSON objects up to 0.5, by the share of right pairs; else 0."""
    wanted = json.loads(row["json"])
    try:
        got = json.loads(completion)
    except ValueError:
        return 0.0
    if not isinstance(got, dict):
        return 0.0
    if got == wanted:
        return 1.0
    right = sum(key in got and got[key] == value for key, value in wanted.items())
    return 0.1 + 0.4 * right / max(len(wanted), len(got))
