"""The reference page is what the code says."""

from __future__ import annotations

from pathlib import Path

from edgetune.recipe.reference_page import reference_page

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "recipe.md"


def test_the_page_in_docs_is_the_one_the_code_makes() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference_page()
