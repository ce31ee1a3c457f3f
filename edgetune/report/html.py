"""What the pages of runs share: style, tables, figures and words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2530; --soft: #5d6b7c;
  --rule: #e1e6ec; --card: #f6f8fa;
  --c1: #2563c9; --c2: #d1620d; --c3: #15803d; --c4: #9333a8; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d; --ink: #e4e9ef; --soft: #98a5b3;
  --rule: #2d353f;
  --card: #1c2229; --c1: #6ea8fe; --c2: #f59e4c; --c3: #5fc98a; --c4: #cf8ce0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 64rem; background: var(--paper);
  color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.45rem; margin: 0 0 .2rem; } h2 { font-size: 1.05rem; margin: 2.2rem 0 .6rem; }
p { margin: 0; color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem;
  margin-top: 1.4rem; }
.tile { background: var(--card); border-radius: 8px; padding: .75rem .9rem; }
.tile b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .85rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr));
  gap: 1rem; }
.few { grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); }
.plots + p, .plots + .wide { margin-top: .8rem; }
figure { margin: 0; background: var(--card); border-radius: 8px; padding: .75rem; }
figcaption { font-weight: 600; font-size: .9rem; margin: 0 0 .4rem .3rem; }
.key { font-weight: 400; color: var(--soft); margin-left: .9rem; }
.key i { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px;
  margin-right: .3rem; background: currentColor; }
svg { width: 100%; height: auto; display: block; } .grid { stroke: var(--rule); }
.tick { fill: var(--soft); font-size: 13px; }
.line { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round; }
.dot { fill: currentColor; }
.c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
th { font-weight: 600; } td:first-child { color: var(--soft); white-space: nowrap; }
td { overflow-wrap: anywhere; }
.good { color: var(--c3); } .changed { color: var(--c2); } .bad { color: #d13438; }
"""
PLOTTED_SHARES = (
    "accuracy",
    "macro_f1",
    "micro_f1",
    "entity_f1",
    "macro_entity_f1",
    "token_accuracy",
    "preference_accuracy",
    "length_baseline",
)
PLOTTED = (*PLOTTED_SHARES, "mrr", "spearman", "pearson")
SHARES = {
    *PLOTTED_SHARES, "exact_match", "recall_at_1", "recall_at_10", "above_length", "ended",
}  # fmt: skip


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose cells are plain text."""
    return raw_table(head, ([escape(cell) for cell in row] for row in rows))


def raw_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "") -> str:
    """A table whose cells are HTML, those of `head` plain text."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    of_kind = f' class="{kind}"' if kind else ""
    return (
        f'<div class="wide"><table{of_kind}><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def verdict_mark(verdict: Mapping[str, Any]) -> str:
    """A bundle's verdict of an adapter as HTML: green is as trained, and nothing else is."""
    if not verdict["reasons"] and verdict["value"] == "as trained":
        return '<span class="good">✓ as trained</span>'
    kind = "bad" if verdict["reasons"] else "changed"
    return f'<span class="{kind}">{escape(verdict["value"])}</span>'


def verdict_tile(verdicts: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """How many of a bundle's adapters answer as trained, and what that number is."""
    kept = sum(one["value"] == "as trained" for one in verdicts)
    return f"{kept} of {len(verdicts)}", "answer as trained"


def words(name: str) -> str:
    """A metric's name for people."""
    return {"macro_f1": "macro-F1"}.get(name, name.replace("_", " "))


def figure(name: str, value: float) -> str:
    """A metric's value for people; shares in per cent."""
    return (
        f"{100 * value:.2f} %"
        if name.removesuffix("_low").removesuffix("_high") in SHARES
        else f"{value:.4g}"
    )
