"""The documentation as a site: no dead link, and nothing asked of anybody else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
pytest.importorskip("material", reason="the extra `docs` is not installed")
ROOT = Path(__file__).parents[1]


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(site)],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )


def test_the_site_has_no_dead_link_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    done = build(ROOT / "mkdocs.yml", tmp_path)
    assert done.returncode == 0, done.stderr
    loaded = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*(?:src|href)=\"?(?:https?:)?//")
    pages = {
        path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")
    }
    assert {"index.html", "project.html", "tutorial.html", "benchmarks/RESULTS.html"} <= {*pages}
    assert [name for name, text in pages.items() if loaded.search(text)] == []
    assert [
        p for p in tmp_path.rglob("*.css") if re.search(r"url\(.?(?:https?:)?//", p.read_text())
    ] == []
    assert 'href="benchmarks/RESULTS.html' in pages["index.html"]
    assert "Open a bundle." in pages["reference/python-names.html"]


def test_a_dead_link_stops_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "README.md").write_text(
        "# A\n\n[there](../benchmarks/RESULTS.md) [gone](../benchmarks/GONE.md) [h](#none)\n"
    )
    config = f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: docs\nnav: []\nplugins: []\n"
    (tmp_path / "mkdocs.yml").write_text(
        config + f"hooks: [{ROOT / 'docs' / 'site' / 'pages.py'}]\n"
    )
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    front = [line for line in done.stderr.splitlines() if "'README.md' contains a link" in line]
    assert done.returncode == 1 and len(front) == 2, done.stderr
    assert "benchmarks/GONE.md" in front[0] and "#none" in front[1]
