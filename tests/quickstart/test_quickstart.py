"""The quickstart: its data sets, and the whole road on tiny bases."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edgetune.adapters.lora import adapter_off
from edgetune.cli.quickstart import conclude
from edgetune.core.errors import OutputError
from edgetune.data.rows import read_rows, spread
from edgetune.evaluation.torch_answers import TorchAnswers
from edgetune.quickstart.fewshot import FewShotBase
from edgetune.quickstart.outcome import Outcome, percent, result_lines
from edgetune.quickstart.page import render_quickstart
from edgetune.quickstart.plan import QuickstartPlan, QuickstartTask, data_file, embedded_plan
from edgetune.quickstart.run import run_quickstart

COLUMNS = {
    "home": {"request", "action"},
    "support": {"text", "label"},
    "urgency": {"text", "label"},
}
KEYS = ["action", "device", "room", "value"]


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("part", ["train", "test"])
def test_every_row_has_the_columns_as_filled_strings(name: str, part: str) -> None:
    for row in rows_of(name, part):
        assert set(row) == COLUMNS[name] and all(
            isinstance(value, str) and value.strip() for value in row.values()
        )


@pytest.mark.parametrize("name", COLUMNS)
def test_no_text_is_in_train_and_test_nor_twice(name: str) -> None:
    column = "request" if name == "home" else "text"
    train, test = (
        [plain(row[column]) for row in rows_of(name, part)] for part in ("train", "test")
    )
    assert not set(train) & set(test)
    assert len(set(train)) == len(train) and len(set(test)) == len(test)


@pytest.mark.parametrize("name", ["support", "urgency"])
def test_labels_are_balanced_and_the_same_in_both_files(name: str) -> None:
    for part in ("train", "test"):
        labels = [row["label"] for row in rows_of(name, part)]
        assert len({labels.count(label) for label in labels}) == 1
    assert {row["label"] for row in rows_of(name, "train")} == {
        row["label"] for row in rows_of(name, "test")
    }


@pytest.mark.parametrize("part", ["train", "test"])
def test_actions_are_flat_json_with_keys_in_order(part: str) -> None:
    for row in rows_of("home", part):
        action = json.loads(row["action"])
        assert json.dumps(action) == row["action"]
        assert list(action) == [key for key in KEYS if key in action] and "action" in action
        assert all(
            isinstance(value, int if key == "value" and action["action"] != "play" else str)
            for key, value in action.items()
        )


def test_the_calls_are_in_no_data_file() -> None:
    for task in embedded_plan().tasks:
        known = {
            plain(next(iter(row.values())))
            for part in ("train", "test")
            for row in rows_of(task.name, part)
        }
        assert not known & {plain(call) for call in task.calls}


def test_the_recipes_read_the_installed_data() -> None:
    for task in embedded_plan().tasks:
        data = task.recipe.stage[0].data
        assert (
            Path(data.train) == data_file(f"{task.name}_train.jsonl")
            and Path(data.validation or "") == task.test
        )


@pytest.fixture(scope="module")
def plan(
    tiny_decoder: Path, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> QuickstartPlan:
    """The embedded plan on tiny bases, a few steps and rows; fp32, because random weights do not
    survive rounding.
    """
    limits = [
        "stage.0.max_steps=4",
        "stage.0.data.limit=48",
        "stage.0.learning_rate=1e-2",
        "threads=1",
    ]
    plan = embedded_plan(
        decoder=str(tiny_decoder),
        encoder=str(tiny_encoder),
        overrides=[*limits, "stage.0.precision=fp32"],
    )
    folder = tmp_path_factory.mktemp("quickstart-data")
    shipments = tuple(
        replace(s, precision="fp32", tasks=tuple(shortened(task, folder) for task in s.tasks))
        for s in plan.shipments
    )
    return replace(plan, shipments=shipments, requests=3, prompt_tokens=16, new_tokens=4)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart") / "out"


@pytest.fixture(scope="module")
def outcome(plan: QuickstartPlan, out: Path) -> Outcome:
    return run_quickstart(plan, out, stream=io.StringIO())


def test_the_road_leads_to_runs_bundles_results_and_a_report(outcome: Outcome, out: Path) -> None:
    assert {path.name for path in out.iterdir()} == {
        "runs",
        "bundles",
        "results.json",
        "report.html",
    }
    assert {path.name for path in (out / "runs").iterdir()} == {"home", "support", "urgency"}
    assert {path.name for path in (out / "bundles").iterdir()} == {"smollm2", "minilm"}
    assert (
        json.loads((out / "results.json").read_text())["shipments"][1]["adapters"][0]["name"]
        == "support"
    )


def test_every_adapter_is_proved_measured_and_called(outcome: Outcome) -> None:
    adapters = [adapter for shipment in outcome.shipments for adapter in shipment.adapters]
    assert [adapter.name for adapter in adapters] == ["home", "support", "urgency"]
    for adapter in adapters:
        assert adapter.proof["passed"] and adapter.rows == 6 and adapter.calls
        assert adapter.torch_score == adapter.bundle_score  # fp32: the same answers


def test_the_table_has_a_row_for_each_adapter(outcome: Outcome) -> None:
    lines = result_lines(outcome)
    assert len(lines) == 2 + 3 + 1
    assert re.search(r"^home .* exact match, 6 rows .* TTFT .* tokens/s", lines[2])
    assert re.search(r"^support .* accuracy, 6 rows .* ms", lines[3])


def test_the_page_is_self_contained_and_shows_every_adapter(outcome: Outcome) -> None:
    page = render_quickstart(outcome)
    assert (
        not re.search(r"(?:src|href)=|@import|url\(", page) and "prefers-color-scheme: dark" in page
    )
    for adapter in outcome.shipments[1].adapters:
        assert f"{adapter.name}: loss" in page and percent(adapter.bundle_score) in page


def test_the_command_ends_with_the_table_and_the_report(
    outcome: Outcome, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert conclude(outcome, out) == 0
    printed = capsys.readouterr().out
    assert "urgency" in printed and "peak memory" in printed and str(out / "report.html") in printed


def test_an_exceeded_budget_is_a_failure_and_a_noisy_one_is_not(outcome: Outcome) -> None:
    shipment = outcome.shipments[0]
    verdicts = [{**shipment.verdicts[0], "state": state} for state in ("ok", "noisy", "over")]
    changed = replace(outcome, shipments=(replace(shipment, verdicts=verdicts),))
    assert len(changed.failures) == 1 and changed.failures[0].startswith("smollm2: ttft_ms")
    assert conclude(changed, Path("out")) == 1
    assert "exceeded" in render_quickstart(changed)


def test_a_folder_with_other_files_is_left_alone(plan: QuickstartPlan, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"thesis\.txt"):
        run_quickstart(plan, tmp_path, stream=io.StringIO())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_shared_prefix_changes_no_answer(
    plan: QuickstartPlan, outcome: Outcome, out: Path
) -> None:
    adapted = TorchAnswers.open(out / "runs" / "home")
    base = FewShotBase(adapted, spread(read_rows(plan.tasks[0].test).rows, 1))
    questions = ["dim the hall", "stop"]
    assert base.generate(questions) == [slow_answer(base, question) for question in questions]


@pytest.mark.slow
def test_the_real_road_keeps_what_the_readme_says(tmp_path: Path) -> None:
    outcome = run_quickstart(embedded_plan(), tmp_path / "out", stream=io.StringIO())
    home, support, urgency = [
        adapter for shipment in outcome.shipments for adapter in shipment.adapters
    ]
    assert home.bundle_score >= 0.8 > 0.4 > home.base_score
    assert support.bundle_score > support.base_score and urgency.bundle_score > urgency.base_score
    assert outcome.peak_rss_mb < 4000


def rows_of(name: str, part: str) -> list[dict[str, Any]]:
    return [row.values for row in read_rows(data_file(f"{name}_{part}.jsonl")).rows]


def plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def shortened(task: QuickstartTask, folder: Path) -> QuickstartTask:
    """The task measured on the first six held-out rows, with one short example for the base."""
    test = folder / f"{task.name}.jsonl"
    test.write_text(
        "".join(task.test.read_text(encoding="utf-8").splitlines(keepends=True)[:6]),
        encoding="utf-8",
    )
    stage = task.recipe.stage[0]
    stage = replace(stage, data=replace(stage.data, validation=str(test)))
    return replace(task, test=test, recipe=replace(task.recipe, stage=(stage,)), shots=1)


@torch.no_grad()
def slow_answer(base: FewShotBase, question: str) -> str:
    """Without cache, batch and padding: one forward pass over the whole text for each token."""
    ids = [
        *base.prefix,
        *base.tokenizer(base.SHOT.format(question), add_special_tokens=False)["input_ids"],
    ]
    start = len(ids)
    with adapter_off(base.model):
        while len(ids) - start < base.max_new_tokens and (
            len(ids) == start or ids[-1] not in base.ends
        ):
            ids.append(int(base.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    text: str = base.tokenizer.decode(ids[start:], skip_special_tokens=True)
    return text.strip().split("\n", 1)[0]
