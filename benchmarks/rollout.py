"""Roll-outs on one device: `python benchmarks/rollout.py forged back cuts --bundle BUNDLE
--adapter NAME`, where BUNDLE ships the classifier NAME.

forged: changed, truncated, replayed and mismatched versions, none of which may be served; back: how
long a roll-back takes; cuts: a server killed at random moments while a new version comes, which
must answer after each start. A table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ec

from edgetune.core.files import sha256_file
from edgetune.runtime import Runtime
from edgetune.runtime.rollout.aliases import Aliases
from edgetune.runtime.rollout.rollout import AliasRollout, RolloutRules
from edgetune.runtime.rollout.source import ArtifactVersions
from edgetune.runtime.rollout.trial import RolloutBounds
from edgetune.runtime.signature.folder import sign_folder
from edgetune.runtime.signature.keys import PrivateKey, read_private_key, read_public_key

WEIGHTS, METADATA = "adapter_model.safetensors", "edgetune_adapter.json"


def new_key(folder: Path, name: str) -> Path:
    """A pair of PEM files; the private one's path."""
    key, private = ec.generate_private_key(ec.SECP256R1()), folder / f"{name}.pem"
    private.write_bytes(
        key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    )
    private.with_suffix(".pub").write_bytes(
        key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    )
    return private


def publish(adapter: Path, place: Path, key: PrivateKey, version: int, **metadata: Any) -> None:
    """Another version of an adapter, signed."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(adapter, place)
    known = json.loads((place / METADATA).read_text()) | metadata
    (place / METADATA).write_text(json.dumps(known))
    sign_folder(place, key, version=version)


class Device:
    """One alias in this process; the source is asked by hand."""

    def __init__(self, runtime: Runtime, alias: str, folder: Path, public: Path) -> None:
        self.runtime, self.alias, self.place = runtime, alias, folder / "source"
        self.aliases, self.steps = Aliases(), Counter[str]()
        source = ArtifactVersions(str(self.place), folder / "store", manifest=runtime.manifest)
        bounds = RolloutBounds(share=0.5, requests=10)
        rules = RolloutRules(bounds=bounds, signed_by=read_public_key(public))
        self.rollout = AliasRollout(
            alias, source, folder / "disk", runtime, self.aliases, rules=rules, tell=self.tell
        )
        self.rollout.open()

    def tell(self, step: str, **facts: Any) -> None:
        self.steps[step] += 1

    def serve(self, failing: str = "") -> None:
        """Requests until nothing is on trial."""
        for at in range(500):
            name = self.aliases.choose(self.alias, str(at)) or ""
            self.rollout.answered(name, 1.0, failed=name == failing)
            self.rollout.step(poll=False)
            if self.rollout.state.phase == "settled":
                return


def spoil(place: Path, adapter: Path, kind: str, key: PrivateKey, other: PrivateKey) -> None:
    """Make what is published something that nobody may serve."""
    files = sorted(path for path in place.rglob("*") if path.is_file())
    file = random.choice(files)
    raw = bytearray(file.read_bytes())
    if kind == "changed":
        raw[random.randrange(len(raw))] ^= 1 << random.randrange(8)
        file.write_bytes(raw)
    elif kind == "truncated":
        file.write_bytes(raw[: random.randrange(len(raw))])
    elif kind == "changed with its hashes":
        weights = bytearray((place / WEIGHTS).read_bytes())
        weights[-1 - random.randrange(64)] ^= 1 << random.randrange(8)
        (place / WEIGHTS).write_bytes(weights)
        known = json.loads((place / METADATA).read_text())
        known["files"][WEIGHTS] = sha256_file(place / WEIGHTS)
        (place / METADATA).write_text(json.dumps(known))
    elif kind == "another key":
        sign_folder(place, other, version=random.randrange(1000))
    elif kind == "replayed":
        publish(adapter, place, key, random.randrange(1, 3), note=random.random())
    else:  # another base, well signed
        digest = f"sha256:{random.randrange(16**64):064x}"
        publish(adapter, place, key, 99, base={"name": "other", "digest": digest})


KINDS = ("changed", "truncated", "changed with its hashes", "another key", "replayed", "other base")


def forged(runtime: Runtime, name: str, folder: Path, count: int) -> dict[str, Any]:
    """Versions that nobody may serve, in turn of their kinds."""
    adapter = runtime.folder / "adapters" / name
    key, other = (read_private_key(new_key(folder, one)) for one in ("own", "other"))
    device = Device(runtime, name, folder, folder / "own.pub")
    good = folder / "good"
    publish(adapter, good, key, 2)
    shutil.copytree(good, device.place)
    device.rollout.step()
    device.serve()
    before, shares = device.rollout.state, device.aliases.all()
    served = 0
    for at in range(count):
        kind = KINDS[at % len(KINDS)]
        shutil.rmtree(device.place)
        shutil.copytree(good, device.place)
        spoil(device.place, adapter, kind, key, other)
        device.rollout.step()
        served += device.aliases.all() != shares or device.rollout.state.current != before.current
    return {"tried": count, "served": served}


def back(runtime: Runtime, name: str, folder: Path, count: int) -> dict[str, Any]:
    """From the third failed answer to the alias being answered by the version before, and to that
    being on the disk; milliseconds.
    """
    adapter, key = runtime.folder / "adapters" / name, read_private_key(new_key(folder, "own"))
    device = Device(runtime, name, folder, folder / "own.pub")
    at_once, on_disk = [], []
    for version in range(1, count + 1):
        publish(adapter, device.place, key, version)
        device.rollout.step()
        for _ in range(2):
            device.rollout.answered(f"{name}@v{version}", 0.01, failed=True)
        start = time.perf_counter()
        device.rollout.answered(f"{name}@v{version}", 0.01, failed=True)
        assert device.aliases.all() == {name: {name: 1.0}}
        at_once.append((time.perf_counter() - start) * 1e3)
        device.rollout.step(poll=False)
        on_disk.append((time.perf_counter() - start) * 1e3)
    return {"roll_backs": count, "at_once_max_ms": max(at_once), "on_disk_max_ms": max(on_disk)}


def cuts(bundle: Path, name: str, folder: Path, count: int) -> dict[str, Any]:
    """Kill `edgetune serve --follow` while versions come; each start must answer."""
    key, place = read_private_key(new_key(folder, "own")), folder / "source"
    adapter, answered, versions = bundle / "adapters" / name, 0, Counter[str]()
    for at in range(count + 1):
        publish(adapter, place, key, at + 1, edgetune_version=f"0.1.{at}")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = ["serve", bundle, "--port", port, "--follow", f"{name}={place}", "--threads", 1]
        words += ["--follow-every", 1, "--follow-state", folder / "state"]
        words += ["--follow-bound", "requests=2", "--follow-bound", "share=0.5"]
        server = subprocess.Popen(
            [sys.executable, "-m", "edgetune", *map(str, words)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        version = ask(port, name)
        answered += version is not None
        versions[version or "none"] += 1
        end = time.monotonic() + random.random() * 1.5
        while time.monotonic() < end:
            ask(port, name)
        os.kill(server.pid, signal.SIGKILL)
        server.wait()
    return {"starts": count + 1, "answered": answered, "versions": len(versions)}


def ask(port: int, name: str) -> str | None:
    """Which version answers, as soon as the server does; None when it does not within a minute."""
    body = json.dumps({"model": name, "input": "hello"}).encode()
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}/classify", body, {"content-type": "application/json"}
    )
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(asked, timeout=30) as answer:
                return str(json.load(answer)["model"])
        except OSError:
            time.sleep(0.05)
    return None


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="+", choices=("forged", "back", "cuts"))
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--count", type=int, default=100)
    given = parser.parse_args()
    found: dict[str, Any] = {}
    for part in given.parts:
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            if part == "cuts":
                found[part] = cuts(given.bundle, given.adapter, folder, given.count)
                continue
            with Runtime.open(given.bundle, threads=1) as runtime:
                measure = forged if part == "forged" else back
                found[part] = measure(runtime, given.adapter, folder, given.count)
    for part, figures in found.items():
        print(f"{part:8}", *(f"{key} {value}" for key, value in figures.items()), sep="  ")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
