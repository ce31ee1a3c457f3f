"""How many bits a bundle's weights may have, by name."""

from __future__ import annotations

PRECISIONS = ("fp32", "fp16", "int8", "int4")  # the finest first
BITS = {"fp32": 0, "int8": 8, "int4": 4}  # of a layer; 0: not rounded to integers
FLOATS = ("fp32", "fp16")  # precisions of a whole bundle in which nothing is rounded to integers
