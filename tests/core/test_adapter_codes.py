"""The bytes of a small adapter's tensors."""

from __future__ import annotations

import numpy as np
import pytest

from edgetune.core.adapter_codes import (
    BITS,
    LAYOUT_VERSION,
    Coded,
    coded,
    coded_config,
    is_coded,
    middle_of,
    plain_config,
    unknown_layout,
)


@pytest.mark.parametrize("bits", BITS)
def test_codes_come_back_as_they_were_whatever_the_width(bits: int) -> None:
    draw = np.random.default_rng(0)
    for widths in ((5, 3), (64, 17), (1, 1), (7,)):
        one = Coded("layer", bits, widths)
        codes = [draw.integers(0, 2**bits, (3, width), dtype=np.uint8) for width in widths]
        scales = [draw.random(3, np.float32) for _ in widths]
        rows = one.encode(list(zip(codes, scales, strict=True)))
        assert rows.shape == (3, one.row_bytes) and coded(one.key, rows.shape) == one
        decoded = list(one.decode(rows).values())
        expected = [
            (code - np.float32(middle_of(bits))) * scale[:, None]
            for code, scale in zip(codes, scales, strict=True)
        ]
        assert np.array_equal(decoded[0], expected[0])
        assert len(widths) == 1 or np.array_equal(decoded[1], expected[1].T)
        assert [tensor.shape for tensor in decoded] == list(one.shapes(3).values())


def test_the_lowest_bits_come_first() -> None:
    """The example of the documentation's page."""
    one = Coded("m", 4, (4,))
    rows = one.encode([(np.array([[1, 2, 3, 15]], np.uint8), np.array([0.5], np.float32))])
    assert rows.tolist() == [[0, 0, 0, 0x3F, 0x21, 0xF3]]
    assert one.decode(rows)["m"].tolist() == [[-3.25, -2.75, -2.25, 3.75]]
    three = Coded("m", 3, (3,))
    rows = three.encode([(np.array([[1, 2, 7]], np.uint8), np.array([1.0], np.float32))])
    assert rows[0, 4:].tolist() == [0b11010001, 0b1]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("a.lora.4bit.8x8", (2, 15)),
        ("a.lora.4bit.8x8", (0, 16)),
        ("a.lora.4bit.8x8", (16,)),
        ("a.lora.4bit.0x8", (1, 12)),
        ("a.8bit.9999999", (1, 13)),
    ],
)
def test_bytes_that_are_not_what_the_name_says_are_refused(
    name: str, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"expected \(rows, \d+\) bytes"):
        coded(name, shape)


@pytest.mark.parametrize("name", ["a.weight", "a.lora.5bit.8x8", "a.lora.4bit.8", "a.4bit.8x8"])
def test_other_names_are_no_codes(name: str) -> None:
    assert coded(name, (2, 16)) is None


def test_a_configuration_comes_back_without_its_ranks() -> None:
    own = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "rank_pattern": {"q": 4}, "bias": "none"}
    written = coded_config(own, rank=6)
    assert is_coded(written) and not is_coded(own) and "edgetune decompress" in written["peft_type"]
    plain = plain_config(written)
    assert (plain["peft_type"], plain["r"], plain["lora_alpha"]) == ("LORA", 6, 6)
    assert plain["rank_pattern"] == {} and plain["bias"] == "none" and plain_config(own) == own


def test_a_later_layout_is_named() -> None:
    assert unknown_layout(coded_config({}, rank=1)) is None and unknown_layout({}) is None
    line = unknown_layout({"edgetune_codes": LAYOUT_VERSION + 1})
    assert line is not None and "expected 1, got 2" in line
    assert unknown_layout({"edgetune_codes": True}) is not None
