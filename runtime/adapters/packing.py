"""PEFT folder → the tensors a bundle's graph takes: checked against the manifest, packed, scaling
folded in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from edgetune.core.arrays import Float32
from edgetune.core.confidence import Confidence, confidence_of
from edgetune.core.errors import AdapterError
from edgetune.core.layout import ADAPTER_CONFIG, ADAPTER_METADATA, PEFT_PREFIX
from edgetune.core.tasks import (
    CLASSIFICATION,
    DECODER_TASKS,
    EMBEDDING,
    ENCODER_TASKS,
    MASKED,
    REWARD,
    TAGGING,
)
from edgetune.runtime.adapters.head import (
    described_by_peft,
    head_layers_of,
    head_problems,
    labels_of,
    pack_head,
    task_of,
)
from edgetune.runtime.adapters.lora import LoraFolder, is_target, read_lora, refuse_if
from edgetune.runtime.adapters.sites import Placed, SiteTensors, pack_sites
from edgetune.runtime.adapters.trained_for import other_weights
from edgetune.runtime.bundle.manifest import Manifest
from edgetune.runtime.engine.head import LORA_A
from edgetune.runtime.engine.interface import Tensors

TYPED = ("bert", "electra")  # families that tell two texts apart by the types of their tokens


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter as graph inputs: A (1, in, rank), B (1, rank, out) a site; head (1, hidden,
    labels), (1, labels).

    Sites without adapter are absent (rank 0). `notes` are for people: its `doubts`, or that it was
    trained for another precision of the base.
    """

    name: str
    tensors: Tensors
    labels: tuple[str, ...] | None
    rank: int
    digest: str
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    """why it may not be what is meant: its base could not be checked, or it has no effect"""
    files: Mapping[str, str] = field(default_factory=dict)
    """name → sha256 (hex) of the very bytes that it was made of"""

    @cached_property
    def nbytes(self) -> int:
        """Memory the tensors take, in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def has_layers(self) -> bool:
        """Whether its head has transformers' layers before its output."""
        return LORA_A in self.tensors

    @property
    def prompt_format(self) -> dict[str, Any] | None:
        """How a row becomes a prompt, as it was trained; None for a foreign adapter."""
        value: dict[str, Any] | None = self.metadata.get("prompt_format")
        return value

    @property
    def reads_pairs(self) -> bool:
        """Whether it classifies two texts at once."""
        return (self.prompt_format or {}).get("text_pair") is not None

    @property
    def reads_case_marks(self) -> bool:
        """Whether it tags words that are marked where they have capitals."""
        return (self.prompt_format or {}).get("case_marks") is True

    @property
    def task(self) -> str | None:
        """What it was trained for; None for a foreign adapter without a head."""
        if self.metadata.get("task") == MASKED:  # which answers with an embedding
            return EMBEDDING
        return self.metadata.get("task") or (
            "sequence-classification" if self.labels is not None else None
        )

    @property
    def problem(self) -> str:
        """Of a classification: single-label, multi-label or regression."""
        return self.metadata.get("problem") or "single-label"

    @cached_property
    def confidence(self) -> Confidence:
        """How its logits become scores, and which of them are no answer."""
        return confidence_of(self.metadata)

    @property
    def generation(self) -> dict[str, Any]:
        """The adapter's own generation defaults."""
        return self.metadata.get("generation") or {}


def pack_adapter(
    folder: str | Path, manifest: Manifest, *, name: str | None = None, by_site: bool = False
) -> PackedAdapter:
    """Read a PEFT folder for this bundle. AdapterError lists every mismatch: names, shapes, base,
    hashes. `by_site`: its tensors are packed one site at a time, when they are asked for.
    """
    path = Path(folder)
    _takes_adapters(manifest, path)
    read = read_lora(path, base_digest=manifest.base.digest, max_bytes=most_bytes(manifest))
    return pack_lora(read, manifest, name=name or path.name, by_site=by_site)


def most_bytes(manifest: Manifest) -> int:
    """What an adapter's file may come to: fp64, the full rank of every module, and twice the
    vocabulary (the copies that PEFT saves).
    """
    graph = manifest.graph
    sizes = [(site.in_features, site.out_features) for site in manifest.sites]
    full = sum(sum(size) * max(size) for size in sizes)
    return 8 * (full + 2 * graph.vocab_size * graph.hidden_size) + (64 << 20)


def pack_lora(
    read: LoraFolder, manifest: Manifest, *, name: str, by_site: bool = False
) -> PackedAdapter:
    """Low-rank weights that are already in memory, for this bundle; else as `pack_adapter`."""
    path = read.path
    _takes_adapters(manifest, path)
    placed, labels = _place(read, manifest), labels_of(read, manifest)
    problems = [*read.problems, *_missing(read, manifest), *_task_problems(read, manifest)]
    refuse_if([*problems, *head_problems(read, manifest, labels)], path)
    head = pack_head(read, manifest)
    return PackedAdapter(
        name=name,
        tensors=(
            SiteTensors(placed, manifest, head) if by_site else pack_sites(placed, manifest) | head
        ),
        labels=labels,
        rank=read.rank,
        digest=read.digest or "",
        metadata=read.metadata or described_by_peft(read, manifest),
        notes=(*(doubts := _doubts(read, manifest)), *_notes(read, manifest)),
        doubts=doubts,
        files=read.files,
    )


def merged_head(
    folder: Path,
    task: str,
    manifest: Manifest,
    *,
    check: Callable[[Mapping[str, str]], None] | None = None,
) -> dict[str, Float32]:
    """What of a merged adapter in `folder` is not in the graph: a decoder's classifier, which the
    runtime applies. `check` may refuse what was read: name → sha256.
    """
    if not manifest.is_decoder or task != CLASSIFICATION:
        return {}
    read = read_lora(folder)
    if check is not None:
        check(read.files)
    refuse_if(head_problems(read, manifest, labels_of(read, manifest)), folder)
    return pack_head(read, manifest)


def _takes_adapters(manifest: Manifest, path: Path) -> None:
    if manifest.mode == "merged":
        raise AdapterError(
            "this bundle's adapter is merged into its weights; it takes no other",
            where=str(path),
            fix="Export with --mode separate to swap adapters.",
        )


def _place(read: LoraFolder, manifest: Manifest) -> Placed:
    """Find each module's part in the graph; unknown and misshapen ones become problems."""
    index, placed, layers = _part_index(manifest), Placed(), head_layers_of(read, manifest)
    for module, (a, b) in read.deltas.items():
        if layers is not None and layers.dense in (module, _without_first(module)):
            read.head_deltas[layers.dense] = a, b
            continue
        found = index.get(module) or index.get(_without_first(module))
        key = f"{PEFT_PREFIX}{module}"
        if found is None:
            read.problems.append(
                f"{key}.lora_A.weight {a.shape}: unknown, this graph has no adapter input for"
                f" {module}"
            )
            continue
        site, part = manifest.sites[found[0]], manifest.sites[found[0]].parts[found[1]]
        rank, width = a.shape[0], part.stop - part.start
        if a.shape != (rank, site.in_features):
            read.problems.append(
                f"{key}.lora_A.weight: expected {(rank, site.in_features)}, got {a.shape}"
            )
        if b.shape != (width, rank):
            read.problems.append(f"{key}.lora_B.weight: expected {(width, rank)}, got {b.shape}")
        if found in placed:
            read.problems.append(f"{key}: two modules of the file name the same part of the graph")
        placed[found] = (a, b)
        if (copy := read.copies.get(module)) is not None and copy != (width, site.in_features):
            expected = (width, site.in_features)
            read.problems.append(
                f"{key}.base_layer.weight: expected {expected}, got {copy}; it was trained on"
                " another vocabulary"
            )
    read.problems += [
        f"{PEFT_PREFIX}{name}.base_layer.weight: unknown"
        for name in read.copies.keys() - read.deltas.keys()
    ]
    return placed


def _part_index(manifest: Manifest) -> dict[str, tuple[int, int]]:
    """Module name → place, also under the name without the base model's prefix (`model.`, `bert.`
    …).
    """
    full = {
        p.module: (i, j) for i, site in enumerate(manifest.sites) for j, p in enumerate(site.parts)
    }
    short: dict[str, tuple[int, int]] = {}
    for module, place in full.items():
        short.setdefault(_without_first(module), place)
    return short | full


def _without_first(module: str) -> str:
    """`bert.encoder.layer.0` → `encoder.layer.0`; a name that would begin with a number is left
    alone.
    """
    rest = module.partition(".")[2]
    return rest if rest and not rest[0].isdigit() else module


def _missing(read: LoraFolder, manifest: Manifest) -> list[str]:
    """Modules that the configuration targets, the graph has, and the file lacks."""
    if read.modules is None:
        return []
    index, parts = _part_index(manifest), [part for site in manifest.sites for part in site.parts]
    places = {index.get(name) or index.get(_without_first(name)) for name in read.modules}
    absent = [
        p.module
        for p in parts
        if index[p.module] not in places and is_target(read.config, p.module)
    ]
    return [
        f"{PEFT_PREFIX}{module}.lora_A.weight: missing, {ADAPTER_CONFIG} targets this module"
        for module in absent
    ]


def _task_problems(read: LoraFolder, manifest: Manifest) -> list[str]:
    metadata, problems = read.metadata or {}, []
    task = metadata.get("task")
    fitting = (
        DECODER_TASKS if manifest.is_decoder else ENCODER_TASKS
    )  # one base serves every kind of head
    embeds = task in (MASKED, EMBEDDING) and not manifest.is_decoder
    if task is not None and task not in fitting and not embeds:
        problems.append(f"{ADAPTER_METADATA}: task: expected {' or '.join(fitting)}, got {task}")
    pooling = metadata.get("pooling")
    if pooling is not None and pooling != manifest.graph.pooling:
        problems.append(
            f"{ADAPTER_METADATA}: pooling: expected {manifest.graph.pooling}, got {pooling}"
        )
    pairs = (metadata.get("prompt_format") or {}).get("text_pair") is not None
    if pairs and manifest.base.model_type in TYPED and not manifest.graph.token_type_ids:
        problems.append(
            f"{ADAPTER_METADATA}: prompt_format.text_pair: this graph takes no token types; export"
            " the bundle again"
        )
    return problems


def _doubts(read: LoraFolder, manifest: Manifest) -> tuple[str, ...]:
    """Why an adapter that fits may not be what is meant; `--strict` refuses it for these."""
    doubts = []
    if read.metadata is None:
        named = read.config.get("base_model_name_or_path")
        trained = f" (its {ADAPTER_CONFIG} names {named!r:.100})" if named else ""
        doubts.append(
            f"no {ADAPTER_METADATA}: fitted to {manifest.base.name} by tensor names and shapes, its"
            f" base could not be checked{trained}"
        )
    if not read.head and not any(a.any() and b.any() for a, b in read.deltas.values()):
        doubts.append("it has no effect: every product of its A and B is zero")
    return tuple(doubts)


def _notes(read: LoraFolder, manifest: Manifest) -> tuple[str, ...]:
    if read.metadata is not None:
        line = other_weights(read.metadata.get("base_precision"), manifest.precision)
        return (line,) if line else ()
    task = task_of(read, manifest)
    if task == REWARD:
        return ("its head is applied to the last token's state: it gives a score",)
    if task == TAGGING:
        return ("its head is applied to every token's state; its labels are numbered",)
    return ("its labels are numbered",) if task == CLASSIFICATION else ()
