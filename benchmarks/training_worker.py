"""The workers of `benchmarks/training.py`: edgetune's loop, TRL's and transformers' trainers, bare
matrix products, each in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgetune.core.memory import peak_rss_mb

FORMS = {
    "sft": 'prompt = "{{ %s }}"\ncompletion = "{{ %s }}"\nsystem = ""',  # two columns
    "classification": 'text = "text"\nlabel = "label"',
    "dpo": (
        'prompt = "{{ instruction }}{% if input %}\\n{{ input }}{% endif %}"\nsystem ='
        ' ""\nskip_invalid = true'
    ),
}
METHODS = {"sft": "sft", "classification": "sequence-classification", "dpo": "dpo"}
ROWS_HELD_OUT = 64


class Turns:
    """A trainer calls `counted` after every step; every `steps` steps it reports and waits until it
    may go on.
    """

    def __init__(self, steps: int) -> None:
        self.steps, self.losses, self.tokens, self.done = steps, list[float](), 0, 0
        self.wait()
        self.started = time.perf_counter()

    def wait(self) -> None:
        """Until the other side says so."""
        if not sys.stdin.readline():
            raise SystemExit

    def counted(self, *, loss: float, tokens: int) -> None:
        """One step is done."""
        self.losses.append(loss)
        self.tokens, self.done = self.tokens + tokens, self.done + 1
        if self.done % self.steps == 0:
            seconds = time.perf_counter() - self.started
            say({"tokens": self.tokens, "seconds": seconds, "loss": statistics.fmean(self.losses)})
            self.losses, self.tokens = [], 0
            self.wait()
            self.started = time.perf_counter()


def say(facts: dict[str, Any]) -> None:
    """One JSON line to the other side."""
    print("@" + json.dumps(facts), flush=True)


def recipe_of(options: argparse.Namespace) -> Any:
    """The recipe that all trainers follow."""
    from edgetune.recipe.read import load_recipe

    base = (
        "builtin:minilm-l6" if options.task == "classification" else "builtin:smollm2-135m-instruct"
    )
    head = 'head_init = "random"\n' if options.task == "classification" else ""
    form = FORMS[options.task]
    form = form % tuple(options.columns.split(",")) if options.task == "sft" else form
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.toml")
        path.write_text(
            f'base = "{base}"\nout = "{folder}/run"\nthreads ='
            f" {options.threads}\n[parameters]\nrank = 8\nalpha = 16\ntarget_modules ="
            f' "all-linear"\n[[stage]]\nmethod = "{METHODS[options.task]}"\nepochs = 100\n'
            f"batch_size = {options.batch_size}\nmax_steps = {options.steps * options.rounds}\n"
            "learning_rate = 2e-4\nmax_length = 256\nprecision ="
            f' "{options.precision}"\n{head}[stage.data]\ntrain = "{options.data.resolve()}"\nlimit'
            f" = {options.rows}\nhold_out = 0\n{form}\n",
            encoding="utf-8",
        )
        return load_recipe(path)


def prepared(options: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    """Recipe, base, tokenizer and the tokenised rows."""
    from edgetune.data.loaders import load_examples
    from edgetune.models.load import load_tokenizer
    from edgetune.models.resolve import resolve_base

    recipe = recipe_of(options)
    base = resolve_base(recipe.base)
    tokenizer = load_tokenizer(base)
    return (
        recipe,
        base,
        tokenizer,
        load_examples(recipe.stage[0], tokenizer, base, None, seed=recipe.seed),
    )


def held_out(options: argparse.Namespace) -> Any:
    """The first rows of the held-out file, tokenised."""
    stage = recipe_of(options).stage[0]
    from edgetune.data.loaders import load_examples
    from edgetune.models.load import load_tokenizer
    from edgetune.models.resolve import resolve_base

    base = resolve_base(recipe_of(options).base)
    data = replace(stage.data, train=str(options.held_out.resolve()), limit=None)
    return load_examples(replace(stage, data=data), load_tokenizer(base), base, None, seed=0).train[
        :ROWS_HELD_OUT
    ]


def held_out_loss(model: Any, options: argparse.Namespace, pad_id: int) -> float | None:
    """Mean next-token loss over the held-out rows, plain forward in fp32; None without such
    rows.
    """
    if options.held_out is None:
        return None
    import torch

    from edgetune.data.collation import collate
    from edgetune.objectives.language import sft

    model = model.float().eval()
    total, count = 0.0, 0
    rows = held_out(options)
    with torch.no_grad():
        for start in range(0, len(rows), 8):
            loss, targets = sft(model, collate(rows[start : start + 8], pad_id))
            total, count = total + loss.item() * targets, count + targets
    return total / count


def train_ours(options: argparse.Namespace) -> None:
    """edgetune's own loop, as `edgetune train` runs it."""
    import edgetune.training.run as run
    from edgetune.core.progress import Progress
    from edgetune.models.load import load_tokenizer
    from edgetune.models.resolve import resolve_base
    from edgetune.training import stages

    recipe = recipe_of(options)
    turns = Turns(options.steps)

    class Counting(Progress):
        def step(
            self,
            step: int,
            total: int,
            *,
            loss: float,
            tokens_per_second: float,
            seconds: float,
            reward: float | None = None,
            stage: int | None = None,
        ) -> None:
            tokens = round(tokens_per_second * seconds)
            turns.counted(loss=loss, tokens=tokens - self.before)
            self.before = tokens

        before = 0

    tokenizer = load_tokenizer(resolve_base(recipe.base))
    finish = stages.Stages.measure

    def measure(self: Any) -> Any:
        say(
            {
                "held_out": held_out_loss(self.model.model, options, tokenizer.pad_token_id),
                "mb": peak_rss_mb(),
            }
        )
        raise SystemExit

    stages.Stages.measure = measure  # type: ignore[method-assign]
    try:
        run.run_recipe(recipe, progress=Counting(sys.stderr))
    finally:
        stages.Stages.measure = finish  # type: ignore[method-assign]


def train_theirs(options: argparse.Namespace) -> None:
    """The peers: the same PEFT model and the same tokens through their loop."""
    import torch

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    recipe, base, tokenizer, examples = prepared(options)
    model, rows, collator = peer_parts(options, recipe, base, tokenizer, examples)
    turns = Turns(options.steps)
    steps = options.steps * options.rounds
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "output_dir": folder,
            "max_steps": steps,
            "per_device_train_batch_size": options.batch_size,
            "learning_rate": 2e-4,
            "lr_scheduler_type": "cosine",
            "warmup_steps": max(1, round(recipe.stage[0].warmup_ratio * steps)),
            "bf16": options.precision == "bf16",
            "use_cpu": True,
            "report_to": [],
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "seed": 0,
            **(
                {"train_sampling_strategy": "group_by_length"}
                if options.worker.endswith("length")
                else {}
            ),
        }
        kind, arguments = peer_trainer(
            options, common, beta=recipe.stage[0].dpo and recipe.stage[0].dpo.beta
        )
        own = (
            {"processing_class": tokenizer}
            if options.worker == "trl"
            else {"data_collator": collator}
        )
        seen = {"tokens": 0, "loss": 0.0}
        callback = counting_callback(turns, seen)
        counting(kind, seen)(
            model=model, args=arguments, train_dataset=rows, callbacks=[callback], **own
        ).train()
    say({"held_out": held_out_loss(model, options, tokenizer.pad_token_id), "mb": peak_rss_mb()})


def peer_parts(
    options: argparse.Namespace, recipe: Any, base: Any, tokenizer: Any, examples: Any
) -> tuple[Any, Any, Any]:
    """The PEFT model, the rows as a data set, and what pads them (TRL: its own)."""
    from datasets import Dataset
    from transformers import (
        AutoModelForSequenceClassification,
        DataCollatorForSeq2Seq,
        DataCollatorWithPadding,
    )

    from edgetune.adapters.lora import adapt
    from edgetune.models.load import load_body

    rows = [{"input_ids": e.input_ids, "labels": e.labels} for e in examples.train]
    if options.task == "classification":
        plain = AutoModelForSequenceClassification.from_pretrained(
            base.folder, num_labels=len(examples.labels)
        )
        return (
            adapt_classifier(plain, recipe.parameters),
            Dataset.from_list(rows),
            DataCollatorWithPadding(tokenizer),
        )
    model = adapt(load_body(base), recipe.parameters, task="text-generation")
    if options.task == "dpo":
        return (
            model,
            Dataset.from_list([texts_of(example, tokenizer) for example in examples.train]),
            None,
        )
    return (
        model,
        Dataset.from_list(rows),
        DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
    )


def peer_trainer(
    options: argparse.Namespace, common: dict[str, Any], *, beta: float
) -> tuple[type[Any], Any]:
    """The trainer's class and its arguments."""
    if options.task == "dpo":
        from trl import DPOConfig, DPOTrainer

        settings = {
            "gradient_checkpointing": False,
            "max_length": 256,
            "precompute_ref_log_probs": True,
        }
        return DPOTrainer, DPOConfig(**common, **settings, beta=beta)
    if options.worker == "trl":
        from trl import SFTConfig, SFTTrainer

        settings = {"gradient_checkpointing": False, "max_length": None}
        return SFTTrainer, SFTConfig(
            **common, **settings, dataset_kwargs={"skip_prepare_dataset": True}
        )
    from transformers import Trainer, TrainingArguments

    return Trainer, TrainingArguments(**common)


def counting(kind: type[Any], seen: dict[str, float]) -> type[Any]:
    """The trainer, which adds up real tokens and keeps the last loss in `seen`."""

    class CountingTrainer(kind):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            seen["tokens"] += int(inputs["attention_mask"].sum())
            loss = super().training_step(model, inputs, *rest, **named)
            seen["loss"] = loss.item()
            return loss

    return CountingTrainer


def counting_callback(turns: Turns, seen: dict[str, float]) -> Any:
    """Tells `turns` of every optimizer step."""
    from transformers import TrainerCallback

    class Counting(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            turns.counted(loss=seen["loss"], tokens=int(seen["tokens"]))
            seen["tokens"] = 0

    return Counting()


def texts_of(pair: Any, tokenizer: Any) -> dict[str, str]:
    """A pair as TRL reads it: the prompt with its template, and two answers without the end that
    TRL adds itself.
    """
    prompt = next(at for at, label in enumerate(pair.labels) if label >= 0)
    chosen, rejected = (
        tokenizer.decode(ids[prompt:]).removesuffix(tokenizer.eos_token)
        for ids in (pair.input_ids, pair.rejected_ids)
    )
    return {
        "prompt": tokenizer.decode(pair.input_ids[:prompt]),
        "chosen": chosen,
        "rejected": rejected,
    }


def adapt_classifier(model: Any, parameters: Any) -> Any:
    """PEFT's own form of the same adapter on transformers' own classifier."""
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=parameters.r,
        lora_alpha=parameters.lora_alpha,
        target_modules=[
            "query",
            "key",
            "value",
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        ],
    )
    return get_peft_model(model, config)


def multiply(options: argparse.Namespace) -> None:
    """The ceiling: matrix products of the model's shapes and nothing else, in GFLOP/s."""
    import torch

    torch.set_num_threads(options.threads)
    shapes = (
        [(384, 384), (384, 1536), (1536, 384)]
        if options.task == "classification"
        else [(576, 576), (576, 1536), (1536, 576)]
    )
    rows, dtype = 512, torch.bfloat16 if options.precision == "bf16" else torch.float32
    pairs = [(torch.randn(rows, i).to(dtype), torch.randn(o, i).to(dtype)) for i, o in shapes]
    work = sum(2 * rows * i * o for i, o in shapes)
    sys.stdin.readline()
    while True:
        best = float("inf")
        for _ in range(30):
            started = time.perf_counter()
            for x, weight in pairs:
                torch.nn.functional.linear(x, weight)
            best = min(best, time.perf_counter() - started)
        say({"gflops": work / best / 1e9})
        if not sys.stdin.readline():
            return


WORK: dict[str, Callable[[argparse.Namespace], None]] = {
    "edgetune": train_ours,
    "multiply": multiply,
}
