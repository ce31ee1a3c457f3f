"""Two bundles, part by part: what differs, and whether it can change an answer. Reads their
manifests and small JSON files.

A difference is of *behaviour* when an engine reads it: base, precision, mode, graph, weights,
tokenizer, adapters. What only tells of a bundle (its report, the version that wrote it, measured
figures) is listed and does not count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from edgetune.core.errors import BundleError
from edgetune.core.files import read_json
from edgetune.core.layout import ADAPTER_CONFIG, ADAPTER_METADATA, REPORT
from edgetune.runtime.bundle.manifest import AdapterEntry, Manifest, read_manifest

TELLS = {
    REPORT,
    ADAPTER_METADATA,
}  # the second file's answers-changing parts stand in the manifest too, or are OF_ENCODERS
OF_ENCODERS = ("max_length", "pooling")  # where a text is cut, and which of its states are read
VERIFY = "`edgetune verify` names every file that is not as exported."
PEFT = (
    "r",
    "lora_alpha",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "modules_to_save",
)
PROOF = ("mean_kl", "top1", "recovered", "direction", "strength")


@dataclass(frozen=True)
class Graph:
    """A graph file without what only describes it: how many nodes of each operator, and a digest of
    the rest.
    """

    nodes: Mapping[str, int]
    digest: str


ReadGraph = Callable[[Path], Graph]


@dataclass(frozen=True)
class Change:
    """One thing that differs; None on the side that lacks it."""

    # base | bundle | precision | graph | tokenizer | adapter | file | nodes | task | proof | size
    part: str
    name: str
    a: Any
    b: Any
    behaviour: bool


@dataclass(frozen=True)
class Difference:
    """Everything that differs between bundle `a` and bundle `b`."""

    a: str
    b: str
    changes: tuple[Change, ...]
    graphs_read: bool
    """whether graphs were compared node by node; else another digest of a graph file counts as
    another graph
    """

    @property
    def equal(self) -> bool:
        """True when nothing differs that an engine reads."""
        return not any(change.behaviour for change in self.changes)

    def to_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            "schema": 1,
            "a": self.a,
            "b": self.b,
            "equal": self.equal,
            "graphs_read": self.graphs_read,
            "changes": [asdict(change) for change in self.changes],
        }


def diff(a: Path, b: Path, *, read_graph: ReadGraph | None = None) -> Difference:
    """Compare two bundle folders. `read_graph` opens a graph file, where something that can is
    installed.

    The digests are those that the manifests record: `edgetune verify` says whether the files still
    have them.
    """
    ours, theirs = read_manifest(a), read_manifest(b)
    graphs = {} if read_graph is None else _graphs(a, b, ours, theirs, read_graph)
    changes = [
        *_described(ours, theirs),
        *_adapters(a, b, ours, theirs),
        *_nodes(graphs),
        *_files(ours, theirs, graphs),
        *_figures(ours, theirs),
    ]
    return Difference(str(a), str(b), tuple(changes), graphs_read=read_graph is not None)


def _described(a: Manifest, b: Manifest) -> Iterator[Change]:
    """What the manifests themselves say of base, precision, graph and tokenizer."""
    yield from _fields("base", asdict(a.base), asdict(b.base), tells=("name",))
    for name, telling in (("task", False), ("mode", False), ("edgetune_version", True)):
        yield from _one("bundle", name, getattr(a, name), getattr(b, name), behaviour=not telling)
    yield from _fields("precision", asdict(a.precision), asdict(b.precision))
    yield from _fields("graph", asdict(a.graph), asdict(b.graph))
    yield from _one("graph", "head inputs", a.head, b.head)
    sites = [
        {site.name: [part.module for part in site.parts] for site in manifest.sites}
        for manifest in (a, b)
    ]
    yield from _one("graph", "adapter inputs", *(sorted(one) for one in sites))
    yield from _fields("tokenizer", asdict(a.tokenizer), asdict(b.tokenizer))


def _adapters(a: Path, b: Path, ours: Manifest, theirs: Manifest) -> Iterator[Change]:
    """Adapters that one bundle lacks, and of those that both have what differs: rank, alpha,
    modules, labels, weights …
    """
    sides = [
        {entry.name: _adapter(folder, entry, manifest) for entry in manifest.adapters}
        for folder, manifest in ((a, ours), (b, theirs))
    ]
    for name in _names(*sides):
        before, after = (side.get(name) for side in sides)
        if before is None or after is None:
            yield Change(
                "adapter", name, before and _brief(before), after and _brief(after), behaviour=True
            )
        else:
            yield from _fields("adapter", before, after, prefix=f"{name} ", tells=("metrics",))


def _adapter(folder: Path, entry: AdapterEntry, manifest: Manifest) -> dict[str, Any]:
    """The manifest's entry, and PEFT's settings and those of an encoder's adapter where the bundle
    holds them.
    """
    known = {
        f.name: getattr(entry, f.name)
        for f in dataclasses.fields(entry)
        if f.name not in ("name", "path", "onnx_adapter", "rank")
    }
    place = None if entry.path is None else folder / entry.path
    if place is not None and not manifest.is_decoder and (place / ADAPTER_METADATA).is_file():
        recorded = _json(place / ADAPTER_METADATA)
        known |= {name: recorded.get(name) for name in OF_ENCODERS}
    path = None if place is None else place / ADAPTER_CONFIG
    if path is None or not path.is_file():
        return {"rank": entry.rank, **known}
    config = _json(path)
    settings = {name: config.get(name) for name in PEFT}
    if isinstance(settings["target_modules"], list):
        settings["target_modules"] = sorted(settings["target_modules"])
    names = {"r": "rank", "lora_alpha": "alpha", "target_modules": "modules"}
    return {names.get(name, name): value for name, value in settings.items()} | known


def _json(path: Path) -> dict[str, Any]:
    document = read_json(path, error=BundleError)
    if not isinstance(document, dict):
        raise BundleError(
            "this is no JSON object", where=str(path), got=type(document).__name__, fix=VERIFY
        )
    return document


def _brief(adapter: Mapping[str, Any]) -> str:
    parts = [
        f"rank {adapter['rank']}",
        *([f"alpha {adapter['alpha']}"] if "alpha" in adapter else []),
        str(adapter["task"]),
    ]
    return ", ".join(parts)


def _graphs(
    a: Path, b: Path, ours: Manifest, theirs: Manifest, read: ReadGraph
) -> dict[str, tuple[Graph, Graph]]:
    """Graph files of the same name in both, where their bytes differ."""
    ends = [
        {
            manifest.graph.engine,
            manifest.graph.situations,
            manifest.graph.standard,
            manifest.graph.encoder,
        }
        for manifest in (ours, theirs)
    ]
    names = ends[0] & ends[1]
    found = {}
    for name in sorted(name for name in names if name is not None):
        if ours.files.get(name) != theirs.files.get(name):
            found[name] = (read(a / name), read(b / name))
    return found


def _nodes(graphs: Mapping[str, tuple[Graph, Graph]]) -> Iterator[Change]:
    for file, (before, after) in graphs.items():
        for op in _names(before.nodes, after.nodes):
            yield from _one(
                "nodes", f"{file} {op}", before.nodes.get(op, 0), after.nodes.get(op, 0)
            )


def _files(a: Manifest, b: Manifest, graphs: Mapping[str, tuple[Graph, Graph]]) -> Iterator[Change]:
    for path in _names(a.files, b.files):
        before, after = a.files.get(path), b.files.get(path)
        if before == after:
            continue
        same_graph = path in graphs and graphs[path][0].digest == graphs[path][1].digest
        behaviour = not same_graph and PurePosixPath(path).name not in TELLS
        yield Change(
            "file", path, before and asdict(before), after and asdict(after), behaviour=behaviour
        )


def _figures(a: Manifest, b: Manifest) -> Iterator[Change]:
    """Task metrics, the proof's figures, size: what the difference is worth."""
    tasks = [manifest.proof.get("task", {}) for manifest in (a, b)]
    for name in _names(*tasks):
        before, after = (side.get(name, {}).get("bundle", {}) for side in tasks)
        yield from _fields("task", before, after, prefix=f"{name} ", behaviour=False)
    proofs = [manifest.proof.get("adapters", {}) for manifest in (a, b)]
    for name in _names(*proofs):
        before, after = ({key: side.get(name, {}).get(key) for key in PROOF} for side in proofs)
        yield from _fields("proof", before, after, prefix=f"{name} ", behaviour=False)
    sizes = [sum(info.bytes for info in manifest.files.values()) for manifest in (a, b)]
    yield from _one("size", "bytes", *sizes, behaviour=False)


def _fields(
    part: str,
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    *,
    prefix: str = "",
    tells: Sequence[str] = (),
    behaviour: bool = True,
) -> Iterator[Change]:
    for name in _names(a, b):
        yield from _one(
            part, prefix + name, a.get(name), b.get(name), behaviour=behaviour and name not in tells
        )


def _one(part: str, name: str, a: Any, b: Any, *, behaviour: bool = True) -> Iterator[Change]:
    if a != b:
        yield Change(part, name, _plain(a), _plain(b), behaviour)


def _plain(value: Any) -> Any:
    return (
        asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    )


def _names(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The keys of both, in the order of the first."""
    return list(dict.fromkeys([*a, *b]))
