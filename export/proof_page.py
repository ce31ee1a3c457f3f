"""report.html of a bundle: what it holds and what was proven of it, one self-contained page, in
light and dark.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from edgetune.core.files import sha256_file, write_text
from edgetune.core.layout import REPORT
from edgetune.export.proof.confidence import FIT_FIGURES, shown_figure
from edgetune.report.html import (
    STYLE,
    figure,
    html_table,
    raw_table,
    verdict_mark,
    verdict_tile,
    words,
)
from edgetune.runtime.bundle.manifest import FileInfo, Manifest

# digests and figures stay in one piece; a wide table scrolls
MORE_STYLE = "td { overflow-wrap: normal; }"


def write_page(folder: Path, manifest: Manifest) -> dict[str, FileInfo]:
    """Write the page beside the files that `manifest` lists; its own entry for the manifest."""
    path = folder / REPORT
    write_text(path, render_proof(manifest))
    return {REPORT: FileInfo(sha256_file(path), path.stat().st_size)}


def render_proof(manifest: Manifest) -> str:
    """The page as HTML."""
    title = f"Bundle of {manifest.base.name}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(_what(manifest))}</p>",
        _tiles(manifest),
        "<h2>Verdict</h2>" + _verdict(manifest),
        *_task(manifest),
        *_confidence(manifest),
        *_changed(manifest),
        *_answers(manifest),
        "<h2>Proof: the bundle against torch</h2>" + _proof(manifest),
        *_text(manifest),
        *_cost(manifest),
        *_survival(manifest),
        "<h2>Adapters</h2>" + _adapters(manifest),
        "<h2>Files</h2>" + html_table(("file", "bytes", "sha256"), _files(manifest)),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport"'
        f' content="width=device-width"><title>{escape(title)}</title>'
    )
    return (
        "<!doctype html>\n<html"
        f' lang="en"><head>{head}<style>{STYLE}{MORE_STYLE}</style></head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _what(manifest: Manifest) -> str:
    stored = manifest.precision
    precision = (
        stored.weights
        if stored.block_size is None
        else f"{stored.weights} in blocks of {stored.block_size}"
    )
    precision += f", activations in {stored.activations}" if stored.activations != "float" else ""
    for module, more in manifest.quality.get("kept_in_fp32", {}).items():
        precision += (
            f"; {module} in fp32, {more / 1e6:.1f} MB more, because its width is no multiple of"
            " the block"
        )
    kept = ", ".join(f"{name} in {kind}" for name, kind in stored.overrides.items())
    return (
        f"{manifest.task}, {manifest.mode}, {precision}{f', {kept}' if kept else ''}; base"
        f" {manifest.base.digest}; edgetune {manifest.edgetune_version}"
    )


def _tiles(manifest: Manifest) -> str:
    tiles = [
        verdict_tile(list(manifest.proof["verdict"].values())),
        (f"{sum(info.bytes for info in manifest.files.values()) / 1e6:,.1f} MB", "on disk"),
        (f"{manifest.base.parameters / 1e6:,.1f} M", "parameters of the base"),
        (str(len(manifest.adapters)), "adapters"),
    ]
    cells = "".join(
        f'<div class="tile"><b>{escape(big)}</b><span>{escape(small)}</span></div>'
        for big, small in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _verdict(manifest: Manifest) -> str:
    """What the figures mean to whoever ships the bundle, in colour."""
    rows = [
        (
            escape(name),
            verdict_mark(one),
            escape(one["says"])
            + "".join(f'<br><span class="bad">{escape(why)}</span>' for why in one["reasons"])
            + (f"<br>shipped by {escape(one['allowed_by'])}" if one["allowed_by"] else ""),
        )
        for name, one in manifest.proof["verdict"].items()
    ]
    return raw_table(("adapter", "", "against torch"), rows)


def _changed(manifest: Manifest) -> Iterable[str]:
    """Rows that the bundle answers otherwise, those that lost first."""
    for name, result in manifest.proof.get("task", {}).items():
        if (changed := result.get("changed")) and changed["rows"]:
            rows = [
                (
                    escape(row["line"]),
                    *(escape(row[key]) for key in ("text", "wanted", "torch")),
                    f'<span class="{"bad" if row["worse"] else ""}">{escape(row["bundle"])}</span>',
                )
                for row in changed["rows"]
            ]
            count = f"{changed['changed']} of {changed['answered']} rows"
            yield f"<h2>{escape(name)}: {count} answered otherwise</h2>" + raw_table(
                ("row", "text", "wanted", "torch", "bundle"), rows
            )


def _answers(manifest: Manifest) -> Iterable[str]:
    """A few rows from text to final answer, and each that came out otherwise."""
    found = manifest.proof.get("answers", {})
    rows = [
        (
            name,
            one["kind"],
            f"{one['same']} of {one['rows']}",
            "–" if one["largest"] is None else f"{one['largest']:.1e}",
            ", ".join(f"{key} {value}" for key, value in one["not_applied"].items()),
        )
        for name, one in found.items()
    ]
    if rows:
        head = ("adapter", "answers", "same", "largest difference", "not applied on the device")
        yield "<h2>From text to answer: transformers and PEFT, and the bundle</h2>" + html_table(
            head, rows
        )
    others = [(name, *other) for name, one in found.items() for other in one["others"]]
    if others:
        yield html_table(("adapter", "text", "transformers", "bundle"), others)


def _proof(manifest: Manifest) -> str:
    head = (
        "adapter",
        "positions",
        "max |Δ logit|",
        "mean KL (nats)",
        "same best answer",
        "effect (nats)",
        "recovered",
        "direction",
        "strength",
        "bounds",
    )
    rows = [
        (
            name,
            f"{p['positions']:,}",
            f"{p['max_abs']:.1e}",
            f"{p['mean_kl']:.2g}",
            f"{p['top1']:.1%}",
            f"{p['adapter_kl']:.3g}",
            f"{p['recovered']:.1%}",
            f"{p['direction']:.3f}",
            f"{p['strength']:.2f}",
            "within" if p["passed"] else "; ".join(p["failures"]),
        )
        for name, p in manifest.proof["adapters"].items()
    ]
    return html_table(head, rows)


def _text(manifest: Manifest) -> Iterable[str]:
    """What was read by both tokenizers."""
    if text := manifest.proof.get("text"):
        yield "<h2>Text: the bundle's tokenizer against transformers'</h2>" + html_table(
            ("texts", "conversations", "tokens", ""),
            [(f"{text['texts']:,}", str(text["chats"]), f"{text['tokens']:,}", "✓ the same")],
        )


def _cost(manifest: Manifest) -> Iterable[str]:
    """What the precision costs the base, apart from any task."""
    if cost := manifest.quality.get("cost"):
        row = (
            cost["task"],
            words(cost["metric"]),
            f"{cost['torch']:.4g}",
            f"{cost['bundle']:.4g}",
            f"{cost['loss']:+.2%}",
            str(cost["items"]),
        )
        yield "<h2>Cost of the precision: the base without adapter</h2>" + html_table(
            ("set", "metric", "torch fp32", "bundle", "loss", "items"), [row]
        )


def _task(manifest: Manifest) -> Iterable[str]:
    """Every metric of every adapter that was measured, in torch and in the bundle."""
    rows = [
        (
            name if at == 0 else "",
            words(metric),
            figure(metric, result["torch"][metric]),
            figure(metric, value),
            _rows(result) if at == 0 else "",
            f"{result['same']:.1%}" if at == 0 and result["same"] is not None else "",
        )
        for name, result in manifest.proof.get("task", {}).items()
        for at, (metric, value) in enumerate(result["bundle"].items())
    ]
    if rows:
        yield "<h2>Task: validation rows</h2>" + html_table(
            ("adapter", "metric", "torch", "bundle", "rows", "same answer"), rows
        )


def _confidence(manifest: Manifest) -> Iterable[str]:
    """How sure each adapter is: as trained, and as it ships."""
    rows = []
    for name, one in manifest.proof.get("confidence", {}).items():
        sides = ("trained", "shipped")
        for at, side in enumerate(sides):
            figures = [shown_figure(one[side].get(key), form) for key, _, form in FIT_FIGURES]
            rows.append((name if at == 0 else "", f"{side}: {one[side]['fitted_on']}", *figures))
        if one["kept"]:
            rows[-1] = ("", f"shipped as trained: {one['kept']}", *[""] * len(FIT_FIGURES))
    if rows:
        head = ("adapter", "fitted on", *(words for _, words, _ in FIT_FIGURES))
        yield "<h2>Confidence: on the bundle's answers to the validation rows</h2>" + html_table(
            head, rows
        )


def _rows(result: Mapping[str, Any]) -> str:
    return f"{result['rows']:,} of {result['found']:,} of {result['data']}"


def _survival(manifest: Manifest) -> Iterable[str]:
    """What rounding left of a merged adapter, layer by layer."""
    for name, proof in manifest.proof["adapters"].items():
        if survived := proof.get("survived"):
            rows = [("all", f"{survived['strength']:.3f}", f"{survived['direction']:.3f}")]
            rows += [
                (layer, f"{one['strength']:.3f}", f"{one['direction']:.3f}")
                for layer, one in survived["layers"].items()
            ]
            yield f"<h2>{escape(name)}: ΔW after rounding</h2>" + html_table(
                ("layer", "strength", "direction"), rows
            )


def _adapters(manifest: Manifest) -> str:
    rows = [
        (
            entry.name,
            entry.problem or entry.task,
            str(entry.rank),
            str(len(entry.labels)) if entry.labels is not None else "–",
            entry.digest or "–",
        )
        for entry in manifest.adapters
    ]
    return html_table(
        ("adapter", "task", "rank in the graph", "labels", "sha256 of its weights"), rows
    )


def _files(manifest: Manifest) -> list[tuple[str, str, str]]:
    return [(path, f"{info.bytes:,}", info.sha256) for path, info in manifest.files.items()]
