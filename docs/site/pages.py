"""A hook of mkdocs: what the pages link to outside of docs/ comes into the site, too.

On GitHub a link is a path in the repository. The site's root is docs/, so a file outside of it gets
the place that its path names there, and links are rewritten. The README becomes `project.md`, since
docs/README.md is the front page.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
DOCS = "docs"
FENCE_OR_LINK = re.compile(
    r"^```.*?^```$|(?<=\]\()(?P<path>[^)\s#:]+)(?=[)#])", re.MULTILINE | re.DOTALL
)
RENAMED = {"README.md": "project.md"}
OUTSIDE = ["README.md", "CHANGELOG.md", "benchmarks/RESULTS.md"]  # the others: what these name
API = "reference/python-names.md"
NAMES = [
    "runtime.Runtime",
    "runtime.tasks.answers",
    "runtime.generation.settings.GenerationSettings",
    "runtime.scheduler.scheduler.Scheduler",
    "runtime.scheduler.requests",
    "devices",
    "recipe.read.load_recipe",
    "recipe.runs.plan_runs",
    "training.run_recipe",
    "training.many",
    "bulk.ray_trainings.train_by_ray",
    "export.bundle.export_bundle",
    "quantisation.precision.Precision",
    "core.errors",
]


came_from: dict[str, str] = {}  # place in the site -> path in the repository, outside of docs/


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages outside of docs/, each file that a page links to, and the names' docstrings."""
    waiting = [*OUTSIDE]
    for file in files.documentation_pages():
        waiting += linked(f"{DOCS}/{file.src_uri}", Path(file.abs_src_path).read_text("utf-8"))
    while waiting:
        path = waiting.pop()
        if path.startswith(f"{DOCS}/") or place(path) in came_from or not (ROOT / path).is_file():
            continue  # a link to nothing is left to mkdocs, which reports it
        came_from[place(path)] = path
        text = (ROOT / path).read_text("utf-8")
        files.append(File.generated(config, place(path), content=text))
        if path.endswith(".md"):
            waiting += linked(path, text)
    files.append(File.generated(config, API, content="\n".join(names_page())))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links as the site has them; what stands in a fenced block is no link."""
    here = page.file.src_uri
    source = came_from.get(here, f"{DOCS}/{here}")

    def moved(found: re.Match[str]) -> str:
        if not found["path"]:
            return found[0]
        return posixpath.relpath(
            place(target(source, found["path"])), posixpath.dirname(here) or "."
        )

    return FENCE_OR_LINK.sub(moved, markdown)


def linked(source: str, text: str) -> list[str]:
    """The repository's paths that a page names in its links."""
    return [target(source, link) for link in FENCE_OR_LINK.findall(text) if link]


def target(source: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def place(path: str) -> str:
    """Where a file of the repository lies in the site."""
    return RENAMED.get(path, path.removeprefix(f"{DOCS}/"))


def names_page() -> list[str]:
    """A page for mkdocstrings: the docstring of each public name, read without importing it."""
    page = ["# The Python API, name by name", ""]
    page += ["Made from the docstrings; [the Python API](python-api.md) is where to begin.", ""]
    for name in NAMES:
        page += [f"::: edgetune.{name}", ""]
    return page
