"""Every two methods that may follow each other, as METHODS and the recipe's checks have it: in both
precisions and from one to the other, for everything that may learn, and killed in the second one.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from resume_helpers import journal, stopped_at
from safetensors.torch import load_file
from seq2seq_helpers import make_seq2seq
from training_helpers import silent, write_rows

from edgetune.adapters.runs import load_adapted_model
from edgetune.core.errors import RecipeError
from edgetune.core.tasks import CLASSIFICATION, METHODS, PROBLEMS
from edgetune.recipe.read import recipe_from_dict
from edgetune.recipe.schema import Parameters, Recipe
from edgetune.training import run_recipe

TEXTS = ("lights on", "it is cold", "a song", "open up")
# Columns that any method may read; a stage is given those that its row of METHODS names.
COLUMNS: dict[str, Any] = {
    "text": "{}",
    "prompt": "{}",
    "completion": "yes, {}",
    "chosen": "yes, {}",
    "rejected": "no",
}
LABELS: dict[str, Any] = {
    "single-label": ("a", "b"),
    "multi-label": (["a"], ["a", "b"]),
    "regression": (0.5, 2.0),
}
GRPO = {"reward": "scoring:score", "max_new_tokens": 4, "group_size": 2}
REWARD = "def score(prompt, completion, row):\n    return len(set(completion)) / 8\n"
TRAINED = get_args(get_type_hints(Parameters)["train"])
Learned = tuple[str, str]  # a method and its problem
Succession = tuple[str, str, Learned, Learned]  # kind of base, what learns, first, second


def stage_of(learned: Learned, train: str, **settings: Any) -> dict[str, Any]:
    """A stage with what its method and its problem do not do without."""
    method, problem = learned
    own: dict[str, Any] = {"problem": problem} if "problem" in METHODS[method].settings else {}
    if method == "grpo":  # with all weights there is no base left beside the policy
        own["grpo"] = GRPO | ({"kl_to": "start"} if train == "full" else {})
    return {"method": method, "data": {"train": "x.jsonl"}, **own, **settings}


def write_data(learned: Learned, folder: Path) -> dict[str, str]:
    """Four rows with the columns that METHODS names."""
    method, problem = learned
    rows = []
    for number, text in enumerate(TEXTS):
        row = {name: form.format(text) for name, form in COLUMNS.items()}
        row |= {"label": LABELS[problem][number % 2], "tokens": text.split()}
        row |= {"tags": ["O"] * (len(row["tokens"]) - 1) + [("B-x", "B-y")[number % 2]]}
        rows.append({name: row[name] for name in METHODS[method].columns if name in row})
    file = write_rows(folder / f"{method}-{problem}.jsonl", rows)
    return {"train": str(file), "validation": str(file)}


def each_learned() -> list[Learned]:
    """Each method, and each problem of one that has problems."""
    return [
        (name, problem)
        for name, method in METHODS.items()
        for problem in (PROBLEMS if "problem" in method.settings else PROBLEMS[:1])
    ]


def successions() -> list[Succession]:
    """All that the recipe's checks let through."""
    found = []
    for first, second in itertools.product(each_learned(), each_learned()):
        kinds = [k for k in METHODS[first[0]].kinds if k in METHODS[second[0]].kinds]
        for train in TRAINED if kinds else ():
            stages = [stage_of(learned, train) for learned in (first, second)]
            try:
                recipe_from_dict({"base": "b", "parameters": {"train": train}, "stage": stages})
            except RecipeError:
                continue
            # all weights of a decoder that classifies would be a base that writes no text
            found += [
                (kind, train, first, second)
                for kind in kinds
                if not (
                    kind == "decoder"
                    and train == "full"
                    and CLASSIFICATION in (first[0], second[0])
                )
            ]
    return found


def recipe_of(succession: Succession, base: Path, folder: Path, *precisions: str) -> Recipe:
    """One step of the first method and two of the second, a checkpoint after each."""
    _, train, *both = succession
    (folder / "scoring.py").write_text(REWARD, encoding="utf-8")
    stages = [
        stage_of(
            learned,
            train,
            data=write_data(learned, folder),
            precision=precision,
            max_steps=steps,
            epochs=2,
            batch_size=4,
            max_length=64,
            learning_rate=1e-2,
        )
        for steps, (learned, precision) in enumerate(zip(both, precisions, strict=True), 1)
    ]
    values = {"base": str(base), "parameters": {"train": train}, "stage": stages, "threads": 1}
    return recipe_from_dict({**values, "checkpoint_every": 1}, folder=folder)


def weights(run: Path) -> dict[str, torch.Tensor]:
    """What a run learned: an adapter, or a model and its head."""
    return {
        f"{file.name} {name}": tensor
        for file in [*run.glob("adapter/*.safetensors"), *run.glob("model/*.safetensors")]
        for name, tensor in load_file(file).items()
    }


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in journal(run) if record["kind"] == "train"]


SUCCESSIONS = successions()


def name_of(succession: Succession) -> str:
    kind, train, *both = succession
    return "-".join([kind, train, *(p if p != PROBLEMS[0] else m for m, p in both)])


@pytest.fixture(scope="module")
def bases(
    tiny_decoder: Path, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    seq2seq = make_seq2seq("t5", tmp_path_factory.mktemp("tiny-seq2seq"))
    return {"decoder": tiny_decoder, "encoder": tiny_encoder, "encoder-decoder": seq2seq}


def test_every_method_and_kind_of_base_is_among_them() -> None:
    assert {method for _, _, *both in SUCCESSIONS for method, _ in both} == set(METHODS)
    assert {kind for kind, *_ in SUCCESSIONS} == {k for m in METHODS.values() for k in m.kinds}
    assert {train for _, train, *_ in SUCCESSIONS} == set(TRAINED)


# all weights resume as an adapter does, by the same code: one method after itself shows it quickly
QUICK = [one for one in SUCCESSIONS if one[1] != "full" or one[2] == one[3]]


@pytest.mark.parametrize(
    "succession",
    [pytest.param(s, marks=[] if s in QUICK else [pytest.mark.slow]) for s in SUCCESSIONS],
    ids=name_of,
)
def test_one_method_follows_another(
    succession: Succession, bases: dict[str, Path], tmp_path: Path
) -> None:
    def trained(*precisions: str) -> Path:
        recipe, out = recipe_of(succession, base, tmp_path, *precisions), tmp_path / str(precisions)
        summary = run_recipe(recipe, out=out, progress=silent())
        assert tuple(stage["precision"] for stage in summary.stages) == precisions
        assert all(math.isfinite(value) for value in [*losses(out), *summary.metrics.values()])
        assert all(tensor.isfinite().all() for tensor in weights(out).values())
        assert {tensor.dtype for tensor in weights(out).values()} == {torch.float32}
        return out

    base, (_, train, first, _) = bases[succession[0]], succession
    fp32, bf16 = trained("fp32", "fp32"), trained("bf16", "bf16")
    if train == "lora":
        trained("bf16", "fp32")
    if first[0] != "grpo":  # whose answers are drawn, from other probabilities
        # bf16 is another computation, and not a wholly different one; what a decoder's head alone
        # learns from was computed once, in float32
        assert (losses(bf16) != losses(fp32)) == ((succession[0], train) != ("decoder", "head"))
        assert losses(bf16)[0] == pytest.approx(losses(fp32)[0], rel=0.05, abs=0.02)
    load_adapted_model(bf16)
    killed, recipe = tmp_path / "killed", recipe_of(succession, base, tmp_path, "bf16", "bf16")
    stopped_at(2, recipe, killed)  # after the first step of the second method
    run_recipe(recipe, out=killed, progress=silent(), resume=True)
    assert journal(killed) == journal(bf16)
    again, once = weights(killed), weights(bf16)
    assert again.keys() == once.keys() and all(again[name].equal(once[name]) for name in once)
