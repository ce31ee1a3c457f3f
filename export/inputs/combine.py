"""Several adapters added into one, `a + 0.5 * b`: exact, because a sum of low-rank products is one
of concatenated ranks.

ΔW = Σ wᵢ sᵢ Bᵢ Aᵢ = [w₁ s₁ B₁ … wₙ sₙ Bₙ] [A₁; …; Aₙ], so the result is an ordinary PEFT folder
with scaling 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from edgetune.adapters.folder import write_metadata
from edgetune.core.arrays import Array
from edgetune.core.errors import AdapterError, ExportError
from edgetune.core.files import sha256_file, write_json
from edgetune.core.layout import (
    ADAPTER,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PEFT_PREFIX,
)
from edgetune.core.settings import nearest
from edgetune.export.inputs.sources import check_names
from edgetune.runtime.adapters.lora import LoraFolder, read_lora, refuse_if

FORM = "NAME=RUN, or NAME=A+0.5*B of other adapters' names or run folders"
DEFAULTS = {
    "use_rslora": False,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "exclude_modules": None,
    "init_lora_weights": True,
    "bias": "none",
}


@dataclass(frozen=True)
class Term:
    """One adapter of a sum: its folder, and the factor on its change."""

    label: str
    folder: Path
    weight: float


def resolve_sums(adapters: Sequence[tuple[str, str]], folder: Path) -> list[tuple[str, Path]]:
    """`--adapter NAME=…` pairs with every sum written as a PEFT folder below `folder`; single
    folders stay as they are.

    ExportError for a term that is neither another adapter's name nor a folder.
    """
    check_names([name for name, _ in adapters])
    single = {name: Path(value) for name, value in adapters if not is_sum(value)}
    resolved = []
    for name, value in adapters:
        if name in single and not is_sum(value):
            resolved.append((name, single[name]))
            continue
        target = folder / name
        combine(_terms(value, single, name=name), target)
        resolved.append((name, target))
    return resolved


def is_sum(value: str) -> bool:
    """Whether this is a sum rather than a folder; a folder that exists is a folder whatever its
    name.
    """
    return not Path(value).exists() and any(sign in value for sign in "+*")


def _terms(value: str, known: Mapping[str, Path], *, name: str) -> list[Term]:
    terms = []
    for text in value.split("+"):
        factor, times, label = text.strip().rpartition("*")
        try:
            weight = float(factor) if times else 1.0
        except ValueError as error:
            raise ExportError(
                f"cannot read the factor of {text.strip()!r}",
                where=f"--adapter {name}",
                expected=FORM,
                got=factor,
            ) from error
        label = label.strip()
        folder = known.get(label, Path(label))
        if not label or not folder.is_dir():
            raise ExportError(
                f"{label!r} is neither another adapter's name nor a folder",
                where=f"--adapter {name}",
                got=value,
                **nearest(label, sorted(known), none=FORM),
            )
        terms.append(
            Term(
                label,
                folder / ADAPTER if (folder / ADAPTER / ADAPTER_CONFIG).is_file() else folder,
                weight,
            )
        )
    return terms


def combine(terms: Sequence[Term], out: Path) -> None:
    """Write the weighted sum of adapters of one base to `out`, a PEFT folder; prompts and defaults
    are the first one's; how sure the sum is nothing has measured.

    AdapterError for what cannot be added: heads, DoRA, biases, adapters of different bases.
    """
    read = [read_lora(term.folder) for term in terms]
    for one in read:
        refuse_if(one.problems, one.path)
        if one.head:
            raise AdapterError(
                "adapters with a task head cannot be added: their labels differ",
                where=str(one.path),
            )
    _one_base(read)
    tensors: dict[str, Array] = {}
    ranks: dict[str, int] = {}
    for module in sorted({module for one in read for module in one.deltas}):
        parts = [
            (term.weight, *one.deltas[module])
            for term, one in zip(terms, read, strict=True)
            if module in one.deltas
        ]
        _same_shapes([(a.shape[1], b.shape[0]) for _, a, b in parts], module, terms)
        tensors[f"{PEFT_PREFIX}{module}.lora_A.weight"] = np.concatenate(
            [a for _, a, _ in parts]
        ).astype(np.float32)
        tensors[f"{PEFT_PREFIX}{module}.lora_B.weight"] = np.concatenate(
            [np.float32(w) * b for w, _, b in parts], axis=1
        ).astype(np.float32)
        ranks[module] = tensors[f"{PEFT_PREFIX}{module}.lora_A.weight"].shape[0]
    _write(out, tensors, ranks, read[0], {term.label: term.weight for term in terms})


def _one_base(read: Sequence[LoraFolder]) -> None:
    digests = {one.metadata["base"]["digest"]: one for one in read if one.metadata}
    learned_on = [(one.metadata or {}).get("base_precision") for one in read]
    if other := next(
        (one for one, recorded in zip(read, learned_on, strict=True) if recorded != learned_on[0]),
        None,
    ):
        names = [
            recorded["weights"] if recorded else "as it is"
            for recorded in (learned_on[0], (other.metadata or {}).get("base_precision"))
        ]
        raise AdapterError(
            "adapters that learned on differently rounded weights of a base cannot be added",
            where=str(other.path),
            expected=f"base {names[0]}",
            got=f"base {names[1]}",
            fix="Train them with the same parameters.base_precision.",
        )
    if len(digests) > 1:
        names = [
            f"{one.metadata['base']['name']} {digest[:23]}…"
            for digest, one in digests.items()
            if one.metadata
        ]
        raise AdapterError(
            "adapters of different bases cannot be added",
            where=str(read[-1].path),
            expected=names[0],
            got=names[1],
        )


def _same_shapes(shapes: Sequence[tuple[int, int]], module: str, terms: Sequence[Term]) -> None:
    if len(set(shapes)) > 1:
        raise AdapterError(
            f"{module} has another shape in each of these adapters: they are of different bases",
            where=" + ".join(term.label for term in terms),
            expected=f"(in, out) {shapes[0]}",
            got=str(next(shape for shape in shapes if shape != shapes[0])),
        )


def _write(
    out: Path,
    tensors: Mapping[str, Array],
    ranks: Mapping[str, int],
    first: LoraFolder,
    weights: Mapping[str, float],
) -> None:
    """The folder, its ranks and alphas module by module (alpha = rank: scaling 1)."""
    out.mkdir(parents=True)
    save_file(dict(tensors), out / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    largest = max(ranks.values())
    pattern = {re.escape(module): rank for module, rank in ranks.items() if rank != largest}
    changes = {
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
    }
    write_json(out / ADAPTER_CONFIG, {**first.config, **DEFAULTS, **changes})
    if first.metadata is not None:
        files = {name: sha256_file(out / name) for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG)}
        own = {"metrics": {"sum_of": dict(weights)}, "files": files, "confidence": None}
        made_small = {"codes", "compressed"}  # which the sum is not
        kept = {name: value for name, value in first.metadata.items() if name not in made_small}
        write_metadata(out, {**kept, **own})
