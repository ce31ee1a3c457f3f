"""`edgetune report`: several runs on one page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
from training_helpers import sft_recipe, silent

from edgetune.cli import main
from edgetune.core.errors import InputError
from edgetune.recipe.runs import short_names
from edgetune.report.comparison import read_runs, render_comparison
from edgetune.training import run_recipe


@pytest.fixture(scope="module")
def runs(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two that differ in rank and learning rate; the second has two stages."""
    folder = tmp_path_factory.mktemp("compared")
    one = sft_recipe(tiny_decoder, folder)
    other = sft_recipe(tiny_decoder, folder, learning_rate=1e-3, parameters={"rank": 2})
    run_recipe(one, out=folder / "first", progress=silent())
    run_recipe(replace(other, stage=other.stage * 2), out=folder / "<b>", progress=silent())
    return [folder / "first", folder / "<b>"]


@pytest.fixture(scope="module")
def page(runs: list[Path]) -> str:
    return render_comparison(read_runs(runs))


def table(page: str, title: str) -> list[list[str]]:
    """The cells of the table below a heading, as text."""
    found = re.search(rf"<h2>{title}</h2><div class=\"wide\">(<table>.*?</table>)", page)
    assert found is not None
    rows = re.findall(r"<tr>(.*?)</tr>", found.group(1))
    return [
        [re.sub(r"<.*?>", "", cell) for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row)]
        for row in rows
    ]


def test_the_settings_that_differ_stand_side_by_side(page: str) -> None:
    heads, *rows = table(page, "Settings that differ")
    assert heads == ["setting", "first", "&lt;b&gt;"]
    values = {row[0]: row[1:] for row in rows}
    assert values["parameters.rank"] == ["8", "2"]
    assert values["stage.0.learning_rate"] == ["0.01", "0.001"]
    assert values["stage.1.learning_rate"] == ["–", "0.001"]
    assert not {"seed", "out", "stage.0.epochs", "base digest"} & set(values)


def test_the_results_are_those_of_the_summaries(page: str, runs: list[Path]) -> None:
    heads, *rows = table(page, "Results")
    for run, cells in zip(runs, rows, strict=True):
        summary, row = (
            json.loads((run / "summary.json").read_text()),
            dict(zip(heads, cells, strict=True)),
        )
        assert row["loss"] == f"{summary['metrics']['loss']:.4g}"
        assert row["tokens/s"] == f"{summary['tokens_per_second']:,.0f}"
        assert row["peak memory"] == f"{summary['peak_rss_mb']:,.0f} MB"
        assert row["steps"] == str(6 if run.name == "first" else 12)


def test_the_best_of_a_metric_is_bold(page: str, runs: list[Path]) -> None:
    losses = [json.loads((run / "summary.json").read_text())["metrics"]["loss"] for run in runs]
    assert f'<td class="number best">{min(losses):.4g}</td>' in page
    assert f'<td class="number">{max(losses):.4g}</td>' in page


def test_the_loss_curves_lie_over_each_other(page: str) -> None:
    pictures = re.findall(r"<figure>.*?</figure>", page, re.DOTALL)
    assert [
        re.sub(r"<span.*", "", re.findall(r"<figcaption>(.*?)</figcaption>", picture)[0])
        for picture in pictures
    ] == ["Training loss", "Training loss by time", "Validation loss", "Validation token accuracy"]
    for picture in pictures:
        lines = list(ET.fromstring(re.findall(r"<svg.*?</svg>", picture)[0]).iter("polyline"))
        assert [line.attrib["class"] for line in lines] == ["line c1", "line c2"]
        ends = [
            [tuple(map(float, p.split(","))) for p in line.attrib["points"].split()]
            for line in lines
        ]
        assert all(0 <= x <= 460 and 0 <= y <= 260 for points in ends for x, y in points)
        if "time" not in picture:
            assert ends[1][-1][0] > ends[0][-1][0]  # two stages end further to the right than one


def test_an_interval_stands_behind_its_figure(runs: list[Path]) -> None:
    first, other = read_runs(runs)
    metrics = {
        "preference_accuracy": 0.7,
        "preference_accuracy_low": 0.6,
        "preference_accuracy_high": 0.8,
        "reward": 1.0,
    }
    record = {"kind": "validation", "stage": 0, "step": 6, **metrics}
    better = {**metrics, "preference_accuracy": 0.75, "reward": 0.5}
    shown = render_comparison(
        [
            replace(
                first,
                summary={**first.summary, "metrics": metrics},
                records=[*first.records, record],
            ),
            replace(other, summary={**other.summary, "metrics": better}),
        ]
    )
    heads, row, _ = table(shown, "Results")
    assert heads[:4] == ["run", "preference accuracy", "reward", "training loss"]
    assert row[1] == "70.00 % (60.00 % to 80.00 %)"
    assert (
        '<td class="number best">75.00 % (60.00 % to 80.00 %)</td><td class="number">0.5</td>'
        in shown
    )
    assert "Validation preference accuracy<" in shown and "accuracy low" not in shown


def test_the_page_stands_alone_and_escapes_names(page: str) -> None:
    assert not re.search(r"https?://|<script|<link|<img|url\(", page)
    assert "<b>" not in page and "prefers-color-scheme: dark" in page


def test_names_are_as_short_as_they_can_be(tmp_path: Path) -> None:
    assert short_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert short_names([tmp_path / "x" / "run", tmp_path / "y" / "run"]) == ["x/run", "y/run"]


def test_a_run_is_shown_once(runs: list[Path]) -> None:
    assert [run.name for run in read_runs([runs[0], runs[0].parent / "." / "first"])] == ["first"]
    assert "alone" in render_comparison(read_runs(runs[:1]))


def test_what_is_no_run_is_named(tmp_path: Path, runs: list[Path]) -> None:
    with pytest.raises(
        InputError,
        match=r"nothing: this is not a finished run \(expected recipe\.toml, summary\.json",
    ):
        read_runs([runs[0], tmp_path / "nothing"])
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name in ("recipe.toml", "summary.json", "metrics.jsonl"):
        (damaged / name).write_text((runs[0] / name).read_text()[:-5])
    with pytest.raises(InputError, match="damaged: this run cannot be read"):
        read_runs([damaged])


def test_the_command_writes_the_page_without_torch(runs: list[Path], tmp_path: Path) -> None:
    code = (
        f"import sys; from edgetune.cli import cli\ncli.main(['report', {str(runs[0])!r},"
        f" {str(runs[1])!r}, '--out', {str(tmp_path / 'page.html')!r}],"
        " standalone_mode=False)\nassert not {'torch', 'transformers', 'peft'} &"
        " set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (
        0,
        f"2 runs compared in {tmp_path / 'page.html'}\n",
    ), done.stderr
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_a_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and "not a finished run" in error
    assert not (tmp_path / "page.html").exists()
