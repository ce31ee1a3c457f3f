"""`edgetune compress`: which size is chosen, what is written, and what it says of bad input."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from confidence_helpers import told, trained
from conftest import CommandLine
from export_helpers import make_adapter
from training_helpers import action_rows, intent_recipe, sft_recipe, silent

from edgetune.adapters.folder import load_adapter
from edgetune.adapters.runs import load_adapted_model
from edgetune.compression.compress import compress
from edgetune.compression.measure import TaskFigure
from edgetune.compression.search import Search, halved, sizes_of
from edgetune.compression.straight_through import factors_on, rounded_weights
from edgetune.core.errors import AdapterError, ExportError, OutputError
from edgetune.core.layout import ADAPTER_METADATA, ADAPTER_WEIGHTS
from edgetune.core.progress import Progress
from edgetune.evaluation.evaluate import evaluate
from edgetune.export.inputs.small_adapter import Factors, SmallAdapter, read_whole, round_factors
from edgetune.models.load import load_body
from edgetune.models.resolve import resolve_base
from edgetune.runtime.adapters.lora import read_lora
from edgetune.training import run_recipe


@pytest.fixture(scope="module")
def run(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that has learned something."""
    folder = tmp_path_factory.mktemp("intents")
    recipe = intent_recipe(tiny_encoder, folder, epochs=8)
    run_recipe(recipe, out=folder / "run", progress=silent())
    return folder / "run"


def sizes(run: Path, **options: Any) -> list[Any]:
    return sizes_of(read_whole(run / "adapter"), **options)


def test_sizes_lie_on_a_front(run: Path) -> None:
    found = sizes(run)
    assert [one.bytes for one in found] == sorted(one.bytes for one in found)
    assert [one.kept for one in found] == sorted(one.kept for one in found)
    assert {one.bits for one in sizes(run, bits=3)} == {3} and len(sizes(run, rank=2, bits=4)) == 1


@pytest.mark.parametrize("first", range(6))
def test_halving_finds_the_smallest_that_holds(first: int) -> None:
    asked: list[Any] = []

    def holds(size: Any) -> bool:
        asked.append(size)
        return bool(size >= first)

    many: Sequence[Any] = range(5)
    assert halved(many, holds) == first and len(asked) <= 3


def test_a_run_is_made_small_and_says_by_what(run: Path, tmp_path: Path) -> None:
    found = compress(run, tmp_path / "small", max_loss=0.3, steps=0, progress=silent())
    chosen = found.trials[found.chosen]
    weights = tmp_path / "small" / "adapter" / ADAPTER_WEIGHTS
    assert weights.stat().st_size == chosen.bytes < found.whole_bytes / 3
    about = json.loads((tmp_path / "small" / "adapter" / ADAPTER_METADATA).read_text())
    said, trained = about["compressed"], about["compressed"]["as_trained"]
    assert (said["bits"], said["bytes"], said["loss"]) == (chosen.bits, chosen.bytes, chosen.loss)
    assert trained["metric"] == "accuracy" and trained["rows"] == 4
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == [
        "adapter",
        "recipe.toml",
    ]
    smaller = [one for one in found.trials if one.bytes < chosen.bytes]
    assert all(one.loss is not None and one.loss > 0.3 for one in smaller)
    load_adapted_model(tmp_path / "small")


def test_a_small_adapter_says_how_sure_it_is_itself(tiny_encoder: Path, tmp_path: Path) -> None:
    folder, progress = trained(tiny_encoder), silent()
    small = tmp_path / "small"
    compress(folder / "run", small, rank=1, bits=2, steps=0, progress=progress)
    about = json.loads((small / "adapter" / ADAPTER_METADATA).read_text())
    own, recorded = about["confidence"], about["compressed"]["confidence"]
    before, after = recorded["trained"], recorded["shipped"]
    assert own == {name: after[name] for name in own}
    assert own["fitted_on"] == "torch, 2-bit adapter"
    assert before["threshold"] == told(folder / "run")["threshold"]
    assert after["share_answered"] == 0.8 != before["share_answered"]
    assert evaluate(small, folder / "dev.jsonl").metrics["answered"] == pytest.approx(0.8)
    as_it_was = tmp_path / "unmeasured"
    compress(folder / "run", as_it_was, rank=1, bits=2, steps=0, rows=0, progress=progress)
    assert told(as_it_was) == told(folder / "run")
    damaged, unread = shutil.copytree(folder / "run", tmp_path / "damaged"), tmp_path / "unread"
    (damaged / "summary.json").write_text("{")
    compress(damaged, unread, rank=1, bits=2, steps=0, progress=progress)
    assert told(unread) == told(folder / "run")


def test_a_step_moves_what_the_codes_round_and_products_see_the_codes(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_decoder, tmp_path / "a")
    model = load_adapter(load_body(resolve_base(str(tiny_decoder))), adapter)
    pairs = factors_on(model)
    own = [parameter.requires_grad_() for pair in pairs.values() for parameter in pair]
    first = {module: (a.detach().clone(), b.detach().clone()) for module, (a, b) in pairs.items()}

    def as_codes(values: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Factors]:
        return round_factors({module: Factors(*pair) for module, pair in values.items()}, 3)

    optimizer = torch.optim.SGD(own, lr=1e-4)
    with rounded_weights(model, 3) as masters:
        seen = as_codes(first)
        assert all(torch.equal(a, seen[module].a) for module, (a, _) in pairs.items())
        model(torch.tensor([[5, 9, 30]])).logits.square().mean().backward()
        gradient = next(iter(pairs.values()))[0].grad
        optimizer.step()
        module = next(iter(pairs))
        assert gradient is not None
        assert torch.allclose(masters.values[module][0], first[module][0] - 1e-4 * gradient)
        seen = as_codes(masters.values)
        assert all(torch.equal(b, seen[module].b) for module, (_, b) in pairs.items())
    optimizer.step()  # the hooks are gone
    assert not torch.equal(pairs[module][0], as_codes(masters.values)[module].a)


def test_training_against_the_codes_lowers_the_loss(tiny_decoder: Path, tmp_path: Path) -> None:
    recipe = sft_recipe(tiny_decoder, tmp_path, epochs=6)
    run_recipe(recipe, out=tmp_path / "run", progress=silent())
    before, after = (
        compress(
            tmp_path / "run",
            tmp_path / str(steps),
            rank=1,
            bits=2,
            steps=steps,
            rows=0,
            progress=silent(),
        )
        for steps in (0, 12)
    )
    assert len(before.trials) == 1 and len(after.trials) == 2 and after.trials[1].steps == 12
    read = read_lora(tmp_path / "12" / "adapter")
    assert read.problems == [] and read.rank >= 1
    loss = {}
    for steps in (0, 12):
        model, tokenizer, _ = load_adapted_model(tmp_path / str(steps))
        row = action_rows()[5]
        ids = tokenizer(row["prompt"] + row["completion"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            loss[steps] = float(model(input_ids=ids, labels=ids).loss)
    assert loss[12] < loss[0]


class HalfRight:
    """A metric that every form but the trained one halves."""

    def as_trained(self) -> TaskFigure:
        return TaskFigure("accuracy", 1.0, 4, "rows")

    def of(self, small: SmallAdapter) -> TaskFigure:
        return TaskFigure("accuracy", 0.5 + 0.1 * (small.bits == 8), 4, "rows")


def test_a_bound_that_nothing_keeps_names_the_best(run: Path) -> None:
    read, task = read_whole(run / "adapter"), HalfRight()
    search = Search(read, task, max_loss=0.05, steps=0, progress=silent())  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=r"--max-loss 5\.00%.*40\.00% at best.*--task-rows"):
        search.smallest(sizes_of(read))
    assert search.trials[-1].bits == 8
    assert len(search.trials) <= 5


class NothingRight(HalfRight):
    def as_trained(self) -> TaskFigure:
        return TaskFigure("json_exact_match", 0.0, 4, "dev.jsonl")


def test_rows_that_nothing_gets_right_choose_no_size(run: Path) -> None:
    read, task = read_whole(run / "adapter"), NothingRight()
    search = Search(read, task, max_loss=0.05, steps=0, progress=silent())  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=r"json_exact_match 0 on these.*of dev\.jsonl"):
        search.smallest(sizes_of(read))
    assert search.trials == []


def test_bad_input_is_one_line(
    run: Path, tiny_decoder: Path, tmp_path: Path, command_line: CommandLine
) -> None:
    adapter = make_adapter(tiny_decoder, tmp_path / "alone")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("")
    out = tmp_path / "out"
    for arguments, says in (
        ((tmp_path / "missing", "--out", out), "no such folder"),
        ((run, "--out", tmp_path / "there"), "Choose another --out"),
        ((adapter, "--out", out), "no validation rows"),
        ((run, "--out", out, "--max-loss", "much"), "cannot read --max-loss"),
        ((run, "--out", out, "--task-rows", "0"), "Give --rank and --bits"),
        ((adapter, "--out", out, "--steps", "5", "--rank", "1", "--bits", "2"), "recipe.toml"),
        ((run, "--out", out, "--bits", "5"), "5"),
        ((run, "--out", out, "--rank", "0"), "0"),
    ):
        code, _, error = command_line("compress", *arguments)
        assert code == 2 and says in error and not out.exists(), error
    code, _, error = command_line("decompress", run, "--out", out)
    assert code == 2 and "PEFT's own already" in error


def test_the_command_prints_a_table_and_the_way_back_is_pefts(
    run: Path, tmp_path: Path, command_line: CommandLine
) -> None:
    small, plain = tmp_path / "small", tmp_path / "plain"
    code, printed, error = command_line(
        "compress", run, "--out", small, "--rank", 2, "--bits", 4, "--task-rows", 4, "--steps", 0
    )
    assert code == 0, error
    assert "as trained" in printed and "chosen" in printed and "ΔW kept" in printed
    code, printed, error = command_line("decompress", small, "--out", plain)
    assert code == 0, error
    before, after = read_lora(small / "adapter"), read_lora(plain)
    assert not after.coded and after.problems == []
    assert all((before.deltas[m][0] == after.deltas[m][0]).all() for m in before.deltas)


def test_a_model_that_learned_whole_has_no_adapter(tiny_decoder: Path, tmp_path: Path) -> None:
    recipe = sft_recipe(tiny_decoder, tmp_path, max_steps=1, parameters={"train": "full"})
    run_recipe(recipe, out=tmp_path / "run", progress=silent())
    with pytest.raises(AdapterError, match="no adapter to make small"):
        compress(tmp_path / "run", tmp_path / "out", progress=Progress(io.StringIO()))
    with pytest.raises(OutputError):
        compress(tmp_path / "run", tmp_path / "run", progress=silent())
    with pytest.raises((ExportError, AdapterError)):
        compress(tmp_path / "run" / "model", tmp_path / "out", progress=silent())
