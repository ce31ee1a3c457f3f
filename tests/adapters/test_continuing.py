"""parameters.start: a finished adapter goes on learning."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_helpers import prompt_recipe
from safetensors.torch import load_file
from training_helpers import intent_recipe, intent_rows, recipe, sft_recipe, silent, write_rows

from edgetune.core.errors import AdapterError, DataError, EdgetuneError, RecipeError
from edgetune.core.files import sha256_file
from edgetune.core.progress import Progress
from edgetune.recipe.read import load_recipe
from edgetune.recipe.schema import Recipe
from edgetune.training import run_recipe

WEIGHTS = "adapter/adapter_model.safetensors"
STILL = 1e-12  # a learning rate that moves no weight by more than rounding
LORA = {"rank": 4, "alpha": 8}
VOWELS = (
    "def score(prompt, completion, row):\n    return sum(c in 'aeiou' for c in completion) / 8\n"
)


@pytest.fixture(scope="module")
def first(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    run_recipe(
        sft_recipe(tiny_decoder, folder, parameters=LORA), out=folder / "run", progress=silent()
    )
    return folder / "run"


def summary_of(run: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def assert_same_weights(run: Path, other: Path) -> None:
    found, expected = load_file(run / WEIGHTS), load_file(other / WEIGHTS)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


def test_an_adapter_begins_where_the_other_ended(
    tiny_decoder: Path, first: Path, tmp_path: Path
) -> None:
    again = sft_recipe(
        tiny_decoder,
        tmp_path,
        learning_rate=STILL,
        epochs=1,
        parameters={**LORA, "start": str(first)},
    )
    run_recipe(again, out=tmp_path / "run", progress=silent())
    assert_same_weights(tmp_path / "run", first)
    before, after = summary_of(first), summary_of(tmp_path / "run")
    assert after["metrics"]["loss"] == pytest.approx(before["metrics"]["loss"], abs=1e-5)
    # What it is compared with stays the base, not the adapter it came from.
    assert after["base_metrics"]["loss"] == pytest.approx(before["base_metrics"]["loss"], abs=1e-5)
    assert after["data"][0]["digests"]["start"] == "sha256:" + sha256_file(first / WEIGHTS)
    assert after["effect"]["mean_kl"] == pytest.approx(before["effect"]["mean_kl"], rel=1e-3)


def test_another_rounding_of_the_base_is_a_line(
    tiny_decoder: Path, first: Path, tmp_path: Path
) -> None:
    def said(start: Path, name: str, **more: Any) -> str:
        out = io.StringIO()
        again = sft_recipe(
            tiny_decoder, tmp_path, epochs=1, parameters={**LORA, "start": str(start), **more}
        )
        run_recipe(again, out=tmp_path / name, progress=Progress(out))
        return out.getvalue()

    line = "learned on unrounded weights of the base, and goes on on int8 (blocks of 32"
    assert line in said(first, "int8", base_precision="int8")
    assert "learned on" not in said(tmp_path / "int8", "again", base_precision="int8")


def test_it_goes_on_learning(tiny_decoder: Path, first: Path, tmp_path: Path) -> None:
    run_recipe(
        sft_recipe(tiny_decoder, tmp_path, parameters={**LORA, "start": str(first)}),
        out=tmp_path / "run",
        progress=silent(),
    )
    assert (
        summary_of(tmp_path / "run")["metrics"]["loss"]
        < summary_of(first)["metrics"]["loss"] - 0.05
    )


@pytest.mark.parametrize("parameters", [LORA, {"train": "head"}], ids=["lora", "head"])
def test_a_head_keeps_its_weights_and_its_labels(
    tiny_encoder: Path, tmp_path: Path, parameters: dict[str, Any]
) -> None:
    run_recipe(
        intent_recipe(tiny_encoder, tmp_path, parameters=parameters),
        out=tmp_path / "first",
        progress=silent(),
    )
    two = write_rows(
        tmp_path / "two.jsonl", [row for row in intent_rows() if row["label"] != "lights"]
    )
    still = {"learning_rate": STILL, "head_learning_rate": STILL, "epochs": 1}
    settings = {**parameters, "start": str(tmp_path / "first" / "adapter")}
    run_recipe(
        recipe(tiny_encoder, "sequence-classification", two, None, parameters=settings, **still),
        out=tmp_path / "run",
        progress=silent(),
    )
    assert_same_weights(tmp_path / "run", tmp_path / "first")
    about = json.loads((tmp_path / "run" / "adapter" / "edgetune_adapter.json").read_text())
    assert about["labels"] == ["heat", "lights", "music"]


def test_a_head_is_not_fitted_again_after_a_stage_of_text(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    run_recipe(
        intent_recipe(tiny_encoder, tmp_path, parameters=LORA),
        out=tmp_path / "first",
        progress=silent(),
    )
    still = {"learning_rate": STILL, "head_learning_rate": STILL, "epochs": 1}
    again = intent_recipe(
        tiny_encoder, tmp_path, parameters={**LORA, "start": str(tmp_path / "first")}, **still
    )
    text = write_rows(tmp_path / "text.jsonl", [{"text": row["text"]} for row in intent_rows()])
    before = recipe(tiny_encoder, "masked-lm", text, None, learning_rate=STILL, epochs=1).stage[0]
    run_recipe(
        replace(again, stage=(before, *again.stage)), out=tmp_path / "run", progress=silent()
    )
    assert_same_weights(tmp_path / "run", tmp_path / "first")


def test_the_folder_is_seen_from_the_recipe(
    tiny_decoder: Path, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    text = (
        f'base = "{tiny_decoder}"\n[parameters]\nstart = "{{}}"\n[[stage]]\nmethod ='
        f' "sft"\n[stage.data]\ntrain = "{data}"\n'
    )
    (tmp_path / "r.toml").write_text(text.format("../somewhere"))
    monkeypatch.chdir(first)
    assert load_recipe(tmp_path / "r.toml").parameters.start == str(tmp_path.parent / "somewhere")


@pytest.mark.parametrize(
    ("parameters", "error", "line"),
    [
        (
            {"rank": 8, "alpha": 8},
            AdapterError,
            r"other settings.*expected rank = 4.*got 8.*recipe\.toml",
        ),
        ({"rank": 4, "alpha": 4}, AdapterError, r"expected alpha = 8.*got 4"),
        (
            {**LORA, "target_modules": ["q_proj"]},
            AdapterError,
            r"other modules or shapes.*unknown base_model",
        ),
        (
            {**LORA, "init": "pissa"},
            RecipeError,
            r'init = "pissa" has no meaning with parameters\.start',
        ),
        ({"train": "full"}, RecipeError, r'parameters\.start has no meaning with train = "full"'),
    ],
)
def test_another_adapter_than_the_recipe_describes_is_refused(
    tiny_decoder: Path,
    first: Path,
    tmp_path: Path,
    parameters: dict[str, Any],
    error: type[EdgetuneError],
    line: str,
) -> None:
    with pytest.raises(error, match=line):
        run_recipe(
            sft_recipe(tiny_decoder, tmp_path, parameters={**parameters, "start": str(first)}),
            out=tmp_path / "run",
            progress=silent(),
        )
    assert not (tmp_path / "run" / "adapter").exists()


def test_another_task_another_base_and_no_adapter_are_refused(
    tiny_decoder: Path, tiny_encoder: Path, first: Path, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match="trained on another base"):
        run_recipe(
            intent_recipe(tiny_encoder, tmp_path, parameters={**LORA, "start": str(first)}),
            out=tmp_path / "a",
            progress=silent(),
        )
    with pytest.raises(AdapterError, match="there is no such folder"):
        run_recipe(
            sft_recipe(
                tiny_decoder, tmp_path, parameters={**LORA, "start": str(tmp_path / "none")}
            ),
            out=tmp_path / "b",
            progress=silent(),
        )
    run_recipe(
        intent_recipe(tiny_encoder, tmp_path, parameters=LORA),
        out=tmp_path / "intent",
        progress=silent(),
    )
    text = write_rows(
        tmp_path / "text.jsonl", [{"text": "The quick brown fox jumps over the lazy dog."}] * 8
    )
    other = recipe(
        tiny_encoder,
        "masked-lm",
        text,
        None,
        parameters={**LORA, "start": str(tmp_path / "intent")},
    )
    with pytest.raises(RecipeError, match=r"another task.*masked-lm.*sequence-classification"):
        run_recipe(other, out=tmp_path / "c", progress=silent())


def resumed(recipe: Recipe, run: Path) -> str:
    said = io.StringIO()
    run_recipe(recipe, out=run, progress=Progress(said), resume=True)
    return said.getvalue()


def test_resume_compares_the_adapter_by_its_contents(
    tiny_decoder: Path, first: Path, tmp_path: Path
) -> None:
    run_recipe(
        sft_recipe(tiny_decoder, tmp_path, parameters=LORA, epochs=1),
        out=tmp_path / "other",
        progress=silent(),
    )
    one = sft_recipe(tiny_decoder, tmp_path, parameters={**LORA, "start": str(first)}, epochs=1)
    run_recipe(one, out=tmp_path / "run", progress=silent())
    assert "is finished" in resumed(one, tmp_path / "run")
    with pytest.raises(DataError, match=r"stage\.0\.data\.start"):
        resumed(
            replace(one, parameters=replace(one.parameters, start=str(tmp_path / "other"))),
            tmp_path / "run",
        )


@pytest.mark.parametrize("kind", ["rewards", "int8"])
def test_a_finished_run_with_rewards_or_a_rounded_base_is_not_trained_again(
    tiny_decoder: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "rewards":
        made = prompt_recipe(tiny_decoder, tmp_path, VOWELS, epochs=1)
    else:
        made = sft_recipe(
            tiny_decoder, tmp_path, epochs=1, parameters={**LORA, "base_precision": "int8"}
        )
    run_recipe(made, out=tmp_path / "run", progress=silent())
    assert "is finished" in resumed(made, tmp_path / "run")
