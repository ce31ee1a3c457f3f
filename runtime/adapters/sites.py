"""An adapter's modules put together for the sites of a graph: all at once in one buffer, or one
site after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from edgetune.core.arrays import Float32
from edgetune.runtime.bundle.manifest import Manifest, Part

Placed = dict[tuple[int, int], tuple[Float32, Float32]]
"""(site index, part index) → A (r, in), scaled B (out, r)"""


class SiteTensors(Mapping[str, Float32]):
    """An adapter's graph inputs, each packed when it is asked for and not kept: for an engine that
    makes its own copy, site by site. A site's A and B in succession are packed once.
    """

    def __init__(self, placed: Placed, manifest: Manifest, head: Mapping[str, Float32]) -> None:
        self._placed, self._manifest, self._head = placed, manifest, head
        self._site_of = {
            name: index
            for index in sorted({index for index, _ in placed})
            for name in (manifest.sites[index].A, manifest.sites[index].B)
        }
        self._last: tuple[int, dict[str, Float32]] | None = None

    def __getitem__(self, name: str) -> Float32:
        if name in self._head:
            return self._head[name]
        index = self._site_of[name]
        if self._last is None or self._last[0] != index:
            own = {place: pair for place, pair in self._placed.items() if place[0] == index}
            self._last = index, pack_sites(own, self._manifest)
        return self._last[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._site_of, *self._head])

    def __len__(self) -> int:
        return len(self._site_of) + len(self._head)


def pack_sites(placed: Placed, manifest: Manifest) -> dict[str, Float32]:
    """Concatenate the parts' A along rank and put their B's block-diagonally: one pair of inputs a
    site.

    All of an adapter's tensors are views of one buffer: one allocation to make, and to give back at
    unload.
    """
    chosen = {}
    for i, site in enumerate(manifest.sites):
        if parts := [
            (part, *placed[i, j]) for j, part in enumerate(site.parts) if (i, j) in placed
        ]:
            chosen[i] = parts
    ranks = {i: sum(a.shape[0] for _, a, _ in parts) for i, parts in chosen.items()}
    widths = {i: manifest.sites[i].in_features + manifest.sites[i].out_features for i in chosen}
    buffer = np.empty(sum(ranks[i] * widths[i] for i in chosen), np.float32)
    tensors, start = {}, 0
    for i, parts in chosen.items():
        site, rank = manifest.sites[i], ranks[i]
        end_a, end_b = start + site.in_features * rank, start + widths[i] * rank
        tensors[site.A] = buffer[start:end_a].reshape(1, site.in_features, rank)
        tensors[site.B] = buffer[end_a:end_b].reshape(1, rank, site.out_features)
        _fill_site(tensors[site.A][0], tensors[site.B][0], parts)
        start = end_b
    return tensors


def _fill_site(
    site_a: Float32, site_b: Float32, parts: list[tuple[Part, Float32, Float32]]
) -> None:
    """Write the parts into A (in, Σr) and B (Σr, out), B's row blocks at columns start:stop of
    their part.
    """
    if len(parts) > 1 or parts[0][2].shape[0] < site_b.shape[1]:
        site_b[:] = 0.0
    row = 0
    for part, a, b in parts:
        site_a[:, row : row + a.shape[0]] = a.T
        site_b[row : row + a.shape[0], part.start : part.stop] = b.T
        row += a.shape[0]
