"""The trials of a search on a run's page: their curves in one picture, and a table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgetune.core.progress import duration
from edgetune.core.tasks import lower_is_better
from edgetune.report.charts import Series, line_chart
from edgetune.report.html import figure, html_table, words

CHOSEN, OTHERS = 2, 1  # colours of the page
SHOWN = 60  # trials in the table


def trial_section(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """HTML of the trials, from the lines of the search's file."""
    trials = [line for line in lines if line["kind"] == "trial"]
    chosen = next((line["settings"] for line in lines if line["kind"] == "chosen"), None)
    if not trials:
        return
    metric = next((trial["metric"] for trial in trials if trial["metric"]), "")
    best = next((t["number"] for t in trials if t["settings"] == chosen), None)
    series = [
        Series(
            "chosen" if trial["number"] == best else "others",
            [(float(at), float(value)) for at, (_, value) in enumerate(trial["curve"], start=1)],
            CHOSEN if trial["number"] == best else OTHERS,
        )
        for trial in sorted(trials, key=lambda trial: trial["number"] == best)
    ]
    yield (
        '<h2>Search</h2><div class="plots few">'
        + line_chart(
            f"Validation {words(metric)} of each trial", series, x_label="validation of the trial"
        )
        + "</div>"
    )
    keys = list(dict.fromkeys(key for trial in trials for key in trial["settings"]))

    def order(trial: Mapping[str, Any]) -> tuple[bool, float]:
        value = trial["value"]
        sign = 1.0 if lower_is_better(metric) else -1.0
        return value is None, 0.0 if value is None else sign * value

    rows = [
        (
            f"{trial['number']}" + (", chosen" if trial["number"] == best else ""),
            *(f"{trial['settings'].get(key, '–')}" for key in keys),
            "–" if trial["value"] is None else figure(metric, trial["value"]),
            trial["state"],
            duration(trial["seconds"]),
        )
        for trial in sorted(trials, key=order)[:SHOWN]
    ]
    heads = [key.rpartition(".")[2].replace("_", " ") for key in keys]
    yield html_table(("trial", *heads, words(metric), "ended", "time"), rows)


def read_trials(path: Path) -> list[dict[str, Any]]:
    """The lines of a search's file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
