"""Several runs on one page: their results, their curves in one picture, and the settings in which
they differ.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from edgetune.core.errors import InputError
from edgetune.core.layout import JOURNAL, RECIPE, SUMMARY
from edgetune.core.progress import duration
from edgetune.core.settings import toml_value
from edgetune.core.tasks import lower_is_better
from edgetune.metrics.statistics import headline
from edgetune.recipe.migrate import migrated
from edgetune.recipe.runs import short_names
from edgetune.report.charts import Series, line_chart
from edgetune.report.gain_against_loss import UNITS, ComparedRun, gain_table, measured, plane
from edgetune.report.html import STYLE, words
from edgetune.report.run_page import in_one_row, with_interval

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib
COLORS = 8  # then they begin again
MORE_STYLE = """
:root { --c5: #b91c2e; --c6: #0e7f8c; --c7: #8a6d00; --c8: #64748b; }
@media (prefers-color-scheme: dark) { :root { --c5: #f58a94; --c6: #58c7d3;
  --c7: #d9bd4e; --c8: #a8b3c2; } }
.c5 { color: var(--c5); } .c6 { color: var(--c6); }
.c7 { color: var(--c7); } .c8 { color: var(--c8); }
body { max-width: 76rem; } .wide th, .wide td { padding-right: 1.1rem; }
.number { text-align: right; white-space: nowrap; }
td.run { color: var(--ink); font-weight: 600; white-space: nowrap; }
.swatch { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px;
  margin-right: .45rem; background: currentColor; }
.line { stroke-width: 1.4; } .best { font-weight: 700; }
.note { margin: .5rem 0 0; font-size: .88rem; }
figcaption .key { display: inline-block; margin: 0 .9rem 0 0; }
figcaption .key:first-of-type { margin-left: .9rem; }
.axis { stroke: var(--soft); } .name { font-size: 12px; font-weight: 600; fill: currentColor; }
.planes { margin-bottom: 1rem; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); }
details { margin-top: 1rem; } summary { cursor: pointer; color: var(--soft); }
"""
HIGHER_IS_BETTER = (
    "accuracy",
    "f1",
    "exact_match",
    "bleu",
    "rouge_l",
    "spearman",
    "pearson",
    "json_valid",
    "reward",
    "margin",
    "above_length",
)


@dataclass(frozen=True)
class FinishedRun:
    """What the page shows of a run."""

    name: str  # the end of its path, as long as it takes to tell it from the others
    summary: Mapping[str, Any]  # summary.json
    records: Sequence[Mapping[str, Any]]  # metrics.jsonl
    settings: Mapping[
        str, str
    ]  # dotted key → value as TOML, of recipe.toml; the data's digests and the machine


def read_runs(folders: Sequence[Path]) -> list[FinishedRun]:
    """The runs in the order given, each once. InputError for a folder that is no finished run."""
    distinct = list({folder.resolve(): folder for folder in folders}.values())
    return [
        _read_run(folder, name)
        for folder, name in zip(distinct, short_names(distinct), strict=True)
    ]


def _read_run(folder: Path, name: str) -> FinishedRun:
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        lines = (folder / JOURNAL).read_text(encoding="utf-8").splitlines()
        text = (folder / RECIPE).read_text(encoding="utf-8")
        recipe = migrated(tomllib.loads(text), where=str(folder / RECIPE))
        return FinishedRun(
            name, summary, [json.loads(line) for line in lines], _settings(recipe, summary)
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        raise InputError(
            "this is not a finished run" if missing else "this run cannot be read",
            where=str(folder),
            expected=f"{RECIPE}, {SUMMARY} and {JOURNAL}, as edgetune train writes them",
            got="" if missing else f"{type(error).__name__}: {error}",
        ) from error


def _settings(recipe: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, str]:
    settings = {key: value for key, value in _flat(recipe) if key != "out"}
    settings["base digest"] = summary["base"]["digest"]
    for index, data in enumerate(summary["data"]):
        for part, digest in data["digests"].items():
            settings[f"stage.{index}.data.{part} digest"] = digest
            settings[f"stage.{index}.data.{part} rows"] = f"{data['rows'].get(part, 0):,}"
    settings["processes"] = str(summary.get("processes", 1))
    return settings | {
        f"{package} version": version for package, version in summary["versions"].items()
    }


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as TOML); tables of a list are numbered."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = {str(index): item for index, item in enumerate(value)}
    if isinstance(value, dict) and (value or not path):
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else key)
    else:
        yield path, toml_value(value)


def render_comparison(runs: Sequence[FinishedRun]) -> str:
    """The page as HTML: self-contained, in light and dark."""
    title = f"{len(runs)} runs compared" if len(runs) > 1 else f"{runs[0].name}, alone"
    differing, common = _split_settings(runs)
    described = dict.fromkeys(
        f"{', then '.join(s['method'] for s in r.summary['stages'])} on {r.summary['base']['name']}"
        for r in runs
    )
    settings = _differences(runs, differing) if differing else '<p class="note">None.</p>'
    parts = [
        f"<h1>{escape(title)}</h1><p>{escape('; '.join(described))}</p>",
        "<h2>Results</h2>" + _results(runs),
        '<h2>Training</h2><div class="plots">' + "".join(_plots(runs)) + "</div>",
        *_forgetting(runs),
        "<h2>Settings that differ</h2>" + settings,
        f"<details><summary>{len(common)} settings are the same</summary>"
        + _rows(("setting", "value"), [(_cell(key), _cell(value)) for key, value in common.items()])
        + "</details>",
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport"'
        f' content="width=device-width"><title>{escape(title)}</title>'
    )
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}{MORE_STYLE}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )


def _results(runs: Sequence[FinishedRun]) -> str:
    """A row a run; the best of a metric that has a direction is bold."""
    names = list(dict.fromkeys(name for run in runs for name in headline(run.summary["metrics"])))
    facts: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "training loss": lambda s: f"{s['train_loss']:.4f}",
        "tokens/s": lambda s: f"{s['tokens_per_second']:,.0f}",
        "peak memory": lambda s: f"{s['peak_rss_mb']:,.0f} MB",
        "GPU memory": lambda s: (
            f"{s['peak_device_mb']:,.0f} MB" if s.get("peak_device_mb") else "–"
        ),
        "training": lambda s: duration(s["training_seconds"]),
        "in all": lambda s: duration(s["seconds"]),
        "steps": lambda s: f"{sum(stage['steps'] for stage in s['stages']):,}",
        "trained weights": lambda s: f"{s['trainable_parameters']:,}",
    }
    if not any(run.summary.get("peak_device_mb") for run in runs):
        del facts["GPU memory"]
    best = {name: _best(name, [run.summary["metrics"].get(name) for run in runs]) for name in names}
    rows = []
    for number, run in enumerate(runs):
        metrics = run.summary["metrics"]
        cells = [f'<td class="run">{_swatch(number)}{escape(run.name)}</td>']
        for name in names:
            kind = "number best" if name in metrics and metrics[name] == best[name] else "number"
            cells.append(_cell(with_interval(name, metrics) if name in metrics else "–", kind=kind))
        rows.append(cells + [_cell(fact(run.summary), kind="number") for fact in facts.values()])
    note = "Metrics are of each run's own validation rows and of what it kept; the best is bold."
    return (
        _rows(("run", *map(words, names), *facts), rows, numbers=True)
        + f'<p class="note">{note}</p>'
    )


def _best(name: str, values: Sequence[float | None]) -> float | None:
    """The best of several runs' values; None where nobody can say which is better, or all are
    alike.
    """
    there = [value for value in values if value is not None]
    if len(set(there)) < 2:
        return None
    if lower_is_better(name):
        return min(there)
    return max(there) if name.endswith(HIGHER_IS_BETTER) else None


def _plots(runs: Sequence[FinishedRun]) -> Iterator[str]:
    yield line_chart("Training loss", _curves(runs, "train", "loss"))
    yield line_chart(
        "Training loss by time",
        _curves(runs, "train", "loss", by_time=True),
        x_label="seconds of training",
    )
    shown = dict.fromkeys(
        name for run in runs for r in run.records if r["kind"] == "validation" for name in r
    )
    for name in headline(shown):
        if name not in ("kind", "stage", "step", "perplexity"):  # the perplexity is the loss again
            yield line_chart(f"Validation {words(name)}", _curves(runs, "validation", name))


def _curves(
    runs: Sequence[FinishedRun], kind: str, key: str, *, by_time: bool = False
) -> list[Series]:
    """A line a run in its colour; steps and seconds are counted over all stages."""
    series = []
    for number, run in enumerate(runs):
        of_kind = [record for record in run.records if record["kind"] == kind and key in record]
        before = [
            sum(stage["seconds"] for stage in run.summary["stages"][:index])
            for index in range(len(run.summary["stages"]))
        ]
        points = [
            (
                float(before[record["stage"]] + record["seconds"] if by_time else step),
                float(record[key]),
            )
            for step, record in in_one_row(of_kind, run.records)
        ]
        series.append(Series(run.name, points, number % COLORS + 1))
    return series


def _forgetting(runs: Sequence[FinishedRun]) -> Iterator[str]:
    """Task gain against general loss, of the runs that measured both."""
    every = [
        ComparedRun(run.name, number % COLORS + 1, run.summary) for number, run in enumerate(runs)
    ]
    shown = measured(every)
    if not shown:
        return
    figures = "".join(plane(shown, unit) for unit in UNITS)
    heads = "".join(
        f'<th class="number"><i class="swatch c{subject.color}"></i>{escape(subject.name)}</th>'
        for subject in shown
    )
    rows = "".join(
        f"<tr>{_cell(name)}{''.join(_cell(text, kind='number') for text in cells)}</tr>"
        for name, *cells in gain_table(shown)
    )
    note = (
        "Changes against the base, for the better to the right and up: points of accuracies, per"
        " cent of perplexities (a lower one is +). Whiskers and brackets: 95 % intervals, the same"
        " items before and after; of a mean, the sets taken as independent."
    )
    if missing := [subject.name for subject in every if subject not in shown]:
        note += f" Not measured (no [forgetting] in the recipe): {', '.join(missing)}."
    if not figures:
        note += (
            " These runs have no task metric with a base value in common, so there is no picture."
        )
    yield (
        f'<h2>Task gain against general loss</h2><div class="plots planes">{figures}</div>'
        f'<div class="wide"><table><thead><tr><th>change</th>{heads}</tr></thead>'
        f'<tbody>{rows}</tbody></table></div><p class="note">{escape(note)}</p>'
    )


def _split_settings(runs: Sequence[FinishedRun]) -> tuple[list[str], dict[str, str]]:
    """Keys of the settings that differ, and the settings that do not."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    same = {
        key: runs[0].settings[key]
        for key in keys
        if len({run.settings.get(key) for run in runs}) == 1
    }
    return [key for key in keys if key not in same], same


def _differences(runs: Sequence[FinishedRun], keys: Sequence[str]) -> str:
    heads = ["setting", *(run.name for run in runs)]
    rows = [
        [_cell(key), *(_cell(_short(run.settings.get(key, "–"))) for run in runs)] for key in keys
    ]
    return _rows(heads, rows, swatches=True)


def _rows(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers: bool = False,
    swatches: bool = False,
) -> str:
    """A table from ready cells; with `numbers` all columns but the first stand on the right."""
    top = "".join(
        f"<th{' class=number' if numbers and at else ''}>"
        f"{_swatch(at - 1) if swatches and at else ''}{escape(head)}</th>"
        for at, head in enumerate(heads)
    )
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return (
        f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cell(text: str, *, kind: str = "") -> str:
    return f'<td class="{kind}">{escape(text)}</td>' if kind else f"<td>{escape(text)}</td>"


def _swatch(number: int) -> str:
    return f'<i class="swatch c{number % COLORS + 1}"></i>'


def _short(text: str) -> str:
    """A digest by its beginning; anything else as it is."""
    return f"{text[:19]}…" if text.startswith("sha256:") else text
