"""Forgetting: log-likelihoods against transformers, the metrics by hand, intervals, runs, bundles,
and the picture.
"""

from __future__ import annotations

import gzip
import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from runtime_helpers import decoder_bundle
from scipy.stats import spearmanr
from training_helpers import intent_recipe, sft_recipe, silent

from edgetune.cli.eval import command
from edgetune.core.errors import DataError, InputError
from edgetune.evaluation.forgetting.likelihood import ChoiceItem, Score, make_item
from edgetune.evaluation.forgetting.measure import compare_general
from edgetune.evaluation.forgetting.subjects import BundleSubject, forgetting
from edgetune.evaluation.forgetting.tasks import (
    GENERAL_TASKS,
    Choices,
    LastWord,
    Texts,
    text_measures,
)
from edgetune.evaluation.forgetting.torch_subject import (
    base_subject,
    beginning,
    run_subject,
    score_items,
)
from edgetune.metrics.statistics import Z as Z95
from edgetune.metrics.statistics import mean, paired_interval, perplexity, spearman
from edgetune.models.base import open_folder
from edgetune.models.load import load_body, load_tokenizer
from edgetune.recipe.schema import Forgetting
from edgetune.report.forgetting import Gain, general_changes, picture, task_changes
from edgetune.report.run_page import write_report
from edgetune.runtime import Runtime
from edgetune.training import run_recipe

QUESTION = {
    "query": "Question: what is brown?",
    "choices": ["the fox", "a dog", "the lights are on"],
    "gold": 0,
}


def write_gz(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


@pytest.fixture(scope="module")
def general(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small sets under the real names."""
    folder = tmp_path_factory.mktemp("data") / "general_ability"
    questions = [
        {**QUESTION, "query": f"Question {n}: what is brown?", "gold": n % 3} for n in range(12)
    ]
    for name in ("piqa", "hellaswag", "arc_easy"):
        write_gz(folder / GENERAL_TASKS[name].file, [*questions])
    words = [{"context": f"The quick brown {n}", "continuation": "fox"} for n in range(8)]
    write_gz(folder / GENERAL_TASKS["lambada"].file, [*words])
    (folder / GENERAL_TASKS["wikitext2"].file).write_bytes(
        gzip.compress(b"The quick brown fox jumps over the lazy dog. " * 40)
    )
    pairs = [
        {"sentence1": a, "sentence2": b, "score": s}
        for a, b, s in (
            ("a dog", "the dog", 4.0),
            ("lights", "a card", 0.5),
            ("fox", "the fox", 4.5),
        )
    ]
    write_gz(folder.parent / "stsb_en" / "test.jsonl.gz", [*pairs])
    return folder


@pytest.fixture(scope="module")
def run(tiny_decoder: Path, general: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    recipe = replace(
        sft_recipe(tiny_decoder, folder, epochs=4),
        forgetting=Forgetting(general=str(general), limit=6),
    )
    run_recipe(recipe, out=folder / "run", progress=silent(), write_more=write_report)
    return folder / "run"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_log_likelihoods_are_those_of_each_choice_by_itself(
    tiny_decoder: Path, attention: str
) -> None:
    model = load_body(open_folder(tiny_decoder, name="tiny"))
    model.set_attn_implementation(attention)
    torch.manual_seed(0)
    items = [
        ChoiceItem(
            torch.randint(3, 300, (n,)).tolist(),
            [torch.randint(3, 300, (k,)).tolist() for k in sizes],
        )
        for n, sizes in ((7, (3, 1, 5)), (20, (2,)), (1, (4, 4, 4, 2)))
    ]
    for item, scores in zip(items, score_items(model, items), strict=True):
        for choice, found in zip(item.choices, scores, strict=True):
            ids = torch.tensor([item.context + choice])
            logprobs = model(input_ids=ids).logits[0, len(item.context) - 1 : -1].log_softmax(-1)
            expected = logprobs.gather(1, torch.tensor(choice)[:, None]).sum().item()
            assert found.logprob == pytest.approx(expected, abs=1e-4)
            assert found.greedy == (logprobs.argmax(-1).tolist() == choice)


def test_the_likeliest_continuation_is_greedy(tiny_decoder: Path) -> None:
    model = load_body(open_folder(tiny_decoder, name="tiny"))
    context = [5, 6, 7]
    best = int(model(input_ids=torch.tensor([context])).logits[0, -1].argmax())
    ((likeliest, other),) = score_items(model, [ChoiceItem(context, [[best], [best - 1]])])
    assert likeliest.greedy and not other.greedy and likeliest.logprob > other.logprob


def test_items_are_cut_as_lm_evaluation_harness_cuts_them() -> None:
    def encode(text: str) -> list[int]:
        return [ord(letter) for letter in text]

    item = make_item("ab ", ["cd", "e"], encode, start=[1], limit=100)
    assert item == ChoiceItem(
        [1, 97, 98], [[32, 99, 100], [32, 101]]
    )  # the space goes with what follows
    assert make_item("abcdef", ["xy"], encode, start=[], limit=5).context == [
        100,
        101,
        102,
    ]  # the beginning is lost
    with pytest.raises(DataError, match="nothing to score"):
        make_item("", ["x"], encode, start=[], limit=5)


def test_the_beginning_is_bos_where_the_tokenizer_puts_it(tiny_decoder: Path) -> None:
    tokenizer = load_tokenizer(open_folder(tiny_decoder, name="tiny"))
    assert beginning(tokenizer) == []


def scorer(table: dict[str, float]):  # type: ignore[no-untyped-def]
    """Scores by a choice's text, which the ids spell."""

    def found(items: list[ChoiceItem]) -> list[list[Score]]:
        return [
            [
                Score(table["".join(map(chr, choice))], table["".join(map(chr, choice))] > -2)
                for choice in item.choices
            ]
            for item in items
        ]

    return found


TEXTS = Texts(lambda text: [ord(letter) for letter in text], [], 100)


def test_accuracy_takes_the_sum_and_accuracy_norm_the_mean_per_character(tmp_path: Path) -> None:
    write_gz(tmp_path / "set.jsonl.gz", [{"query": "q", "choices": ["a", "aaaa"], "gold": 1}])
    measured = Choices("set.jsonl.gz", between=":").measure(
        tmp_path / "set.jsonl.gz", TEXTS, scorer({" a": -2.0, " aaaa": -3.0}), limit=None
    )
    assert {one.metric: one.statistic(one.values) for one in measured} == {
        "accuracy": 0.0,
        "accuracy_norm": 1.0,
    }


def test_a_last_word_counts_when_every_token_is_the_likeliest(tmp_path: Path) -> None:
    write_gz(
        tmp_path / "set.jsonl.gz",
        [{"context": "q", "continuation": "a"}, {"context": "q", "continuation": "b"}],
    )
    measured = LastWord("set.jsonl.gz").measure(
        tmp_path / "set.jsonl.gz", TEXTS, scorer({" a": -1.0, " b": -3.0}), limit=None
    )
    assert {one.metric: one.statistic(one.values) for one in measured} == {
        "accuracy": 0.5,
        "perplexity": pytest.approx(np.exp(2)),
    }


def test_perplexity_and_bits_per_byte_are_transformers_loss(tiny_decoder: Path) -> None:
    subject = base_subject(open_folder(tiny_decoder, name="tiny"))
    model, tokenizer = (
        load_body(open_folder(tiny_decoder, name="tiny")),
        load_tokenizer(open_folder(tiny_decoder, name="tiny")),
    )
    text = "My card has not arrived yet: what should I do? Ünïcode"
    assert subject.texts is not None
    found = {
        m.metric: m.statistic(m.values)
        for m in text_measures(
            [text], subject.texts, lambda items: subject.score(items, adapted=True)
        )
    }
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    loss = model(input_ids=ids, labels=ids).loss.item()
    assert found["perplexity"] == pytest.approx(np.exp(loss), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(
        loss * (ids.shape[1] - 1) / len(text.encode()) / np.log(2), rel=1e-5
    )


def test_windows_predict_every_token_once(tiny_decoder: Path) -> None:
    seen: list[int] = []

    def scores(items: list[ChoiceItem]) -> list[list[Score]]:
        seen.extend(token for item in items for token in item.choices[0])
        return [[Score(-1.0, False)] for _ in items]

    text = "The quick brown fox jumps over the lazy dog. " * 200
    text_measures([text], Texts(TEXTS.encode, [], 512), scores)
    assert seen == [ord(letter) for letter in text[1:]]


def test_the_interval_of_a_mean_is_the_normal_one_of_paired_differences() -> None:
    before, after = np.array([1.0, 0, 1, 1, 0])[:, None], np.array([1.0, 1, 0, 1, 1])[:, None]
    difference = (after - before)[:, 0]
    error = Z95 * difference.std(ddof=1) / np.sqrt(5)
    assert paired_interval(before, after, mean) == pytest.approx((0.2 - error, 0.2 + error))


def test_the_bootstrap_agrees_with_the_normal_interval_where_both_hold() -> None:
    generator = np.random.default_rng(1)
    before = np.stack([generator.gamma(4, size=400), np.ones(400)], axis=1)
    after = before * [1.1, 1]
    low, high = paired_interval(before, after, perplexity)
    change = perplexity(after) - perplexity(before)
    assert low < change < high
    slope = perplexity(after) * after[:, 0] - perplexity(before) * before[:, 0]  # the delta method
    assert (high - low) / 2 == pytest.approx(Z95 * slope.std() / 20, rel=0.15)


def test_equal_answers_have_no_interval() -> None:
    values = np.random.default_rng(0).random((9, 2))
    assert paired_interval(values, values, spearman) == (0.0, 0.0)


def test_spearman_is_scipys_ties_included() -> None:
    values = np.random.default_rng(0).integers(0, 6, (40, 2)).astype(np.float64)
    assert spearman(values) == pytest.approx(
        spearmanr(values[:, 0], values[:, 1]).statistic, abs=1e-12
    )


def test_a_run_says_what_it_forgot(run: Path, general: Path) -> None:
    results = json.loads((run / "summary.json").read_text())["forgetting"]
    assert {(r["task"], r["metric"]) for r in results} == {
        ("wikitext2", "perplexity"),
        ("wikitext2", "bits_per_byte"),
        ("lambada", "accuracy"),
        ("lambada", "perplexity"),
        *(
            (name, metric)
            for name in ("piqa", "hellaswag", "arc_easy")
            for metric in ("accuracy", "accuracy_norm")
        ),
    }
    perplexities = next(r for r in results if r["task"] == "wikitext2")
    assert (
        perplexities["after"] != perplexities["before"]
        and perplexities["low"] <= perplexities["change"] <= perplexities["high"]
    )
    again = forgetting(run, general, limit=6, tasks=("wikitext2",))[0]
    assert (again.before, again.after) == pytest.approx(
        (perplexities["before"], perplexities["after"]), rel=1e-4
    )


def test_the_report_shows_gain_against_loss(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert "Task gain against general loss" in page and "wikitext2 perplexity" in page
    assert "task token_accuracy" in page


def test_before_is_the_base_and_after_the_merged_model(
    run: Path, general: Path, tiny_decoder: Path
) -> None:
    alone = forgetting(tiny_decoder, general, limit=6, tasks=("lambada",))
    both = forgetting(run, general, limit=6, tasks=("lambada",))
    assert [r.before for r in alone] == pytest.approx([r.before for r in both], rel=1e-4)
    assert all(r.after is None for r in alone)


def test_a_bundle_gives_the_figures_of_the_run(run: Path, general: Path, tmp_path: Path) -> None:
    from export_helpers import export

    export(tmp_path / "bundle", run)
    expected = compare_general(run_subject(run), general, limit=6)
    with Runtime.open(tmp_path / "bundle", threads=1) as runtime:
        found = compare_general(BundleSubject(runtime, None), general, limit=6)
    assert [r.task for r in found] == [r.task for r in expected]
    for one, other in zip(found, expected, strict=True):
        assert (one.before, one.after) == pytest.approx(
            (other.before, other.after), rel=1e-3, abs=1e-3
        )


def test_encoders_are_measured_by_sts_b(tiny_encoder: Path, general: Path, tmp_path: Path) -> None:
    recipe = intent_recipe(tiny_encoder, tmp_path, epochs=2)
    recipe = replace(recipe, forgetting=Forgetting(general=str(general)))
    run_recipe(recipe, out=tmp_path / "run", progress=silent())
    (result,) = json.loads((tmp_path / "run" / "summary.json").read_text())["forgetting"]
    assert (result["task"], result["metric"], result["items"]) == ("stsb", "spearman", 3)
    (alone,) = forgetting(tiny_encoder, general)
    assert alone.before == pytest.approx(result["before"], abs=1e-6)


def test_all_weights_are_compared_with_the_base_they_came_from(
    tiny_decoder: Path, general: Path, tmp_path: Path
) -> None:
    recipe = sft_recipe(tiny_decoder, tmp_path, epochs=1, parameters={"train": "full"})
    recipe = replace(recipe, forgetting=Forgetting(general=str(general), tasks=("lambada",)))
    run_recipe(recipe, out=tmp_path / "run", progress=silent())
    before = [
        r["before"]
        for r in json.loads((tmp_path / "run" / "summary.json").read_text())["forgetting"]
    ]
    found = forgetting(tmp_path / "run", general, limit=200, tasks=("lambada",))
    assert [r.before for r in found] == pytest.approx(before, rel=1e-5)
    assert [
        r.before for r in forgetting(tiny_decoder, general, tasks=("lambada",))
    ] == pytest.approx(before, rel=1e-5)
    assert found[1].after != pytest.approx(found[1].before)


def test_a_folder_without_sets_and_an_unknown_task_are_refused(
    tiny_decoder: Path, general: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="no general-ability set"):
        forgetting(tiny_decoder, tmp_path)
    with pytest.raises(DataError, match=r'no general task "winograd".*expected wikitext2'):
        forgetting(tiny_decoder, general, tasks=("winograd",))


def test_the_command_prints_and_writes_what_was_forgotten(
    run: Path, general: Path, tmp_path: Path
) -> None:
    arguments = [
        str(run),
        "--forgetting",
        "--general",
        str(general),
        "--limit",
        "4",
        "--json",
        str(tmp_path / "out.json"),
    ]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    assert "→" in result.output and "wikitext2 perplexity" in result.output
    assert len(json.loads((tmp_path / "out.json").read_text())["forgetting"]) == 10


def test_the_provider_that_is_asked_for_runs_the_bundle_and_no_run_or_base(
    run: Path, general: Path, tiny_decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    opened = Runtime.open
    monkeypatch.setattr(
        Runtime,
        "open",
        lambda folder, **options: asked.append(options["providers"]) or opened(folder, **options),
    )
    arguments = [
        "--forgetting",
        "--general",
        str(general),
        "--limit",
        "2",
        "--provider",
        "cpu",
        "--adapter",
        "nobody",
    ]
    result = CliRunner().invoke(command, [str(decoder_bundle(tiny_decoder)), *arguments])
    assert "unknown adapter" in str(result.exception) and asked == [("cpu",)]
    for target in (run, tiny_decoder):
        result = CliRunner().invoke(command, [str(target), *arguments])
        assert isinstance(
            result.exception, InputError
        ) and "--provider chooses what runs a bundle" in str(result.exception)


def test_nothing_to_measure_is_refused(run: Path) -> None:
    result = CliRunner().invoke(command, [str(run)])
    assert isinstance(result.exception, InputError) and "--data FILE, or --forgetting" in str(
        result.exception
    )


def test_the_picture_turns_losses_so_that_right_is_better_and_stays_in_its_frame() -> None:
    results = [
        {
            "task": "wikitext2",
            "metric": "perplexity",
            "before": 20.0,
            "after": 25.0,
            "change": 5.0,
            "low": 4.0,
            "high": 6.0,
        },
        {
            "task": "piqa",
            "metric": "accuracy",
            "before": 0.6,
            "after": 0.5,
            "change": -0.1,
            "low": -0.2,
            "high": 0.0,
        },
    ]
    changes = general_changes(results)
    assert [(c.value, c.low, c.high) for c in changes] == [
        pytest.approx((-25, -30, -20)),
        pytest.approx((-10, -20, 0)),
    ]
    gains = task_changes({"loss": 1.0, "accuracy": 0.9}, {"loss": 2.0, "accuracy": 0.5})
    assert gains == [Gain("task accuracy", pytest.approx(40.0))]
    after = {
        "loss": 0.2,
        "preference_accuracy": 0.9,
        "preference_accuracy_low": 0.8,
        "length_baseline": 0.6,
        "margin": 3.0,
    }
    preferred = task_changes(
        after, after | {"loss": 0.7, "preference_accuracy": 0.5, "margin": 0.0}
    )
    assert preferred == [Gain("task preference_accuracy", pytest.approx(40.0))]
    figure = picture(gains, changes)
    root = ET.fromstring(figure[figure.index("<svg") : figure.index("</svg>") + 6])
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for bar in root.iter("rect"):
        assert (
            0
            <= float(bar.attrib["x"])
            <= float(bar.attrib["x"]) + float(bar.attrib["width"])
            <= width
        )
        assert 0 <= float(bar.attrib["y"]) <= height
    assert picture(gains, []) == ""
