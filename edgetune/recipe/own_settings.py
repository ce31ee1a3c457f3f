"""The tables of a stage that only one method has, each named like its method: `[stage.dpo]`,
`[stage.grpo]`.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from edgetune.core.settings import option
from edgetune.core.tasks import METHODS


@dataclass(frozen=True, kw_only=True)
class Dpo:
    """What only `dpo` asks for."""

    beta: float = option(
        0.1, help="how strongly the policy is held near its start (β of the paper)", above=0
    )


@dataclass(frozen=True, kw_only=True)
class Contrastive:
    """What only `contrastive` asks for."""

    scale: float = option(
        20.0, help="what cosines are multiplied by before the softmax (1 / temperature)", above=0
    )
    pairs: int = option(
        4,
        help="rows with a label: other rows of that label that each is learned beside, at most",
        at_least=1,
    )


@dataclass(frozen=True, kw_only=True)
class Grpo:
    """What only `grpo` asks for."""

    reward: str | tuple[str, ...] = option(
        help=(
            "what scores the answers: the `adapter` of a reward stage before this one, the run"
            ' folder of a `reward` stage, or a Python function as "module:function" or'
            ' "file.py:function", also found beside the recipe; or a list of these'
        )
    )
    reward_weights: tuple[float, ...] | None = option(
        None, help="a weight for each reward; not set: 1 each"
    )
    group_size: int = option(8, help="answers sampled for each prompt", at_least=2)
    iterations: int = option(
        1, help="optimizer steps on the same samples (μ of the paper)", at_least=1
    )
    max_new_tokens: int = option(128, help="tokens of an answer at most", at_least=1)
    temperature: float = option(
        1.0, help="of sampling; the loss sees the same distribution", above=0
    )
    top_p: float = option(
        1.0, help="sample among the likeliest tokens of this total probability", above=0, at_most=1
    )
    clip: float = option(
        0.2, help="the policy's ratio to the sampling one is clipped to 1 ± this (ε)", above=0
    )
    kl: float = option(
        0.04, help="weight of the KL penalty (β of the GRPO paper); 0: none", at_least=0
    )
    kl_to: Literal["base", "start"] = option(
        "base",
        help="base = the model without its adapter; start = the policy at the start of this stage",
    )
    scale_by_std: bool = option(
        True, help="divide advantages by their group's std; false: as Dr. GRPO"
    )
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = option(
        "grpo",
        help=(
            "grpo: mean over answers of token means; dapo: mean over tokens; dr_grpo: sum /"
            " max_new_tokens"
        ),
    )
    rollout: Literal["torch", "engine"] = option(
        "torch",
        help="what samples; engine = the exported int8 graph, faster, needs edgetune[export]",
    )

    @property
    def rewards(self) -> tuple[str, ...]:
        """`reward` as a tuple."""
        return (self.reward,) if isinstance(self.reward, str) else self.reward

    def without(self, judges: Container[str]) -> Grpo:
        """With those rewards alone that are no judges of the same recipe; for checks."""
        kept = tuple(name for name in self.rewards if name not in judges)
        return replace(self, reward=kept, reward_weights=None)

    def reading(self, folders: Mapping[str, str]) -> Grpo:
        """With the folders of judges instead of their names."""
        return replace(self, reward=tuple(folders.get(name, name) for name in self.rewards))


def stages_of(values: Mapping[str, Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The stages of a recipe's plain values with their numbers; what is no table is left out."""
    stages = values.get("stage")
    for number, stage in enumerate(stages if isinstance(stages, list) else ()):
        if isinstance(stage, Mapping):
            yield number, stage


def with_own_tables(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's plain values with the table of its method in every stage, empty where it was
    missing.
    """
    new = dict(values)
    for number, stage in stages_of(values):
        for name, method in METHODS.items():
            if stage.get("method") == name and name in method.settings and name not in stage:
                new["stage"] = [*new["stage"]]
                new["stage"][number] = {**stage, name: {}}
    return new
