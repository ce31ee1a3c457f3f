"""report.html of a run: one self-contained page with results, plots and settings, in light and
dark.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any, Protocol

from edgetune.core.files import write_text
from edgetune.core.layout import REPORT, TRIALS
from edgetune.core.progress import duration
from edgetune.metrics.statistics import headline
from edgetune.recipe.parameters import what_learns
from edgetune.recipe.relevance import relevant
from edgetune.recipe.schema import Recipe
from edgetune.report.answers import confidence_section, errors_section
from edgetune.report.charts import Series, line_chart
from edgetune.report.forgetting import general_changes, picture, task_changes
from edgetune.report.html import PLOTTED, STYLE, figure, html_table, words
from edgetune.report.kept import Points, kept_lines, kept_points
from edgetune.report.trials import read_trials, trial_section

Record = Mapping[str, Any]
EFFECT_WORDS = {
    "mean_kl": "mean KL divergence, adapter on from off (nats)",
    "mean_logit_change": "mean absolute change of a logit",
    "top1_changed": "answers that the adapter changes (share)",
}


class Result(Protocol):
    """What a run came to; see `training.run_recipe`."""

    @property
    def recipe(self) -> Recipe: ...
    @property
    def summary(self) -> Any: ...  # a dataclass: summary.json
    @property
    def records(self) -> Sequence[Record]: ...  # metrics.jsonl


def write_report(folder: Path, result: Result, *, trials: Path | None = None) -> None:
    """Write `folder`/report.html, whole or not at all; with the file of a search's trials, and that
    file beside it.
    """
    searched = [] if trials is None else read_trials(trials)
    page = render_report(
        recipe=result.recipe,
        summary=asdict(result.summary),
        records=result.records,
        trials=searched,
    )
    if trials is not None:
        write_text(folder / TRIALS, trials.read_text(encoding="utf-8"))
    write_text(folder / REPORT, page)


def render_report(
    *,
    recipe: Recipe,
    summary: Mapping[str, Any],
    records: Sequence[Record],
    trials: Sequence[Record] = (),
) -> str:
    """The page as HTML."""
    methods = ", then ".join(stage.method for stage in recipe.stage)
    title = f"{Path(summary['out']).name}: {methods}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        (
            f"<p>{escape(summary['base']['name'])}, {what_learns(recipe.parameters)},"
            f" {summary['trainable_parameters']:,} trained parameters, edgetune"
            f" {escape(summary['versions']['edgetune'])}</p>"
        ),
        _tiles(summary),
        *(f"<p>{escape(line)}.</p>" for line in summary.get("warnings", ())),
        '<h2>Training</h2><div class="plots">'
        + "".join(_plots(records, kept_points(summary)))
        + "</div>",
        *(f"<p>{escape(line)}</p>" for line in kept_lines(summary)),
        "<h2>Results</h2>" + _results(summary),
        *_judges(summary),
        *confidence_section(summary),
        *errors_section(summary),
        *trial_section(trials),
        *_forgetting(summary),
        "<h2>What the adapter changes</h2>" + _effect(summary),
        "<h2>Settings</h2>" + html_table(("setting", "value"), _settings(recipe)),
        "<h2>Origin</h2>" + html_table(("what", "value"), _origin(summary)),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport"'
        f' content="width=device-width"><title>{escape(title)}</title>'
    )
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _tiles(summary: Mapping[str, Any]) -> str:
    tiles = []
    for name, value in headline(summary["metrics"]).items():
        before = (summary["base_metrics"] or {}).get(name)
        label = f"{words(name)}" + (f", base {figure(name, before)}" if before is not None else "")
        tiles.append((figure(name, value), label))
    tiles += [
        (f"{summary['tokens_per_second']:,.0f}", "tokens per second"),
        (duration(summary["seconds"]), "in all"),
        (f"{summary['peak_rss_mb']:,.0f} MB", "peak memory"),
    ]
    cells = "".join(
        f'<div class="tile"><b>{escape(big)}</b><span>{escape(small)}</span></div>'
        for big, small in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _plots(records: Sequence[Record], kept: Mapping[str, Points]) -> Iterable[str]:
    train = in_one_row([r for r in records if r["kind"] == "train"], records)
    held_out = in_one_row([r for r in records if r["kind"] == "validation"], records)
    yield line_chart(
        "Loss",
        [
            _series("training", train, "loss", 1),
            _series("validation", held_out, "loss", 2),
            *_of(kept, 3, "loss"),
        ],
    )
    shares = [name for name in PLOTTED if any(name in r for _, r in held_out)]
    title = f"Validation {words(shares[0])}" if len(shares) == 1 else "Validation"
    yield line_chart(
        title,
        [
            *(
                _series(words(name), held_out, name, color)
                for color, name in enumerate(shares, start=2)
            ),
            *_of(kept, 1, *shares),
        ],
    )
    if any("perplexity" in r for _, r in held_out):
        yield line_chart(
            "Validation perplexity", [_series("perplexity", held_out, "perplexity", 2)]
        )
    for name, title in (
        ("reward", "Reward"),
        ("kl", "KL to the reference"),
        ("completion_length", "Tokens of an answer"),
    ):
        yield line_chart(
            title,
            [
                _series("sampled", train, name, 1),
                _series("validation, greedy", held_out, name, 2),
                *_of(kept, 3, name),
            ],
        )
    yield line_chart(
        "Learning rate", [_series("learning rate", train, "learning_rate", 3)], from_zero=True
    )


def _of(kept: Mapping[str, Points], color: int, *names: str) -> list[Series]:
    """The kept points, in the picture of their metric."""
    return [Series("kept", kept[name], color) for name in names if name in kept]


def in_one_row(chosen: Sequence[Record], records: Sequence[Record]) -> list[tuple[int, Record]]:
    """Records with their step counted over all stages."""
    ends: dict[int, int] = {}
    for record in records:
        ends[record["stage"]] = max(ends.get(record["stage"], 0), record["step"])
    return [
        (r["step"] + sum(end for stage, end in ends.items() if stage < r["stage"]), r)
        for r in chosen
    ]


def _series(name: str, records: Sequence[tuple[int, Record]], key: str, color: int) -> Series:
    return Series(name, [(float(step), float(r[key])) for step, r in records if key in r], color)


def _results(summary: Mapping[str, Any]) -> str:
    base = summary["base_metrics"] or {}
    rows = [
        (
            words(name),
            with_interval(name, base) if name in base else "–",
            with_interval(name, summary["metrics"]),
        )
        for name in headline(summary["metrics"])
    ]
    rows.append(("training loss (last)", "–", f"{summary['train_loss']:.4f}"))
    without = (
        "frozen base + logistic regression"
        if "accuracy" in base or summary["task"] == "reward"
        else "base"
    )
    return html_table(("validation", without, "with the adapter"), rows)


def _judges(summary: Mapping[str, Any]) -> Iterable[str]:
    """A table for each adapter that was trained to guide the policy."""
    for name, judge in summary.get("adapters", {}).items():
        title = f"Judge {name}, trained by stage {judge['stage']}"
        yield f"<h2>{escape(title)}</h2>" + _results({**judge, "task": "reward"})


def with_interval(name: str, metrics: Mapping[str, float]) -> str:
    """A figure, and its 95 % interval where there is one."""
    ends = [
        figure(name, metrics[f"{name}_{end}"])
        for end in ("low", "high")
        if f"{name}_{end}" in metrics
    ]
    return figure(name, metrics[name]) + (f" ({ends[0]} to {ends[1]})" if len(ends) == 2 else "")


def _forgetting(summary: Mapping[str, Any]) -> Iterable[str]:
    results = summary.get("forgetting")
    if results:
        drawn = picture(
            task_changes(summary["metrics"], summary["base_metrics"]), general_changes(results)
        )
        rows = [
            (
                f"{r['task']} {words(r['metric'])}",
                f"{r['before']:.4f}",
                f"{r['after']:.4f}",
                f"{r['change']:+.4f}",
                f"{r['low']:+.4f} … {r['high']:+.4f}",
                f"{r['items']:,}",
            )
            for r in results
        ]
        head = ("general ability", "before", "after", "change", "95 % interval", "items")
        yield f'<h2>Forgetting</h2><div class="plots">{drawn}</div>' + html_table(head, rows)


def _effect(summary: Mapping[str, Any]) -> str:
    rows = [
        (EFFECT_WORDS.get(name, name), f"{value:.4g}") for name, value in summary["effect"].items()
    ]
    return html_table((f"on {summary['effect_rows']} rows", ""), rows)


def _settings(recipe: Recipe) -> list[tuple[str, str]]:
    return [(key, str(value)) for key, value in relevant(recipe)]


def _origin(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [("base", f"{summary['base']['name']} {summary['base']['digest']}")]
    for index, data in enumerate(summary["data"]):
        for name, digest in data["digests"].items():
            count = data["rows"].get(name)  # a reward or an adapter has none
            rows.append(
                (
                    f"stage {index}, {name}",
                    digest if count is None else f"{count:,} rows of {digest}",
                )
            )
    for index, stage in enumerate(summary["stages"]):
        facts = (
            f"{stage['steps']:,} steps, {stage['tokens']:,} tokens, {stage['precision']},"
            f" {duration(stage['seconds'])}"
        )
        rows.append((f"stage {index}", facts))
    rows.append(("seed, threads", f"{summary['seed']}, {summary['threads']}"))
    rows.append(
        (
            "versions",
            ", ".join(f"{name} {version}" for name, version in summary["versions"].items()),
        )
    )
    return rows
