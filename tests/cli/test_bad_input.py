"""What a user can get wrong, on the command line: one clear line, the right exit code, nothing
half-written.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from export_helpers import export, make_adapter

from edgetune.cli import main
from edgetune.core.progress import Progress

Run = Callable[..., tuple[int, str]]
ROWS = [{"text": f"my {word} {n}", "label": word} for n in range(4) for word in ("card", "light")]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command; its exit code and the last line of its stderr, which is the only one about the
    mistake.
    """

    def call(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        lines = [
            line for line in capsys.readouterr().err.splitlines() if line.startswith("edgetune: ")
        ]
        assert len(lines) == 1
        return int(stop.value.code or 0), lines[0].removeprefix("edgetune: ")

    return call


@pytest.fixture
def work(tmp_path: Path, tiny_encoder: Path) -> Path:
    """A folder with a recipe and its training rows."""
    rows(tmp_path / "train.jsonl", *ROWS)
    (tmp_path / "recipe.toml").write_text(
        f'base = "{tiny_encoder}"\nout = "{tmp_path / "run"}"\n'
        '[[stage]]\nmethod = "sequence-classification"\ndata.train = "train.jsonl"\nmax_steps = 2\n'
    )
    return tmp_path


@pytest.fixture(scope="module")
def topics(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_encoder, tmp_path_factory.mktemp("adapters") / "topics")


@pytest.fixture(scope="module")
def bundle(topics: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "encoder"
    export(out, topics)
    return out


def rows(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-40] ^= 0x10
    path.write_bytes(content)


BAD_RECIPES: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "there is no such recipe file. Give the path of a .toml file."),
    "empty": (b"", 'the keys "base", "stage" are missing. Add them: base = …'),
    "no stage": (b'base = "x"', 'the key "stage" is missing. Add it: [[stage]]'),
    "garbage": (b"\x93\x00\xff", "not UTF-8 text"),
    "no TOML": (b"base : x", "not valid TOML"),
    "unknown key": (
        b'base = "x"\nlerning_rate = 3\n[[stage]]\n',
        'unknown key "lerning_rate" (expected one of base,',
    ),
}


@pytest.mark.parametrize("name", BAD_RECIPES)
def test_a_recipe_that_cannot_be_read_is_named(name: str, run: Run, tmp_path: Path) -> None:
    content, message = BAD_RECIPES[name]
    recipe = tmp_path / "mine.toml"
    if content is not None:
        recipe.write_bytes(content)
    code, line = run("train", recipe)
    assert (code, line.startswith(f"{recipe}: {message}")) == (2, True)


def test_a_folder_is_no_recipe(run: Run, tmp_path: Path) -> None:
    assert run("train", tmp_path) == (2, f"{tmp_path}: this is a folder (expected a .toml file)")


SETTINGS = {
    "nonsense": "not a setting (expected KEY=VALUE",
    "stage.0.epoch=2": 'unknown key "stage.0.epoch"',
    "parameters.rank=big": "parameters.rank has a wrong value (expected an integer",
    "parameters.target_modules=(": "parameters.target_modules: not a regular expression",
    "parameters.target_modules=[]": "matches no linear layer of this base",
    "parameters.rank_pattern.query=0": "out of range (expected at least 1",
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_wrong_setting_is_named(setting: str, run: Run, work: Path) -> None:
    before = files(work)
    code, line = run("train", work / "recipe.toml", "--set", setting)
    assert (code, SETTINGS[setting] in line, files(work)) == (2, True, before)


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "no column": (
        {"text": "x"},
        (
            'line 9: there is no column "label" (expected for the label, {{ label }}, got the'
            " columns text)"
        ),
    ),
    "wrong type": (
        {"text": 3, "label": "card"},
        'line 9: the column "text" has the wrong type (expected a string, got int 3)',
    ),
    "null": (
        {"text": None, "label": "card"},
        'line 9: the column "text" has the wrong type (expected a string, got null)',
    ),
    "no object": ([1], "line 9: the row is not an object"),
    "half a character": (
        {"text": "\ud800", "label": "card"},
        "line 9: the text is not valid Unicode",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_training_row_is_named_with_its_line(name: str, run: Run, work: Path) -> None:
    row, message = BAD_ROWS[name]
    rows(work / "train.jsonl", *ROWS, row)
    before = files(work)
    code, line = run("train", work / "recipe.toml")
    assert (code, line.startswith(f"{work / 'train.jsonl'}, {message}"), files(work)) == (
        2,
        True,
        before,
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such data file"),
        (b"", "the file is empty"),
        (b"\xff\xfe\x00", "not UTF-16 text"),
    ],
)
def test_a_data_file_that_cannot_be_read_is_named(
    content: bytes | None, message: str, run: Run, work: Path
) -> None:
    (work / "train.jsonl").unlink()
    if content is not None:
        (work / "train.jsonl").write_bytes(content)
    code, line = run("train", work / "recipe.toml")
    where, _, what = line.partition(": ")
    assert (code, where.removesuffix(", line 1")) == (2, str(work / "train.jsonl"))
    assert what.startswith(message)


def test_a_label_unseen_in_training_is_named(run: Run, work: Path) -> None:
    held_out = rows(work / "dev.jsonl", ROWS[0], {"text": "x", "label": "weather"})
    code, line = run("train", work / "recipe.toml", "--set", f"stage.0.data.validation={held_out}")
    assert code == 2
    assert line.startswith(
        f'{held_out}, line 2: the label "weather" does not occur in the training rows (expected one'
        " of card, light)"
    )


def test_a_training_row_longer_than_the_context_is_named(
    run: Run, work: Path, tiny_decoder: Path
) -> None:
    rows(
        work / "train.jsonl",
        {"prompt": "a", "completion": "b"},
        {"prompt": "~" * 600, "completion": "b"},
    )
    code, line = run(
        "train",
        work / "recipe.toml",
        "--set",
        f"base={tiny_decoder}",
        "--set",
        "stage.0.method=sft",
    )
    assert code == 2
    assert (
        "train.jsonl, line 2: prompt and completion are too long (expected at most 256 tokens"
        in line
    )


def test_a_text_longer_than_the_positions_is_named(run: Run, bundle: Path) -> None:
    code, line = run("predict", bundle, "card " * 300, "--adapter", "topics")
    assert code == 2
    assert line.startswith(
        "the text is longer than the model's positions (expected at most 128 tokens, got"
    )


def test_an_unknown_adapter_is_named_by_every_command(run: Run, bundle: Path, work: Path) -> None:
    message = "unknown adapter 'nosuch' (expected topics"
    for command in (
        ("predict", bundle, "x"),
        ("check", bundle),
        ("eval", bundle, "--data", work / "train.jsonl"),
    ):
        code, line = run(*command, "--adapter", "nosuch")
        assert (code, line.startswith(message)) == (2, True)


@pytest.mark.parametrize("place", ["train.jsonl/run", "/proc/run"])
@pytest.mark.parametrize("command", ["train", "export", "predict"])
def test_a_place_that_cannot_be_written_is_named(
    command: str, place: str, run: Run, work: Path, topics: Path, bundle: Path
) -> None:
    before, out = files(work), work / place
    commands: dict[str, tuple[object, ...]] = {
        "train": ("train", work / "recipe.toml", "--out", out),
        "export": ("export", "--adapter", f"topics={topics}", "--out", out),
        "predict": (
            "predict",
            bundle,
            "--input",
            work / "train.jsonl",
            "--output",
            out,
            "--adapter",
            "topics",
        ),
    }
    if place.startswith("/proc") and not Path("/proc/self").is_dir():
        pytest.skip("no /proc here")
    code, line = run(*commands[command])
    assert (code, line.startswith(f"cannot write {out}: "), files(work)) == (2, True, before)


@pytest.mark.parametrize("command", ["train", "export", "predict"])
def test_a_full_disk_is_said_and_nothing_is_left(
    command: str, run: Run, work: Path, topics: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, out = files(work), work / "out"
    commands: dict[str, tuple[object, ...]] = {
        "train": ("train", work / "recipe.toml", "--out", out),
        "export": ("export", "--adapter", f"topics={topics}", "--out", out),
        "predict": (
            "predict",
            bundle,
            "--input",
            work / "train.jsonl",
            "--output",
            out,
            "--adapter",
            "topics",
        ),
    }

    def full(path: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    code, line = run(*commands[command])
    assert (code, ": the disk is full. Nothing was left behind" in line, ".partial" in line) == (
        2,
        True,
        False,
    )
    assert files(work) == before


BUNDLE_FILES = ["model.onnx.data", "engine.onnx", "tokenizer.json", f"adapters/topics/{WEIGHTS}"]


@pytest.mark.parametrize("name", BUNDLE_FILES)
def test_a_flipped_byte_in_a_bundle_is_found(name: str, run: Run, bundle: Path, work: Path) -> None:
    copy = shutil.copytree(bundle, work / "bundle")
    flip(copy / name)
    code, line = run("verify", copy)
    assert (code, line.startswith(f"{copy}/{name}: expected sha256 ")) == (1, True)
    for command in (
        ("predict", copy, "x"),
        ("check", copy),
        ("eval", copy, "--data", work / "train.jsonl"),
    ):
        code, line = run(*command, "--adapter", "topics")
        assert (code, f"the bundle is not as exported: {name}: expected sha256" in line) == (
            2,
            True,
        )
        assert line.endswith("Copy the bundle again, or export it again.")


def test_a_manifest_that_is_garbage_is_one_line(run: Run, bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    (copy / "edgetune.json").write_bytes(b"\x93\x00\xff")
    for command in (("predict", copy, "x"), ("verify", copy), ("check", copy)):
        code, line = run(*command)
        assert (code, line.startswith(f"{copy / 'edgetune.json'}: not valid JSON")) == (2, True)


@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped"])
def test_a_damaged_adapter_is_refused_by_every_command(
    damage: str, run: Run, topics: Path, bundle: Path, work: Path
) -> None:
    copy = shutil.copytree(topics, work / "mine")
    content = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).unlink()
    if damage != "missing":
        (copy / WEIGHTS).write_bytes(content[:-64] if damage == "truncated" else content)
    if damage == "flipped":
        flip(copy / WEIGHTS)
    before = files(work)
    for command in (
        ("predict", bundle, "x", "--adapter", copy),
        ("export", "--adapter", f"mine={copy}", "--out", work / "out"),
        ("eval", copy, "--data", work / "train.jsonl"),
    ):
        code, line = run(*command)
        assert (code, str(copy) in line, WEIGHTS in line, files(work)) == (2, True, True, before)


@pytest.mark.parametrize("name", ["adapter_config.json", "edgetune_adapter.json"])
@pytest.mark.parametrize("content", [b"\x93\x00\xff", b"[]", b"{}"])
def test_an_adapter_with_a_garbage_description_is_refused(
    content: bytes, name: str, run: Run, topics: Path, bundle: Path, work: Path
) -> None:
    copy = shutil.copytree(topics, work / "mine")
    (copy / name).write_bytes(content)
    for command in (
        ("export", "--adapter", f"mine={copy}", "--out", work / "out"),
        ("eval", copy, "--data", work / "train.jsonl"),
    ):
        code, line = run(*command)
        assert (code, str(copy) in line, (work / "out").exists()) == (2, True, False)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x08\0\0\0\0\0\0\0", b"\x05\0\0\0\0\0\0\0[1,2]", b'\x08\0\0\0\0\0\0\0{"a":{}}'],
)
def test_a_base_with_truncated_weights_is_refused(
    content: bytes, run: Run, work: Path, tiny_encoder: Path
) -> None:
    base = shutil.copytree(tiny_encoder, work / "base")
    (base / "model.safetensors").write_bytes(content)
    code, line = run("train", work / "recipe.toml", "--set", f"base={base}")
    assert (code, line.startswith(f"{base / 'model.safetensors'}: "), line.endswith("again.")) == (
        2,
        True,
        True,
    )


def test_ctrl_c_during_training_leaves_the_older_run(
    run: Run, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (work / "run").mkdir()
    (work / "run" / "summary.json").write_text("the older run")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    before = files(work)
    monkeypatch.setattr(Progress, "step", interrupt)
    code, line = run("train", work / "recipe.toml", "--replace")
    assert (code, line.splitlines()[-1]) == (130, "interrupted")
    assert files(work) == before and (work / "run" / "summary.json").read_text() == "the older run"


def test_export_needs_an_adapter(run: Run, tmp_path: Path) -> None:
    code, line = run("export", "--out", tmp_path / "out")
    assert (code, line) == (
        2,
        (
            "there is no adapter to export (expected --adapter NAME=RUN, once or several times, or"
            " --base NAME for a base alone)"
        ),
    )


def test_a_bundle_is_no_adapter_and_an_adapter_no_bundle(
    run: Run, bundle: Path, topics: Path, tmp_path: Path
) -> None:
    code, line = run("export", "--adapter", f"a={bundle}", "--out", tmp_path / "out")
    assert (code, "got a bundle; its adapters are in its folder adapters" in line) == (2, True)
    for command in (("predict", topics, "x"), ("verify", topics), ("check", topics)):
        code, line = run(*command)
        assert (
            code,
            line.startswith(f"{topics}: no edgetune.json in this folder. Give the folder that"),
        ) == (2, True)


@pytest.mark.parametrize("name", ["../../mine", "a/b", ".hidden", "a b"])
def test_an_adapters_name_stays_inside_the_bundle(
    name: str, run: Run, topics: Path, tmp_path: Path
) -> None:
    code, line = run("export", "--adapter", f"{name}={topics}", "--out", tmp_path / "out")
    assert (code, "cannot be an adapter's name" in line, files(tmp_path)) == (2, True, set())


def test_a_kept_module_that_is_not_there_is_refused(run: Run, topics: Path, tmp_path: Path) -> None:
    code, line = run(
        "export", "--adapter", f"a={topics}", "--out", tmp_path / "out", "--keep", "nosuch=fp32"
    )
    assert code == 2
    assert line.startswith("--keep: no module is called 'nosuch' (expected dense, key, ")
    assert files(tmp_path) == set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget", "nonsense"), "--budget: a budget is key=number (got nonsense)"),
        (("--budget", "ttft_ms=inf"), "--budget: the limit of ttft_ms is wrong"),
        (
            ("--budget", "ttft_ms=5", "--runs", 3),
            "--budget: this bundle has no ttft_ms, so its limit cannot be checked",
        ),
        (("--device", "raspbery-pi-5"), "unknown device 'raspbery-pi-5' (expected host"),
        (("--device", "nosuch.toml"), "nosuch.toml: the profile cannot be read"),
    ],
)
def test_a_wrong_check_is_named(
    arguments: tuple[object, ...], message: str, run: Run, bundle: Path
) -> None:
    code, line = run("check", bundle, *arguments)
    assert (code, line.startswith(message)) == (2, True)


def test_an_unknown_device_is_named(run: Run) -> None:
    code, line = run("devices", "nosuch")
    assert (code, line.startswith("unknown device 'nosuch' (expected host | ")) == (2, True)


def test_a_bundle_inside_another_is_refused(run: Run, topics: Path, bundle: Path) -> None:
    before = files(bundle)
    code, line = run("export", "--adapter", f"a={topics}", "--out", bundle / "inner")
    assert (code, "this place is inside another bundle" in line, files(bundle)) == (2, True, before)


def test_a_block_size_without_scales_is_refused(run: Run, topics: Path, tmp_path: Path) -> None:
    code, line = run(
        "export",
        "--adapter",
        f"a={topics}",
        "--out",
        tmp_path / "out",
        "--precision",
        "fp32",
        "--block-size",
        64,
    )
    assert (code, line.startswith("--block-size says which weights share a scale")) == (2, True)
