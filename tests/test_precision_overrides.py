"""Precisions that are asked for by module name, and texts that end at a stop string."""

from __future__ import annotations

import pytest

from edgetune.errors import ExportError
from edgetune.torch_answers import first_part
from edgetune.weight_precision import Precision


def test_a_product_of_several_layers_has_one_precision() -> None:
    packed = ["layers.0.q_proj", "layers.0.k_proj", "layers.0.v_proj"]
    assert Precision("int4", overrides={"q_proj": "int8"}).bits(packed) == 8
    assert Precision("int4", overrides={"q_proj": "int8", "v_proj": "int8"}).bits(packed) == 8
    assert Precision("int4", overrides={"o_proj": "int8"}).bits(packed) == 4
    with pytest.raises(ExportError, match=r"k_proj, q_proj, v_proj are one product here .*got int4 and int8"):
        Precision("int4", overrides={"q_proj": "int8", "v_proj": "int4"}).bits(packed)


@pytest.mark.parametrize(("text", "stops", "expected"), [("a.b;c", [";", "."], "a"), ("abc", [";"], "abc"), ("abc", (), "abc")])
def test_a_text_ends_at_the_first_stop_string(text: str, stops: list[str], expected: str) -> None:
    assert first_part(text, stops) == expected
