"""`edgetune diff`: what changed from one bundle to another."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgetune.cli.options import THREADS

if TYPE_CHECKING:
    from edgetune.runtime.bundle.diff import Change, Difference, ReadGraph
    from edgetune.runtime.check.rounds import Latency


WIDTH = 44  # characters of a value


@click.command("diff")
@click.argument("bundle_a", type=click.Path(path_type=Path))
@click.argument("bundle_b", type=click.Path(path_type=Path))
@click.option(
    "--latency",
    is_flag=True,
    help="Measure both side by side: each in a fresh process, in turn; medians and their ratio.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="With --latency: how often each is opened.",
)
@click.option("--threads", type=THREADS, help="With --latency: threads of the engine.")
@click.option(
    "--json",
    "json_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write every difference there.",
)
def command(
    bundle_a: Path,
    bundle_b: Path,
    latency: bool,
    rounds: int,
    threads: int | None,
    json_file: Path | None,
) -> int:
    """Compare two bundles: base, precision, graph, adapters, files, task metric, size.

    Exit 0: nothing differs that an engine reads (base, precision, graph, weights, tokenizer,
    adapters); 1: something does. Measured figures, reports and versions are listed, but do not
    count. Nodes are compared where onnx is installed.
    """
    from edgetune.core.files import write_json
    from edgetune.runtime.bundle.diff import diff

    found = diff(bundle_a, bundle_b, read_graph=_reader())
    document: dict[str, Any] = found.to_dict()
    for line in _lines(found):
        click.echo(line)
    if latency:
        times = _measure(bundle_a, bundle_b, rounds=rounds, threads=threads)
        document["latency"] = {side: one.to_dict() for side, one in times.items()} | {
            "ratio": _ratios(times)
        }
        for line in _latency_lines(times):
            click.echo(line)
    if json_file is not None:
        write_json(json_file, document)
    click.echo(_verdict(found))
    return 0 if found.equal else 1


def _reader() -> ReadGraph | None:
    """What opens graph files, where onnx is installed."""
    if any(importlib.util.find_spec(package) is None for package in ("onnx", "onnx_ir")):
        return None
    from edgetune.export.graph.onnx_file import read_graph

    return read_graph


def _lines(found: Difference) -> list[str]:
    """A line for each difference; those that can change an answer are marked."""
    rows = [("", "part", "what", "A", "B")]
    rows += [
        ("*" if change.behaviour else "", change.part, change.name, *_sides(change))
        for change in found.changes
    ]
    if len(rows) == 1:
        return []
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        "  ".join(
            [*(cell.ljust(width) for cell, width in zip(row[:4], widths, strict=True)), row[4]]
        ).rstrip()
        for row in rows
    ]


def _sides(change: Change) -> tuple[str, str]:
    """Both values in few characters; of lists and tables only what the other side lacks."""
    a, b = change.a, change.b
    if change.part == "file":
        return _file(a), _file(b)
    if change.part == "size":
        return f"{a / 1e6:.1f} MB", f"{b / 1e6:.1f} MB ({(b - a) / max(1, a):+.1%})"
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return _cut([x for x in a if x not in b]), _cut([x for x in b if x not in a])
    if isinstance(a, dict) and isinstance(b, dict):
        differing = [key for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]
        return _cut({key: a.get(key) for key in differing}), _cut(
            {key: b.get(key) for key in differing}
        )
    return _cut(a), _cut(b)


def _file(info: dict[str, Any] | None) -> str:
    return "–" if info is None else f"{info['bytes']:,} bytes, {info['sha256'][:12]}…"


def _cut(value: Any) -> str:
    if value is None:
        return "–"
    text = (
        f"{value:.4g}"
        if isinstance(value, float)
        else ", ".join(map(str, value))
        if isinstance(value, list)
        else str(value)
    )
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"


def _verdict(found: Difference) -> str:
    parts = list(dict.fromkeys(change.part for change in found.changes if change.behaviour))
    unread = (
        "" if found.graphs_read else " (onnx is not installed: graphs were compared by their bytes)"
    )
    if found.equal:
        return f"equal in all that an engine reads: {found.a} and {found.b}{unread}"
    return f"different (* in {', '.join(parts)}): {found.a} and {found.b}{unread}"


def _measure(a: Path, b: Path, *, rounds: int, threads: int | None) -> dict[str, Latency]:
    """Both with the first adapter that they share, else without."""
    from edgetune.runtime.bundle.manifest import read_manifest
    from edgetune.runtime.check.latency import Workload
    from edgetune.runtime.check.rounds import side_by_side

    manifests = [read_manifest(folder) for folder in (a, b)]
    others = {entry.name for entry in manifests[1].adapters}
    shared = tuple(entry.name for entry in manifests[0].adapters if entry.name in others)[:1]
    tokens = 256 if manifests[0].is_decoder else 32
    workloads = {
        side: Workload(str(folder), shared, threads, 5, tokens)
        for side, folder in (("A", a), ("B", b))
    }
    return side_by_side(workloads, rounds=rounds)


def _ratios(times: dict[str, Latency]) -> dict[str, float]:
    a, b = (times[side].to_dict() for side in "AB")
    return {name: b[name] / a[name] for name in a if a[name] and b[name]}


def _latency_lines(times: dict[str, Latency]) -> list[str]:
    a, b = (times[side].to_dict() for side in "AB")
    return [
        f"{name:<12} A {a[name]:9.2f}  B {b[name]:9.2f}  B / A {ratio:.3f}"
        for name, ratio in _ratios(times).items()
    ]
