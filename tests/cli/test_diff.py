"""`edgetune diff`: what changed between two bundles, and whether it can change an answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from export_helpers import export, make_adapter, op_counts, traced_anew
from process_helpers import BLOCKED, python

from edgetune.cli.diff import command
from edgetune.core.errors import BundleError
from edgetune.export.graph.onnx_file import read_graph
from edgetune.runtime.bundle.diff import Change, diff


@pytest.fixture(scope="module")
def adapter(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_encoder, tmp_path_factory.mktemp("adapters") / "topics")


@pytest.fixture(scope="module")
def bundles(
    tiny_encoder: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """fp32 with one adapter; int8 with another rank of it and one more."""
    folder = tmp_path_factory.mktemp("bundles")
    (folder / "other").mkdir()
    other = make_adapter(
        tiny_encoder,
        folder / "other" / "topics",
        rank=2,
        alpha=32.0,
        target_modules=("query", "value"),
    )
    more = make_adapter(tiny_encoder, folder / "more", seed=3)
    export(folder / "a", adapter)
    export(folder / "b", other, more, precision="int8")
    return folder / "a", folder / "b"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(
        command, [str(argument) for argument in arguments], standalone_mode=False
    )


def edited(bundle: Path, copy: Path, **changes: Any) -> Path:
    shutil.copytree(bundle, copy)
    document = json.loads((copy / "edgetune.json").read_text())
    (copy / "edgetune.json").write_text(json.dumps(document | changes))
    return copy


def test_a_bundle_is_equal_to_itself_and_to_a_second_export(
    bundles: tuple[Path, Path], adapter: Path, tmp_path: Path
) -> None:
    assert diff(bundles[0], bundles[0], read_graph=read_graph).changes == ()
    with traced_anew():
        export(tmp_path / "again", adapter)
    done = run(bundles[0], tmp_path / "again")
    assert done.return_value == 0 and "equal in all that an engine reads" in done.output


def test_everything_that_changed_is_listed_with_both_values(bundles: tuple[Path, Path]) -> None:
    found = diff(*bundles, read_graph=read_graph)
    changes = {
        (change.part, change.name): (change.a, change.b)
        for change in found.changes
        if change.behaviour
    }
    assert changes["precision", "weights"] == ("fp32", "int8") and changes[
        "precision", "block_size"
    ] == (None, 32)
    assert changes["adapter", "topics rank"] == (4, 2) and changes["adapter", "topics alpha"] == (
        16,
        32,
    )
    assert {path.rpartition(".")[2] for path in changes["adapter", "topics modules"][1]} == {
        "query",
        "value",
    }
    assert changes["adapter", "more"] == (None, "rank 4, alpha 16, sequence-classification")
    assert (
        changes["nodes", "engine.onnx MatMulNBits"] == (0, 8)
        and changes["file", "adapters/more/more.onnx_adapter"][0] is None
    )
    assert not {"base", "tokenizer"} & {part for part, _ in changes}
    assert {change.part for change in found.changes if not change.behaviour} == {
        "proof",
        "size",
        "file",
    }


def test_the_command_says_it_to_people_and_to_scripts(
    bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    done = run(*bundles, "--json", tmp_path / "d.json")
    document = json.loads((tmp_path / "d.json").read_text())
    assert done.return_value == 1 and not document["equal"] and document["graphs_read"]
    assert document["changes"] == [vars(change) for change in map(as_change, document["changes"])]
    assert "precision  weights" in done.output and "different (* in precision" in done.output


def as_change(values: dict[str, Any]) -> Change:
    return Change(**values)


def test_another_version_and_other_figures_change_no_answer(
    bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    proof = json.loads((bundles[0] / "edgetune.json").read_text())["proof"]
    proof["task"] = {"topics": {"bundle": {"accuracy": 0.5}}}
    copy = edited(bundles[0], tmp_path / "copy", edgetune_version="9.9", proof=proof)
    found = diff(bundles[0], copy)
    assert found.equal and [(change.part, change.name) for change in found.changes] == [
        ("bundle", "edgetune_version"),
        ("task", "topics accuracy"),
    ]


def test_a_graph_with_other_metadata_is_the_same_graph_where_onnx_can_tell(
    bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    import onnx

    from edgetune.core.files import sha256_file

    copy = edited(bundles[0], tmp_path / "copy")
    graph = onnx.load(str(copy / "engine.onnx"), load_external_data=False)
    graph.metadata_props[0].value = "another"
    (copy / "engine.onnx").write_bytes(graph.SerializeToString())
    document = json.loads((copy / "edgetune.json").read_text())
    document["files"]["engine.onnx"] = {
        "sha256": sha256_file(copy / "engine.onnx"),
        "bytes": (copy / "engine.onnx").stat().st_size,
    }
    (copy / "edgetune.json").write_text(json.dumps(document))
    assert diff(bundles[0], copy, read_graph=read_graph).equal and not diff(bundles[0], copy).equal


def test_without_onnx_and_torch_bundles_are_compared_all_the_same(
    bundles: tuple[Path, Path],
) -> None:
    code = (
        f"import sys; sys.argv[1:] = ['diff', {str(bundles[0])!r}, {str(bundles[1])!r}]\nfrom"
        " edgetune.cli import main\nmain()"
    )
    hidden = (
        "import importlib.util as u\nreal = u.find_spec\nu.find_spec = lambda name, *a: None if"
        " name == 'onnx' else real(name, *a)\n"
    )
    done = python(BLOCKED + hidden + code)
    assert done.returncode == 1 and "onnx is not installed" in done.stdout, done.stderr


def test_latency_is_measured_side_by_side(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    done = run(
        *bundles, "--latency", "--rounds", "1", "--threads", "1", "--json", tmp_path / "d.json"
    )
    latency = json.loads((tmp_path / "d.json").read_text())["latency"]
    assert latency["ratio"]["request_ms"] == pytest.approx(
        latency["B"]["request_ms"] / latency["A"]["request_ms"]
    )
    assert latency["A"]["tpot_ms"] is None and "request_ms" in done.output


def test_a_folder_that_is_no_bundle_is_named(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no edgetune\.json"):
        diff(bundles[0], tmp_path)


def test_a_decoders_nodes_are_compared(tiny_decoder: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_decoder, tmp_path / "a")
    export(tmp_path / "fp32", adapter)
    export(tmp_path / "int8", adapter, precision="int8")
    found = diff(tmp_path / "fp32", tmp_path / "int8", read_graph=read_graph)
    nodes = {
        change.name: (change.a, change.b) for change in found.changes if change.part == "nodes"
    }
    assert nodes["engine.onnx MatMulNBits"] == (0, op_counts(tmp_path / "int8")["MatMulNBits"])


@pytest.mark.parametrize(("name", "other"), [("max_length", 7), ("pooling", "cls")])
def test_how_an_encoders_adapter_reads_a_text_counts(
    bundles: tuple[Path, Path], tmp_path: Path, name: str, other: Any
) -> None:
    copy = edited(bundles[0], tmp_path / "copy")
    metadata = copy / "adapters" / "topics" / "edgetune_adapter.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {name: other}))
    found = diff(bundles[0], copy)
    assert [(change.name, change.b) for change in found.changes if change.behaviour] == [
        (f"topics {name}", other)
    ] and not found.equal


@pytest.mark.parametrize(
    "file",
    ["adapters/topics/adapter_config.json", "adapters/topics/edgetune_adapter.json", "engine.onnx"],
)
def test_a_damaged_file_is_named(bundles: tuple[Path, Path], tmp_path: Path, file: str) -> None:
    files = json.loads((bundles[0] / "edgetune.json").read_text())["files"]
    copy = edited(bundles[0], tmp_path / "copy", files=files | {"engine.onnx": files["model.onnx"]})
    (copy / file).write_bytes((copy / file).read_bytes()[:-9] + b"\xff{")
    with pytest.raises(BundleError, match=rf"{file}: .*edgetune verify"):
        diff(bundles[0], copy, read_graph=read_graph)
