"""Rows in parts: the same answers as in one go, stopped and gone on with, by shards, by Ray."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from conftest import CommandLine
from runtime_helpers import decoder_bundle, encoder_bundle
from signature_helpers import make_keys

from edgetune.bulk import Answerer
from edgetune.bulk.parts import Job, RowRange, _rows, as_row, plan
from edgetune.bulk.ray_workers import PartWorker, answer_by_ray
from edgetune.core.errors import OutputError

ROWS = [{"id": i, "prompt": f"hello {i}", "adapter": ["a", "b", None][i % 3]} for i in range(11)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two files of rows."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name, rows in (("one", ROWS[:7]), ("two", ROWS[7:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def read(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for path in sorted(folder.glob("part-*.jsonl"))
        for line in path.read_text().splitlines()
    ]


def predict(bundle: Path, source: Path, *more: Any) -> list[Any]:
    return ["predict", bundle, "--input", source, "--max-new-tokens", 4, "--threads", 1, *more]


def test_parts_and_shards_hold_what_one_file_would(
    command_line: CommandLine, tiny_decoder: Path, source: Path, tmp_path: Path
) -> None:
    bundle = decoder_bundle(tiny_decoder)
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts"
    assert command_line(*predict(bundle, source, "--output", whole))[0] == 0
    for i in (2, 1):
        code, out, _ = command_line(
            *predict(bundle, source, "--output", f"{parts}/", "--part-rows", 3, "--shard", f"{i}/2")
        )
        assert (code, "rows answered" in out) == (0, True)
    assert len(list(parts.glob("part-*.jsonl"))) == 5
    assert read(parts) == [json.loads(line) for line in whole.read_text().splitlines()]


def test_what_is_answered_stays_and_the_rest_is_done(
    command_line: CommandLine, tiny_decoder: Path, source: Path, tmp_path: Path
) -> None:
    bundle, parts = decoder_bundle(tiny_decoder), tmp_path / "parts"
    again = predict(bundle, source, "--output", f"{parts}/", "--part-rows", 3)
    assert command_line(*again)[0] == 0
    rows = read(parts)
    (parts / "part-00001.jsonl").unlink()
    (parts / "part-00000.jsonl").write_text("{}\n")  # not looked at again
    code, out, _ = command_line(*again)
    assert (code, out.splitlines()) == (
        0,
        ["4 of 5 parts are answered already", f"3 rows answered: {parts}/"],
    )
    assert read(parts) == [{}, *rows[3:]]
    assert command_line(*again)[:2] == (
        0,
        f"5 of 5 parts are answered already\nnothing is left to answer: {parts}/\n",
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--seed", "3"], "settings was"),
        (["--adapter", "a"], "adapter was null"),
        (["--part-rows", "4"], "rows_of_a_part was 3, now 4"),
    ],
)
def test_answers_of_another_job_are_not_added_to(
    change: list[str],
    said: str,
    command_line: CommandLine,
    tiny_decoder: Path,
    source: Path,
    tmp_path: Path,
) -> None:
    bundle, parts = decoder_bundle(tiny_decoder), tmp_path / "parts"
    again = predict(bundle, source, "--output", f"{parts}/", "--part-rows", 3)
    assert command_line(*again)[0] == 0
    code, _, err = command_line(*again, *change)
    assert code != 0 and said in err and len(err.splitlines()) == 1


def test_a_job_with_lists_among_its_settings_goes_on_and_a_damaged_plan_is_a_line(
    command_line: CommandLine, tiny_decoder: Path, source: Path, tmp_path: Path
) -> None:
    bundle, parts = decoder_bundle(tiny_decoder), tmp_path / "parts"
    again = predict(bundle, source, "--output", f"{parts}/", "--stop", "x", "--stop", "y")
    assert [command_line(*again)[0] for _ in range(2)] == [0, 0]
    (parts / "job.json").write_text('{"files"')
    code, _, err = command_line(*again)
    assert code == 2 and "job.json is damaged" in err


def test_an_adapters_folder_that_changed_is_another_job(
    command_line: CommandLine, tiny_decoder: Path, source: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "tone"
    shutil.copytree(decoder_bundle(tiny_decoder) / "adapters" / "a", adapter)
    call = predict(decoder_bundle(tiny_decoder), source, "--output", f"{tmp_path / 'parts'}/")
    call += ["--adapter", adapter]
    assert command_line(*call)[0] == 0
    metadata = adapter / "edgetune_adapter.json"
    names = "adapter_model.safetensors", "adapter_config.json", metadata.name
    digests = " ".join(sha256((adapter / name).read_bytes()).hexdigest() for name in names)
    (known,) = tmp_path.rglob("job.json")  # as every version writes it
    whole = f"tone@{sha256(digests.encode()).hexdigest()}"
    assert json.loads(known.read_text())["adapter"] == whole
    metadata.write_text(metadata.read_text() + "\n")
    code, _, err = command_line(*call)
    assert code == 2 and "adapter was" in err


def test_an_adapter_of_the_bundle_comes_before_a_folder_of_its_name(
    tiny_decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = decoder_bundle(tiny_decoder) / "adapters"
    for folder, name in (("a", "b"), ("own", "b")):
        shutil.copytree(adapters / name, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    bundle = decoder_bundle(tiny_decoder)
    ours, theirs = (Answerer(bundle, adapter=name, max_new_tokens=2) for name in ("a", "own"))
    assert (ours.runtime.adapters, ours.adapter, ours.loaded) == (("a", "b"), "a", None)
    assert "own" in theirs.runtime.adapters and theirs.adapter == str(tmp_path / "own")
    monkeypatch.chdir("/")
    again = pickle.loads(pickle.dumps(theirs))
    assert again.rows([{"prompt": "hello"}]) == theirs.rows([{"prompt": "hello"}])


def test_a_folder_of_parts_asks_for_the_signature_too(
    command_line: CommandLine, tiny_decoder: Path, source: Path, tmp_path: Path
) -> None:
    pytest.importorskip("cryptography", reason="pip install 'edgetune[sign]' runs it")
    key = make_keys(tmp_path).public
    call = predict(decoder_bundle(tiny_decoder), source, "--output", f"{tmp_path / 'parts'}/")
    code, _, err = command_line(*call, "--require-signature", key)
    assert code == 2 and "sign" in err and not (tmp_path / "parts").exists()


def test_an_adapter_that_is_none_fills_no_folder(
    command_line: CommandLine, tiny_decoder: Path, source: Path, tmp_path: Path
) -> None:
    call = predict(decoder_bundle(tiny_decoder), source, "--output", f"{tmp_path / 'parts'}/")
    code, _, err = command_line(*call, "--adapter", "nobody")
    assert code == 2 and "nobody" in err and not (tmp_path / "parts").exists()


def test_a_changed_file_and_a_strangers_folder_are_refused(
    tiny_decoder: Path, source: Path, tmp_path: Path
) -> None:
    answers = Answerer(decoder_bundle(tiny_decoder))
    plan(str(source), str(tmp_path / "parts"), answers, about={})
    with (source / "two.jsonl").open("a") as file:
        file.write('{"prompt": "one more"}\n')
    with pytest.raises(OutputError, match=r"two\.jsonl is another file"):
        plan(str(source), str(tmp_path / "parts"), answers, about={})
    with pytest.raises(OutputError, match="holds something else"):
        plan(str(source), str(source), answers, about={})


def test_a_row_that_cannot_be_answered_says_why_and_the_others_are(
    command_line: CommandLine, tiny_encoder: Path, tmp_path: Path
) -> None:
    bundle, source, parts = encoder_bundle(tiny_encoder), tmp_path / "in.jsonl", tmp_path / "parts"
    source.write_text('{"text": "hello"}\n{"txt": "hello"}\n{"text": "a", "adapter": "nobody"}\n')
    parts.mkdir()
    code, _, err = command_line("predict", bundle, "--input", source, "--output", parts)
    good, without, unknown = read(parts)
    assert code == 1 and "2 of 3 rows could not be answered" in err
    assert "embedding" in good and "error" not in good
    assert "line 2" in without["error"] and "no `text`" in without["error"]
    assert "nobody" in unknown["error"]


def test_a_second_call_says_again_which_rows_failed(
    command_line: CommandLine, tiny_encoder: Path, tmp_path: Path
) -> None:
    bundle, source, parts = encoder_bundle(tiny_encoder), tmp_path / "in.jsonl", tmp_path / "parts"
    own = '{"text": "hello", "error": "E42"}\n'  # a column of the user's
    source.write_text(own + '{"txt": "hello"}\n' + own)
    call = ("predict", bundle, "--input", source, "--output", f"{parts}/", "--part-rows", 1)
    said = [command_line(*call)[::2] for _ in range(2)]
    assert said[0] == said[1] and said[0][0] == 1
    assert "1 of 3 rows could not be answered, listed in failed-*.json there" in said[0][1]
    assert f"the first is row 2 of {source}" in said[0][1]
    assert [row["error"][:3] for row in read(parts)][::2] == ["E42", "E42"]
    assert sorted(path.name for path in parts.glob("failed-*")) == ["failed-00001.json"]
    (parts / "part-00001.jsonl").unlink()  # is answered anew
    assert command_line(*call)[0] == 1


@pytest.mark.parametrize("second", [False, True])
def test_a_file_that_changes_in_the_middle_of_a_job_ends_it(
    tiny_encoder: Path, tmp_path: Path, second: bool
) -> None:
    source, parts = tmp_path / "in.jsonl", str(tmp_path / "parts")
    source.write_text('{"text": "hello"}\n{"text": "there"}\n')
    answers = Answerer(encoder_bundle(tiny_encoder))
    job = plan(str(source), parts, answers, rows=1, about={})
    worker = PartWorker(answers, parts)
    batch = {key: [value] for key, value in as_row(job.parts[0]).items()}
    assert worker(batch)["said"] == [""]
    source.write_text('{"text": "hello"}\n{"text": "other"}\n')
    if second:  # a worker that has read nothing yet
        _rows.cache_clear()
        batch = {key: [value] for key, value in as_row(job.parts[1]).items()}
        (said,) = PartWorker(answers, parts)(batch)["said"]
        assert "the file has changed since the job began" in said
        assert job.unanswered() == job.parts[1:]
    with pytest.raises(OutputError, match="is another file"):
        plan(str(source), parts, answers, rows=1, about={})


def test_a_store_behind_a_url_is_read_and_written(
    command_line: CommandLine, tiny_encoder: Path, tmp_path: Path
) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe_file("/bulk/in/a.jsonl", b'{"text": "hello"}\n{"text": "there"}\n')
    bundle = encoder_bundle(tiny_encoder)
    call = ["predict", bundle, "--input", "memory://bulk/in/*.jsonl", "--part-rows", 1]
    code, out, err = command_line(*call, "--output", "memory://bulk/out")
    assert (code, err) == (0, "") and "2 rows answered" in out
    assert sorted(store.ls("/bulk/out", detail=False)) == [
        "/bulk/out/job.json",
        "/bulk/out/part-00000.jsonl",
        "/bulk/out/part-00001.jsonl",
    ]
    code, _, err = command_line(*call[:3], "memory://bulk/nothing/", "--output", "memory://bulk/x")
    assert code != 0 and "there is no data file" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--output", "out.jsonl", "--shard", "1/2"], "belong to an --output that is a folder"),
        (["--output", "out/", "--shard", "3/2"], "is no shard"),
        (["--output", "out/", "--shard", "1/2", "--ray"], "leave --shard out"),
        (["--output", "out/", "--workers", "2"], "--workers belongs to --ray"),
    ],
)
def test_options_that_contradict_each_other_are_one_line(
    options: list[str], said: str, command_line: CommandLine, tiny_encoder: Path, source: Path
) -> None:
    code, _, err = command_line(
        "predict", encoder_bundle(tiny_encoder), "--input", source, *options
    )
    assert code == 2 and said in err


def test_columns_of_a_pipeline_are_answered_wherever_it_unpickles(tiny_encoder: Path) -> None:
    answers = pickle.loads(pickle.dumps(Answerer(encoder_bundle(tiny_encoder))))
    columns = answers({"id": [1, 2], "text": ["hello", "there"]})
    assert (columns["id"], list(columns)) == ([1, 2], ["id", "text", "embedding"])
    assert columns["embedding"] == [
        row["embedding"] for row in answers.rows([{"text": "hello"}, {"text": "there"}])
    ]


@pytest.fixture
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason='needs the extra ray: pip install "edgetune[ray]"')
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers know no tests
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield ray
    ray.shutdown()


class Fragile(Answerer):
    """Its process is killed once, at one row."""

    def answered(
        self, rows: Any, *, source: str = "rows", first: int = 1
    ) -> tuple[list[dict[str, Any]], dict[int, str]]:
        """See `Answerer`."""
        mark = Path(str(self.settings.pop("mark", "") or self.__dict__.get("kept")))
        self.__dict__["kept"] = str(mark)
        if first == 4 and not mark.exists():
            mark.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().answered(rows, source=source, first=first)


def test_workers_of_ray_give_the_rows_of_one_process_though_one_is_killed(
    cluster: Any, tiny_decoder: Path, source: Path, tmp_path: Path
) -> None:
    bundle = decoder_bundle(tiny_decoder)
    alone = Answerer(bundle, max_new_tokens=4)
    job: Job = plan(str(source), str(tmp_path / "parts"), alone, rows=3, about={})
    parts: list[RowRange] = job.unanswered()
    fragile = Fragile(bundle, max_new_tokens=4, mark=str(tmp_path / "killed"))
    done = list(answer_by_ray(fragile, job, parts, workers=2))
    assert (tmp_path / "killed").exists()
    assert sorted((one.number, one.rows, one.errors) for one in done) == [
        (0, 3, 0), (1, 3, 0), (2, 1, 0), (3, 3, 0), (4, 1, 0),
    ]  # fmt: skip
    assert read(tmp_path / "parts") == alone.rows(ROWS)
