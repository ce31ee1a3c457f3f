"""The serving benchmark's checks: prompts that one adapter answers as no other does, and as it does
whatever runs beside it.

A check is a prompt whose first greedy tokens under one adapter are nobody else's, neither another
adapter's nor the base's, and are chosen with a margin, so that rounding in another batch cannot
turn them: a graph whose activations are rounded to 8 bits answers otherwise in another batch (sums
of two threads in another order, rounded to another step: up to 0.6 standard deviations of the
logits measured with SmolLM2 int4 and these adapters).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from serving_load import Prompts

from edgetune.runtime import Runtime

MARGIN, LEAST, MOST = 0.6, 1, 3
"""lead of the first choice, in standard deviations of the logits; tokens of a check"""


@dataclass(frozen=True)
class Check:
    """What only this adapter answers."""

    adapter: str
    ids: list[int]
    new: int
    text: str
    others: frozenset[str]
    """the same number of tokens of the other adapters and of the base"""


def greedy(runtime: Runtime, name: str | None, ids: list[int]) -> tuple[list[int], list[float]]:
    """The first tokens of the answer, alone in the engine, and by how many standard deviations of
    the logits each was ahead of the second choice."""
    assert runtime.decoder is not None
    state, logits = runtime.decoder.start(
        [ids], [runtime.bound(name)], capacity=len(ids) + MOST + 1
    )
    tokens, margins = list[int](), list[float]()
    while len(tokens) < MOST:
        second, first = np.partition(logits[0], -2)[-2:]
        margins.append(float((first - second) / logits[0].std()))
        tokens.append(int(logits[0].argmax()))
        if tokens[-1] in runtime.tokenizer.eos_token_ids:
            break
        logits = state.step(tokens[-1:])
    return tokens, margins


def find_checks(
    runtime: Runtime, names: list[str], *, each: int = 3, tries: int = 200
) -> dict[str, list[Check]]:
    """`each` checks an adapter, from random prompts. SystemExit when an adapter has none: they are
    too much alike.
    """
    prompts, lengths = (
        Prompts(runtime.manifest.graph.vocab_size, seed=1),
        (8, 24, 40, min(96, runtime.manifest.graph.max_length // 2)),
    )
    found: dict[str, list[Check]] = {name: [] for name in names}
    for attempt in range(tries):
        if all(len(checks) >= each for checks in found.values()):
            break
        ids = prompts(lengths[attempt % len(lengths)])
        answers = {name: greedy(runtime, name, ids) for name in [*names, None]}
        for name in names:
            tokens, margins = answers[name]
            new = next((i for i, margin in enumerate(margins) if margin < MARGIN), len(tokens))
            if len(found[name]) >= each or new < min(LEAST, len(tokens)):
                continue
            text = text_of(runtime, name, ids, tokens[:new])
            others = frozenset(
                text_of(runtime, name, ids, other[:new])
                for of, (other, _) in answers.items()
                if of != name
            )
            if text not in others and text.strip("\ufffd"):
                found[name].append(Check(name, ids, new, text, others))
    if not all(found.values()):
        raise SystemExit(
            f"no checks for {[name for name in names if not found[name]]}: their answers are not"
            " their own"
        )
    return found


def text_of(runtime: Runtime, name: str | None, ids: list[int], tokens: list[int]) -> str:
    """The text of an answer of so many tokens."""
    if not tokens:
        return ""
    sequence = runtime.sequence(ids, runtime.settings(name, max_new_tokens=len(tokens)))
    for token in tokens:
        sequence.add(token)
    return sequence.text
