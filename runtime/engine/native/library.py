"""The shared library of `csrc`, loaded by ctypes: its structures and functions, and why it may not
be there. `csrc/edgetune_native.h` says what they do.
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from pathlib import Path

ABI = 2
ERROR_BYTES = 512
NAME = {"darwin": "libedgetune_native.dylib", "win32": "edgetune_native.dll"}.get(
    sys.platform, "libedgetune_native.so"
)
HOW = "pip install edgetune where a C++ compiler is builds it"


class CSizes(ctypes.Structure):
    """`edgetune_sizes`."""

    _fields_ = [
        *(
            (name, ctypes.c_int32)
            for name in (
                "hidden",
                "vocab",
                "layers",
                "heads",
                "kv_heads",
                "head_dim",
                "positions",
                "cache_bytes",
                "cache_step",
                "most_tokens",
                "threads",
            )
        ),
        ("weight_bytes", ctypes.c_uint64),
    ]


class CCache(ctypes.Structure):
    """`edgetune_cache`."""

    _fields_ = [
        ("memory", ctypes.c_void_p),
        ("slots", ctypes.c_int64),
        ("capacity", ctypes.c_int64),
    ]


class CSpan(ctypes.Structure):
    """`edgetune_span`."""

    _fields_ = [
        ("ids", ctypes.c_void_p),
        ("count", ctypes.c_int32),
        ("slot", ctypes.c_int32),
        ("length", ctypes.c_int32),
        ("adapter", ctypes.c_void_p),
    ]


class NoLibraryError(Exception):
    """Why the native engine cannot run here: one line."""


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The library with its functions' types; NoLibraryError where it was not built, is of another
    version, or this processor lacks what it needs.
    """
    path = Path(__file__).with_name(NAME)
    if not path.exists():
        raise NoLibraryError(f"the native engine was not built ({HOW})")
    try:
        found = ctypes.CDLL(str(path))
        abi = found.edgetune_abi()
    except (OSError, AttributeError) as error:
        raise NoLibraryError(f"the native engine cannot be loaded: {error} ({HOW})") from error
    if abi != ABI:
        raise NoLibraryError(
            f"the native engine is of another version (expected {ABI}, got {abi}); {HOW}"
        )
    _declare(found)
    if not found.edgetune_instruction_sets():
        raise NoLibraryError(
            "this processor has none of the instruction sets that the native engine is built for"
            " (AVX2 with FMA and F16C, AVX-512 with VNNI, NEON with dot products)"
        )
    return found


def _declare(found: ctypes.CDLL) -> None:
    text, pointer, size, number = (
        ctypes.c_char_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
    )
    error = [text, size]
    for name, result, arguments in (
        ("instruction_sets", text, []),
        ("open", pointer, [text, size, text, number, number, text, *error]),
        ("close", None, [pointer]),
        ("model_sizes", None, [pointer, ctypes.POINTER(CSizes)]),
        ("model_instruction_set", text, [pointer]),
        ("adapter_new", pointer, [pointer]),
        ("adapter_add", number, [pointer, text, number, pointer, pointer, *error]),
        ("adapter_bytes", ctypes.c_uint64, [pointer]),
        ("adapter_free", None, [pointer]),
        (
            "run",
            number,
            [
                pointer,
                ctypes.POINTER(CCache),
                ctypes.POINTER(CSpan),
                number,
                pointer,
                number,
                pointer,
                pointer,
                *error,
            ],
        ),
        ("read_weights", ctypes.c_double, [pointer]),
    ):
        function = getattr(found, f"edgetune_{name}")
        function.restype, function.argtypes = result, arguments
