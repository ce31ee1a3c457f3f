"""Rollouts of grpo: torch (bf16 where it is faster) and the exported int8 graph in turns; a table,
then one JSON line.

    python benchmarks/rollouts.py [--base NAME] [--prompts 8] [--group 8] [--new-tokens 64]
    [--rounds 5] [--threads N]

Every prompt gets `group` sampled answers of exactly `new-tokens` tokens (no end token), with a
rank-8 adapter on all linear layers. Wall-clock and processor seconds per round; medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from edgetune.adapters.lora import adapt
from edgetune.models.load import load_body, load_tokenizer
from edgetune.models.resolve import resolve_base
from edgetune.models.torch_device import choose_precision, hold_frozen_linears_in_bf16
from edgetune.recipe.schema import Parameters
from edgetune.training.reinforcement.engine_rollout import open_engine
from edgetune.training.reinforcement.rollout import Rollout, Sampling, TorchRollout

PROMPTS = (
    "Play some 1959 songs on Iheart\n",
    "What is the weather forecast in Country Club Heights\n",
    "Look for the creative work called White Sugar\n",
    "Rate this book four stars out of six please\n",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="builtin:smollm2-135m-instruct")
    for name, default in (
        ("prompts", 8),
        ("group", 8),
        ("new-tokens", 64),
        ("rounds", 5),
        ("threads", torch.get_num_threads()),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = resolve_base(args.base)
    tokenizer = load_tokenizer(base)
    model: Any = adapt(load_body(base), Parameters(rank=8), task="text-generation")
    precision = choose_precision("auto", hidden=model.config.hidden_size)
    if precision == "bf16":
        hold_frozen_linears_in_bf16(model)
    prompts = tokenizer([PROMPTS[at % len(PROMPTS)] for at in range(args.prompts)])["input_ids"]
    seconds: dict[str, list[float]] = {}
    processor: dict[str, list[float]] = {}
    with open_engine(base, model, end=-1, say=print) as engine:
        rollouts: dict[str, Rollout] = {
            f"torch {precision}": TorchRollout(end=-1, pad_id=0, precision=precision),
            "engine int8": engine,
        }
        for number in range(args.rounds):
            for name, rollout in rollouts.items():
                wall, cpu = time.perf_counter(), time.process_time()
                rollout(
                    model,
                    prompts,
                    count=args.group,
                    sampling=Sampling(args.new_tokens),
                    seed=number,
                )
                seconds.setdefault(name, []).append(time.perf_counter() - wall)
                processor.setdefault(name, []).append(time.process_time() - cpu)
    tokens = args.prompts * args.group * args.new_tokens
    print(
        f"\n{args.prompts} prompts x {args.group} answers x {args.new_tokens} tokens,"
        f" {args.threads} threads, medians of {args.rounds}"
    )
    result = {}
    for name in seconds:
        wall, cpu = statistics.median(seconds[name]), statistics.median(processor[name])
        result[name] = {
            "seconds": wall,
            "processor_seconds": cpu,
            "tokens_per_second": tokens / wall,
        }
        print(f"{name:14}{wall:8.2f} s {cpu:8.2f} s processor {tokens / wall:8.0f} tokens/s")
    print(json.dumps({"settings": vars(args), "rollouts": result}))


if __name__ == "__main__":
    main()
