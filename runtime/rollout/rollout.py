"""One alias that follows a source: every step from what is there to what answers, or back.

A step is told (log, metrics) when it is done, and what must outlive a power cut is on the disk
before the next. Nothing here is waited for by a request: a roll-back takes effect in the thread
that saw the last failure, and is written down by the follower's.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from edgetune.core.errors import (
    AdapterError,
    EdgetuneError,
    OutputError,
    SignatureError,
    SourceError,
)
from edgetune.core.layout import ADAPTER_FILES
from edgetune.devices.budget import Budget
from edgetune.devices.loader import Device
from edgetune.runtime.adapters.packing import PackedAdapter
from edgetune.runtime.rollout.aliases import Aliases
from edgetune.runtime.rollout.gate import Identity, check_proof, check_times, identify
from edgetune.runtime.rollout.state import RolloutFolder, RolloutState, SeenVersion
from edgetune.runtime.rollout.trial import Decision, RolloutBounds, VersionTrial
from edgetune.runtime.signature.folder import demand_signed
from edgetune.runtime.signature.keys import PublicKey
from edgetune.runtime.tasks.runtime import Runtime

MOST_ATTEMPTS = 3
"""Starts of the process with the same version on trial; then the version is taken to end it."""


class VersionSource(Protocol):
    """Where new versions come from."""

    def resolve(self) -> str:
        """What is there now, as a word that changes when it does."""

    def fetch(self, folder: Path) -> None:
        """Make `folder` (not there yet) what `resolve` found last."""


class Tell(Protocol):
    """Hears of every step."""

    def __call__(self, step: str, **facts: Any) -> None: ...


@dataclass(frozen=True)
class RolloutRules:
    """What a new version must meet. `signed_by`: None takes unsigned ones."""

    bounds: RolloutBounds = field(default_factory=RolloutBounds)
    signed_by: PublicKey | None = None
    budget: Budget | None = None
    device: Device | None = None


class AliasRollout:
    """An alias, its versions and their source. `open` first; then `step` from one thread, and
    `answered` and `shadowed` from any.
    """

    def __init__(
        self,
        alias: str,
        source: VersionSource,
        folder: Path,
        runtime: Runtime,
        aliases: Aliases,
        *,
        rules: RolloutRules,
        tell: Tell,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.alias, self.rules = alias, rules
        self._source, self._folder, self._runtime = source, RolloutFolder(folder), runtime
        self._aliases, self._tell, self._clock = aliases, tell, clock
        self._shipped = alias if runtime.registry.knows(alias) else None
        self._state = RolloutState()
        self._trial: VersionTrial | None = None
        self._decided: tuple[Decision, str] | None = None
        self._last = self._failing = ""
        self._loaded: set[str] = set()
        self._counted: str | None = None
        """the version of which this process is an attempt"""
        self._leaving: list[str] = []
        """names that no request is given any more; those under way are let go first"""
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._closed = False
        self.woken = threading.Event()
        """set when a decision waits to be written down"""

    @property
    def state(self) -> RolloutState:
        """What is on the disk."""
        return self._state

    def open(self) -> None:
        """Have answer what answered before the process ended. A version whose files do not load any
        more is left out; one that was on trial at too many starts is rolled back.
        """
        state = self._folder.read(lambda folder: self._identity(folder).number)
        trial = state.new if state.phase == "trial" else state.current
        if state.phase != "settled" and trial is not None:  # before it is loaded, which may end us
            state = state.attempted(trial, state.attempts.get(trial, 0) + 1)
            self._state, self._counted = state, trial
            self._remember(state)
        for version in sorted(state.used()):
            try:
                self._load(version, state)
            except (EdgetuneError, OSError) as error:
                self._tell("lost", version=state.seen[version].name, reason=str(error))
                state = state.without(version)
        trial = state.new if state.phase == "trial" else state.current
        if state.phase != "settled" and trial is not None:
            attempts = state.attempts.get(trial, 1)
            if attempts > MOST_ATTEMPTS:
                self._leaving.append(state.seen[trial].name)
                reason = f"the process ended {attempts - 1} times while it was on trial"
                state = state.rolled_back(reason)
                self._tell("rolled back", version=state.seen[trial].name, reason=reason)
        self._state = state
        self._remember(state)
        self._folder.tidy(state)
        self._answer()
        if state.phase == "trial" and state.new is not None:
            self._begin_trial(state.new, state.current)
        if state.phase == "watched" and state.current is not None:
            self._begin_trial(state.current, state.previous)

    def close(self) -> None:
        """Write down that the process was told to stop: its start is no failed attempt. Nothing is
        written afterwards.
        """
        with self._writing:
            self._closed, version = True, self._counted
            if version is not None and version in (attempts := self._state.attempts):
                self._remember(self._state.attempted(version, attempts[version] - 1))

    def _remember(self, state: RolloutState) -> None:
        """Write the state; on a full disk what is in memory answers all the same."""
        try:
            self._folder.write(state)
        except (EdgetuneError, OSError) as error:
            self._tell("failed", reason=str(error))

    def step(self, *, poll: bool = True) -> None:
        """Write down a decision, or look for a new version. Errors of the source are told."""
        self.woken.clear()
        while self._leaving:
            self._unload(self._leaving.pop())
        self._decide()
        if self._decided is not None or (poll and self._state.phase == "settled"):
            try:
                if self._decided is not None:
                    self._carry_out(*self._decided)
                else:
                    self._poll()
                self._failing = ""
            except (EdgetuneError, OSError) as error:  # told once, tried again at every step
                if str(error) != self._failing:
                    self._failing = str(error)
                    self._tell("failed", reason=self._failing)

    def answered(self, version: str, seconds: float, *, failed: bool) -> None:
        """A request for the alias was answered by this version."""
        if (trial := self._trial) is not None:
            trial.answered(version, seconds, failed=failed)
            self._decide()

    def shadowed(self, *, alike: bool) -> None:
        """A request was answered by both versions."""
        if (trial := self._trial) is not None:
            trial.shadowed(alike=alike)
            self._decide()

    @property
    def on_trial(self) -> tuple[str, str] | None:
        """The version on trial and the one before it, while both answer."""
        trial = self._trial
        if trial is None or trial.old is None or self._state.phase != "trial":
            return None
        return trial.new, trial.old

    def holds(self, name: str) -> bool:
        """Whether a name is one of its versions', which nobody else may load or unload."""
        return name == self._shipped or name.startswith(f"{self.alias}@")

    def _decide(self) -> None:
        with self._lock:
            trial = self._trial
            if trial is None or self._decided is not None:
                return
            decision, reason = trial.decide(self._clock())
            if decision == "go on":
                return
            self._decided = decision, reason
            if decision == "roll back":  # at once; the disk hears of it from the follower's thread
                self._aliases.set(self.alias, {} if trial.old is None else {trial.old: 1})
        self.woken.set()

    def _carry_out(self, decision: Decision, reason: str) -> None:
        state, trial = self._state, self._trial
        assert trial is not None
        if decision == "roll back":
            self._write(state.rolled_back(reason))  # first: a full disk is tried again
            self._trial = None
            self._tell("rolled back", version=trial.new, reason=reason)
            self._leaving.append(trial.new)
        elif state.phase == "trial":
            before = state.previous
            kept = replace(
                state, phase="watched", previous=state.current, current=state.new, new=None
            )
            self._write(kept)
            trial.begin_again(self._clock())
            self._tell("kept", version=trial.new, reason=reason)
            if before is not None:
                self._leaving.append(state.seen[before].name)
        else:
            self._write(replace(state, phase="settled", attempts={}))
            self._trial = None
            self._tell("settled", version=trial.new, reason=reason)
        self._answer()
        self._decided = None
        self._folder.tidy(self._state)

    def _poll(self) -> None:
        found = self._source.resolve()
        if found == self._last:
            return
        incoming = self._folder.incoming
        shutil.rmtree(incoming.parent, ignore_errors=True)
        try:
            self._source.fetch(incoming)
            self._tell("fetched", source=found)
            identity = identify(incoming, self.rules.signed_by)
            if identity.id != self._state.current:
                self._refuse_replayed(identity)
                self._try(identity)
            self._last = found
        except (SourceError, OutputError):  # the network's or the disk's doing
            raise
        except EdgetuneError as error:  # not asked for again until the source has something else
            self._last = found
            self._tell("refused", source=found, reason=str(error))
        finally:
            shutil.rmtree(incoming.parent, ignore_errors=True)

    def _refuse_replayed(self, identity: Identity) -> None:
        state, newest, number = self._state, self._state.newest, identity.number
        if (seen := state.seen.get(identity.id)) is not None:
            why = f"was rolled back: {seen.fate}" if seen.fate else "was replaced by a newer one"
            raise AdapterError(f"{seen.name} {why}", fix="Publish it under a higher --version.")
        if newest is None or identity.id == state.newest_id:
            return
        if number is None or number <= newest:
            raise AdapterError(
                "an older version than one that came before",
                expected=f"a number above {newest}",
                got=str(number),
            )

    def _try(self, identity: Identity) -> None:
        """Load and check a version, then have it answer its share."""
        version, state = identity.id, self._state
        tries = state.attempts.get(version, 0)
        if tries and self._counted == version:  # this process is one of them, and lives
            tries -= 1
        if tries >= MOST_ATTEMPTS:
            raise AdapterError(f"the process ended {tries} times while it was being loaded")
        name = f"{self.alias}@" + (
            version[:12] if identity.number is None else f"v{identity.number}"
        )
        self._write(state.attempted(version, tries + 1), counted=version)
        folder = self._folder.keep(version)
        self._tell("checking", version=name)
        known = state.with_seen(version, SeenVersion(name, identity.number))
        try:
            self._check(version, name, known, folder)
        except BaseException as error:
            if isinstance(error, EdgetuneError):
                fits = name in self._loaded
                self._write(replace(self._newest(state, identity) if fits else state, attempts={}))
            self._unload(name)
            self._folder.tidy(state)
            raise
        trial = self._newest(known, identity).attempted(version, 1)
        if self._name(state.current) is None:  # nobody is there to compare it with
            self._write(replace(trial, current=version, attempts={}))
            self._tell("settled", version=name, reason="there was none before")
            self._answer()
            return
        self._write(replace(trial, phase="trial", new=version))
        self._begin_trial(version, state.current)
        self._answer()
        self._tell("trial", version=name, share=self.rules.bounds.share)

    @staticmethod
    def _newest(state: RolloutState, identity: Identity) -> RolloutState:
        return state.with_newest(identity.id, identity.number)

    def _check(self, version: str, name: str, state: RolloutState, folder: Path) -> None:
        packed, identity = self._load(version, state)
        if packed.doubts:
            raise AdapterError("; ".join(packed.doubts), where=name)
        rows = check_proof(
            self._runtime, name, folder, self.rules.bounds.proof, signed=identity.files
        )
        if self.rules.budget and self.rules.device is not None:
            check_times(self._runtime, name, self.rules.budget, self.rules.device)
        self._tell("checked", version=name, proof_rows=rows)

    def _identity(self, folder: Path) -> Identity:
        """What a version's folder holds. AdapterError where it is not what its name says."""
        identity = identify(folder, self.rules.signed_by)
        if identity.id != folder.name:
            raise AdapterError("its files have changed", where=str(folder))
        return identity

    def _load(self, version: str, state: RolloutState) -> tuple[PackedAdapter, Identity]:
        """An adapter in memory, kept there; it is made of the bytes that have this id."""
        folder = self._folder.version(version)
        identity = self._identity(folder)
        name = state.seen[version].name
        self._unload(name)
        packed = self._runtime.load_adapter(name, folder, pin=True)
        self._loaded.add(name)
        try:
            demand_signed(packed.files, identity.files, ADAPTER_FILES, where=folder)
        except SignatureError:
            self._unload(name)
            raise
        return packed, identity

    def _unload(self, name: str) -> None:
        """Forget a version that was loaded here; nothing of the bundle's own."""
        if name in self._loaded:
            self._loaded.discard(name)
            with contextlib.suppress(AdapterError):
                self._runtime.unload_adapter(name)

    def _begin_trial(self, new: str, old: str | None) -> None:
        names = self._state.seen[new].name, self._name(old)
        self._decided = None
        self._trial = VersionTrial(*names, self.rules.bounds, self._clock())

    def _name(self, version: str | None) -> str | None:
        """A version's name; of None the adapter that the bundle ships under the alias, if any."""
        return self._shipped if version is None else self._state.seen[version].name

    def _answer(self) -> None:
        """Have the alias answered as the state says."""
        state, share = self._state, self.rules.bounds.share
        shares: dict[str, float] = {}
        if (name := self._name(state.current)) is not None:
            shares[name] = 1.0
        if state.phase == "trial" and (new := self._name(state.new)) is not None:
            shares = {name: 1 - share for name in shares if share < 1} | {new: share}
        self._aliases.set(self.alias, shares)

    def _write(self, state: RolloutState, *, counted: str | None = None) -> None:
        with self._writing:
            if self._closed:
                raise OutputError("the server stops")
            self._folder.write(state)
            self._state, self._counted = state, counted or self._counted
