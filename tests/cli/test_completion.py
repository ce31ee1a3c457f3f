"""The Tab key: what click writes for a shell, and what it proposes."""

from __future__ import annotations

import subprocess
import sys

import pytest

RUN = "from edgetune.cli import main; main([])"


def complete(instruction: str, words: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        env={
            "_EDGETUNE_COMPLETE": instruction,
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
            "PYTHONPATH": ":".join(sys.path),
            "PATH": "/usr/bin:/bin",
        },
        capture_output=True,
        text=True,
    )
    assert done.stderr == "", done.stderr
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_told_how_to_complete(shell: str) -> None:
    script = complete(f"{shell}_source")
    assert f"_EDGETUNE_COMPLETE={shell}_complete" in script


@pytest.mark.parametrize(
    "words, proposed",
    [
        ("edgetune ex", ["plain,export"]),
        ("edgetune export --precision int", ["plain,int8", "plain,int4"]),
        ("edgetune check --aga", ["plain,--against"]),
        ("edgetune check b", ["file,b"]),
    ],
)
def test_commands_options_and_choices_are_proposed(words: str, proposed: list[str]) -> None:
    assert complete("bash_complete", words).split() == proposed
