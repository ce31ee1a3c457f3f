"""The report page and the progress line."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from training_helpers import sft_recipe, silent

from edgetune.core.progress import Progress, duration
from edgetune.core.tasks import BEST_BY, WEIGHTED_BEST_BY
from edgetune.report.answers import confidence_section
from edgetune.report.charts import Series, line_chart, number, ticks
from edgetune.report.html import PLOTTED
from edgetune.report.run_page import write_report
from edgetune.training import run_recipe


@pytest.fixture(scope="module")
def page(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    recipe = sft_recipe(tiny_decoder, folder)
    run_recipe(recipe, out=folder / "run", progress=silent(), write_more=write_report)
    return (folder / "run" / "report.html").read_text()


def test_the_page_needs_nothing_from_outside(page: str) -> None:
    assert not re.search(r"https?://|<script|<link|<img|url\(", page)


def test_the_page_follows_light_and_dark(page: str) -> None:
    assert "prefers-color-scheme: dark" in page


def test_the_page_shows_losses_metrics_and_learning_rate(page: str) -> None:
    for words in (
        "training",
        "validation",
        "Learning rate",
        "Validation perplexity",
        "mean KL divergence",
    ):
        assert words in page


def test_the_page_lists_every_setting_and_origin(page: str) -> None:
    for words in ("parameters.rank", "stage.0.learning_rate", "sha256:", "versions"):
        assert words in page


def test_every_picture_is_well_formed_and_inside_its_frame(page: str) -> None:
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(pictures) == 4
    for picture in pictures:
        root = ET.fromstring(picture)
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        points = [p for line in root.iter("polyline") for p in line.attrib["points"].split()]
        assert points and all(
            0 <= float(x) <= width and 0 <= float(y) <= height
            for x, y in (p.split(",") for p in points)
        )


def test_every_metric_that_weights_are_kept_by_is_drawn() -> None:
    kept = {*WEIGHTED_BEST_BY, *(name for names in BEST_BY.values() for name in names)}
    assert kept - {*PLOTTED} == {"reward"}  # which has a picture of its own


def test_answers_to_each_label_are_not_called_rows() -> None:
    curve = [{"answered": 1.0, "score": 0.5, "right": 0.5}]
    summary: dict[str, Any] = {
        "task": "sequence-classification",
        "data": [{"rows": {"validation": 40}}],
        "analysis": {"reliability": [{"score": 0.5, "right": 0.5}], "coverage": curve},
        "confidence": {
            "rows": 160,
            "temperature": 1.5,
            "threshold": None,
            "expected_calibration_error_before": 0.1,
            "expected_calibration_error": 0.05,
        },
    }
    page = "".join(confidence_section(summary))
    assert "On 160 answers to 40 validation rows, a yes or no for each label: " in page
    summary["confidence"]["rows"] = 40
    assert "On 40 validation rows: " in "".join(confidence_section(summary))


def test_a_chart_without_points_is_left_out() -> None:
    assert line_chart("empty", [Series("none", []), Series("nan", [(1.0, float("nan"))])]) == ""


def test_a_chart_of_one_point_or_a_flat_line_is_drawn() -> None:
    assert "circle" in line_chart("one", [Series("a", [(1.0, 2.0)])])
    assert "polyline" in line_chart("flat", [Series("a", [(1.0, 0.0), (2.0, 0.0)])])


def test_names_are_escaped() -> None:
    assert "<b>" not in line_chart("<b>", [Series("<b>", [(0, 1)]), Series("c", [(1, 2)])])


def test_ticks_are_round_and_cover_the_range() -> None:
    assert ticks(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(0.13, 0.87, 5)[0] <= 0.13 and ticks(0.13, 0.87, 5)[-1] >= 0.87
    assert [number(v) for v in (0, 0.0002, 0.25, 1500, 2e6)] == [
        "0",
        "2e-4",
        "0.25",
        "1,500",
        "2e6",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_live_line() -> None:
    terminal, now = Terminal(), iter(range(100))
    progress = Progress(terminal, clock=lambda: float(next(now)))
    progress.step(1, 10, loss=2.0, tokens_per_second=1234.0, seconds=6.0)
    progress.step(2, 10, loss=1.0, tokens_per_second=1234.0, seconds=12.0)
    progress.close()
    assert terminal.getvalue().count("\n") == 1
    assert "\rstep 2/10  loss 1.0000  1,234 tokens/s  48s left" in terminal.getvalue()


def test_a_file_gets_plain_lines_now_and_then_and_the_last_one() -> None:
    file, now = io.StringIO(), iter(range(100))
    progress = Progress(file, clock=lambda: float(next(now)))
    for step in range(1, 13):
        progress.step(step, 12, loss=1.0, tokens_per_second=1.0, seconds=1.0)
    steps = [line.split()[1] for line in file.getvalue().splitlines()]
    assert steps == ["1/12", "11/12", "12/12"]
    assert "\r" not in file.getvalue()


def test_durations_are_for_people() -> None:
    assert [duration(s) for s in (4.4, 65, 3725)] == ["4s", "1m05s", "1h02m"]
