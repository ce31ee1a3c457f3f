"""report.html of the quickstart: one self-contained page with results, plots and answers, in light
and dark.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from edgetune.core.progress import duration
from edgetune.quickstart.outcome import (
    COLUMNS_SHOWN,
    AdapterOutcome,
    Outcome,
    counted,
    percent,
    result_table,
)
from edgetune.report.charts import Bar, Series, bar_chart, line_chart
from edgetune.report.html import STYLE, raw_table, verdict_mark, verdict_tile

MORE_STYLE = """
.name { fill: var(--ink); font-size: 13px; font-weight: 600; }
.value { fill: var(--ink); font-size: 12px; }
.bar { fill: currentColor; } .results td:first-child { color: var(--ink); font-weight: 600; }
.results td, .results th { white-space: nowrap; } .note { margin: .5rem 0 1rem; font-size: .88rem; }
code, pre { font: 13px/1.55 ui-monospace, "Cascadia Code", Menlo, Consolas, monospace; }
pre { background: var(--card); border-radius: 8px; padding: .8rem 1rem; overflow-x: auto;
  margin: .5rem 0 0; }
.soft, .c4 { color: var(--soft); }
.three { grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); } .top { margin-top: 1rem; }
"""
COLORS = {"base": 4, "adapted, torch": 2, "adapted, bundle": 3}  # the page's colours
KINDS = {
    "ttft_ms": "Time to first token",
    "tpot_ms": "Time per output token",
    "request_ms": "Time per request",
}
TableCells = Sequence[str]


def render_quickstart(outcome: Outcome) -> str:
    """The page as HTML."""
    title = "edgetune quickstart"
    parts = [
        f"<h1>{title}</h1>",
        (
            "<p>Three adapters trained on two frozen bases, shipped in two bundles, and proved to"
            " answer as what was trained.</p>"
        ),
        _tiles(outcome),
        "<h2>Results</h2>" + _results(outcome),
        f'<div class="plots top">{_accuracy(outcome)}</div>',
        '<h2>Training</h2><div class="plots three">'
        + "".join(_loss(a) for s in outcome.shipments for a in s.adapters)
        + "</div>",
        '<h2>Latency on this machine</h2><div class="plots three">'
        + "".join(_latency(outcome))
        + "</div>",
        _budget(outcome),
        "<h2>Proof: the bundle against torch</h2>" + _proof(outcome),
        "<h2>Answers from the bundles</h2>" + _answers(outcome),
        "<h2>Where the time went</h2>" + _steps(outcome),
        "<h2>Go on</h2>" + _commands(outcome),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport"'
        f' content="width=device-width"><title>{title}</title>'
    )
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}{MORE_STYLE}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )


def _tiles(outcome: Outcome) -> str:
    adapters = [adapter for shipment in outcome.shipments for adapter in shipment.adapters]
    tiles = [
        (duration(outcome.seconds), "in all, " + counted(outcome.threads, "thread")),
        (f"{outcome.peak_rss_mb:,.0f} MB", "peak memory of training and export"),
        verdict_tile([adapter.verdict for adapter in adapters]),
        (
            ", ".join(dict.fromkeys(_state(s.state)[0] for s in outcome.shipments)),
            f"latency and memory budget, {outcome.shipments[0].device}",
        ),
    ]
    cells = "".join(
        f'<div class="tile"><b>{escape(big)}</b><span>{escape(small)}</span></div>'
        for big, small in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _results(outcome: Outcome) -> str:
    how = dict.fromkeys(f"{a.name}: {a.base_how}" for s in outcome.shipments for a in s.adapters)
    note = "The base's row: " + "; ".join(how) + ". All three scores are of the same held-out rows."
    return (
        _table(COLUMNS_SHOWN, result_table(outcome), kind="results")
        + f'<p class="note">{escape(note)}</p>'
    )


def _accuracy(outcome: Outcome) -> str:
    groups = []
    for adapter in (a for s in outcome.shipments for a in s.adapters):
        shares = (adapter.base_score, adapter.torch_score, adapter.bundle_score)
        bars = [
            Bar(name, share, color)
            for (name, color), share in zip(COLORS.items(), shares, strict=True)
        ]
        groups.append((adapter.name, bars))
    return bar_chart("Held-out rows answered right", groups)


def _loss(adapter: AdapterOutcome) -> str:
    """Every training step would be noise: the mean of each twelfth of the training, and each
    validation.
    """
    train = [(float(r["step"]), float(r["loss"])) for r in adapter.records if r["kind"] == "train"]
    held_out = [
        (float(r["step"]), float(r["loss"])) for r in adapter.records if r["kind"] == "validation"
    ]
    series = [Series("training", _thin(train, 12), 2), Series("held out", held_out, 3)]
    return line_chart(f"{adapter.name}: loss", series, from_zero=True)


def _thin(points: Sequence[tuple[float, float]], count: int) -> list[tuple[float, float]]:
    """Neighbouring points averaged into at most `count`, each at its last step."""
    size = -(-len(points) // count) or 1
    parts = [points[at : at + size] for at in range(0, len(points), size)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def _latency(outcome: Outcome) -> Iterable[str]:
    """A curve of sorted samples for each adapter: x = share of requests that are faster, y =
    milliseconds.
    """
    for shipment in outcome.shipments:
        runs = shipment.measured["samples"]["runs"]
        for key, words in KINDS.items():
            series = [
                Series(run["adapter"], _sorted_curve([x for one in run[key] for x in one]), color)
                for color, run in enumerate((run for run in runs if any(run.get(key, []))), start=2)
            ]
            yield line_chart(
                f"{shipment.name}: {words.lower()}, ms",
                series,
                x_label="percentile",
                from_zero=True,
            )


def _sorted_curve(samples: Sequence[float]) -> list[tuple[float, float]]:
    ordered = sorted(samples)
    return [(100 * (index + 0.5) / len(ordered), value) for index, value in enumerate(ordered)]


def _budget(outcome: Outcome) -> str:
    rows = [
        (
            escape(s.name),
            escape(v["key"] + (f" ({v['adapter']})" if v["adapter"] else "")),
            f"{v['value']:.4g}",
            f"{v['limit']:g}",
            _mark(v["state"]),
        )
        for s in outcome.shipments
        for v in s.verdicts
    ]
    return (
        '<div class="top">'
        + raw_table(
            (
                "bundle",
                f"limit of the profile “{outcome.shipments[0].device}”",
                "found",
                "limit",
                "",
            ),
            rows,
        )
        + "</div>"
    )


def _proof(outcome: Outcome) -> str:
    head = (
        "adapter",
        "mean KL (nats)",
        "same best answer",
        "effect of the adapter (nats)",
        "of it recovered",
        "direction",
        "strength",
        "",
    )
    rows = []
    for a in (a for s in outcome.shipments for a in s.adapters):
        p = a.proof
        figures = (
            f"{p['mean_kl']:.2g}",
            percent(p["top1"]),
            f"{p['adapter_kl']:.3g}",
            percent(p["recovered"]),
            f"{p['direction']:.3f}",
            f"{p['strength']:.2f}",
        )
        rows.append((escape(a.name), *figures, verdict_mark(a.verdict)))
    note = (
        "Measured at export through the shipped engine on the same inputs as torch. An adapter that"
        " silently does nothing would recover 0 % with strength 0."
    )
    return raw_table(head, rows) + f'<p class="note">{note}</p>'


def _answers(outcome: Outcome) -> str:
    rows = []
    for a in (a for s in outcome.shipments for a in s.adapters):
        for call in a.calls:
            score = f' <span class="soft">{call.score:.0%}</span>' if call.score is not None else ""
            without = (
                f"<code>{escape(call.base_answer)}</code>" if call.base_answer is not None else "–"
            )
            rows.append(
                (
                    escape(a.name),
                    escape(call.request),
                    f"<code>{escape(call.answer)}</code>{score}",
                    without,
                )
            )
    return raw_table(("adapter", "request", "answer", "the base without adapter"), rows)


def _steps(outcome: Outcome) -> str:
    rows = [("prepare the bases (once)", duration(outcome.preparation_seconds))]
    rows += [(step.name, duration(step.seconds)) for step in outcome.steps]
    return _table(("step", ""), rows)


def _commands(outcome: Outcome) -> str:
    lines = []
    for shipment in outcome.shipments:
        for adapter in shipment.adapters[:1]:
            lines.append(
                f"edgetune predict {shipment.folder} --adapter {adapter.name}"
                f' "{adapter.calls[0].request}"'
            )
        lines.append(f"edgetune check {shipment.folder} --device raspberry-pi-5")
    versions = ", ".join(f"{name} {version}" for name, version in outcome.versions.items())
    return f'<pre>{escape(chr(10).join(lines))}</pre><p class="note">{escape(versions)}</p>'


def _state(state: str) -> tuple[str, str]:
    """Words and class of a verdict."""
    return {"ok": ("within", "good"), "over": ("exceeded", "bad")}.get(
        state, ("too noisy to tell", "soft")
    )


def _mark(state: str) -> str:
    return {"ok": '<span class="good">✓</span>', "over": '<span class="bad">✗ exceeded</span>'}.get(
        state, '<span class="soft">too noisy to tell</span>'
    )


def _table(head: TableCells, rows: Iterable[TableCells], *, kind: str = "") -> str:
    return raw_table(head, ([escape(cell) for cell in row] for row in rows), kind=kind)
