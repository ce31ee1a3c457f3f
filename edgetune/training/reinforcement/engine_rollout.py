"""Rollouts by the exported graph in edgetune's own engine: the adapter's tensors go straight into
it.

The only part of training that knows `export` and `runtime`; it needs the packages of
edgetune[export].
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgetune.core.errors import RecipeError
from edgetune.core.layout import PEFT_PREFIX
from edgetune.core.progress import Say
from edgetune.models.base import Base
from edgetune.training.reinforcement.rollout import ROWS_AT_ONCE, Answer, Sampling, draw

# of the engine's weights, unless the adapter is trained for another: as most bundles ship
PRECISION = "int8"


class EngineRollout:
    """Sampling by the int8 graph (or that of `base_precision`) of the base with the policy's
    adapter on its inputs.

    Its distribution is that of the bundle which will ship, not quite the one of the torch model:
    `exact` is false.
    """

    exact = False

    def __init__(self, engine: Any, *, end: int) -> None:
        self.engine, self.end = engine, end

    def __call__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        count: int,
        sampling: Sampling,
        seed: int,
    ) -> list[list[Answer]]:
        """See Rollout."""
        generator = torch.Generator().manual_seed(seed)
        tensors = packed(model, self.engine.manifest)
        adapter = None if tensors is None else self.engine.bind(tensors)
        at_once = max(1, ROWS_AT_ONCE // count)
        answers: list[list[Answer]] = []
        for start in range(0, len(prompts), at_once):
            chunk = prompts[start : start + at_once]
            grown = self._grow(adapter, chunk, count=count, sampling=sampling, generator=generator)
            answers += [grown[at : at + count] for at in range(0, len(grown), count)]
        return answers

    def _grow(
        self,
        adapter: Any,
        prompts: Sequence[Sequence[int]],
        *,
        count: int,
        sampling: Sampling,
        generator: torch.Generator,
    ) -> list[Answer]:
        capacity = max(map(len, prompts)) + sampling.max_new_tokens
        state, first = self.engine.start(prompts, [adapter] * len(prompts), capacity=capacity)
        state, logits = state.repeat(count), np.repeat(first, count, axis=0)
        answers = [Answer([], [], ended=False) for _ in range(len(prompts) * count)]
        growing = list(range(len(answers)))
        for left in range(sampling.max_new_tokens, 0, -1):
            tokens, log_probs = draw(torch.from_numpy(logits), sampling, generator)
            for index, token, log_prob in zip(
                growing, tokens.tolist(), log_probs.tolist(), strict=True
            ):
                answers[index].ids.append(token)
                answers[index].log_probs.append(log_prob)
                answers[index].ended = token == self.end
            alive = (tokens != self.end).nonzero().squeeze(1).tolist()
            if left == 1 or not alive:
                break
            state.keep(alive)
            growing = [growing[at] for at in alive]
            logits = np.ascontiguousarray(state.step(tokens[alive].numpy()))
        return answers


def packed(model: Any, manifest: Any) -> Any:
    """The policy's adapter as an engine binds it; None while it is switched off. AdapterError when
    it does not fit.
    """
    from edgetune.runtime.adapters.lora import LoraFolder
    from edgetune.runtime.adapters.packing import pack_lora

    layers = {
        name: module
        for name, module in model.named_modules()
        if "default" in getattr(module, "lora_A", {})
    }
    if all(layer.disable_adapters for layer in layers.values()):
        return None
    read = LoraFolder(
        Path("the policy"), model.peft_config["default"].to_dict(), metadata=None, modules=set()
    )
    for name, layer in layers.items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        scaled = b.detach().float() * layer.scaling["default"]
        module = name.removeprefix(PEFT_PREFIX)
        read.deltas[module] = (a.detach().float().cpu().numpy(), scaled.cpu().numpy())
        assert read.modules is not None
        read.modules.add(module)
    return pack_lora(read, manifest, name="policy").tensors


def check_engine(base: Base) -> None:
    """RecipeError when the packages are missing or this family of models cannot be exported."""
    try:
        from edgetune.export.graph.families import DECODERS
    except ImportError as error:
        fix = 'Install edgetune[export], or set rollout = "torch".'
        raise RecipeError(
            f'rollout = "engine" needs {error.name}, which is not installed', fix=fix
        ) from error
    if base.model_type not in DECODERS:
        raise RecipeError(
            f'rollout = "engine" cannot run {base.model_type}',
            expected=f"one of {', '.join(DECODERS)}",
            fix='Set rollout = "torch".',
        )


@contextlib.contextmanager
def open_engine(
    base: Base,
    model: Any,
    *,
    end: int,
    say: Say,
    precision: str = PRECISION,
    engine: str = "auto",
) -> Iterator[EngineRollout]:
    """The base's graph, written to a temporary folder and opened; RecipeError when this policy
    cannot use it.
    """
    from edgetune.export.bundle import build_base
    from edgetune.quantisation.precision import Precision
    from edgetune.runtime.tasks.choose_engine import open_decoder

    if model.peft_config["default"].use_dora:
        raise RecipeError(
            "DoRA cannot go into the engine's adapter inputs",
            got='rollout = "engine"',
            fix='Set rollout = "torch".',
        )
    with tempfile.TemporaryDirectory(prefix="edgetune-rollout-") as folder:
        stored = base.precision or Precision(precision)
        manifest = build_base(
            replace(base, precision=None), Path(folder), precision=stored, say=say
        )
        decoder, which = open_decoder(
            Path(folder), manifest, engine=engine, threads=torch.get_num_threads()
        )
        say(f"rollouts by {which}")
        yield EngineRollout(decoder, end=end)
