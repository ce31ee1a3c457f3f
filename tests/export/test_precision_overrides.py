"""Precisions that are asked for by module name, and texts that end at a stop string."""

from __future__ import annotations

from pathlib import Path

import pytest
from export_helpers import make_adapter

from edgetune.core.errors import ExportError
from edgetune.evaluation.torch_answers import first_part
from edgetune.export.bundle import export_bundle
from edgetune.quantisation.precision import Precision


def test_a_product_of_several_layers_has_one_precision() -> None:
    packed = ["layers.0.q_proj", "layers.0.k_proj", "layers.0.v_proj"]
    assert Precision("int4", overrides={"q_proj": "int8"}).bits(packed) == 8
    assert Precision("int4", overrides={"q_proj": "int8", "v_proj": "int8"}).bits(packed) == 8
    assert Precision("int4", overrides={"o_proj": "int8"}).bits(packed) == 4
    with pytest.raises(
        ExportError, match=r"k_proj, q_proj, v_proj are one product here .*got int4 and int8"
    ):
        Precision("int4", overrides={"q_proj": "int8", "v_proj": "int4"}).bits(packed)


def layers(*names: str) -> list[list[str]]:
    return [[f"layers.{at}.attn.{name}" for name in names] for at in range(2)]


def test_what_is_decided_for_a_product_is_said_of_each_of_its_layers() -> None:
    products = [*layers("q_proj", "k_proj", "v_proj"), *layers("o_proj")]
    settled = Precision("int4", overrides={"q_proj": "int8"}).settled(products)
    assert settled.overrides == {"q_proj": "int8", "k_proj": "int8", "v_proj": "int8"}
    assert all(
        settled.bits([path]) == settled.bits(modules) for modules in products for path in modules
    )


def test_an_override_of_one_layer_spreads_by_whole_paths() -> None:
    products = layers("q_proj", "k_proj")
    settled = Precision("int4", overrides={"1.attn.q_proj": "int8"}).settled(products)
    assert settled.overrides == {"1.attn.q_proj": "int8", "layers.1.attn.k_proj": "int8"}
    assert [settled.bits([path]) for modules in products for path in modules] == [4, 4, 8, 8]


def test_an_embedding_of_that_name_keeps_what_it_had() -> None:
    settled = Precision("int8", overrides={"query": "fp32"}).settled(
        [["a.query", "a.table"]], others=["table"]
    )
    assert (
        settled.overrides == {"query": "fp32", "a.table": "fp32"} and settled.bits(["table"]) == 8
    )


def test_without_packed_overrides_nothing_is_added() -> None:
    stored = Precision("int4", overrides={"lm_head": "int8"})
    assert stored.settled([*layers("q_proj", "k_proj"), ["lm_head"]], others=["embed"]) == stored


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [("a.b;c", [";", "."], "a"), ("abc", [";"], "abc"), ("abc", (), "abc")],
)
def test_a_text_ends_at_the_first_stop_string(text: str, stops: list[str], expected: str) -> None:
    assert first_part(text, stops) == expected


def test_a_table_whose_width_is_no_multiple_of_the_block_is_said_to_stay_in_fp32(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    adapter = make_adapter(tiny_decoder, tmp_path / "a")
    manifests = [
        export_bundle(
            [("a", adapter)],
            tmp_path / str(block),
            precision=Precision("int8", block_size=block),
            say=said.append,
        )
        for block in (64, 128)
    ]
    assert [one.quality.get("kept_in_fp32") for one in manifests] == [
        None,
        {"model.embed_tokens": 352 * 64 * 3},
    ]
    sizes = [one.files["model.onnx.data"].bytes for one in manifests]
    assert sizes[1] > sizes[0]
    (line,) = [one for one in said if "fp32" in one and "stays" in one]
    assert line.startswith("model.embed_tokens stays in fp32 (0.1 MB more)")
    assert "because its width is no multiple" in (tmp_path / "128" / "report.html").read_text()
