"""A finished run is replaced only where `--replace` asks for it, and that is said."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_cli_train import recipe, run

__all__ = ["recipe"]


def test_a_finished_run_is_replaced_only_where_it_is_asked_for(
    recipe: Path,  # noqa: F811 - the fixture
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
