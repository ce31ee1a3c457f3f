"""Recipes and `--set` values beyond what a parser takes: one line, no other exception."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgetune.core.errors import RecipeError
from edgetune.recipe.read import load_recipe

GOOD = 'base = "builtin:minilm-l6"\n[[stage]]\nmethod = "sequence-classification"\n'
GOOD += 'data = { train = "t.jsonl" }\n'
FILES = {
    "lists nested 5000 deep": ("a = " + "[" * 5000, "nested too deeply"),
    "tables nested 5000 deep": ("a = " + "{a = " * 5000, "nested too deeply"),
    "5000 digits": ("seed = " + "9" * 5000 + "\n" + GOOD, "an integer has too many digits"),
    "4000 digits": ("seed = " + "9" * 4000 + "\n" + GOOD, "seed has a wrong value"),
    "a float of 400 digits": (GOOD + "epochs = " + "9" * 400, "epochs has a wrong value"),
    "more threads than any machine has": ("threads = 2000\n" + GOOD, "threads is out of range"),
    "not a number": (GOOD + "epochs = nan", "epochs has a wrong value"),
    "keys nested 5000 deep": (".".join("a" * 5000) + " = 1\n" + GOOD, 'unknown key "a"'),
    "a key of a megabyte": ("k" * 1_000_000 + " = 1\n" + GOOD, 'unknown key "kkk'),
    "a name of a thousand bytes": (GOOD.replace("t.jsonl", "t" * 1000), "can be no path"),
    "a NUL in a path": (GOOD.replace("t.jsonl", "t\\u0000"), "can be no path"),
    "a long base": (GOOD.replace("builtin:minilm-l6", "b" * 1000), "base can be no path"),
}
SETTINGS = {
    "5000 digits": ("seed=" + "9" * 5000, "an integer has too many digits"),
    "more than 64 bits": ("seed=99999999999999999999", "seed has a wrong value"),
    "nested 5000 deep": ("seed=" + "[" * 5000, "nested too deeply"),
    "nested 5000 deep and closed": ("seed=" + "[" * 5000 + "]" * 5000, "nested too deeply"),
    "10^400": ("parameters.alpha=1" + "0" * 400, "parameters.alpha has a wrong value"),
    "a second line": ("seed=1\nbase='y'", "one --set changes one setting"),
    "a line break in a text": ("device=a\nb", "device has a wrong value"),
    "a stage of 5000 digits": ("stage." + "9" * 5000 + ".epochs=1", "no stage"),
    "a line break in the key": ("se\ned=1", "unknown key"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_recipe_beyond_the_limits_is_one_short_line(case: str, tmp_path: Path) -> None:
    text, message = FILES[case]
    (path := tmp_path / "r.toml").write_text(text)
    with pytest.raises(RecipeError) as refused:
        load_recipe(path)
    line = str(refused.value)
    assert message in line and "\n" not in line and len(line) < 800 + len(str(path))


@pytest.mark.parametrize("case", SETTINGS)
def test_a_setting_beyond_the_limits_is_one_short_line(case: str, tmp_path: Path) -> None:
    setting, message = SETTINGS[case]
    (path := tmp_path / "r.toml").write_text(GOOD)
    with pytest.raises(RecipeError) as refused:
        load_recipe(path, [setting])
    line = str(refused.value)
    assert message in line and "\n" not in line and len(line) < 800 + len(str(path))


def test_an_unknown_key_gets_the_nearest_name_and_no_list(tmp_path: Path) -> None:
    (path := tmp_path / "r.toml").write_text(GOOD + "lerning_rate = 1e-3\n")
    with pytest.raises(RecipeError) as refused:
        load_recipe(path)
    assert str(refused.value) == (
        f'{path}: unknown key "stage.0.lerning_rate". Did you mean "learning_rate"?'
    )


def test_a_path_of_a_setting_is_of_the_current_folder_where_it_exists_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("recipes", "here"):
        (tmp_path / folder).mkdir()
    (path := tmp_path / "recipes" / "r.toml").write_text(GOOD)
    (tmp_path / "here" / "own.jsonl").write_text("")
    monkeypatch.chdir(tmp_path / "here")
    train = [
        load_recipe(path, [f"stage.0.data.train={name}"]).stage[0].data.train
        for name in ("own.jsonl", "other.jsonl")
    ]
    assert train == [
        str(tmp_path / "here" / "own.jsonl"),
        str(tmp_path / "recipes" / "other.jsonl"),
    ]
