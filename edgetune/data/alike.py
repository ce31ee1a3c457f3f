"""Texts that are equal or nearly so: the keys by which rows are compared and kept together."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence

# rows that are equal but for their digits: more than this share of all (and this many) are told
# apart by them, as sums are
CROWD, CROWDED = 0.05, 8


def equal_key(text: str) -> str:
    """What texts have in common that differ in case and spaces alone."""
    return " ".join(text.casefold().split())


def alike_keys(texts: Sequence[str]) -> list[str]:
    """A key for each text, the same for those that differ in case, spaces, punctuation and digits
    alone.

    Where so many texts differ in digits alone that these must be what they are about ("12 + 7"),
    digits count; so do all characters of a text without letters.
    """
    with_digits = [_kept(text, "LMN") or equal_key(text) for text in texts]
    bare = [_kept(text, "LM") for text in with_digits]
    sizes, variants = Counter(bare), defaultdict[str, set[str]](set)
    for key, digits in zip(bare, with_digits, strict=True):
        variants[key].add(digits)
    most = max(CROWDED, CROWD * len(texts))
    return [
        digits if not key or (sizes[key] > most and len(variants[key]) > 1) else key
        for key, digits in zip(bare, with_digits, strict=True)
    ]


def _kept(text: str, categories: str) -> str:
    """The characters of these Unicode categories, in small letters."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in folded if unicodedata.category(c)[0] in categories)
