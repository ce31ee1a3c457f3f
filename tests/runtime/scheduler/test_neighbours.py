"""No row fails a neighbour: an error ends the row that brings it about, and all others go on to the
answers they would get alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from export_helpers import export
from preference_helpers import adapted
from runtime_helpers import Listener, decoder_bundle, request
from seq2seq_helpers import make_seq2seq

from edgetune.adapters.folder import AdapterMetadata, save_adapter
from edgetune.core.errors import InputError
from edgetune.export.bundle import export_bundle
from edgetune.models.resolve import resolve_base
from edgetune.runtime import Runtime
from edgetune.runtime.engine.batch import RowBinding
from edgetune.runtime.scheduler.scheduler import Scheduler

PROMPTS = [[5, 6, 7], [9, 10], [20, 21, 22, 23], [30, 31]]
BAD = 77  # a token that one row alone says
GREEDY: dict[str, Any] = {"max_new_tokens": 6}


@pytest.fixture(scope="module", params=["decoder", "encoder-decoder"])
def runtime(
    request: pytest.FixtureRequest, tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runtime]:
    if request.param == "decoder":
        bundle = decoder_bundle(tiny_decoder)
    else:
        base = make_seq2seq("t5", tmp_path_factory.mktemp("base"))
        bundle = tmp_path_factory.mktemp("bundle") / "bundle"
        export_bundle([], bundle, base_name=str(base), threads=1)
    with Runtime.open(bundle, threads=1) as opened:
        yield opened


def failing_step(monkeypatch: pytest.MonkeyPatch, fails: Any) -> None:
    """Every step fails, after it wrote its keys and values, for which `fails(ids)` is true."""
    run = RowBinding.run

    def failing(self: RowBinding, ids: Any, lengths: Any, **options: Any) -> Any:
        found = run(self, ids, lengths, **options)
        if fails(ids):
            raise RuntimeError("no memory left")
        return found

    monkeypatch.setattr(RowBinding, "run", failing)


def test_a_step_that_fails_ends_the_row_that_brings_it_about(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    say, avoid = {"logit_bias": {BAD: 100.0}}, {"logit_bias": {BAD: -100.0}}
    asked = [say if place == 1 else avoid for place in range(4)]
    scheduler = Scheduler(runtime, max_rows=4)

    def answers() -> list[Listener]:
        listeners = [Listener() for _ in PROMPTS]
        for ids, settings, listener in zip(PROMPTS, asked, listeners, strict=True):
            scheduler.submit(request(runtime, ids, **GREEDY, **settings), listener)
        return listeners

    with scheduler:
        whole = [listener.done().token_ids for listener in answers()]
        assert [BAD in ids for ids in whole] == [False, True, False, False]
        failing_step(monkeypatch, lambda ids: (ids == BAD).any())
        first, bad, *rest = answers()
        with pytest.raises(RuntimeError, match="no memory left"):
            bad.done()
        found = [listener.done().token_ids for listener in (first, *rest)]
        assert found == [whole[0], *whole[2:]]
        assert scheduler.worker.loop is not None and scheduler.worker.loop.batch.rows == 0
        assert scheduler.worker.loop.batch.cache_bytes == 0
        assert scheduler.stats().requests_total["failed"] == 1


def test_rows_that_are_too_many_for_one_step_go_on_one_by_one(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Scheduler(runtime, max_rows=4) as scheduler:

        def answers() -> list[Any]:
            listeners = [Listener() for _ in PROMPTS]
            for ids, listener in zip(PROMPTS, listeners, strict=True):
                scheduler.submit(request(runtime, ids, **GREEDY), listener)
            return [listener.done().token_ids for listener in listeners]

        whole = answers()
        failing_step(monkeypatch, lambda ids: len(ids) > 1)
        assert answers() == whole


def test_where_every_step_fails_all_end_and_the_next_request_is_answered(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Scheduler(runtime, max_rows=4) as scheduler:
        with monkeypatch.context() as patched:
            failing_step(patched, lambda ids: True)
            listeners = [Listener() for _ in PROMPTS]
            for ids, listener in zip(PROMPTS, listeners, strict=True):
                scheduler.submit(request(runtime, ids, **GREEDY), listener)
            for listener in listeners:
                with pytest.raises(RuntimeError, match="no memory left"):
                    listener.done()
        scheduler.submit(request(runtime, PROMPTS[0], **GREEDY), listener := Listener())
        assert listener.done().completion_tokens


@pytest.fixture(scope="module")
def scorer(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    folder, base = tmp_path_factory.mktemp("reward"), resolve_base(str(tiny_decoder))
    about = AdapterMetadata(base={"name": base.name, "digest": base.digest}, task="reward")
    save_adapter(adapted(tiny_decoder, task="reward"), folder / "polite", about)
    export(folder / "bundle", folder / "polite")
    with Runtime.open(folder / "bundle", threads=1) as opened:
        yield opened


def test_an_answer_that_fails_its_batch_of_scores_fails_its_caller_only(
    scorer: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert scorer.decoder is not None
    rows = [[[5, 6, 7], [9, 10]], [[BAD, 6], [8, 9]], [[11, 12, 13]]]
    begin = scorer.decoder.begin_scores

    def failing(ids: Any, adapters: Any) -> Any:
        if any(BAD in row for row in ids):
            raise RuntimeError("no memory left")
        return begin(ids, adapters)

    with Scheduler(scorer) as scheduler:
        whole = [scheduler.score_ids(ids, "polite").result(60) for ids in rows]
    monkeypatch.setattr(scorer.decoder, "begin_scores", failing)
    scheduler = Scheduler(scorer)
    first, bad, last = [scheduler.score_ids(ids, "polite") for ids in rows]  # one batch
    with scheduler:
        with pytest.raises(RuntimeError, match="no memory left"):
            bad.result(60)
        assert first.result(60) == pytest.approx(whole[0], abs=1e-5)
        assert last.result(60) == pytest.approx(whole[2], abs=1e-5)
    with pytest.raises(InputError, match="longer than the context"):
        scheduler.score_ids([[5] * 500], "polite")
    assert [status.users for status in scorer.registry.statuses()] == [0]
