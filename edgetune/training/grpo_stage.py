"""The `grpo` stage: prompts → sampled answers → rewards → advantages; validation by greedy
answers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.data.batching import IGNORE, Batch, in_order_of_length, split_by_prefix
from edgetune.data.collation import collate
from edgetune.data.conversations import end_token
from edgetune.data.rollout_prompts import PromptExample
from edgetune.models.base import Base
from edgetune.models.torch_device import Precision, device_of, to_device
from edgetune.objectives.grpo import (
    AnswerExample,
    collate_rollouts,
    group_advantages,
    grpo,
    k3,
    without_flat,
)
from edgetune.objectives.language import Objective, projection_only_at
from edgetune.objectives.preference import token_log_probs
from edgetune.recipe.own_settings import Grpo
from edgetune.training.batches import DISTINCT_AT_ONCE, Batching, tokens_of
from edgetune.training.context import Prepared, StageStart
from edgetune.training.fast.memory import computing
from edgetune.training.fast.shared_prefix import may_share
from edgetune.training.reinforcement.rewards import (
    Answered,
    Rewards,
    check_rewards,
    open_rewards,
    reward_notes,
)
from edgetune.training.reinforcement.rollout import Answer, Rollout, Sampling, TorchRollout

TOKENS_AT_ONCE, ROWS_AT_ONCE = 1536, 64
FLAT = 1e-8  # a group whose rewards have this std or less teaches nothing


@dataclass(frozen=True, slots=True)
class PromptBatch(Batch):
    """Prompts, right-padded, with the rows they come from."""

    examples: tuple[PromptExample, ...] = ()


def collate_prompts(examples: Sequence[PromptExample], pad_id: int) -> PromptBatch:
    """Prompts → one batch without labels."""
    batch = collate([AnswerExample(e.input_ids, [], e.row, 0.0) for e in examples], pad_id)
    return PromptBatch(
        batch.input_ids,
        batch.attention_mask,
        batch.labels,
        batch.rows,
        batch.tokens,
        targets=0,
        examples=tuple(examples),
    )


def first_answer_tokens(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (rows, vocab) of the first token of each answer, and the likeliest tokens."""
    rows = torch.arange(len(batch.input_ids), device=batch.input_ids.device)
    column = torch.zeros_like(
        batch.input_ids[:, :1]
    )  # where the first token of the longest row's answer stands
    wanted = torch.zeros_like(batch.attention_mask, dtype=torch.bool)
    wanted[rows, batch.attention_mask.sum(dim=1) - 1] = True
    with projection_only_at(model, wanted):
        output = model(input_ids=torch.cat([batch.input_ids, column], dim=1), use_cache=False)
    logits = output.logits.flatten(0, 1).float()
    return logits, logits.argmax(-1)


def grpo_objective(settings: Grpo) -> Objective:
    """The loss of answers with advantages."""
    return functools.partial(
        grpo,
        clip=settings.clip,
        kl=settings.kl,
        temperature=settings.temperature,
        loss_type=settings.loss_type,
    )


def check_grpo(settings: Grpo, base: Base) -> None:
    """Raises for rewards that cannot be loaded, and for an engine that cannot run this base."""
    check_rewards(settings, base)
    if settings.rollout == "engine":
        from edgetune.training.reinforcement.engine_rollout import check_engine

        check_engine(base)


@contextlib.contextmanager
def prepare_grpo(start: StageStart) -> Iterator[Prepared]:
    """Rewards opened, the policy at the start kept where the KL penalty refers to it."""
    stage, settings = start.stage, start.stage.settings
    for line in reward_notes(settings, stage.base):
        start.progress.say(line)
    opened = open_rewards(
        settings, start.model, stage.tokenizer, stage.base, precision=stage.precision
    )
    with _rollout(start) as rollout, opened as rewards:
        answering = Answering(rollout, rewards, stage.tokenizer, settings.max_new_tokens)
        experience = Sampler(answering, start)
        yield Prepared(
            functools.partial(measure_greedy, answering),
            experience,
            reference=experience.start or {},
        )


def _rollout(start: StageStart) -> contextlib.AbstractContextManager[Rollout]:
    stage = start.stage
    end = end_token(stage.tokenizer)
    if stage.settings.rollout == "torch":
        return contextlib.nullcontext(
            TorchRollout(end=end, pad_id=stage.pad_id, precision=stage.precision)
        )
    from edgetune.training.reinforcement.engine_rollout import open_engine

    return open_engine(stage.base, start.model, end=end, say=start.progress.say)


@dataclass(frozen=True)
class Answering:
    """Answers and their rewards."""

    rollout: Rollout
    rewards: Rewards
    tokenizer: Any
    max_new_tokens: int

    def sample(
        self,
        model: Any,
        rows: Sequence[PromptExample],
        *,
        count: int,
        temperature: float,
        top_p: float,
        seed: int,
    ) -> list[list[Answer]]:
        """`count` answers for each prompt."""
        sampling = Sampling(self.max_new_tokens, temperature, top_p)
        return self.rollout(
            model, [row.input_ids for row in rows], count=count, sampling=sampling, seed=seed
        )

    def score(
        self, rows: Sequence[PromptExample], answers: Sequence[Sequence[Answer]]
    ) -> tuple[list[float], dict[str, list[float]]]:
        """The reward of every answer, one prompt's after the other's, and each scorer's own."""
        flat = [(row, answer) for row, group in zip(rows, answers, strict=True) for answer in group]
        ids = [answer.ids[:-1] if answer.ended else answer.ids for _, answer in flat]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        answered = [
            Answered(row.prompt, text, row.values, row.row)
            for (row, _), text in zip(flat, texts, strict=True)
        ]
        return self.rewards(answered)


class Sampler:
    """The step's prompts → answers with advantages. Every `iterations` steps the policy samples
    anew.

    Of several processes each samples answers to its own prompts, from a stream of its own; the
    facts are means over all of them, weighted by prompts.
    """

    def __init__(self, answering: Answering, start: StageStart) -> None:
        self.answering, self.stage = answering, start.stage
        self.settings: Grpo = start.stage.settings
        self.group, self.device, kept = start.group, device_of(start.model), start.kept
        self.start: dict[str, Tensor] | None = None
        if self.settings.kl and self.settings.kl_to == "start":
            first = _trained(start.model) if kept is None else kept.reference
            self.start = {name: weights.to(self.device) for name, weights in first.items()}
        collating = functools.partial(
            collate_rollouts,
            loss_type=self.settings.loss_type,
            longest=self.settings.max_new_tokens,
        )
        shares = may_share(start.model, self.stage.max_length + self.settings.max_new_tokens)
        self._batching = Batching(self.stage.pad_id, collating, by_prefix=shares)
        self._kept: tuple[list[AnswerExample], dict[str, float]] | None = None
        if kept is not None and kept.samples is not None:
            answers, facts = kept.samples
            self._kept = [AnswerExample(**answer) for answer in answers], facts

    def __call__(
        self, model: nn.Module, rows: Sequence[PromptExample], *, step: int
    ) -> tuple[list[Batch], Mapping[str, float]]:
        """See Experience; `step` counts from 1."""
        if self._kept is None or (step - 1) % self.settings.iterations == 0:
            self._kept = self._sample(model, rows, step=step)
        model.train()
        answers, facts = self._kept
        return self._batching.parts(answers, step), facts

    def samples(self) -> Any:
        """See Experience; nothing where every step samples anew."""
        if self._kept is None or self.settings.iterations == 1:
            return None
        answers, facts = self._kept
        return [asdict(answer) for answer in answers], facts

    def _sample(
        self, model: Any, rows: Sequence[PromptExample], *, step: int
    ) -> tuple[list[AnswerExample], dict[str, float]]:
        """In every process together; one of them may be without rows."""
        examples, flat, facts = self._answer(model, rows, step=step) if rows else ([], [], {})
        if not self.settings.kl:
            examples = without_flat(
                examples, flat, loss_type=self.settings.loss_type, total=self.group.total
            )
        return examples, _weighted(self.group.gathered((len(rows), facts)))

    def _answer(
        self, model: Any, rows: Sequence[PromptExample], *, step: int
    ) -> tuple[list[AnswerExample], list[bool], dict[str, float]]:
        """Answers to the prompts, whether each one's group all got the same reward, and facts about
        them.
        """
        settings, seed = self.settings, _seed(self.stage.seed, step, self.group.rank)
        groups = self.answering.sample(
            model,
            rows,
            count=settings.group_size,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=seed,
        )
        totals, each = self.answering.score(rows, groups)
        rewards = torch.tensor(totals).view(len(rows), settings.group_size)
        advantages = (
            group_advantages(rewards, scale_by_std=settings.scale_by_std).flatten().tolist()
        )
        flat = [(row, answer) for row, group in zip(rows, groups, strict=True) for answer in group]
        examples = [
            AnswerExample(
                row.input_ids + answer.ids,
                [IGNORE] * len(row.input_ids) + answer.ids,
                row.row,
                advantage,
            )
            for (row, answer), advantage in zip(flat, advantages, strict=True)
        ]
        if not self.answering.rollout.exact:
            for example, (_, answer) in zip(examples, flat, strict=True):
                example.old = answer.log_probs
        elif settings.iterations > 1:
            for example, old in zip(examples, self._log_probs(model, examples), strict=True):
                example.old = old
        is_flat = rewards.std(dim=1) < FLAT
        facts = {
            "reward": float(rewards.mean()),
            "reward_std": float(rewards.std()),
            "flat_groups": float(is_flat.float().mean()),
            "completion_length": fmean(len(answer.ids) for _, answer in flat),
            "ended": fmean(answer.ended for _, answer in flat),
        }
        if len(each) > 1:
            facts |= {f"reward/{name}": fmean(values) for name, values in each.items()}
        if settings.kl:
            with self._reference(model):
                references = self._log_probs(model, examples)
            for example, reference in zip(examples, references, strict=True):
                example.reference = reference
            sampled = torch.tensor([x for _, answer in flat for x in answer.log_probs])
            facts["kl"] = float(
                k3(sampled, torch.tensor([x for r in references for x in r])).mean()
            )
        return examples, is_flat.repeat_interleave(settings.group_size).tolist(), facts

    def _reference(self, model: Any) -> contextlib.AbstractContextManager[None]:
        """The model that the KL penalty refers to: without its adapter, or with the one the stage
        started from.
        """
        return model.disable_adapter() if self.start is None else _weights(model, self.start)

    @torch.no_grad()
    def _log_probs(self, model: Any, examples: Sequence[AnswerExample]) -> list[list[float]]:
        """Log-probability of each answer token under the model as it is."""
        model.eval()
        found: list[list[float]] = [[] for _ in examples]
        for part in self._together(examples):
            batch = to_device(
                collate([examples[index] for index in part], self.stage.pad_id), self.device
            )
            with computing(model, batch, self.stage.precision):
                log_probs, rows = token_log_probs(
                    model, batch, temperature=self.settings.temperature
                )
            counts = torch.bincount(rows, minlength=len(part)).tolist()
            for index, values in zip(part, log_probs.split(counts), strict=True):
                found[index] = values.tolist()
        return found

    def _together(self, examples: Sequence[AnswerExample]) -> list[list[int]]:
        if self._batching.by_prefix:
            return split_by_prefix([example.input_ids for example in examples], DISTINCT_AT_ONCE)
        return in_order_of_length(
            [len(example.input_ids) for example in examples],
            TOKENS_AT_ONCE,
            batch_size=ROWS_AT_ONCE,
        )


def measure_greedy(
    answering: Answering, model: Any, batches: Sequence[PromptBatch], *, precision: Precision
) -> dict[str, float]:
    """Mean reward of the greedy answers to the prompts, their length in tokens, and the share that
    ended.
    """
    rows = sorted((example for batch in batches for example in batch.examples), key=tokens_of)
    groups = answering.sample(model, rows, count=1, temperature=0.0, top_p=1.0, seed=0)
    totals, each = answering.score(rows, groups)
    metrics = {"reward": fmean(totals)}
    if len(each) > 1:
        metrics |= {f"reward/{name}": fmean(values) for name, values in each.items()}
    answers = [answer for group in groups for answer in group]
    lengths = {"completion_length": fmean(len(answer.ids) for answer in answers)}
    return metrics | lengths | {"ended": fmean(answer.ended for answer in answers)}


def _seed(seed: int, step: int, rank: int) -> int:
    """Every step and process draws from a stream of its own; a resumed run draws what the other one
    would have.
    """
    return (seed * 1_000_003 + step + (rank << 48)) % 2**63


def _weighted(facts: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """The means of several processes' facts by the number of their prompts."""
    there = [(rows, fact) for rows, fact in facts if rows]
    count = sum(rows for rows, _ in there)
    return {name: sum(rows * fact[name] for rows, fact in there) / count for name in there[0][1]}


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights that learn."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@contextlib.contextmanager
def _weights(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with other values of the weights that learn; nothing is copied."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in values}
    now = {name: parameter.data for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data = values[name]
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = now[name]
