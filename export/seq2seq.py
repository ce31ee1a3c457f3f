"""What an export of an encoder-decoder does its own way: what it refuses, its sizes, and both sides of its proof.

A row of the probe is a prompt and an answer in one list of ids; `second_of` says where the answer begins.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from edgetune.batching import IGNORE
from edgetune.errors import ExportError
from edgetune.export.families import seq2seq_sizes
from edgetune.export.proof import Outputs
from edgetune.export.seq2seq_graphs import ENCODER
from edgetune.text_pairs import PairIds, second_of
from edgetune.weight_precision import Precision

if TYPE_CHECKING:
    from edgetune.runtime.seq2seq import Seq2SeqEngine

STEPS = 6  # of an answer's tokens, the last few go through the cache one by one


def check_seq2seq(precision: Precision) -> None:
    """ExportError for what an encoder-decoder cannot be stored as."""
    if precision.weights == "fp16":
        raise ExportError(
            "an encoder-decoder's activations overflow in fp16, and its graph is for the CPU", where="--precision fp16", expected="fp32, int8 or int4"
        )
    if precision.quantiser == "gptq":
        raise ExportError("gptq does not read prompts and answers apart yet", where="--quantiser gptq", fix="Use --quantiser hqq, which needs no text.")


def seq2seq_shape(config: Any) -> dict[str, Any]:
    """What the manifest says of the graphs beyond what it says of all."""
    return {**asdict(seq2seq_sizes(config)), "standard": None, "encoder": ENCODER, "start_token_id": int(config.decoder_start_token_id)}


def probe_pair(prompt: Sequence[int], labels: Sequence[int] | int, *, limit: int) -> PairIds:
    """A row of the probe of an example."""
    answer = [] if isinstance(labels, int) else [label for label in labels if label != IGNORE]
    first = list(prompt[:limit])
    return PairIds([*first, *answer[:limit]], second=len(first))


def text_pairs(texts: Sequence[str], tokenizer: Any, *, limit: int) -> list[list[int]]:
    """Rows of the probe of plain texts, each answered by the next."""
    ids = tokenizer(list(texts), verbose=False)["input_ids"]
    return [probe_pair(first, second, limit=limit) for first, second in itertools.pairwise(ids)]


def answer_logits(model: Any, row: Sequence[int]) -> npt.NDArray[np.float32]:
    """torch's logits (answer, vocab) of a row's answer, in float32."""
    prompt, answer = _parts(row)
    begun = [int(model.config.decoder_start_token_id), *answer[:-1]]
    logits: npt.NDArray[np.float32] = model(
        input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([begun]), use_cache=False
    ).logits[0].float().numpy()
    return logits


def seq2seq_outputs(engine: Seq2SeqEngine, rows: Sequence[Sequence[int]], tensors: Any) -> Outputs:
    """The bundle's logits of the same: prompts in one padded batch, the beginnings of the answers in one piece, what is left
    of them token by token through the cache."""
    prompts, answers = zip(*map(_parts, rows), strict=True)
    begun = [list(answer[: max(0, len(answer) - STEPS)]) for answer in answers]
    state, first = engine.answer_logits(prompts, begun, [tensors] * len(rows))
    found: list[list[np.ndarray]] = [[logits] for logits in first]
    alive = list(range(len(rows)))
    for step in range(STEPS - 1):
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
