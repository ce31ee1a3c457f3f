"""report.html of a run: one self-contained page with results, plots and settings, in light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from edgetune.charts import Series, line_chart
from edgetune.files import write_text
from edgetune.forgetting.picture import general_changes, picture, task_changes
from edgetune.intervals import headline
from edgetune.progress import duration
from edgetune.recipe import Parameters, Recipe
from edgetune.settings import flat

Record = Mapping[str, Any]

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2530; --soft: #5d6b7c; --rule: #e1e6ec; --card: #f6f8fa;
  --c1: #2563c9; --c2: #d1620d; --c3: #15803d; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d; --ink: #e4e9ef; --soft: #98a5b3; --rule: #2d353f;
  --card: #1c2229; --c1: #6ea8fe; --c2: #f59e4c; --c3: #5fc98a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 64rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.45rem; margin: 0 0 .2rem; } h2 { font-size: 1.05rem; margin: 2.2rem 0 .6rem; }
p { margin: 0; color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; margin-top: 1.4rem; }
.tile { background: var(--card); border-radius: 8px; padding: .75rem .9rem; }
.tile b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .85rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--card); border-radius: 8px; padding: .75rem; }
figcaption { font-weight: 600; font-size: .9rem; margin: 0 0 .4rem .3rem; }
.key { font-weight: 400; color: var(--soft); margin-left: .9rem; }
.key i { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px; margin-right: .3rem; background: currentColor; }
svg { width: 100%; height: auto; display: block; } .grid { stroke: var(--rule); } .tick { fill: var(--soft); font-size: 11px; }
.line { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round; } .dot { fill: currentColor; }
.c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { font-weight: 600; } td:first-child { color: var(--soft); white-space: nowrap; }
td { overflow-wrap: anywhere; }
"""

EFFECT_WORDS = {
    "mean_kl": "mean KL divergence, adapter on from off (nats)",
    "mean_logit_change": "mean absolute change of a logit",
    "top1_changed": "answers that the adapter changes (share)",
}

PLOTTED_SHARES = ("accuracy", "macro_f1", "token_accuracy", "preference_accuracy", "length_baseline")
SHARES = {*PLOTTED_SHARES, "above_length", "ended"}


def write_report(path: Path, *, recipe: Recipe, summary: Mapping[str, Any], records: Sequence[Record]) -> None:
    """Write the page, whole or not at all."""
    write_text(path, render_report(recipe=recipe, summary=summary, records=records))


def render_report(*, recipe: Recipe, summary: Mapping[str, Any], records: Sequence[Record]) -> str:
    """The page as HTML."""
    methods = ", then ".join(stage.method for stage in recipe.stage)
    title = f"{Path(summary['out']).name}: {methods}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(summary['base']['name'])}, {what_learns(recipe.parameters)}, "
        f"{summary['trainable_parameters']:,} trained parameters, edgetune {escape(summary['versions']['edgetune'])}</p>",
        _tiles(summary),
        '<h2>Training</h2><div class="plots">' + "".join(_plots(records)) + "</div>",
        "<h2>Results</h2>" + _results(summary),
        *_forgetting(summary),
        "<h2>What the adapter changes</h2>" + _effect(summary),
        "<h2>Settings</h2>" + _table(("setting", "value"), _settings(recipe)),
        "<h2>Origin</h2>" + _table(("what", "value"), _origin(summary)),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return f"<!doctype html>\n<html lang=\"en\"><head>{head}<style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"


def what_learns(parameters: Parameters) -> str:
    """In a few words."""
    lora = f"LoRA r = {parameters.rank}, alpha = {parameters.alpha:g}"
    what = {"lora": lora, "head": "the head alone", "full": "all weights"}[parameters.train]
    return what if parameters.base_precision is None else f"{what}, for the {parameters.base_precision} base"


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
    cells = "".join(f'<div class="tile"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in tiles)
    return f'<div class="tiles">{cells}</div>'


def _plots(records: Sequence[Record]) -> Iterable[str]:
    train = in_one_row([r for r in records if r["kind"] == "train"], records)
    held_out = in_one_row([r for r in records if r["kind"] == "validation"], records)
    yield line_chart("Loss", [_series("training", train, "loss", 1), _series("validation", held_out, "loss", 2)])
    shares = [name for name in PLOTTED_SHARES if any(name in r for _, r in held_out)]
    title = f"Validation {words(shares[0])}" if len(shares) == 1 else "Validation"
    yield line_chart(title, [_series(words(name), held_out, name, color) for color, name in enumerate(shares, start=2)])
    if any("perplexity" in r for _, r in held_out):
        yield line_chart("Validation perplexity", [_series("perplexity", held_out, "perplexity", 2)])
    for name, title in (("reward", "Reward"), ("kl", "KL to the reference"), ("completion_length", "Tokens of an answer")):
        yield line_chart(title, [_series("sampled", train, name, 1), _series("validation, greedy", held_out, name, 2)])
    yield line_chart("Learning rate", [_series("learning rate", train, "learning_rate", 3)], from_zero=True)


def in_one_row(chosen: Sequence[Record], records: Sequence[Record]) -> list[tuple[int, Record]]:
    """Records with their step counted over all stages."""
    ends: dict[int, int] = {}
    for record in records:
        ends[record["stage"]] = max(ends.get(record["stage"], 0), record["step"])
    return [(r["step"] + sum(end for stage, end in ends.items() if stage < r["stage"]), r) for r in chosen]


def _series(name: str, records: Sequence[tuple[int, Record]], key: str, color: int) -> Series:
    return Series(name, [(float(step), float(r[key])) for step, r in records if key in r], color)


def _results(summary: Mapping[str, Any]) -> str:
    base = summary["base_metrics"] or {}
    rows = [
        (words(name), with_interval(name, base) if name in base else "–", with_interval(name, summary["metrics"]))
        for name in headline(summary["metrics"])
    ]
    rows.append(("training loss (last)", "–", f"{summary['train_loss']:.4f}"))
    without = "frozen base + logistic regression" if "accuracy" in base or summary["task"] == "reward" else "base"
    return _table(("validation", without, "with the adapter"), rows)


def with_interval(name: str, metrics: Mapping[str, float]) -> str:
    """A figure, and its 95 % interval where there is one."""
    ends = [figure(name, metrics[f"{name}_{end}"]) for end in ("low", "high") if f"{name}_{end}" in metrics]
    return figure(name, metrics[name]) + (f" ({ends[0]} to {ends[1]})" if len(ends) == 2 else "")


def _forgetting(summary: Mapping[str, Any]) -> Iterable[str]:
    results = summary.get("forgetting")
    if results:
        drawn = picture(task_changes(summary["metrics"], summary["base_metrics"]), general_changes(results))
        rows = [
            (f"{r['task']} {words(r['metric'])}", f"{r['before']:.4f}", f"{r['after']:.4f}", f"{r['change']:+.4f}",
             f"{r['low']:+.4f} … {r['high']:+.4f}", f"{r['items']:,}")
            for r in results
        ]
        head = ("general ability", "before", "after", "change", "95 % interval", "items")
        yield f'<h2>Forgetting</h2><div class="plots">{drawn}</div>' + _table(head, rows)


def _effect(summary: Mapping[str, Any]) -> str:
    rows = [(EFFECT_WORDS.get(name, name), f"{value:.4g}") for name, value in summary["effect"].items()]
    return _table((f"on {summary['effect_rows']} rows", ""), rows)


def _settings(recipe: Recipe) -> list[tuple[str, str]]:
    return [(key, str(value)) for key, value in flat(recipe) if value is not None and value != {}]


def _origin(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [("base", f"{summary['base']['name']} {summary['base']['digest']}")]
    for index, data in enumerate(summary["data"]):
        for name, digest in data["digests"].items():
            count = data["rows"].get(name)  # a reward or an adapter has none
            rows.append((f"stage {index}, {name}", digest if count is None else f"{count:,} rows of {digest}"))
    for index, stage in enumerate(summary["stages"]):
        facts = f"{stage['steps']:,} steps, {stage['tokens']:,} tokens, {stage['precision']}, {duration(stage['seconds'])}"
        rows.append((f"stage {index}", facts))
    rows.append(("seed, threads", f"{summary['seed']}, {summary['threads']}"))
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in summary["versions"].items())))
    return rows


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def words(name: str) -> str:
    """A metric's name for people."""
    return {"macro_f1": "macro-F1"}.get(name, name.replace("_", " "))


def figure(name: str, value: float) -> str:
    """A metric's value for people; shares in per cent."""
    return f"{100 * value:.2f} %" if name.removesuffix("_low").removesuffix("_high") in SHARES else f"{value:.4g}"
