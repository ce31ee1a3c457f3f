"""The reference page of the command line is what the commands say."""

from __future__ import annotations

from pathlib import Path

from edgetune.cli.reference_page import command_line_page

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "command-line.md"


def test_the_page_in_docs_is_the_one_the_code_makes() -> None:
    assert PAGE.read_text(encoding="utf-8") == command_line_page()
