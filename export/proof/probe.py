"""The probe: token rows on which torch and the bundle are compared, and both models' outputs on
them, task by task.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgetune.adapters.folder import read_metadata
from edgetune.core.arrays import Float32
from edgetune.core.errors import EdgetuneError
from edgetune.core.layout import ADAPTER_METADATA
from edgetune.core.tasks import REWARD
from edgetune.core.text import PairIds, Text, first_tokens, second_of
from edgetune.data.batching import IGNORE
from edgetune.data.collation import token_types
from edgetune.data.labels import encode_texts
from edgetune.data.rows import spread
from edgetune.export.inputs.calibration_text import run_examples
from edgetune.export.proof.proof import Outputs
from edgetune.models.heads import Embedder, RewardModel, SequenceClassifier, TokenClassifier
from edgetune.runtime.engine.encoder import EncoderEngine
from edgetune.runtime.engine.interface import Decoder
from edgetune.runtime.tasks.scoring import read_scores

if TYPE_CHECKING:
    from edgetune.runtime.engine.seq2seq import Seq2SeqEngine


ROWS, TOKENS = 12, 64  # at most; a row ends where its example ends
ROWS_AT_ONCE = 4  # in one batch of the engine: what it answers is large
STEPS = 6  # of a row's tokens, the last few go through the cache one by one
TEXTS = (
    "What is the capital of France, and what is it known for?",
    "Please turn off the lights in the kitchen and set the oven to 180 degrees.",
    "My card was charged twice for the same order last week.",
    "The quick brown fox jumps over the lazy dog.",
    "List three things that a small computer can do well.",
    "It was raining when the train finally arrived at the station.",
    "How do I change the delivery address of an order?",
    "Water boils at a lower temperature on a mountain because the air is thinner.",
)


def probe_rows(adapter: Path, tokenizer: Any, base: Any) -> list[list[int]]:
    """Token ids of a few rows: the run's own validation (else training) data where it is at hand,
    else plain texts.
    """
    longest = min(TOKENS, base.max_length)
    try:
        if (examples := run_examples(adapter, tokenizer, base)) is not None:
            rows = examples.validation or examples.train
            if base.kind == "encoder-decoder":
                return [
                    probe_pair(example.input_ids, example.labels, limit=longest)
                    for example in spread(rows, ROWS)
                ]
            return [first_tokens(example.input_ids, longest) for example in spread(rows, ROWS)]
    except EdgetuneError:
        pass  # the data has moved since training; the proof stands on plain texts too
    if base.kind == "encoder-decoder":
        return text_pairs(TEXTS, tokenizer, limit=longest)
    texts: list[Text] = list(itertools.pairwise(TEXTS)) if _reads_pairs(adapter) else list(TEXTS)
    return (
        encode_texts(texts, tokenizer, limit=longest)[0]
        if base.kind == "encoder"
        else [tokenizer(text)["input_ids"][:longest] for text in TEXTS]
    )


def _reads_pairs(adapter: Path) -> bool:
    path = adapter / ADAPTER_METADATA
    return (
        path.is_file()
        and (read_metadata(adapter).get("prompt_format") or {}).get("text_pair") is not None
    )


def torch_outputs(model: Any, rows: Sequence[Sequence[int]], *, adapter: bool) -> Outputs:
    """The trained model's outputs, row by row without padding, in float32."""
    logits, states = [], []
    with torch.no_grad(), _on() if adapter else _low_rank_off(model):
        for row in rows:
            ids = torch.tensor([list(row)])
            inner = model.get_base_model() if hasattr(model, "get_base_model") else model
            if getattr(inner.config, "is_encoder_decoder", False):
                logits.append(_answer_logits(inner, row))
            elif isinstance(inner, TokenClassifier):
                hidden = inner.states(ids, torch.ones_like(ids))[0]
                states.append(hidden.numpy())
                logits.append(inner.logits_of(hidden).numpy())
            elif isinstance(inner, SequenceClassifier):
                given = ids, torch.ones_like(ids), token_types([row], len(row))
                states.append(inner.pooled(*given).numpy())
                logits.append(inner.logits_of(inner.features(*given)).numpy())
            elif isinstance(inner, Embedder):
                logits.append(inner.pooled(ids, torch.ones_like(ids)).numpy())
            elif isinstance(inner, RewardModel):
                hidden = inner.pooled(ids, torch.ones_like(ids))
                states.append(hidden.numpy())
                logits.append(inner.score(hidden).numpy())
            else:
                logits.append(inner(input_ids=ids, use_cache=False).logits[0].numpy())
    together = np.concatenate(logits)
    return Outputs(together, np.concatenate(states) if states else together)


@contextmanager
def _on() -> Iterator[None]:
    yield


@contextmanager
def _low_rank_off(model: Any) -> Iterator[None]:
    """The low-rank change off, a trained head kept: PEFT's own switch would bring the untrained
    head back.
    """
    layers: list[Any] = [
        module
        for module in model.modules()
        if hasattr(module, "lora_A") and hasattr(module, "enable_adapters")
    ]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def decoder_outputs(engine: Decoder, rows: Sequence[Sequence[int]], tensors: Any) -> Outputs:
    """The bundle's logits at every position: the prompt in one piece, the last tokens one by one
    through the cache.
    """
    found = [
        logits
        for at in range(0, len(rows), ROWS_AT_ONCE)
        for logits in _read_and_stepped(engine, rows[at : at + ROWS_AT_ONCE], tensors)
    ]
    together = np.concatenate(found)
    return Outputs(together, together)


def _read_and_stepped(
    engine: Decoder, rows: Sequence[Sequence[int]], tensors: Any
) -> list[np.ndarray]:
    """The logits (tokens, vocabulary) of each row of one batch."""
    cuts = [max(1, len(row) - STEPS) for row in rows]
    begun = [row[:cut] for row, cut in zip(rows, cuts, strict=True)]
    adapters = [tensors] * len(rows)
    found = [[logits] for logits in engine.logits(begun, adapters)]
    state, _ = engine.start(begun, adapters, capacity=max(map(len, rows)))
    going = list(range(len(rows)))
    for step in range(STEPS):
        staying = [i for i in going if cuts[i] + step < len(rows[i])]
        if not staying:
            break
        state.keep([going.index(i) for i in staying])
        going = staying
        for i, logits in zip(
            going, state.step([rows[i][cuts[i] + step] for i in going]), strict=True
        ):
            found[i].append(logits[None].copy())
    return [np.concatenate(pieces) for pieces in found]


def encoder_outputs(engine: EncoderEngine, rows: Sequence[Sequence[int]], tensors: Any) -> Outputs:
    """The bundle's head logits and pooled states; all rows in one padded batch, as the device would
    send them.
    """
    logits, pooled = engine.run(rows, [tensors] * len(rows))
    return Outputs(np.stack(logits), np.array(pooled))


def embedding_outputs(
    engine: EncoderEngine, rows: Sequence[Sequence[int]], tensors: Any
) -> Outputs:
    """The bundle's pooled states alone, of an adapter without a head."""
    states = encoder_outputs(engine, rows, tensors).states
    return Outputs(states, states)


def token_outputs(engine: EncoderEngine, rows: Sequence[Sequence[int]], tensors: Any) -> Outputs:
    """The bundle's logits and states at every token; all rows in one padded batch."""
    logits, states = engine.tokens(rows, [tensors] * len(rows))
    return Outputs(np.concatenate(logits), np.concatenate(states))


def reward_outputs(engine: Decoder, rows: Sequence[Sequence[int]], tensors: Any) -> Outputs:
    """The bundle's scores (rows, 1) and states of the last tokens; rows right-padded in a batch, as
    the device sends them.
    """
    found = [
        read_scores(
            engine, rows[at : at + ROWS_AT_ONCE], [tensors] * len(rows[at : at + ROWS_AT_ONCE])
        )
        for at in range(0, len(rows), ROWS_AT_ONCE)
    ]
    return Outputs(
        np.concatenate([scores[:, None] for scores, _ in found]),
        np.concatenate([states for _, states in found]),
    )


def class_outputs(engine: Decoder, rows: Sequence[Sequence[int]], tensors: Any) -> Outputs:
    """The bundle's logits (rows, labels) of a decoder's classifier, and states as above."""
    states, head = reward_outputs(engine, rows, tensors).states, engine.manifest.head
    assert head is not None
    return Outputs(states @ tensors[head.weight][0] + tensors[head.bias][0], states)


Decide = Callable[[Outputs], Outputs]


def decide_by(problem: str | None, trained: Outputs) -> Decide:
    """How the outputs of every model on the probe are compared.

    Several labels (multi-label): each is a choice of its own between no (logit 0) and yes. Numbers
    (regression): the choice is "above the mean of what was trained", with the distance from it in
    standard deviations as the logit; a guess that favours nothing is then the mean. A reward is
    such a number. Anything else stays as it is.
    """
    if problem == "multi-label":
        return lambda outputs: replace(outputs, logits=_pairs(outputs.logits.reshape(-1)))
    if problem in ("regression", REWARD):
        centre = float(trained.logits.mean())
        spread = float(trained.logits.std()) or 1.0
        return lambda outputs: replace(
            outputs, logits=_pairs((outputs.logits.reshape(-1) - centre) / spread)
        )
    return lambda outputs: outputs


def _pairs(logits: Any) -> Float32:
    """(n,) → (n, 2): the softmax of [0, x] is the sigmoid of x."""
    pairs: Float32 = np.stack([np.zeros_like(logits), logits], axis=-1).astype(np.float32)
    return pairs


DECODER_STEPS = 6  # of an answer's tokens, the last few go through the cache one by one


def probe_pair(prompt: Sequence[int], labels: Sequence[int] | int, *, limit: int) -> PairIds:
    """A row of the probe of an example."""
    answer = [] if isinstance(labels, int) else [label for label in labels if label != IGNORE]
    first = list(prompt[:limit])
    return PairIds([*first, *answer[:limit]], second=len(first))


def text_pairs(texts: Sequence[str], tokenizer: Any, *, limit: int) -> list[list[int]]:
    """Rows of the probe of plain texts, each answered by the next."""
    ids = tokenizer(list(texts), verbose=False)["input_ids"]
    return [probe_pair(first, second, limit=limit) for first, second in itertools.pairwise(ids)]


def _answer_logits(model: Any, row: Sequence[int]) -> Float32:
    """torch's logits (answer, vocab) of a row's answer, in float32."""
    prompt, answer = _parts(row)
    begun = [int(model.config.decoder_start_token_id), *answer[:-1]]
    logits: Float32 = (
        model(
            input_ids=torch.tensor([prompt]),
            decoder_input_ids=torch.tensor([begun]),
            use_cache=False,
        )
        .logits[0]
        .float()
        .numpy()
    )
    return logits


def seq2seq_outputs(engine: Seq2SeqEngine, rows: Sequence[Sequence[int]], tensors: Any) -> Outputs:
    """The bundle's logits of the same: prompts in one padded batch, the beginnings of the answers
    in one piece, what is left of them token by token through the cache."""
    prompts, answers = zip(*map(_parts, rows), strict=True)
    begun = [list(answer[: max(0, len(answer) - DECODER_STEPS)]) for answer in answers]
    state, first = engine.answer_logits(prompts, begun, [tensors] * len(rows))
    found: list[list[np.ndarray]] = [[logits] for logits in first]
    alive = list(range(len(rows)))
    for step in range(DECODER_STEPS - 1):
        going = [i for i in alive if len(begun[i]) + step + 1 < len(answers[i])]
        if not going:
            break
        state.keep([alive.index(i) for i in going])
        alive = going
        logits = state.step([answers[i][len(begun[i]) + step] for i in alive])
        for place, i in enumerate(alive):
            found[i].append(logits[place].copy()[None])
    together = np.concatenate([np.concatenate(row) for row in found])
    return Outputs(together, together)


def _parts(row: Sequence[int]) -> tuple[list[int], list[int]]:
    """Prompt and answer."""
    second = second_of(row)
    assert second is not None
    return list(row[:second]), list(row[second:])
