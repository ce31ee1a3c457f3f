"""A fleet takes a new version: many simulated devices pull version 2 of an adapter from one
registry at the same time; a table, then one JSON line.

    python benchmarks/fleet.py --devices 1000 --adapter-mb 1

Each device has a store and a folder of its own, with version 1 in it, as it would after its last
update. All start together, in threads of `--processes` processes, and share the processors with the
registry (docker-registry on loopback). Bytes are those of every answer, headers included. What is
in a device's folder at the end is compared with what was published.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from local_registry import INSTALL, is_installed, local_registry

from edgetune.core.errors import EdgetuneError
from edgetune.core.files import sha256_file, write_json
from edgetune.publishing.push import push
from edgetune.runtime.sources.pull import pull
from edgetune.runtime.sources.transport import Transport

BASE = "sha256:" + "0" * 64
WEIGHTS = "adapter_model.safetensors"


class Counting(Transport):
    """Counts the bytes of answers, headers included."""

    received = 0

    def open(self, *arguments: Any, **options: Any) -> Any:
        response = super().open(*arguments, **options)
        body = int(response.headers.get("Content-Length") or 0)
        self.received += body + len(str(response.headers)) + len("HTTP/1.1 200 OK\r\n")
        return response


@dataclass(frozen=True)
class Update:
    """What became of one device."""

    seconds: float
    received: int
    sha256: str
    error: str = ""


def make_adapter(folder: Path, version: int, size: int) -> Path:
    """An adapter's files; its weights are noise."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}\n')
    (folder / WEIGHTS).write_bytes(random.Random(version).randbytes(size))
    names = ("adapter_config.json", WEIGHTS)
    metadata = {
        "schema": 1,
        "base": {"name": "fleet", "digest": BASE},
        "task": "text-generation",
        "files": {name: sha256_file(folder / name) for name in names},
    }
    write_json(folder / "edgetune_adapter.json", metadata)
    return folder


def update(url: str, device: Path) -> Update:
    """One device's pull into its own store and folder."""
    transport, started, error = Counting(attempts=8), time.perf_counter(), ""
    try:
        pull(url, device / "home", store=device / "store", base=BASE, transport=transport)
    except EdgetuneError as refused:
        error = str(refused)
    seconds = time.perf_counter() - started
    return Update(seconds, transport.received, sha256_file(device / "home" / WEIGHTS), error)


def drive(url: str, devices: list[Path], start: Any, results: Any) -> None:
    """A process: a thread for each of its devices, released together."""
    ready = threading.Barrier(len(devices) + 1)

    def one(device: Path) -> Update:
        ready.wait()
        start.wait()
        return update(url, device)

    with ThreadPoolExecutor(len(devices)) as pool:
        futures = [pool.submit(one, device) for device in devices]
        ready.wait()
        results.put(None)
        results.put([future.result() for future in futures])


def roll_out(url: str, devices: list[Path], processes: int) -> tuple[list[Update], float]:
    """Every device's update, and the seconds until the last one was done."""
    context = multiprocessing.get_context("spawn")
    start, results = context.Event(), context.Queue()
    shares = [devices[n::processes] for n in range(processes)]
    workers = [
        context.Process(target=drive, args=(url, share, start, results))
        for share in shares
        if share
    ]
    for worker in workers:
        worker.start()
    for _ in workers:
        results.get()
    started = time.perf_counter()
    start.set()
    done = [one for _ in workers for one in results.get()]
    seconds = time.perf_counter() - started
    for worker in workers:
        worker.join()
    return done, seconds


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Publish version 1, bring it to all devices, publish version 2, and measure what follows."""
    size = int(options.adapter_mb * 1e6)
    versions = [make_adapter(work / f"v{n}", n, size) for n in (1, 2)]
    with local_registry(work / "registry") as registry:
        url = f"{registry}/shop/home:stable"
        push(versions[0], url)
        first = work / "devices" / "0"
        pull(url, first / "home", store=first / "store")
        devices = [work / "devices" / str(n) for n in range(options.devices)]
        for device in devices[1:]:
            shutil.copytree(first, device)
        artifact = push(versions[1], url).artifact
        done, seconds = roll_out(url, devices, options.processes)
    wanted = sha256_file(versions[1] / WEIGHTS)
    each = [one.seconds for one in done]
    received = [one.received for one in done]
    return {
        "devices": len(done),
        "on version 2": sum(one.sha256 == wanted for one in done),
        "failed": sum(bool(one.error) for one in done),
        "first error": next((one.error for one in done if one.error), ""),
        "seconds until all": round(seconds, 2),
        "seconds a device, median": round(statistics.median(each), 2),
        "seconds a device, longest": round(max(each), 2),
        "adapter's bytes": artifact.size,
        "bytes a device, mean": round(statistics.mean(received)),
        "bytes a device, most": max(received),
        "most / adapter's": round(max(received) / artifact.size, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else "")
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--adapter-mb", type=float, default=1.0)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--work", type=Path, help="where the devices' folders are made")
    options = parser.parse_args()
    if not is_installed():
        sys.exit(INSTALL)
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        found = measure(options, Path(work))
    print("| | |\n|---|---|")
    for name, value in found.items():
        print(f"| {name} | {value:,} |" if not isinstance(value, str) else f"| {name} | {value} |")
    settings = {key: str(value) for key, value in vars(options).items()}
    print(json.dumps({"settings": settings, **found}))
    if found["on version 2"] != options.devices:
        sys.exit(1)


if __name__ == "__main__":
    main()
