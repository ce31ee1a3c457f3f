"""How many bits a bundle's weights may have, by name."""

from __future__ import annotations

PRECISIONS = ("fp32", "fp16", "int8", "int4")  # the finest first
BITS = {"fp32": 0, "int8": 8, "int4": 4}  # of a layer; 0: not rounded to integers
FLOATS = ("fp32", "fp16")  # precisions of a whole bundle in which nothing is rounded to integers
ADAPTER_PRECISIONS = ("fp32", "fp16", "int8", "int4", "int3", "int2")  # of an adapter in a bundle
ADAPTER_BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}  # of its codes


def adapter_bounds(precision: str) -> str:
    """The precision of weights whose bounds hold for an adapter in this one."""
    return "int4" if ADAPTER_BITS.get(precision, 8) < 8 else precision
