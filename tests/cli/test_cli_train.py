"""`edgetune train` and `edgetune models` on the command line: exit codes, one line for each
mistake, nothing half-written.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgetune.cli import main

ROWS = [{"text": f"my {word} {n}", "label": word} for n in range(6) for word in ("card", "light")]


@pytest.fixture
def recipe(tiny_encoder: Path, tmp_path: Path) -> Path:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'base = "{tiny_encoder}"\nout = "{tmp_path / "run"}"\n'
        '[[stage]]\nmethod = "sequence-classification"\ndata.train = "train.jsonl"\nmax_steps = 2\n'
    )
    return path


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


def test_train_prints_the_run_folder_and_its_metrics(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", recipe, "--out", tmp_path / "other", "--set", "parameters.rank=2") == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'other'}: train_loss ")
    config = json.loads((tmp_path / "other" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 2 and not (tmp_path / "run").exists()


def test_the_run_folder_holds_the_report(recipe: Path, tmp_path: Path) -> None:
    assert run("train", recipe) == 0
    assert "<h2>Settings</h2>" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stage.0.epoch=2", 'unknown key "stage.0.epoch"'),
        ("stage.0.data.train=none.jsonl", "there is no such data file"),
        ("stage.0.data.text=body", 'line 1: there is no column "body"'),
        ("base=builtin:none", "there is no built-in base"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, message: str
) -> None:
    assert run("train", recipe, "--set", setting) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("edgetune: ") and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.toml", "train.jsonl"]


def test_models_lists_what_is_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGETUNE_CACHE", str(tmp_path))
    assert run("models") == 0
    output = capsys.readouterr().out
    assert (
        "builtin:smollm2-135m-instruct  [not fetched]" in output
        and "builtin:minilm-l6  [not fetched]" in output
    )


def test_models_refuses_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("models", "builtin:bert") == 2
    assert 'there is no built-in base "builtin:bert"' in capsys.readouterr().err


def test_a_finished_run_is_replaced_only_where_it_is_asked_for(
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("train", recipe) == 0
    before = (tmp_path / "run" / "summary.json").read_bytes()
    assert run("train", recipe, "--set", "seed=7") == 2
    assert "a finished run is there already. Add --replace" in capsys.readouterr().err
    assert (tmp_path / "run" / "summary.json").read_bytes() == before
    assert run("train", recipe, "--set", "seed=7", "--replace") == 0
    assert f"the finished run in {tmp_path / 'run'} will be replaced" in capsys.readouterr().err
    assert (tmp_path / "run" / "summary.json").read_bytes() != before
