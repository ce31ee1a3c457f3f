"""The adapters a runtime knows: read at first use, counted while in use, forgotten by least recent
use when memory ends.

A name is known (shipped in the bundle, found in the adapter folder, or loaded) or resident as well
(its tensors are in memory, bound for the engine). Files are read by whoever asks first, outside the
registry's lock, so that nobody else waits; hashes, names and shapes are checked there, before the
engine sees a byte.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from edgetune.core.errors import AdapterError
from edgetune.core.settings import nearest
from edgetune.devices.host import release_free_memory
from edgetune.runtime.adapters.packing import PackedAdapter
from edgetune.runtime.adapters.sources import AdapterSources, Source
from edgetune.runtime.bundle.manifest import Manifest
from edgetune.runtime.engine.interface import BoundAdapter, Tensors
from edgetune.runtime.signature.keys import PublicKey

InUse = Literal["forget", "refuse", "wait"]
"""What `unload` does with an adapter that is in use: see there."""

RELEASE_EVERY_S = 10.0
"""Free memory is given back at most this often: it takes 20 ms, in which nobody can allocate."""


@dataclass(frozen=True)
class Resident:
    """An adapter in memory: its packed tensors bound for the engine. `serial` is another one for
    another content.
    """

    packed: PackedAdapter
    bound: BoundAdapter
    serial: int = 0

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        own = self.bound.own_bytes
        return self.packed.nbytes if own is None else own


@dataclass(frozen=True)
class AdapterStatus:
    """One line of the list of adapters."""

    name: str
    folder: str | None
    """where it was read from; None when it is merged into the bundle's weights"""
    resident: bool
    pinned: bool
    users: int
    nbytes: int
    notes: tuple[str, ...] = ()
    """of a resident one: what could not be checked"""


@dataclass
class _Known:
    """A name and what it stands for."""

    source: Source
    serial: int
    resident: Resident | None = None
    fingerprint: str | None = None
    users: int = 0
    pinned: bool = False
    used: int = 0
    reading: threading.Lock = field(default_factory=threading.Lock)


class AdapterInUseError(AdapterError):
    """It cannot be unloaded as asked: requests use it."""


class Lease:
    """An adapter in use: until `release` it is neither evicted nor unloaded (unless the unloader
    said "forget").
    """

    def __init__(self, registry: AdapterRegistry, known: _Known, resident: Resident) -> None:
        self._registry, self.resident = registry, resident
        self._held: _Known | None = known

    def release(self) -> None:
        """Give it back; a second call does nothing."""
        held, self._held = self._held, None
        if held is not None:
            self._registry._release(held)


class AdapterRegistry:
    """Name → adapter, thread-safe. A row that is being decoded holds its tensors itself: nothing
    pulls them away.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        bind: Callable[[Tensors], BoundAdapter],
        adapter_folder: Path | None = None,
        memory_mb: float | None = None,
        strict: bool = False,
        by_site: bool = False,
        signed_by: PublicKey | None = None,
        signed: Mapping[str, str] | None = None,
    ) -> None:
        """`bind` makes an adapter's tensors ready for the engine. Each PEFT folder in
        `adapter_folder` is an adapter of its name.

        `memory_mb` (10⁶ bytes) bounds the resident ones, but for those that are pinned or in use;
        None is no bound. `strict`, `signed_by`, `signed`: see AdapterSources. `by_site`: `bind`
        makes a copy of its own, site by site, so that nothing is packed all at once.
        """
        self._sources = AdapterSources(
            folder,
            manifest,
            adapter_folder,
            strict=strict,
            by_site=by_site,
            signed_by=signed_by,
            signed=signed,
        )
        self._bind = bind
        head = manifest.head
        self._heads = () if head is None else (head.weight, head.bias)
        self._limit = None if memory_mb is None else memory_mb * 1e6
        self._change = threading.Condition()
        self._serials, self._clock = itertools.count(1), itertools.count(1)
        self._known = {
            entry.name: _Known(entry, next(self._serials)) for entry in manifest.adapters
        }
        self._gone: set[str] = set()
        self._leaving: dict[str, _Known] = {}
        """what an unload waits for, while its name is nobody else's"""
        self.evictions = 0
        self._released = -RELEASE_EVERY_S

    def names(self) -> tuple[str, ...]:
        """Every name that can be used: shipped, loaded, then those of the adapter folder."""
        found = [name for name in self._sources.names() if name not in self._gone]
        return tuple(dict.fromkeys([*self._known, *found]))

    def knows(self, name: str) -> bool:
        """Whether a name can be used, without listing a folder of hundreds."""
        with self._change:
            return name in self._known or (
                name not in self._gone and self._sources.find(name) is not None
            )

    @property
    def nbytes(self) -> int:
        """Memory of the resident adapters."""
        with self._change:
            return self._nbytes()

    def statuses(self) -> tuple[AdapterStatus, ...]:
        """Every adapter that can be used, as it stands now."""
        with self._change:
            known = dict(self._known)
        return tuple(self._status(name, known.get(name)) for name in self.names())

    def load(self, name: str, folder: str | Path, *, pin: bool = False) -> PackedAdapter:
        """Read and check a PEFT folder under a new name. AdapterError when the name is taken or it
        does not fit.
        """
        if not name:
            raise AdapterError(
                "an adapter needs a name", expected="a text that is not empty", got=repr(name)
            )
        self._refuse_taken(name)
        known = _Known(Path(folder), next(self._serials), pinned=pin)
        self._read(name, known)
        with self._change:
            if name in self._known:
                self._refuse_taken(name)
            self._put(name, known)
        assert known.resident is not None
        return known.resident.packed

    def replace(self, name: str, folder: str | Path) -> PackedAdapter:
        """Another content under a name that is there: read and checked first, then put in its place
        at once.

        Texts under way go on with the tensors they hold. AdapterError when it does not fit: the old
        one stays.
        """
        before = self._entry(name)
        known = _Known(Path(folder), next(self._serials))
        self._read(name, known)
        with self._change:
            known.pinned = self._known.get(
                name, before
            ).pinned  # as it is now, not as it was before the files were read
            self._put(name, known)
        assert known.resident is not None
        return known.resident.packed

    def unload(
        self, name: str, *, in_use: InUse = "forget", timeout_s: float | None = None
    ) -> None:
        """Forget an adapter; a shipped one too, for as long as this runtime is open.

        While it is in use: "forget" takes the name away at once, and the texts under way go on with
        the tensors they hold; "refuse" is an AdapterError; "wait" lets nobody new have it and waits
        for them: when they have not ended after `timeout_s`, it is an AdapterError and the adapter
        stays, unless its name was loaded again meanwhile: that one stays then, and the texts under
        way end with the tensors they hold.
        """
        with self._change:
            known = self._entry(name)
            if known.users and in_use == "refuse":
                raise _still_used(name, known.users)
            self._known.pop(name, None)  # from here on nobody new gets it
            self._gone.add(name)
            self._leaving.pop(name, None)
            if in_use != "wait":
                return
            self._leaving[name] = known
            ended = self._change.wait_for(lambda: not known.users, timeout_s)
            if self._leaving.get(name) is not known:  # the name has been another adapter's since
                return
            del self._leaving[name]
            if not ended:
                self._put(name, known)
                raise _still_used(name, known.users)

    def pin(self, name: str, *, pinned: bool = True) -> None:
        """Keep an adapter in memory (it is read now), or let it be evicted again."""
        known = self._entry(name)
        if pinned:
            self._resident(name, known)
        with self._change:
            known.pinned = pinned
            self._make_room(keep=None)

    def get(self, name: str) -> Resident:
        """The adapter of that name, read at its first use."""
        return self._resident(name, self._entry(name))

    def acquire(self, name: str) -> Lease:
        """The adapter of that name, counted as in use until the lease is released."""
        # looked up and counted at once: between the two it could be unloaded as if nobody used it
        with self._change:
            known = self._entry(name)
            known.users += 1
        try:
            return Lease(self, known, self._resident(name, known))
        except BaseException:
            self._release(known)
            raise

    @contextlib.contextmanager
    def lease(self, name: str | None) -> Iterator[Resident | None]:
        """`acquire` for the length of a with statement; None is the base model."""
        held = None if name is None else self.acquire(name)
        try:
            yield None if held is None else held.resident
        finally:
            if held is not None:
                held.release()

    def _put(self, name: str, known: _Known) -> None:
        """A name's adapter from here on; the lock is held."""
        self._known[name] = known
        self._gone.discard(name)
        self._leaving.pop(name, None)
        self._make_room(keep=known)

    def _entry(self, name: str) -> _Known:
        with self._change:
            if (known := self._known.get(name)) is not None:
                return known
            path = None if name in self._gone else self._sources.find(name)
            if path is not None:
                return self._known.setdefault(name, _Known(path, next(self._serials)))
        there = nearest(name, self.names(), none="none in this bundle")
        raise AdapterError(f"unknown adapter {name!r}", got=name, **there)

    def _resident(self, name: str, known: _Known) -> Resident:
        known.used = next(self._clock)
        resident = known.resident
        if resident is None:
            with known.reading:
                resident = known.resident or self._read(name, known)
            with self._change:
                self._make_room(keep=known)
        return resident

    def _read(self, name: str, known: _Known) -> Resident:
        packed, fingerprint = self._sources.read(name, known.source)
        if known.fingerprint not in (None, fingerprint):
            raise AdapterError(
                f"the files of the adapter {name!r} have changed since it was loaded",
                where=str(known.source),
                fix="Unload it and load it again.",
            )
        known.fingerprint = fingerprint
        known.used = next(self._clock)
        bound = self._bind(packed.tensors)
        if bound.own_bytes is not None:  # the engine has its own copy of all but a head
            kept = {name: packed.tensors[name] for name in self._heads if name in packed.tensors}
            packed = replace(packed, tensors=kept)
        resident = known.resident = Resident(packed, bound, known.serial)
        self._release_memory()
        return resident  # not the attribute: another thread may have made room meanwhile

    def _release_memory(self) -> None:
        """Give back what reading adapters took and what earlier ones left: the small tensors of
        those that come and go lie between others, and the C library would keep their pages.
        """
        if time.monotonic() - self._released >= RELEASE_EVERY_S:
            self._released = time.monotonic()
            release_free_memory()

    def _release(self, known: _Known) -> None:
        with self._change:
            known.users -= 1
            self._change.notify_all()
            self._make_room(keep=None)

    def _make_room(self, *, keep: _Known | None) -> None:
        """Evict by least recent use until the limit is kept; what is in use, pinned or just read
        stays.
        """
        if self._limit is None:
            return
        over = self._nbytes() - self._limit
        for known in sorted(self._known.values(), key=lambda known: known.used):
            if over <= 0:
                return
            if (
                known.resident is not None
                and not known.users
                and not known.pinned
                and known is not keep
            ):
                over -= known.resident.nbytes
                known.resident = None
                self.evictions += 1

    def _nbytes(self) -> int:
        return sum(
            known.resident.nbytes for known in self._known.values() if known.resident is not None
        )

    def _refuse_taken(self, name: str) -> None:
        if name in self.names():
            raise AdapterError(
                f"the name {name!r} is taken",
                expected="a new name",
                got=name,
                fix="Unload it first, or choose another.",
            )

    def _status(self, name: str, known: _Known | None) -> AdapterStatus:
        source = known.source if known is not None else self._sources.find(name)
        resident = None if known is None else known.resident
        return AdapterStatus(
            name=name,
            folder=self._sources.folder(source),
            resident=resident is not None,
            pinned=known is not None and known.pinned,
            users=0 if known is None else known.users,
            nbytes=0 if resident is None else resident.nbytes,
            notes=() if resident is None else resident.packed.notes,
        )


def _still_used(name: str, users: int) -> AdapterInUseError:
    fix = "Unload it later, wait for it, or forget it."
    return AdapterInUseError(
        f"the adapter {name!r} is in use",
        expected="no request that uses it",
        got=str(users),
        fix=fix,
    )
