"""`edgetune report`: task gain against general loss over several runs, as one picture."""

from __future__ import annotations

import itertools
import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from training_helpers import sft_recipe, silent

from edgetune.report.comparison import FinishedRun, read_runs, render_comparison
from edgetune.report.gain_against_loss import ComparedRun as Subject
from edgetune.report.gain_against_loss import measured, places, plane, shared_sets, task_metric
from edgetune.training import run_recipe


def general(task: str, metric: str, before: float, change: float, half: float) -> dict[str, Any]:
    """An entry of `forgetting` in summary.json."""
    return {
        "task": task,
        "metric": metric,
        "higher_is_better": metric != "perplexity",
        "items": 100,
        "before": before,
        "after": before + change,
        "change": change,
        "low": change - half,
        "high": change + half,
    }


def summary(gain: float, lost: float, *, perplexity: float = 0.0) -> dict[str, Any]:
    return {
        "metrics": {"loss": 1.0, "exact_match": 0.1 + gain},
        "base_metrics": {"loss": 2.0, "exact_match": 0.1},
        "forgetting": [
            general("wikitext2", "perplexity", 20.0, perplexity, 0.2),
            general("wikitext2", "bits_per_byte", 1.0, 0.0, 0.1),
            general("lambada", "accuracy", 0.4, -lost, 0.03),
            general("piqa", "accuracy", 0.6, -2 * lost, 0.04),
            general("piqa", "accuracy_norm", 0.6, 0.5, 0.04),
        ],
    }


RUNS = {
    "full": summary(0.8, 0.1, perplexity=6.0),
    "lora": summary(0.7, 0.02, perplexity=1.0),
    "lora+replay": summary(0.69, -0.01),
}
SUBJECTS = [
    Subject(name, color, values) for color, (name, values) in enumerate(RUNS.items(), start=1)
]


def test_a_run_lies_at_its_gain_and_the_mean_of_its_general_changes() -> None:
    full, lora, replayed = places(SUBJECTS, "points")
    assert shared_sets(SUBJECTS, "points") == [
        "lambada accuracy",
        "piqa accuracy",
    ]  # one metric a set
    assert (full.gain, lora.gain, replayed.gain) == pytest.approx((80, 70, 69))
    assert (full.change, lora.change, replayed.change) == pytest.approx((-15, -3, 1.5))
    half = math.sqrt(3.0**2 + 4.0**2) / 2
    assert (full.low, full.high) == pytest.approx((-15 - half, -15 + half))
    worse, *_ = places(SUBJECTS, "%")
    assert worse.change == pytest.approx(-30) and (worse.low, worse.high) == pytest.approx(
        (-31, -29)
    )  # 20 → 26: right is better


@pytest.mark.parametrize("unit", ["points", "%"])
def test_the_picture_shows_every_run_in_its_colour_inside_its_frame(unit: str) -> None:
    drawn = plane(SUBJECTS, unit)
    svg = ET.fromstring(re.findall(r"<svg.*?</svg>", drawn)[0])
    dots = [dot.attrib for dot in svg.iter("circle")]
    assert [dot["class"] for dot in dots] == ["dot c1", "dot c2", "dot c3"]
    assert all(62 <= float(dot["cx"]) <= 444 and 26 <= float(dot["cy"]) <= 276 for dot in dots)
    assert (
        float(dots[0]["cx"]) < float(dots[1]["cx"]) < float(dots[2]["cx"])
    )  # what forgets less lies to the right
    assert (
        float(dots[0]["cy"]) < float(dots[1]["cy"]) < float(dots[2]["cy"])
    )  # what learns more lies above
    names = [text for text in svg.iter("text") if text.attrib["class"].startswith("name")]
    assert sorted(text.text or "" for text in names) == sorted(RUNS)
    for one, other in itertools.combinations(map(box, names), 2):
        assert (
            one[1] <= other[0] or other[1] <= one[0] or abs(one[2] - other[2]) >= 12
        )  # beside or above each other
    for text, dot in itertools.product(names, dots):
        left, right, base = box(text)
        assert not (
            left < float(dot["cx"]) < right and base - 9 < float(dot["cy"]) < base
        )  # and on no point


def box(text: ET.Element) -> tuple[float, float, float]:
    """Left, right and base of a name."""
    left = float(text.attrib["x"])
    return left, left + float(text.attrib["textLength"]), float(text.attrib["y"])


def test_runs_are_placed_by_what_they_share() -> None:
    other = {**summary(0.5, 0.0), "forgetting": [general("lambada", "accuracy", 0.4, 0.0, 0.1)]}
    both = [SUBJECTS[0], Subject("other", 2, other)]
    assert shared_sets(both, "points") == ["lambada accuracy"] and places(both, "%") == []
    unknown = Subject("no base", 3, {**other, "base_metrics": None})
    assert task_metric([unknown]) is None and plane([SUBJECTS[0], unknown], "points") == ""
    assert measured([*both, Subject("none", 4, {**other, "forgetting": None})]) == both


@pytest.fixture(scope="module")
def runs(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[FinishedRun]:
    """One run in three copies with measured changes written in, and a fourth without."""
    folder = tmp_path_factory.mktemp("placed")
    run_recipe(sft_recipe(tiny_decoder, folder, epochs=1), out=folder / "run", progress=silent())
    (one,) = read_runs([folder / "run"])
    placed = [
        replace(one, name=name, summary={**one.summary, **values}) for name, values in RUNS.items()
    ]
    return [*placed, replace(one, name="<plain>")]


def test_the_page_has_the_picture_and_every_figure_of_it(runs: list[FinishedRun]) -> None:
    page = render_comparison(runs)
    section = page[
        page.index("<h2>Task gain against general loss</h2>") : page.index(
            "<h2>Settings that differ</h2>"
        )
    ]
    assert re.findall(r"<figcaption>(.*?)<span", section) == [
        "Task gain against general loss: accuracy",
        "Task gain against general loss: perplexity",
    ]
    assert (
        '<td>task exact match</td><td class="number">+80.00</td><td class="number">+70.00</td>'
        in section
    )
    assert '<th class="number"><i class="swatch c3"></i>lora+replay</th>' in section
    assert "-30.00 % (-31.00 to -29.00)" in section and "+1.00 (-2.00 to +4.00)" in section
    assert "Not measured (no [forgetting] in the recipe): &lt;plain&gt;." in section
    assert not re.search(r"https?://|<script|<plain>", page)


def test_runs_without_measurements_have_no_such_picture(runs: list[FinishedRun]) -> None:
    assert "general loss" not in render_comparison(runs[3:])


def test_a_real_runs_summary_is_what_is_read(tiny_decoder: Path, tmp_path: Path) -> None:
    """The names in summary.json are those of `General`."""
    from dataclasses import asdict, fields

    from edgetune.evaluation.forgetting.measure import General

    entry = general("lambada", "accuracy", 0.4, 0.1, 0.1)
    assert {field.name for field in fields(General)} == set(entry) and asdict(
        General(**entry)
    ) == entry
    assert json.loads(json.dumps(entry)) == entry
