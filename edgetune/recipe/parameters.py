"""Which weights learn: the table `[parameters]`."""

# ruff: noqa: RUF009 - `option` is dataclasses.field
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgetune.core.settings import option

RANK, ALPHA = 8, 16.0  # of an adapter whose recipe leaves them to edgetune


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Which weights learn; everything but `train` is for lora."""

    train: Literal["lora", "head", "full"] = option(
        "lora",
        help=(
            "lora = an adapter; head = a new head alone, on features computed once; full = all"
            " weights, which become a base of their own"
        ),
    )
    shard: bool = option(
        False,
        help=(
            "full, in several processes (torchrun, accelerate launch): each keeps a share of"
            " weights, gradients and optimizer state (FSDP); one process trains as ever"
        ),
    )
    rank: int | Literal["auto"] = option(
        "auto", help="rank r of the adapter; auto = 8, or what --search finds", at_least=1
    )
    alpha: float | Literal["auto"] = option(
        "auto",
        help=(
            "the delta weight is alpha / r · B A; auto = 16, beyond rank 8 and with a rank that"
            " --search finds 2 r (rsLoRA: 16)"
        ),
        above=0,
    )
    dropout: float = option(0.0, help="dropout before lora_A", at_least=0, below=1)
    target_modules: str | tuple[str, ...] = option(
        "all-linear",
        help='"all-linear", a list of module names, or one regular expression over module paths',
    )
    rslora: bool = option(False, help="scale by alpha / sqrt(r) (rsLoRA)")
    dora: bool = option(False, help="learn a magnitude per output too (DoRA)")
    rank_pattern: dict[str, int] = option(
        help="other ranks by module name or regex", factory=dict, at_least=1
    )
    alpha_pattern: dict[str, float] = option(
        help="other alphas by module name or regex", factory=dict, above=0
    )
    layers: tuple[int, ...] | None = option(
        None, help="[first, last]: only these layers, counted from 0; not set: all"
    )
    base_precision: Literal["int4", "int8"] | None = option(
        None,
        help=(
            "lora, head: learn on exactly the weights that a bundle of this precision holds"
            " (`edgetune export --precision`); not set: on the base as it is"
        ),
    )
    start: str | None = option(
        None,
        help=(
            "lora, head: a run or adapter folder of the same base, task and settings, whose adapter"
            " goes on learning; not set: a fresh one"
        ),
    )
    init: str = option(
        "default",
        help=(
            "PEFT's init_lora_weights: default, gaussian, orthogonal, olora, pissa or pissa_niter_N"
            " (faster); olora and pissa are saved for the base as it ships, with twice the rank;"
            " loftq (with base_precision): what rounding the base loses, as far as the rank goes"
        ),
    )

    @property
    def r(self) -> int:
        """The rank, settled."""
        return RANK if isinstance(self.rank, str) else self.rank

    @property
    def lora_alpha(self) -> float:
        """Alpha, settled: a larger rank's delta weight is as large as rank 8's."""
        if not isinstance(self.alpha, str):
            return self.alpha
        return ALPHA if self.rslora else max(ALPHA, 2.0 * self.r)


def what_learns(parameters: Parameters) -> str:
    """In a few words."""
    lora = f"LoRA r = {parameters.r}, alpha = {parameters.lora_alpha:g}"
    what = {"lora": lora, "head": "the head alone", "full": "all weights"}[parameters.train]
    return (
        what
        if parameters.base_precision is None
        else f"{what}, for the {parameters.base_precision} base"
    )
