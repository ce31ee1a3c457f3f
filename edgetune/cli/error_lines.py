"""What `edgetune eval` shows of wrong answers: how right the surest are, the weakest labels, the
largest confusions and the worst rows; all of them are in `--json` and `--errors`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

SHOWN, TEXT = 5, 70  # of each list; characters of a text


def error_lines(analysis: Mapping[str, Any]) -> Iterator[str]:
    """Lines for a terminal; none where nothing is wrong or nothing was analysed."""
    if curve := analysis.get("coverage"):
        points = ", ".join(f"{one['right']:.1%} of {one['answered']:.0%}" for one in curve)
        yield f"right of the surest: {points}"
    if not analysis.get("wrong"):
        return
    if classes := [one for one in analysis.get("classes", ()) if one["support"]]:
        weakest = sorted(classes, key=lambda one: (one["f1"], one["label"]))[:SHOWN]
        yield "weakest labels (precision, recall, rows):"
        for one in weakest:
            yield (
                f"  {one['precision']:7.1%} {one['recall']:7.1%} {one['support']:5}"
                f"  {_cut(one['label'])}"
            )
    if pairs := analysis.get("confusions"):
        yield "most often confused (rows, wanted → got):"
        for one in pairs[:SHOWN]:
            yield f"  {one['rows']:5}  {_cut(one['wanted'])} → {_cut(one['got'])}"
    yield f"wrong rows: {analysis['wrong']}; the worst:"
    for one in analysis["worst"][:SHOWN]:
        score = "" if one.get("score") is None else f" ({one['score']:.0%})"
        got = one["got"] if one["got"] is not None else f"nothing, rejected {one['rejected']}"
        yield (
            f"  line {one['line']}: {_cut(one['text'])!r}: wanted {_cut(one['wanted'])}, got"
            f" {_cut(got)}{score}"
        )


def _cut(text: str) -> str:
    return text if len(text) <= TEXT else f"{text[:TEXT]}…"
