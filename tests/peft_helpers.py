"""Classifiers as a stranger trains and opens them: transformers' classes, PEFT around them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

TEXTS = (
    "turn on the lights",
    "my card has not arrived",
    "please, what should i do?",
    "play a song in the kitchen and make it warmer",
)
AUTO = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
}
# what a stranger has to name beside `classifier`, or PEFT forgets it
SAVED = {
    "deberta-v2": ["pooler", "classifier"],
    "distilbert": ["pre_classifier", "classifier"],
    "modernbert": ["head", "classifier"],
}

# (of taggers PEFT's all-linear would take the output layer, too)
ATTENTION = r".*\.(query|value|Wqkv|q_lin|v_lin|query_proj|value_proj)"


def stranger(
    base: Path,
    folder: Path,
    *,
    labels: int = 3,
    task: str = "SEQ_CLS",
    seed: int = 0,
    **config: Any,
) -> Any:
    """PEFT's model with an adapter of random weights, which is saved in `folder`."""
    torch.manual_seed(seed)
    body = AUTO[task].from_pretrained(base, num_labels=labels)
    saved = SAVED.get(body.config.model_type)
    if task == "TOKEN_CLS" and body.config.model_type != "modernbert":
        saved = None
    targets = ATTENTION if task == "TOKEN_CLS" else "all-linear"
    settings = {"target_modules": targets, "modules_to_save": saved} | config
    model = get_peft_model(body, LoraConfig(task_type=task, r=4, lora_alpha=8, **settings))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return model.eval()


def opened(base: Path, adapter: Path, *, labels: int, task: str = "SEQ_CLS") -> Any:
    """What a stranger makes of an adapter folder; whatever it lacks is drawn from another seed."""
    torch.manual_seed(99)
    body = AUTO[task].from_pretrained(base, num_labels=labels)
    return PeftModel.from_pretrained(body, adapter).eval()


@torch.no_grad()
def logits_of(model: Any, base: Path, texts: Sequence[Any] = TEXTS) -> np.ndarray:
    """(texts, labels) in torch, each text alone, or (tokens, labels) of all texts one by one."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    found = [
        model(**tokenizer(*([t] if isinstance(t, str) else t), return_tensors="pt")).logits[0]
        for t in texts
    ]
    return torch.stack(found).numpy() if found[0].ndim == 1 else torch.cat(found).numpy()


def probabilities(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)
