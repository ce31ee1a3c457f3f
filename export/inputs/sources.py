"""What goes into a bundle: runs and PEFT folders, read and checked before anything is traced, and
the base they share.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.adapters.folder import read_metadata
from edgetune.adapters.full_model import full_folder, own_base, read_full
from edgetune.core.errors import AdapterError, ExportError, listed
from edgetune.core.head_layers import TRANSFORMERS
from edgetune.core.layout import ADAPTER, ADAPTER_CONFIG, ADAPTER_WEIGHTS, MANIFEST
from edgetune.core.precisions import ADAPTER_PRECISIONS, PRECISIONS
from edgetune.core.settings import did_you_mean
from edgetune.core.tasks import CLASSIFICATION, TAGGING, VALUE
from edgetune.models.base import Base
from edgetune.models.resolve import resolve_base
from edgetune.quantisation.precision import Precision
from edgetune.runtime.adapters.lora import NOT_FINITE, LoraFolder, read_lora, refuse_if

MODES = ("separate", "merged")
NAME = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)  # an adapter's name is a folder of the bundle


@dataclass(frozen=True)
class AdapterSource:
    """A trained adapter on its way into a bundle."""

    name: str
    folder: Path
    metadata: Mapping[str, Any]  # edgetune_adapter.json; empty for an adapter of another tool
    config: Mapping[str, Any]  # PEFT's adapter_config.json
    modules: frozenset[str]  # where it has low-rank weights
    problems: tuple[str, ...] = ()  # what adapter inputs cannot express
    is_model: bool = False  # all weights were trained: `folder` is a base of its own
    rows: int | None = None  # of another tool's head: how many labels it tells apart
    coded: bool = False  # a small adapter, which PEFT does not read

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The head's labels, in the order of its rows; another tool's are numbered."""
        labels = self.metadata.get("labels")
        if labels is None and self.rows is not None:
            one = self.problem == "regression"
            return (VALUE,) if one else tuple(f"LABEL_{i}" for i in range(self.rows))
        return tuple(labels) if labels is not None else None

    @property
    def task(self) -> str | None:
        """What it was trained for; None for an adapter of another tool without a head."""
        task: str | None = self.metadata.get("task")
        if task is None and self.rows is not None:
            return TAGGING if self.config.get("task_type") == "TOKEN_CLS" else CLASSIFICATION
        return task

    @property
    def problem(self) -> str | None:
        """Of a classification: single-label (also None), multi-label or regression."""
        problem: str | None = self.metadata.get("problem")
        if self.rows == 1 and self.task == CLASSIFICATION:
            return "regression"
        return problem

    @property
    def head(self) -> str | None:
        """The kind of an encoder's head: transformers' own layers, or (None) a linear one."""
        head: str | None = self.metadata.get("head")
        return TRANSFORMERS if self.rows is not None else head


def check_names(names: Sequence[str]) -> None:
    """ExportError for a name that cannot be a folder of the bundle, or that stands twice."""
    for name in names:
        if not NAME.fullmatch(name):
            raise ExportError(
                f"{name!r} cannot be an adapter's name",
                expected="letters, digits, - _ .",
                fix="It becomes a folder of the bundle.",
            )
    if double := sorted({name for name in names if names.count(name) > 1}):
        raise ExportError(
            f"two adapters are named {double[0]!r}",
            fix="Give each --adapter NAME=RUN its own name.",
        )


def read_source(name: str, folder: Path) -> AdapterSource:
    """A run or PEFT folder, its files read and checked before anything is traced."""
    check_names([name])
    if (own := full_folder(folder)) is not None:
        return AdapterSource(name, own, read_full(own)[1], {}, frozenset(), is_model=True)
    inner = folder / ADAPTER if (folder / ADAPTER / ADAPTER_CONFIG).is_file() else folder
    if not (inner / ADAPTER_CONFIG).is_file():
        raise AdapterError(
            "no adapter here",
            where=str(folder),
            expected="a run folder of `edgetune train`, or a PEFT adapter folder",
            got=_what_is(folder),
            fix=_near(folder),
        )
    read = read_lora(inner)
    damaged = [  # no mode can ship it
        problem
        for problem in read.problems
        if problem.startswith(ADAPTER_WEIGHTS) or problem.endswith(NOT_FINITE)
    ]
    refuse_if(damaged, inner)
    metadata = read_metadata(inner) if read.metadata is not None else {}
    modules = frozenset(read.modules or ())
    rows = None if metadata else _rows_of_head(read)
    return AdapterSource(
        name,
        inner,
        metadata,
        read.config,
        modules,
        tuple(read.problems),
        rows=rows,
        coded=read.coded,
    )


def _rows_of_head(read: LoraFolder) -> int | None:
    """Labels of another tool's head: the rows of its last layer."""
    names = ("classifier.out_proj.weight", "classifier.weight", "score.weight")
    last = next((read.head[name] for name in names if name in read.head), None)
    if last is None or last.ndim != 2:
        return None
    scores = last.shape[0] == 1 and "score.weight" in read.head  # a reward, unless somebody says
    return None if scores else int(last.shape[0])


def _near(folder: Path) -> str:
    """The nearest name beside a folder that is not there."""
    beside = folder.parent
    if folder.exists() or not beside.is_dir():
        return ""
    return did_you_mean(folder.name, [one.name for one in beside.iterdir() if one.is_dir()])


def _what_is(folder: Path) -> str:
    if not folder.exists():
        return "no such folder"
    return (
        "a bundle; its adapters are in its folder adapters"
        if (folder / MANIFEST).is_file()
        else f"a folder without {ADAPTER_CONFIG}"
    )


def check_sources(
    sources: Sequence[AdapterSource], mode: str, precision: Precision, base_name: str | None
) -> None:
    """ExportError or AdapterError for what cannot stand in one bundle, or not in this mode."""
    if mode not in MODES:
        raise ExportError("unknown mode", expected=" or ".join(MODES), got=mode)
    if precision.weights not in PRECISIONS:
        raise ExportError(
            "unknown precision", expected=", ".join(PRECISIONS), got=precision.weights
        )
    if precision.weights == "fp16" and precision.overrides:
        raise ExportError(
            "an fp16 bundle has one precision",
            where="--keep",
            got=", ".join(f"{m}={p}" for m, p in precision.overrides.items()),
            fix="Leave --keep out.",
        )
    if not sources and (base_name is None or mode == "merged"):
        raise ExportError(
            "there is no adapter to export",
            expected="--adapter NAME=RUN, once or several times, or --base NAME for a base alone",
        )
    if len(sources) > 1 and any(source.is_model for source in sources):
        name = next(source.name for source in sources if source.is_model)
        raise ExportError(
            f"all weights of {name!r} were trained: it is a base of its own",
            fix="Export it into a bundle of its own.",
        )
    check_names([source.name for source in sources])
    if mode == "merged" and len(sources) != 1:
        raise ExportError(
            "a merged bundle holds exactly one adapter",
            got=str(len(sources)),
            fix="Use --mode separate for several.",
        )
    for source in sources:
        if mode == "separate" and source.config.get("use_dora"):
            raise ExportError(
                "DoRA rescales the rows of W₀ + BA by a learned magnitude, which adapter inputs"
                " cannot express",
                where=str(source.folder),
                fix="Export it with --mode merged, or train with dora = false.",
            )
        if mode == "separate" and source.problems:
            raise AdapterError(
                "adapter inputs cannot take this adapter, nothing was written:"
                f" {listed(source.problems, 'mismatches')}",
                where=str(source.folder),
                fix="--mode merged takes what PEFT can merge, and its proof says whether it did.",
            )


def check_adapter_precision(precision: str, sources: Sequence[AdapterSource], mode: str) -> None:
    """ExportError for a precision of adapters that is none, or where none stands by itself;
    AdapterError where all are in codes.
    """
    if precision not in ADAPTER_PRECISIONS:
        raise ExportError(
            "unknown precision",
            where="--adapter-precision",
            expected=", ".join(ADAPTER_PRECISIONS),
            got=precision,
        )
    if precision != "fp32" and (mode == "merged" or not sources):
        raise ExportError(
            "there is no adapter of its own to round in this bundle",
            where=f"--adapter-precision {precision}",
            got="a base alone" if not sources else "--mode merged",
            fix="Leave it out.",
        )
    if precision != "fp32" and all(source.coded for source in sources):
        raise AdapterError(
            "every adapter of this bundle is in codes already",
            where=f"--adapter-precision {precision}",
            fix="Leave it out: the bundle holds the codes as they are.",
        )


def base_of(sources: Sequence[AdapterSource], base_name: str | None) -> Base:
    """The one base all adapters were trained on, checked by digest."""
    if any(source.is_model for source in sources):
        if sources[0].metadata["task"] != "text-generation":
            raise ExportError(
                "an encoder's base alone answers nothing",
                where=str(sources[0].folder),
                fix="Train a classification stage on it, and export that.",
            )
        return read_full(sources[0].folder)[0]
    trained_on = {source.metadata["base"]["name"] for source in sources if source.metadata}
    name = base_name or next(iter(sorted(trained_on)), None)
    if name is None:
        named = next(filter(None, (s.config.get("base_model_name_or_path") for s in sources)), None)
        raise ExportError(
            "which base model? These adapters do not say which one, by a digest",
            got="" if named is None else f"the name {named!r:.200} in {ADAPTER_CONFIG}",
            fix=f"Give --base {'NAME' if named is None else named}.",
        )
    beside = [
        own_base(source.folder, source.metadata["base"]["digest"])
        for source in sources
        if source.metadata and base_name is None
    ]
    base = next((base for base in beside if base is not None), None) or resolve_base(name)
    if not sources and base.kind == "encoder":
        raise ExportError(
            "an encoder's base alone answers nothing", got=base.name, fix="Give --adapter NAME=RUN."
        )
    for source in sources:
        digest = source.metadata.get("base", {}).get("digest", base.digest)
        if digest != base.digest:
            raise AdapterError(
                "this adapter was trained on another base model",
                where=str(source.folder),
                expected=f"{base.name} {base.digest[:23]}…",
                got=f"{source.metadata['base']['name']} {digest[:23]}…",
                fix="Export the adapters of each base into a bundle of their own.",
            )
    return base


def original_base(source: AdapterSource) -> Base:
    """What a fully trained model was before."""
    origin = source.metadata["base"]
    base = resolve_base(origin["name"])
    if base.digest != origin["digest"]:
        raise AdapterError(
            "the base that this model was trained from has changed",
            where=str(source.folder),
            expected=f"{origin['name']} {origin['digest'][:23]}…",
            got=base.digest[:23] + "…",
        )
    return base
