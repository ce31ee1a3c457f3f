"""What the serving benchmark's sections share: adapters made on the spot, timed requests to the
scheduler and over HTTP, a server process, rows of a table."""

from __future__ import annotations

import hashlib
import json
import os
import random
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.core.layout import ADAPTER_CONFIG, ADAPTER_METADATA, ADAPTER_WEIGHTS
from edgetune.runtime import Runtime
from edgetune.runtime.bundle.manifest import Manifest
from edgetune.runtime.scheduler.requests import (
    Event,
    FailedEvent,
    FinishedEvent,
    GenerationRequest,
    TokenEvent,
)
from edgetune.runtime.scheduler.scheduler import Scheduler

# --------------------------------------------------------------------------------
# the table


@dataclass(frozen=True)
class Row:
    """A measured value beside its target (None: for comparison only); `at_least`: the target is a
    lower bound.
    """

    title: str
    value: float
    unit: str = ""
    target: float | None = None
    at_least: bool = False

    def line(self) -> str:
        """The row as markdown."""
        value = f"{self.value:,.2f} {self.unit}" if self.unit else f"{self.value:g}"
        if self.target is None:
            return f"| {self.title} | {value} | – |"
        met = self.value >= self.target if self.at_least else self.value <= self.target
        bound = f"{'≥' if self.at_least else '≤'} {self.target:g} {self.unit}".rstrip()
        return f"| {self.title} | **{value}** | {bound}: {'met' if met else 'missed'} |"


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    return "\n".join(
        ["| measure | measured | to reach |", "|---|---|---|", *(row.line() for row in rows)]
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of 100 lies."""
    return float(np.percentile(np.array(values), share))


def memory_mb(pid: int | str = "self") -> float:
    """Resident memory of a process, 10⁶ bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return (
        int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])
        * 1024
        / 1e6
    )


# --------------------------------------------------------------------------------
# adapters


def make_adapters(
    out: Path,
    manifest: Manifest,
    count: int,
    *,
    source: Path | None = None,
    rank: int = 8,
    strength: float = 0.05,
) -> list[str]:
    """Write `count` PEFT folders (`a0`, `a1`, …) that differ, as edgetune writes them, hashes
    included; their names.

    With `source` they are that adapter with noise of a tenth of each tensor's spread; else they are
    random on every linear layer, and `strength` is the spread of B (0.05 changes the answers of
    SmolLM2 beyond recognition).
    """
    from safetensors.numpy import load_file, save_file

    given = {} if source is None else load_file(source / ADAPTER_WEIGHTS)
    names = [f"a{k}" for k in range(count)]
    for seed, name in enumerate(names):
        random_numbers = np.random.default_rng(seed)
        tensors = {key: _noisy(random_numbers, array) for key, array in given.items()}
        for part, width in (
            []
            if given
            else [(part, site.in_features) for site in manifest.sites for part in site.parts]
        ):
            key = f"base_model.model.{part.module}"
            tensors[f"{key}.lora_A.weight"] = (
                random_numbers.standard_normal((rank, width)) * width**-0.5
            ).astype(np.float32)
            tensors[f"{key}.lora_B.weight"] = (
                random_numbers.standard_normal((part.stop - part.start, rank)) * strength
            ).astype(np.float32)
        folder = out / name
        folder.mkdir(parents=True)
        save_file(tensors, folder / ADAPTER_WEIGHTS)
        modules = sorted({key.split(".lora_")[0].rpartition(".")[2] for key in tensors})
        plain = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": modules,
            "task_type": "CAUSAL_LM",
        }
        config = plain if source is None else json.loads((source / ADAPTER_CONFIG).read_text())
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
        (folder / ADAPTER_METADATA).write_text(json.dumps(_metadata(folder, manifest)))
    return names


def _noisy(random_numbers: np.random.Generator, array: Any) -> Any:
    return (array + 0.1 * array.std() * random_numbers.standard_normal(array.shape)).astype(
        array.dtype
    )


def _metadata(folder: Path, manifest: Manifest) -> dict[str, Any]:
    return {
        "schema": 1,
        "base": {"name": manifest.base.name, "digest": manifest.base.digest},
        "task": "text-generation",
        "labels": None,
        "pooling": None,
        "prompt_format": None,
        "generation": None,
        "max_length": 256,
        "files": {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG)
        },
        "metrics": {},
        "edgetune_version": "0.1.0",
    }


def linked(out: Path, made: Path, names: Sequence[str], count: int) -> list[str]:
    """`count` adapter folders (`n0`, …) whose files are hard links to those of a few: hundreds
    without the disk.
    """
    for k in range(count):
        (out / f"n{k}").mkdir(parents=True)
        for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG, ADAPTER_METADATA):
            os.link(made / names[k % len(names)] / name, out / f"n{k}" / name)
    return [f"n{k}" for k in range(count)]


# --------------------------------------------------------------------------------
# requests


@dataclass(frozen=True)
class Job:
    """A request that is sent `at` seconds after the round's start, whatever the others do (open
    loop).
    """

    adapter: str | None
    ids: list[int]
    new: int
    at: float = 0.0


@dataclass
class Answer:
    """Seconds: to the first text, from when the job was due; to the end, from the round's start."""

    first: float = 0.0
    end: float = 0.0
    tokens: int = 0


class Prompts:
    """Pseudo-random prompts, never the same twice, so that no prefix is found again."""

    def __init__(self, vocabulary: int, seed: int = 0) -> None:
        self._vocabulary, self._random = vocabulary, random.Random(seed)

    def __call__(self, tokens: int) -> list[int]:
        """Token ids above the special ones."""
        return [
            self._random.randrange(self._vocabulary // 8, self._vocabulary) for _ in range(tokens)
        ]


def no_end(runtime: Runtime) -> dict[int, float]:
    """A bias that bans the end tokens: every answer has all its tokens."""
    return dict.fromkeys(runtime.tokenizer.eos_token_ids, -100.0)


def by_python(scheduler: Scheduler, jobs: Sequence[Job]) -> list[Answer]:
    """Send the jobs through the scheduler of this process."""
    answers, left, bias = (
        [Answer() for _ in jobs],
        threading.Semaphore(0),
        no_end(scheduler.runtime),
    )
    failures: list[Exception] = []
    start = time.perf_counter()

    def listener(job: Job, answer: Answer) -> Any:
        def on_event(event: Event) -> None:
            if isinstance(event, TokenEvent):
                if event.text and not answer.first:
                    answer.first = time.perf_counter() - start - job.at
                return
            answer.end = time.perf_counter() - start
            if isinstance(event, FinishedEvent):
                answer.tokens = event.completion.completion_tokens
            elif isinstance(event, FailedEvent):
                failures.append(event.error)
            left.release()

        return on_event

    for job, answer in sorted(zip(jobs, answers, strict=True), key=lambda pair: pair[0].at):
        time.sleep(max(0.0, start + job.at - time.perf_counter()))
        settings = scheduler.runtime.settings(job.adapter, max_new_tokens=job.new, logit_bias=bias)
        scheduler.submit(GenerationRequest(job.ids, job.adapter, settings), listener(job, answer))
    for _ in jobs:
        left.acquire()
    if failures:
        raise failures[0]
    return answers


def request_bytes(path: str, body: Any) -> bytes:
    """A POST as it goes over the wire; `body` is JSON, or bytes that pretend to be."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection:"
        f" close\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def by_http(port: int, jobs: Sequence[Job], bias: dict[int, float]) -> list[Answer]:
    """Send the jobs to a server: one thread, one selector, no parsing but of the last event, to
    take little of the cores.
    """
    answers, picked = [Answer() for _ in jobs], selectors.DefaultSelector()
    waiting = sorted(range(len(jobs)), key=lambda i: jobs[i].at)[::-1]
    received: dict[int, bytearray] = {}
    start = time.perf_counter()
    while waiting or picked.get_map():
        while waiting and jobs[waiting[-1]].at <= time.perf_counter() - start:
            i = waiting.pop()
            stream = socket.create_connection(("127.0.0.1", port))
            stream.sendall(request_bytes("/v1/completions", _body(jobs[i], bias)))
            received[i] = bytearray()
            picked.register(stream, selectors.EVENT_READ, i)
        pause = max(0.0, start + jobs[waiting[-1]].at - time.perf_counter()) if waiting else None
        if not picked.get_map():
            time.sleep(pause or 0)
            continue
        for key, _ in picked.select(pause):
            i, stream = key.data, key.fileobj
            assert isinstance(stream, socket.socket)
            data = stream.recv(65536)
            received[i] += data
            if not answers[i].first and b"data: " in received[i]:
                answers[i].first = time.perf_counter() - start - jobs[i].at
            if not data:
                answers[i].end, answers[i].tokens = (
                    time.perf_counter() - start,
                    _tokens(received[i]),
                )
                picked.unregister(stream)
                stream.close()
    return answers


def _body(job: Job, bias: dict[int, float]) -> dict[str, Any]:
    return {
        "model": job.adapter or "base",
        "prompt": job.ids,
        "max_tokens": job.new,
        "logit_bias": {str(token): value for token, value in bias.items()},
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _tokens(received: bytearray) -> int:
    events = [part for part in received.split(b"data: ") if b'"completion_tokens"' in part]
    if not events:
        raise SystemExit(
            f"the server did not answer to the end: {received[:300].decode(errors='replace')}"
        )
    return int(json.loads(events[-1].split(b"\n")[0])["usage"]["completion_tokens"])


# --------------------------------------------------------------------------------
# server


class Server:
    """`edgetune serve` as a process."""

    def __init__(self, process: subprocess.Popen[str], port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log

    def errors(self) -> list[str]:
        """Lines of its log of level error."""
        return [
            line
            for line in self.log.read_text().splitlines()
            if '"level": "error"' in line or "Traceback" in line
        ]


@contextmanager
def served(bundle: Path, log: Path, *options: str) -> Iterator[Server]:
    """Serve until the block ends; it must end by itself after SIGTERM, with exit status 0."""
    command = [
        sys.executable,
        "-m",
        "edgetune",
        "serve",
        str(bundle),
        "--port",
        "0",
        "--model-name",
        "base",
        *options,
    ]
    with (
        log.open("w") as file,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if "http://127.0.0.1:" not in line:
                raise SystemExit(f"the server did not start: {line}{log.read_text()[-2000:]}")
            port = int(line.rpartition(":")[2])
            _until_ready(port)
            yield Server(process, port, log)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                status = process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                status = -9
    if status:
        raise SystemExit(f"the server ended with status {status}, see {log}")


def _until_ready(port: int) -> None:
    for _ in range(600):
        try:
            with socket.create_connection(("127.0.0.1", port)) as stream:
                stream.sendall(
                    b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
                )
                if b" 200 " in stream.recv(100):
                    return
        except OSError:
            pass
        time.sleep(0.05)
    raise SystemExit("the server did not become ready within 30 s")
