"""What a device remembers of an alias's versions, on disk: written whole, in an order that a power
cut keeps.

    state.json           which version answers, which is tried, which were seen
    versions/<id>/       their adapters' folders
    incoming/            what is being fetched
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from edgetune.core.errors import BundleError, EdgetuneError
from edgetune.core.files import output_errors, read_json
from edgetune.core.settings import about, from_dict

log = logging.getLogger("edgetune.server")
STATE, VERSIONS, INCOMING = "state.json", "versions", "incoming"
ID = re.compile(r"[0-9a-f]{64}")
NumberOf = Callable[[Path], int | None]
"""The signed number of an adapter's folder; errors for one that is not what its name says."""
MOST_SEEN = 5000
"""Versions that are remembered, the oldest forgotten first."""
PHASES = ("settled", "trial", "watched")


@dataclass(frozen=True)
class SeenVersion:
    """A version that was served here once: its name, its number where it was signed with one, and
    what became of it.
    """

    name: str
    number: int | None = None
    fate: str = ""
    """why it was rolled back; empty: it was not"""


@dataclass(frozen=True)
class RolloutState:
    """Ids of versions; None is what the bundle ships under the alias's name.

    `phase`: settled; trial: `new` answers a share beside `current`; watched: `current` answers
    alone, with `previous` to go back to. `attempts`: how often the process began with a version on
    trial, or began to load it, and neither came to an end nor was told to stop. `newest`: the
    highest signed number of a version that fitted here, and `newest_id` that version: whatever
    became of it, nothing older comes after it.
    """

    schema: int = 1
    phase: str = field(default="settled", metadata=about(choices=PHASES))
    current: str | None = None
    previous: str | None = None
    new: str | None = None
    attempts: dict[str, int] = field(default_factory=dict)
    seen: dict[str, SeenVersion] = field(default_factory=dict)
    newest: int | None = None
    newest_id: str | None = None

    def used(self) -> set[str]:
        """The versions whose folders are needed."""
        return {one for one in (self.current, self.previous, self.new) if one is not None}

    def with_newest(self, version: str, number: int | None) -> RolloutState:
        """With this one the newest, where it is."""
        if number is None or (self.newest is not None and number <= self.newest):
            return self
        return dataclasses.replace(self, newest=number, newest_id=version)

    def attempted(self, version: str, count: int) -> RolloutState:
        """With so many attempts of this version alone."""
        return dataclasses.replace(self, attempts={version: count} if count > 0 else {})

    def rolled_back(self, reason: str) -> RolloutState:
        """Back to the version before; the one on trial is remembered with its fate."""
        version = self.new if self.phase == "trial" else self.current
        assert version is not None
        state = self.with_seen(version, dataclasses.replace(self.seen[version], fate=reason))
        state = dataclasses.replace(state, phase="settled", attempts={})
        if self.phase == "trial":
            return dataclasses.replace(state, new=None)
        return dataclasses.replace(state, current=self.previous, previous=None)

    def without(self, version: str) -> RolloutState:
        """As if a version whose files are damaged had never come: it may come again, though nothing
        that is older than the newest.
        """
        seen = {key: value for key, value in self.seen.items() if key != version}
        state = dataclasses.replace(self, seen=seen)
        if version == self.new:
            return dataclasses.replace(state, phase="settled", new=None)
        if version == self.current:
            return dataclasses.replace(
                state, phase="settled", current=self.previous, previous=None, new=None
            )
        return dataclasses.replace(state, previous=None)

    def with_seen(self, version: str, seen: SeenVersion) -> RolloutState:
        """With one more version remembered, or another fate of it."""
        kept = {key: value for key, value in self.seen.items() if key != version}
        needed = self.used().union(list(kept)[-MOST_SEEN + 1 :])
        newest = {key: value for key, value in kept.items() if key in needed}
        return dataclasses.replace(self, seen={**newest, version: seen})


class RolloutFolder:
    """An alias's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def incoming(self) -> Path:
        """Where a version is fetched to."""
        return self.folder / INCOMING / "adapter"

    def version(self, identity: str) -> Path:
        """Where a version's adapter lies."""
        return self.folder / VERSIONS / identity

    def read(self, number_of: NumberOf) -> RolloutState:
        """The state; a new one where there is none, or where it is damaged, which is logged: of
        that `number_of` the versions' folders says what was the newest.
        """
        path = self.folder / STATE
        if not path.exists():
            return RolloutState()
        try:
            document = read_json(path, error=BundleError)
            state = from_dict(
                RolloutState, document, where=str(path), error=BundleError, table="an object"
            )
            if not state.used() <= set(state.seen) or not all(map(ID.fullmatch, state.seen)):
                raise BundleError("it names versions that it does not know", where=str(path))
            return state if state.newest is not None else _newest_of_seen(state)
        except EdgetuneError as error:
            log.error("rollout state lost", extra={"fields": {"error": str(error)}})
            with contextlib.suppress(OSError):
                path.replace(path.with_name(f"{STATE}.damaged"))
            state = RolloutState()
            for folder in (self.folder / VERSIONS).glob("*"):
                with contextlib.suppress(EdgetuneError, OSError):
                    state = state.with_newest(folder.name, number_of(folder))
            return state

    def write(self, state: RolloutState) -> None:
        """Have the state on the disk, whole, before this returns."""
        path = self.folder / STATE
        partial = path.with_name(f".{STATE}.partial")
        with output_errors(path, partial):
            make_folder(self.folder)
            with partial.open("w", encoding="utf-8") as file:
                json.dump(dataclasses.asdict(state), file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync_folder(self.folder)

    def keep(self, identity: str) -> Path:
        """Move what was fetched to its place among the versions, on the disk when this returns."""
        place = self.version(identity)
        with output_errors(place):
            for path in sorted(self.incoming.rglob("*")):
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
                else:
                    sync_folder(path)
            sync_folder(self.incoming)
            make_folder(place.parent)
            shutil.rmtree(place, ignore_errors=True)
            self.incoming.replace(place)
            sync_folder(place.parent)
        return place

    def tidy(self, state: RolloutState) -> None:
        """Remove what a killed process left, and versions that nobody needs."""
        shutil.rmtree(self.folder / INCOMING, ignore_errors=True)
        for path in (self.folder / VERSIONS).glob("*"):
            if path.name not in state.used():
                shutil.rmtree(path, ignore_errors=True)


def _newest_of_seen(state: RolloutState) -> RolloutState:
    """A state that was written before it had `newest`."""
    for version, seen in state.seen.items():
        state = state.with_newest(version, seen.number)
    return state


def make_folder(folder: Path) -> None:
    """Have a folder, and what leads to it, on the disk."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Have a folder's entries on the disk; file systems that cannot are left alone."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
