"""What the README and the pages in docs say holds: links, commands, recipes, imports, paths, the
tree.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from edgetune.cli import COMMANDS, cli
from edgetune.recipe.read import recipe_from_dict

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "benchmarks" / "RESULTS.md",
    ROOT / "benchmarks" / "SPEED.md",
    ROOT / "examples" / "clients" / "README.md",
    ROOT / "examples" / "browser" / "README.md",
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in this language."""
    return [text for found, text in FENCE.findall(page.read_text()) if found == language]


def anchors(page: Path) -> set[str]:
    """What a link may name after `#`: the headings as GitHub writes them."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pages
def test_a_link_leads_to_a_file_and_a_heading_that_are_there(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if not link.startswith(("http://", "https://")):
            path, _, heading = link.partition("#")
            to = (page.parent / path).resolve() if path else page
            assert to.is_file(), f"{link}: no such file"
            assert not heading or heading in anchors(to), f"{link}: no such heading"


def shown_commands(page: Path) -> Iterator[tuple[list[str], bool]]:
    """The words after `edgetune`, and whether the command stands in a block, to be run as it is."""
    text = FENCE.sub("", page.read_text())
    lines = "\n".join(re.findall(r"^ {4}(.*)$", text, re.MULTILINE)).replace("\\\n", " ")
    for line in lines.splitlines():
        if re.match(r"(edgetune|torchrun|accelerate) ", line):
            words = shlex.split(line, comments=True)
            yield words[words.index("edgetune") + 1 :], True
    for span in re.findall(r"`edgetune ([^`]+)`", text):
        yield shlex.split(span), False


def parse(words: list[str], *, whole: bool) -> None:
    """UsageError for a command, option or choice that there is not; `whole`: or lacks something."""
    assert words[0] in COMMANDS, f"edgetune {words[0]}: no such command"
    command = cli.get_command(click.Context(cli), words[0])
    assert command is not None
    context = click.Context(command, info_name=words[0])
    given, _, _ = command.make_parser(context).parse_args([*words[1:]])
    for parameter in command.params:
        value = given.get(parameter.name)
        if whole and parameter.required:
            assert isinstance(value, str | list | tuple), f"{words}: {parameter.name} is missing"
        if isinstance(parameter.type, click.Choice) and isinstance(value, str):
            parameter.type.convert(value, parameter, context)


@pages
def test_a_command_that_is_shown_can_be_given(page: Path) -> None:
    for words, whole in shown_commands(page):
        if not {"--help", "[OPTIONS]"} & {*words}:
            with contextlib.nullcontext() if whole else contextlib.suppress(click.BadOptionUsage):
                parse([word for word in words if word != "…"], whole=whole)


@pytest.mark.parametrize("line", ["trian x.toml", "train", "export --out B --precision int5"])
def test_a_command_that_cannot_be_given_is_found(line: str) -> None:
    with pytest.raises((AssertionError, click.UsageError)):
        parse(shlex.split(line), whole=True)


@pages
def test_a_recipe_that_is_shown_can_be_read(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGETUNE_DATASETS", str(tmp_path))
    for text in blocks(page, "toml"):
        assert recipe_from_dict(tomllib.loads(text), folder=tmp_path).stage


@pages
def test_what_a_python_block_imports_from_edgetune_is_there(page: Path) -> None:
    for text in blocks(page, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("edgetune"):
                module = importlib.import_module(node.module or "")
                assert [name.name for name in node.names if not hasattr(module, name.name)] == []


@pages
def test_a_source_file_that_is_named_is_there(page: Path) -> None:
    for path in re.findall(r"`([\w.-]+(?:/[\w.-]+)+\.(?:py|toml))`", page.read_text()):
        if not path.startswith(("shop/", "runs/")):  # the reader's own
            assert (ROOT / path).is_file(), path


def test_the_measured_results_are_figures_with_at_most_200_lines_of_prose() -> None:
    lines = (ROOT / "benchmarks" / "RESULTS.md").read_text().splitlines()
    prose = [line for line in lines if line and not line.startswith(("|", "#", "    "))]
    assert len(prose) <= 200 and max(map(len, prose)) <= 100


def test_the_readme_has_a_sentence_for_every_room_and_at_most_90_lines() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 90
    for room in sorted(path.parent for path in (ROOT / "edgetune").glob("*/__init__.py")):
        docstring = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
        sentence = " ".join(docstring.split("\n\n")[0].split())
        shown = [line.split("/", 1)[1].strip() for line in lines if f" {room.name}/" in f" {line}"]
        assert sentence in shown, f"{room.name}/  {sentence}"
