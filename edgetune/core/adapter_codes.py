"""Small adapters: numbers of 2 to 8 bits in a safetensors file, written and read with numpy alone.

`docs/reference/small-adapters.md` is this layout for a reader of another language. A coded tensor
is uint8, a row of bytes for each row of numbers; its name says what the bytes are:
`NAME.BITSbit.WIDTH` for one matrix (rows, WIDTH), `NAME.lora.BITSbit.INxOUT` for a pair, whose row
k holds row k of A (r, IN) and column k of B (OUT, r). A row begins with a float32 scale for each of
its parts; their codes follow, each part from a whole byte on, the lowest bits first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.core.arrays import Float32
from edgetune.core.layout import PEFT_PREFIX

Bytes = npt.NDArray[np.uint8]
BITS = (2, 3, 4, 8)
LAYOUT_VERSION = 1
KEY = "edgetune_codes"
"""of adapter_config.json: the version of the layout; only such a folder may hold codes"""
PEFT_TYPE = "LORA in edgetune's codes; `edgetune decompress FOLDER --out NEW` makes it PEFT's"
"""In PEFT's place for the kind of adapter, so that it stops with these words instead of loading an
adapter without weights."""
NAME = re.compile(
    r"(?P<name>.+?)(?P<pair>\.lora)?\.(?P<bits>[2348])bit\.(?P<first>\d{1,7})(?:x(?P<second>\d{1,7}))?"
)
PAIR = ".lora"
SCALE_BYTES = 4


@dataclass(frozen=True)
class Coded:
    """What a coded tensor's name says."""

    name: str
    """a module's for a pair, a tensor's for one matrix"""
    bits: int
    widths: tuple[int, ...]

    @property
    def key(self) -> str:
        """The tensor's name in the file."""
        pair = PAIR if len(self.widths) == 2 else ""
        return f"{self.name}{pair}.{self.bits}bit.{'x'.join(map(str, self.widths))}"

    @property
    def row_bytes(self) -> int:
        """Bytes of a row: scales, then codes."""
        return sum(SCALE_BYTES + -(-width * self.bits // 8) for width in self.widths)

    @property
    def middle(self) -> float:
        """The code of zero, which lies between two codes."""
        return middle_of(self.bits)

    def shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        """PEFT's name → shape of what the rows decode to."""
        if len(self.widths) == 1:
            return {self.name: (rows, self.widths[0])}
        a, b = (f"{PEFT_PREFIX}{self.name}.lora_{side}.weight" for side in "AB")
        return {a: (rows, self.widths[0]), b: (self.widths[1], rows)}

    def encode(self, parts: Sequence[tuple[npt.NDArray[np.uint8], Float32]]) -> Bytes:
        """Codes (rows, width) and scales (rows,) of each part → the rows (rows, row_bytes)."""
        scales = np.stack([scale for _, scale in parts], axis=1).astype("<f4")
        packed = [_pack(codes, self.bits) for codes, _ in parts]
        return np.concatenate([scales.view(np.uint8), *packed], axis=1)

    def decode(self, rows: Bytes) -> dict[str, Float32]:
        """PEFT's name → float32, as in `shapes`."""
        at = SCALE_BYTES * len(self.widths)
        scales = np.ascontiguousarray(rows[:, :at]).view("<f4")
        parts = []
        for part, width in enumerate(self.widths):
            end = at + -(-width * self.bits // 8)
            codes = _unpack(np.ascontiguousarray(rows[:, at:end]), self.bits, width)
            with np.errstate(over="ignore", invalid="ignore"):
                numbers = (codes - np.float32(self.middle)) * scales[:, part : part + 1]
            parts.append(numbers if part == 0 else np.ascontiguousarray(numbers.T))
            at = end
        return dict(zip(self.shapes(len(rows)), parts, strict=True))


def middle_of(bits: int) -> float:
    """The code of zero: 1.5 of two bits, 7.5 of four."""
    return (2**bits - 1) / 2


def coded(name: str, shape: Sequence[int]) -> Coded | None:
    """What a uint8 tensor holds; None where its name is no coded tensor's. ValueError where its
    shape is not what the name says.
    """
    match = NAME.fullmatch(name)
    if match is None or (match["pair"] is None) != (match["second"] is None):
        return None
    widths = tuple(int(width) for width in (match["first"], match["second"]) if width is not None)
    found = Coded(match["name"], int(match["bits"]), widths)
    if len(shape) != 2 or shape[0] < 1 or min(widths) < 1 or shape[1] != found.row_bytes:
        raise ValueError(
            f"{name:.200}: expected (rows, {found.row_bytes}) bytes, got {tuple(shape)}"
        )
    return found


def decode_file(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a safetensors file, numpy's, with every coded one decoded to float32."""
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        one = coded(name, tensor.shape) if tensor.dtype == np.uint8 else None
        found |= {name: tensor} if one is None else one.decode(tensor)
    return found


def is_coded(config: Mapping[str, Any]) -> bool:
    """Whether an adapter's configuration says that its weights are codes."""
    return KEY in config


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's configuration of the same adapter, without the ranks of its modules: codes have them
    in their shapes, and scaling 1.
    """
    if not is_coded(config):
        return dict(config)
    own = {key: value for key, value in config.items() if key != KEY}
    return {**own, "peft_type": "LORA", "lora_alpha": own.get("r"), **_without_patterns()}


def coded_config(config: Mapping[str, Any], *, rank: int) -> dict[str, Any]:
    """The configuration of codes of at most this rank, with the words that keep PEFT from loading
    them.
    """
    own = {**config, "r": rank, "lora_alpha": rank, **_without_patterns()}
    return {**own, "peft_type": PEFT_TYPE, KEY: LAYOUT_VERSION}


def _without_patterns() -> dict[str, Any]:
    """Of its own for every caller, who may fill it."""
    return {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}


def unknown_layout(config: Mapping[str, Any]) -> str | None:
    """A line where a configuration names another version of the layout."""
    version = config.get(KEY, LAYOUT_VERSION)
    if version == LAYOUT_VERSION and not isinstance(version, bool):
        return None
    return f"{KEY}: expected {LAYOUT_VERSION}, got {version!r:.40}; a newer edgetune reads it"


def _pack(codes: Bytes, bits: int) -> Bytes:
    """(rows, width) → (rows, bytes), the lowest bits first."""
    if bits == 8:
        return codes
    spread = codes[:, :, None] >> np.arange(bits, dtype=np.uint8) & 1
    return np.packbits(spread.reshape(len(codes), -1), axis=1, bitorder="little")


def _unpack(packed: Bytes, bits: int, width: int) -> Bytes:
    """(rows, bytes) → (rows, width)."""
    if bits in (2, 4):  # several whole codes a byte
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        codes: Bytes = packed[:, :, None] >> shifts & np.uint8(2**bits - 1)
        return codes.reshape(len(packed), -1)[:, :width]
    if bits == 8:
        return packed
    spread = np.unpackbits(packed, axis=1, count=width * bits, bitorder="little")
    places = (1 << np.arange(bits)).astype(np.uint8)
    unpacked: Bytes = (spread.reshape(len(packed), width, bits) * places).sum(2, dtype=np.uint8)
    return unpacked
