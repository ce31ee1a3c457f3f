"""Which weights a run's stages left, on its page: a sentence each, and points for the pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from edgetune.report.html import figure, words

Points = list[tuple[float, float]]


def kept_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """Which step was kept, by which metric, and what the last one had; and why a stage ended early.
    Nothing of a stage without validation rows.
    """
    stages = summary["stages"]
    for number, stage in enumerate(stages):
        kept = stage.get("kept")
        if not kept:
            continue
        metric = kept["metric"]
        line = f"stage {number}: " if len(stages) > 1 else ""
        if kept["step"] == kept["last_step"] == kept["best_step"]:
            line += f"the last step was the best by {words(metric)}"
        elif kept["step"] == kept["best_step"] and kept["best"] == kept["last"]:
            line += (
                f"step {kept['step']:,} is kept, {words(metric)} {figure(metric, kept['best'])} as"
                f" at the last, step {kept['last_step']:,}, with less loss"
            )
        elif kept["step"] == kept["best_step"]:
            line += (
                f"step {kept['step']:,} is kept, the best by {words(metric)}:"
                f" {figure(metric, kept['best'])} (the last, step {kept['last_step']:,}:"
                f" {figure(metric, kept['last'])})"
            )
        else:
            line += (
                f"the last step is kept, {words(metric)} {figure(metric, kept['last'])} (the best,"
                f" step {kept['best_step']:,}: {figure(metric, kept['best'])})"
            )
        planned = stage.get("planned_steps") or stage["steps"]
        if stage["steps"] < planned:
            line += f"; stopped after {stage['steps']:,} of {planned:,} steps, without a better one"
        yield line[0].upper() + line[1:] + "."


def kept_points(summary: Mapping[str, Any]) -> dict[str, Points]:
    """Metric → the kept weights' points, at their steps over all stages."""
    points: dict[str, Points] = {}
    before = 0
    for stage in summary["stages"]:
        kept = stage.get("kept")
        if kept:
            best = kept["step"] == kept["best_step"]
            value = kept["best"] if best else kept["last"]
            points.setdefault(kept["metric"], []).append((before + kept["step"], value))
        before += stage["steps"]
    return points
