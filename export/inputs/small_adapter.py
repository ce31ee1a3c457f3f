"""A trained adapter made small: its products cut to a lower rank, its numbers rounded to a few
bits, written as codes; and codes written as PEFT's numbers again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor

from edgetune.adapters.folder import write_metadata
from edgetune.core.adapter_codes import Coded, coded_config
from edgetune.core.arrays import Array
from edgetune.core.errors import AdapterError
from edgetune.core.files import sha256_file, whole_folder, write_json
from edgetune.core.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PEFT_PREFIX
from edgetune.core.precisions import ADAPTER_BITS
from edgetune.quantisation.adapter_rounding import codes_of, rounded, scales_of, truncated
from edgetune.runtime.adapters.lora import LoraFolder, read_lora, refuse_if
from edgetune.runtime.adapters.tensor_file import TensorFile

HEAD_BITS = 8
"""of a head's matrices: a row an output, each with its own scale"""


@dataclass(frozen=True)
class Factors:
    """A (r, in) and B (out, r) of one module, scaling folded into them."""

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        """r"""
        return int(self.a.shape[0])

    @property
    def width(self) -> int:
        """Numbers that one rank takes."""
        return int(self.a.shape[1] + self.b.shape[0])


@dataclass(frozen=True)
class Spectrum(Factors):
    """Factors in the order of their singular values (r,)."""

    values: Tensor


@dataclass(frozen=True)
class SmallAdapter:
    """What is written: every module's codes, and the head's."""

    read: LoraFolder
    tensors: Mapping[str, Array]
    """the file's, by name"""
    ranks: Mapping[str, int]
    bits: int

    @property
    def file(self) -> bytes:
        """The weights file."""
        return _bytes_of(self.tensors)


def read_whole(folder: Path) -> LoraFolder:
    """An adapter folder with low-rank weights, all of it read. AdapterError for any other."""
    read = read_lora(folder)
    refuse_if(read.problems, read.path)
    if not read.deltas:
        raise AdapterError(
            "this adapter has no low-rank weights",
            where=str(folder),
            expected="an adapter of parameters.train = lora",
        )
    return read


def spectra_of(read: LoraFolder) -> dict[str, Spectrum]:
    """Module → its product's singular values, largest first, with the vectors."""
    found = {}
    for module, (a, b) in read.deltas.items():
        rank = min(a.shape[0], a.shape[1], b.shape[0])
        new_a, new_b, values = truncated(torch.from_numpy(a), torch.from_numpy(b), rank)
        found[module] = Spectrum(new_a, new_b, values[:rank])
    return found


def mean_rank(factors: Mapping[str, Factors]) -> float:
    """The rank of all modules that would take as many numbers."""
    numbers = sum(own.rank * own.width for own in factors.values())
    return numbers / sum(own.width for own in factors.values())


def ranks_within(spectra: Mapping[str, Spectrum], mean: float) -> dict[str, int]:
    """Module → rank, 1 at least: the singular values that keep most of Σ|ΔW|² for the numbers that
    rank `mean` everywhere would take.
    """
    ranks = dict.fromkeys(spectra, 1)
    left = sum((min(mean, one.rank) - 1) * one.width for one in spectra.values())
    gains = sorted(
        (-(float(value) ** 2) / one.width, at, module)
        for module, one in spectra.items()
        for at, value in enumerate(one.values[1:].tolist(), start=1)
    )
    full = set()
    for _, at, module in gains:
        if module not in full and at == ranks[module] and spectra[module].width <= left:
            ranks[module] += 1
            left -= spectra[module].width
        else:
            full.add(module)  # values come in order: no later one without this
    return ranks


def factors_of(spectra: Mapping[str, Spectrum], ranks: Mapping[str, int]) -> dict[str, Factors]:
    """Module → the best factors of its rank."""
    return {
        module: Factors(one.a[: ranks[module]], one.b[:, : ranks[module]].contiguous())
        for module, one in spectra.items()
    }


def round_factors(factors: Mapping[str, Factors], bits: int) -> dict[str, Factors]:
    """The numbers that the codes stand for."""
    rows = {(module, 0): own.a for module, own in factors.items()}
    rows |= {(module, 1): own.b.T for module, own in factors.items()}
    done: dict[tuple[str, int], Tensor] = {}
    for width in sorted({row.shape[1] for row in rows.values()}):  # one operation for many
        places = [place for place, row in rows.items() if row.shape[1] == width]
        whole = torch.cat([rows[place] for place in places])
        whole = rounded(whole, scales_of(whole, bits), bits)
        parts = whole.split([len(rows[place]) for place in places])
        done |= dict(zip(places, parts, strict=True))
    return {module: Factors(done[module, 0], done[module, 1].T) for module in factors}


def kept_effect(trained: Mapping[str, Factors], shipped: Mapping[str, Factors]) -> float:
    """1 − Σ|ΔW − ΔŴ|² / Σ|ΔW|² over all modules; no ΔW (out, in) is formed."""
    whole = lost = 0.0
    for module, own in trained.items():
        square = _inner(own, own)
        whole += square
        other = shipped[module]
        lost += square - 2 * _inner(own, other) + _inner(other, other)
    return 1 - lost / whole if whole else 1.0


def _inner(one: Factors, other: Factors) -> float:
    """⟨B A, B' A'⟩ = Σ (Bᵀ B') ∘ (A A'ᵀ)."""
    up, down = one.b.double().T @ other.b.double(), one.a.double() @ other.a.double().T
    return float((up * down).sum())


def code_bytes(factors: Mapping[str, Factors], bits: int) -> int:
    """Bytes of the codes and scales of some factors."""
    return sum(
        own.rank * Coded(module, bits, (own.a.shape[1], own.b.shape[0])).row_bytes
        for module, own in factors.items()
    )


def small_adapter(read: LoraFolder, factors: Mapping[str, Factors], bits: int) -> SmallAdapter:
    """The codes of some factors, and of the head that comes with them."""
    tensors: dict[str, Array] = {}
    for module, own in factors.items():
        one = Coded(module, bits, (own.a.shape[1], own.b.shape[0]))
        tensors[one.key] = one.encode([_codes(own.a, bits), _codes(own.b.T, bits)])
    for name, tensor in _head(read):
        if tensor.ndim == 2:
            one = Coded(name, HEAD_BITS, (tensor.shape[1],))
            tensors[one.key] = one.encode([_codes(torch.from_numpy(tensor), HEAD_BITS)])
        else:
            with np.errstate(over="ignore"):
                half = tensor.astype(np.float16)  # too small for a number of thousands, as a bias
            tensors[name] = half if np.isfinite(half).all() else tensor.astype(np.float32)
    ranks = {module: own.rank for module, own in factors.items()}
    return SmallAdapter(read, tensors, ranks, bits)


def _codes(rows: Tensor, bits: int) -> tuple[Array, Array]:
    rows = rows.contiguous()
    scales = scales_of(rows, bits)
    return codes_of(rows, scales, bits).numpy(), scales.numpy()


def _head(read: LoraFolder) -> Iterator[tuple[str, Array]]:
    """PEFT's names of the head's tensors, as an adapter of edgetune has them."""
    return ((f"{PEFT_PREFIX}{name}", tensor) for name, tensor in sorted(read.head.items()))


def write_small(
    small: SmallAdapter, folder: Path, *, more: Mapping[str, Any] | None = None
) -> None:
    """Write the folder, whole or not at all; `more` goes into edgetune_adapter.json."""
    rank = max(small.ranks.values(), default=1)
    config = coded_config(small.read.config, rank=rank)
    about = {"bits": small.bits, "head_bits": HEAD_BITS if small.read.head else None}
    _write(folder, small.read, config, small.tensors, {"codes": about, **(more or {})})


def write_plain(read: LoraFolder, out: Path) -> None:
    """Write an adapter as PEFT's own float32 with scaling 1: it computes the same."""
    tensors = dict(_head(read))
    for module, (a, b) in read.deltas.items():
        tensors[f"{PEFT_PREFIX}{module}.lora_A.weight"] = a
        tensors[f"{PEFT_PREFIX}{module}.lora_B.weight"] = b
    config = {**read.config, "use_rslora": False}
    if read.deltas:
        ranks = {module: a.shape[0] for module, (a, _) in read.deltas.items()}
        rank, pattern = rank_settings(ranks)
        config |= {"r": rank, "lora_alpha": rank}
        config |= {"rank_pattern": pattern, "alpha_pattern": pattern}
    _write(out, read, config, tensors, {"codes": None})


def write_rounded(folder: Path, out: Path, precision: str) -> None:
    """Write an adapter folder as a bundle holds it in `precision`, at its own rank. AdapterError
    for one that is in codes already, or that fp16 has no numbers for.
    """
    read = read_lora(folder)
    refuse_if(read.problems, read.path)
    if read.coded:
        raise AdapterError(
            "this adapter is in codes already",
            where=str(folder),
            got=f"--adapter-precision {precision}",
            fix="Leave it out: the bundle holds the codes as they are.",
        )
    if precision in ADAPTER_BITS:
        write_small(small_adapter(read, spectra_of(read), ADAPTER_BITS[precision]), out)
        return
    whole = TensorFile(folder / ADAPTER_WEIGHTS).tensors
    with np.errstate(over="ignore"):
        tensors = {name: tensor.astype(np.float16) for name, tensor in whole.items()}
    if large := [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]:
        raise AdapterError(f"{large[0]}: too large for fp16", where=str(folder))
    _write(out, read, read.config, tensors, {})


def rank_settings(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """PEFT's `r` and `rank_pattern` of these modules."""
    largest = max(ranks.values())
    other = {module: rank for module, rank in ranks.items() if rank != largest}
    return largest, {f"^{re.escape(module)}": rank for module, rank in other.items()}


def _write(
    folder: Path,
    read: LoraFolder,
    config: Mapping[str, Any],
    tensors: Mapping[str, Array],
    more: Mapping[str, Any],
) -> None:
    with whole_folder(folder) as partial:
        (partial / ADAPTER_WEIGHTS).write_bytes(_bytes_of(tensors))
        write_json(partial / ADAPTER_CONFIG, config)
        if read.metadata is not None:
            names = (ADAPTER_WEIGHTS, ADAPTER_CONFIG)
            files = {name: sha256_file(partial / name) for name in names}
            write_metadata(partial, {**read.metadata, **more, "files": files})


def _bytes_of(tensors: Mapping[str, Array]) -> bytes:
    whole = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    found: bytes = save(whole, metadata={"format": "pt"})
    return found
