"""An alias that follows a folder of this machine: a publisher's side and a device's."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file, save_file

from edgetune.core.files import sha256_file
from edgetune.runtime import Runtime
from edgetune.runtime.rollout.aliases import Aliases
from edgetune.runtime.rollout.rollout import AliasRollout, RolloutRules
from edgetune.runtime.rollout.source import ArtifactVersions
from edgetune.runtime.rollout.trial import RolloutBounds
from edgetune.runtime.signature.folder import sign_folder
from edgetune.runtime.signature.keys import PrivateKey, read_public_key

if TYPE_CHECKING:
    from server_helpers import Running

BOUNDS = RolloutBounds(share=0.5, requests=10, errors=0.1, latency=3.0)


def publish(
    adapter: Path, place: Path, *, key: PrivateKey | None = None, version: int | None = None,
    mark: str = "", metadata: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Put an adapter where devices look; `mark` makes it another version of the same answers."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(adapter, place)
    path = place / "edgetune_adapter.json"
    known = json.loads(path.read_text()) | (metadata or {}) | {"edgetune_version": f"0.1{mark}"}
    path.write_text(json.dumps(known))
    if key is not None:
        sign_folder(place, key, version=version)


@dataclass
class Steps:
    """What was told."""

    told: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def __call__(self, step: str, **facts: Any) -> None:
        self.told.append((step, facts))

    @property
    def names(self) -> list[str]:
        return [step for step, _ in self.told]

    @property
    def last(self) -> tuple[str, str]:
        """The last step and its reason."""
        step, facts = self.told[-1]
        return step, str(facts.get("reason", ""))


class Device:
    """A device that follows `place`; `start` is a start of the process with the same disk."""

    def __init__(self, runtime: Runtime, place: Path, disk: Path, **rules: Any) -> None:
        self.runtime, self.place, self.disk = runtime, place, disk
        self.rules = RolloutRules(**{"bounds": BOUNDS, **rules})
        self.now = 0.0
        self.start()

    def stop(self) -> None:
        """As a server is told to; without it the next start is one after a crash."""
        self.rollout.close()

    def start(self) -> None:
        for name in self.runtime.adapters:  # another process would not have them
            if "@" in name:
                self.runtime.unload_adapter(name)
        self.aliases, self.steps = Aliases(), Steps()
        self.rollout = AliasRollout(
            "mood", self.source(), self.disk, self.runtime, self.aliases,
            rules=self.rules, tell=self.steps, clock=lambda: self.now,
        )  # fmt: skip
        self.rollout.open()

    def source(self) -> ArtifactVersions:
        manifest = self.runtime.manifest
        return ArtifactVersions(str(self.place), self.disk / "store", manifest=manifest)

    def answer(self, key: str = "x") -> str:
        """The version that answers; it does."""
        name = self.aliases.choose("mood", key) or "mood"
        assert self.runtime.classify(["hello"], name)[0].label in ("calm", "upset")
        return name

    def serve(self, count: int, *, failing: str = "", slow: str = "") -> None:
        """So many requests, spread over the versions."""
        for at in range(count):
            name = self.answer(str(at))
            self.rollout.answered(name, 9.0 if name == slow else 1.0, failed=name == failing)
            if self.rollout.woken.is_set():
                self.rollout.step(poll=False)

    def serve_until(self, step: str) -> None:
        """Requests that succeed, until this step is told."""
        for at in range(200):
            if step in self.steps.names:
                return
            self.rollout.answered(self.answer(str(at)), 1.0, failed=False)
            self.rollout.step(poll=False)
        raise AssertionError(f"{step} did not come")

    def bounds(self, **changes: Any) -> None:
        self.rules = replace(self.rules, bounds=replace(self.rules.bounds, **changes))


def live_until_cut(bundle: str, place: str, disk: str, public: str, at: int) -> None:
    """A device's life in a process of its own: it takes what `place` has, serves until that is
    settled, and dies of SIGKILL right before the `at`-th change of its disk.
    """
    left = at

    def dying(call: Any) -> Any:
        def changed(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return changed

    for owner, names in (
        (os, ("fsync", "mkdir", "link", "unlink", "rmdir", "chmod", "replace")),
        (shutil, ("rmtree", "copyfileobj", "copy2")),
        (Path, ("replace", "mkdir", "unlink", "open", "chmod")),
    ):
        for name in names:
            setattr(owner, name, dying(getattr(owner, name)))
    with Runtime.open(bundle, threads=1) as runtime:
        device = Device(runtime, Path(place), Path(disk), signed_by=read_public_key(public))
        device.rollout.step()
        device.serve_until("settled")


def spoil(folder: Path) -> None:
    """Change a file and its hash in the metadata with it."""
    weights = folder / "adapter_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(bytes(raw))
    path = folder / "edgetune_adapter.json"
    known = json.loads(path.read_text())
    known["files"]["adapter_model.safetensors"] = sha256_file(weights)
    path.write_text(json.dumps(known))


def broken(adapter: Path, copy: Path) -> Path:
    """Answers that are not finite."""
    publish(adapter, copy)
    weights = copy / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({name: np.full_like(one, 1e30) for name, one in tensors.items()}, weights)
    known = json.loads((copy / "edgetune_adapter.json").read_text())
    known["files"]["adapter_model.safetensors"] = sha256_file(weights)
    (copy / "edgetune_adapter.json").write_text(json.dumps(known))
    return copy


@contextmanager
def follow(
    running: Running, alias: str, place: Path | str, disk: Path, **more: Any
) -> Iterator[None]:
    """The server follows a source as with `--follow`."""
    from edgetune.cli.follow import following

    given: dict[str, Any] = {
        "follows": (f"{alias}={place}",),
        "follow_every_s": 0.05,
        "follow_state": disk,
        "follow_bounds": ("share=0.5", "requests=30", "latency=1000", "shadow=1", "errors=0.1"),
        "limits": (),
        "device_name": None,
        "signed_by": None,
    }
    with following(running.service, **(given | more)):
        yield
