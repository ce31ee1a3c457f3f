"""The bytes of a data file → text: unpacked by what they are, decoded as said or as guessed."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from pathlib import Path
from string import ascii_letters

from edgetune.core.errors import DataError
from edgetune.data.code_pages import latin_page

# of a byte order mark: the encoding that reads it away
MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
GUESSES = (
    "cp1252",
    "cp1250",
    "cp1251",
    "cp1253",
    "cp1254",
    "shift_jis",
    "euc_kr",
    "gb18030",
    "big5",
)
LATIN = 2  # letters of ASCII for each byte beyond it: so many have languages with Latin letters
GUESSED_FROM = 200_000  # bytes
PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


def unpacked(path: Path) -> bytes:
    """The file's bytes, decompressed where they are gzip, Zstandard, bzip2 or xz, whatever its
    ending says. DataError where they are damaged.
    """
    data = path.read_bytes()
    how = next((name for mark, name in PACKED.items() if data.startswith(mark)), None)
    fix = "Fetch or compress the file again."
    if path.name.lower().endswith(".gz") and how is None:
        raise DataError("damaged gzip file: it is not gzip", where=str(path), fix=fix)
    try:
        if how == "gzip":
            return gzip.decompress(data)
        if how == "zstd":
            import pyarrow

            with pyarrow.input_stream(pyarrow.BufferReader(data), compression="zstd") as stream:
                found: bytes = stream.read()
            return found
        if how is not None:
            return bz2.decompress(data) if how == "bzip2" else lzma.decompress(data)
    except (EOFError, OSError, zlib.error, ValueError, lzma.LZMAError) as error:
        raise DataError(f"damaged {how} file: {error}", where=str(path), fix=fix) from error
    return data


def decoded(data: bytes, encoding: str | None, path: Path) -> tuple[str, str]:
    """Text, and what its encoding was taken for where nothing said so ("" for UTF-8).

    DataError for bytes that are not of the `encoding`, or that none of the usual ones explains.
    """
    marked = next((name for mark, name in MARKS.items() if data.startswith(mark)), None)
    named = encoding or marked
    if named is None and _looks_like_utf_16(data):
        named = "utf-16-le" if data[1:2] == b"\0" else "utf-16-be"
    try:
        text = data.decode(named or "utf-8")
        guess = named if encoding is None and named and "16" in named else ""
        return text.removeprefix("\ufeff"), guess
    except LookupError as error:
        raise DataError(
            "data.encoding is not known",
            where=str(path),
            expected='a name such as "utf-8", "cp1252" or "shift_jis"',
            got=repr(encoding),
        ) from error
    except UnicodeDecodeError as error:
        found = None if named else guessed(data)
        if found is not None:
            return data.decode(found), found
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"not {(named or 'UTF-8').upper().replace('-SIG', '')} text",
            where=f"{path}, line {line}",
            got=f"byte 0x{data[error.start]:02x}",
            fix='Save it as UTF-8, or set data.encoding, such as "cp1252".',
        ) from error


def guessed(data: bytes) -> str | None:
    """The likeliest encoding of text that is not UTF-8; None where it is UTF-8 with damaged bytes,
    or nothing explains it.
    """
    from charset_normalizer import from_bytes

    beyond = sum(byte > 127 for byte in data)
    damaged = data.decode("utf-8", errors="replace").count("\ufffd")
    if damaged * 4 < beyond:  # most of what is not ASCII is well-formed UTF-8
        return None
    letters = len(data) - len(data.translate(None, ascii_letters.encode()))
    if beyond * LATIN < letters and (page := latin_page(data)) is not None:
        return page
    best = from_bytes(data[:GUESSED_FROM], cp_isolation=list(GUESSES)).best()
    for name in ([best.encoding] if best is not None else []) + ["cp1252"]:
        try:
            data.decode(name)
        except UnicodeDecodeError:
            continue
        return str(name)
    return None


def _looks_like_utf_16(data: bytes) -> bool:
    head = data[:400]
    return len(head) >= 4 and max(head[::2].count(0), head[1::2].count(0)) * 3 > len(head)
