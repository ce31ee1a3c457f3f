"""Small preference and prompt data, and recipes on them, for the tests of reinforcement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from training_helpers import recipe, write_rows

from edgetune.adapters import adapt
from edgetune.bases import Base, load_body, load_tokenizer, open_folder
from edgetune.examples import load_examples
from edgetune.heads import RewardModel
from edgetune.preference import PairBatch, collate_pairs
from edgetune.recipe import Parameters, Recipe, recipe_from_dict

QUESTIONS = ("Where is my card?", "Turn on the lights.", "What should I do?", "Play a song, please.")
POLITE, RUDE = "Yes, with pleasure, {}", "No way, you fool"


def pair_rows(count: int = 12) -> list[dict[str, str]]:
    """The polite answer is the chosen one; it is the longer one in two rows of three."""
    tails = ("right away.", "sir, at once, of course!", "x")
    return [
        {
            "prompt": QUESTIONS[i % len(QUESTIONS)],
            "chosen": POLITE.format(tails[i % 3]),
            "rejected": RUDE + " and so on and on and on" * (i % 3 == 2),
        }
        for i in range(count)
    ]


def pair_recipe(base: Path, folder: Path, method: str, **stage: Any) -> Recipe:
    train = write_rows(folder / "pairs.jsonl", pair_rows())
    held_out = write_rows(folder / "pairs-dev.jsonl", pair_rows(6))
    return recipe(base, method, train, held_out, **stage)


def prompt_recipe(base: Path, folder: Path, reward: str | list[str], **stage: Any) -> Recipe:
    """A grpo recipe whose reward is Python text, or names something else."""
    if isinstance(reward, str) and reward.startswith("def "):
        (folder / "scoring.py").write_text(reward, encoding="utf-8")
        reward = "scoring:score"
    rows = [{"prompt": question, "wanted": question[0]} for question in QUESTIONS]
    train = write_rows(folder / "prompts.jsonl", rows * stage.pop("copies", 1))
    held_out = write_rows(folder / "prompts-dev.jsonl", rows[:2])
    settings = {
        "method": "grpo", "reward": reward, "max_length": 128, "max_new_tokens": 8, "group_size": 4, "batch_size": 4,
        "learning_rate": 1e-2, "precision": "fp32", "data": {"train": str(train), "validation": str(held_out)}, **stage,
    }  # fmt: skip
    return recipe_from_dict({"base": str(base), "stage": [settings], "threads": 1}, folder=folder)


def tiny(base_folder: Path) -> tuple[Base, Any]:
    base = open_folder(base_folder, name="tiny")
    return base, load_tokenizer(base)


def pair_batch(base_folder: Path, folder: Path, method: str) -> PairBatch:
    base, tokenizer = tiny(base_folder)
    stage = pair_recipe(base_folder, folder, method).stage[0]
    return collate_pairs(load_examples(stage, tokenizer, base).train[:5], tokenizer.pad_token_id)  # type: ignore[arg-type]


def adapted(base_folder: Path, *, task: str = "text-generation", noise: float = 0.05, seed: int = 0) -> Any:
    """The tiny decoder (or a reward model of it) with an adapter that is not zero."""
    model = load_body(tiny(base_folder)[0])
    torch.manual_seed(seed)
    if task == "reward":
        model = RewardModel(model)
    model = adapt(model, Parameters(rank=4), task=task)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=noise)
    return model.eval()
